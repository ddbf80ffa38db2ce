//! Time on the wire: RFC 3339 in UTC with microseconds, and the one place that reads the host's clock.
use jiff::Timestamp as Inner;
use serde::{Deserialize, Serialize};

/// A moment in UTC. On the wire RFC 3339 (`2026-11-23T08:00:00.000001Z`), in a database µs since the epoch.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(transparent)]
#[schema(value_type = String, format = DateTime)]
pub struct Timestamp(Inner);

impl Timestamp {
    /// The host's clock now, cut to microseconds so that it survives a database column unchanged.
    pub fn now() -> Self {
        Self::from_micros(Inner::now().as_microsecond())
    }

    /// From microseconds since the Unix epoch; a value outside jiff's range becomes the epoch.
    pub fn from_micros(micros: i64) -> Self {
        Self(Inner::from_microsecond(micros).unwrap_or(Inner::UNIX_EPOCH))
    }

    /// Microseconds since the Unix epoch.
    pub fn as_micros(self) -> i64 {
        self.0.as_microsecond()
    }

    /// Microseconds from `earlier` to `self`; zero where `earlier` is later.
    pub fn micros_since(self, earlier: Self) -> u64 {
        u64::try_from(self.as_micros().saturating_sub(earlier.as_micros())).unwrap_or(0)
    }

    /// This moment to the second, as in RFC 3339: for words, where a fraction is noise.
    pub fn to_second(self) -> String {
        Self::from_micros(self.as_micros() - self.as_micros().rem_euclid(1_000_000)).to_string()
    }

    /// This moment plus `duration`, saturating.
    #[must_use]
    pub fn plus(self, duration: std::time::Duration) -> Self {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Self::from_micros(self.as_micros().saturating_add(micros))
    }
}

impl std::fmt::Display for Timestamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}
