//! How long the database takes to keep a change. A disk that is slow makes everything wait and nothing fail; so it is named, in the
//! log and by `GET /ready`, before somebody has to ask.
use prometheus_client::metrics::histogram::Histogram;
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// A commit is one write that is synced: milliseconds on a disk that is well.
const SLOW: Duration = Duration::from_secs(1);
/// So long a slow commit is spoken of.
const RECENT: Duration = Duration::from_secs(60);
/// Seconds.
const BUCKETS: [f64; 8] = [0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 5.0, 20.0];

#[derive(Debug)]
pub(crate) struct Pace {
    commits: Histogram,
    slowest: Mutex<Option<(Duration, Instant)>>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            commits: Histogram::new(BUCKETS),
            slowest: Mutex::new(None),
        }
    }
}

impl Pace {
    /// How long commits took, in seconds. A clone counts with it.
    pub(crate) fn commits(&self) -> Histogram {
        self.commits.clone()
    }

    /// A commit took so long.
    pub(super) fn took(&self, took: Duration) {
        self.commits.observe(took.as_secs_f64());
        if took < SLOW {
            return;
        }
        let before = self.slowest();
        if before.is_none() {
            tracing::warn!(?took, "the database's disk is slow: a change waited for it");
        }
        if before.is_none_or(|(slowest, _)| took >= slowest) {
            *self.slowest.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((took, Instant::now()));
        }
    }

    /// The slowest commit of late, if one was slow, and how long ago that was.
    pub(crate) fn slowest(&self) -> Option<(Duration, Duration)> {
        let slowest = *self.slowest.lock().unwrap_or_else(PoisonError::into_inner);
        let (took, at) = slowest?;
        let ago = at.elapsed();
        (ago < RECENT).then_some((took, ago))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_slow_commit_is_spoken_of_for_a_while() {
        let pace = Pace::default();
        pace.took(SLOW - Duration::from_millis(1));
        assert_eq!(pace.slowest(), None);
        pace.took(3 * SLOW);
        tokio::time::advance(RECENT / 2).await;
        // One that was less slow takes nothing from it.
        pace.took(SLOW);
        assert_eq!(pace.slowest(), Some((3 * SLOW, RECENT / 2)));
        tokio::time::advance(RECENT / 2).await;
        assert_eq!(pace.slowest(), None);
        pace.took(SLOW);
        assert_eq!(pace.slowest(), Some((SLOW, Duration::ZERO)));
    }
}
