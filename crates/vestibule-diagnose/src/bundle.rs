//! A runner's evidence bundle on disk, the only place where this crate opens files by name.
use crate::{Evidence, HostFacts, disk::source::SeekSource};
use serde::de::DeserializeOwned;
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};
use vestibule_api::{
    agent::Report,
    machine::{Exit, MachineState, RunnerEvent, RunnerEventKind},
};

/// An image's root in its directory.
const ROOT: &str = "root.ext4";
/// Bytes read of one file of a bundle.
const FILE_LIMIT: u64 = 32 << 20;

/// Why a bundle cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadBundleError {
    #[error("read evidence file {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("find evidence in {path}: it holds none of machine.json, serial.log, exit.json")]
    Empty { path: PathBuf },
}

impl Evidence {
    /// [`Evidence::from_dir`], and the root of the image that the VM was made from, where `machine.json` names one that is
    /// still there.
    ///
    /// # Errors
    /// As [`Evidence::from_dir`].
    pub fn of_vm(dir: &Path) -> Result<Self, ReadBundleError> {
        let evidence = Self::from_dir(dir)?;
        let image = evidence.host.image_dir.as_deref();
        let Some(root) = image.and_then(|image| File::open(Path::new(image).join(ROOT)).ok())
        else {
            return Ok(evidence);
        };
        Ok(match SeekSource::file(root) {
            Ok(source) => evidence.disk_image(source),
            Err(err) => evidence.unreadable_disk(err.to_string()),
        })
    }

    /// Reads `machine.json`, `serial.log`, `vmm.log`, `report.json`, `events.ndjson` and `exit.json` of a bundle. A file
    /// that is not there, or not what it should be, is left out: half a bundle still is evidence.
    ///
    /// # Errors
    /// When the directory holds no evidence at all, or a file that is there cannot be read.
    pub fn from_dir(dir: &Path) -> Result<Self, ReadBundleError> {
        let mut evidence = Self::new();
        let mut host = HostFacts::default();
        let mut any = false;
        if let Some(bytes) = read(dir, "machine.json")? {
            any = true;
            let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let text = |key: &str| {
                value
                    .pointer(key)
                    .and_then(|v| v.as_str().map(str::to_owned))
            };
            host.image_digest = text("/spec/imageDigest");
            host.image_dir = text("/spec/imageDir");
            host.declared_agent_build = text("/agentBuild");
            host.required_units = value
                .pointer("/requiredUnits")
                .and_then(|units| serde_json::from_value(units.clone()).ok())
                .unwrap_or_default();
            host.agent_build = text("/view/health/build");
            host.failure = value
                .pointer("/view/failure")
                .and_then(|f| serde_json::from_value(f.clone()).ok());
            host.failed = host.failure.is_some();
            if let Some(cmdline) = text("/kernelCmdline") {
                evidence = evidence.cmdline(cmdline);
            }
        }
        if let Some(bytes) = read(dir, "serial.log")? {
            any = true;
            evidence = evidence.serial(bytes);
        }
        if let Some(bytes) = read(dir, "vmm.log")? {
            host.vmm_log = Some(String::from_utf8_lossy(&bytes).into_owned());
        }
        if let Some(report) = json::<Report>(dir, "report.json")? {
            evidence = evidence.report(report);
        }
        if let Some(exit) = json::<Exit>(dir, "exit.json")? {
            any = true;
            host.exit = Some(exit);
        }
        if let Some(bytes) = read(dir, "events.ndjson")? {
            take_events(&mut host, &bytes);
        }
        if !any {
            return Err(ReadBundleError::Empty {
                path: dir.to_owned(),
            });
        }
        Ok(evidence.host(host))
    }
}

fn take_events(host: &mut HostFacts, bytes: &[u8]) {
    let mut up = false;
    for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let Ok(event) = serde_json::from_slice::<RunnerEvent>(line) else {
            continue;
        };
        match event.event {
            RunnerEventKind::Phase { phase } => host.phase = host.phase.max(Some(phase)),
            RunnerEventKind::State {
                state: MachineState::Up,
                ..
            } => up = true,
            RunnerEventKind::Failed { finding } => {
                host.failed = true;
                host.failure.get_or_insert(finding);
            }
            RunnerEventKind::Agent {
                event: vestibule_api::agent::AgentEvent::Ready { health },
            } => {
                host.agent_build = Some(health.build);
            }
            RunnerEventKind::State { .. }
            | RunnerEventKind::Agent { .. }
            | RunnerEventKind::Egress { .. }
            | RunnerEventKind::Viewers { .. }
            | RunnerEventKind::FirstFrame
            | RunnerEventKind::Ended { .. } => {}
        }
    }
    host.failed |= !up && host.exit.is_some();
}

fn read(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, ReadBundleError> {
    let path = dir.join(name);
    let attempt = || -> io::Result<Vec<u8>> {
        let mut file = File::open(&path)?;
        let len = file.seek(SeekFrom::End(0))?;
        // The end of a log says more than its beginning.
        file.seek(SeekFrom::Start(len.saturating_sub(FILE_LIMIT)))?;
        let mut bytes = Vec::new();
        file.take(FILE_LIMIT).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match attempt() {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ReadBundleError::Read { path, source }),
    }
}

fn json<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, ReadBundleError> {
    Ok(read(dir, name)?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::{cause::Cause, finding::VerdictKind};

    /// A bundle as the runner of `vestibule-vm` writes it, of a VM whose kernel has no driver for its disk.
    #[test]
    fn a_bundle_is_judged() {
        let dir = std::env::temp_dir().join(format!("vestibule-bundle-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        assert!(matches!(
            Evidence::from_dir(&dir),
            Err(ReadBundleError::Empty { .. })
        ));
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        write(
            "machine.json",
            r#"{"spec":{"imageDigest":"sha256:1"},"commandLine":["qemu"],"kernelCmdline":"console=ttyS0 root=/dev/vda"}"#,
        );
        write(
            "serial.log",
            "[ 1.0] VFS: Cannot open root device \"vda\" or unknown-block(0,0): error -6\n[ 1.1] Kernel panic - not syncing: VFS: Unable to mount root fs\n",
        );
        write("exit.json", r#"{"code":0,"signal":null,"asked":false}"#);
        write("events.ndjson", "not json\n");
        let verdict = crate::diagnose(&Evidence::from_dir(&dir).unwrap());
        assert_eq!(verdict.verdict, VerdictKind::Cause);
        assert_eq!(verdict.finding.unwrap().cause, Cause::RootDriverMissing);
        assert_eq!(verdict.looked_at, ["serial", "cmdline", "vmm"]);
        // Another agent answered than the manifest declares.
        write(
            "machine.json",
            r#"{"spec":{"imageDigest":"sha256:1"},"agentBuild":"aaaa","requiredUnits":["a.service","b.service"],
                "view":{"health":{"build":"bbbb"}}}"#,
        );
        write("serial.log", "");
        let evidence = Evidence::from_dir(&dir).unwrap();
        assert_eq!(evidence.host.required_units, ["a.service", "b.service"]);
        let verdict = crate::diagnose(&evidence);
        assert_eq!(verdict.finding.unwrap().cause, Cause::AgentBuildMismatch);
        // All that is known is that the VM did not come up, and that its image is not the one that is published now.
        write(
            "machine.json",
            r#"{"spec":{"imageDigest":"1"},"kernelCmdline":"console=ttyS0 root=/dev/vda"}"#,
        );
        write("serial.log", "[ 1.0] Linux version 6.1\n");
        write("exit.json", r#"{"code":0,"signal":null,"asked":true}"#);
        let cause = |current: &str| {
            let evidence = Evidence::from_dir(&dir).unwrap();
            let verdict = crate::diagnose(&evidence.current_image(Some(current.to_owned())));
            verdict.finding.map(|finding| finding.cause)
        };
        assert_eq!(cause("2"), Some(Cause::MadeFromOlderImage));
        assert_eq!(cause("1"), None);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
