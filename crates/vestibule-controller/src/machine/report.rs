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
            reported.event = Some((Event::LoginFailed, failed(bounded(finding))));
        }
        LoginEvent::BrowserOpened => events.push(SessionEventKind::BrowserNavigated),
        LoginEvent::Prompted { .. } | LoginEvent::CallbackReached | LoginEvent::Cancelled => {}
    }
    None
}

/// What a guest says is shown to people, on terminals too, and kept, in columns that take no NUL: it is bounded, and one line.
pub(super) fn cut(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(TEXT_LIMIT).map(shown).collect()
}

/// Of a text that a guest says, so many characters.
pub(super) const TEXT_LIMIT: usize = 500;
/// Of a quote in its finding, which is some lines of a terminal.
const QUOTE_LIMIT: usize = 1000;
/// And so many quotes.
const QUOTES_LIMIT: usize = 16;

/// A guest's finding, bounded likewise.
fn bounded(finding: &Finding) -> Finding {
    let shown = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
    let quote = |quote: &Quote| Quote {
        source: cut(&quote.source),
        line: quote.line,
        text: quote.text.chars().take(QUOTE_LIMIT).map(shown).collect(),
    };
    Finding {
        cause: finding.cause,
        stage: finding.cause.stage(),
        unit: finding.unit.as_deref().map(cut),
        evidence: finding
            .evidence
            .iter()
            .take(QUOTES_LIMIT)
            .map(quote)
            .collect(),
        why: cut(&finding.why),
        fix: cut(&finding.fix),
        retryable: finding.retryable,
        refutes: cut(&finding.refutes),
    }
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
    use super::{super::hostile, *};
    use proptest::prelude::*;
    use serde_json::json;

    /// What an agent may say, with any text where one stands.
    fn any_event() -> impl Strategy<Value = AgentEvent> {
        let text = prop_oneof![
            any::<String>(),
            Just("\0\u{1b}[2Jx".to_owned()),
            (0_usize..3000).prop_map(|n| "ü\n".repeat(n))
        ];
        (0_usize..11, text, 0_usize..40).prop_map(|(which, text, count)| {
            let quote = json!({"source": text, "line": u64::MAX, "text": text});
            let login = match which {
                0 => json!({"step": "url-captured", "source": "shim", "host": text, "path": text}),
                1 => json!({"step": "url-refused", "source": "osc8", "host": text, "why": text}),
                2 => json!({"step": "user-code", "code": text}),
                3 => json!({"step": "credential-partial", "rule": text, "why": text}),
                4 => json!({"step": "captured", "account": text, "expiresAt": "9999-12-30T22:00:00Z"}),
                5 | 6 => json!({"step": "failed", "finding": {"cause": if which == 5 { "deadline" } else { "consent-denied" },
                    "stage": "no-boot", "unit": text, "evidence": vec![quote; count], "why": text, "fix": text, "retryable": true,
                    "refutes": text}}),
                7 => json!({"step": "browser-opened"}),
                8 => json!({"step": "cancelled"}),
                _ => json!(null),
            };
            let event = match which {
                9 => json!({"type": "starting", "waitingFor": vec![text; count]}),
                10 => json!({"type": "browser-restarted"}),
                _ => json!({"type": "login", "event": login}),
            };
            serde_json::from_value(event).unwrap()
        })
    }

    proptest! {
        /// Whatever a guest says, what is kept of it is short, and fits a column of any database.
        #[test]
        fn what_a_guest_says_is_bounded(event in any_event(), watched in any::<bool>()) {
            let line = json!({"seq": 1, "at": "2026-11-23T09:00:00Z", "event": {"type": "agent", "event": event}});
            hostile::take_in(line.to_string().as_bytes(), watched);
        }

        #[test]
        fn a_refusal_is_any_text(text in any::<String>(), cause in any::<String>()) {
            hostile::refuse(&text);
            hostile::refuse(&json!({"message": text, "cause": cause}).to_string());
        }
    }

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
