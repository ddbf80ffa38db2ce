//! What the log says of one unit: whether its job was seen, how its process ended, what it printed.
use super::{Line, Log, Speaker};
use crate::text::ellipsized;

/// The lines about one unit, in the words of PID 1.
#[derive(Clone, Debug)]
pub struct UnitLog<'a> {
    pub name: String,
    pub description: Option<String>,
    /// PID 1 about the unit.
    pub manager: Vec<&'a Line>,
    /// The unit's own processes.
    pub own: Vec<&'a Line>,
}

impl<'a> UnitLog<'a> {
    /// Collects the lines about `name`.
    pub fn new(log: &'a Log, name: &str, description: Option<&str>) -> Self {
        let full = description.map(|d| format!("{name} - {d}"));
        let colon = format!("{name}: ");
        let mut out = Self {
            name: name.to_owned(),
            description: description.map(str::to_owned),
            manager: Vec::new(),
            own: Vec::new(),
        };
        for line in log.lines.iter().filter(|l| !l.stopping) {
            let named = || {
                line.text.starts_with(&colon)
                    || is_subject(&line.text, name, full.as_deref(), description)
            };
            match line.speaker {
                Speaker::Manager if line.unit.as_deref() == Some(name) || named() => {
                    out.manager.push(line);
                }
                // A forked child speaks with PID 1's voice before it executes: `Failed at step EXEC …`.
                Speaker::Program if line.text.starts_with(&colon) => out.manager.push(line),
                Speaker::Program if line.unit.as_deref() == Some(name) => out.own.push(line),
                Speaker::Program | Speaker::Manager | Speaker::Kernel | Speaker::Anonymous => {}
            }
        }
        out.keep_last_run();
        out
    }

    /// Drops the runs that ended before the one in which the program first said that it listens: systemd restarted it, and
    /// now it runs. Where a program said so and ended all the same, it will end again, and every run counts.
    fn keep_last_run(&mut self) {
        let Some(ready) = self.listens() else {
            return;
        };
        // A handful of sources; within each, lines are in order.
        let mut starts: Vec<(&str, u64)> = Vec::new();
        for line in self.manager.iter().filter(|l| is_start(&l.text)) {
            match starts
                .iter_mut()
                .find(|(source, _)| *source == &*line.source)
            {
                Some((_, number)) => *number = line.number,
                None => starts.push((&line.source, line.number)),
            }
        }
        let last_start = |source: &str| {
            let found = starts.iter().find(|(of, _)| *of == source);
            found.map_or(0, |(_, number)| *number)
        };
        let mut ends = self.manager.iter().filter(|l| is_end(&l.text)).peekable();
        let is_over = |end: &&Line| {
            end.number < last_start(&end.source)
                && (end.source != ready.source || end.number < ready.number)
        };
        if ends.peek().is_none() || !ends.all(is_over) {
            return;
        }
        let kept = |l: &&Line| l.number >= last_start(&l.source);
        let manager = self.manager.iter().copied().filter(kept).collect();
        let own = self.own.iter().copied().filter(kept).collect();
        (self.manager, self.own) = (manager, own);
    }

    /// The first line in which the program itself says that it listens.
    pub fn listens(&self) -> Option<&'a Line> {
        self.printed(says_listening)
    }

    /// Whether the log names the unit at all.
    pub fn is_empty(&self) -> bool {
        self.manager.is_empty() && self.own.is_empty()
    }

    /// The first line of PID 1 about the unit that contains `needle`.
    pub fn said(&self, needle: &str) -> Option<&'a Line> {
        self.manager
            .iter()
            .find(|l| l.text.contains(needle))
            .copied()
    }

    /// The first line of PID 1 about the unit that begins with `word`.
    pub fn began(&self, word: &str) -> Option<&'a Line> {
        self.manager
            .iter()
            .find(|l| l.text.starts_with(word))
            .copied()
    }

    /// The first line that the unit's own processes printed and `test` accepts.
    pub fn printed(&self, test: impl Fn(&str) -> bool) -> Option<&'a Line> {
        self.own.iter().find(|l| test(&l.text)).copied()
    }

    /// `Started …` or `Finished …`.
    pub fn started(&self) -> Option<&'a Line> {
        self.began("Started ").or_else(|| self.began("Finished "))
    }

    /// The `Starting …` line of a start that nothing shows to have ended, or to have been given up.
    pub fn open_start(&self) -> Option<&'a Line> {
        let over = |l: &&Line| {
            is_start(&l.text)
                || is_end(&l.text)
                || ["Stopping ", "Stopped "]
                    .iter()
                    .any(|v| l.text.starts_with(v))
        };
        let line = self.began("Starting ")?;
        (!self.manager.iter().any(over)).then_some(line)
    }

    /// A line that says that the unit, or a start of it, ended badly.
    pub fn ended_badly(&self) -> Option<&'a Line> {
        self.manager.iter().find(|l| is_bad(&l.text)).copied()
    }

    /// Whether it was seen to start and nothing bad was said of it.
    pub fn runs(&self) -> bool {
        self.started().is_some()
            && self.ended_badly().is_none()
            && self.said("Deactivated successfully").is_none()
    }

    /// Whether its own process said something and nothing bad was said of it: more than `Started` proves.
    pub fn speaks(&self) -> bool {
        !self.own.is_empty() && self.ended_badly().is_none()
    }
}

/// Whether PID 1 says that a unit, or a start of it, ended badly.
fn is_bad(text: &str) -> bool {
    const BAD: [&str; 9] = [
        "Failed with result",
        "Main process exited",
        "Control process exited",
        "Dependency failed for",
        "Failed to start",
        "Start request repeated too quickly",
        "Timed out starting",
        "asserts failed",
        "Assertion failed",
    ];
    BAD.iter().any(|m| text.contains(m))
}

/// Whether PID 1 says that a unit's start ended well.
fn is_start(text: &str) -> bool {
    text.starts_with("Started ") || text.starts_with("Finished ")
}

/// Whether PID 1 says that a unit ended, badly or well.
fn is_end(text: &str) -> bool {
    is_bad(text) || text.contains("Deactivated successfully")
}

/// Whether a program says that it listens.
fn says_listening(text: &str) -> bool {
    const SAYS: [&str; 6] = [
        "listening on",
        "listening at",
        "serving on",
        "serving at",
        "server running",
        "server started",
    ];
    let text = text.to_ascii_lowercase();
    let not = ["not listening", "stopped listening", "no longer listening"];
    SAYS.iter().any(|s| text.contains(s)) && !not.iter().any(|n| text.contains(n))
}

const VERBS: [&str; 10] = [
    "Started ",
    "Starting ",
    "Stopping ",
    "Finished ",
    "Failed to start ",
    "Dependency failed for ",
    "Timed out starting ",
    "Assertion failed for ",
    "Stopped ",
    "Reached target ",
];

/// Whether a status message is about a unit: by name, by `name - description`, or by either with its middle cut out.
fn is_subject(text: &str, name: &str, full: Option<&str>, description: Option<&str>) -> bool {
    if text
        .strip_prefix(name)
        .is_some_and(|r| r.starts_with(" - "))
    {
        return true;
    }
    let Some(rest) = VERBS.iter().find_map(|v| text.strip_prefix(v)) else {
        return false;
    };
    let rest = rest
        .strip_suffix("...")
        .or_else(|| rest.strip_suffix('.'))
        .unwrap_or(rest);
    if rest == name
        || rest
            .strip_prefix(name)
            .is_some_and(|r| r.starts_with(" - "))
    {
        return true;
    }
    if let Some(full) = full
        && rest.contains('…')
    {
        return ellipsized(rest, full);
    }
    description.is_some_and(|d| d == rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cut_names_on_a_console() {
        let mut log = Log::default();
        log.add_console(
            "[FAILED] Failed to start vm-browser…nt.service - VM Browser Agent.\n".as_bytes(),
        );
        let found = UnitLog::new(&log, "vm-browser-agent.service", Some("VM Browser Agent"));
        assert!(found.ended_badly().is_some() && !found.runs());
        assert!(UnitLog::new(&log, "vm-browser.service", Some("Other")).is_empty());
    }

    /// A journal of one unit, as an export: who said what, in order.
    fn journal(said: &[(&str, &str)]) -> Log {
        let mut export = String::new();
        for (number, (who, text)) in said.iter().enumerate() {
            let from = match *who {
                "systemd" => "_PID=1\nUNIT=a.service\nSYSLOG_IDENTIFIER=systemd".to_owned(),
                "logind" => "_PID=9\n_SYSTEMD_UNIT=systemd-logind.service".to_owned(),
                unit => format!("_PID=77\n_SYSTEMD_UNIT={unit}"),
            };
            export += &format!(
                "__MONOTONIC_TIMESTAMP={number}000000\n_BOOT_ID=1\n{from}\nMESSAGE={text}\n\n"
            );
        }
        let mut log = Log::default();
        log.add_journal(&crate::journal::Journal::parse(
            export.as_bytes(),
            "journal",
        ));
        log
    }

    #[test]
    fn a_run_that_the_power_off_ended_did_not_end() {
        let up = [
            ("systemd", "Started a.service - A."),
            ("a.service", "listening on 8080"),
        ];
        let off = [
            ("systemd", "Stopping a.service - A..."),
            ("systemd", "a.service: Failed with result 'timeout'."),
            ("systemd", "Stopped a.service - A."),
        ];
        for (mark, runs) in [
            (Some(("logind", "System is powering down.")), true),
            (
                Some((
                    "systemd",
                    "Stopped target multi-user.target - Multi-User System.",
                )),
                true,
            ),
            (
                Some(("systemd", "Received SIGRTMIN+4 from PID 900 (systemctl).")),
                true,
            ),
            (Some(("a.service", "System is powering down.")), false),
            (None, false),
        ] {
            let said: Vec<_> = up.into_iter().chain(mark).chain(off).collect();
            assert_eq!(
                UnitLog::new(&journal(&said), "a.service", None).runs(),
                runs,
                "{mark:?}"
            );
        }
    }

    #[test]
    fn a_run_that_listens_makes_up_for_those_before_it() {
        let crash = [
            ("systemd", "Started a.service."),
            ("a.service", "Error: EADDRINUSE"),
            (
                "systemd",
                "a.service: Main process exited, code=dumped, status=11/SEGV",
            ),
            (
                "systemd",
                "a.service: Scheduled restart job, restart counter is at 1.",
            ),
        ];
        let good = [
            ("systemd", "Started a.service."),
            ("a.service", "Listening on port 8080"),
        ];
        let end = [(
            "systemd",
            "a.service: Main process exited, code=dumped, status=11/SEGV",
        )];
        let runs = |said: &[(&str, &str)]| {
            let log = journal(said);
            let unit = UnitLog::new(&log, "a.service", None);
            (unit.runs(), unit.own.len())
        };
        assert_eq!(runs(&[&crash[..], &good].concat()), (true, 1));
        assert_eq!(runs(&[&crash[..], &good, &end].concat()), (false, 2));
        // It listened before, and ended; so it will again.
        assert_eq!(runs(&[&good[..], &end, &good].concat()), (false, 2));
        assert_eq!(runs(&[&crash[..], &good[..1]].concat()), (false, 1));
    }
}
