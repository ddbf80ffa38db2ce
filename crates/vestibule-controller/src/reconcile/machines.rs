//! Follows the runner of every machine that was launched and is not gone: also of those that an earlier controller launched.
use super::{ReconcileError, State};
use crate::{core::Shared, machine::follow};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use vestibule_api::ids::MachineId;

/// Machines that have a task in this process.
pub(super) type Followed = Arc<Mutex<HashSet<MachineId>>>;

fn locked(followed: &Followed) -> MutexGuard<'_, HashSet<MachineId>> {
    followed.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) async fn run(core: &Shared, state: &mut State) -> Result<u64, ReconcileError> {
    let mut begun = 0;
    for id in core.store.launched_machines().await? {
        if locked(&state.followed).contains(&id) {
            continue;
        }
        let Some(machine) = core.store.machine(id).await? else {
            continue;
        };
        let followed = Arc::clone(&state.followed);
        // Only this reconciler adds to them, and it runs once at a time.
        locked(&followed).insert(id);
        begun += 1;
        let core = core.clone();
        state.tasks.spawn(async move {
            follow::follow(core, machine).await;
            locked(&followed).remove(&id);
        });
    }
    Ok(begun)
}
