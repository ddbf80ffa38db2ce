//! One log out of many: the lines of a serial console and the entries of journals, in one shape.
//!
//! Both say the same things in the same words (PID 1 prints to the console what it writes to the journal), so that
//! every rule is one search. A line knows which source it came from, for the quote.
pub mod console;
pub mod run;

use crate::{journal::Journal, text};
use std::rc::Rc;
use vestibule_api::finding::Quote;

/// Who said a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaker {
    Kernel,
    /// PID 1, or its status lines on a console.
    Manager,
    /// A unit's process, or another program.
    Program,
    /// A console line that names nobody: an initramfs script, a prompt, a program writing to the terminal.
    Anonymous,
}

/// One line.
#[derive(Clone, Debug)]
pub struct Line {
    /// `serial`, `journal`, `journal:/var/log/…`.
    pub source: Rc<str>,
    /// From 1 in its source.
    pub number: u64,
    /// Seconds since boot, where the line says.
    pub at: Option<f64>,
    pub speaker: Speaker,
    /// The unit that a journal entry belongs to: `UNIT=` of PID 1's, `_SYSTEMD_UNIT=` of a process's.
    pub unit: Option<Rc<str>>,
    pub pid: Option<u32>,
    pub text: String,
    /// It looks bad and stops nothing: never evidence.
    pub harmless: bool,
    /// The guest was going down when it was said: what ends then was ended.
    pub stopping: bool,
}

impl Line {
    /// Quotes the line.
    pub fn quote(&self) -> Quote {
        Quote {
            source: self.source.to_string(),
            line: Some(self.number),
            text: text::shorten(&self.text, 300),
        }
    }

    /// Whether it came from a console.
    pub fn is_console(&self) -> bool {
        &*self.source == "serial"
    }
}

/// Every line of a boot that there is evidence of.
#[derive(Clone, Debug, Default)]
pub struct Log {
    pub lines: Vec<Line>,
    pub has_console: bool,
    pub has_journal: bool,
}

/// Marks what one source says once the guest goes down, in the words of logind and PID 1 (systemd-logind(8), "Signals" of
/// systemd(1), bootup(7) on the shutdown). A target that is reached again was only left for a while.
fn mark_stopping(lines: &mut [Line]) {
    const UP: [&str; 2] = ["target multi-user.target", "target graphical.target"];
    let mut stopping = false;
    for line in lines {
        let text = line.text.as_str();
        let begins = |start: &str| {
            let rest = text.strip_prefix(start);
            rest.is_some_and(|r| UP.iter().any(|target| r.starts_with(target)))
        };
        stopping = match line.speaker {
            Speaker::Manager if stopping => !begins("Reached "),
            Speaker::Manager => {
                begins("Stopped ")
                    || text.starts_with("Reached target shutdown.target")
                    // Halt, power off, reboot, kexec.
                    || ["3", "4", "5", "6"]
                        .iter()
                        .any(|n| text.starts_with(&format!("Received SIGRTMIN+{n} from PID ")))
            }
            Speaker::Program => {
                stopping
                    || line.unit.as_deref() == Some("systemd-logind.service")
                        && [
                            "System is powering down",
                            "System is rebooting",
                            "System is halting",
                        ]
                        .iter()
                        .any(|s| text.starts_with(s))
            }
            Speaker::Kernel | Speaker::Anonymous => stopping,
        };
        line.stopping = stopping;
    }
}

/// Lines kept of one console.
const LINE_LIMIT: usize = 100_000;

impl Log {
    /// Adds a console.
    pub fn add_console(&mut self, bytes: &[u8]) {
        self.has_console = true;
        let mut lines = console::last_boot(console::lines(bytes, LINE_LIMIT));
        mark_stopping(&mut lines);
        self.lines.append(&mut lines);
    }

    /// Adds the last boot of a journal.
    pub fn add_journal(&mut self, journal: &Journal) {
        let Some(boot) = journal.last_boot() else {
            return;
        };
        self.has_journal = true;
        let source: Rc<str> = Rc::from(journal.source.as_str());
        let mut lines = Vec::new();
        for (number, entry) in (1_u64..)
            .zip(&journal.entries)
            .filter(|(_, e)| e.boot_id == boot)
        {
            let speaker = match (
                entry.transport.as_deref(),
                entry.pid,
                entry.identifier.as_deref(),
            ) {
                (Some("kernel"), _, Some("kernel") | None) => Speaker::Kernel,
                (_, Some(1), _) | (Some("kernel"), _, Some("systemd")) => Speaker::Manager,
                (None, None, Some("systemd")) => Speaker::Manager,
                _ => Speaker::Program,
            };
            let unit = if speaker == Speaker::Manager {
                entry.subject.clone()
            } else {
                entry.speaker.clone()
            };
            lines.push(Line {
                source: Rc::clone(&source),
                number,
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a boot is shorter than 2^53 microseconds"
                )]
                at: Some(entry.monotonic_us as f64 / 1e6),
                speaker,
                unit,
                pid: entry.pid,
                harmless: console::is_harmless(&entry.message),
                stopping: false,
                text: entry.message.to_string(),
            });
        }
        mark_stopping(&mut lines);
        self.lines.append(&mut lines);
    }

    /// Seconds since boot of the last line that PID 1 or a program said: the kernel speaks also of a guest that hangs.
    pub fn end(&self) -> Option<f64> {
        let said = self
            .lines
            .iter()
            .filter(|l| matches!(l.speaker, Speaker::Manager | Speaker::Program));
        said.filter_map(|l| l.at).max_by(f64::total_cmp)
    }

    /// Seconds since boot at which a line was said; at the earliest, where the line itself does not say.
    pub fn time_of(&self, line: &Line) -> Option<f64> {
        line.at.or_else(|| {
            let before = |l: &&Line| l.source == line.source && l.number < line.number;
            self.lines
                .iter()
                .filter(before)
                .filter_map(|l| l.at)
                .next_back()
        })
    }

    /// The first line that `test` accepts.
    pub fn first(&self, test: impl Fn(&Line) -> bool) -> Option<&Line> {
        self.lines.iter().find(|l| !l.harmless && test(l))
    }

    /// The first line that contains `needle`.
    pub fn containing(&self, needle: &str) -> Option<&Line> {
        self.first(|l| l.text.contains(needle))
    }

    /// The first line that contains any of `needles`.
    pub fn any_of(&self, needles: &[&str]) -> Option<&Line> {
        self.first(|l| needles.iter().any(|n| l.text.contains(n)))
    }

    /// Whether there is any line of a boot.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// The kernel command line that this boot printed.
    pub fn cmdline(&self) -> Option<String> {
        let marks = ["Kernel command line: ", "Command line: "];
        self.lines
            .iter()
            .filter(|l| l.speaker == Speaker::Kernel)
            .find_map(|l| {
                marks
                    .iter()
                    .find_map(|m| l.text.strip_prefix(m))
                    .map(|c| c.trim().to_owned())
            })
    }

    /// `uname -r` of the kernel that booted.
    pub fn kernel(&self) -> Option<String> {
        let line =
            self.first(|l| l.speaker == Speaker::Kernel && l.text.starts_with("Linux version "))?;
        line.text.split_whitespace().nth(2).map(str::to_owned)
    }
}
