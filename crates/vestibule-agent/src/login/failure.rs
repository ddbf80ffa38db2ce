//! Findings of a sign-in: each with the line that proves it, and nothing secret in it.
use super::screen::Failure;
use crate::terminal::redact;
use std::process::ExitStatus;
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
};

/// So many of the terminal's last lines are quoted.
const LAST_LINES: usize = 6;
/// A quote is cut to so many characters.
const QUOTE_LIMIT: usize = 600;

fn quote(source: &str, text: &str) -> Quote {
    Quote {
        source: source.to_owned(),
        line: None,
        text: redact(text).chars().take(QUOTE_LIMIT).collect(),
    }
}

/// How runtimes begin what they say when a program crashed: Node and V8, Go, Rust, Python. What comes last is their stack.
const CRASHES: [&str; 5] = [
    "fatal error",
    "check failed:",
    "panicked at",
    "panic:",
    "traceback (most recent call last)",
];
/// How far from the end that is looked for.
const CRASH_LINES: usize = 80;

/// The last lines of `transcript` that are not empty, or the first ones of a crash that is near the end.
fn tail(transcript: &str) -> Quote {
    let lines: Vec<_> = transcript
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = lines.len().saturating_sub(LAST_LINES);
    let crash = lines
        .iter()
        .enumerate()
        .skip(lines.len().saturating_sub(CRASH_LINES))
        .find(|(_, line)| {
            let line = line.to_lowercase();
            CRASHES.iter().any(|begins| line.contains(begins))
        });
    let from = crash.map_or(last, |(at, _)| at);
    let text = if lines.is_empty() {
        "(the terminal is empty)".to_owned()
    } else {
        lines[from..lines.len().min(from + LAST_LINES)].join("\n")
    };
    quote("terminal", &text)
}

/// What the tool itself said.
pub(super) fn said(failure: &Failure) -> Finding {
    let finding = Finding::new(
        failure.cause,
        quote(&failure.source, &failure.line),
        format!("the tool said so: {}", failure.cause.meaning()),
        fix(failure.cause),
    )
    .refuted_by("the same line in the terminal of a sign-in that completed");
    if failure.cause == Cause::ConsentDenied {
        finding
    } else {
        finding.retryable()
    }
}

/// The tool ended without having done its work.
pub(super) fn ended(
    status: ExitStatus,
    transcript: &str,
    partial: Option<&(String, String)>,
) -> Finding {
    let partial = partial.map(|(rule, why)| format!("the file of `{rule}`: {why}"));
    if let (true, Some(partial)) = (status.success(), &partial) {
        return invalid(partial).and(tail(transcript));
    }
    if let (false, Some(line)) = (status.success(), wants_terminal(transcript)) {
        let cause = Cause::ToolNeedsTerminal;
        let why =
            format!("the tool ended ({status}) and says that what it was given is no terminal");
        return Finding::new(cause, quote("terminal", line), why, fix(cause))
            .and(tail(transcript))
            .refuted_by("the same line in the terminal of a sign-in that completed");
    }
    let how = match status.code() {
        Some(0) => "the tool ended as if all were well, and left no credential where the pack says"
            .to_owned(),
        Some(code) => format!("the tool ended with status {code}"),
        None => format!("the tool was ended: {status}"),
    };
    let cause = if status.success() {
        Cause::CredentialMoved
    } else {
        Cause::ToolFailed
    };
    let finding = Finding::new(cause, tail(transcript), how, fix(cause))
        .refuted_by("a complete credential file that is newer than the sign-in")
        .retryable();
    match partial {
        // It was ended in the middle of its work.
        Some(partial) => finding.and(quote("credential", &partial)),
        None => finding,
    }
}

/// What tools and the C library say where they found no terminal; in lower case.
const NO_TERMINAL: [&str; 12] = [
    "inappropriate ioctl for device",
    "is not a tty",
    "not a tty",
    "is not a terminal",
    "requires a tty",
    "requires a terminal",
    "requires an interactive terminal",
    "needs a terminal",
    "must be run in a terminal",
    "no tty present",
    "not running interactively",
    "raw mode is not supported",
];

/// The line among the last ones in which the tool says that it has no terminal.
fn wants_terminal(transcript: &str) -> Option<&str> {
    let last = transcript
        .lines()
        .rev()
        .filter(|line| !line.trim().is_empty());
    last.take(LAST_LINES).find(|line| {
        let line = line.to_lowercase();
        NO_TERMINAL.iter().any(|text| line.contains(text))
    })
}

/// The redirect leads to a port of this guest on which nobody listens any more, and to which nobody ever connected.
pub(super) fn unreached(port: u16, transcript: &str) -> Finding {
    let observed = format!(
        "nothing listens on port {port}, where the redirect leads, and nobody has connected to it"
    );
    let cause = Cause::CallbackNotReached;
    Finding::new(
        cause,
        quote("sockets", &observed),
        cause.meaning(),
        fix(cause),
    )
    .and(tail(transcript))
    .refuted_by("a connection to that port in the guest, or a tool that still listens on it")
    .retryable()
}

/// A credential file that will not do.
pub(super) fn invalid(why: &str) -> Finding {
    Finding::new(
        Cause::CredentialInvalid,
        quote("credential", why),
        Cause::CredentialInvalid.meaning(),
        fix(Cause::CredentialInvalid),
    )
    .refuted_by("the file parses and has every value that the pack requires")
    .retryable()
}

/// Time is over.
pub(super) fn deadline(
    seconds: u32,
    opened: bool,
    wants_url: bool,
    refused: Option<&str>,
    transcript: &str,
) -> Finding {
    let cause = if wants_url && !opened {
        Cause::UrlNotCaptured
    } else {
        Cause::Deadline
    };
    let why = format!("{} ({seconds} s)", cause.meaning());
    let finding = Finding::new(cause, tail(transcript), why, fix(cause)).retryable();
    match refused {
        Some(refused) => finding.and(quote("shim", refused)),
        None => finding,
    }
}

/// A finding whose proof is one line of the agent's own observation.
pub(crate) fn observed(cause: Cause, source: &str, line: &str) -> Finding {
    let finding = Finding::new(cause, quote(source, line), cause.meaning(), fix(cause));
    if cause == Cause::ConsentDenied {
        finding
    } else {
        finding.retryable()
    }
}

/// What a person or an operator does next.
fn fix(cause: Cause) -> &'static str {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a pack may name any cause; most concern the VM, not the person"
    )]
    match cause {
        Cause::ConsentDenied => "sign in again and allow the access that the page asks for",
        Cause::StateMismatch => {
            "sign in again, in one window; the redirect belonged to another attempt"
        }
        Cause::CodeExpired | Cause::Deadline => "sign in again, without a long pause",
        Cause::UrlNotCaptured => {
            "look at the terminal; if the tool changed its wording, the provider pack needs a new version"
        }
        Cause::CredentialMoved => {
            "compare the pack's credential paths with what this version of the tool writes"
        }
        Cause::PackIncompatible => {
            "make pack and provider agree where the quoted line says; `hosts` of `[providers.<id>]` names further hosts"
        }
        Cause::CredentialInvalid => {
            "sign in again; if it stays, compare the pack's required values with the tool's file"
        }
        Cause::TokenEndpointFailed | Cause::EgressUnreachable => {
            "try again; if it stays, look at the provider's status and the egress events"
        }
        Cause::EgressRefused => {
            "allow the host in the egress policy, or choose a provider that does not need it"
        }
        Cause::ToolNeedsTerminal => {
            "let the pack's `argv` run the tool itself, with nothing between it and its input and output"
        }
        Cause::CallbackNotReached => {
            "look at the terminal for why the tool stopped listening, and sign in again"
        }
        Cause::BrowserMissing => "use an image with a browser",
        Cause::BrowserNotReady => "try again; the report names the browser's unit and its state",
        _ => "read the terminal's last lines, and try again",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn quotes_hold_no_secrets() {
        let transcript = "start\n\n\nopening https://idp.test/cb?code=SECRET&state=S\ntoken: gho_SECRETSECRET1234\nfailed\n";
        let finding = ended(ExitStatus::from_raw(0x100), transcript, None);
        assert_eq!(finding.cause, Cause::ToolFailed);
        assert_eq!(
            finding.evidence[0].text,
            "start\nopening https://idp.test/cb?[…]\ntoken: […]\nfailed"
        );
    }

    #[test]
    fn the_end_of_a_tool_has_three_meanings() {
        assert_eq!(
            ended(ExitStatus::from_raw(0), "done", None).cause,
            Cause::CredentialMoved
        );
        assert_eq!(
            ended(ExitStatus::from_raw(9), "", None).evidence[0].text,
            "(the terminal is empty)"
        );
        let partial = ("auth".to_owned(), "the file is empty".to_owned());
        assert_eq!(
            ended(ExitStatus::from_raw(0), "", Some(&partial)).cause,
            Cause::CredentialInvalid
        );
    }

    #[test]
    fn a_terminal_that_is_missed_long_before_the_end_is_not_why() {
        let long_ago = format!(
            "warning: stdin is not a terminal\n{}failed\n",
            "more\n".repeat(LAST_LINES)
        );
        assert_eq!(
            ended(ExitStatus::from_raw(0x100), &long_ago, None).cause,
            Cause::ToolFailed
        );
        let said = ended(
            ExitStatus::from_raw(0x100),
            "Error: stdin is not a terminal\n",
            None,
        );
        assert_eq!(said.cause, Cause::ToolNeedsTerminal);
        assert!(!said.retryable);
        // What went well did not need one.
        assert_eq!(
            ended(ExitStatus::from_raw(0), "stdin is not a terminal", None).cause,
            Cause::CredentialMoved
        );
    }

    #[test]
    fn a_crash_is_no_credential_that_will_not_do() {
        let stack: String = (1..20)
            .map(|n| format!(" {n}: 0xf19048 [node]\n"))
            .collect();
        let said = format!(
            "Opening your browser\n\n# Fatal error in , line 0\n# Check failed: x.\n{stack}"
        );
        let partial = (
            "accounts".to_owned(),
            "it has no value at `/active`".to_owned(),
        );
        let finding = ended(ExitStatus::from_raw(0x100), &said, Some(&partial));
        assert_eq!(finding.cause, Cause::ToolFailed);
        let quoted: Vec<_> = finding
            .evidence
            .iter()
            .map(|quote| quote.text.as_str())
            .collect();
        assert!(
            quoted[0].starts_with("# Fatal error in , line 0\n# Check failed: x.\n 1: "),
            "{quoted:?}"
        );
        assert_eq!(
            quoted[1],
            "the file of `accounts`: it has no value at `/active`"
        );
        // A crash long before is not why the tool ended.
        let later = format!("{said}{}last\n", "more\n".repeat(CRASH_LINES));
        assert!(tail(&later).text.ends_with("more\nlast"));
    }

    #[test]
    fn a_deadline_without_a_page_is_another_cause() {
        assert_eq!(
            deadline(60, false, true, None, "x").cause,
            Cause::UrlNotCaptured
        );
        assert_eq!(deadline(60, true, true, None, "x").cause, Cause::Deadline);
        assert_eq!(
            deadline(60, false, true, Some("its host `evil.test` …"), "x")
                .evidence
                .len(),
            2
        );
    }
}
