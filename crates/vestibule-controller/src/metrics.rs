//! Numbers for `GET /metrics` (OpenMetrics 1.0 text).
use crate::{core::Core, store::Ingested};
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use vestibule_api::{
    finding::Verdict,
    session::{Milestone, SessionEventKind, SessionState, StartKind},
    time::Timestamp,
};

/// A session's provider. Packs are few and the operator's: the label is bounded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ProviderLabel {
    provider: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabel {
    direction: Direction,
}

/// Of relayed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Direction {
    ToViewer,
    ToGuest,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// Seconds: from a claim out of the pool to a boot under software emulation.
const PHASE_BUCKETS: [f64; 14] = [
    0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
    start: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StartLabel {
    start: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabel {
    cause: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabel {
    stage: &'static str,
    cause: &'static str,
}

/// Aliases are few and the operator's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PoolLabel {
    alias: String,
    state: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    started: Family<ProviderLabel, Counter>,
    requests: Family<StatusLabel, Counter>,
    relayed: Family<DirectionLabel, Counter>,
    pub(crate) sealed: Counter,
    pub(crate) released: Counter,
    pub(crate) effect_failures: Counter,
    pub(crate) left_behind: Counter,
    phases: Family<PhaseLabel, Histogram, fn() -> Histogram>,
    starts: Family<StartLabel, Counter>,
    fallbacks: Family<CauseLabel, Counter>,
    failures: Family<FailureLabel, Counter>,
    claims: Family<ResultLabel, Counter>,
    pool: Family<PoolLabel, Gauge>,
    sessions: Family<StateLabel, Gauge>,
    vms: Gauge,
    viewers: Gauge,
}

impl Metrics {
    /// `commits`: how long those of the database take.
    pub(crate) fn new(commits: Histogram) -> Self {
        let mut registry = Registry::with_prefix("vestibule");
        let r = &mut registry;
        let (started, requests, relayed) =
            (Family::default(), Family::default(), Family::default());
        let (sealed, released) = (Counter::default(), Counter::default());
        let (effect_failures, left_behind) = (Counter::default(), Counter::default());
        let (sessions, vms, viewers) = (Family::default(), Gauge::default(), Gauge::default());
        let phases: Family<PhaseLabel, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(PHASE_BUCKETS));
        let (starts, fallbacks) = (Family::default(), Family::default());
        let failures = Family::default();
        let (claims, pool) = (Family::default(), Family::default());
        r.register_with_unit(
            "phase",
            "From the request for a sign-in to each milestone, by how its VM began",
            Unit::Seconds,
            Family::clone(&phases),
        );
        r.register_with_unit(
            "database_commit",
            "How long the database took to keep a change",
            Unit::Seconds,
            commits,
        );
        r.register(
            "starts",
            "VMs that sessions were given, by how they began",
            Family::clone(&starts),
        );
        r.register(
            "fallbacks",
            "Starts from a snapshot that failed, by cause; the session got another VM",
            Family::clone(&fallbacks),
        );
        r.register(
            "failures",
            "Sign-ins that failed, by stage and cause of the verdict; counted when what they left is torn down",
            Family::clone(&failures),
        );
        r.register(
            "pool_claims",
            "Sessions that the pool could serve, by whether it had a VM for them",
            Family::clone(&claims),
        );
        r.register(
            "pool_vms",
            "VMs of the pool by alias: ready, filling, and the target",
            Family::clone(&pool),
        );
        r.register(
            "sessions_started",
            "Sign-ins that were asked for",
            started.clone(),
        );
        r.register(
            "requests",
            "HTTP requests by status",
            Family::clone(&requests),
        );
        r.register_with_unit(
            "relayed",
            "Bytes relayed between viewers and guests",
            Unit::Bytes,
            Family::clone(&relayed),
        );
        r.register(
            "credentials_sealed",
            "Credentials that were sealed",
            sealed.clone(),
        );
        r.register(
            "credentials_released",
            "Credentials that left the vault",
            released.clone(),
        );
        r.register(
            "effect_failures",
            "Effects that were put off",
            effect_failures.clone(),
        );
        r.register(
            "disposals_incomplete",
            "VMs of which something was left behind; disposal.json in their evidence names it",
            left_behind.clone(),
        );
        r.register(
            "sessions",
            "Sessions that have not ended, by state",
            Family::clone(&sessions),
        );
        r.register(
            "vms",
            "Machines of which something is on this host",
            vms.clone(),
        );
        r.register(
            "viewers",
            "Open views of screens and terminals",
            viewers.clone(),
        );
        Self {
            registry,
            started,
            requests,
            relayed,
            sealed,
            released,
            effect_failures,
            left_behind,
            phases,
            starts,
            fallbacks,
            failures,
            claims,
            pool,
            sessions,
            vms,
            viewers,
        }
    }

    pub(crate) fn started(&self, provider: &str) {
        let provider = provider.to_owned();
        self.started
            .get_or_create(&ProviderLabel { provider })
            .inc();
    }

    pub(crate) fn request(&self, status: u16) {
        self.requests.get_or_create(&StatusLabel { status }).inc();
    }

    /// A session reached `phase` now.
    pub(crate) fn phase(
        &self,
        phase: Milestone,
        start: StartKind,
        asked_at: Timestamp,
        now: Timestamp,
    ) {
        let label = PhaseLabel {
            phase: phase.id(),
            start: start.id(),
        };
        // Microseconds of some minutes: exact in an f64.
        #[expect(clippy::cast_precision_loss, reason = "some minutes are exact")]
        let seconds = now.micros_since(asked_at) as f64 / 1e6;
        self.phases.get_or_create(&label).observe(seconds);
    }

    /// What a runner's event meant for its session.
    pub(crate) fn ingested(
        &self,
        told: Option<&Ingested>,
        events: &[SessionEventKind],
        now: Timestamp,
    ) {
        let Some(told) = told else {
            return;
        };
        let state = told.moved.and_then(Milestone::of_state);
        for phase in events.iter().filter_map(Milestone::of).chain(state) {
            self.phase(phase, told.start, told.asked_at, now);
        }
        if let Some(cause) = told.fell_back {
            let cause = CauseLabel { cause: cause.id() };
            self.fallbacks.get_or_create(&cause).inc();
        }
    }

    /// A session failed for this, or for nothing that could be named.
    pub(crate) fn failed(&self, verdict: &Verdict) {
        let found = verdict.finding.as_ref();
        let label = FailureLabel {
            stage: found.map_or("unknown", |finding| finding.stage.id()),
            cause: found.map_or("unknown", |finding| finding.cause.id()),
        };
        self.failures.get_or_create(&label).inc();
    }

    /// A session that asked at `asked_at` was given a VM; `pool`: whether one of the pool could have been it.
    pub(crate) fn given(&self, start: StartKind, pool: bool, asked_at: Timestamp, now: Timestamp) {
        self.phase(Milestone::Claimed, start, asked_at, now);
        self.starts
            .get_or_create(&StartLabel { start: start.id() })
            .inc();
        let hit = start == StartKind::Pool;
        if pool || hit {
            let result = if hit { "hit" } else { "miss" };
            self.claims.get_or_create(&ResultLabel { result }).inc();
        }
    }

    /// The counter of one direction; clone it out of a loop.
    pub(crate) fn relayed(&self, direction: Direction) -> Counter {
        self.relayed
            .get_or_create(&DirectionLabel { direction })
            .clone()
    }
}

/// The whole text, gauges read from the rows now.
pub(crate) async fn render(core: &Core) -> Result<String, crate::store::StoreError> {
    let metrics = &core.metrics;
    for state in SessionState::ALL
        .into_iter()
        .filter(|state| !state.is_terminal())
    {
        let count = core.store.sessions_in(state).await?.len();
        let gauge = metrics
            .sessions
            .get_or_create(&StateLabel { state: state.id() })
            .clone();
        gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    metrics
        .vms
        .set(i64::try_from(core.store.count_own_machines().await?).unwrap_or(i64::MAX));
    metrics.viewers.set(i64::from(core.live.viewers()));
    for shelf in core.stock.shelves() {
        for (state, count) in [
            ("ready", shelf.ready),
            ("filling", shelf.filling),
            ("target", shelf.target),
        ] {
            let alias = shelf.alias.clone();
            let gauge = metrics
                .pool
                .get_or_create(&PoolLabel { alias, state })
                .clone();
            gauge.set(i64::from(count));
        }
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut text, &metrics.registry);
    Ok(text)
}
