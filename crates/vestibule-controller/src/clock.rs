//! The time that rows are written with.
use std::time::Duration;
use vestibule_api::time::Timestamp;

#[cfg(test)]
const SIMULATED_STEP: Duration = Duration::from_secs(2);

/// The host's clock. A simulation has one of its own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    #[cfg(test)]
    simulated: Option<std::sync::Arc<std::sync::atomic::AtomicI64>>,
}

impl Clock {
    pub(crate) fn now(&self) -> Timestamp {
        #[cfg(test)]
        if let Some(micros) = &self.simulated {
            return Timestamp::from_micros(micros.load(std::sync::atomic::Ordering::Relaxed));
        }
        Timestamp::now()
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
        let now = Timestamp::now().as_micros();
        Self {
            simulated: Some(std::sync::Arc::new(now.into())),
        }
    }

    #[cfg(test)]
    pub(crate) fn advance_to(&self, at: Timestamp) {
        if let Some(micros) = &self.simulated {
            micros.fetch_max(at.as_micros(), std::sync::atomic::Ordering::Relaxed);
        }
    }
}
