//! Bounded waits: the condition is looked at again and again until it holds or the time is over. What was seen last
//! stands in the error, so that a failed test says what it found instead of what it wanted.
use anyhow::{Result, bail};
use std::{
    fmt::Debug,
    future::Future,
    time::{Duration, Instant},
};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// Looks with `look` until it gives `Ok`, for at most `limit`.
///
/// # Errors
/// When the time is over; with what was seen last.
pub async fn until<T, S, F>(what: &str, limit: Duration, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T, S>>,
    S: Debug,
{
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
