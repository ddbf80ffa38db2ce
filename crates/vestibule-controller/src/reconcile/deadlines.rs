//! Ends sessions that stayed in a state beyond its deadline, and says what they waited for.
use super::ReconcileError;
use crate::{
    core::Shared,
    machine,
    state::Event,
    store::{Applied, Facts, SessionRow},
};
use std::time::Instant;
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
    session::{SessionEventKind, SessionState},
    time::Timestamp,
};

/// The host's clock may be off by so much between two runs before it is said to have jumped.
const JUMP: i64 = 5_000_000;

/// The two clocks at one moment; the first does not jump, nor go on while the host sleeps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocks {
    pub(super) steady: Instant,
    pub(super) wall: Timestamp,
}

impl Clocks {
    /// Microseconds by which the host's clock went further than time did; none: it did not jump.
    fn jump_since(self, before: Self) -> Option<i64> {
        let passed = self.steady.duration_since(before.steady).as_micros();
        let passed = i64::try_from(passed).unwrap_or(i64::MAX);
        let went = self
            .wall
            .as_micros()
            .saturating_sub(before.wall.as_micros());
        Some(went.saturating_sub(passed)).filter(|jump| jump.abs() >= JUMP)
    }
}

/// A clock that jumps, and a host that slept, take no time from anybody: every deadline moves with it.
pub(super) async fn follow_clock(
    core: &Shared,
    seen: &mut Option<Clocks>,
    now: Clocks,
) -> Result<(), ReconcileError> {
    let before = seen.replace(now);
    let Some(jump) = before.and_then(|before| now.jump_since(before)) else {
        return Ok(());
    };
    tracing::warn!(
        seconds = jump / 1_000_000,
        "the host's clock jumped: deadlines move with it"
    );
    core.store.shift(jump).await?;
    Ok(())
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_a_clock_that_leaves_time_behind_has_jumped() {
        let steady = Instant::now();
        let at = |passed: u64, wall: i64| Clocks {
            steady: steady + Duration::from_secs(passed),
            wall: Timestamp::from_micros(1_000_000_000 + wall * 1_000_000),
        };
        for (passed, wall, jump) in [
            (5, 5, None),
            (5, 9, None),
            (600, 600, None),
            (5, 3605, Some(3_600_000_000)),
            (5, -3595, Some(-3_600_000_000)),
            (0, 5, Some(5_000_000)),
        ] {
            assert_eq!(at(passed, wall).jump_since(at(0, 0)), jump);
        }
    }
}
