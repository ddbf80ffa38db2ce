//! Saving a VM and loading it again, as measured in QEMU 7.2 and 10.0. The memory is a file already, so only CPUs and
//! devices go through QEMU's migration (`x-ignore-shared`), into and out of a pipe: the sandbox forbids QEMU to start
//! programs, and version 7.2 cannot write to a file by itself. A restored VM maps the same file privately
//! (`share=off`): what it writes are pages of its own, and the file stays as it is. That holds only without a device that
//! gives memory back: on `share=off` QEMU 7.2's balloon would punch its holes into the file (`ram_block_discard_range`),
//! so no VM has one.
use super::{
    QemuMachine,
    argv::Accel,
    qmp::{Qmp, QmpError, QmpEvent},
};
use crate::driver::{Launch, MachineError};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};
use std::{fs::File, io, time::Duration};
use tokio::sync::broadcast;
use vestibule_api::snapshot::Binding;

/// Names of descriptors in QEMU.
const SAVE: &str = "snapshot";
const LOAD: &str = "restore";
/// QEMU tells of each step by an event; it is asked again after so long even so.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Everything that a snapshot of this VM is bound to, as far as it is known before QEMU runs.
pub(super) fn expected(
    accel: Accel,
    machine: &str,
    launch: &Launch,
    arguments: String,
    tsc_khz: u64,
) -> Binding {
    let cpu = match accel {
        Accel::Tcg => accel.cpu().to_owned(),
        Accel::Kvm => format!("{} ({})", accel.cpu(), crate::cpu::read().model),
    };
    Binding {
        image_digest: launch.image_digest.clone(),
        agent_build: launch.agent_build.clone(),
        driver: accel.name().to_owned(),
        vmm_version: String::new(),
        machine: machine.to_owned(),
        cpu,
        cpu_features: Vec::new(),
        memory_mib: launch.memory_mib,
        vcpus: launch.vcpus,
        runner: env!("CARGO_PKG_VERSION").to_owned(),
        arguments,
        cmdline: super::argv::cmdline(accel, launch),
        tsc_khz,
    }
}

/// The rest of it, from the QEMU that runs.
pub(super) async fn complete(
    qmp: &Qmp,
    accel: Accel,
    mut binding: Binding,
) -> Result<Binding, QmpError> {
    let version = qmp.execute("query-version", json!({})).await?;
    let number = super::qmp::version_in(&version).unwrap_or_default();
    let package = version["package"].as_str().unwrap_or_default();
    binding.vmm_version = match package {
        "" => number,
        package => format!("{number} ({package})"),
    };
    let model = json!({ "type": "full", "model": { "name": accel.cpu() } });
    let expanded = qmp.execute("query-cpu-model-expansion", model).await?;
    let props = expanded["model"]["props"].as_object();
    binding.cpu_features = props
        .into_iter()
        .flatten()
        .filter(|(_, value)| **value == Value::Bool(true))
        .map(|(name, _)| name.clone())
        .collect();
    binding.cpu_features.sort();
    Ok(binding)
}

fn pipe() -> io::Result<(File, File)> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((File::from(out), File::from(into)))
}

async fn ignore_shared(qmp: &Qmp) -> Result<(), QmpError> {
    let capabilities = json!({ "capabilities": [
        { "capability": "x-ignore-shared", "state": true },
        { "capability": "events", "state": true },
    ] });
    qmp.execute("migrate-set-capabilities", capabilities)
        .await
        .map(drop)
}

/// Loads `state` into a QEMU that waits for it. The CPUs stay stopped, as they were when they were saved.
pub(super) async fn load(qmp: &Qmp, mut state: File) -> Result<(), QmpError> {
    let broken = |err: io::Error| QmpError::Migration {
        status: String::from("not begun"),
        desc: err.to_string(),
    };
    ignore_shared(qmp).await?;
    let (out, mut into) = pipe().map_err(broken)?;
    qmp.give(LOAD, out.into()).await?;
    let events = qmp.subscribe();
    // A QEMU that fails ends, and with it the pipe.
    let feeding = tokio::task::spawn_blocking(move || io::copy(&mut state, &mut into).map(drop));
    let uri = json!({ "uri": format!("fd:{LOAD}") });
    qmp.execute("migrate-incoming", uri).await?;
    let loaded = completed(qmp, events).await;
    if loaded.is_ok()
        && let Ok(Err(err)) = feeding.await
    {
        return Err(broken(err));
    }
    loaded
}

impl QemuMachine {
    /// Stops the CPUs and writes the state; the memory is in its file then.
    pub(super) async fn save_state(&self, mut state: File) -> Result<(), MachineError> {
        let control = |err: QmpError| MachineError::Control {
            what: "save",
            err: err.into(),
        };
        self.command("pause", "stop").await?;
        ignore_shared(&self.qmp).await.map_err(control)?;
        let (mut out, into) = pipe().map_err(MachineError::Save)?;
        self.qmp.give(SAVE, into.into()).await.map_err(control)?;
        let events = self.qmp.subscribe();
        let taking = tokio::task::spawn_blocking(move || io::copy(&mut out, &mut state).map(drop));
        let uri = json!({ "uri": format!("fd:{SAVE}") });
        self.qmp.execute("migrate", uri).await.map_err(control)?;
        let saved = completed(&self.qmp, events).await;
        // Who could not write is why QEMU could not: its words come first. The pipe has ended either way.
        match taking.await {
            Ok(taken) => taken.map_err(MachineError::Save)?,
            Err(err) => return Err(MachineError::Save(io::Error::other(err))),
        }
        saved.map_err(control)
    }
}

/// Waits until QEMU's migration has completed.
async fn completed(qmp: &Qmp, mut events: broadcast::Receiver<QmpEvent>) -> Result<(), QmpError> {
    loop {
        let now = qmp.execute("query-migrate", json!({})).await?;
        let status = now["status"].as_str().unwrap_or("none");
        match status {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                return Err(QmpError::Migration {
                    status: status.to_owned(),
                    desc: now["error-desc"]
                        .as_str()
                        .unwrap_or("QEMU does not say why")
                        .to_owned(),
                });
            }
            _ => {}
        }
        // Which event it was does not matter: QEMU is asked again.
        let _ = tokio::time::timeout(ASK_AGAIN, events.recv()).await;
    }
}
