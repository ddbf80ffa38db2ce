//! Follows the runner of every machine that was launched and is not gone: also of those that an earlier controller launched.
use super::{ReconcileError, State};
use crate::{core::Shared, machine::follow};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};
use vestibule_api::{ids::MachineId, machine::MachineState};

/// Machines that have a task in this process.
pub(super) type Followed = Arc<Mutex<HashSet<MachineId>>>;

pub(super) async fn run(core: &Shared, state: &mut State) -> Result<u64, ReconcileError> {
    let mut begun = 0;
    for machine in core.store.own_machines().await? {
        let over = matches!(machine.state, MachineState::Gone | MachineState::Lost);
        if machine.launched_at.is_none() || over {
            continue;
        }
        let followed = Arc::clone(&state.followed);
        if !followed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(machine.id)
        {
            continue;
        }
        begun += 1;
        let core = core.clone();
        state.tasks.spawn(async move {
            let id = machine.id;
            follow::follow(core.clone(), machine).await;
            followed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&id);
        });
    }
    Ok(begun)
}
