//! Programs that the agent starts: as whom, with which environment, and how they are ended with all that they started.
//!
//! A tool leads a session and a process group of its own. Some tools leave daemons that have left that group
//! (reference/providers.md §0.8), so in the guest a tool also has a cgroup, whose `cgroup.kill` reaches all of them.
use crate::guest::Person;
use rustix::process::{Pid, Signal, kill_process_group};
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
    time::Instant,
};

/// Why a program does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("make a terminal")]
    Pty(#[source] pty_process::Error),
    #[error("start a program: there is none named")]
    Empty,
    #[error("start `{program}`")]
    Start {
        program: String,
        #[source]
        err: pty_process::Error,
    },
    #[error("put `{program}` into its cgroup")]
    Cgroup {
        program: String,
        #[source]
        err: io::Error,
    },
}

/// A program with everything that it is given. Nothing of the agent's own environment reaches it.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) argv: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) directory: PathBuf,
    /// None: as whoever runs the agent.
    pub(crate) user: Option<Person>,
}

impl Program {
    fn name(&self) -> &str {
        self.argv.first().map_or("", String::as_str)
    }

    /// The error of a start that failed.
    pub(crate) fn failed(&self, err: pty_process::Error) -> ProgramError {
        ProgramError::Start {
            program: self.name().to_owned(),
            err,
        }
    }

    /// The program as a command for a PTY, in `cgroup` from its first instruction.
    pub(crate) fn pty_command(
        &self,
        cgroup: Option<&Cgroup>,
    ) -> Result<pty_process::Command, ProgramError> {
        let (program, args) = self.argv.split_first().ok_or(ProgramError::Empty)?;
        let mut command = pty_process::Command::new(program)
            .args(args)
            .env_clear()
            .envs(&self.env)
            .current_dir(&self.directory);
        if let Some(person) = &self.user {
            command = command.gid(person.gid).uid(person.uid);
        }
        let Some(cgroup) = cgroup else {
            return Ok(command);
        };
        let procs = cgroup.procs().map_err(|err| ProgramError::Cgroup {
            program: program.clone(),
            err,
        })?;
        let enter = move || {
            rustix::io::write(&procs, b"0")
                .map(drop)
                .map_err(io::Error::from)
        };
        #[expect(
            unsafe_code,
            reason = "only a hook between fork and exec can put a process into a cgroup in time"
        )]
        // SAFETY: the hook makes one write(2) on a descriptor that was opened before the fork, which is
        // async-signal-safe; it allocates nothing.
        let command = unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// The program without a terminal, leading a process group, with piped output.
    pub(crate) fn piped_command(&self) -> Option<tokio::process::Command> {
        let (program, args) = self.argv.split_first()?;
        let mut command = tokio::process::Command::new(program);
        command
            .args(args)
            .env_clear()
            .envs(&self.env)
            .current_dir(&self.directory)
            .process_group(0)
            .kill_on_drop(true);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(person) = &self.user {
            command.gid(person.gid).uid(person.uid);
        }
        Some(command)
    }
}

/// What came of a program that ran to its end, or was ended at its limit.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// Whether output beyond [`OUTPUT_LIMIT`] was dropped.
    pub(crate) truncated: bool,
    pub(crate) timed_out: bool,
}

impl Program {
    /// Runs the program with `stdin`, for at most `limit`; then it is killed with its process group.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) async fn run(&self, stdin: &[u8], limit: Duration) -> Result<Ran, ProgramError> {
        let mut command = self.piped_command().ok_or(ProgramError::Empty)?;
        command.stdin(Stdio::piped());
        let mut process = command
            .spawn()
            .map_err(|err| self.failed(pty_process::Error::Io(err)))?;
        let (mut input, output, errors) = (
            process.stdin.take(),
            process.stdout.take(),
            process.stderr.take(),
        );
        let mut child = Child::new(process, None);
        let feed = async {
            if let Some(mut input) = input.take() {
                // A program need not read what it is given.
                let _ = input.write_all(stdin).await;
            }
        };
        let (mut stdout, mut stderr) = (Kept::default(), Kept::default());
        let work = async { tokio::join!(feed, stdout.fill(output), stderr.fill(errors)) };
        let deadline = Instant::now() + limit;
        // A daemon that keeps the pipes open must not keep us: the program's own end is what counts, and a little more.
        let timed_out = tokio::select! {
            _ = work => tokio::time::timeout_at(deadline, child.exited()).await.is_err(),
            ended = tokio::time::timeout_at(deadline, child.exited_and(PIPE_GRACE)) => ended.is_err(),
        };
        child.end(Duration::ZERO).await;
        let status = child.exited().await;
        Ok(Ran {
            code: status.code(),
            signal: status.signal(),
            truncated: stdout.truncated || stderr.truncated,
            stdout: String::from_utf8_lossy(&stdout.bytes).into_owned(),
            stderr: String::from_utf8_lossy(&stderr.bytes).into_owned(),
            timed_out,
        })
    }
}

/// Each output is kept up to so many bytes.
const OUTPUT_LIMIT: usize = 1 << 20;
/// After a program's end, its pipes are read for so long if somebody else still holds them.
const PIPE_GRACE: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Kept {
    /// Reads to the end; what does not fit is read and dropped, so that the program never blocks on it.
    async fn fill(&mut self, pipe: Option<impl AsyncRead + Unpin>) {
        let Some(mut pipe) = pipe else { return };
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = pipe.read(&mut buffer).await {
            let fits = read.min(OUTPUT_LIMIT - self.bytes.len());
            self.bytes.extend_from_slice(&buffer[..fits]);
            self.truncated |= fits < read;
        }
    }
}

/// A process that leads a group; reaped by a task of its own.
#[derive(Debug)]
pub(crate) struct Child {
    group: Option<Pid>,
    status: watch::Receiver<Option<ExitStatus>>,
    cgroup: Option<Cgroup>,
}

impl Child {
    /// Takes over a process that was just started.
    pub(crate) fn new(mut process: tokio::process::Child, cgroup: Option<Cgroup>) -> Self {
        let group = process
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        let (ended, status) = watch::channel(None);
        tokio::spawn(async move {
            // Waiting fails only for a child that somebody else has reaped; that is an end without a status.
            let status = process
                .wait()
                .await
                .unwrap_or_else(|_| ExitStatus::from_raw(0xff00));
            ended.send_replace(Some(status));
        });
        Self {
            group,
            status,
            cgroup,
        }
    }

    /// Waits for the process's end.
    pub(crate) async fn exited(&mut self) -> ExitStatus {
        match self.status.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_else(|| ExitStatus::from_raw(0xff00)),
            Err(_) => ExitStatus::from_raw(0xff00),
        }
    }

    async fn exited_and(&mut self, longer: Duration) {
        self.exited().await;
        tokio::time::sleep(longer).await;
    }

    /// Ends the process and all that it started: asks, waits for at most `grace`, then kills.
    pub(crate) async fn end(&mut self, grace: Duration) {
        if self.status.borrow().is_none() && !grace.is_zero() {
            self.signal(Signal::HUP);
            self.signal(Signal::TERM);
            let _ = tokio::time::timeout(grace, self.exited()).await;
        }
        self.signal(Signal::KILL);
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        self.exited().await;
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // ESRCH: the whole group has ended.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.status.borrow().is_none() {
            self.signal(Signal::KILL);
        }
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
    }
}

/// A cgroup below the agent's own (cgroup v2; the unit has `Delegate=yes`).
#[derive(Debug)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the cgroup `name`, or uses it again. None where cgroups are not ours to make (tests, containers).
    pub(crate) fn make(name: &str) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let path = Path::new("/sys/fs/cgroup").join(own);
        // Only a cgroup v2 directory has this file; elsewhere a plain directory would be made.
        let path = path
            .join("cgroup.procs")
            .exists()
            .then(|| path.join(name))?;
        match fs::create_dir(&path) {
            Ok(()) => Some(Self(path)),
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Some(Self(path)),
            Err(_) => None,
        }
    }

    fn procs(&self) -> io::Result<fs::File> {
        fs::File::options()
            .write(true)
            .open(self.0.join("cgroup.procs"))
    }

    /// Kills every process in it (cgroup.kill, Linux 5.14).
    fn kill(&self) {
        if let Err(err) = fs::write(self.0.join("cgroup.kill"), "1") {
            tracing::warn!(error = %err, cgroup = %self.0.display(), "could not kill a cgroup");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A program of the host's, as whoever runs the test.
    pub(crate) fn program(argv: &[&str]) -> Program {
        Program {
            argv: argv.iter().map(|arg| (*arg).to_owned()).collect(),
            env: BTreeMap::from([
                ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
                ("TERM".to_owned(), "xterm".to_owned()),
            ]),
            directory: "/".into(),
            user: None,
        }
    }

    pub(crate) fn shell(script: &str) -> Program {
        program(&["/bin/bash", "-c", script])
    }

    pub(crate) fn python(script: &str) -> Program {
        program(&["/usr/bin/python3", "-c", script])
    }

    fn start(script: &str) -> Child {
        Child::new(
            shell(script).piped_command().unwrap().spawn().unwrap(),
            None,
        )
    }

    #[tokio::test]
    async fn a_tool_that_ignores_signals_is_killed_with_its_children() {
        let dir = camino_tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = format!(
            "trap '' HUP TERM; sleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait; wait; sleep 1000"
        );
        let mut child = start(&script);
        let seen = tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                if let Ok(text) = fs::read_to_string(&pids) {
                    return text;
                }
                tokio::task::yield_now().await;
            }
        });
        let seen = seen.await.unwrap();
        child.end(Duration::from_millis(100)).await;
        // A child of its own is killed with it, and gone as soon as it has run once more.
        for pid in seen.split_whitespace() {
            let over = async {
                let stat = format!("/proc/{pid}/stat");
                while fs::read_to_string(&stat).is_ok_and(|state| !state.contains(") Z ")) {
                    tokio::task::yield_now().await;
                }
            };
            let waited = tokio::time::timeout(Duration::from_secs(10), over).await;
            assert!(waited.is_ok(), "{pid} lives");
        }
    }

    #[tokio::test]
    async fn a_run_is_bounded_in_time_and_output() {
        let ran = shell("cat; echo err >&2; exit 3")
            .run(b"in", Duration::from_secs(10))
            .await
            .unwrap();
        assert_eq!(
            (
                ran.stdout.as_str(),
                ran.stderr.as_str(),
                ran.code,
                ran.truncated
            ),
            ("in", "err\n", Some(3), false)
        );
        let ran = shell("head -c 3000000 /dev/zero; sleep 1000 & exit 0")
            .run(b"", Duration::from_secs(20))
            .await
            .unwrap();
        assert_eq!(
            (ran.stdout.len(), ran.truncated, ran.code, ran.timed_out),
            (OUTPUT_LIMIT, true, Some(0), false)
        );
        let ran = shell("echo begun; sleep 1000")
            .run(b"", Duration::from_millis(300))
            .await
            .unwrap();
        assert_eq!(
            (ran.stdout.as_str(), ran.timed_out, ran.signal),
            ("begun\n", true, Some(9))
        );
        assert!(matches!(
            program(&["/nonexistent"])
                .run(b"", Duration::from_secs(1))
                .await,
            Err(ProgramError::Start { .. })
        ));
    }

    #[tokio::test]
    async fn the_status_is_the_programs() {
        assert_eq!(start("exit 7").exited().await.code(), Some(7));
        let mut sleeper = start("exec sleep 1000");
        sleeper.end(Duration::from_secs(10)).await;
        // The second one where whoever runs the tests has the first one ignored, as nohup(1) does.
        let signal = sleeper.exited().await.signal();
        assert!(matches!(signal, Some(1 | 15)), "{signal:?}");
    }
}
