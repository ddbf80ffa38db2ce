//! Vestibule as a whole: a controller, real VMs, unmodified tools, and a person who sees pixels. One VM at a time.
mod egress;
mod failures;
mod faults;
mod guest;
mod package;
mod snapshots;
pub(crate) mod vendors;
mod warm;

use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, MutexGuard};
use vestibule_api::{
    cause::Cause,
    control::VmView,
    ids::SessionId,
    session::{SessionState, SessionView},
};
use vestibule_testkit::{stage::Stage, wait};

/// From *start* to the page of the sign-in: a boot under software emulation, and a tool's start.
const READY: Duration = Duration::from_secs(600);
/// From the person's decision to the end of the session.
const END: Duration = Duration::from_secs(240);

/// Two VMs at once would only make each other late.
async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// Says how long a part took, for `script/test`.
#[expect(
    clippy::print_stdout,
    reason = "timings are what the test's reader asked for"
)]
fn took(part: &str, since: Instant) {
    println!("  {part}: {:.1} s", since.elapsed().as_secs_f32());
}

/// Waits until the session has ended.
async fn ended(stage: &Stage, id: SessionId) -> Result<SessionView> {
    stage
        .api()
        .wait_session(id, "the end of the session", END, |view| {
            view.state.is_terminal()
        })
        .await
}

/// Checks that the session failed for this cause.
fn assert_cause(view: &SessionView, cause: Cause) -> Result<()> {
    ensure!(
        view.state == SessionState::Failed,
        "the session is {}, not failed: {:?}",
        view.state.id(),
        view.failure
    );
    let finding = view
        .failure
        .as_ref()
        .and_then(|verdict| verdict.finding.as_ref())
        .context("a failed session has a finding")?;
    ensure!(
        finding.cause == cause,
        "the cause is `{}`, expected `{cause}`: {finding:?}",
        finding.cause
    );
    ensure!(
        !finding.evidence.is_empty(),
        "a finding quotes its evidence"
    );
    Ok(())
}

/// Waits until nothing of the stage's VMs is left, and until the controller has written what it knows to their evidence.
async fn assert_nothing_left(stage: &Stage) -> Result<()> {
    wait::until("no process, socket or directory of a VM", END, || {
        let left = stage.residue();
        std::future::ready(if left.is_empty() { Ok(()) } else { Err(left) })
    })
    .await?;
    wait::until(
        "no VM that the controller still tears down",
        END,
        || async {
            match stage.api().get::<Vec<VmView>>("/api/vms").await {
                Ok(vms) if vms.is_empty() => Ok(()),
                Ok(vms) => Err(format!("{vms:?}")),
                Err(err) => Err(format!("{err:#}")),
            }
        },
    )
    .await
}

/// Keeps the evidence of a test that failed.
async fn kept(name: &str, stage: Stage, result: Result<()>) -> Result<()> {
    match result {
        Ok(()) => stage.end().await,
        Err(err) => {
            // What is still under way has no evidence before it ends; what keeps it from that must not hide the test's own error.
            let over = end_all(&stage).await;
            let at = stage.keep(name);
            let err = match over {
                Ok(()) => err,
                Err(why) => err.context(format!("and then: {why:#}")),
            };
            stage.end().await.ok();
            Err(err.context(format!("evidence is in `{at}`")))
        }
    }
}

/// Cancels every session that has not ended, and waits for its VM's end.
async fn end_all(stage: &Stage) -> Result<()> {
    let sessions: Vec<SessionView> = stage.api().get("/api/sessions").await?;
    for session in sessions {
        if !session.state.is_terminal() {
            stage.api().cancel(session.session_id).await?;
        }
    }
    assert_nothing_left(stage).await
}
