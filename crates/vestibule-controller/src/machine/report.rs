//! What one event of a runner means for machine and session. Pure.
use super::person_left;
use crate::{
    state::Event,
    store::{Facts, Reported},
};
use vestibule_api::{
    agent::{AgentEvent, LoginEvent},
    cause::Cause,
    finding::{Finding, Quote},
    machine::{Exit, MachineState, RunnerEventKind},
    session::SessionEventKind,
};

/// The meaning of `event`. A user code is left out of what goes to the database; it is returned beside.
pub(super) fn read(event: &RunnerEventKind) -> (Reported, Option<String>) {
    let mut reported = Reported::default();
    let mut code = None;
    match event {
        RunnerEventKind::State { state, generation } => {
            reported.state = Some((*state, *generation));
            if *state == MachineState::Up {
                reported.event = Some((Event::MachineReady, Facts::default()));
            }
        }
        RunnerEventKind::Phase { phase } => reported
            .events
            .push(SessionEventKind::Phase { phase: *phase }),
        RunnerEventKind::Agent { event } => code = agent(event, &mut reported),
        RunnerEventKind::Egress {
            host,
            port,
            reason,
            count,
        } => {
            let (host, port, reason, count) = (cut(host), *port, *reason, *count);
            reported.events.push(SessionEventKind::EgressRefused {
                host,
                port,
                reason,
                count,
            });
        }
        RunnerEventKind::Viewers { count } => reported
            .events
            .push(SessionEventKind::Viewers { count: *count }),
        RunnerEventKind::FirstFrame => reported.events.push(SessionEventKind::FirstFrame),
        RunnerEventKind::Failed { finding } => {
            reported.failure = Some(finding.clone());
            reported.event = Some((Event::MachineFailed, failed(finding.clone())));
        }
        RunnerEventKind::Ended { exit } => {
            reported.event = Some((Event::MachineFailed, failed(ended(exit))));
        }
    }
    (reported, code)
}

/// The agent, whose clock ends a sign-in, does not see viewers: with nobody there, its *deadline* is a person who left.
pub(super) fn unwatched(reported: &mut Reported) {
    if let Some((Event::LoginFailed, facts)) = &mut reported.event
        && let Some(told) = facts.finding.take_if(|told| told.cause == Cause::Deadline)
    {
        let quote = Quote {
            source: "events".to_owned(),
            line: None,
            text: told.why,
        };
        let left = told
            .evidence
            .into_iter()
            .fold(person_left(quote), Finding::and);
        facts.finding = Some(left);
    }
}

fn failed(finding: Finding) -> Facts {
    Facts::from(finding)
}

fn agent(event: &AgentEvent, reported: &mut Reported) -> Option<String> {
    match event {
        AgentEvent::Starting { waiting_for } => {
            let waiting_for = waiting_for.iter().take(32).map(|what| cut(what)).collect();
            reported
                .events
                .push(SessionEventKind::Waiting { waiting_for });
        }
        AgentEvent::BrowserRestarted => reported.events.push(SessionEventKind::BrowserRestarted),
        AgentEvent::Login { event } => return login(event, reported),
        // The runner's own phases say the first two; units stand in the report.
        AgentEvent::Painted { .. } | AgentEvent::Ready { .. } | AgentEvent::Unit { .. } => {}
    }
    None
}

fn login(event: &LoginEvent, reported: &mut Reported) -> Option<String> {
    let events = &mut reported.events;
    match event {
        LoginEvent::Started { .. } => {
            reported.event = Some((Event::LoginStarted, Facts::default()));
        }
        LoginEvent::UrlCaptured { host, path, .. } => {
            events.push(SessionEventKind::UrlOpened {
                host: cut(host),
                path: cut(path),
            });
        }
        LoginEvent::UrlRefused { host, why, .. } => {
            events.push(SessionEventKind::UrlRefused {
                host: cut(host),
                why: cut(why),
            });
        }
        LoginEvent::UserCode { code } => {
            events.push(SessionEventKind::UserCode {
                code: String::new(),
            });
            return Some(cut(code));
        }
        LoginEvent::CredentialPartial { rule, why } => {
            events.push(SessionEventKind::CredentialPartial {
                rule: cut(rule),
                why: cut(why),
            });
        }
        LoginEvent::Captured { account, .. } => {
            let account = account.as_deref().map(cut);
            reported.event = Some((
                Event::CredentialComplete,
                Facts {
                    account,
                    ..Facts::default()
                },
            ));
        }
        LoginEvent::Failed { finding } => {
            reported.event = Some((Event::LoginFailed, failed(finding.clone())));
        }
        LoginEvent::BrowserOpened => events.push(SessionEventKind::BrowserNavigated),
        LoginEvent::Prompted { .. } | LoginEvent::CallbackReached | LoginEvent::Cancelled => {}
    }
    None
}

/// What a guest says is shown to people and kept: it is bounded.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(500).collect()
}

/// The VM ended and its runner named no cause.
fn ended(exit: &Exit) -> Finding {
    let text = match (exit.code, exit.signal) {
        (_, Some(signal)) => format!("the VMM was ended by signal {signal}"),
        (Some(code), None) => format!("the VMM ended with status {code}"),
        (None, None) => "the VMM ended".to_owned(),
    };
    let quote = Quote {
        source: "vmm".to_owned(),
        line: None,
        text,
    };
    let why = if exit.asked {
        "somebody stopped the VM while its session went on"
    } else {
        "the VM ended by itself"
    };
    Finding::new(
        Cause::VmmExited,
        quote,
        why,
        "start the sign-in again; read serial.log and vmm.log in the evidence",
    )
    .refuted_by("the runner's events go on")
    .retryable()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_code_is_not_for_the_database() {
        let code = "ABCD-1234".to_owned();
        let event = AgentEvent::Login {
            event: LoginEvent::UserCode { code },
        };
        let (reported, code) = read(&RunnerEventKind::Agent { event });
        assert_eq!(code.as_deref(), Some("ABCD-1234"));
        assert!(!format!("{reported:?}").contains("ABCD"));
    }

    #[test]
    fn a_deadline_with_nobody_there_is_a_person_who_left() {
        for (cause, expected) in [
            (Cause::Deadline, Cause::PersonLeft),
            (Cause::UrlNotCaptured, Cause::UrlNotCaptured),
        ] {
            let quote = Quote {
                source: "terminal".to_owned(),
                line: None,
                text: "Waiting…".to_owned(),
            };
            let event = AgentEvent::Login {
                event: LoginEvent::Failed {
                    finding: Finding::new(cause, quote, "over (895 s)", "again"),
                },
            };
            let (mut reported, _) = read(&RunnerEventKind::Agent { event });
            unwatched(&mut reported);
            let finding = reported.event.unwrap().1.finding.unwrap();
            assert_eq!(finding.cause, expected);
            assert_eq!(finding.evidence.last().unwrap().text, "Waiting…");
        }
    }

    #[test]
    fn only_up_makes_a_session_ready_and_an_end_fails_it() {
        let state = |state| {
            read(&RunnerEventKind::State {
                state,
                generation: 1,
            })
            .0
            .event
            .map(|(event, _)| event)
        };
        assert_eq!(state(MachineState::Up), Some(Event::MachineReady));
        assert_eq!(state(MachineState::Booting), None);
        let (reported, _) = read(&RunnerEventKind::Ended {
            exit: Exit {
                signal: Some(9),
                ..Exit::default()
            },
        });
        let (event, facts) = reported.event.unwrap();
        assert_eq!(
            (event, facts.finding.unwrap().cause),
            (Event::MachineFailed, Cause::VmmExited)
        );
    }
}
