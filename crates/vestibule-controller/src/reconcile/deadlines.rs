//! Ends sessions that stayed in a state beyond its deadline, and says what they waited for.
use super::ReconcileError;
use crate::{
    core::Shared,
    machine,
    state::Event,
    store::{Applied, Facts, SessionRow},
};
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
    session::{SessionEventKind, SessionState},
};

pub(super) async fn run(core: &Shared) -> Result<u64, ReconcileError> {
    let now = core.now();
    let mut ended = 0;
    for session in core.store.overdue(now).await? {
        let finding = Some(finding(core, &session).await?);
        let facts = Facts {
            finding,
            ..Facts::default()
        };
        let applied = core
            .store
            .apply(session.id, Event::DeadlinePassed, &facts, now)
            .await?;
        ended += u64::from(matches!(applied, Applied::Moved(_)));
    }
    Ok(ended)
}

async fn finding(core: &Shared, session: &SessionRow) -> Result<Finding, ReconcileError> {
    let quote = Quote {
        source: "events".to_owned(),
        line: None,
        text: last_words(core, session).await?,
    };
    let (cause, why, fix) = match session.state {
        SessionState::Requested | SessionState::Placing => (
            Cause::Deadline,
            "no place for a VM became free in time",
            "wait until another sign-in has ended, or raise `limits.vms`",
        ),
        SessionState::Starting => (
            Cause::GuestNotExecuting,
            "the VM was not ready in time, and its runner did not say why",
            "read serial.log and report.json in the evidence; on a slow host raise `deadlines.boot_s`",
        ),
        SessionState::Ready => (
            Cause::Deadline,
            "the tool was not started in time",
            "start the sign-in again; read the VM's report",
        ),
        SessionState::AwaitingUser if !core.live.is_watched(session.id) => {
            return Ok(machine::person_left(quote));
        }
        SessionState::AwaitingUser => (
            Cause::Deadline,
            "the sign-in was not finished in time",
            "start the sign-in again",
        ),
        SessionState::Confirming => (
            Cause::PersonLeft,
            "nobody confirmed in time that the account is the right one; nothing was kept of it",
            "start the sign-in again, and confirm the account when it is shown",
        ),
        SessionState::Capturing => (
            Cause::Deadline,
            "the credential could not be fetched and sealed in time",
            "look at the controller's log and the vault; start the sign-in again",
        ),
        SessionState::Completed
        | SessionState::Failed
        | SessionState::Cancelled
        | SessionState::Expired => (Cause::Deadline, "the session had ended already", "nothing"),
    };
    let finding = Finding::new(cause, quote, why, fix).refuted_by("a later event of the session");
    Ok(finding.retryable())
}

/// The newest thing that the session's timeline says.
async fn last_words(core: &Shared, session: &SessionRow) -> Result<String, ReconcileError> {
    let events = core.store.events(session.id, 0, 10_000).await?;
    let waited = events.iter().rev().find_map(|event| match &event.event {
        SessionEventKind::Waiting { waiting_for } => {
            Some(format!("waiting for {}", waiting_for.join(", ")))
        }
        SessionEventKind::Phase { phase } => Some(format!("last milestone: {phase:?}")),
        SessionEventKind::UrlOpened { host, .. } => Some(format!("the browser was sent to {host}")),
        SessionEventKind::State { .. }
        | SessionEventKind::UrlRefused { .. }
        | SessionEventKind::UserCode { .. }
        | SessionEventKind::CredentialPartial { .. }
        | SessionEventKind::EgressRefused { .. }
        | SessionEventKind::Viewers { .. }
        | SessionEventKind::ViewerJoined { .. }
        | SessionEventKind::ViewerLeft { .. }
        | SessionEventKind::BrowserRestarted
        | SessionEventKind::BrowserNavigated
        | SessionEventKind::FirstFrame
        | SessionEventKind::Claimed { .. }
        | SessionEventKind::FellBack { .. }
        | SessionEventKind::Captured { .. }
        | SessionEventKind::Failure { .. } => None,
    });
    Ok(waited.unwrap_or_else(|| {
        format!(
            "in state {} since {}",
            session.state.id(),
            session.updated_at
        )
    }))
}
