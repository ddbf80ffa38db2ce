//! Forgets sessions that ended long ago. Their ids stay, so that asking for one says what happened.
use super::{ReconcileError, days};
use crate::core::Shared;
use vestibule_api::time::Timestamp;

pub(super) async fn run(core: &Shared, now: Timestamp) -> Result<u64, ReconcileError> {
    let keep = days(core.config.limits.keep_sessions_days);
    let keep = i64::try_from(keep.as_micros()).unwrap_or(i64::MAX);
    let before = Timestamp::from_micros(now.as_micros().saturating_sub(keep));
    Ok(core.store.forget_sessions(before, now).await?)
}
