//! Programs that the tests run.
use anyhow::{Context, Result, ensure};
use std::process::{Command, Stdio};

/// Runs it, without input; its output. A status other than success is an error with what it said.
pub(crate) fn output(command: &mut Command) -> Result<Vec<u8>> {
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(
        out.status.success(),
        "{command:?}: {} {}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(out.stdout)
}
