//! The time by which something is old, for those that remove what is old for good.
//!
//! By a clock that is wrong by weeks everything is. A deadline moves with a clock that jumps ([`super::deadlines`]); what was
//! removed does not come back. So a time to which the clock leapt is not believed before it has stood for an hour: whoever
//! sets the clock right within it loses nothing. A clock that goes back makes nothing old.
use super::ReconcileError;
use crate::core::{Shared, off_runtime};
use rustix::time::{ClockId, clock_gettime};
use std::{
    fs::{File, OpenOptions},
    time::{Duration, SystemTime},
};
use vestibule_api::time::Timestamp;

/// A clock that is set right, or kept so, goes further than time did by less than this between two looks.
const LEAP: Duration = Duration::from_secs(300);
/// A controller may have been down for so long before its clock is said to have leapt.
const DOWN: Duration = Duration::from_hours(24);
/// For so long a time to which the clock leapt must have stood.
const DOUBT: Duration = Duration::from_hours(1);

/// An empty file, as old as the last time that was believed: the next controller has nothing else to compare with that a clock
/// which was wrong for some minutes did not touch.
const FILE: &str = "clock";

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// Since the host was booted, also while it slept: that is no leap.
    pub(super) steady: Duration,
    pub(super) wall: Timestamp,
}

impl Look {
    pub(super) fn now(core: &Shared) -> Self {
        let steady = clock_gettime(ClockId::Boottime);
        Self {
            // It is never before the boot.
            steady: steady.try_into().unwrap_or_default(),
            wall: core.now(),
        }
    }
}

/// What one reconciler knows of the host's clock.
#[derive(Debug, Default)]
pub(super) struct Calendar {
    last: Option<Look>,
    /// When the clock was last seen to have leapt, by the steady one.
    doubted_at: Option<Duration>,
}

impl Calendar {
    /// The time; none while it is doubted, and then nothing is old. `who` is about to remove something.
    pub(super) async fn today(
        &mut self,
        core: &Shared,
        who: &'static str,
        now: Look,
    ) -> Result<Option<Timestamp>, ReconcileError> {
        let path = core.config.cache_dir().join(FILE);
        let before = match self.last {
            Some(_) => None,
            None => {
                let path = path.clone();
                off_runtime(move || path.metadata().and_then(|meta| meta.modified()).ok()).await?
            }
        };
        if let Some(leap) = self.leap(now, before.map(timestamp)) {
            tracing::warn!(
                reconciler = who,
                seconds = leap.as_secs(),
                "the host's clock leapt: nothing is removed for its age until the new time has stood for an hour"
            );
        }
        if self.is_in_doubt(now) {
            return Ok(None);
        }
        // Where it can't be written, the next controller doubts a time that is right: an hour is lost, and nothing else.
        drop(off_runtime(move || remember(&path, now.wall)).await?);
        Ok(Some(now.wall))
    }

    /// By how much the clock went too far since the last look, or since the time that was believed `before` this controller
    /// looked; none: it did not, or there is nothing to compare with.
    fn leap(&mut self, now: Look, before: Option<Timestamp>) -> Option<Duration> {
        let (expected, at_most) = match self.last.replace(now) {
            Some(last) => {
                let passed = now.steady.saturating_sub(last.steady);
                (last.wall.plus(passed), LEAP)
            }
            None => (before?, DOWN),
        };
        let leap = Duration::from_micros(now.wall.micros_since(expected));
        let leapt = leap > at_most;
        if leapt {
            self.doubted_at = Some(now.steady);
        }
        leapt.then_some(leap)
    }

    fn is_in_doubt(&self, now: Look) -> bool {
        self.doubted_at
            .is_some_and(|at| now.steady.saturating_sub(at) < DOUBT)
    }
}

fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    Timestamp::from_micros(0).plus(since.unwrap_or_default())
}

/// The same moment, to compare with the times of files.
pub(super) fn system_time(at: Timestamp) -> SystemTime {
    let since = at.micros_since(Timestamp::from_micros(0));
    SystemTime::UNIX_EPOCH + Duration::from_micros(since)
}

fn remember(path: &camino::Utf8Path, at: Timestamp) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let file: File = OpenOptions::new().create(true).append(true).open(path)?;
    file.set_modified(system_time(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;

    /// Looks at these seconds of both clocks, where 0 was believed before: whether each finds the clock in doubt.
    fn doubted<const N: usize>(looks: [(i64, i64); N]) -> [bool; N] {
        let now = 1_800_000_000_000_000;
        let mut calendar = Calendar::default();
        looks.map(|(steady, wall)| {
            let look = Look {
                steady: Duration::from_secs(steady.unsigned_abs()),
                wall: Timestamp::from_micros(now + wall * 1_000_000),
            };
            calendar.leap(look, Some(Timestamp::from_micros(now)));
            calendar.is_in_doubt(look)
        })
    }

    #[test]
    fn a_clock_that_goes_with_time_is_believed() {
        let hourly = [(0, 10), (HOUR, HOUR + 12), (2 * HOUR, 2 * HOUR + 14)];
        assert_eq!(doubted(hourly), [false; 3]);
        // A controller that was down over night, a host that slept, a clock that is set by a minute.
        assert_eq!(doubted([(0, 20 * HOUR)]), [false]);
        assert_eq!(doubted([(0, 0), (10 * HOUR, 10 * HOUR)]), [false; 2]);
        assert_eq!(doubted([(0, 0), (HOUR, HOUR + MINUTE)]), [false; 2]);
    }

    #[test]
    fn a_leap_is_believed_when_it_has_stood_for_an_hour() {
        let leapt = 31 * DAY;
        let looks = [
            (0, 0),
            (HOUR, HOUR + leapt),
            (HOUR + 1, HOUR + leapt + 1),
            (2 * HOUR - 1, 2 * HOUR + leapt - 1),
            (2 * HOUR, 2 * HOUR + leapt),
        ];
        assert_eq!(doubted(looks), [false, true, true, true, false]);
        // A second leap makes it begin anew.
        let looks = [(0, 0), (10, DAY), (HOUR, 2 * DAY), (HOUR + 20, 2 * DAY)];
        assert_eq!(doubted(looks), [false, true, true, true]);
    }

    #[test]
    fn a_clock_that_is_set_back_is_believed_and_what_it_leaps_after_that_is_not() {
        let looks = [(0, 0), (HOUR, -31 * DAY), (2 * HOUR, 2 * HOUR)];
        assert_eq!(doubted(looks), [false, false, true]);
        // Set right within the hour.
        let looks = [(0, 0), (10, 31 * DAY), (HOUR + 10, HOUR + 10)];
        assert_eq!(doubted(looks), [false, true, false]);
    }

    #[test]
    fn a_controller_that_comes_up_in_another_year_doubts() {
        let looks = [(30, 400 * DAY), (40, 40), (HOUR + 30, HOUR + 30)];
        assert_eq!(doubted(looks), [true, true, false]);
        // In 1970, before the network has said what time it is.
        let looks = [(30, -20_000 * DAY), (HOUR, HOUR), (2 * HOUR, 2 * HOUR)];
        assert_eq!(doubted(looks), [false, true, false]);
        let mut first = Calendar::default();
        let look = Look {
            steady: Duration::ZERO,
            wall: Timestamp::from_micros(0),
        };
        assert_eq!(first.leap(look, None), None, "nothing to compare with");
    }

    #[test]
    fn times_of_files_are_the_same_moments() {
        let at = Timestamp::from_micros(1_800_000_000_123_456);
        assert_eq!(timestamp(system_time(at)), at);
        let before = Timestamp::from_micros(-5);
        assert_eq!(timestamp(system_time(before)).as_micros(), 0);
    }
}
