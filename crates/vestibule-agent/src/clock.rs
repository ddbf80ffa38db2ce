//! The guest's wall clock as its host sees it. Several of the host's tasks may find at once that it is off; it is set once.
use std::sync::{Mutex, PoisonError};
use vestibule_api::{
    agent::{ClockReply, ClockRequest},
    time::Timestamp,
};

/// How often it was set.
#[derive(Debug, Default)]
pub(crate) struct Clock(Mutex<u64>);

impl Clock {
    /// Sets the clock with `set` (µs since the epoch) where it is behind what it is at least, and where that is asked for and it has
    /// not been set since it was read for the request; then reads it.
    ///
    /// # Errors
    /// Those of `set`.
    pub(crate) fn ask<E>(
        &self,
        request: ClockRequest,
        set: impl Fn(i64) -> Result<(), E>,
    ) -> Result<ClockReply, E> {
        let mut adjusted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(least) = request.at_least_micros
            && Timestamp::now().as_micros() < least
        {
            set(least)?;
            *adjusted += 1;
        }
        if request.adjust_micros != 0 && request.adjusted == *adjusted {
            let now = Timestamp::now().as_micros();
            set(now.saturating_add(request.adjust_micros))?;
            *adjusted += 1;
        }
        Ok(ClockReply {
            now_micros: Timestamp::now().as_micros(),
            adjusted: *adjusted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn who_read_it_before_it_was_set_does_not_set_it_again() {
        let (clock, moved) = (Clock::default(), Cell::new(0));
        let adjust = |adjust_micros, adjusted| {
            let request = ClockRequest {
                at_least_micros: None,
                adjust_micros,
                adjusted,
            };
            let set = |to| {
                moved.set(moved.get() + to - Timestamp::now().as_micros());
                Ok::<_, ()>(())
            };
            clock.ask(request, set).unwrap().adjusted
        };
        // Two readings of one moment, both an hour off.
        let hour = 3_600_000_000;
        let (one, two) = (adjust(0, 0), adjust(0, 7));
        assert_eq!((one, two), (0, 0));
        assert_eq!((adjust(hour, one), adjust(hour, two)), (1, 1));
        assert!((moved.get() - hour).abs() < 60_000_000, "{}", moved.get());
        assert_eq!(adjust(-1, 1), 2);
    }

    #[test]
    fn a_clock_that_is_behind_is_set_at_once_and_never_back() {
        let (clock, set_to) = (Clock::default(), Cell::new(0));
        let now = Timestamp::now().as_micros();
        let at_least = |least| {
            let request = ClockRequest {
                at_least_micros: Some(least),
                adjust_micros: 0,
                adjusted: 0,
            };
            let set = |to| {
                set_to.set(to);
                Ok::<_, ()>(())
            };
            clock.ask(request, set).unwrap().adjusted
        };
        let day = 86_400_000_000;
        assert_eq!((at_least(now - day), set_to.get()), (0, 0));
        assert_eq!((at_least(now + day), set_to.get()), (1, now + day));
    }

    #[test]
    fn a_clock_that_could_not_be_set_counts_as_it_was() {
        let clock = Clock::default();
        let request = ClockRequest {
            at_least_micros: None,
            adjust_micros: i64::MAX,
            adjusted: 0,
        };
        assert_eq!(clock.ask(request, Err), Err(i64::MAX));
        assert_eq!(clock.ask(request, |_| Ok::<_, ()>(())).unwrap().adjusted, 1);
    }
}
