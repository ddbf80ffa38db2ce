//! `vestibule session bench`, with runners without VMs: whatever becomes of its sign-ins, it reports, and leaves none.
use anyhow::{Context, Result, ensure};
use camino_tempfile::Utf8TempDir;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{process::Stdio, time::Duration};
use tokio::process::Command;
use vestibule_api::{control::VmView, session::SessionView};
use vestibule_testkit::{
    process::workspace,
    runner::store_image,
    stage::{Setting, Stage, binary},
    wait,
};

/// For hangs, not for slowness.
const PATIENCE: Duration = Duration::from_secs(60);

/// A controller that boots such runners, each in so many milliseconds.
async fn stage(images: &Utf8TempDir, boot_ms: &str, config: &str) -> Result<Stage> {
    store_image(images.path(), "none", &["agent"])?;
    let testkit = workspace().join("target/debug/vestibule-testkit");
    let words = [
        testkit.as_str(),
        "runner",
        "--boot-ms",
        boot_ms,
        "--sign-in-ms",
        "0",
    ];
    let setting = Setting::image("none")
        .images_of(images.path())
        .runner(&words)
        .with("[providers.oidc]\nallow_http = true\nparameters = { issuer = \"http://idp.test\", client_id = \"vestibule\" }")
        .with(config);
    Stage::start(&setting).await
}

fn bench(stage: &Stage, words: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary()?);
    command
        .arg("--home")
        .arg(stage.home())
        .args(["--json", "session", "bench", "--provider", "oidc"])
        .args(words)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    Ok(command)
}

/// That its sign-ins have ended, and their VMs.
async fn nothing_left(stage: &Stage, sessions: usize) -> Result<()> {
    let vms: Vec<VmView> = stage.api().get("/api/vms").await?;
    ensure!(vms.iter().all(|vm| vm.session_id.is_none()), "{vms:?}");
    let views: Vec<SessionView> = stage.api().get("/api/sessions?limit=100").await?;
    ensure!(views.len() == sessions, "{views:?}");
    ensure!(
        views.iter().all(|view| view.state.is_terminal()),
        "{views:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sign_in_that_is_refused_costs_no_other() -> Result<()> {
    let images = camino_tempfile::tempdir()?;
    let stage = stage(&images, "500", "[limits]\nvms = 1\nwaiting = 1").await?;
    let output = bench(&stage, &["--count", "8", "--parallel", "4"])?.output();
    let output = tokio::time::timeout(PATIENCE, output).await??;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let failures = report["failures"].as_array().context("failures")?;
    ensure!(report["sessions"] == 8, "{report}");
    ensure!((1..8).contains(&failures.len()), "{report}");
    ensure!(output.status.code() == Some(1), "{output:?}");
    nothing_left(&stage, 8 - failures.len()).await?;
    stage.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_it_ends_what_it_began() -> Result<()> {
    let images = camino_tempfile::tempdir()?;
    let stage = stage(&images, "600000", "").await?;
    let child = bench(&stage, &["--count", "9", "--parallel", "2"])?.spawn()?;
    wait::until("two VMs", PATIENCE, || async {
        let vms = stage.api().get::<Vec<VmView>>("/api/vms").await;
        let vms = vms.map_err(|err| format!("{err:#}"))?;
        let launched = vms.iter().filter(|vm| vm.runner_pid.is_some());
        if launched.count() == 2 {
            Ok(())
        } else {
            Err(format!("{vms:?}"))
        }
    })
    .await?;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    kill_process(pid.context("it runs")?, Signal::INT)?;
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await??;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let interrupted = serde_json::json!(["interrupted", "interrupted"]);
    ensure!(report["failures"] == interrupted, "{report}");
    nothing_left(&stage, 2).await?;
    stage.end().await
}
