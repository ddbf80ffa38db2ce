//! Numbers for `GET /metrics` (OpenMetrics 1.0 text).
use crate::core::Core;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use vestibule_api::session::SessionState;

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

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    started: Family<ProviderLabel, Counter>,
    requests: Family<StatusLabel, Counter>,
    relayed: Family<DirectionLabel, Counter>,
    pub(crate) sealed: Counter,
    pub(crate) released: Counter,
    pub(crate) effect_failures: Counter,
    sessions: Family<StateLabel, Gauge>,
    vms: Gauge,
    viewers: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("vestibule");
        let r = &mut registry;
        let (started, requests, relayed) =
            (Family::default(), Family::default(), Family::default());
        let (sealed, released, effect_failures) =
            (Counter::default(), Counter::default(), Counter::default());
        let (sessions, vms, viewers) = (Family::default(), Gauge::default(), Gauge::default());
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
            sessions,
            vms,
            viewers,
        }
    }
}

impl Metrics {
    pub(crate) fn started(&self, provider: &str) {
        let provider = provider.to_owned();
        self.started
            .get_or_create(&ProviderLabel { provider })
            .inc();
    }

    pub(crate) fn request(&self, status: u16) {
        self.requests.get_or_create(&StatusLabel { status }).inc();
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
        .set(i64::try_from(core.store.machines().await?.len()).unwrap_or(i64::MAX));
    metrics.viewers.set(i64::from(core.live.viewers()));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut text, &metrics.registry);
    Ok(text)
}
