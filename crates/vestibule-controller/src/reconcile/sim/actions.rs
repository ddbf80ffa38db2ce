//! What controllers do: each reconciler, each effect that is due, each event of a runner, as an action that stands still
//! at its named points.
use super::{
    host::Runner,
    site::{End, Process},
    world::World,
};
use crate::{
    core::Shared,
    machine::follow,
    reconcile::{self, ReconcileError},
};
use rand::Rng as _;
use std::sync::Arc;
use vestibule_api::{error::Chain, ids::MachineId};

/// Both reconcilers that count places hold a lock: one that waits for it would wait for one that stands still.
const PLACES: &str = "places";

/// How a reconciler ended that fails for its store only.
fn ended<T>(result: Result<T, ReconcileError>) -> End {
    match result {
        Ok(_) => End::Done,
        Err(err) => match End::of(&err) {
            End::Again => panic!("{}", Chain(&err)),
            end @ (End::Done | End::Fenced | End::CutOff) => end,
        },
    }
}

impl World {
    fn process(&mut self, at: usize) -> (&mut Process, Shared) {
        let process = self.sites[at].process.as_mut().unwrap();
        let core = Arc::clone(&process.core);
        (process, core)
    }

    pub(super) fn begin_place(&mut self, at: usize) {
        let (process, core) = self.process(at);
        let action = async move { ended(reconcile::place::run(&core).await) };
        process.begin(PLACES.to_owned(), "place".to_owned(), action);
    }

    pub(super) fn begin_deadlines(&mut self, at: usize) {
        let (process, core) = self.process(at);
        let action = async move { ended(reconcile::deadlines::run(&core).await) };
        process.begin("deadlines".to_owned(), "deadlines".to_owned(), action);
    }

    pub(super) fn begin_hosts(&mut self, at: usize) {
        let (process, core) = self.process(at);
        let action = async move { ended(reconcile::hosts::run(&core).await) };
        process.begin("hosts".to_owned(), "hosts".to_owned(), action);
    }

    pub(super) fn begin_pool(&mut self, at: usize) {
        let (process, core) = self.process(at);
        let action = async move {
            let mut state = reconcile::State::default();
            let end = ended(reconcile::pool::run(&core, &mut state).await);
            while state.tasks.join_next().await.is_some() {}
            end
        };
        process.begin(PLACES.to_owned(), "pool".to_owned(), action);
    }

    /// A stray that can't be ended now is tried again the next time: the loop around it logs that.
    pub(super) fn begin_orphans(&mut self, at: usize) {
        let (process, core) = self.process(at);
        let action = async move {
            let result = reconcile::orphans::run(&core).await;
            result.map_or_else(|err| End::of(&err), |_| End::Done)
        };
        process.begin("orphans".to_owned(), "orphans".to_owned(), action);
    }

    /// One of the effects that are due, as the reconciler begins it.
    pub(super) async fn begin_effect(&mut self) {
        let Some(at) = self.some_site() else {
            return;
        };
        let core = self.sites[at].core();
        let mut due = match core.store.due_effects(self.clock.now()).await {
            Ok(due) => due,
            Err(err) => return self.tally.ended(End::of(&err)),
        };
        if due.is_empty() {
            return;
        }
        let effect = due.swap_remove(self.rng.random_range(0..due.len()));
        let session = self.session_name(effect.session);
        let words = format!("{} of {session}", effect.kind.id());
        // Somebody looks and has seen a frame: nobody is waited for in real time.
        core.live.shown(effect.session);
        let key = effect.id.clone();
        let (process, _) = self.process(at);
        process.begin(key, words, async move {
            reconcile::effects::carry_out(&core, &effect).await;
            End::Done
        });
    }

    /// A controller hears from one of the runners that it follows, or that one is gone.
    pub(super) async fn begin_follow(&mut self) {
        let Some(at) = self.some_site() else {
            return;
        };
        let mut machines = match self.followed(at).await {
            Ok(machines) => machines,
            Err(end) => return self.tally.ended(end),
        };
        if machines.is_empty() {
            return;
        }
        if self.rng.random_bool(0.05) {
            // The connection broke; the runner's events come from the first again.
            let machine = machines[self.rng.random_range(0..machines.len())];
            let (process, _) = self.process(at);
            let before = process.taken.insert(machine, 0).unwrap_or(0);
            self.tally.events_again += before as u64;
        }
        machines.retain(|id| self.is_to_be_heard(at, *id));
        if !machines.is_empty() {
            let machine = machines[self.rng.random_range(0..machines.len())];
            self.follow(at, machine);
        }
    }

    /// Whether its runner has said something new, or is gone.
    fn is_to_be_heard(&self, at: usize, id: MachineId) -> bool {
        let process = self.sites[at].process.as_ref().unwrap();
        let taken = process.taken.get(&id).copied().unwrap_or(0);
        let runner = self.sites[at].host.get(id);
        runner.is_some_and(|runner| {
            !runner.is_alive() || runner.vm.lock().unwrap().events.len() > taken
        })
    }

    /// As the reconciler `machines` chooses them.
    async fn followed(&self, at: usize) -> Result<Vec<MachineId>, End> {
        let machines = self.sites[at].core().store.launched_machines().await;
        machines.map_err(|err| End::of(&err))
    }

    /// Whether there was something to hear.
    fn follow(&mut self, at: usize, id: MachineId) -> bool {
        let Some(runner) = self.sites[at].host.get(id) else {
            return false;
        };
        let name = self.name(id);
        let (process, core) = self.process(at);
        let taken = process.taken.get(&id).copied().unwrap_or(0);
        let event = runner.vm.lock().unwrap().events.get(taken).cloned();
        let key = format!("follow {id}");
        let begun = match event {
            Some(event) if runner.is_alive() => {
                let line = serde_json::to_vec(&event).unwrap();
                let words = format!("event {} of {name}", taken + 1);
                let begun = process.begin(key, words, hear(core, id, line, runner));
                if begun {
                    process.taken.insert(id, taken + 1);
                }
                begun
            }
            _ if runner.is_alive() => false,
            _ => {
                let words = format!("{name} is seen to be gone");
                process.begin(key, words, async move {
                    match core.store.machine(id).await {
                        Ok(Some(mut row)) => follow::gone(&core, &mut row).await,
                        Ok(None) => {}
                        Err(err) => return End::of(&err),
                    }
                    End::Done
                })
            }
        };
        if begun && let Some(action) = process.actions.last_mut() {
            action.hears = Some(id);
        }
        begun
    }

    /// Everything that this controller can do now.
    pub(super) async fn reconcile(&mut self, at: usize) {
        self.sites[at].make_old();
        self.begin_place(at);
        self.begin_deadlines(at);
        self.begin_hosts(at);
        self.begin_orphans(at);
        self.finish_all(at).await;
        self.begin_pool(at);
        self.finish_all(at).await;
        for id in self.followed(at).await.unwrap() {
            while self.follow(at, id) {
                self.finish_all(at).await;
                // One that is gone is seen to be gone once; its row is the teardown's.
                if !self.sites[at]
                    .host
                    .get(id)
                    .is_some_and(|runner| runner.is_alive())
                {
                    break;
                }
            }
        }
        let core = self.sites[at].core();
        for effect in core.store.due_effects(self.clock.now()).await.unwrap() {
            core.live.shown(effect.session);
            reconcile::effects::carry_out(&core, &effect).await;
        }
    }
}

/// Takes in one line of a runner's events, and what follows on its last one.
async fn hear(core: Shared, id: MachineId, line: Vec<u8>, runner: Arc<Runner>) -> End {
    let mut row = match core.store.machine(id).await {
        Ok(Some(row)) => row,
        Ok(None) => return End::Done,
        Err(err) => return End::of(&err),
    };
    match follow::take_in(&core, &mut row, &line).await {
        Ok(true) => follow::finished(&core, &row).await,
        Ok(false) => {}
        Err(err) => match End::of(&err) {
            End::Again => panic!("{}: {}", runner.spec.machine_id, Chain(&err)),
            end @ (End::Done | End::Fenced | End::CutOff) => return end,
        },
    }
    End::Done
}
