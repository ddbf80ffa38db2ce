//! Bounded waits: the condition is looked at again and again until it holds or the time is over. What was seen last
//! stands in the error, so that a failed test says what it found instead of what it wanted.
use anyhow::{Result, bail};
use std::{
    fmt::Debug,
    future::Future,
    time::{Duration, Instant},
};

/// Pause between two looks.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);

/// A limit on a machine that is slower than those that limits are written for: `$VESTIBULE_TEST_PATIENCE` times as much.
pub fn patient(limit: Duration) -> Duration {
    let times = std::env::var("VESTIBULE_TEST_PATIENCE").ok();
    limit * times.and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Looks with `look` until it gives `Ok`, for at most `limit` ([`patient`]).
///
/// # Errors
/// When the time is over; with what was seen last.
pub async fn until<T, S, F>(what: &str, limit: Duration, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T, S>>,
    S: Debug,
{
    let limit = patient(limit);
    let end = Instant::now() + limit;
    loop {
        match look().await {
            Ok(found) => return Ok(found),
            Err(seen) if Instant::now() >= end => {
                bail!("waited {limit:?} for {what}; last seen: {seen:?}")
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
