//! Reconcilers: idempotent functions without input that make the host what the rows say.
//!
//! Each is run when something changed, when something is due, and every few seconds all the same. None is told what
//! changed; none repeats anything by itself: what did not work is still to be done the next time. Whatever the controller
//! was doing when it was killed, they begin again from the rows.
mod calendar;
mod deadlines;
mod effects;
mod evidence;
mod hosts;
mod images;
mod machines;
mod orphans;
pub(crate) mod place;
mod pool;
mod retention;
#[cfg(test)]
pub(crate) mod sim;

pub(crate) use pool::{Shelf, Stock};

use crate::{
    core::{Shared, stopped},
    store::StoreError,
};
use calendar::Look;
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use vestibule_api::{control::ReconcilerView, error::Chain, time::Timestamp};

/// Why a reconciler's run ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    #[error("use the database")]
    Store(#[from] StoreError),
    #[error("do it off the runtime")]
    Join(#[from] tokio::task::JoinError),
    #[error("list `{path}`")]
    List {
        path: camino::Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("remove `{path}`")]
    Remove {
        path: camino::Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("remove images that nothing needs")]
    Images(#[from] vestibule_image::StoreError),
    #[error("plan a VM")]
    Plan(#[from] crate::warm::PlanError),
    #[error("end a VM that nobody owns")]
    Stray(#[source] crate::machine::EffectError),
}

/// The reconcilers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Gives waiting sessions their machines.
    Place,
    /// Keeps VMs ready for whoever comes next.
    Pool,
    /// Carries the outbox out.
    Effects,
    /// Ends what has stayed too long.
    Deadlines,
    /// Follows every runner.
    Machines,
    /// Ends what sessions have on hosts that are lost.
    Hosts,
    /// Adopts runners that nobody knows, ends those that nobody owns.
    Orphans,
    /// Forgets old sessions.
    Retention,
    /// Removes old evidence.
    Evidence,
    /// Removes images that nothing needs.
    Images,
}

impl Kind {
    const ALL: [Self; 10] = [
        Self::Place,
        Self::Pool,
        Self::Effects,
        Self::Deadlines,
        Self::Machines,
        Self::Hosts,
        Self::Orphans,
        Self::Retention,
        Self::Evidence,
        Self::Images,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Place => "place",
            Self::Pool => "pool",
            Self::Effects => "effects",
            Self::Deadlines => "deadlines",
            Self::Machines => "machines",
            Self::Hosts => "hosts",
            Self::Orphans => "orphans",
            Self::Retention => "retention",
            Self::Evidence => "evidence",
            Self::Images => "images",
        }
    }

    /// It runs at least so often; those that look at the rows only are woken when these change.
    const fn period(self) -> Duration {
        match self {
            Self::Hosts => Duration::from_secs(2),
            Self::Place | Self::Pool | Self::Effects | Self::Deadlines | Self::Machines => {
                Duration::from_secs(5)
            }
            Self::Orphans => Duration::from_secs(20),
            Self::Retention | Self::Evidence | Self::Images => Duration::from_secs(3600),
        }
    }

    /// Whether it needs a time that is believed.
    const fn removes_what_is_old(self) -> bool {
        matches!(self, Self::Retention | Self::Evidence | Self::Images)
    }

    /// Whether a change of the rows is a reason to run.
    const fn is_woken(self) -> bool {
        matches!(
            self,
            Self::Place | Self::Pool | Self::Effects | Self::Deadlines | Self::Machines
        )
    }
}

/// What the reconcilers did, for people.
#[derive(Debug)]
pub(crate) struct Statuses(Mutex<Vec<ReconcilerView>>);

impl Default for Statuses {
    fn default() -> Self {
        let view = |kind: Kind| ReconcilerView {
            name: kind.name().to_owned(),
            runs: 0,
            failures: 0,
            last_run_at: None,
            last_duration_ms: None,
            last_count: 0,
            last_error: None,
        };
        Self(Mutex::new(Kind::ALL.into_iter().map(view).collect()))
    }
}

impl Statuses {
    /// All of them.
    pub(crate) fn views(&self) -> Vec<ReconcilerView> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn ran(&self, kind: Kind, at: Timestamp, took: Duration, result: &Result<u64, ReconcileError>) {
        let mut views = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(view) = views.iter_mut().find(|view| view.name == kind.name()) else {
            return;
        };
        view.runs += 1;
        view.last_run_at = Some(at);
        view.last_duration_ms = u64::try_from(took.as_millis()).ok();
        view.last_count = *result.as_ref().unwrap_or(&0);
        view.last_error = result.as_ref().err().map(|err| Chain(err).to_string());
        view.failures += u64::from(result.is_err());
    }
}

/// Runs every reconciler until the controller stops. What is under way then is left as it is: the rows know.
pub(crate) async fn run(core: Shared) {
    let mut tasks = JoinSet::new();
    for kind in Kind::ALL {
        tasks.spawn(keep_running(core.clone(), kind));
    }
    stopped(core.stopping.clone()).await;
    tasks.shutdown().await;
}

async fn keep_running(core: Shared, kind: Kind) {
    let mut changes = core.store.signals.work.subscribe();
    let mut state = State::default();
    loop {
        // Without its lease the controller acts for nothing.
        core.lease.held().await;
        changes.mark_unchanged();
        let (at, begun, looked) = (Timestamp::now(), Instant::now(), core.now());
        let result = once(&core, kind, &mut state, Look::now(&core)).await;
        if let Err(err) = &result {
            tracing::error!(reconciler = kind.name(), error = %Chain(err), "a reconciler's run failed");
        }
        core.statuses.ran(kind, at, begun.elapsed(), &result);
        let pause = pause(&core, kind, looked, result.is_err()).await;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = changes.changed(), if kind.is_woken() && result.is_ok() => {}
            Some(_) = state.tasks.join_next() => {}
        }
    }
}

/// What a reconciler has under way in this process. Losing it loses nothing but time.
#[derive(Debug, Default)]
struct State {
    tasks: JoinSet<()>,
    effects: effects::UnderWay,
    followed: machines::Followed,
    pool: pool::Known,
    clocks: Option<deadlines::Clocks>,
    calendar: calendar::Calendar,
}

async fn once(
    core: &Shared,
    kind: Kind,
    state: &mut State,
    look: Look,
) -> Result<u64, ReconcileError> {
    let now = if kind.removes_what_is_old() {
        let today = state.calendar.today(core, kind.name(), look).await?;
        let Some(today) = today else { return Ok(0) };
        today
    } else {
        look.wall
    };
    match kind {
        Kind::Place => place::run(core).await,
        Kind::Pool => pool::run(core, state).await,
        Kind::Effects => effects::run(core, state).await,
        Kind::Deadlines => {
            let clocks = deadlines::Clocks {
                steady: Instant::now(),
                wall: core.now(),
            };
            deadlines::follow_clock(core, &mut state.clocks, clocks).await?;
            deadlines::run(core).await
        }
        Kind::Machines => machines::run(core, state).await,
        Kind::Hosts => hosts::run(core).await,
        Kind::Orphans => orphans::run(core).await,
        Kind::Retention => retention::run(core, now).await,
        Kind::Evidence => evidence::run(core, now).await,
        Kind::Images => images::run(core).await,
    }
}

const fn days(days: u32) -> Duration {
    Duration::from_hours(24 * days as u64)
}

/// Until the next run: the period, or less when an effect or a deadline is due before. What was due when the last run looked is
/// done or under way, and wakes this reconciler when it ends.
async fn pause(core: &Shared, kind: Kind, looked: Timestamp, failed: bool) -> Duration {
    let period = kind.period();
    if failed {
        return period.min(Duration::from_secs(1));
    }
    if !matches!(kind, Kind::Effects | Kind::Deadlines) {
        return period;
    }
    match core.store.next_due(looked).await {
        Ok(Some(at)) => Duration::from_micros(at.micros_since(core.now()))
            .clamp(Duration::from_millis(20), period),
        Ok(None) | Err(_) => period,
    }
}
