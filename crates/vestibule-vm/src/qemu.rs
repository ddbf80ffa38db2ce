//! The QEMU driver: Debian's `qemu-system-x86_64` 7.2 or newer, with KVM where it works and TCG elsewhere.
//!
//! The machine has two read-only disks (root image and config drive), a serial console, an entropy source and one
//! virtio-serial port, which carries the stream. It has no network card, no display and no USB. QEMU gets its sockets,
//! pipes and the config drive as descriptors; the paths that it opens are the image's, for reading.
//!
//! The machine type is `q35`. Measured with Debian's cloud kernel under TCG, start to agent, in CPU seconds of QEMU:
//! q35 7.8 to 8.9, `microvm,acpi=on` 8.9 to 9.4, and the latter needs to be told the host's TSC frequency. `-cpu max`
//! against `qemu64`, `EPYC` and `Nehalem` made no difference beyond noise.
mod argv;
mod memory;
mod probe;
pub mod qmp;

use crate::{
    driver::{
        Capabilities, Driver, Launch, LaunchError, Machine, MachineError, Memory, ProbeError,
        Transport,
    },
    evidence::Bundle,
    jail::{enter::Confinement, landlock::Allowed},
    kvm,
    log::piped,
    process::{Child, Program},
    until::UntilClosed,
};
use argv::{Accel, Descriptors};
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::{FutureExt, future::BoxFuture};
use qmp::{Qmp, QmpError, QmpEvent};
use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::UnixStream,
    sync::{broadcast, watch},
};
use vestibule_api::{machine::Exit, snapshot::Binding};

/// The program's name.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// QEMU may take so long to end by itself before it is killed.
const QUIT_TIMEOUT: Duration = Duration::from_secs(3);

/// QEMU on this host.
#[derive(Debug)]
pub struct QemuDriver {
    program: Utf8PathBuf,
    cache_dir: Option<Utf8PathBuf>,
}

impl QemuDriver {
    /// Finds QEMU in `PATH`. What it says of itself is kept in `cache_dir`, if that is given.
    ///
    /// # Errors
    /// [`ProbeError::Missing`] with the directories that were searched.
    pub fn find(cache_dir: Option<Utf8PathBuf>) -> Result<Self, ProbeError> {
        let program = crate::doctor::find_program(PROGRAM)?;
        Ok(Self { program, cache_dir })
    }

    /// Where QEMU is.
    pub fn program(&self) -> &Utf8Path {
        &self.program
    }
}

impl Driver for QemuDriver {
    fn probe(&self) -> BoxFuture<'_, Result<Capabilities, ProbeError>> {
        async {
            let (program, cache_dir) = (self.program.clone(), self.cache_dir.clone());
            let look = move || {
                let cache_dir = cache_dir.as_deref();
                (
                    probe::probe(&program, cache_dir),
                    kvm::probe_once(cache_dir),
                )
            };
            let (probed, verdict) = match tokio::task::spawn_blocking(look).await {
                Ok((probed, verdict)) => (probed?, verdict),
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            };
            let accel = if verdict.usable() {
                Accel::Kvm
            } else {
                Accel::Tcg
            };
            Ok(Capabilities {
                driver: accel.name().to_owned(),
                version: probed.version,
                because: verdict.to_string(),
                machine: probed.machine,
                pause: true,
                snapshot: probed.snapshot,
                read_only_memory: probed.read_only_memory,
            })
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
            let machine = start(self, &capabilities, launch).await?;
            Ok(Arc::new(machine) as Arc<dyn Machine>)
        }
        .boxed()
    }
}

struct QemuMachine {
    child: Child,
    qmp: Qmp,
    command_line: Vec<String>,
    kernel_cmdline: String,
    stream_socket: Utf8PathBuf,
    binding: Option<Binding>,
    /// The guest's end of the stream.
    port: watch::Receiver<Port>,
}

/// What the guest has done with its end of the stream.
#[derive(Clone, Copy, Debug, Default)]
struct Port {
    opened: u64,
    closed: u64,
}

impl Port {
    /// QEMU says the port's changes once a second at most, and of those between only the last (its monitor/monitor.c,
    /// `monitor_qapi_event_conf`): a port that is open and is opened was closed meanwhile, and the other way round.
    fn told(&mut self, open: bool) {
        let was_open = self.opened > self.closed;
        if open {
            self.closed += u64::from(was_open);
            self.opened += 1;
        } else {
            self.opened += u64::from(!was_open);
            self.closed += 1;
        }
    }
}

async fn start(
    driver: &QemuDriver,
    capabilities: &Capabilities,
    launch: Launch,
) -> Result<QemuMachine, LaunchError> {
    let program = driver.program();
    let accel = Accel::of(capabilities);
    // Only what is or becomes a snapshot is bound to anything.
    let tsc = match launch.memory {
        Memory::Own => None,
        Memory::Shared(_) | Memory::Restored(_) => {
            let cache_dir = driver.cache_dir.clone();
            Some(tokio::task::spawn_blocking(move || {
                crate::tsc::khz(cache_dir.as_deref())
            }))
        }
    };
    let serial = piped("console", launch.console.clone())
        .map_err(LaunchError::prepare("make a pipe for the console"))?;
    let stderr = piped("vmm log", launch.vmm_log.clone())
        .map_err(LaunchError::prepare("make a pipe for the VMM's log"))?;
    let stream_socket = launch.vm_dir.join("stream.sock");
    let listener = crate::socket::listen(&stream_socket)
        .map_err(LaunchError::prepare("listen for the stream"))?;
    let (ours, theirs) =
        control_pair().map_err(LaunchError::prepare("make the VMM's control socket"))?;
    let fds = Descriptors {
        qmp: theirs,
        stream: listener.into(),
        serial,
        config: launch
            .config
            .0
            .try_clone()
            .map_err(LaunchError::prepare("keep the config drive"))?,
    };
    let argv::Argv { args, shape } = argv::argv(capabilities, &launch, &fds);
    let expected = match tsc {
        None => None,
        Some(tsc) => {
            let tsc = tsc.await.map_err(|err| {
                LaunchError::prepare("measure the counter")(io::Error::other(err))
            })?;
            let binding = memory::expected(accel, &capabilities.machine, &launch, shape, tsc);
            check_early(&launch.memory, &binding)?;
            Some(binding)
        }
    };
    let command_line: Vec<_> = std::iter::once(program.to_string())
        .chain(args.iter().cloned())
        .collect();
    let kernel_cmdline = argv::cmdline(accel, &launch);
    let confinement = match &launch.jail {
        Some(jail) => jail
            .direct(&allowed(program, &launch))
            .map_err(LaunchError::prepare("make the VMM's jail"))?,
        None => Confinement::default(),
    };
    let child = Program {
        confinement,
        path: program.to_owned(),
        args,
        directory: launch.vm_dir.clone(),
        stdout: None,
        stderr,
        inherit: vec![fds.qmp, fds.stream, fds.serial, fds.config],
    }
    .spawn()
    .await?;
    launch.spawned.is(&child);
    let (qmp, events) = match greet(ours, &child).await {
        Ok(greeted) => greeted,
        Err(NotGreeted::Died(exit)) => return Err(LaunchError::Died { exit, command_line }),
        Err(NotGreeted::Control(err)) => return Err(LaunchError::Control(err.into())),
    };
    let binding = match expected {
        None => None,
        Some(binding) => Some(
            memory::complete(&qmp, accel, binding)
                .await
                .map_err(|err| LaunchError::Control(err.into()))?,
        ),
    };
    if let (Memory::Restored(restored), Some(here)) = (launch.memory, &binding) {
        check(&restored.manifest, here)?;
        let loaded = memory::load(&qmp, restored.state).await;
        if let Err(err) = loaded {
            // A QEMU that cannot read its state says so in its log and ends.
            return match tokio::time::timeout(QUIT_TIMEOUT, child.wait()).await {
                Ok(exit) => Err(LaunchError::Died { exit, command_line }),
                Err(_) => Err(LaunchError::Load(err.into())),
            };
        }
    }
    let (told, port) = watch::channel(Port::default());
    tokio::spawn(watch_port(events, told));
    Ok(QemuMachine {
        child,
        qmp,
        command_line,
        kernel_cmdline,
        stream_socket,
        binding,
        port,
    })
}

/// What QEMU opens by a path: the image, the memory, its own firmware and libraries.
fn allowed(program: &Utf8Path, launch: &Launch) -> Allowed {
    let own = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"].map(Utf8PathBuf::from);
    // An own build's are beside it: `/opt/qemu/bin`, `/opt/qemu/share`.
    let prefix = program.parent().and_then(Utf8Path::parent);
    let prefix = prefix.filter(|path| path.parent().is_some());
    let mut allowed = Allowed {
        read: vec![
            launch.root.clone(),
            launch.kernel.clone(),
            launch.initrd.clone(),
            "/sys/devices/system".into(),
            "/proc/cpuinfo".into(),
        ],
        execute: own
            .into_iter()
            .chain(prefix.map(Utf8Path::to_owned))
            .collect(),
        write: vec![
            launch.vm_dir.clone(),
            "/dev/kvm".into(),
            "/dev/null".into(),
            "/dev/urandom".into(),
        ],
    };
    match &launch.memory {
        Memory::Own => {}
        Memory::Shared(path) => allowed.write.push(path.clone()),
        // Before 8.2 QEMU opens it for writing, too, and does not write.
        Memory::Restored(restored) => allowed.write.push(restored.memory.clone()),
    }
    allowed
}

fn check(
    manifest: &vestibule_api::snapshot::SnapshotManifest,
    here: &Binding,
) -> Result<(), LaunchError> {
    match manifest.binding_mismatch(here) {
        None => Ok(()),
        Some(words) => Err(LaunchError::Mismatch(words)),
    }
}

/// Compares what is known before QEMU runs: a QEMU with other memory would not even begin, and its own words name no
/// snapshot.
fn check_early(memory: &Memory, here: &Binding) -> Result<(), LaunchError> {
    let Memory::Restored(restored) = memory else {
        return Ok(());
    };
    let there = &restored.manifest.binding;
    let here = Binding {
        vmm_version: there.vmm_version.clone(),
        cpu_features: there.cpu_features.clone(),
        ..here.clone()
    };
    check(&restored.manifest, &here)
}

enum NotGreeted {
    Died(Exit),
    Control(QmpError),
}

/// Waits for QEMU's greeting. A control socket that closes usually means that QEMU is about to be gone: its exit says
/// more than the socket.
async fn greet(
    socket: UnixStream,
    child: &Child,
) -> Result<(Qmp, broadcast::Receiver<QmpEvent>), NotGreeted> {
    let err = match Qmp::connect(socket).await {
        Ok((qmp, _version, events)) => return Ok((qmp, events)),
        Err(err) => err,
    };
    match tokio::time::timeout(QUIT_TIMEOUT, child.wait()).await {
        Ok(exit) => Err(NotGreeted::Died(exit)),
        Err(_) => Err(NotGreeted::Control(err)),
    }
}

fn control_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// Counts the times that the guest opened and closed its port, until QEMU ends.
async fn watch_port(mut events: broadcast::Receiver<QmpEvent>, port: watch::Sender<Port>) {
    loop {
        match events.recv().await {
            Ok(event) if event.event == "VSERPORT_CHANGE" => {
                if let Some(open) = event.data.get("open").and_then(serde_json::Value::as_bool) {
                    port.send_modify(|port| port.told(open));
                }
            }
            Ok(event) => tracing::debug!(event = event.event, data = %event.data, "the VMM says"),
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

impl QemuMachine {
    async fn command(&self, what: &'static str, command: &str) -> Result<(), MachineError> {
        self.qmp
            .execute(command, serde_json::json!({}))
            .await
            .map(drop)
            .map_err(|err| MachineError::Control {
                what,
                err: err.into(),
            })
    }

    /// Asks QEMU to end, and ends it where it does not.
    async fn quit(&self) -> Exit {
        let quit = async {
            // A QEMU that does not answer is killed below.
            let _ = self.command("end", "quit").await;
            self.child.wait().await
        };
        match tokio::time::timeout(QUIT_TIMEOUT, quit).await {
            Ok(exit) => exit,
            Err(_) => {
                self.child.kill();
                self.child.wait().await
            }
        }
    }
}

impl Machine for QemuMachine {
    fn pid(&self) -> u32 {
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
            let mut port = self.port.clone();
            let before = port.borrow().closed;
            let socket = crate::socket::connect(&self.stream_socket)
                .await
                .map_err(MachineError::Dial)?;
            let until = async move {
                // An error is the end of QEMU, and of this connection.
                let _ = port.wait_for(|port| port.closed > before).await;
            };
            // QEMU keeps its socket open when the guest closes its end, as a serial line has no end; the event on the control
            // socket is all that tells.
            Ok(Box::new(UntilClosed::new(socket, until)) as Box<dyn Transport>)
        }
        .boxed()
    }

    fn binding(&self) -> Option<&Binding> {
        self.binding.as_ref()
    }

    fn reopened(&self) -> BoxFuture<'static, ()> {
        let mut port = self.port.clone();
        let before = port.borrow().closed;
        async move {
            // An error is the end of QEMU: nothing will be opened any more.
            let _ = port
                .wait_for(|port| port.closed > before && port.opened > port.closed)
                .await;
        }
        .boxed()
    }

    fn save(&self, state: File) -> BoxFuture<'_, Result<(), MachineError>> {
        async move {
            self.save_state(state).await?;
            self.quit().await;
            Ok(())
        }
        .boxed()
    }

    fn pause(&self) -> BoxFuture<'_, Result<(), MachineError>> {
        self.command("pause", "stop").boxed()
    }

    fn resume(&self) -> BoxFuture<'_, Result<(), MachineError>> {
        self.command("resume", "cont").boxed()
    }

    fn wait(&self) -> BoxFuture<'static, Exit> {
        self.child.watch().boxed()
    }

    fn stop(self: Arc<Self>, evidence: Bundle) -> BoxFuture<'static, (Exit, Bundle)> {
        async move { (self.quit().await, evidence) }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_qemu_kept_back_is_counted() {
        let mut port = Port::default();
        let mut after = |changes: &[bool]| {
            for open in changes {
                port.told(*open);
            }
            (port.opened, port.closed)
        };
        assert_eq!(after(&[true]), (1, 0));
        assert_eq!(after(&[false, true]), (2, 1));
        // Closed and opened again within the second.
        assert_eq!(after(&[true]), (3, 2));
        assert_eq!(after(&[false, false]), (4, 4));
    }
}
