//! Removes golden images to which no alias points, and snapshots and layers of builds that nobody will use again.
//!
//! What a VM uses, what a rollback would go back to and what was built lately stays: see [`vestibule_image::Store::gc`].
use super::{ReconcileError, days};
use crate::core::{Shared, off_runtime};

/// The store has the time from the clock that is believed.
pub(super) async fn run(core: &Shared) -> Result<u64, ReconcileError> {
    let (images, keep) = (
        core.images.clone(),
        days(core.config.limits.keep_images_days),
    );
    let Some(gone) = off_runtime(move || images.collect(keep)).await?? else {
        return Ok(0);
    };
    let count = gone.images.len() + gone.snapshots.len() + gone.unfinished_snapshots;
    if count > 0 || gone.freed_bytes > 0 {
        tracing::info!(
            images = ?gone.images,
            snapshots = gone.snapshots.len() + gone.unfinished_snapshots,
            freed_mib = gone.freed_bytes >> 20,
            "removed images that nothing needs"
        );
    }
    Ok(count as u64)
}
