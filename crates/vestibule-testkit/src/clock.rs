//! What a guest's clock says, beside the host's.
use anyhow::{Context, Result};
use vestibule_api::time::Timestamp;

/// Prints the guest's time when bash runs it, in seconds with six decimals.
pub const SCRIPT: &str = "echo $EPOCHREALTIME";
/// The exchange that took least tells most.
const EXCHANGES: usize = 8;

/// How far the guest's clock is off, in ms, as far as the question's own duration allows to tell. `ask` runs [`SCRIPT`] in the
/// guest and gives what it printed.
///
/// # Errors
/// When it could not be asked, or printed no time.
pub async fn error_ms(ask: impl AsyncFn() -> Result<String>) -> Result<f64> {
    let mut best = (i64::MAX, 0);
    for _ in 0..EXCHANGES {
        let asked = Timestamp::now().as_micros();
        let said = ask().await?;
        let answered = Timestamp::now().as_micros();
        let guest = said.trim().replace(['.', ','], "");
        let guest: i64 = guest
            .parse()
            .with_context(|| format!("understand the guest's time `{said}`"))?;
        // Between the question and the answer.
        let off = if guest < asked {
            asked - guest
        } else {
            (guest - answered).max(0)
        };
        if answered - asked < best.0 {
            best = (answered - asked, off);
        }
    }
    Ok(best.1 as f64 / 1000.0)
}
