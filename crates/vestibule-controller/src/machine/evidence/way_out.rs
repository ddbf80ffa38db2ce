//! A sign-in that failed because its VM's way out refused, or did not reach, what it needed.
use vestibule_api::{
    cause::Cause,
    egress::EgressReason,
    finding::{Finding, Quote, Verdict},
    session::{SessionEvent, SessionEventKind},
};

/// Ends that say little of why.
const VAGUE: [Cause; 4] = [
    Cause::Deadline,
    Cause::UrlNotCaptured,
    Cause::ToolFailed,
    Cause::TokenEndpointFailed,
];

/// `told`, or what the way out did where that explains it: a page that never came, a tool that gave up.
///
/// Browsers and tools ask for much that no sign-in needs, so only a host counts to which the sign-in's own page led, or that
/// the tool named in what it said last.
pub(super) fn explained(told: Verdict, events: &[SessionEvent]) -> Verdict {
    let Some(own) = &told.finding else {
        return told;
    };
    let newest_first = events.iter().rev();
    let mut refusals = newest_first.filter_map(|event| {
        let SessionEventKind::EgressRefused {
            host,
            port,
            reason,
            count,
        } = &event.event
        else {
            return None;
        };
        let needed = needed(host, own, events);
        needed
            .then(|| finding(own, host, *port, *reason, *count))
            .flatten()
    });
    let Some(found) = refusals.next() else {
        return told;
    };
    let mut also = vec![own.clone()];
    also.extend(told.also);
    Verdict {
        finding: Some(found),
        also,
        ..told
    }
}

fn needed(host: &str, own: &Finding, events: &[SessionEvent]) -> bool {
    let opened = |event: &SessionEvent| matches!(&event.event, SessionEventKind::UrlOpened { host: page, .. } if page == host);
    own.evidence.iter().any(|quote| quote.text.contains(host)) || events.iter().any(opened)
}

fn finding(
    own: &Finding,
    host: &str,
    port: u16,
    reason: EgressReason,
    count: u64,
) -> Option<Finding> {
    let (cause, happened, fix) = match reason {
        EgressReason::Policy
        | EgressReason::Loopback
        | EgressReason::Private
        | EgressReason::LinkLocal
        | EgressReason::NotGlobal => (
            Cause::EgressRefused,
            "is not one that the VM may reach",
            "allow the host in the pack (`egress.hosts`) or the configuration, if the sign-in needs it; a private address needs a pin",
        ),
        EgressReason::NameNotFound => (
            Cause::NameNotFound,
            "has no address",
            "correct the name, or the resolver of the machine that runs the VM",
        ),
        EgressReason::Unreachable => (
            Cause::EgressUnreachable,
            "was not reached",
            "start the sign-in again; look at the way out of the machine that runs the VM",
        ),
        EgressReason::Tls => (
            Cause::TlsFailed,
            "did not prove to be itself",
            "look for a proxy that intercepts TLS, and name its authority in `egress.extra_ca`",
        ),
        EgressReason::BadRequest | EgressReason::TooMany => return None,
    };
    let again = cause == Cause::EgressUnreachable;
    // Of a person who left: what answers a moment later is no reason to leave.
    if !(VAGUE.contains(&own.cause) || own.cause == Cause::PersonLeft && !again) {
        return None;
    }
    let quote = Quote {
        source: "events".to_owned(),
        line: None,
        text: format!("egress-refused {host}:{port} {reason:?}, {count} times"),
    };
    let why = format!("{host}, which the sign-in needs, {happened}");
    let found = Finding::new(cause, quote, why, fix)
        .refuted_by("a connection to the same host in the same session");
    Some(if again { found.retryable() } else { found })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::time::Timestamp;

    fn story(host: &str, reason: EgressReason) -> Vec<SessionEvent> {
        let page = SessionEventKind::UrlOpened {
            host: "login.test".to_owned(),
            path: "/".to_owned(),
        };
        let refused = SessionEventKind::EgressRefused {
            host: host.to_owned(),
            port: 443,
            reason,
            count: 3,
        };
        let event = |event| SessionEvent {
            seq: 1,
            at: Timestamp::now(),
            event,
        };
        vec![event(page), event(refused)]
    }

    fn cause(own: Cause, said: &str, events: &[SessionEvent]) -> Cause {
        let quote = Quote {
            source: "terminal".to_owned(),
            line: None,
            text: said.to_owned(),
        };
        let told = Verdict::of(Finding::new(own, quote, "why", "fix"), Vec::new());
        let verdict = explained(told, events);
        let cause = verdict.finding.unwrap().cause;
        assert_eq!(cause != own, verdict.also.iter().any(|f| f.cause == own));
        cause
    }

    #[test]
    fn only_what_the_sign_in_needed_explains_its_end() {
        let page = story("login.test", EgressReason::Policy);
        assert_eq!(cause(Cause::Deadline, "", &page), Cause::EgressRefused);
        assert_eq!(cause(Cause::PersonLeft, "", &page), Cause::EgressRefused);
        assert_eq!(
            cause(Cause::ConsentDenied, "", &page),
            Cause::ConsentDenied,
            "it says enough itself"
        );
        let other = story("metrics.test", EgressReason::Policy);
        assert_eq!(cause(Cause::Deadline, "", &other), Cause::Deadline);
        let said = "request to https://api.test/token failed";
        for (reason, expected) in [
            (EgressReason::NameNotFound, Cause::NameNotFound),
            (EgressReason::Unreachable, Cause::EgressUnreachable),
            (EgressReason::Tls, Cause::TlsFailed),
            (EgressReason::Private, Cause::EgressRefused),
            (EgressReason::TooMany, Cause::ToolFailed),
        ] {
            let events = story("api.test", reason);
            assert_eq!(cause(Cause::ToolFailed, said, &events), expected);
            assert_eq!(
                cause(Cause::ToolFailed, "exit 1", &events),
                Cause::ToolFailed
            );
        }
        let once = story("login.test", EgressReason::Unreachable);
        assert_eq!(cause(Cause::PersonLeft, "", &once), Cause::PersonLeft);
    }
}
