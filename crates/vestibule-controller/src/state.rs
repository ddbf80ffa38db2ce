//! The session's state machine, pure: which event may follow in which state, and what is to be done about it.
//!
//! ```text
//! requested ─▶ placing ─▶ starting ─▶ ready ─▶ awaiting-user ─▶ (confirming) ─▶ capturing ─▶ completed
//!     │           │          │          │            │               │              │
//!     └───────────┴──────────┴──────────┴────────────┴───────────────┴──────────────┴──▶ failed | cancelled | expired
//! ```
//! `confirming` is for sessions whose owner confirms the account: until then the credential stays in the VM.
//! One way leads back: a warm start that fails before the VM is ready returns from `starting` to `placing`, for another VM.
//!
//! An event that does not fit is [`Illegal`] and changes nothing: late and repeated reports are harmless. From `capturing`
//! on, the VM's fate no longer decides: only the collector says whether the credential was sealed.
use std::time::Duration;
use vestibule_api::{machine::MachineState, session::SessionState, time::Timestamp};

/// What a transition depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Current {
    pub(crate) state: SessionState,
    /// When [`Event::DeadlinePassed`] becomes true.
    pub(crate) deadline_at: Option<Timestamp>,
}

/// What can happen to a session. What comes with it (a finding, an account) is the store's to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// The request was looked at and may wait for a place.
    Accepted,
    /// There is a place: the VM's row exists.
    Placed,
    /// Agent and screen are ready.
    MachineReady,
    /// The tool runs.
    LoginStarted,
    /// The agent holds a complete credential.
    CredentialComplete,
    /// The same, of a session whose owner has to confirm the account.
    AccountToConfirm,
    /// The owner said that the account is the right one.
    AccountConfirmed,
    /// The credential is in the vault.
    CredentialSealed,
    /// The credential can't be had any more.
    CollectFailed,
    /// The sign-in itself failed.
    LoginFailed,
    /// The VM began from a snapshot and failed before it was ready: another one may do without.
    StartFailed,
    /// The VM could not be started, failed or was lost.
    MachineFailed,
    /// Somebody ended the session.
    Cancelled,
    /// The state's deadline lies in the past.
    DeadlinePassed,
}

impl Event {
    /// Every event.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 14] = [
        Self::Accepted,
        Self::AccountToConfirm,
        Self::AccountConfirmed,
        Self::StartFailed,
        Self::Placed,
        Self::MachineReady,
        Self::LoginStarted,
        Self::CredentialComplete,
        Self::CredentialSealed,
        Self::CollectFailed,
        Self::LoginFailed,
        Self::MachineFailed,
        Self::Cancelled,
        Self::DeadlinePassed,
    ];
}

/// Whether a session has something to see, its machine being in that state. A session that is ready has a VM that is up: one of
/// the pool says so when it is claimed, and its row follows a moment later.
pub(crate) fn has_screen(session: SessionState, machine: MachineState) -> bool {
    match machine {
        MachineState::Up | MachineState::Paused => !session.is_terminal(),
        MachineState::Creating | MachineState::Booting => match session {
            SessionState::Ready
            | SessionState::AwaitingUser
            | SessionState::Confirming
            | SessionState::Capturing => true,
            SessionState::Requested
            | SessionState::Placing
            | SessionState::Starting
            | SessionState::Completed
            | SessionState::Failed
            | SessionState::Cancelled
            | SessionState::Expired => false,
        },
        MachineState::Stopping | MachineState::Gone | MachineState::Lost => false,
    }
}

/// Something that a reconciler carries out. A row in the outbox, written in the transaction of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Effect {
    /// Start the runner, or claim the VM that came out of the pool.
    Launch,
    /// Give the VM to the session and start the tool in it.
    StartLogin,
    /// Fetch the credential and seal it.
    Collect,
    /// Take the evidence and end the VMs that the session has no use for: all of them, once it has ended.
    Teardown,
    /// Remove what may already have been sealed for a session that did not complete.
    Discard,
}

impl Effect {
    /// Every effect.
    pub(crate) const ALL: [Self; 5] = [
        Self::Launch,
        Self::StartLogin,
        Self::Collect,
        Self::Teardown,
        Self::Discard,
    ];

    /// The name in the database.
    pub(crate) const fn id(self) -> &'static str {
        match self {
            Self::Launch => "launch",
            Self::StartLogin => "start-login",
            Self::Collect => "collect",
            Self::Teardown => "teardown",
            Self::Discard => "discard",
        }
    }

    /// The effect of this name.
    pub(crate) fn from_id(id: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|effect| effect.id() == id)
    }
}

/// The state that follows, and what is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transition {
    pub(crate) state: SessionState,
    /// In the order in which they are carried out.
    pub(crate) effects: &'static [Effect],
}

/// The event does not fit the state: it is late, repeated, early, or none of the state's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{event:?}` changes nothing in state `{}`", state.id())]
pub(crate) struct Illegal {
    pub(crate) state: SessionState,
    pub(crate) event: Event,
}

/// What follows on `event`.
///
/// # Errors
/// [`Illegal`]: nothing follows.
pub(crate) fn next(current: Current, event: Event, now: Timestamp) -> Result<Transition, Illegal> {
    let state = current.state;
    let illegal = Illegal { state, event };
    if event == Event::DeadlinePassed && current.deadline_at.is_none_or(|at| now < at) {
        return Err(illegal);
    }
    match state {
        SessionState::Requested => from_requested(event),
        SessionState::Placing => from_placing(event),
        SessionState::Starting => from_starting(event),
        SessionState::Ready => from_ready(event),
        SessionState::AwaitingUser => from_awaiting_user(event),
        SessionState::Confirming => from_confirming(event),
        SessionState::Capturing => from_capturing(event),
        SessionState::Completed
        | SessionState::Failed
        | SessionState::Cancelled
        | SessionState::Expired => None,
    }
    .ok_or(illegal)
}

const fn to(state: SessionState, effects: &'static [Effect]) -> Option<Transition> {
    Some(Transition { state, effects })
}

const END: &[Effect] = &[Effect::Teardown];
/// The collector may have sealed the credential already, or be about to.
const END_AND_DISCARD: &[Effect] = &[Effect::Teardown, Effect::Discard];

fn from_requested(event: Event) -> Option<Transition> {
    match event {
        Event::Accepted => to(SessionState::Placing, &[]),
        Event::MachineFailed | Event::DeadlinePassed => to(SessionState::Failed, &[]),
        Event::Cancelled => to(SessionState::Cancelled, &[]),
        Event::StartFailed
        | Event::Placed
        | Event::MachineReady
        | Event::LoginStarted
        | Event::CredentialComplete
        | Event::AccountToConfirm
        | Event::AccountConfirmed
        | Event::CredentialSealed
        | Event::CollectFailed
        | Event::LoginFailed => None,
    }
}

fn from_placing(event: Event) -> Option<Transition> {
    match event {
        Event::Placed => to(SessionState::Starting, &[Effect::Launch]),
        Event::MachineFailed | Event::DeadlinePassed => to(SessionState::Failed, &[]),
        Event::Cancelled => to(SessionState::Cancelled, &[]),
        Event::StartFailed
        | Event::Accepted
        | Event::MachineReady
        | Event::LoginStarted
        | Event::CredentialComplete
        | Event::AccountToConfirm
        | Event::AccountConfirmed
        | Event::CredentialSealed
        | Event::CollectFailed
        | Event::LoginFailed => None,
    }
}

fn from_starting(event: Event) -> Option<Transition> {
    match event {
        Event::MachineReady => to(SessionState::Ready, &[Effect::StartLogin]),
        Event::StartFailed => to(SessionState::Placing, END),
        Event::MachineFailed | Event::DeadlinePassed => to(SessionState::Failed, END),
        Event::Cancelled => to(SessionState::Cancelled, END),
        Event::Accepted
        | Event::Placed
        | Event::LoginStarted
        | Event::CredentialComplete
        | Event::AccountToConfirm
        | Event::AccountConfirmed
        | Event::CredentialSealed
        | Event::CollectFailed
        | Event::LoginFailed => None,
    }
}

fn from_ready(event: Event) -> Option<Transition> {
    match event {
        Event::LoginStarted => to(SessionState::AwaitingUser, &[]),
        // The agent's report may overtake the reply that the login was started.
        Event::CredentialComplete => to(SessionState::Capturing, &[Effect::Collect]),
        Event::AccountToConfirm => to(SessionState::Confirming, &[]),
        Event::LoginFailed | Event::MachineFailed | Event::DeadlinePassed => {
            to(SessionState::Failed, END)
        }
        Event::Cancelled => to(SessionState::Cancelled, END),
        Event::StartFailed
        | Event::Accepted
        | Event::Placed
        | Event::MachineReady
        | Event::AccountConfirmed
        | Event::CredentialSealed
        | Event::CollectFailed => None,
    }
}

fn from_awaiting_user(event: Event) -> Option<Transition> {
    match event {
        Event::CredentialComplete => to(SessionState::Capturing, &[Effect::Collect]),
        Event::AccountToConfirm => to(SessionState::Confirming, &[]),
        Event::LoginFailed | Event::MachineFailed => to(SessionState::Failed, END),
        Event::DeadlinePassed => to(SessionState::Expired, END),
        Event::Cancelled => to(SessionState::Cancelled, END),
        Event::StartFailed
        | Event::Accepted
        | Event::Placed
        | Event::MachineReady
        | Event::LoginStarted
        | Event::AccountConfirmed
        | Event::CredentialSealed
        | Event::CollectFailed => None,
    }
}

fn from_confirming(event: Event) -> Option<Transition> {
    match event {
        Event::AccountConfirmed => to(SessionState::Capturing, &[Effect::Collect]),
        // The only copy was in the VM.
        Event::MachineFailed => to(SessionState::Failed, END),
        Event::DeadlinePassed => to(SessionState::Expired, END),
        Event::Cancelled => to(SessionState::Cancelled, END),
        Event::StartFailed
        | Event::Accepted
        | Event::Placed
        | Event::MachineReady
        | Event::LoginStarted
        | Event::CredentialComplete
        | Event::AccountToConfirm
        | Event::CredentialSealed
        | Event::CollectFailed
        | Event::LoginFailed => None,
    }
}

fn from_capturing(event: Event) -> Option<Transition> {
    match event {
        Event::CredentialSealed => to(SessionState::Completed, END),
        Event::CollectFailed => to(SessionState::Failed, END),
        Event::DeadlinePassed => to(SessionState::Failed, END_AND_DISCARD),
        Event::Cancelled => to(SessionState::Cancelled, END_AND_DISCARD),
        Event::StartFailed
        | Event::Accepted
        | Event::Placed
        | Event::MachineReady
        | Event::LoginStarted
        | Event::CredentialComplete
        | Event::AccountToConfirm
        | Event::AccountConfirmed
        | Event::LoginFailed
        | Event::MachineFailed => None,
    }
}

/// How long a session may stay in each state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    pub(crate) requested: Duration,
    pub(crate) placing: Duration,
    pub(crate) starting: Duration,
    pub(crate) ready: Duration,
    pub(crate) confirming: Duration,
    pub(crate) capturing: Duration,
}

impl Deadlines {
    /// When a session that enters `state` now must have left it; none: never, the state is terminal.
    pub(crate) fn of(
        &self,
        state: SessionState,
        now: Timestamp,
        sign_in: Duration,
    ) -> Option<Timestamp> {
        let length = match state {
            SessionState::Requested => self.requested,
            SessionState::Placing => self.placing,
            SessionState::Starting => self.starting,
            SessionState::Ready => self.ready,
            SessionState::AwaitingUser => sign_in,
            SessionState::Confirming => self.confirming,
            SessionState::Capturing => self.capturing,
            SessionState::Completed
            | SessionState::Failed
            | SessionState::Cancelled
            | SessionState::Expired => return None,
        };
        Some(now.plus(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const DEADLINES: Deadlines = Deadlines {
        requested: MINUTE,
        placing: MINUTE,
        starting: MINUTE,
        ready: MINUTE,
        confirming: MINUTE,
        capturing: MINUTE,
    };

    #[test]
    fn there_is_a_screen_from_ready_to_the_end_while_there_is_a_vm() {
        use {MachineState as M, SessionState as S};
        for (session, machine, seen) in [
            (S::Starting, M::Booting, false),
            (S::Starting, M::Up, true),
            // Claimed out of the pool before its row was told that it is up.
            (S::Ready, M::Booting, true),
            (S::AwaitingUser, M::Paused, true),
            (S::Capturing, M::Stopping, false),
            (S::AwaitingUser, M::Lost, false),
            (S::Cancelled, M::Up, false),
        ] {
            assert_eq!(
                has_screen(session, machine),
                seen,
                "{session:?}, {machine:?}"
            );
        }
    }

    fn at(state: SessionState) -> Current {
        let now = Timestamp::from_micros(1_000_000);
        let deadline_at = DEADLINES.of(state, now, MINUTE);
        Current { state, deadline_at }
    }

    fn later() -> Timestamp {
        Timestamp::from_micros(1_000_000).plus(MINUTE)
    }

    #[test]
    fn the_whole_way() {
        let mut state = SessionState::Requested;
        let mut effects: Vec<Effect> = Vec::new();
        for event in [
            Event::Accepted,
            Event::Placed,
            Event::MachineReady,
            Event::LoginStarted,
            Event::CredentialComplete,
            Event::CredentialSealed,
        ] {
            let transition = next(at(state), event, later()).unwrap();
            state = transition.state;
            effects.extend(transition.effects);
        }
        assert_eq!(state, SessionState::Completed);
        let expected = [
            Effect::Launch,
            Effect::StartLogin,
            Effect::Collect,
            Effect::Teardown,
        ];
        assert_eq!(effects, expected);
    }

    #[test]
    fn terminal_is_terminal_and_every_other_state_has_a_deadline_that_ends_it() {
        for state in SessionState::ALL {
            let terminal = state.is_terminal();
            assert_eq!(at(state).deadline_at.is_none(), terminal, "{state:?}");
            assert_eq!(
                next(at(state), Event::DeadlinePassed, later()).is_err(),
                terminal,
                "{state:?}"
            );
            assert_eq!(
                next(at(state), Event::Cancelled, later()).is_err(),
                terminal,
                "{state:?}"
            );
            if terminal {
                for event in Event::ALL {
                    assert!(
                        next(at(state), event, later()).is_err(),
                        "{event:?} in {state:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_deadline_that_has_not_passed_is_none() {
        for state in SessionState::ALL {
            let early = Timestamp::from_micros(1_000_000);
            assert!(next(at(state), Event::DeadlinePassed, early).is_err());
        }
    }

    #[test]
    fn a_vm_once_launched_is_torn_down_on_every_way_out() {
        for state in SessionState::ALL {
            for event in Event::ALL {
                let Ok(transition) = next(at(state), event, later()) else {
                    continue;
                };
                let launched = !matches!(state, SessionState::Requested | SessionState::Placing);
                let torn_down = transition.effects.contains(&Effect::Teardown);
                let given_up = transition.state.is_terminal() || event == Event::StartFailed;
                assert_eq!(torn_down, launched && given_up, "{event:?} in {state:?}");
            }
        }
    }

    #[test]
    fn names_in_the_database_round_trip() {
        for effect in Effect::ALL {
            assert_eq!(Effect::from_id(effect.id()), Some(effect));
        }
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        prop::collection::vec(prop::sample::select(Event::ALL.to_vec()), 0..40)
    }

    proptest! {
        /// Whatever is reported in whatever order: states only go forward but for a start that failed, and nothing leaves a
        /// terminal one.
        #[test]
        fn no_order_of_events_goes_back(events in events()) {
            let rank = |state: SessionState| SessionState::ALL.iter().position(|s| *s == state).unwrap();
            let mut state = SessionState::Requested;
            for event in events {
                let Ok(transition) = next(at(state), event, later()) else { continue };
                prop_assert!(!state.is_terminal());
                prop_assert!(event == Event::StartFailed || rank(transition.state) > rank(state));
                state = transition.state;
            }
        }

        /// Each event once more, and the VM's loss at any time from `capturing` on, ends in the same state.
        #[test]
        fn repeats_and_a_lost_vm_do_not_undo_a_capture(events in events()) {
            let mut once = SessionState::Requested;
            let mut twice = SessionState::Requested;
            for event in events {
                if let Ok(t) = next(at(once), event, later()) { once = t.state; }
                // The deadline is set anew with each state, so a repeat of it can't be early by accident.
                let repeats = if event == Event::DeadlinePassed { 1 } else { 2 };
                for _ in 0..repeats {
                    if let Ok(t) = next(at(twice), event, later()) { twice = t.state; }
                }
                if twice == SessionState::Capturing || twice == SessionState::Completed {
                    for lost in [Event::MachineFailed, Event::LoginFailed] {
                        prop_assert!(next(at(twice), lost, later()).is_err());
                    }
                }
            }
            prop_assert_eq!(once, twice);
        }
    }
}
