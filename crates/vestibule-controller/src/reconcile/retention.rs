//! Forgets sessions that ended long ago. Their ids stay, so that asking for one says what happened.
use super::ReconcileError;
use crate::core::Shared;
use std::time::Duration;
use vestibule_api::time::Timestamp;

pub(super) async fn run(core: &Shared) -> Result<u64, ReconcileError> {
    let now = core.now();
    let keep = Duration::from_secs(u64::from(core.config.limits.keep_sessions_days) * 86_400);
    let keep = i64::try_from(keep.as_micros()).unwrap_or(i64::MAX);
    let before = Timestamp::from_micros(now.as_micros().saturating_sub(keep));
    Ok(core.store.forget_sessions(before, now).await?)
}
