//! Carries the outbox out: each due effect in a task of its own, one at a time for each session.
use super::{ReconcileError, State};
use crate::{
    core::Shared,
    crash::point,
    machine::{EffectError, collect, launch, login, teardown},
    state::Effect,
    store::{DueEffect, StoreError},
};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use vestibule_api::{error::Chain, time::Timestamp};

/// Effects at a time. More wait for the next run.
const AT_ONCE: usize = 32;
/// An effect that takes longer is broken off and tried again.
const LIMIT: Duration = Duration::from_secs(120);
const AGAIN_MAX: Duration = Duration::from_secs(5);

/// Ids of the effects that have a task in this process.
pub(super) type UnderWay = Arc<Mutex<HashSet<String>>>;

pub(super) async fn run(core: &Shared, state: &mut State) -> Result<u64, ReconcileError> {
    let mut begun = 0;
    // As of before the question: an effect that is done while the answer comes still stands in it as due.
    let before = lock(&state.effects).clone();
    for effect in core.store.due_effects(core.now()).await? {
        let under_way = Arc::clone(&state.effects);
        {
            let mut ids = lock(&under_way);
            if ids.len() >= AT_ONCE {
                break;
            }
            if before.contains(&effect.id) || !ids.insert(effect.id.clone()) {
                continue;
            }
        }
        begun += 1;
        let core = core.clone();
        state.tasks.spawn(async move {
            carry_out(&core, &effect).await;
            lock(&under_way).remove(&effect.id);
            core.store.signals.wake();
        });
    }
    Ok(begun)
}

fn lock(ids: &UnderWay) -> MutexGuard<'_, HashSet<String>> {
    ids.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) async fn carry_out(core: &Shared, effect: &DueEffect) {
    let result = match tokio::time::timeout(LIMIT, act(core, effect)).await {
        Ok(result) => result,
        Err(_) => Err(EffectError::Timeout(LIMIT.as_secs())),
    };
    point("effect:carried-out").await;
    let now = core.now();
    let written = match &result {
        Ok(()) => done(core, effect, now).await,
        Err(err) => {
            let error = Chain(err).to_string();
            let delay = Duration::from_millis(100)
                .saturating_mul(1 << effect.attempts.min(8))
                .min(AGAIN_MAX);
            tracing::warn!(session.id = %effect.session, effect = effect.kind.id(), attempts = effect.attempts + 1, %error, "an effect is tried again");
            core.metrics.effect_failures.inc();
            core.store
                .effect_failed(&effect.id, now, delay, &error)
                .await
        }
    };
    if let Err(err) = written {
        tracing::error!(session.id = %effect.session, error = %Chain(&err), "can't write down what came of an effect");
    }
}

async fn done(core: &Shared, effect: &DueEffect, now: Timestamp) -> Result<(), StoreError> {
    let first = core.store.effect_done(&effect.id, now).await?;
    if !first || effect.kind != Effect::Teardown {
        return Ok(());
    }
    // One that gave up an earlier VM may be done beside the last: whichever is done last counts, with the evidence's own cause.
    if core.store.is_open(effect.session, Effect::Teardown).await? {
        return Ok(());
    }
    let row = core.store.session(effect.session).await?;
    if let Some(verdict) = row
        .filter(|row| row.state.is_terminal())
        .and_then(|row| row.failure)
    {
        core.metrics.failed(&verdict);
    }
    Ok(())
}

async fn act(core: &Shared, effect: &DueEffect) -> Result<(), EffectError> {
    let Some(session) = core.store.session(effect.session).await? else {
        return Ok(());
    };
    match effect.kind {
        Effect::Launch => launch::launch(core, &session).await,
        Effect::StartLogin => login::start(core, &session).await,
        Effect::Collect => collect::collect(core, &session).await,
        Effect::Teardown => teardown::teardown(core, &session, effect.attempts).await,
        Effect::Discard => collect::discard(core, &session).await,
    }
}
