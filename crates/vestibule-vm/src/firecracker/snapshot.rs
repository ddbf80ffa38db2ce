//! Saving a VM and what a snapshot of it belongs to; and the counters that Firecracker kept.
//!
//! Every Firecracker tells a restored guest that it is another one (VMGenID, Firecracker fact 17), and Debian 12's cloud kernel has
//! no driver that would hear it. So a copy's entropy, like its clock and its name, comes from the config drive.
use super::{FirecrackerMachine, launch::boot_of, open_written, request, unlink};
use crate::driver::{Capabilities, Launch, LaunchError, MachineError, Memory};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
};
use vestibule_api::snapshot::Binding;

/// Everything that a snapshot of this VM is bound to; none for one that neither is nor becomes a snapshot. Firecracker's own
/// check comes late and says `bitcode error` (Firecracker fact 14), so all of it is compared before a process is started:
/// version, format of the state, CPU, and the host's kernel, of whose KVM the state is made.
pub(super) async fn binding(
    capabilities: &Capabilities,
    cache_dir: Option<Utf8PathBuf>,
    launch: &Launch,
) -> Result<Option<Binding>, LaunchError> {
    if matches!(launch.memory, Memory::Own) {
        return Ok(None);
    }
    let tsc_khz = tokio::task::spawn_blocking(move || crate::tsc::khz(cache_dir.as_deref()))
        .await
        .map_err(io::Error::other)
        .map_err(LaunchError::prepare("measure the counter"))?;
    let kernel = rustix::system::uname();
    let cpu = crate::cpu::read();
    Ok(Some(Binding {
        image_digest: launch.image_digest.clone(),
        agent_build: launch.agent_build.clone(),
        driver: capabilities.driver.clone(),
        vmm_version: capabilities.version.clone(),
        machine: format!(
            "{}, host kernel {}",
            capabilities.machine,
            kernel.release().to_string_lossy()
        ),
        cpu: format!("host ({})", cpu.model),
        cpu_features: cpu.features.clone(),
        memory_mib: launch.memory_mib,
        vcpus: launch.vcpus,
        runner: env!("CARGO_PKG_VERSION").to_owned(),
        arguments: shape(launch),
        cmdline: request::cmdline(&launch.cmdline),
        tsc_khz,
    }))
}

/// SHA-256 of the requests that make the machine. Names in them are the same in every VM.
fn shape(launch: &Launch) -> String {
    let mut sha = Sha256::new();
    for request in request::boot(&boot_of(launch)) {
        let body = request.body().unwrap_or_default();
        sha.update(format!("{} {}\0{body}\0", request.method(), request.path()));
    }
    crate::snapshot::hex(sha.finalize())
}

impl FirecrackerMachine {
    /// Stops the CPUs, has memory and state written, and ends the VMM. The state goes through the VMM's own directory, which
    /// is all that a jailed one can write to.
    pub(super) async fn save_to(&self, mut state: File) -> Result<(), MachineError> {
        let memory = self.memory.as_ref().ok_or_else(|| MachineError::Unsafe {
            what: "save",
            why: String::from("it was not made to be saved"),
        })?;
        for request in request::save(&memory.name) {
            self.command("save", &request).await?;
        }
        let path = self.directory.join(request::STATE);
        let copied = tokio::task::spawn_blocking(move || {
            // What is longer is no state, and no load will take it.
            io::copy(&mut open_written(&path)?.take(STATE_LIMIT), &mut state)?;
            unlink(&path)
        });
        match copied.await {
            Ok(copied) => copied.map_err(MachineError::Save)?,
            Err(err) => return Err(MachineError::Save(io::Error::other(err))),
        }
        self.end().await;
        if memory.foreign {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            std::os::unix::fs::chown(&memory.path, Some(uid.as_raw()), Some(gid.as_raw()))
                .map_err(MachineError::Save)?;
        }
        Ok(())
    }
}

/// Some times what a state of 32 CPUs has.
const STATE_LIMIT: u64 = 64 << 20;
/// The file grows by a line a minute for as long as the VM lives; only its end matters.
const METRICS_TAIL: u64 = 256 << 10;
/// The longest line, and the longest name of a counter in it: what the VMM makes of them has no end.
const LINE_LIMIT: usize = 4 << 10;
const NAME_LIMIT: usize = 200;

/// Which of Firecracker's counters of faults are not zero, as one line for its log; none where all are. Blocks on the disk.
pub(super) fn counters(directory: &Utf8Path) -> Option<String> {
    let mut file = open_written(&directory.join(request::METRICS)).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(METRICS_TAIL)))
        .ok()?;
    let mut bytes = Vec::new();
    file.take(METRICS_TAIL).read_to_end(&mut bytes).ok()?;
    let mut faults = String::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Ok(metrics) = serde_json::from_slice::<Value>(line) {
            collect("", &metrics, &mut faults);
        }
    }
    let faults = faults.strip_prefix(", ")?;
    Some(format!("[vestibule: counters of the VMM: {faults}]\n"))
}

/// Counters whose names say that something failed. Each line of the file has what was counted since the one before.
fn collect(name: &str, value: &Value, faults: &mut String) {
    if name.len() > NAME_LIMIT || faults.len() > LINE_LIMIT {
        return;
    }
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let dot = if name.is_empty() { "" } else { "." };
                let key = crate::log::printable(key);
                collect(&format!("{name}{dot}{key}"), value, faults);
            }
        }
        Value::Number(count) if count.as_u64().is_some_and(|count| count > 0) => {
            let fault = ["fail", "fault", "error", "missed", "dropped", "panic"];
            if fault.iter().any(|word| name.contains(word)) {
                faults.push_str(&format!(", {name} {count}"));
            }
        }
        Value::Number(_) | Value::Null | Value::Bool(_) | Value::String(_) | Value::Array(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_faults_are_told_and_others_not() {
        let dir = camino_tempfile::tempdir().unwrap();
        assert_eq!(counters(dir.path()), None);
        let path = dir.path().join(request::METRICS);
        let quiet = r#"{"utc_timestamp_ms":1,"vcpu":{"exit_io_out":7,"failures":0},"uart":{"error_count":0}}"#;
        std::fs::write(&path, format!("{quiet}\n")).unwrap();
        assert_eq!(counters(dir.path()), None);
        let loud = r#"{"vcpu":{"exit_io_out":7,"failures":1},"uart":{"missed_write_count":3}}"#;
        std::fs::write(&path, format!("{quiet}\n{loud}\n{{\"half")).unwrap();
        let line = counters(dir.path()).unwrap();
        assert!(
            line.contains("vcpu.failures 1") && line.contains("uart.missed_write_count 3"),
            "{line}"
        );
        assert!(!line.contains("exit_io_out"), "{line}");
    }

    #[test]
    fn what_the_vmm_put_in_the_place_of_its_counters_does_no_harm() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().join(request::METRICS);
        let loud = r#"{"failures":1}"#;
        let elsewhere = dir.path().join("elsewhere");
        std::fs::write(&elsewhere, loud).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert_eq!(counters(dir.path()), None);
        std::fs::remove_file(&path).unwrap();
        // Whoever opens it as a file waits for ever.
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            path.as_std_path(),
            rustix::fs::Mode::from_raw_mode(0o600),
        )
        .unwrap();
        assert_eq!(counters(dir.path()), None);
        std::fs::remove_file(&path).unwrap();
        let long = "fail".repeat(20 << 10);
        let many = format!(r#"{{"fail\u001b[2J":1,"{long}":{{"a":1}}}}"#);
        std::fs::write(&path, [many.as_bytes(), b"\n\xff\xfe\n"].concat().repeat(2)).unwrap();
        let line = counters(dir.path()).unwrap();
        assert!(line.len() < 200 && !line.contains('\u{1b}'), "{line:?}");
        let many = format!("{loud}\n").repeat(LINE_LIMIT);
        std::fs::write(&path, many).unwrap();
        assert!(counters(dir.path()).unwrap().len() < 2 * LINE_LIMIT);
    }
}
