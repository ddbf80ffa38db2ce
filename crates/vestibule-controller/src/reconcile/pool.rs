//! The pool: restored, paused VMs that belong to nobody yet, so many for each alias as the configuration says.
//!
//! A VM of the pool is made like any other, with a way out that is closed, and paused as soon as it is up, if its driver can. A
//! session takes it in the transaction that places it ([`super::place`]); it never comes back. What is not what would be made
//! now (another image or size, or another snapshot of which one is ready), is too old, is one too many, or stands in the way of
//! somebody, is retired and ended. People go first: nothing is filled while a sign-in waits for a place here, nor, for
//! [`YIELDS`] at most, while one starts; and one VM at a time.
use super::{ReconcileError, State, place::free_mib};
use crate::{
    core::{Shared, off_runtime},
    machine::{EffectError, evidence, launch, teardown},
    store::{MachineRow, SessionRow, StoreError},
    warm::{self, Plan, PlanError},
};
use hyper::{Method, StatusCode};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use vestibule_api::{
    error::Chain,
    ids::MachineId,
    machine::{MachineState, MachineView},
    session::{SessionState, StartKind},
    time::Timestamp,
};

/// After a VM that failed before anybody had it; doubled with each further one.
const AGAIN: Duration = Duration::from_secs(5);
const AGAIN_MAX: Duration = Duration::from_secs(600);
/// So many of the newest VMs are looked at for failures in a row.
const HISTORY: u32 = 16;
/// The host is short of memory when programs waited for it in more of the last ten seconds, in percent.
const STALLED_PERCENT: f64 = 10.0;
/// After a VM was given back for want of memory, none is made for so long.
const STRAINED: Duration = Duration::from_secs(60);
/// Why a VM is given back for want of memory; found again in its row.
const MEMORY: &str = "the host is short of memory";
/// Why a VM is ended that began from a snapshot from which others do not any more.
const REPLACED: &str = "there is another snapshot";
/// A step of a VM's that failed is tried again after this.
const STEP_AGAIN: Duration = Duration::from_secs(1);

/// The pool waits so long at most for sign-ins that start: where they come one after another, it would be empty for good.
const YIELDS: Duration = Duration::from_secs(5);

type Ids = Arc<Mutex<HashSet<MachineId>>>;

fn locked(ids: &Ids) -> MutexGuard<'_, HashSet<MachineId>> {
    ids.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the pool knows in this process only.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// VMs that have a task.
    under_way: Ids,
    /// VMs that their driver never pauses.
    stay_up: Ids,
    /// Since when it waits for sign-ins that start.
    yields_since: Option<Instant>,
}

impl Known {
    /// Whether a VM in stock is as far as it gets before somebody takes it.
    fn is_ready(&self, machine: &MachineRow) -> bool {
        match machine.state {
            MachineState::Paused => true,
            MachineState::Up => locked(&self.stay_up).contains(&machine.id),
            MachineState::Creating
            | MachineState::Booting
            | MachineState::Stopping
            | MachineState::Gone
            | MachineState::Lost => false,
        }
    }
}

/// The pool of one alias, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shelf {
    pub(crate) alias: String,
    pub(crate) target: u32,
    /// Paused, or up where the driver pauses none; to be taken.
    pub(crate) ready: u32,
    /// On the way there.
    pub(crate) filling: u32,
    /// How a VM under this alias begins now, and what keeps the pool from being filled, if anything does.
    pub(crate) words: String,
}

/// What the pool's last run saw.
#[derive(Debug, Default)]
pub(crate) struct Stock(Mutex<Vec<Shelf>>);

impl Stock {
    /// Every alias that has a pool.
    pub(crate) fn shelves(&self) -> Vec<Shelf> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, shelves: Vec<Shelf>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = shelves;
    }
}

pub(super) async fn run(core: &Shared, state: &mut State) -> Result<u64, ReconcileError> {
    let targets = core.config.pool();
    let mut plans = BTreeMap::new();
    for alias in targets.keys() {
        let plan = match warm::plan(core, alias).await {
            Ok(plan) => Ok(plan),
            Err(err @ PlanError::Image { .. }) => Err(Chain(&err).to_string()),
            Err(err) => return Err(err.into()),
        };
        plans.insert(alias.as_str(), plan);
    }
    let mut done = 0;
    let mut machines = core.store.nobodys_machines().await?;
    locked(&state.pool.stay_up).retain(|id| machines.iter().any(|m| m.id == *id));
    for (id, why) in unwanted(core, &state.pool, &targets, &plans, &machines) {
        done += u64::from(core.store.retire(id, &why).await?);
    }
    if done > 0 {
        machines = core.store.nobodys_machines().await?;
    }
    for machine in &machines {
        done += u64::from(step(core, state, machine));
    }
    let mut shelves = Vec::new();
    for (alias, target) in &targets {
        let held = match plans.get(alias.as_str()) {
            Some(Ok(plan)) if *target > 0 => fill(core, state, plan, *target).await?,
            Some(Err(why)) => Err(why.clone()),
            Some(Ok(_)) | None => Err("the configuration keeps none".to_owned()),
        };
        let how = plans
            .get(alias.as_str())
            .and_then(|plan| plan.as_ref().ok());
        let words = [how.map(Plan::words), held.as_ref().err().cloned()];
        let of = machines.iter().filter(|m| m.image_alias == *alias);
        let stock: Vec<_> = of.filter(|m| m.is_stock()).collect();
        let ready = stock.iter().filter(|m| state.pool.is_ready(m));
        let ready = count(ready.count());
        let filled = u32::from(held == Ok(true));
        shelves.push(Shelf {
            alias: alias.clone(),
            target: *target,
            ready,
            filling: count(stock.len()).saturating_sub(ready) + filled,
            words: words.into_iter().flatten().collect::<Vec<_>>().join("; "),
        });
        done += u64::from(filled);
    }
    core.stock.set(shelves);
    Ok(done)
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// What is in stock and should not be, and why.
fn unwanted(
    core: &Shared,
    known: &Known,
    targets: &BTreeMap<String, u32>,
    plans: &BTreeMap<&str, Result<Plan, String>>,
    machines: &[MachineRow],
) -> Vec<(MachineId, String)> {
    let now = core.now();
    let oldest = Duration::from_secs(core.config.deadlines.pool_s.into());
    let mut kept: BTreeMap<(&str, bool), u32> = BTreeMap::new();
    let is_replaced = |plan: &Plan| {
        let mut stock = machines.iter().filter(|m| m.is_stock() && plan.fits(m));
        stock.any(|m| plan.is_current(m) && known.is_ready(m))
    };
    let mut unwanted = Vec::new();
    // The oldest are the nearest to ready: what is one too many is the newest.
    for machine in machines.iter().filter(|m| m.is_stock()) {
        let alias = machine.image_alias.as_str();
        let target = targets.get(alias).copied().unwrap_or(0);
        let why = match plans.get(alias).filter(|_| target > 0) {
            None => Some("the configuration keeps none of its alias"),
            Some(Err(_)) => Some("its image can't be used any more"),
            Some(Ok(plan)) if !plan.fits(machine) => {
                Some("its alias means another image, or VMs have another size")
            }
            Some(Ok(plan)) if !plan.is_current(machine) && is_replaced(plan) => Some(REPLACED),
            Some(Ok(_)) if now >= machine.created_at.plus(oldest) => Some("it is too old"),
            // Beside the first of a new snapshot, the old ones stay until it is ready.
            Some(Ok(plan)) => {
                let kept = kept.entry((alias, plan.is_current(machine))).or_default();
                *kept += 1;
                (*kept > target).then_some("it is one too many")
            }
        };
        unwanted.extend(why.map(|why| (machine.id, why.to_owned())));
    }
    let leaving = machines.iter().any(|m| !m.is_stock());
    let newest = machines.iter().rfind(|m| m.is_stock());
    if let (Some(newest), Some(_), true, false) =
        (newest, strain(core, 0), unwanted.is_empty(), leaving)
    {
        unwanted.push((newest.id, MEMORY.to_owned()));
    }
    unwanted
}

/// Why the host has not so many MiB for one more VM, in words.
fn strain(core: &Shared, needed_mib: u32) -> Option<String> {
    let memory = core.scheduler.memory()?;
    let needed = u64::from(needed_mib) + core.config.limits.min_free_memory_mib;
    if memory.available_mib < needed {
        return Some(format!(
            "{MEMORY}: {} MiB are available of {needed} needed",
            memory.available_mib
        ));
    }
    let stalled = memory.stalled_percent.unwrap_or(0.0);
    (stalled >= STALLED_PERCENT)
        .then(|| format!("{MEMORY}: programs waited for it in {stalled} % of the last 10 s"))
}

/// The next step of a machine that no session has, in a task of its own; whether there is one.
fn step(core: &Shared, state: &mut State, machine: &MachineRow) -> bool {
    let end = machine.retired.is_some() || machine.is_over();
    let stays = state.pool.is_ready(machine) || machine.state != MachineState::Up;
    let idle = machine.launched_at.is_some() && stays;
    if !end && idle {
        return false;
    }
    let under_way = Arc::clone(&state.pool.under_way);
    if !locked(&under_way).insert(machine.id) {
        return false;
    }
    let stay_up = Arc::clone(&state.pool.stay_up);
    let (core, machine) = (core.clone(), machine.clone());
    state.tasks.spawn(async move {
        let stepped = if end {
            finish(&core, &machine).await
        } else if machine.launched_at.is_none() {
            start(&core, &machine).await
        } else {
            pause(&core, &stay_up, &machine).await
        };
        if let Err(err) = stepped {
            tracing::warn!(machine.id = %machine.id, error = %Chain(&err), "a step of a VM of the pool is tried again");
            core.clock.sleep(STEP_AGAIN).await;
        }
        locked(&under_way).remove(&machine.id);
        core.store.signals.wake();
    });
    true
}

async fn start(core: &Shared, machine: &MachineRow) -> Result<(), EffectError> {
    if let Err(finding) = launch::start(core, machine).await? {
        tracing::error!(machine.id = %machine.id, cause = %finding.cause, "no runner was started for the pool");
        core.store
            .machine_failed(machine.id, finding, core.now())
            .await?;
    }
    Ok(())
}

/// A VM that a session claims meanwhile is not paused: its runner refuses, and the row says whose it is the next time.
/// Where its driver pauses none, it stays up.
async fn pause(core: &Shared, stay_up: &Ids, machine: &MachineRow) -> Result<(), EffectError> {
    let runner = core.runner(machine.id);
    let paused = runner.call::<_, MachineView>(Method::POST, "/pause", None::<&()>);
    match paused.await {
        // Its runner says that it is paused, too; the row follows that.
        Ok(_) => Ok(()),
        Err(err) if err.status() == Some(StatusCode::NOT_IMPLEMENTED) => {
            tracing::info!(machine.id = %machine.id, why = %Chain(&err), "a VM of the pool is not paused");
            locked(stay_up).insert(machine.id);
            Ok(())
        }
        Err(err) => Err(err.into()),
    }
}

/// Evidence of a VM that nobody had and that did not fail proves nothing.
async fn finish(core: &Shared, machine: &MachineRow) -> Result<(), EffectError> {
    let why = machine.retired.as_deref().unwrap_or("it failed");
    tracing::info!(machine.id = %machine.id, why, "ending a VM of the pool");
    let failed = machine.failure.is_some();
    teardown::end_stray(core, machine.id, why).await?;
    if !failed {
        let dir = core.evidence_dir(machine.id);
        off_runtime(move || evidence::remove(&dir)).await??;
    }
    Ok(())
}

/// Makes one more VM where there is room for it. `Ok(false)`: as many are there as should be; the inner error is what
/// keeps the pool from being filled.
async fn fill(
    core: &Shared,
    state: &mut State,
    plan: &Plan,
    target: u32,
) -> Result<Result<bool, String>, ReconcileError> {
    let _counting = core.places.lock().await;
    let mut stock = core.store.nobodys_machines().await?;
    let leaving = stock.iter().any(|m| !m.is_stock());
    stock.retain(MachineRow::is_stock);
    let own = stock.iter().filter(|m| m.image_alias == plan.alias);
    let (current, replaced): (Vec<_>, Vec<_>) = own.partition(|m| plan.is_current(m));
    if count(current.len()) >= target {
        return Ok(Ok(false));
    }
    if plan.snapshot.is_none() {
        // The plan's own words say why.
        return Ok(Err("the pool keeps restored VMs only".to_owned()));
    }
    if stock.iter().any(|m| !state.pool.is_ready(m)) {
        return Ok(Err("another VM of the pool is being made".to_owned()));
    }
    if somebody_waits(core).await? {
        return Ok(Err("sign-ins that wait for a place go first".to_owned()));
    }
    let machines = core.store.own_machines().await?;
    if somebody_starts(core, &machines).await? {
        let since = *state.pool.yields_since.get_or_insert_with(Instant::now);
        if since.elapsed() < YIELDS {
            return Ok(Err("sign-ins that start go first".to_owned()));
        }
    } else {
        state.pool.yields_since = None;
    }
    let limit = core.config.limits.vms;
    if count(machines.len()) >= limit {
        // Else there would be no place for the first of the new snapshot.
        if let Some(machine) = replaced.last().filter(|_| !leaving) {
            core.store.retire(machine.id, REPLACED).await?;
        }
        return Ok(Err(format!("all {limit} places are taken")));
    }
    if let Some(words) = strain(core, plan.memory_mib) {
        return Ok(Err(words));
    }
    let (home, needed) = (core.config.home.clone(), core.config.limits.min_free_mib);
    let free = off_runtime(move || free_mib(&home)).await?;
    if free.is_some_and(|free| free < needed) {
        return Ok(Err(format!("less than {needed} MiB are free on the disk")));
    }
    let history = core.store.pool_history(&plan.alias, HISTORY).await?;
    if let Some(words) = hold(&history, core.now()) {
        return Ok(Err(words));
    }
    let mut machine = plan.machine(StartKind::Pool);
    machine.pooled = true;
    tracing::info!(machine.id = %machine.id, image = plan.alias, "making a VM for the pool");
    core.store.add_machine(&machine).await?;
    state.pool.yields_since = None;
    Ok(Ok(true))
}

/// Whether a session waits for a place that this host could give it.
async fn somebody_waits(core: &Shared) -> Result<bool, ReconcileError> {
    let mut aliases = BTreeSet::new();
    for state in [SessionState::Requested, SessionState::Placing] {
        let waiting = core.store.sessions_in(state).await?;
        aliases.extend(waiting.into_iter().map(|session| session.image_alias));
    }
    for alias in aliases {
        match warm::plan(core, &alias).await {
            Ok(_) => return Ok(true),
            Err(PlanError::Image { .. }) => {}
            Err(err) => return Err(err.into()),
        }
    }
    Ok(false)
}

/// Whether a session's VM, one of these, is on its way to its tool.
async fn somebody_starts(core: &Shared, machines: &[MachineRow]) -> Result<bool, StoreError> {
    for state in [SessionState::Starting, SessionState::Ready] {
        let starting = core.store.sessions_in(state).await?;
        let here = |session: &SessionRow| machines.iter().any(|m| Some(m.id) == session.machine_id);
        if starting.iter().any(here) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the fate of the VMs before says against making another one now.
fn hold(history: &[MachineRow], now: Timestamp) -> Option<String> {
    // One that is still ending has its memory yet.
    let given_back = history
        .iter()
        .filter(|m| m.retired.as_deref() == Some(MEMORY))
        .map(|m| m.gone_at.unwrap_or(now))
        .max();
    if given_back.is_some_and(|at| now < at.plus(STRAINED)) {
        return Some(format!("a VM was given back a moment ago: {MEMORY}"));
    }
    let failed = |m: &&MachineRow| m.session_id.is_none() && m.failure.is_some();
    let in_a_row = count(history.iter().take_while(failed).count());
    let last = history.first().filter(|_| in_a_row > 0)?;
    let pause = AGAIN
        .saturating_mul(1 << (in_a_row - 1).min(HISTORY))
        .min(AGAIN_MAX);
    let again = last.gone_at.unwrap_or(now).plus(pause);
    let cause = last.failure.as_ref().map_or("unknown", |f| f.cause.id());
    (now < again).then(|| {
        format!(
            "{in_a_row} VMs in a row failed, the last for `{cause}`; the next is made at {again}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::{
        cause::Cause,
        finding::{Finding, Quote},
    };

    fn machine(failed: bool) -> MachineRow {
        let digest = "a".repeat(64).parse().unwrap();
        let mut machine = MachineRow::new("tiny".to_owned(), digest, 256, 1);
        machine.pooled = true;
        machine.gone_at = Some(Timestamp::from_micros(0));
        let quote = Quote {
            source: "vmm".to_owned(),
            line: None,
            text: "x".to_owned(),
        };
        let finding = Finding::new(Cause::VmmExited, quote, "why", "fix");
        machine.failure = failed.then_some(finding);
        machine
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp::from_micros(0).plus(Duration::from_secs(seconds))
    }

    #[test]
    fn failures_in_a_row_hold_the_pool_longer_and_longer() {
        assert_eq!(hold(&[], at(0)), None);
        assert_eq!(hold(&[machine(false), machine(true)], at(0)), None);
        for (failures, seconds) in [(1, 5), (2, 10), (3, 20), (16, 600)] {
            let history = vec![machine(true); failures];
            let words = hold(&history, at(seconds - 1)).unwrap();
            assert!(words.contains("vmm-exited"), "{words}");
            assert_eq!(hold(&history, at(seconds)), None, "{failures}");
        }
        let mut taken = machine(true);
        taken.session_id = Some(vestibule_api::ids::SessionId::generate());
        assert_eq!(
            hold(&[taken], at(0)),
            None,
            "what a session had is not the pool's"
        );
    }

    #[test]
    fn memory_that_was_given_back_is_not_taken_at_once() {
        let mut given_back = machine(false);
        given_back.retired = Some(MEMORY.to_owned());
        assert!(hold(&[given_back.clone()], at(59)).is_some());
        assert_eq!(hold(&[given_back.clone()], at(60)), None);
        given_back.gone_at = None;
        assert!(hold(&[given_back], at(60)).is_some(), "it is ending yet");
    }
}
