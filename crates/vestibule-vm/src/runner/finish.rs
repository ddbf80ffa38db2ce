//! The end of a VM, the same on every path: evidence, then the VMM, then everything else it had on the host, then the
//! receipt.
use super::{
    life::{End, Life},
    link,
    shared::{Input, Shared},
};
use crate::evidence::Bundle;
use camino::{Utf8Path, Utf8PathBuf};
use rustix::process::{Pid, test_kill_process_group};
use std::{os::unix::fs::FileTypeExt as _, sync::Arc, time::Duration};
use vestibule_api::{
    crash,
    machine::{Disposal, DisposedItem, Disposer, Exit, MachineState, RunnerEventKind},
    time::Timestamp,
};

/// The agent may take so long for its last report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// A killed VMM may take so long to be gone: its memory is given back first.
const KILLED_TIMEOUT: Duration = Duration::from_secs(10);
/// Tasks that serve connections may take so long to notice the end.
const TASKS_TIMEOUT: Duration = Duration::from_secs(2);

/// Sockets that are named. A VM has a handful; what its VMM made besides goes with the directory.
const SOCKETS: usize = 64;

/// Ends the VM. Returns how the VMM ended.
pub(super) async fn finish(mut life: Life, end: End) -> Exit {
    let shared = Arc::clone(&life.shared);
    let (reason, mut exit, asked) = match end {
        End::Asked(reason) => (reason, Exit::default(), true),
        End::Failed { finding, exit } => {
            let reason = format!("{}: {}", finding.cause, finding.why);
            shared.update(|view| view.failure = Some((*finding).clone()));
            life.publish(RunnerEventKind::Failed { finding: *finding });
            // A VMM that has not ended by itself is ended here, and how says nothing about the guest.
            let by_itself = exit.code.is_some() || exit.signal.is_some();
            (reason, exit, !by_itself)
        }
    };
    tracing::info!(machine.id = %shared.spec.machine_id, reason, "the VM ends");
    life.enter(MachineState::Stopping);
    let mut bundle = take(&life, &reason).await;
    crash::point("runner:evidence");
    if let Some(machine) = life.machine.take() {
        (exit, bundle) = machine.stop(bundle).await;
    }
    // Of a start that failed or was given up it is killed, and not gone yet. One that stays shows in the receipt.
    let _ = tokio::time::timeout(KILLED_TIMEOUT, shared.spawned.ended()).await;
    crash::point("runner:ended");
    exit.asked = asked;
    shared.over.cancel();
    shared.tasks.close();
    if tokio::time::timeout(TASKS_TIMEOUT, shared.tasks.wait())
        .await
        .is_err()
    {
        bundle.missing("tasks", "some did not end in time");
    }
    shared.egress.flush();
    shared.logs_ended().await;
    let unfinished = life.unfinished.take().map(|unfinished| {
        let (path, kept) = (unfinished.path().to_owned(), unfinished.kept());
        drop(unfinished);
        (path, kept)
    });
    let unsaved = unfinished.and_then(|(path, kept)| (!kept).then_some(path));
    let disposal = dispose(&shared, bundle, &exit, &life, unsaved.as_deref()).await;
    for stop in drain(&mut life) {
        // Who asked may have gone away.
        let _ = stop.send(disposal.clone());
    }
    exit
}

/// What `machine.json` holds: the effective configuration.
#[derive(serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct MachineRecord<'a> {
    spec: &'a vestibule_api::machine::VmSpec,
    claim: Option<&'a vestibule_api::machine::Claim>,
    view: vestibule_api::machine::MachineView,
    capabilities: Option<&'a crate::driver::Capabilities>,
    jail: Option<crate::jail::JailRecord>,
    command_line: &'a [String],
    kernel_cmdline: Option<&'a str>,
    /// What the image's manifest declares; none where it was never read.
    agent_build: Option<&'a str>,
    required_units: &'a [String],
    reason: &'a str,
    missing: Vec<String>,
}

/// Takes the evidence while the VM still exists.
async fn take(life: &Life, reason: &str) -> Bundle {
    let shared = &life.shared;
    let report = report(shared).await;
    let manifest = life.image.as_ref().map(|image| &image.manifest);
    let mut record = MachineRecord {
        spec: &shared.spec,
        claim: life.claim.as_ref(),
        view: shared.view(),
        capabilities: life.capabilities.as_ref(),
        jail: shared.jail.get().map(|jail| jail.record()),
        command_line: &life.command_line,
        kernel_cmdline: life.kernel_cmdline.as_deref(),
        agent_build: manifest.map(|manifest| manifest.agent_build.as_str()),
        required_units: manifest.map_or(&[], |manifest| &manifest.required_units),
        reason,
        missing: Vec::new(),
    };
    // The last act of a VM that ends: nothing else of this process waits for the disk meanwhile.
    tokio::task::block_in_place(|| {
        let mut bundle = Bundle::open(Utf8Path::new(&shared.spec.evidence_dir));
        match report {
            Ok(bytes) => bundle.write("report.json", &bytes),
            Err(why) => bundle.missing("report.json", &why),
        }
        write_logs(shared, &mut bundle);
        record.missing = bundle.gaps().to_vec();
        bundle.write_json("machine.json", &record);
        bundle
    })
}

fn write_logs(shared: &Shared, bundle: &mut Bundle) {
    bundle.write_log("serial.log", &shared.console);
    bundle.write_log("vmm.log", &shared.vmm_log);
    bundle.write("events.ndjson", &shared.events.lines());
}

async fn report(shared: &Shared) -> Result<bytes::Bytes, String> {
    if shared.view().state == MachineState::Paused || *shared.held.borrow() {
        return Err(String::from("the VM's processors were stopped"));
    }
    let Some(mux) = shared.mux.borrow().clone() else {
        return Err(String::from("there was no stream to the agent"));
    };
    let report = link::get(&mux, "/report");
    link::within(REPORT_TIMEOUT, "GET /report", report).await
}

/// Removes what the VM had on the host and looks whether it is gone; writes the rest of the bundle; publishes the end.
async fn dispose(
    shared: &Arc<Shared>,
    mut bundle: Bundle,
    exit: &Exit,
    life: &Life,
    unsaved: Option<&Utf8Path>,
) -> Disposal {
    let directory = Utf8PathBuf::from(&shared.spec.vm_dir);
    let (pid, jail) = (shared.spawned.group(), shared.jail.get());
    tokio::task::block_in_place(|| {
        // Read before the directory is removed: the last lines came after the VMM's end.
        write_logs(shared, &mut bundle);
        bundle.write_json("exit.json", exit);
        let sockets = sockets(&directory);
        let mut before = items(pid, &sockets, &directory);
        let group = jail.and_then(|jail| jail.record().cgroup);
        before.extend(group.map(|path| item("cgroup", path, false)));
        bundle.write_json("disposal.json", &receipt(shared, before));
        if let Err(err) = std::fs::remove_dir_all(&directory) {
            bundle.missing("disposal", &err.to_string());
        }
        crash::point("runner:removed");
        let mut items = items(pid, &sockets, &directory);
        items.extend(jail.iter().flat_map(|jail| jail.remove()));
        items.extend(unsaved.map(|path| item("directory", path.to_string(), !path.exists())));
        let disposal = receipt(shared, items);
        bundle.write_json("disposal.json", &disposal);
        life.enter(MachineState::Gone);
        life.publish(RunnerEventKind::Ended { exit: exit.clone() });
        bundle.write("events.ndjson", &shared.events.lines());
        shared.events.end();
        for gap in bundle.gaps() {
            tracing::warn!(machine.id = %shared.spec.machine_id, gap, "the evidence is not whole");
        }
        disposal
    })
}

fn receipt(shared: &Shared, items: Vec<DisposedItem>) -> Disposal {
    Disposal {
        machine_id: shared.spec.machine_id,
        at: Timestamp::now(),
        complete: items.iter().all(|item| item.gone),
        items,
        by: Disposer::Runner,
    }
}

fn item(kind: &str, name: String, gone: bool) -> DisposedItem {
    DisposedItem {
        kind: kind.to_owned(),
        name,
        gone,
    }
}

/// Sockets below the VM's directory: some of them, where the VMM made many.
fn sockets(directory: &Utf8Path) -> Vec<Utf8PathBuf> {
    let mut sockets = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in next.read_dir_utf8().into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => todo.push(entry.into_path()),
                Ok(kind) if kind.is_socket() && sockets.len() < SOCKETS => {
                    sockets.push(entry.into_path());
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
    sockets
}

fn items(pid: Option<u32>, sockets: &[Utf8PathBuf], directory: &Utf8Path) -> Vec<DisposedItem> {
    let process = pid.map(|pid| {
        item(
            "process",
            format!("process group {pid}"),
            group_is_gone(pid),
        )
    });
    let sockets = sockets
        .iter()
        .map(|path| item("socket", path.to_string(), !path.exists()));
    process
        .into_iter()
        .chain(sockets)
        .chain([
            item("directory", directory.to_string(), !directory.exists()),
            item(
                "memory",
                String::from("config drive"),
                config_drive_is_gone(),
            ),
        ])
        .collect()
}

/// Whether no process is left in the VMM's group.
fn group_is_gone(pid: u32) -> bool {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .is_some_and(|group| test_kill_process_group(group) == Err(rustix::io::Errno::SRCH))
}

/// Whether this process, the only one left that had it, has no descriptor of the config drive open.
fn config_drive_is_gone() -> bool {
    let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") else {
        return false;
    };
    !descriptors
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .any(|link| link.to_string_lossy().contains("memfd:vestibule-config"))
}

/// Everybody who asked for the end, also while it was under way.
fn drain(life: &mut Life) -> Vec<tokio::sync::oneshot::Sender<Disposal>> {
    life.inbox.close();
    let mut stops = std::mem::take(&mut life.stops);
    while let Ok(input) = life.inbox.try_recv() {
        match input {
            Input::Stop { reply, .. } => stops.extend(reply),
            Input::Claim { reply, .. } => drop(reply.send(Err(super::shared::ClaimError::Ending))),
            // A request whose sender is dropped is answered with "the VM is ending".
            Input::Pause(_) | Input::Resume(_) | Input::Snapshot(_) | Input::SaveEnded(_) => {}
            Input::StreamUp
            | Input::Identity
            | Input::AgentUp(_)
            | Input::Agent(_)
            | Input::StreamDown(_)
            | Input::AgentRefused(_) => {}
        }
    }
    stops
}
