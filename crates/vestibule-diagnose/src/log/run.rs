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
        for line in &log.lines {
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
        out
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

    /// A line that says that the unit, or a start of it, ended badly.
    pub fn ended_badly(&self) -> Option<&'a Line> {
        let marks = [
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
        self.manager
            .iter()
            .find(|l| marks.iter().any(|m| l.text.contains(m)))
            .copied()
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

const VERBS: [&str; 9] = [
    "Started ",
    "Starting ",
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
}
