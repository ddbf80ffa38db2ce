//! The VMM as a child process that cannot outlive its runner.
//!
//! `PR_SET_PDEATHSIG` fires when the *thread* that forked ends (prctl(2)), and a thread of an async runtime may end at
//! any time. So a thread of its own starts the child, stays until the child is gone, and reaps it.
use crate::jail::enter::{Confinement, LAST_SIGNAL, SIGNALLED};
use camino::Utf8PathBuf;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{FdFlags, fcntl_setfd},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
    thread::UnshareFlags,
};
use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Command, ExitStatus, Stdio},
};
use tokio::sync::watch;
use vestibule_api::machine::Exit;

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("start `{program}`")]
    Exec {
        program: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("start the thread that keeps `{program}`")]
    Thread {
        program: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
}

/// What to start. The environment is empty, standard input is `/dev/null`.
#[derive(Debug)]
pub struct Program {
    pub path: Utf8PathBuf,
    pub args: Vec<String>,
    pub directory: Utf8PathBuf,
    /// `/dev/null` where there is none.
    pub stdout: Option<OwnedFd>,
    pub stderr: OwnedFd,
    /// Descriptors that the child inherits under the numbers they have here; no others are.
    pub inherit: Vec<OwnedFd>,
    pub confinement: Confinement,
}

/// A running child. Killed when dropped.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: OwnedFd,
    exit: watch::Receiver<Option<Exit>>,
}

impl Program {
    /// Starts the program in a process group of its own.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub async fn spawn(self) -> Result<Child, SpawnError> {
        let program = self.path.clone();
        let (started, start) = tokio::sync::oneshot::channel();
        let (ended, exit) = watch::channel(None);
        std::thread::Builder::new()
            .name(String::from("vmm keeper"))
            .stack_size(128 << 10)
            .spawn(move || self.keep(started, &ended))
            .map_err(|err| SpawnError::Thread {
                program: program.clone(),
                err,
            })?;
        let started = start
            .await
            .unwrap_or_else(|_| Err(io::Error::other("the keeper thread ended")));
        let (pid, pidfd) = started.map_err(|err| SpawnError::Exec { program, err })?;
        Ok(Child { pid, pidfd, exit })
    }

    /// The keeper thread: starts, tells, waits, tells.
    fn keep(
        self,
        started: tokio::sync::oneshot::Sender<io::Result<(u32, OwnedFd)>>,
        ended: &watch::Sender<Option<Exit>>,
    ) {
        let init = self.confinement.init;
        let mut child = match self.start() {
            Ok(child) => child,
            Err(err) => return drop(started.send(Err(err))),
        };
        let pidfd = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("no process id"))
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        let told = started.send(pidfd.map(|fd| (child.id(), fd)));
        if !matches!(told, Ok(())) {
            // Nobody waits for it any more.
            let _ = child.kill();
        }
        let exit = child.wait().map_or_else(|_| Exit::default(), exit_of);
        let exit = if init { of_init(exit) } else { exit };
        ended.send_replace(Some(exit));
    }

    fn start(self) -> io::Result<std::process::Child> {
        let mut command = Command::new(&self.path);
        command
            .args(&self.args)
            .current_dir(&self.directory)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(self.stdout.map_or_else(Stdio::null, Stdio::from))
            .stderr(self.stderr)
            .process_group(0);
        let runner = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
        let (inherit, confinement) = (self.inherit, self.confinement);
        if confinement.namespaces {
            // SAFETY: this concerns the children of this thread alone, which starts one and no threads.
            #[expect(unsafe_code, reason = "unshare(2) may break what threads share")]
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
        }
        // SAFETY: between fork and exec the closure only makes system calls that are async-signal-safe, and allocates
        // nothing; the descriptors it names stay open in `inherit`, which it owns.
        #[expect(unsafe_code, reason = "only pre_exec runs code in the child")]
        unsafe {
            command.pre_exec(move || {
                prepare(&runner, &inherit)?;
                confinement.enter()
            });
        }
        command.spawn()
    }
}

/// Runs in the child, between fork and exec.
fn prepare(runner: &OwnedFd, inherit: &[OwnedFd]) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have died before the signal was armed; its number means nothing in another pid namespace.
    let mut fds = [PollFd::new(runner, PollFlags::IN)];
    if poll(&mut fds, Some(&Timespec::default()))? != 0 {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    crate::core_dump::forbid()?;
    crate::memory::lift()?;
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC only sets flags of this process' descriptors.
    #[expect(unsafe_code, reason = "neither std nor rustix has close_range")]
    let marked = unsafe {
        libc::close_range(
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC.cast_signed(),
        )
    };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in inherit {
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    Ok(())
}

fn exit_of(status: ExitStatus) -> Exit {
    Exit {
        code: status.code(),
        signal: status.signal(),
        asked: false,
    }
}

/// How the program ended, as the process says that stayed as the first of its namespace.
fn of_init(exit: Exit) -> Exit {
    match exit.code {
        Some(code) if (SIGNALLED + 1..=SIGNALLED + LAST_SIGNAL).contains(&code) => Exit {
            code: None,
            signal: Some(code - SIGNALLED),
            asked: exit.asked,
        },
        Some(_) | None => exit,
    }
}

impl Child {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends SIGKILL. A child that is gone already is none the worse.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Sends SIGKILL when it is called, from wherever.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn killer(&self) -> io::Result<impl FnOnce() + Send + 'static> {
        let pidfd = self.pidfd.try_clone()?;
        Ok(move || {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        })
    }

    /// Waits for the end. Can be asked again, and by several.
    pub async fn wait(&self) -> Exit {
        self.watch().await
    }

    /// As [`Child::wait`], without borrowing the child.
    pub fn watch(&self) -> impl Future<Output = Exit> + Send + 'static {
        let mut exit = self.exit.clone();
        async move {
            match exit.wait_for(Option::is_some).await {
                Ok(exit) => exit.clone().unwrap_or_default(),
                Err(_) => Exit::default(),
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.exit.borrow().is_none() {
            self.kill();
        }
    }
}

/// The number by which a child names an inherited descriptor.
pub fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
