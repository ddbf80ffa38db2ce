//! No core dumps: one of a VMM, a runner or a controller would hold what a person typed, and keep it on a disk.
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// One byte is too little for any file, and what the kernel takes for "not into a pipe either": a handler that `core_pattern`
/// names, as systemd's or Ubuntu's, is given a dump whatever the limit, 0 included, unless that is 1 (its fs/coredump.c).
const BYTES: u64 = 1;

/// Keeps this process, and all that it starts, from being dumped. Only system calls: may be called between fork and exec.
///
/// # Errors
/// When the kernel refuses the limit, which it has no reason to: limits may always be lowered.
pub fn forbid() -> rustix::io::Result<()> {
    let most = getrlimit(Resource::Core).maximum;
    let limit = Some(most.map_or(BYTES, |most| most.min(BYTES)));
    setrlimit(
        Resource::Core,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        jail::enter::Confinement,
        log::{BoundedLog, piped},
        process::Program,
    };
    use std::{os::unix::process::ExitStatusExt as _, process::Command};

    const ABORT: &str = "cat /proc/self/limits >&2; kill -ABRT $$";

    #[tokio::test]
    async fn a_vmm_is_not_dumped_where_its_runner_would_be() {
        let home = camino_tempfile::tempdir().unwrap();
        let most = getrlimit(Resource::Core).maximum;
        let allow = Rlimit {
            current: most,
            maximum: most,
        };
        setrlimit(Resource::Core, allow).unwrap();
        let log = BoundedLog::create(&home.path().join("log"), 64 << 10).unwrap();
        let directory = home.path().join("vmm");
        std::fs::create_dir(&directory).unwrap();
        let program = Program {
            path: "/bin/bash".into(),
            args: vec!["-c".into(), ABORT.into()],
            directory: directory.clone(),
            stdout: None,
            stderr: piped("log", log.clone()).unwrap(),
            inherit: Vec::new(),
            confinement: Confinement::default(),
        };
        let exit = program.spawn().await.unwrap().wait().await;
        assert_eq!(exit.signal, Some(libc::SIGABRT), "{exit:?}");
        let mut progress = log.progress();
        progress.wait_for(|progress| progress.ended).await.unwrap();
        let said = String::from_utf8(log.render().unwrap()).unwrap();
        let line = said.lines().find(|line| line.starts_with("Max core"));
        let words: Vec<_> = line.unwrap().split_whitespace().collect();
        assert!(matches!(words[4..6], ["0" | "1", "0" | "1"]), "{words:?}");
        assert_eq!(directory.read_dir_utf8().unwrap().count(), 0);

        // What the same program comes to otherwise.
        let mut command = Command::new("/bin/bash");
        command.args(["-c", ABORT]).current_dir(&directory);
        let status = command.output().unwrap().status;
        if !status.core_dumped() {
            println!("this host dumps nothing, whatever the limit: the limit alone was looked at");
        }
    }
}
