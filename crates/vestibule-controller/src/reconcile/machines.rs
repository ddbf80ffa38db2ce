//! Follows the runner of every machine that was launched and is not gone: also of those that an earlier controller launched.
use super::{ReconcileError, State};
use crate::{core::Shared, machine::follow};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};
use vestibule_api::{error::Chain, ids::MachineId};

/// Machines that have a task in this process.
pub(super) type Followed = Arc<Mutex<HashSet<MachineId>>>;

pub(super) async fn run(core: &Shared, state: &mut State) -> Result<u64, ReconcileError> {
    let mut begun = 0;
    for id in core.store.launched_machines().await? {
        let followed = Arc::clone(&state.followed);
        if !followed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id)
        {
            continue;
        }
        begun += 1;
        let core = core.clone();
        state.tasks.spawn(async move {
            match core.store.machine(id).await {
                Ok(Some(machine)) => follow::follow(core.clone(), machine).await,
                Ok(None) => {}
                Err(err) => {
                    tracing::error!(machine.id = %id, error = %Chain(&err), "a runner is not followed");
                }
            }
            followed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&id);
        });
    }
    Ok(begun)
}
