//! Builds of images in a home of their own: from nothing, unchanged, and with another agent. The packages come from the
//! mirror that the host is configured for, so the first figure depends on the network as well.
use super::{Report, report::Required, vm};
use crate::process::workspace;
use anyhow::{Context, Result, ensure};
use camino::Utf8Path;
use std::time::Instant;

/// The recipes, base first: the second build finds the layers of the first.
const RECIPES: [&str; 2] = ["tiny", "browser"];
/// Repetitions of what is quick.
const TURNS: usize = 3;
/// What issue 2 requires of a changed agent and of an unchanged recipe.
const AGENT_CHANGED: Required = Required::AtMost(15.0);
const UNCHANGED: Required = Required::AtMost(1.0);

/// Runs the bench.
///
/// # Errors
/// When the agent is not built, or a build fails; with what it said.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("images");
    let built = workspace().join("target/agent/vestibule-agent");
    ensure!(built.exists(), "no `{built}`: cargo xtask agent makes it");
    // On the disk of the checkout: a home in memory would be measured with memory's speed.
    let home = camino_tempfile::Builder::new()
        .prefix("bench-home-")
        .tempdir_in(workspace().join("target"))
        .context("make a home")?;
    for recipe in RECIPES {
        let (cold, _) = build(home.path(), recipe, &built).await?;
        report.figure(format!("{recipe}: from nothing"), "s", cold, &[cold]);
        let (mut unchanged, mut changed) = (Vec::new(), Vec::new());
        for turn in 0..TURNS {
            unchanged.push(build(home.path(), recipe, &built).await?.0);
            // Bytes behind a program's last section change its digest and nothing that it does.
            let other = home.path().join(format!("agent-{turn}"));
            let mut bytes = tokio::fs::read(&built).await?;
            bytes.extend_from_slice(format!("bench {recipe} {turn}").as_bytes());
            tokio::fs::write(&other, bytes).await?;
            changed.push(build(home.path(), recipe, &other).await?.0);
        }
        report.median(format!("{recipe}: unchanged"), "s", &unchanged);
        report.require(UNCHANGED);
        report.median(format!("{recipe}: another agent"), "s", &changed);
        report.require(AGENT_CHANGED);
    }
    report.note("`browser` stands on `tiny`, whose layers are in the cache when it is built");
    Ok(report)
}

/// Seconds that a build took, and the image's digest.
async fn build(home: &Utf8Path, recipe: &str, agent: &Utf8Path) -> Result<(f64, String)> {
    let begun = Instant::now();
    let recipe = workspace().join("images").join(recipe);
    let words = ["image", "build", recipe.as_str(), "--agent", agent.as_str()];
    let said = vm::vestibule(home, &words).await?;
    let digest = String::from_utf8(said).context("read the digest")?;
    Ok((begun.elapsed().as_secs_f64(), digest.trim().to_owned()))
}
