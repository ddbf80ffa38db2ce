//! Every request that the driver sends, and their order.
//!
//! Bodies are built from [`Features`] and what the VM is to be; what a version does not know is left out. All errors come as
//! 400 with words, and an unknown field is one (Firecracker fact 1), so `contract.rs` holds each body against Firecracker's
//! own OpenAPI documents.
//!
//! Names of files are relative to the VMM's working directory, which each VM has to itself: a snapshot keeps the names of
//! drives and of the socket, and there is nothing that could override a drive's (Firecracker fact 13).
use super::version::Features;
use hyper::Method;
use serde::Serialize;
use std::{borrow::Cow, time::Duration};

/// In the VMM's working directory.
pub const KERNEL: &str = "vmlinux";
pub const INITRD: &str = "initrd";
pub const ROOT: &str = "root";
pub const CONFIG: &str = "config";
pub const METRICS: &str = "metrics";
/// The host's end of the vsock device; the VMM makes it.
pub const VSOCK: &str = "stream.sock";
/// A snapshot's state, as the VMM writes it.
pub const STATE: &str = "state";

/// The guest's address on its vsock: 0 to 2 are reserved (vsock(7)), and `PUT /vsock` would take them all the same
/// (Firecracker fact 2). Each VM has a device of its own, so all have the same.
const GUEST_CID: u32 = 3;

/// Answered from what Firecracker knows already.
const QUICK: Duration = Duration::from_secs(20);
/// A start reads kernel and initrd, a load maps the memory. Whoever launches gives up later, so that it is the request that is named.
pub(crate) const START: Duration = Duration::from_secs(45);
/// A save writes the whole memory. Whoever saves gives up later, as before.
pub(crate) const SAVE: Duration = Duration::from_secs(110);

/// What Firecracker adds to the image's command line. `reboot=k` resets through the i8042 keyboard controller, which is how a
/// guest ends a Firecracker (fact 22: the process exits 0; there is no power button). A serial line must be asked for, and
/// Firecracker's own default would turn it off (fact 6). `pci=off` it adds itself. Disks have no serial number here, so the
/// agent is told which is which by their order (fact 20).
const CMDLINE: &str = "console=ttyS0 reboot=k random.trust_cpu=on i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce vestibule.root=vda vestibule.config=vdb vestibule.stream=vsock";

/// The kernel command line: the image's and the machine's.
pub fn cmdline(image: &str) -> String {
    format!("{image} {CMDLINE}")
}

/// One request. Each variant is one resource of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Metrics(Metrics),
    MachineConfig(MachineConfig),
    BootSource(BootSource),
    Drive(Drive),
    Vsock(Vsock),
    Entropy(Entropy),
    Action(Action),
    Vm(Vm),
    CreateSnapshot(CreateSnapshot),
    LoadSnapshot(LoadSnapshot),
}

/// Where counters are written to: every minute, at a flush, and when the VMM ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Metrics {
    pub metrics_path: String,
}

/// No CPU template: the static ones are deprecated, and any is taken here, of whatever vendor (Firecracker fact 21). A snapshot
/// belongs to the host's own CPU instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MachineConfig {
    /// 1 to 32; 1 or an even number.
    pub vcpu_count: u32,
    pub mem_size_mib: u32,
    /// Two guest CPUs on one of the host's cores: what one does shows in the other's time.
    pub smt: bool,
    pub track_dirty_pages: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BootSource {
    /// An ELF `vmlinux`. Anything that opens is taken here, and refused at the start (Firecracker fact 2).
    pub kernel_image_path: String,
    pub initrd_path: String,
    /// Replaces Firecracker's own, which turns the serial line and modules off (Firecracker fact 6).
    pub boot_args: String,
}

/// A disk. Their order is their names' order in the guest: `vda`, `vdb` (Firecracker fact 20). None is exchanged while the guest
/// runs: what it had not written of one would go into the next (Firecracker fact 19). All are read-only, so there is nothing to
/// write, and no flush to wait for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Drive {
    /// Must be the path's last part as well (Firecracker fact 2).
    pub drive_id: &'static str,
    pub path_on_host: &'static str,
    /// The root device would get words of its own on the kernel's command line; the initrd finds the disks itself.
    pub is_root_device: bool,
    pub is_read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vsock {
    pub guest_cid: u32,
    pub uds_path: &'static str,
}

/// No limit on its rate: it draws from the kernel's generator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entropy {}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Action {
    pub action_type: ActionType,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ActionType {
    InstanceStart,
    FlushMetrics,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vm {
    pub state: VmState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum VmState {
    Paused,
    Resumed,
}

/// Always a full one: of diffs Firecracker says that they are a preview (Firecracker fact 15).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CreateSnapshot {
    pub snapshot_type: SnapshotType,
    pub snapshot_path: String,
    pub mem_file_path: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum SnapshotType {
    Full,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LoadSnapshot {
    pub snapshot_path: String,
    pub mem_backend: MemoryBackend,
    /// Never: who loads must first be able to say that it was loaded.
    pub resume_vm: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VsockOverride {
    pub uds_path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryBackend {
    pub backend_type: BackendType,
    /// The memory's file, or the socket of whoever handles page faults.
    pub backend_path: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum BackendType {
    /// Mapped privately: the file must stay as it is for as long as the VM lives (Firecracker fact 12).
    File,
    /// Page faults go to a process of the host's. The only way for memory in huge pages (Firecracker fact 18).
    Uffd,
}

/// What a VM that boots is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    pub vcpus: u32,
    pub memory_mib: u32,
    pub cmdline: String,
}

/// What a VM that is restored begins from. Dirty pages are not tracked, since it is not saved again (Firecracker fact 15), and its
/// kvm-clock is left to the agent, which is told the time first thing, whatever the version (Firecracker fact 16).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    pub state: String,
    pub memory: MemoryBackend,
}

/// How a process that was just started is to observe itself. Of all that may be said before a load, this alone is needed, and no
/// snapshot keeps it (Firecracker facts 5 and 12); a VMM needs no VM for it.
pub fn metrics() -> Request {
    Request::Metrics(Metrics {
        metrics_path: METRICS.to_owned(),
    })
}

/// From a process that has its [`metrics`] to a VM that runs, in the only order that Firecracker takes: the machine, what it boots,
/// its devices; the start, once (Firecracker fact 1).
pub fn boot(boot: &Boot) -> Vec<Request> {
    let drive = |name| {
        Request::Drive(Drive {
            drive_id: name,
            path_on_host: name,
            is_root_device: false,
            is_read_only: true,
        })
    };
    vec![
        Request::MachineConfig(MachineConfig {
            vcpu_count: boot.vcpus,
            mem_size_mib: boot.memory_mib,
            smt: false,
            track_dirty_pages: false,
        }),
        Request::BootSource(BootSource {
            kernel_image_path: KERNEL.to_owned(),
            initrd_path: INITRD.to_owned(),
            boot_args: boot.cmdline.clone(),
        }),
        drive(ROOT),
        drive(CONFIG),
        Request::Vsock(Vsock {
            guest_cid: GUEST_CID,
            uds_path: VSOCK,
        }),
        Request::Entropy(Entropy {}),
        Request::Action(Action {
            action_type: ActionType::InstanceStart,
        }),
    ]
}

/// From a process that has its [`metrics`], and was told nothing else, to a VM whose CPUs wait for [`resume`] (Firecracker fact 12).
pub fn restore(features: Features, restore: &Restore) -> Request {
    let load = LoadSnapshot {
        snapshot_path: restore.state.clone(),
        mem_backend: restore.memory.clone(),
        resume_vm: false,
        vsock_override: features.vsock_override.then(|| VsockOverride {
            uds_path: VSOCK.to_owned(),
        }),
    };
    Request::LoadSnapshot(load)
}

/// Stops the CPUs.
pub fn pause() -> Request {
    Request::Vm(Vm {
        state: VmState::Paused,
    })
}

/// Lets them run.
pub fn resume() -> Request {
    Request::Vm(Vm {
        state: VmState::Resumed,
    })
}

/// Writes the counters now.
pub fn flush_metrics() -> Request {
    Request::Action(Action {
        action_type: ActionType::FlushMetrics,
    })
}

/// From a VM that runs to its files. Of one that is not paused none is taken (Firecracker fact 12).
pub fn save(memory: &str) -> [Request; 2] {
    let create = CreateSnapshot {
        snapshot_type: SnapshotType::Full,
        snapshot_path: STATE.to_owned(),
        mem_file_path: memory.to_owned(),
    };
    [pause(), Request::CreateSnapshot(create)]
}

impl Request {
    pub fn method(&self) -> Method {
        match self {
            Self::Vm(_) => Method::PATCH,
            Self::Metrics(_)
            | Self::MachineConfig(_)
            | Self::BootSource(_)
            | Self::Drive(_)
            | Self::Vsock(_)
            | Self::Entropy(_)
            | Self::Action(_)
            | Self::CreateSnapshot(_)
            | Self::LoadSnapshot(_) => Method::PUT,
        }
    }

    pub fn path(&self) -> Cow<'static, str> {
        match self {
            Self::Metrics(_) => "/metrics".into(),
            Self::MachineConfig(_) => "/machine-config".into(),
            Self::BootSource(_) => "/boot-source".into(),
            Self::Drive(drive) => format!("/drives/{}", drive.drive_id).into(),
            Self::Vsock(_) => "/vsock".into(),
            Self::Entropy(_) => "/entropy".into(),
            Self::Action(_) => "/actions".into(),
            Self::Vm(_) => "/vm".into(),
            Self::CreateSnapshot(_) => "/snapshot/create".into(),
            Self::LoadSnapshot(_) => "/snapshot/load".into(),
        }
    }

    /// The body, as JSON.
    ///
    /// # Errors
    /// None that is known: every body is strings, numbers and booleans.
    pub fn body(&self) -> serde_json::Result<serde_json::Value> {
        match self {
            Self::Metrics(body) => serde_json::to_value(body),
            Self::MachineConfig(body) => serde_json::to_value(body),
            Self::BootSource(body) => serde_json::to_value(body),
            Self::Drive(body) => serde_json::to_value(body),
            Self::Vsock(body) => serde_json::to_value(body),
            Self::Entropy(body) => serde_json::to_value(body),
            Self::Action(body) => serde_json::to_value(body),
            Self::Vm(body) => serde_json::to_value(body),
            Self::CreateSnapshot(body) => serde_json::to_value(body),
            Self::LoadSnapshot(body) => serde_json::to_value(body),
        }
    }

    /// How long its answer may take.
    pub fn limit(&self) -> Duration {
        match self {
            Self::CreateSnapshot(_) => SAVE,
            Self::LoadSnapshot(_)
            | Self::Action(Action {
                action_type: ActionType::InstanceStart,
            }) => START,
            Self::Metrics(_)
            | Self::MachineConfig(_)
            | Self::BootSource(_)
            | Self::Drive(_)
            | Self::Vsock(_)
            | Self::Entropy(_)
            | Self::Action(_)
            | Self::Vm(_) => QUICK,
        }
    }
}
