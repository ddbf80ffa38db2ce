//! From a key pressed in noVNC to the pixel that it changes on noVNC's canvas: Playwright presses, the page itself looks.
//! The way is the whole one: dashboard, controller, runner, stream, Xvnc, Chromium in the VM, and back.
use super::{Report, stats::percentile};
use crate::{process::workspace, stage};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use tokio::process::Command;

/// What `tests/e2e/latency.mjs` prints.
#[derive(Debug, Deserialize)]
struct Measured {
    /// Milliseconds from the key's event to the first animation frame that shows its glyph.
    milliseconds: Vec<f64>,
}

/// Runs the bench with the image `browser`.
///
/// # Errors
/// When Node, Chromium or the image is missing, or a key shows nothing.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("latency");
    let output = Command::new("node")
        .current_dir(workspace().join("tests/e2e"))
        .arg("latency.mjs")
        // The stage is this program; it starts the `vestibule` that is measured.
        .env("VESTIBULE_TESTKIT", std::env::current_exe()?)
        .env("VESTIBULE_BIN", stage::binary()?)
        .kill_on_drop(true)
        .output()
        .await
        .context("start node")?;
    ensure!(
        output.status.success(),
        "latency.mjs: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let last = String::from_utf8_lossy(&output.stdout);
    let last = last.lines().last().unwrap_or_default();
    let Measured { milliseconds } =
        serde_json::from_str(last).with_context(|| format!("understand `{last}`"))?;
    report.median("key in noVNC to changed pixel", "ms", &milliseconds);
    for percent in [5, 95] {
        report.figure(
            format!("the same, {percent}th percentile"),
            "ms",
            percentile(&milliseconds, percent),
            &milliseconds,
        );
    }
    report.note(format!(
        "{} keys, one a second at most, into a text field of a plain page",
        milliseconds.len()
    ));
    report.note("a frame of the watching page is 16.7 ms, and Xvnc is told 30 frames a second");
    Ok(report)
}
