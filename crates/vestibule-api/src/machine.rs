//! One life of a VM: its specification, its states, and what its runner reports.
//!
//! The runner listens on a Unix socket (`vms/<id>/runner.sock`) and speaks HTTP/1.1:
//!
//! | route | what |
//! |---|---|
//! | `GET /machine` | [`MachineView`] |
//! | `GET /events?after=N` | NDJSON of [`RunnerEvent`]: those after `N` so far, then as they happen; ends with the VM |
//! | `GET /console?tail=BYTES&follow=BOOL` | serial console, text |
//! | `POST /claim` | [`Claim`]: gives the VM to a session, opens its way out; a paused VM runs again |
//! | `POST /pause` | stops the CPUs of a VM that is up and nobody's; answers [`MachineView`], also where it is paused already, and 501 where the driver never does it |
//! | `POST /resume` | lets them run again and sets the clock; answers [`MachineView`] |
//! | `POST /snapshot` | saves a VM with [`VmSpec::save_to`] that no session ever had; answers [`Saved`], then the VM ends |
//! | `GET /view` with `Upgrade: rfb` | after `101`, RFB byte for byte |
//! | `GET /view` with `Upgrade: rfb-frames` | after `101`, the viewer's connection is handed over, as `crate::view` says |
//! | `* /agent/…` | the agent's HTTP API (see [`crate::agent`]), upgrades included |
//! | `POST /stop` | [`StopRequest`]: evidence is written, then the VM ends; answers [`Disposal`] |
use crate::{
    agent::{AgentEvent, Health},
    egress::{EgressPolicy, EgressReason},
    finding::Finding,
    ids::{ImageDigest, MachineId, SessionId, SnapshotId},
    snapshot::SnapshotManifest,
    time::Timestamp,
};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// Everything that a VM is. The runner gets it once, as JSON on standard input; there are no setters afterwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VmSpec {
    pub machine_id: MachineId,
    /// The session it is made for, the only one that may claim it; none: any may.
    #[serde(default)]
    pub session_id: Option<SessionId>,
    pub image_digest: ImageDigest,
    /// The directory of the image in the store; it holds `manifest.json` and the artifacts that it names.
    pub image_dir: String,
    pub driver: DriverChoice,
    pub memory_mib: u32,
    pub vcpus: u32,
    /// The runner's own directory: sockets, serial log, VMM log. Removed when the VM has ended.
    pub vm_dir: String,
    /// Where the evidence bundle goes before the VM is destroyed.
    pub evidence_dir: String,
    /// Until `POST /claim`.
    pub egress: EgressPolicy,
    /// From the runner's start to the agent's *ready*, in seconds; then the VM is ended with a finding.
    pub boot_deadline_s: u32,
    /// The serial log keeps so many bytes from the beginning and as many from the end.
    pub console_keep_bytes: u64,
    /// End the VM when nobody has claimed it or asked for it for so long, in seconds; none: never.
    #[serde(default)]
    pub idle_deadline_s: Option<u32>,
    /// Begin from this snapshot instead of a boot. Where it cannot be restored, the VM fails with
    /// [`crate::cause::Cause::SnapshotRefused`] or [`crate::cause::Cause::SnapshotFailed`]; a VM with a cold boot is
    /// another one, with a specification of its own.
    #[serde(default)]
    pub restore: Option<RestoreSpec>,
    /// Make this VM one that `POST /snapshot` can save, into this directory. It does not exist yet, its parent does, on the
    /// file system where the snapshot stays. The runner makes it (0700) and, unless the VM was saved, removes it; what a
    /// killed runner leaves is whoever's who chose the name. Not together with `restore` or `session_id`.
    #[serde(default)]
    pub save_to: Option<String>,
    /// Which users VMs run as, where the runner is root.
    #[serde(default)]
    pub jail: JailSpec,
    /// A directory of this host in which runners keep what they found out about its VMMs, which costs as much as a tenth of a
    /// restore. What is in it is used only while the program is the same file. None: each runner asks again.
    #[serde(default)]
    pub cache_dir: Option<String>,
    /// Where a restored VM's memory comes from.
    #[serde(default)]
    pub memory_backend: MemoryBackend,
}

/// The group that those of VMs are in.
pub const CGROUP_PARENT: &str = "vestibule";
/// Processors that a VM may have: Firecracker takes no other number.
pub const VCPUS: RangeInclusive<u32> = 1..=32;
/// Before the user of a VM, in its group's name.
pub const CGROUP_PREFIX: &str = "vm-";

/// `cgroup.json` in a VM's directory: the group that its VMM is in. A runner that ends removes the group itself; after one that was
/// killed, whoever removes the directory does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CgroupMark {
    pub path: String,
    /// The group's own: another VM's may have its name by then.
    pub inode: u64,
}

/// Its file's name.
pub const CGROUP_MARK: &str = "cgroup.json";

/// `processes.json` in a VM's directory: its runner and, once there is one, its VMM. After a runner that was killed, whoever
/// removes the directory looks whether they are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProcessesMark {
    /// The pid namespace in which the numbers mean something, as `/proc/self/ns/pid` names it.
    pub namespace: String,
    pub runner: ProcessMark,
    /// The first process of the group that everything of the VMM's is in.
    pub vmm: Option<ProcessMark>,
}

/// One process, and no other that has its number later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProcessMark {
    pub pid: u32,
    /// Clock ticks from the host's start to its own (field 22 of proc_pid_stat(5)).
    pub started: u64,
}

/// Its file's name.
pub const PROCESSES_MARK: &str = "processes.json";

/// Users that nobody else is. A VMM that is jailed runs as one of them that no other VM has, and as the group of the same
/// number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct JailSpec {
    #[serde(alias = "first_uid")]
    pub first_uid: u32,
    /// So many, one for each VM at a time.
    pub uids: u32,
}

impl Default for JailSpec {
    /// Above what distributions give to people (60000) and, for their containers, from 100000 to 600100000 (subuid(5),
    /// `SUB_UID_MAX` of login.defs(5)), above systemd's containers (up to 1879048191) and the ids of directories by SSSD's default (up
    /// to 2000200000); below systemd's foreign images, from 2147352576 on.
    fn default() -> Self {
        Self {
            first_uid: 2_100_000_000,
            uids: 1000,
        }
    }
}

/// Where a restored VM's memory comes from. For Firecracker; QEMU maps the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryBackend {
    /// The VMM maps the snapshot's file, and all VMs share what the host keeps of it.
    #[default]
    File,
    /// A thread of the runner's makes each page as the guest asks for it (userfaultfd(2)).
    Uffd,
}

/// A snapshot to begin from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RestoreSpec {
    pub id: SnapshotId,
    /// Its directory (see [`crate::snapshot`]).
    pub dir: String,
}

/// The reply of `POST /snapshot`: the directory [`VmSpec::save_to`] now holds this snapshot, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    pub id: SnapshotId,
    pub manifest: SnapshotManifest,
}

/// Which driver runs the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DriverChoice {
    /// The best one that a probe found usable on this host.
    #[default]
    Auto,
    Qemu,
    Firecracker,
}

impl DriverChoice {
    /// The choice that a driver's name belongs to, with or without its accelerator: `qemu/tcg`, `firecracker`. None: nobody's.
    pub fn of(driver: &str) -> Option<Self> {
        match driver.split('/').next() {
            Some("qemu") => Some(Self::Qemu),
            Some("firecracker") => Some(Self::Firecracker),
            Some(_) | None => None,
        }
    }

    /// Whether a VM of this choice could be `driver`'s; of `auto`, any driver's.
    pub fn takes(self, driver: &str) -> bool {
        self == Self::Auto || Self::of(driver) == Some(self)
    }
}

impl std::fmt::Display for DriverChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Qemu => "qemu",
            Self::Firecracker => "firecracker",
        })
    }
}

/// A text that names no driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected `auto`, `qemu` or `firecracker`")]
pub struct NoDriver;

impl std::str::FromStr for DriverChoice {
    type Err = NoDriver;

    fn from_str(text: &str) -> Result<Self, NoDriver> {
        [Self::Auto, Self::Qemu, Self::Firecracker]
            .into_iter()
            .find(|choice| choice.to_string() == text)
            .ok_or(NoDriver)
    }
}

/// States of a machine. `Gone` and `Lost` are terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// The runner prepares files and starts the VMM.
    Creating,
    /// The VMM runs; the agent has not yet said that it is ready.
    Booting,
    /// The agent is ready: units active, screen painted where the image has one.
    Up,
    /// The CPUs are stopped; everything else is as in `Up`.
    Paused,
    /// Evidence is being taken and the VM ended.
    Stopping,
    /// Ended; evidence is on disk, nothing else is left.
    Gone,
    /// The runner disappeared without a word. Only a controller says this of a machine.
    Lost,
}

/// `GET /machine`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MachineView {
    pub machine_id: MachineId,
    pub session_id: Option<SessionId>,
    pub state: MachineState,
    /// Raised by the runner, and by nobody else, with every change of state.
    pub generation: u64,
    pub image_digest: ImageDigest,
    /// The snapshot that it was restored from; none: it booted.
    #[serde(default)]
    pub snapshot_id: Option<SnapshotId>,
    /// With the accelerator where there is a choice: `qemu/tcg`, `qemu/kvm`, `firecracker`.
    pub driver: String,
    pub memory_mib: u32,
    pub vcpus: u32,
    pub runner_pid: u32,
    #[serde(default)]
    pub vmm_pid: Option<u32>,
    pub started_at: Timestamp,
    #[serde(default)]
    pub ready_at: Option<Timestamp>,
    /// What the agent said when it became ready.
    #[serde(default)]
    pub health: Option<Health>,
    /// Open view streams.
    pub viewers: u32,
    pub egress: EgressCounters,
    /// Why the VM failed, where it did.
    #[serde(default)]
    pub failure: Option<Finding>,
}

/// Counters of the way out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressCounters {
    pub connections: u64,
    pub refused: u64,
    pub bytes_out: u64,
    pub bytes_in: u64,
}

/// One line of `GET /events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunnerEvent {
    /// From 1, without gaps.
    pub seq: u64,
    pub at: Timestamp,
    pub event: RunnerEventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum RunnerEventKind {
    State {
        state: MachineState,
        generation: u64,
    },
    /// A milestone on the way to *ready*.
    Phase {
        phase: Phase,
    },
    Agent {
        event: AgentEvent,
    },
    /// A destination was refused or not reached. At most one event per host, port and reason a minute; `count` says
    /// how many attempts it stands for.
    Egress {
        host: String,
        port: u16,
        reason: EgressReason,
        count: u64,
    },
    /// How many view streams are open now.
    Viewers {
        count: u32,
    },
    /// The first frame of the screen went to the first viewer.
    FirstFrame,
    /// The VM failed; `State` events follow.
    Failed {
        finding: Finding,
    },
    /// The last event.
    Ended {
        exit: Exit,
    },
}

/// Milestones of a start, in order.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    VmmStarted,
    /// The VMM has loaded a snapshot; the CPUs do not run yet (restored VMs only).
    Restored,
    /// The CPUs run (restored VMs, and those that were paused).
    Resumed,
    /// The first byte of the serial console.
    KernelOutput,
    /// Guest and host have authenticated each other.
    StreamUp,
    /// The agent answered `GET /health` with the build that the image declares.
    AgentUp,
    /// The guest has its own identity and entropy and the host's time (restored VMs only).
    Identity,
    /// The screen is painted and the browser's window is there (images with a browser only).
    Painted,
    Ready,
}

/// How the VMM ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Exit {
    /// Exit code of the VMM, where it ended by itself.
    #[serde(default)]
    pub code: Option<i32>,
    /// Signal that ended it.
    #[serde(default)]
    pub signal: Option<i32>,
    /// Whether the runner ended it (then code and signal say nothing about the guest).
    pub asked: bool,
}

/// `POST /claim`: gives the VM to a session, with what that session may reach. The same session may claim again; another
/// one is refused with 409.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Claim {
    pub session_id: SessionId,
    pub egress: EgressPolicy,
}

/// `POST /stop`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StopRequest {
    /// Why, for the evidence.
    #[serde(default)]
    pub reason: String,
}

/// What existed of a VM, and whether it is gone: written to the evidence as `disposal.json`, first before anything is removed, so
/// that whoever is killed meanwhile is followed by somebody who knows what there was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Disposal {
    pub machine_id: MachineId,
    pub at: Timestamp,
    pub items: Vec<DisposedItem>,
    /// Whether every item is gone.
    pub complete: bool,
    /// Who looked.
    #[serde(default)]
    pub by: Disposer,
}

/// Who disposes of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Disposer {
    #[default]
    Runner,
    /// After a runner that was killed, or that left something.
    Controller,
}

/// One thing that the VM had on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DisposedItem {
    /// `process`, `socket`, `directory`, `memory`, `cgroup`.
    pub kind: String,
    pub name: String,
    pub gone: bool,
}
