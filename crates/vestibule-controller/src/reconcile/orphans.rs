//! What is on the host and in no row, and what is in a row and has no owner.
//!
//! A runner that somebody started by hand (`vestibule vm run`) belongs to no session: it is shown and left alone. A runner
//! of a session that this database does not know, or that has ended, is ended. A directory without a runner is removed,
//! its files saved first.
use super::ReconcileError;
use crate::{
    core::{Shared, off_runtime},
    machine::teardown,
    state::Effect,
    store::MachineRow,
};
use camino::Utf8PathBuf;
use std::time::{Duration, SystemTime};
use vestibule_api::{error::Chain, ids::MachineId, machine::MachineView};

/// Somebody may be about to start a runner in a directory that is younger.
const YOUNG: Duration = Duration::from_secs(60);

pub(super) async fn run(core: &Shared) -> Result<u64, ReconcileError> {
    let mut count = 0;
    for (id, dir) in directories(core.config.home.join("vms")).await? {
        match core.store.machine(id).await? {
            Some(machine) if machine.gone_at.is_none() => {
                // A scheduler put it here.
                if machine.host_id.is_none() && core.store.claim_machine(id).await? {
                    tracing::info!(machine.id = %id, "claimed a VM that runs here");
                }
                count += owned(core, &machine).await?;
            }
            row => count += unknown(core, id, dir, row.is_some_and(|row| row.pooled)).await?,
        }
    }
    Ok(count)
}

async fn directories(path: Utf8PathBuf) -> Result<Vec<(MachineId, Utf8PathBuf)>, ReconcileError> {
    off_runtime(move || {
        let entries = match path.read_dir_utf8() {
            Ok(entries) => entries,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(err) => return Err(ReconcileError::List { path, err }),
        };
        let found = entries.flatten().filter_map(|entry| {
            let id = entry.file_name().parse().ok()?;
            Some((id, entry.path().to_owned()))
        });
        Ok(found.collect())
    })
    .await?
}

/// A machine whose session has ended, or has another one, and has nothing left to do about it.
async fn owned(core: &Shared, machine: &MachineRow) -> Result<u64, ReconcileError> {
    let Some(session) = machine.session_id else {
        return Ok(0);
    };
    let row = core.store.session(session).await?;
    let over = row.is_none_or(|row| row.state.is_terminal() || row.machine_id != Some(machine.id));
    if !over || core.store.is_open(session, Effect::Teardown).await? {
        return Ok(0);
    }
    tracing::warn!(machine.id = %machine.id, session.id = %session, "ending a VM that its session has no use for");
    teardown::end_stray(core, machine.id, "its session has no use for it")
        .await
        .map_err(ReconcileError::Stray)?;
    Ok(1)
}

/// A directory of no machine that the rows know, or of one that they know to be gone: its host was forgotten and came back.
/// A VM of the pool is nobody's then, and not one that somebody started by hand.
async fn unknown(
    core: &Shared,
    id: MachineId,
    dir: Utf8PathBuf,
    pooled: bool,
) -> Result<u64, ReconcileError> {
    match core.runner(id).get::<MachineView>("/machine").await {
        Ok(view) if view.session_id.is_none() && !pooled => {
            tracing::info!(machine.id = %id, "found a VM that somebody started by hand");
            core.store.add_machine(&MachineRow::found(&view)).await?;
            Ok(1)
        }
        Ok(view) => {
            tracing::warn!(machine.id = %id, session.id = ?view.session_id, "ending a VM that no row has a use for");
            core.store.add_machine(&MachineRow::found(&view)).await?;
            teardown::end_stray(core, id, "no session owns it")
                .await
                .map_err(ReconcileError::Stray)?;
            Ok(1)
        }
        Err(_) if core.runner_alive(id).await || is_young(dir.clone()).await? => Ok(0),
        Err(err) => {
            tracing::warn!(machine.id = %id, error = %Chain(&err), "removing what a runner left that is gone");
            teardown::save(core, id)
                .await
                .map_err(ReconcileError::Stray)?;
            Ok(1)
        }
    }
}

async fn is_young(dir: Utf8PathBuf) -> Result<bool, ReconcileError> {
    let age = off_runtime(move || {
        let modified = std::fs::metadata(&dir)
            .and_then(|meta| meta.modified())
            .ok()?;
        SystemTime::now().duration_since(modified).ok()
    });
    Ok(age.await?.is_some_and(|age| age < YOUNG))
}
