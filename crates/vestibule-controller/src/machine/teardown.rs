//! Ends VMs: the runner writes the evidence and ends the VM; what a dead runner left is saved and removed; then the
//! controller adds what it knows, and the machine's place is free.
use super::{
    EffectError,
    evidence::{self, Story},
};
use crate::{
    core::{Shared, off_runtime},
    crash::point,
    store::{MachineRow, SessionRow},
};
use hyper::Method;
use std::{sync::Arc, time::Duration};
use vestibule_api::{
    client::CallError,
    error::Chain,
    ids::MachineId,
    machine::{Disposal, StopRequest},
};

/// A runner writes evidence and ends its VM within this time, or is asked again.
const STOP_TIME: Duration = Duration::from_secs(90);
/// A runner that lives but did not do what it was asked so often is killed.
const STOP_TRIES: u32 = 8;
/// What a dead runner left is tried to be saved so often.
const SAVE_TRIES: u32 = 3;
/// A runner that has answered is gone soon.
const END_TIME: Duration = Duration::from_secs(10);
const END_POLL: Duration = Duration::from_millis(20);

/// Carries [`crate::state::Effect::Teardown`] out.
///
/// `attempts` counts the tries before this one: what can't be saved after several is given up, so that a full disk keeps
/// neither a directory nor a place.
pub(crate) async fn teardown(
    core: &Shared,
    session: &SessionRow,
    attempts: u32,
) -> Result<(), EffectError> {
    // The machines first: one that the session was given since then is told from those that it gave up.
    let machines = core.store.machines_of(session.id).await?;
    let Some(session) = core.store.session(session.id).await? else {
        return Ok(());
    };
    let over = session.state.is_terminal();
    for machine in machines {
        if over || session.machine_id != Some(machine.id) {
            one(core, &session, &machine, attempts).await?;
        }
    }
    if over {
        core.live.forget(session.id);
    }
    Ok(())
}

async fn one(
    core: &Shared,
    session: &SessionRow,
    machine: &MachineRow,
    attempts: u32,
) -> Result<(), EffectError> {
    end(core, machine.id, &reason(session)).await?;
    point("teardown:ended").await;
    match clean(core, machine.id).await {
        Err(err) if attempts >= SAVE_TRIES => {
            tracing::error!(machine.id = %machine.id, error = %Chain(&err), "what the runner left is removed unsaved");
            let (id, vm_dir, evidence_dir) = (
                machine.id,
                core.vm_dir(machine.id),
                core.evidence_dir(machine.id),
            );
            off_runtime(move || evidence::abandon(id, &vm_dir, &evidence_dir)).await??;
        }
        cleaned => cleaned?,
    }
    point("teardown:cleaned").await;
    // The VM is gone: from here on nothing may keep its place from the next one.
    if let Err(err) = tell(core, session, machine).await {
        tracing::error!(session.id = %session.id, machine.id = %machine.id, error = %Chain(&err), "the evidence is not complete");
    }
    point("teardown:told").await;
    core.store.machine_gone(machine.id, core.now()).await?;
    Ok(())
}

fn reason(session: &SessionRow) -> String {
    if session.state.is_terminal() {
        format!("session {}", session.state.id())
    } else {
        "the session gets another VM".to_owned()
    }
}

/// Ends a VM that has no session.
pub(crate) async fn end_stray(
    core: &Shared,
    machine: MachineId,
    reason: &str,
) -> Result<(), EffectError> {
    end(core, machine, reason).await?;
    clean(core, machine).await?;
    core.store.machine_gone(machine, core.now()).await?;
    Ok(())
}

/// Returns when neither runner nor VM lives.
async fn end(core: &Shared, id: MachineId, reason: &str) -> Result<(), EffectError> {
    if !core.runner_alive(id).await {
        return Ok(());
    }
    let asked = stop(core, id, reason).await;
    if let Err(err) = &asked {
        tracing::warn!(machine.id = %id, error = %Chain(err), "the runner did not stop its VM");
        if core.live.unanswered(id, false) >= STOP_TRIES {
            let scheduler = Arc::clone(&core.scheduler);
            off_runtime(move || scheduler.kill(id)).await?;
        }
    }
    let mut left = END_TIME;
    while core.runner_alive(id).await {
        if left.is_zero() {
            return asked.and(Err(EffectError::StillAlive));
        }
        left = left.saturating_sub(core.clock.sleep(END_POLL).await);
    }
    core.live.unanswered(id, true);
    Ok(())
}

async fn stop(core: &Shared, id: MachineId, reason: &str) -> Result<(), EffectError> {
    let request = StopRequest {
        reason: reason.to_owned(),
    };
    let runner = core.runner(id);
    let call = runner.call::<_, Option<Disposal>>(Method::POST, "/stop", Some(&request));
    match tokio::time::timeout(STOP_TIME, call).await {
        Err(_) => Err(EffectError::Timeout(STOP_TIME.as_secs())),
        // The runner may be gone before its reply is through.
        Ok(Err(CallError::Http { .. } | CallError::Body { .. })) => Ok(()),
        Ok(Err(err)) => Err(err.into()),
        Ok(Ok(disposal)) => {
            if disposal.is_some_and(|disposal| !disposal.complete) {
                tracing::error!(machine.id = %id, "the runner says that something of the VM is left; see disposal.json");
            }
            Ok(())
        }
    }
}

/// Saves what a runner left in its directory, then removes that.
async fn clean(core: &Shared, id: MachineId) -> Result<(), EffectError> {
    let scheduler = Arc::clone(&core.scheduler);
    off_runtime(move || scheduler.forget(id)).await?;
    save(core, id).await
}

/// As [`clean`], of a runner that no scheduler has to forget.
pub(crate) async fn save(core: &Shared, id: MachineId) -> Result<(), EffectError> {
    let (vm_dir, evidence_dir) = (core.vm_dir(id), core.evidence_dir(id));
    let receipt = off_runtime(move || evidence::salvage(id, &vm_dir, &evidence_dir)).await??;
    if receipt.is_some_and(|receipt| !receipt.complete) {
        core.metrics.left_behind.inc();
    }
    Ok(())
}

/// Adds the session's story and the verdict to the evidence; a failed session gets the best founded verdict.
async fn tell(
    core: &Shared,
    session: &SessionRow,
    machine: &MachineRow,
) -> Result<(), EffectError> {
    let machine = core
        .store
        .machine(machine.id)
        .await?
        .unwrap_or_else(|| machine.clone());
    let session = core
        .store
        .session(session.id)
        .await?
        .unwrap_or_else(|| session.clone());
    let events = core.store.events(session.id, 0, 10_000).await?;
    let dir = core.evidence_dir(machine.id);
    let story = Story::new(&session, &machine, events);
    let images = core.images.clone();
    let written =
        off_runtime(move || evidence::complete(&dir, story, |alias| images.current(alias)))
            .await??;
    if session.failure.is_some() && session.machine_id == Some(machine.id) {
        core.store.set_verdict(session.id, &written).await?;
        core.store.signals.changed(session.id);
    }
    Ok(())
}
