//! Says in the VM's directory which processes are the VM's: what of a runner that was killed is left to be looked at.
use camino::Utf8Path;
use std::io;
use vestibule_api::machine::{PROCESSES_MARK, ProcessMark, ProcessesMark};

/// Writes [`PROCESSES_MARK`], whole or not at all. `vmm` is the first process of the VMM's group.
pub(crate) fn leave_mark(vm_dir: &Utf8Path, vmm: Option<u32>) -> io::Result<()> {
    let mark = ProcessesMark {
        namespace: std::fs::read_link("/proc/self/ns/pid")?
            .to_string_lossy()
            .into_owned(),
        runner: mark(std::process::id())?,
        vmm: vmm.map(mark).transpose()?,
    };
    let partial = vm_dir.join(format!(".{PROCESSES_MARK}.partial"));
    std::fs::write(&partial, serde_json::to_vec(&mark)?)?;
    std::fs::rename(&partial, vm_dir.join(PROCESSES_MARK))
}

fn mark(pid: u32) -> io::Result<ProcessMark> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // After the name, which may hold anything, comes the third field (proc_pid_stat(5)).
    let started = stat
        .rsplit_once(')')
        .and_then(|(_, fields)| fields.split_whitespace().nth(22 - 3)?.parse().ok());
    Ok(ProcessMark {
        pid,
        started: started.ok_or_else(|| io::Error::other("no start time"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_names_both_and_is_replaced() {
        let dir = camino_tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let read = || -> ProcessesMark {
            serde_json::from_slice(&std::fs::read(dir.path().join(PROCESSES_MARK)).unwrap())
                .unwrap()
        };
        leave_mark(dir.path(), None).unwrap();
        let first = read();
        assert_eq!((first.runner.pid, &first.vmm), (std::process::id(), &None));
        leave_mark(dir.path(), Some(child.id())).unwrap();
        let second = read();
        let vmm = second.vmm.unwrap();
        assert_eq!((vmm.pid, second.runner), (child.id(), first.runner));
        assert!(vmm.started >= first.runner.started, "{vmm:?}");
        assert_eq!(dir.path().read_dir_utf8().unwrap().count(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
