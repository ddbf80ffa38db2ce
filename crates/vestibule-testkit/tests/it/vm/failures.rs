//! What goes wrong around a sign-in, and that each time the state is clear and nothing is left behind.
use super::{END, READY, alone, assert_cause, assert_nothing_left, ended, kept, took};
use anyhow::{Context, Result, ensure};
use hyper::StatusCode;
use std::time::{Duration, Instant};
use vestibule_api::{
    cause::Cause,
    control::VmView,
    ids::{MachineId, SessionId},
    machine::MachineState,
    session::{CloseCode, Right, SessionEvent, SessionEventKind, SessionState},
};
use vestibule_testkit::{
    api::refused,
    idp::Idp,
    process::signal,
    rfb::{Keysym, Rfb},
    stage::{Setting, Stage},
};

/// A browser ends and another one shows its window within this time, if it was closed at all.
const PRESS_AGAIN: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image browser-test; script/test failures"]
async fn failures_are_clear_and_leave_nothing() -> Result<()> {
    let _alone = alone().await;
    let idp = Idp::start().await?;
    let stage = Stage::start(&Setting::image("browser-test").idp(&idp)).await?;
    let result = async {
        let begin = Instant::now();
        requests_that_are_wrong(&stage)
            .await
            .context("wrong requests")?;
        cancelled_while_starting(&stage)
            .await
            .context("cancelled while starting")?;
        took(
            "wrong requests, and a session cancelled while starting",
            begin,
        );
        let begin = Instant::now();
        two_at_once(&stage).await.context("two sign-ins at once")?;
        took(
            "two sign-ins at once: one loses its VMM, the other has two viewers and a closed browser",
            begin,
        );
        Ok(())
    }
    .await;
    kept("failures", stage, result).await
}

async fn requests_that_are_wrong(stage: &Stage) -> Result<()> {
    let unknown = stage
        .api()
        .start("no-such-provider", None)
        .await
        .err()
        .context("it was accepted")?;
    ensure!(
        refused(&unknown) == Some(StatusCode::BAD_REQUEST)
            && format!("{unknown:#}").contains("unknown_provider"),
        "{unknown:#}"
    );
    let flow = stage
        .api()
        .start("wrangler", Some("no-such-flow"))
        .await
        .err()
        .context("it was accepted")?;
    ensure!(
        refused(&flow).is_some_and(|status| status.is_client_error()),
        "{flow:#}"
    );
    let nobody = SessionId::generate();
    let missing = stage
        .api()
        .session(nobody)
        .await
        .err()
        .context("it was found")?;
    ensure!(
        matches!(
            refused(&missing),
            Some(StatusCode::NOT_FOUND | StatusCode::GONE)
        ),
        "{missing:#}"
    );
    let closed = stage
        .api()
        .open_with(nobody, "view", "no-such-ticket")
        .await?
        .closed()
        .await?;
    ensure!(
        closed.0 == CloseCode::BadTicket as u16 && !closed.1.is_empty(),
        "{closed:?}"
    );
    assert_nothing_left(stage).await
}

async fn cancelled_while_starting(stage: &Stage) -> Result<()> {
    let id = stage.api().start("wrangler", None).await?;
    stage
        .api()
        .wait_session(id, "a VM that boots", READY, |view| {
            view.machine_state == Some(MachineState::Booting)
        })
        .await?;
    stage.api().cancel(id).await?;
    let view = ended(stage, id).await?;
    ensure!(view.state == SessionState::Cancelled, "{}", view.state.id());
    let ticket = stage
        .api()
        .ticket(id, Right::View)
        .await
        .err()
        .context("a ticket for an ended session")?;
    ensure!(refused(&ticket) == Some(StatusCode::GONE), "{ticket:#}");
    assert_nothing_left(stage).await
}

/// Two people sign in at the same time; what happens to one VM is nothing to the other.
async fn two_at_once(stage: &Stage) -> Result<()> {
    let api = stage.api();
    let stays = api.start("oidc", None).await?;
    let dies = api.start("wrangler", None).await?;
    let machine = vmm_killed(stage, dies).await.context("a killed VMM")?;
    two_viewers_and_a_closed_browser(stage, stays)
        .await
        .context("two viewers and a closed browser")?;
    assert_nothing_left(stage).await?;
    let evidence = stage.home().join("evidence").join(machine.to_string());
    for file in ["machine.json", "serial.log", "exit.json", "disposal.json"] {
        ensure!(evidence.join(file).exists(), "the evidence lacks {file}");
    }
    Ok(())
}

/// Kills the VMM of a session whose VM is up; the machine that it was.
async fn vmm_killed(stage: &Stage, id: SessionId) -> Result<MachineId> {
    let api = stage.api();
    let view = api
        .wait_session(id, "a VM that is up", READY, |view| {
            view.machine_state == Some(MachineState::Up)
        })
        .await?;
    let machine = view.machine_id.context("it has a machine")?;
    let vm: VmView = api.get(&format!("/api/vms/{machine}")).await?;
    signal(
        Some(vm.vmm_pid.context("it has a VMM")?),
        rustix::process::Signal::KILL,
    );
    assert_cause(&ended(stage, id).await?, Cause::VmmExited)?;
    Ok(machine)
}

/// Alt+F4 in the browser's window: the person closes it, and presses again where a bubble had the focus and closed instead.
/// Gives the events up to the next browser.
async fn browser_closed(
    stage: &Stage,
    id: SessionId,
    viewer: &Rfb,
    (x, y): (u16, u16),
) -> Result<Vec<SessionEvent>> {
    let restarted = |event: &SessionEvent| event.event == SessionEventKind::BrowserRestarted;
    let end = Instant::now() + END;
    loop {
        viewer.click(x, y).await?;
        viewer.chord(&[Keysym(0xffe9), Keysym(0xffc1)]).await?;
        match stage.api().events(id, 0, PRESS_AGAIN, restarted).await {
            Err(err) if Instant::now() > end => return Err(err),
            Err(_) => {}
            Ok(events) => return Ok(events),
        }
    }
}

async fn two_viewers_and_a_closed_browser(stage: &Stage, id: SessionId) -> Result<()> {
    let api = stage.api();
    api.wait_session(id, "the sign-in", READY, |view| {
        view.state == SessionState::AwaitingUser
    })
    .await?;
    let (first, _closed) = api.view(id, Right::Control).await?;
    let (second, _closed_too) = api.view(id, Right::View).await?;
    let page = [0xb8, 0xd8, 0xff];
    let field = first
        .wait_for_colour("the login page", page, 2000, END)
        .await?;
    second
        .wait_for_colour("the login page, seen by the second viewer", page, 2000, END)
        .await?;
    let events = browser_closed(stage, id, &first, field.middle())
        .await
        .context("close the browser")?;
    ensure!(
        events
            .iter()
            .any(|e| e.event == SessionEventKind::BrowserRestarted),
        "the browser was not restarted"
    );
    ensure!(
        events
            .iter()
            .any(|e| matches!(e.event, SessionEventKind::Viewers { count: 2 })),
        "two viewers"
    );
    let gapless = events.iter().zip(1..).all(|(event, seq)| event.seq == seq);
    ensure!(gapless, "events are numbered from 1 without gaps");
    let resumed = api.events(id, 3, END, |_| true).await?;
    ensure!(
        resumed.first().is_some_and(|event| event.seq == 4),
        "Last-Event-ID 3 resumes at 4"
    );
    api.cancel(id).await?;
    ended(stage, id).await?;
    Ok(())
}
