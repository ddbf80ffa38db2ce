//! The time that rows are written with.
use std::time::{Duration, Instant};
use vestibule_api::time::Timestamp;

#[cfg(test)]
const SIMULATED_STEP: Duration = Duration::from_secs(2);

/// The host's clock. A simulation has one of its own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    #[cfg(test)]
    simulated: Option<Simulated>,
}

/// Microseconds that somebody moves on, and what a steady clock showed at which of them.
#[cfg(test)]
#[derive(Clone, Debug)]
struct Simulated {
    micros: std::sync::Arc<std::sync::atomic::AtomicI64>,
    begun: (Timestamp, Instant),
}

#[cfg(test)]
impl Simulated {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.micros.load(std::sync::atomic::Ordering::Relaxed))
    }
}

impl Clock {
    pub(crate) fn now(&self) -> Timestamp {
        #[cfg(test)]
        if let Some(simulated) = &self.simulated {
            return simulated.now();
        }
        Timestamp::now()
    }

    /// One that does not jump.
    pub(crate) fn steady(&self) -> Instant {
        #[cfg(test)]
        if let Some(simulated) = &self.simulated {
            let (at, steady) = simulated.begun;
            return steady + Duration::from_micros(simulated.now().micros_since(at));
        }
        Instant::now()
    }

    /// Waits, and says how long it was: simulated time goes in larger steps.
    pub(crate) async fn sleep(&self, length: Duration) -> Duration {
        #[cfg(test)]
        if self.simulated.is_some() {
            let length = length.max(SIMULATED_STEP);
            self.advance_to(self.now().plus(length));
            crate::reconcile::sim::gate::pass("asleep").await;
            return length;
        }
        tokio::time::sleep(length).await;
        length
    }

    /// A clock that stands at the host's time until somebody moves it.
    #[cfg(test)]
    pub(crate) fn simulated() -> Self {
        let now = Timestamp::now();
        let simulated = Simulated {
            micros: std::sync::Arc::new(now.as_micros().into()),
            begun: (now, Instant::now()),
        };
        Self {
            simulated: Some(simulated),
        }
    }

    #[cfg(test)]
    pub(crate) fn advance_to(&self, at: Timestamp) {
        if let Some(simulated) = &self.simulated {
            let micros = &simulated.micros;
            micros.fetch_max(at.as_micros(), std::sync::atomic::Ordering::Relaxed);
        }
    }
}
