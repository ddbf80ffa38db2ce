//! What the runner itself can say about a VM that failed: a cause with the line that proves it. The diagnosis of the
//! whole bundle is another room's; these are the findings that are known at the moment of failure.
use super::shared::Shared;
use crate::{
    driver::{LaunchError, ProbeError},
    image::ImageError,
    log::BoundedLog,
};
use std::error::Error;
use vestibule_api::{
    agent::{AGENT_API, Health, UnitReport},
    cause::Cause,
    error::Chain,
    finding::{Finding, Quote},
    machine::Exit,
    mux::HandshakeError,
};

/// What is known of a start that did not reach *ready*.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub kernel_output: bool,
    pub stream_up: bool,
    pub agent_up: bool,
    pub painted: bool,
    pub agent_ready: bool,
    /// What the agent said it waits for, last.
    pub waiting_for: Vec<String>,
    /// Required units that were reported inactive.
    pub unit: Option<UnitReport>,
    /// What the stream's last end or failure was.
    pub stream: Option<String>,
}

fn quote(source: &str, text: impl Into<String>) -> Quote {
    Quote {
        source: source.to_owned(),
        line: None,
        text: text.into(),
    }
}

/// The last line of a log, or that there is none.
fn last_line(source: &str, log: &BoundedLog) -> Quote {
    let text = log.last_lines().pop();
    quote(source, text.unwrap_or_else(|| String::from("(no output)")))
}

/// Whether an error's chain ends in "no space left on device".
fn is_disk_full(err: &(dyn Error + 'static)) -> bool {
    std::iter::successors(Some(err), |err: &&(dyn Error + 'static)| (*err).source())
        .filter_map(|err| err.downcast_ref::<std::io::Error>())
        .any(|err| err.kind() == std::io::ErrorKind::StorageFull)
}

/// No driver can run the VM.
pub(super) fn no_driver(err: &ProbeError) -> Finding {
    Finding::new(
        Cause::VmmMissing,
        quote("host", Chain(err).to_string()),
        "the VM needs a VMM, and none that runs was found",
        "apt-get install qemu-system-x86; `vestibule doctor` shows what is found",
    )
}

/// The specification asks for Firecracker, and none can be used.
pub(super) fn no_firecracker(err: &ProbeError) -> Finding {
    Finding::new(
        Cause::VmmMissing,
        quote("host", Chain(err).to_string()),
        "the VM is to run under Firecracker, and here none can",
        "install `firecracker` and `jailer` of one release where `PATH`, or `VESTIBULE_FIRECRACKER` and `VESTIBULE_JAILER`, find them, on a host with KVM; or use the driver `auto` or `qemu`",
    )
}

/// The image cannot be booted.
pub(super) fn image(err: &ImageError) -> Finding {
    if matches!(err, ImageError::Memory { .. }) {
        return Finding::new(
            Cause::OutOfMemoryGuest,
            quote("host", err.to_string()),
            "the image's manifest says that it cannot run in so little memory",
            "give the VM more memory",
        );
    }
    Finding::new(
        Cause::ImageMissing,
        quote("host", Chain(err).to_string()),
        "the VM's image cannot be read as the store wrote it",
        "build and publish the image again: `vestibule image build`",
    )
}

/// Something of the host's failed while the VM was prepared.
pub(super) fn host(err: &(dyn Error + 'static)) -> Finding {
    let cause = if is_disk_full(err) {
        Cause::HostDiskFull
    } else {
        Cause::VmmExited
    };
    Finding::new(
        cause,
        quote("host", Chain(err).to_string()),
        "the host could not prepare the VM",
        "look at the host: memory, disk, limits; then try again",
    )
    .retryable()
}

/// The VMM did not start.
pub(super) fn launch(err: &LaunchError, shared: &Shared) -> Finding {
    match err {
        LaunchError::Died { .. } if shared.spec.restore.is_some() => {
            snapshot_not_loaded(err, shared)
        }
        LaunchError::Died { exit, .. } => vmm_gone(exit, shared),
        LaunchError::Spawn(_) => no_start(err),
        LaunchError::Prepare { .. } => host(err),
        LaunchError::NoVmlinux => Finding::new(
            Cause::ImageMissing,
            quote("host", err.to_string()),
            "Firecracker boots an ELF kernel; the image was built by a version that made none",
            "build and publish the image again: `vestibule image build`",
        ),
        LaunchError::Mismatch(_) => snapshot_refused(err),
        LaunchError::Load(_) => snapshot_not_loaded(err, shared),
        LaunchError::Control(_) => no_start(err).and(last_line("vmm", &shared.vmm_log)),
    }
}

fn no_start(err: &LaunchError) -> Finding {
    Finding::new(
        Cause::VmmExited,
        quote("host", Chain(err).to_string()),
        "the VMM could not be started",
        "run `vestibule doctor`",
    )
}

/// The snapshot is not one for this VM, or not whole.
pub(super) fn snapshot_refused(err: &(dyn Error + 'static)) -> Finding {
    Finding::new(
        Cause::SnapshotRefused,
        quote("host", Chain(err).to_string()),
        "the VM cannot begin from this snapshot; nothing is wrong with its image",
        "boot it instead; take the snapshot again: `vestibule image snapshot`",
    )
    .refuted_by("the same snapshot being restored by the same runner")
}

/// The VMM did not load a snapshot that had seemed right.
fn snapshot_not_loaded(err: &LaunchError, shared: &Shared) -> Finding {
    Finding::new(
        Cause::SnapshotFailed,
        last_line("vmm", &shared.vmm_log),
        format!("the VMM did not load the snapshot: {}", Chain(err)),
        "boot the VM instead; take the snapshot again: `vestibule image snapshot`",
    )
    .refuted_by("the same snapshot being restored by the same runner")
    .retryable()
}

/// The VM was not saved.
pub(super) fn not_saved(err: &(dyn Error + 'static), shared: &Shared) -> Finding {
    if is_disk_full(err) {
        return host(err);
    }
    Finding::new(
        Cause::SnapshotFailed,
        quote("host", Chain(err).to_string()),
        "the VM's memory could not be saved, and nothing of it was kept",
        "read the agent's and the VMM's words in the evidence; try again",
    )
    .and(last_line("vmm", &shared.vmm_log))
    .refuted_by("the same save succeeding")
    .retryable()
}

/// The VMM that is installed can neither save nor restore.
pub(super) fn no_snapshots(version: &str) -> Finding {
    Finding::new(
        Cause::SnapshotRefused,
        quote("host", version),
        "a probe of the VMM that is installed found no way to keep a guest's memory in a file",
        "install QEMU 7.2 or newer; without it VMs boot",
    )
}

/// The specification contradicts itself.
pub(super) fn contradiction(words: &str) -> Finding {
    Finding::new(
        Cause::LaunchRefused,
        quote("host", words),
        "the VM's specification asks for two things that exclude each other",
        "correct the specification",
    )
}

/// The VMM ended and nobody had asked it to: the guest's last words if it panicked, else the VMM's.
pub(super) fn vmm_gone(exit: &Exit, shared: &Shared) -> Finding {
    let panic = shared
        .console
        .last_lines()
        .into_iter()
        .find(|line| line.contains("Kernel panic - not syncing"));
    if let Some(line) = panic {
        return Finding::new(
            Cause::KernelPanic,
            quote("serial", line),
            "the guest's kernel said why before the VMM ended",
            "read the whole console: `vestibule vm logs`",
        )
        .refuted_by("a later line on the console that shows the kernel running on");
    }
    let (how, fix) = match (exit.signal, exit.code) {
        (Some(signal), _) => (
            format!("the VMM was ended by signal {signal}"),
            "signal 9 without anybody's doing usually means that the host ran out of memory: `journalctl -k`",
        ),
        (None, Some(0)) => (
            String::from("the VMM ended by itself with code 0: the guest powered off or reset"),
            "the console shows what the guest did: `vestibule vm logs`",
        ),
        (None, Some(code)) => (
            format!("the VMM ended by itself with code {code}"),
            "the VMM's own message says why; `vestibule doctor` looks at what is installed",
        ),
        (None, None) => (
            String::from("the VMM ended, how is not known"),
            "read the VMM's log in the evidence",
        ),
    };
    let retry = exit.signal.is_some();
    let finding = Finding::new(
        Cause::VmmExited,
        last_line("vmm", &shared.vmm_log),
        how,
        fix,
    )
    .and(last_line("serial", &shared.console))
    .refuted_by("a VMM process that still runs");
    if retry { finding.retryable() } else { finding }
}

/// The stream broke and did not come back.
pub(super) fn stream_lost(words: &str, shared: &Shared) -> Finding {
    Finding::new(
        Cause::StreamLost,
        quote("events", words),
        "the agent's stream ended while the VM was in use, and the agent did not come back",
        "the agent's unit is in the report and on the console: `vestibule vm logs`",
    )
    .and(last_line("serial", &shared.console))
    .refuted_by("a later `agent-up` phase in the events")
    .retryable()
}

/// The agent that answers is not the one the image declares, or speaks another version.
pub(super) fn agent_mismatch(health: &Health, declared_build: &str) -> Option<Finding> {
    if health.api != AGENT_API {
        let said = quote("report", format!("api {}", health.api));
        let why = format!("this host speaks version {AGENT_API} of the agent's API");
        return Some(incompatible(said, why));
    }
    (health.build != declared_build).then(|| {
        Finding::new(
            Cause::AgentBuildMismatch,
            quote("report", format!("build {}", health.build)),
            format!("the image's manifest declares build {declared_build}"),
            "the image was changed after it was built; build it again",
        )
    })
}

/// A VM was resumed, and whether its clock is right is not known.
pub(super) fn silent(words: &str, shared: &Shared) -> Finding {
    Finding::new(
        Cause::ListeningNotAnswering,
        quote("events", words),
        "the VM was resumed, and its agent did not answer for the guest's clock",
        "another VM may do; on a host that is too busy, keep fewer of them (`limits.vms`)",
    )
    .and(last_line("serial", &shared.console))
    .refuted_by("an answer to `POST /clock` after the phase `resumed`")
    .retryable()
}

/// The agent's first word is of another version.
pub(super) fn another_handshake(err: &HandshakeError) -> Finding {
    let why = "agent and host cannot prove to each other who they are";
    incompatible(quote("events", Chain(err).to_string()), why)
}

fn incompatible(quote: Quote, why: impl Into<String>) -> Finding {
    Finding::new(
        Cause::AgentIncompatible,
        quote,
        why,
        "build the image again with the agent of this version",
    )
}

/// The boot deadline passed: the earliest milestone that is missing says which layer failed.
pub(super) fn deadline(progress: &Progress, shared: &Shared) -> Finding {
    let seconds = shared.spec.boot_deadline_s;
    let console = last_line("serial", &shared.console);
    let (cause, quote, why, fix) = if !progress.kernel_output {
        (
            Cause::GuestNotExecuting,
            console,
            format!("the VMM runs and the console is empty after {seconds} s"),
            "run `vestibule doctor`: the accelerator may not execute guests",
        )
    } else if !progress.stream_up {
        (
            Cause::StreamRefused,
            progress
                .stream
                .as_ref()
                .map_or(console, |said| quote("events", said)),
            format!(
                "the guest's kernel runs, and its agent had not opened the stream after {seconds} s"
            ),
            "the console shows how far the boot came: `vestibule vm logs`",
        )
    } else if !progress.agent_up {
        (
            Cause::ListeningNotAnswering,
            quote("events", progress.stream.as_deref().unwrap_or("stream up")),
            format!(
                "the stream is up, and the agent had not answered `GET /health` after {seconds} s"
            ),
            "read the console and the report of the bundle",
        )
    } else {
        return not_ready(progress, shared);
    };
    Finding::new(cause, quote, why, fix)
        .refuted_by("a guest that becomes ready with a longer boot deadline")
}

/// The agent answers and does not become ready.
fn not_ready(progress: &Progress, shared: &Shared) -> Finding {
    let waits = progress.waiting_for.join("; ");
    let names = |word: &str| waits.to_lowercase().contains(word);
    let cause = if progress.unit.is_some() {
        Cause::WaitsForUnit
    } else if names("browser") {
        Cause::BrowserNotReady
    } else if names("display") || names("screen") || (progress.agent_ready && !progress.painted) {
        Cause::DisplayNotReady
    } else {
        Cause::NeverNotifiedReady
    };
    let said = if waits.is_empty() {
        "(nothing)"
    } else {
        waits.as_str()
    };
    let finding = Finding::new(
        cause,
        quote("report", format!("waiting for: {said}")),
        format!(
            "the agent answers, and was not ready {} s after the start",
            shared.spec.boot_deadline_s
        ),
        "the report of the bundle lists units and jobs; a slow host needs a longer boot deadline",
    )
    .refuted_by("a guest that becomes ready with a longer boot deadline");
    match &progress.unit {
        Some(unit) => finding
            .and(quote(
                "report",
                format!("{} is {} ({})", unit.name, unit.active, unit.sub),
            ))
            .about(unit.name.clone()),
        None => finding,
    }
}
