//! A runner's evidence bundle on disk, the only place where this crate opens files by name.
use crate::{Evidence, HostFacts};
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
            let text = |keys: &[&str]| {
                keys.iter()
                    .find_map(|k| value.pointer(k))
                    .and_then(|v| v.as_str().map(str::to_owned))
            };
            host.image_digest = text(&["/spec/imageDigest", "/imageDigest"]);
            host.declared_agent_build =
                text(&["/agentBuild", "/declaredAgentBuild", "/spec/agentBuild"]);
            if let Some(cmdline) = text(&["/cmdline", "/spec/cmdline", "/kernelCmdline"]) {
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
