//! What a VMM must be able to do. What a VM *is* stands in its [`Launch`]; there are no setters.
//!
//! What a driver cannot do is absent from its [`Capabilities`], which come from a probe and never from a belief.
use crate::{
    config_drive::DriveFd,
    evidence::Bundle,
    firecracker::{Standing, api::ApiError},
    jail::Jail,
    log::BoundedLog,
    process::{Child, SpawnError},
    qemu::qmp::QmpError,
};
use camino::Utf8PathBuf;
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use std::{
    fs::File,
    io,
    sync::{Arc, OnceLock},
};
use tokio::io::{AsyncRead, AsyncWrite};
use vestibule_api::{
    ids::{ImageDigest, MachineId},
    machine::{Exit, MemoryBackend},
    snapshot::{Binding, SnapshotManifest},
};

/// A byte stream to the guest's end of the one stream.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Transport for T {}

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Capabilities {
    /// VMM and accelerator: `qemu/tcg`, `qemu/kvm`.
    pub driver: String,
    /// The VMM's own version.
    pub version: String,
    /// Why this accelerator and no other.
    pub because: String,
    /// The machine type that VMs get, with its version.
    pub machine: String,
    pub pause: bool,
    pub snapshot: bool,
    /// Whether a snapshot's memory can be opened for reading only. Where it cannot, nothing is written to it all the same.
    pub read_only_memory: bool,
}

/// Where the guest's memory is.
#[derive(Debug)]
pub enum Memory {
    /// Nowhere but in the VMM.
    Own,
    /// In this file, which a save makes part of a snapshot.
    Shared(Utf8PathBuf),
    /// In a snapshot, page by page until the guest writes to it.
    Restored(Box<Restored>),
}

/// A snapshot to begin from.
#[derive(Debug)]
pub struct Restored {
    pub manifest: SnapshotManifest,
    pub memory: Utf8PathBuf,
    pub state: File,
    pub backend: MemoryBackend,
}

/// Why a probe found nothing usable.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    #[error("no `{program}` in {searched}")]
    Missing { program: String, searched: String },
    #[error("run `{program} --version`")]
    Version {
        program: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("`{program} --version` says `{said}`, which names no version")]
    NoVersion { program: Utf8PathBuf, said: String },
    #[error("use `{program}`: it is version {found}; {oldest} or newer is needed")]
    TooOld {
        program: Utf8PathBuf,
        found: String,
        oldest: String,
    },
    /// Its jailer must be of the same version.
    #[error("jail with `{program}`: it is version {found}, and Firecracker {expected}")]
    OtherJailer {
        program: Utf8PathBuf,
        found: String,
        expected: String,
    },
    /// The VMM has no accelerator but KVM.
    #[error("use `{program}`: it needs KVM, and {why}")]
    Kvm { program: Utf8PathBuf, why: String },
}

/// Where a driver says which process it has started, as soon as it has. A launch that fails or is given up kills its own; whoever is
/// to say that nothing is left waits here until that is so.
#[derive(Clone, Debug, Default)]
pub struct Spawned(Arc<OnceLock<(u32, Shared<BoxFuture<'static, Exit>>)>>);

impl Spawned {
    pub(crate) fn is(&self, child: &Child) {
        // A launch starts one.
        let _ = self.0.set((child.pid(), child.watch().boxed().shared()));
    }

    /// The process group that everything of the VMM's is in.
    pub fn group(&self) -> Option<u32> {
        self.0.get().map(|(pid, _)| *pid)
    }

    /// Waits until the process is gone, where there was one.
    pub async fn ended(&self) {
        if let Some((_, exit)) = self.0.get() {
            exit.clone().await;
        }
    }
}

/// Everything a driver needs to start a VM.
#[derive(Debug)]
pub struct Launch {
    pub machine_id: MachineId,
    pub memory_mib: u32,
    pub vcpus: u32,
    /// The runner's own directory: sockets go here.
    pub vm_dir: Utf8PathBuf,
    /// The shared root image; opened read-only.
    pub root: Utf8PathBuf,
    pub kernel: Utf8PathBuf,
    /// The same kernel as an ELF file, where the image has it.
    pub vmlinux: Option<Utf8PathBuf>,
    pub initrd: Utf8PathBuf,
    /// The image's part of the kernel command line.
    pub cmdline: String,
    pub config: DriveFd,
    /// What a snapshot is bound to besides: the image, and the agent that it declares.
    pub image_digest: ImageDigest,
    pub agent_build: String,
    pub memory: Memory,
    /// What the VMM is kept apart by; none: nothing but what it does itself.
    pub jail: Option<Arc<Jail>>,
    /// A VMM in that jail that waits for this VM; none: one is started.
    pub standing: Option<Standing>,
    pub spawned: Spawned,
    pub console: Arc<BoundedLog>,
    pub vmm_log: Arc<BoundedLog>,
}

/// Why the VMM did not do what it was asked on its control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Qemu(#[from] QmpError),
    #[error(transparent)]
    Firecracker(#[from] ApiError),
}

/// Why no VM came of a [`Launch`].
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("{step}")]
    Prepare {
        step: &'static str,
        #[source]
        err: io::Error,
    },
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The VMM ended before it answered; its own words are in the VMM log.
    #[error("the VMM ended at once")]
    Died {
        exit: Exit,
        command_line: Vec<String>,
    },
    #[error("speak with the VMM")]
    Control(#[source] ControlError),
    /// The VMM boots an ELF kernel, and the image has none.
    #[error("boot the image: it has no `vmlinux`")]
    NoVmlinux,
    /// The snapshot does not belong to this host, image or VM; in words.
    #[error("restore the snapshot: {0}")]
    Mismatch(String),
    #[error("load the snapshot's state")]
    Load(#[source] ControlError),
}

impl LaunchError {
    /// What an operating system's error kept from being done.
    pub(crate) fn prepare(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |err| Self::Prepare { step, err }
    }
}

/// Why a running VM did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("{what} the VM")]
    Control {
        what: &'static str,
        #[source]
        err: ControlError,
    },
    /// The VMM would do it, and the VM would not be what it was.
    #[error("{what} the VM: {why}")]
    Unsafe { what: &'static str, why: String },
    #[error("connect to the guest's stream")]
    Dial(#[source] io::Error),
    #[error("write the VM's state")]
    Save(#[source] io::Error),
}

/// A kind of VMM.
pub trait Driver: Send + Sync {
    /// Looks what is installed and what really works here.
    fn probe(&self) -> BoxFuture<'_, Result<Capabilities, ProbeError>>;

    /// Starts a VM; one that is restored is loaded, and its CPUs wait for [`Machine::resume`]. When it fails, nothing of the VM is left but what the logs hold.
    fn launch(
        &self,
        capabilities: &Capabilities,
        launch: Launch,
    ) -> BoxFuture<'_, Result<Arc<dyn Machine>, LaunchError>>;
}

/// One running VM. Dropping it ends the VMM by force.
pub trait Machine: Send + Sync {
    /// The VMM's process.
    fn pid(&self) -> u32;

    /// The process group that everything of the VMM's is in.
    fn group(&self) -> u32 {
        self.pid()
    }

    /// The VMM's command line as started, for the evidence.
    fn command_line(&self) -> &[String];

    /// The guest kernel's command line: of a restored VM, the one that the saved VM booted with.
    fn kernel_cmdline(&self) -> &str;

    /// Connects to the guest's end of the stream. The connection reads end of file when the guest closes its end.
    fn dial(&self) -> BoxFuture<'_, Result<Box<dyn Transport>, MachineError>>;

    /// What a snapshot of this VM is bound to; none where it can have none.
    fn binding(&self) -> Option<&Binding>;

    /// Completes when the guest has, from now on, closed its end of the stream and opened it again.
    fn reopened(&self) -> BoxFuture<'static, ()>;

    /// Stops the CPUs, writes their state and that of the devices, and ends the VMM: the memory's file is whole then.
    fn save(&self, state: File) -> BoxFuture<'_, Result<(), MachineError>>;

    /// Stops the virtual CPUs.
    fn pause(&self) -> BoxFuture<'_, Result<(), MachineError>>;

    /// Lets them run again.
    fn resume(&self) -> BoxFuture<'_, Result<(), MachineError>>;

    /// Waits until the VMM has ended.
    fn wait(&self) -> BoxFuture<'static, Exit>;

    /// Ends the VMM. Takes the evidence by value: nothing can be destroyed before its evidence was taken.
    fn stop(self: Arc<Self>, evidence: Bundle) -> BoxFuture<'static, (Exit, Bundle)>;
}
