//! The Firecracker driver: 1.12 and newer, on KVM that really runs guests.
//!
//! The machine has two read-only disks (root image and config drive), a serial console, an entropy source and a vsock,
//! which carries the stream. It has no network card. The serial line is the VMM's standard output (Firecracker fact 6), a
//! pipe into the bounded log from the first byte on; its own log goes into the pipe that is its standard error. Firecracker
//! writes to the serial line's pipe without waiting, so that a guest that floods it loses bytes rather than time.
//!
//! Every VM is a fresh process in a directory of its own below the runner's, where files have the same names in every VM
//! (`request.rs` says why). Links there lead to the image. The config drive is in memory, and the link to it names a
//! descriptor that the VMM inherits.
//!
//! ```text
//! vms/<id>/firecracker/  vmlinux initrd root ─▶ the image     config ─▶ /proc/self/fd/N     metrics
//!                        api.sock     stream.sock (the VMM's)     stream.sock_1025 (the runner's)
//! ```
//! The process is the runner's child and never its own daemon, which would have no standard output (Firecracker fact 7). It runs
//! under its own seccomp filters, and where the runner is root and Firecracker's jailer is there, in a jail
//! (Firecracker fact 23): `place.rs` and `jailed.rs` make what either begins in. The jailer's own pid namespace is not used, for its parent
//! exits at once and leaves a VMM that nobody waits for; the runner makes one (`jail/enter.rs`).
//!
//! A request that fails ends the attempt: a failed load ends the process by itself, a failed start may leave it alive, and
//! none is tried again in the same process (Firecracker fact 3). A VM that runs by the API's word may be dead all the same:
//! whether there is a guest is decided by the stream alone.
pub mod api;
#[cfg(test)]
mod contract;
mod jailed;
mod launch;
mod place;
pub mod request;
mod snapshot;
mod standby;
pub mod version;
mod vsock;

pub use standby::Standing;

use crate::{
    driver::{
        Capabilities, ControlError, Driver, Launch, LaunchError, Machine, MachineError, ProbeError,
        Transport,
    },
    evidence::Bundle,
    faults, jail, kept,
    kvm::{self, KvmVerdict},
    log::BoundedLog,
    process::Child,
    until::UntilClosed,
};
use api::Api;
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::{FutureExt, future::BoxFuture};
use request::Request;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    sync::Arc,
    time::Duration,
};
use tokio::sync::{OnceCell, watch};
use version::{Features, OLDEST, Version};
use vestibule_api::{error::Chain, machine::Exit, snapshot::Binding};

/// The program's name.
pub const PROGRAM: &str = "firecracker";
/// Says where the program is, for hosts that have it outside `PATH`.
pub const PROGRAM_VARIABLE: &str = "VESTIBULE_FIRECRACKER";
/// The jailer's name.
pub const JAILER: &str = "jailer";
/// Says where the jailer is.
pub const JAILER_VARIABLE: &str = "VESTIBULE_JAILER";
/// In [`Capabilities::driver`].
pub const NAME: &str = "firecracker";
/// After a failure, so long for the process to say more and end; and so long for an answer that nothing depends on.
const END_LIMIT: Duration = Duration::from_secs(3);
/// Firecracker on this host.
#[derive(Clone, Debug)]
pub struct FirecrackerDriver {
    program: Utf8PathBuf,
    /// Of the same release.
    jailer: Option<Utf8PathBuf>,
    cache_dir: Option<Utf8PathBuf>,
}

/// In the directory for what was found out.
const KEPT: &str = "firecracker.json";

/// An installed Firecracker, by its own words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    pub version: Version,
    /// Format of a snapshot's state: `v6.0.0`. Another one's is refused as a `bitcode error` (Firecracker fact 14).
    pub snapshot_version: String,
}

impl FirecrackerDriver {
    /// Finds Firecracker: what `VESTIBULE_FIRECRACKER` names, else in `PATH`.
    ///
    /// # Errors
    /// [`ProbeError::Missing`] with what was searched.
    pub fn find() -> Result<Self, ProbeError> {
        let named = std::env::var(PROGRAM_VARIABLE).ok();
        match named.filter(|path| !path.is_empty()) {
            Some(path) => Self::at(Utf8PathBuf::from(path)),
            None => Self::at(crate::doctor::find_program(PROGRAM)?),
        }
    }

    /// The Firecracker at `program`, which is made absolute: VMs run in directories of their own.
    ///
    /// # Errors
    /// [`ProbeError::Missing`] where there is no such file.
    pub fn at(program: impl Into<Utf8PathBuf>) -> Result<Self, ProbeError> {
        let program = program.into();
        let found = program.canonicalize_utf8().ok().filter(|p| p.is_file());
        found
            .map(|program| Self {
                jailer: find_jailer(&program),
                program,
                cache_dir: None,
            })
            .ok_or_else(|| ProbeError::Missing {
                program: PROGRAM.to_owned(),
                searched: format!("`{program}`, which {PROGRAM_VARIABLE} names"),
            })
    }

    /// Has what the programs say of themselves kept in `cache_dir`, and that KVM works.
    #[must_use]
    pub fn keeping(mut self, cache_dir: Option<Utf8PathBuf>) -> Self {
        self.cache_dir = cache_dir;
        self
    }

    /// The one that is found, and what it can do; what is found out is kept in `cache_dir`.
    ///
    /// # Errors
    /// As [`Self::find`] and [`Driver::probe`].
    pub(crate) async fn probed(
        cache_dir: Option<&str>,
    ) -> Result<(Self, Capabilities), ProbeError> {
        let driver = Self::find()?.keeping(cache_dir.map(Into::into));
        let capabilities = driver.probe().await?;
        Ok((driver, capabilities))
    }

    /// Has VMs go without Firecracker's jailer, as on a host that has none.
    #[must_use]
    pub fn without_jailer(mut self) -> Self {
        self.jailer = None;
        self
    }

    /// Where Firecracker is.
    pub fn program(&self) -> &Utf8Path {
        &self.program
    }

    /// Where its jailer is: what `VESTIBULE_JAILER` names, else beside Firecracker, else in `PATH`.
    pub fn jailer(&self) -> Option<&Utf8Path> {
        self.jailer.as_deref()
    }

    /// The jailer's version must be Firecracker's (Firecracker fact 23). Blocks for some milliseconds.
    ///
    /// # Errors
    /// When it does not run or is of another version.
    pub fn check_jailer(&self, version: Version) -> Result<(), ProbeError> {
        let Some(jailer) = &self.jailer else {
            return Ok(());
        };
        let said = crate::doctor::ask(jailer, "--version")?;
        let found = said
            .split_whitespace()
            .find_map(|word| word.parse::<Version>().ok());
        if found == Some(version) {
            return Ok(());
        }
        Err(ProbeError::OtherJailer {
            program: jailer.clone(),
            found: found.map_or_else(|| String::from("unknown"), |found| found.to_string()),
            expected: version.to_string(),
        })
    }

    /// Asks the program. Blocks for some milliseconds.
    ///
    /// # Errors
    /// When it does not run, or is older than [`OLDEST`].
    pub fn installed(&self) -> Result<Installed, ProbeError> {
        let said = crate::doctor::ask(&self.program, "--version")?;
        let version = said
            .split_whitespace()
            .find_map(|word| word.parse::<Version>().ok())
            .ok_or_else(|| ProbeError::NoVersion {
                program: self.program.clone(),
                said: crate::log::printable(said.lines().next().unwrap_or_default()),
            })?;
        if version < OLDEST {
            return Err(ProbeError::TooOld {
                program: self.program.clone(),
                found: version.to_string(),
                oldest: OLDEST.to_string(),
            });
        }
        let said = crate::doctor::ask(&self.program, "--snapshot-version")?;
        let first = said.lines().next().unwrap_or_default();
        Ok(Installed {
            version,
            snapshot_version: crate::log::printable(first),
        })
    }

    /// What the program says, with a jailer that fits where there is one and it is used: as it said before, where both are
    /// the same files still.
    fn usable(&self, cache_dir: Option<&Utf8Path>) -> Result<Installed, ProbeError> {
        let jailer = self.jailer.as_deref().filter(|_| jail::is_root());
        let of = match jailer {
            None => kept::identity(&self.program).map(|program| (program, None)),
            Some(jailer) => kept::identity(&self.program)
                .zip(kept::identity(jailer))
                .map(|(program, jailer)| (program, Some(jailer))),
        };
        kept::find(cache_dir, KEPT, of.as_ref(), || {
            let installed = self.installed()?;
            if jailer.is_some() {
                self.check_jailer(installed.version)?;
            }
            Ok(installed)
        })
    }

    /// What VMs of this Firecracker can do, given that KVM is as `kvm` says.
    pub fn capabilities(installed: &Installed, kvm: &KvmVerdict) -> Capabilities {
        Capabilities {
            driver: NAME.to_owned(),
            version: installed.version.to_string(),
            because: kvm.to_string(),
            machine: format!("mmio, state {}", installed.snapshot_version),
            // Firecracker fact 10.
            pause: installed.version.features().pause_keeps_stream,
            snapshot: true,
            read_only_memory: true,
        }
    }
}

impl Driver for FirecrackerDriver {
    fn probe(&self) -> BoxFuture<'_, Result<Capabilities, ProbeError>> {
        async {
            let driver = self.clone();
            let look = move || {
                let cache_dir = driver.cache_dir.as_deref();
                let kvm = kvm::probe_once(cache_dir);
                (driver.usable(cache_dir), kvm)
            };
            let (installed, verdict) = match tokio::task::spawn_blocking(look).await {
                Ok((installed, verdict)) => (installed?, verdict),
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            };
            if !verdict.usable() {
                return Err(ProbeError::Kvm {
                    program: self.program.clone(),
                    why: verdict.to_string(),
                });
            }
            Ok(Self::capabilities(&installed, &verdict))
        }
        .boxed()
    }

    fn launch(
        &self,
        capabilities: &Capabilities,
        launch: Launch,
    ) -> BoxFuture<'_, Result<Arc<dyn Machine>, LaunchError>> {
        let capabilities = capabilities.clone();
        async move {
            let machine = launch::start(self, &capabilities, launch).await?;
            Ok(Arc::new(machine) as Arc<dyn Machine>)
        }
        .boxed()
    }
}

#[derive(Debug)]
struct FirecrackerMachine {
    child: Child,
    api: Api,
    features: Features,
    version: Version,
    command_line: Vec<String>,
    kernel_cmdline: String,
    /// The VMM's working directory.
    directory: Utf8PathBuf,
    binding: Option<Binding>,
    restored: bool,
    /// Where a save puts the memory, where this VM was made to be saved.
    memory: Option<Saved>,
    /// Serves the memory of one that was restored that way, for as long as it lives.
    _faults: Option<faults::Handler>,
    /// The VMM's process, of which `child` may be the parent.
    vmm: u32,
    vmm_log: Arc<BoundedLog>,
    /// How often the guest has begun to listen for the host.
    listens: watch::Receiver<u64>,
    /// How the VMM ended, once it was ended from here.
    ended: OnceCell<Exit>,
}

/// Where a VM's memory is saved to.
#[derive(Debug)]
struct Saved {
    /// As the VMM is to name it.
    name: String,
    path: Utf8PathBuf,
    /// Whether it belongs to the VMM's user until it is whole.
    foreign: bool,
}

fn find_jailer(firecracker: &Utf8Path) -> Option<Utf8PathBuf> {
    jailer_of(firecracker, std::env::var(JAILER_VARIABLE).ok())
}

/// Whatever is `named`: a jailer that is not there must not become another one, or none. Who runs it says that it is missing.
fn jailer_of(firecracker: &Utf8Path, named: Option<String>) -> Option<Utf8PathBuf> {
    named
        .filter(|path| !path.is_empty())
        .map(|path| camino::absolute_utf8(&path).unwrap_or_else(|_| path.into()))
        .or_else(|| jailer_beside(firecracker))
        .or_else(|| crate::doctor::find_program(JAILER).ok())
}

/// `firecracker-v1.12.1-x86_64` has `jailer-v1.12.1-x86_64` beside it; a program of another name has none.
fn jailer_beside(firecracker: &Utf8Path) -> Option<Utf8PathBuf> {
    let (before, after) = firecracker.file_name()?.split_once(PROGRAM)?;
    let jailer = firecracker.with_file_name(format!("{before}{JAILER}{after}"));
    jailer.is_file().then_some(jailer)
}

/// Removes a file that may not be there.
fn unlink(path: &Utf8Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Opens what the VMM wrote. Its directory is the VMM's, which may have put anything there since: no link is followed, a FIFO is not
/// waited for, and what is no file is refused.
fn open_written(path: &Utf8Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other(format!("`{path}` is no file")))
    }
}

impl FirecrackerMachine {
    async fn command(&self, what: &'static str, request: &Request) -> Result<(), MachineError> {
        self.api
            .send(request)
            .await
            .map_err(|err| MachineError::Control {
                what,
                err: ControlError::Firecracker(err),
            })
    }

    /// Ends the VMM. There is no button to ask the guest with (Firecracker fact 22), and nothing of the VM's lasts: its disks
    /// are read-only, so it is killed, after its counters are written. They are read when nobody writes to them any more, and of
    /// a VMM that died by itself, too: it writes them every minute.
    async fn end(&self) -> Exit {
        let end = async {
            let flush = request::flush_metrics();
            match tokio::time::timeout(END_LIMIT, self.api.send(&flush)).await {
                Ok(Ok(())) => {}
                Ok(Err(err)) => {
                    tracing::debug!(error = %Chain(&err), "the VMM's last counters are lost");
                }
                Err(_) => tracing::debug!("the VMM's last counters are lost: it does not answer"),
            }
            self.child.kill();
            let exit = self.child.wait().await;
            let directory = self.directory.clone();
            let counters = tokio::task::spawn_blocking(move || snapshot::counters(&directory));
            if let Ok(Some(line)) = counters.await {
                self.vmm_log.append(line.as_bytes());
            }
            exit
        };
        self.ended.get_or_init(|| end).await.clone()
    }
}

impl Machine for FirecrackerMachine {
    fn pid(&self) -> u32 {
        self.vmm
    }

    fn group(&self) -> u32 {
        self.child.pid()
    }

    fn command_line(&self) -> &[String] {
        &self.command_line
    }

    fn kernel_cmdline(&self) -> &str {
        &self.kernel_cmdline
    }

    fn dial(&self) -> BoxFuture<'_, Result<Box<dyn Transport>, MachineError>> {
        async {
            let dialled = vsock::dial(&self.directory, self.listens.clone(), !self.restored).await;
            let stream = dialled.map_err(MachineError::Dial)?;
            // Right after a restore a connection may be accepted and stay silent for ever: the guest has lost its end, and the
            // VMM has not noticed (Firecracker fact 11). An agent that listens again is on no connection.
            let reopened = self.reopened();
            Ok(Box::new(UntilClosed::new(stream, reopened)) as Box<dyn Transport>)
        }
        .boxed()
    }

    fn binding(&self) -> Option<&Binding> {
        self.binding.as_ref()
    }

    fn reopened(&self) -> BoxFuture<'static, ()> {
        let mut listens = self.listens.clone();
        let before = *listens.borrow_and_update();
        async move {
            // An error is the end of the VM: nothing will listen any more.
            let _ = listens.wait_for(|count| *count > before).await;
        }
        .boxed()
    }

    fn save(&self, state: File) -> BoxFuture<'_, Result<(), MachineError>> {
        self.save_to(state).boxed()
    }

    fn pause(&self) -> BoxFuture<'_, Result<(), MachineError>> {
        async {
            if !self.features.pause_keeps_stream {
                return Err(MachineError::Unsafe {
                    what: "pause",
                    why: format!(
                        "Firecracker {} loses the host's way to a guest that was paused; use 1.15, or 1.17 and newer",
                        self.version
                    ),
                });
            }
            self.command("pause", &request::pause()).await
        }
        .boxed()
    }

    fn resume(&self) -> BoxFuture<'_, Result<(), MachineError>> {
        async { self.command("resume", &request::resume()).await }.boxed()
    }

    fn wait(&self) -> BoxFuture<'static, Exit> {
        self.child.watch().boxed()
    }

    fn stop(self: Arc<Self>, evidence: Bundle) -> BoxFuture<'static, (Exit, Bundle)> {
        async move { (self.end().await, evidence) }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jailer_is_the_one_that_is_named_or_beside() {
        let home = camino_tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = home.path().join(name);
            std::fs::write(&path, "").unwrap();
            path
        };
        let (program, jailer) = (file("firecracker-v1.15.0"), file("jailer-v1.15.0"));
        assert_eq!(jailer_of(&program, None), Some(jailer.clone()));
        assert_eq!(jailer_of(&program, Some(String::new())), Some(jailer));
        // Nothing is taken in its place, and whoever asks it hears why.
        let nothing = home.path().join("nothing");
        let named = jailer_of(&program, Some(nothing.to_string()));
        assert_eq!(named.as_deref(), Some(&*nothing));
        let driver = FirecrackerDriver {
            program,
            jailer: named,
            cache_dir: None,
        };
        let err = driver.check_jailer(OLDEST).unwrap_err();
        assert!(Chain(&err).to_string().contains(nothing.as_str()), "{err}");
        // A Firecracker of another name is no jailer of its own.
        let other = file("fc");
        assert_ne!(jailer_of(&other, None), Some(other));
    }
}
