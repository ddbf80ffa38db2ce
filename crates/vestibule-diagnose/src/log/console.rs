//! A serial console: kernel lines, PID 1's status lines, and what programs print between them.
use super::{Line, Speaker};
use crate::text::strip_terminal;
use std::rc::Rc;

/// Bytes of one line that are looked at.
const WIDTH_LIMIT: usize = 8_192;

/// Words in the brackets of PID 1's status lines.
const STATUS: [&str; 6] = ["OK", "FAILED", "DEPEND", "TIME", "ASSERT", "INFO"];

/// Lines that look bad and stop nothing; none of them is ever evidence for a cause.
const HARMLESS: [&str; 14] = [
    "Failed to enable 64-bit or 32-bit DMA",
    "Unable to open unknown-block",
    "fail to add MMCONFIG information",
    "Marking TSC unstable",
    "TSC found unstable after boot",
    "spectre",
    "Spectre",
    "Unknown kernel command line parameters",
    "PCI: Fatal: No config space access function found",
    "is marked executable. Please remove executable permission bits",
    "is marked world-writable",
    "Cannot find a map file",
    "EXT4-fs (vda): warning: mounting fs with errors, running e2fsck is recommended",
    "Unknown key",
];

/// Whether a line is one of them.
pub(super) fn is_harmless(text: &str) -> bool {
    HARMLESS.iter().any(|h| text.contains(h))
}

/// Splits a console into lines; at most `limit`, the last ones.
pub(super) fn lines(bytes: &[u8], limit: usize) -> Vec<Line> {
    let source: Rc<str> = Rc::from("serial");
    let total = bytes.iter().filter(|b| **b == b'\n').count();
    let skip = total.saturating_sub(limit);
    (1_u64..)
        .zip(bytes.split(|b| *b == b'\n'))
        .skip(skip)
        .filter_map(|(number, raw)| {
            let raw = raw.get(..raw.len().min(WIDTH_LIMIT)).unwrap_or_default();
            let text = strip_terminal(&String::from_utf8_lossy(raw));
            (!text.trim().is_empty()).then(|| line(&source, number, text.trim_end()))
        })
        .collect()
}

/// The lines of the last boot, where it came as far as PID 1; all lines where it did not, because then an earlier boot may say
/// why. A console keeps every boot of a VM that was reset.
pub(super) fn last_boot(mut lines: Vec<Line>) -> Vec<Line> {
    let is_first = |l: &Line| {
        l.speaker == Speaker::Kernel
            && l.at.is_some_and(|at| at < 0.001)
            && l.text.starts_with("Linux version ")
    };
    let from = lines.iter().rposition(is_first).unwrap_or(0);
    let came_up = lines
        .iter()
        .skip(from)
        .any(|l| l.speaker == Speaker::Manager);
    if came_up {
        lines.drain(..from);
    }
    lines
}

fn line(source: &Rc<str>, number: u64, text: &str) -> Line {
    let (at, rest) = timestamp(text);
    let (speaker, rest) = match (at, rest) {
        (Some(_), rest) => match program(rest) {
            Some(("systemd", message)) => (Speaker::Manager, message.to_owned()),
            Some((_, _)) => (Speaker::Program, rest.to_owned()),
            None => (Speaker::Kernel, rest.to_owned()),
        },
        (None, rest) => match status(rest) {
            Some(message) => (Speaker::Manager, message),
            None => (Speaker::Anonymous, rest.to_owned()),
        },
    };
    Line {
        source: Rc::clone(source),
        number,
        at,
        speaker,
        unit: None,
        pid: None,
        harmless: is_harmless(&rest),
        stopping: false,
        text: rest,
    }
}

/// `[   12.345678] text`, also in the middle of a line that a program began.
fn timestamp(text: &str) -> (Option<f64>, &str) {
    let mut from: usize = 0;
    while let Some(open) = text.get(from..).and_then(|t| t.find('[')) {
        let start = from.saturating_add(open);
        let inner = text.get(start.saturating_add(1)..).unwrap_or_default();
        if let Some((number, rest)) = inner.split_once(']')
            && number.len() < 20
            && number.contains('.')
            && let Ok(seconds) = number.trim().parse::<f64>()
        {
            return (Some(seconds), rest.trim_start());
        }
        from = start.saturating_add(1);
    }
    (None, text)
}

/// `name[pid]: text`.
fn program(text: &str) -> Option<(&str, &str)> {
    let (head, message) = text.split_once("]: ")?;
    let (name, pid) = head.split_once('[')?;
    let ok = !name.is_empty()
        && name.len() < 64
        && !name.contains(' ')
        && pid.chars().all(|c| c.is_ascii_digit());
    ok.then_some((name, message))
}

/// `[  OK  ] Started x` and `         Starting x`, as the message that PID 1 logs.
fn status(text: &str) -> Option<String> {
    for (index, _) in text.match_indices('[') {
        let Some((word, rest)) = text
            .get(index.saturating_add(1)..)
            .and_then(|t| t.split_once(']'))
        else {
            continue;
        };
        if STATUS.contains(&word.trim()) {
            return Some(rest.trim().to_owned());
        }
        // The animation before a job that runs: `[  *** ] (1 of 2) Job x/start running (17s / 1min 44s)`.
        let animated = word.len() <= 6 && word.chars().all(|c| matches!(c, '*' | ' '));
        if animated && !word.trim().is_empty() {
            return Some(rest.trim().to_owned());
        }
    }
    let trimmed = text.trim_start_matches('M').trim();
    let indented = text.starts_with("         ");
    let verbs = [
        "Starting ",
        "Stopping ",
        "Mounting ",
        "Unmounting ",
        "Expecting ",
        "Activating swap ",
    ];
    (indented && verbs.iter().any(|v| trimmed.starts_with(v))).then(|| trimmed.to_owned())
}

/// A job that PID 1 reports as still running.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RunningJob {
    /// Unit or description, perhaps with its middle cut out.
    pub what: String,
    pub seconds: f64,
    /// `infinity` where PID 1 says that there is none.
    pub limit: f64,
}

/// Reads `A start job is running for X (17s / 1min 30s)` and `Job X/start running (17s / no limit)`.
pub(crate) fn running_job(text: &str) -> Option<RunningJob> {
    let (what, rest) = match text.split_once("start job is running for ") {
        Some((_, rest)) => rest.rsplit_once(" (")?,
        None => {
            let (_, rest) = text.split_once("Job ")?;
            let (what, rest) = rest.rsplit_once(" (")?;
            let what = what.strip_suffix(" running")?;
            (what.strip_suffix("/start").unwrap_or(what), rest)
        }
    };
    let (now, limit) = rest.split_once(')')?.0.split_once(" / ")?;
    let limit = if limit == "no limit" {
        f64::INFINITY
    } else {
        crate::text::seconds(limit)?
    };
    Some(RunningJob {
        what: what.to_owned(),
        seconds: crate::text::seconds(now)?,
        limit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_know_their_speaker() {
        let text = b"[    1.5] Linux version 6.1\r\n[    2.0] systemd[1]: Hostname set\n\x1b[0;32m[  OK  ]\x1b[0m Started x.service - X.\n\
            -- Press any key to proceed --[   42.9] systemd[1]: Started j\n         Starting y.service...\ngave up\n";
        let lines = lines(text, 100);
        let got: Vec<_> = lines
            .iter()
            .map(|l| (l.speaker, l.text.as_str(), l.number))
            .collect();
        assert_eq!(
            got,
            [
                (Speaker::Kernel, "Linux version 6.1", 1),
                (Speaker::Manager, "Hostname set", 2),
                (Speaker::Manager, "Started x.service - X.", 3),
                (Speaker::Manager, "Started j", 4),
                (Speaker::Manager, "Starting y.service...", 5),
                (Speaker::Anonymous, "gave up", 6),
            ]
        );
    }

    #[test]
    fn running_jobs() {
        let job = running_job(
            "(1 of 2) Job systemd-networkd.service/start running (1min 16s / 2min 16s)",
        )
        .unwrap();
        assert_eq!(
            (job.what.as_str(), job.seconds, job.limit),
            ("systemd-networkd.service", 76.0, 136.0)
        );
        let job = running_job(
            "A start job is running for Wait for Network to be Configured (12s / no limit)",
        )
        .unwrap();
        assert_eq!(
            (job.what.as_str(), job.limit),
            ("Wait for Network to be Configured", f64::INFINITY)
        );
        assert_eq!(running_job("Job x"), None);
    }
}
