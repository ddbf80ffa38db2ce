//! What a guest may say by way of its runner, for tests and for the fuzzer (`fuzz/`): what is kept of it is short, and fits a column
//! of any database.
use super::{
    login, report,
    report::{TEXT_LIMIT, cut},
};
use crate::state::Event;
use vestibule_api::{
    client::CallError,
    machine::{RunnerEvent, RunnerEventKind},
    session::SessionEventKind,
};

/// All that is kept of one event has fewer bytes, as JSON.
const KEPT_LIMIT: usize = 128 << 10;

/// Reads a line of a runner's events.
///
/// # Panics
/// When what a guest said is kept as it is.
pub fn take_in(line: &[u8], watched: bool) {
    let Ok(line) = serde_json::from_slice::<RunnerEvent>(line) else {
        return;
    };
    let (mut reported, code) = report::read(&line.event);
    if !matches!(line.event, RunnerEventKind::Agent { .. }) {
        // A runner is the host's own, and bounds its findings itself.
        return;
    }
    if !watched {
        report::unwatched(&mut reported);
    }
    let (event, facts) = reported.event.clone().unzip();
    let facts = facts.unwrap_or_default();
    let code_is_kept = |kind: &SessionEventKind| matches!(kind, SessionEventKind::UserCode { code } if !code.is_empty());
    assert!(!reported.events.iter().any(code_is_kept));
    let short = |text: &String| *text == cut(text) && text.chars().count() <= TEXT_LIMIT;
    assert!(facts.account.iter().chain(&code).all(short));
    let kept = serde_json::to_vec(&(&reported.events, &facts.finding, &reported.failure));
    let kept = kept.expect("what is kept can be written");
    assert!(kept.len() < KEPT_LIMIT, "{} bytes", kept.len());
    if let (Some(Event::LoginFailed), Some(finding)) = (event, &facts.finding) {
        assert_eq!(finding.stage, finding.cause.stage());
        let control = |c: char| c.is_control() && c != '\n';
        let mut texts = finding
            .evidence
            .iter()
            .flat_map(|quote| [&quote.source, &quote.text]);
        assert!(!texts.any(|text| text.contains(control)));
        assert!(
            ![&finding.why, &finding.fix, &finding.refutes]
                .iter()
                .any(|text| text.contains(control))
        );
    }
}

/// Reads the body of an agent's refusal.
pub fn refuse(body: &str) {
    let cause = login::cause_of(&CallError::Status {
        what: "POST /agent/login".to_owned(),
        status: hyper::StatusCode::BAD_REQUEST,
        text: body.to_owned(),
    });
    assert!(!cause.to_string().is_empty());
}
