//! systemd's journal from bytes: native files ([`file`]) and the export format ([`export`]).
//!
//! What a killed VM left is salvaged: entries that can be read are returned together with a description of the rest.
pub mod export;
pub mod file;

use std::rc::Rc;

/// Entries kept of one source; the newest count most, so the oldest are dropped first.
pub(crate) const ENTRY_LIMIT: usize = 60_000;
/// Bytes kept of one field.
pub(crate) const FIELD_LIMIT: usize = 4_096;

/// One entry, with the fields that diagnosis uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub seqnum: u64,
    /// Microseconds since 1970 by the guest's clock, which may lie.
    pub realtime_us: u64,
    /// Microseconds since boot.
    pub monotonic_us: u64,
    /// Hex.
    pub boot_id: Rc<str>,
    pub message: Rc<str>,
    /// `UNIT=`: the unit that PID 1 speaks about.
    pub subject: Option<Rc<str>>,
    /// `_SYSTEMD_UNIT=`: the unit whose process speaks.
    pub speaker: Option<Rc<str>>,
    pub identifier: Option<Rc<str>>,
    pub transport: Option<Rc<str>>,
    pub pid: Option<u32>,
}

/// `state` of a journal file's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileState {
    Offline,
    /// Still open, or never closed because the VM was killed.
    Online,
    Archived,
    #[default]
    Unknown,
}

/// One journal.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    /// Where it came from, for quotes: `journal` or `journal:/var/log/journal/…`.
    pub source: String,
    pub entries: Vec<Entry>,
    pub state: FileState,
    /// Hex; empty where unknown.
    pub machine_id: String,
    /// What could not be read, in words; bounded.
    pub damage: Vec<String>,
}

impl Journal {
    /// Reads either format, by its first bytes.
    pub fn parse(bytes: &[u8], source: &str) -> Self {
        if bytes.starts_with(file::SIGNATURE) {
            file::parse(bytes, source)
        } else {
            export::parse(bytes, source)
        }
    }

    /// The boot that ended last, by the order of entries.
    pub fn last_boot(&self) -> Option<Rc<str>> {
        self.entries.last().map(|e| Rc::clone(&e.boot_id))
    }

    pub(crate) fn note(&mut self, text: String) {
        if self.damage.len() < 16 {
            self.damage.push(text);
        }
    }
}

impl Entry {
    /// Takes one `NAME=value` field; unknown names are dropped.
    pub(crate) fn take(&mut self, name: &str, value: Rc<str>) {
        match name {
            "MESSAGE" => self.message = value,
            "UNIT" => self.subject = Some(value),
            "_SYSTEMD_UNIT" => self.speaker = Some(value),
            "SYSLOG_IDENTIFIER" => self.identifier = Some(value),
            "_TRANSPORT" => self.transport = Some(value),
            "_PID" => self.pid = value.parse().ok(),
            "_BOOT_ID" => self.boot_id = value,
            "__SEQNUM" => self.seqnum = value.parse().unwrap_or(0),
            "__REALTIME_TIMESTAMP" => self.realtime_us = value.parse().unwrap_or(0),
            "__MONOTONIC_TIMESTAMP" => self.monotonic_us = value.parse().unwrap_or(0),
            // The kernel's own clock: its lines reach the journal late.
            "_SOURCE_MONOTONIC_TIMESTAMP" => {}
            _ => {}
        }
    }
}

/// Names of the fields that [`Entry::take`] keeps.
pub(crate) fn is_wanted(name: &[u8]) -> bool {
    matches!(
        name,
        b"MESSAGE" | b"UNIT" | b"_SYSTEMD_UNIT" | b"SYSLOG_IDENTIFIER" | b"_TRANSPORT" | b"_PID"
    )
}

/// A field's value as text, cut at [`FIELD_LIMIT`].
pub(crate) fn value_text(value: &[u8]) -> Rc<str> {
    let cut = value
        .get(..value.len().min(FIELD_LIMIT))
        .unwrap_or_default();
    Rc::from(String::from_utf8_lossy(cut).as_ref())
}
