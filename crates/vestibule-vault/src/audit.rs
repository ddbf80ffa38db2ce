//! The audit log: what entered and left the vault, in lines that can only be added to.
//!
//! A line is `<mac> <entry>`: the entry as JSON, and an HMAC-SHA256 over the line before it (its MAC) and the entry. A
//! torn last line, without its newline, was never synced and nothing happened on its account; the next append cuts it off.
use crate::{
    file::{self, FileError},
    key::hmac,
};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
};
use vestibule_api::{ids::CredentialId, time::Timestamp};
use zeroize::Zeroizing;

/// A line is shorter than this.
const LINE_LIMIT: usize = 16 << 10;

/// What happened to a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The vault was made.
    Created,
    /// A record is about to get its name.
    Stored,
    /// The content is about to leave the vault.
    Released,
    /// A record is about to be removed.
    Removed,
}

impl Action {
    /// The word in the log.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Stored => "stored",
            Self::Released => "released",
            Self::Removed => "removed",
        }
    }
}

/// One line's content. No secret is in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuditLine {
    /// From 1, without gaps.
    pub seq: u64,
    pub at: Timestamp,
    pub action: Action,
    pub credential: Option<CredentialId>,
    /// SHA-256 of the record's file, for [`Action::Stored`].
    pub digest: Option<String>,
    pub actor: String,
    pub purpose: String,
}

/// What a check of the whole log found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditSummary {
    pub lines: u64,
    /// Lines that speak of a content that left.
    pub released: u64,
    /// The newest line's MAC, which vouches for every line before it. Kept elsewhere, it shows later that the log was not cut.
    pub head: String,
    /// Whether half a line stands at the end: one that is being written, or that was never synced.
    pub torn: bool,
}

/// What is wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is no line of an audit log.
    Form,
    /// It carries this number instead of its own: lines before it were removed, doubled or moved.
    Number(u64),
    /// Its MAC is not that of its words after the line before it.
    Mac,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Form => f.write_str("it is not a line of an audit log"),
            Self::Number(seq) => write!(
                f,
                "it calls itself line {seq}: lines before it were removed, doubled or moved"
            ),
            Self::Mac => f.write_str(
                "it, or the line before it, was changed, or the master key is another than the log's",
            ),
        }
    }
}

/// Why the audit log does not vouch for what is asked.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("use the audit log")]
    File(#[source] FileError),
    #[error("line {line} of the audit log does not follow: {fault}")]
    Broken { line: u64, fault: Fault },
    #[error("the audit log is shorter than it was")]
    Shrunk,
    #[error("write the audit log's line")]
    Encode(#[source] serde_json::Error),
}

/// The log and what was read of it so far.
#[derive(Debug)]
pub(crate) struct Audit {
    path: Utf8PathBuf,
    key: Zeroizing<[u8; 32]>,
    /// Bytes of complete lines read so far.
    len: u64,
    seq: u64,
    released: u64,
    mac: [u8; 32],
    torn: bool,
    newest: Option<(Action, CredentialId)>,
    /// The record's digest that the newest line about each credential holds; none: removed.
    current: HashMap<CredentialId, Option<String>>,
}

impl Audit {
    pub(crate) fn new(path: Utf8PathBuf, key: Zeroizing<[u8; 32]>) -> Self {
        let (len, seq, released, mac) = (0, 0, 0, [0; 32]);
        Self {
            path,
            key,
            len,
            seq,
            released,
            mac,
            torn: false,
            newest: None,
            current: HashMap::new(),
        }
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Reads and verifies the lines that were added since the last time, by whatever process.
    pub(crate) fn catch_up(&mut self) -> Result<(), AuditError> {
        self.read_each(&mut |_, _| {})
    }

    /// [`Audit::catch_up`], with every line that follows. Nothing is written.
    pub(crate) fn read_each(
        &mut self,
        each: &mut dyn FnMut(&AuditLine, &str),
    ) -> Result<(), AuditError> {
        match File::open(&self.path) {
            Ok(file) => self.read_on(&file, each),
            Err(err) if err.kind() == io::ErrorKind::NotFound && self.len == 0 => Ok(()),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Err(AuditError::Shrunk),
            Err(err) => Err(AuditError::File(FileError::new("open", &self.path, err))),
        }
    }

    /// What the newest line speaks of.
    pub(crate) fn newest(&self) -> Option<(Action, CredentialId)> {
        self.newest
    }

    /// The digest that the record of `id` must have now.
    pub(crate) fn current(&self, id: CredentialId) -> Option<&str> {
        self.current.get(&id)?.as_deref()
    }

    /// Every credential that has a record, as far as the log knows.
    pub(crate) fn stored(&self) -> impl Iterator<Item = CredentialId> {
        let there = |(id, digest): (&CredentialId, &Option<String>)| digest.as_ref().map(|_| *id);
        self.current.iter().filter_map(there)
    }

    pub(crate) fn knows(&self, id: CredentialId) -> bool {
        self.current.contains_key(&id)
    }

    /// Writes the lines that were read so far into a new file, synced.
    pub(crate) fn copy(&self, to: &Utf8Path) -> Result<(), FileError> {
        let mut target = file::open_append(to)?;
        let failed = |err| FileError::new("write", to, err);
        let source = File::open(&self.path).map_err(failed)?;
        io::copy(&mut source.take(self.len), &mut target).map_err(failed)?;
        target.sync_all().map_err(failed)
    }

    pub(crate) fn summary(&self) -> AuditSummary {
        AuditSummary {
            lines: self.seq,
            released: self.released,
            head: hex(&self.mac),
            torn: self.torn,
        }
    }

    /// Adds a line and returns once it is on disk. The caller holds the vault's lock.
    pub(crate) fn append(
        &mut self,
        action: Action,
        credential: Option<CredentialId>,
        digest: Option<String>,
        actor: &str,
        purpose: &str,
    ) -> Result<(), AuditError> {
        let mut file = file::open_append(&self.path).map_err(AuditError::File)?;
        self.read_on(&file, &mut |_, _| {})?;
        let entry = AuditLine {
            seq: self.seq.saturating_add(1),
            at: Timestamp::now(),
            action,
            credential,
            digest,
            actor: cut(actor),
            purpose: cut(purpose),
        };
        let json = serde_json::to_string(&entry).map_err(AuditError::Encode)?;
        let mac = self.mac_of(json.as_bytes());
        let line = format!("{} {json}\n", hex(&mac));
        let begin = self.len;
        let written = file
            .set_len(begin)
            .and_then(|()| write_synced(&mut file, line.as_bytes()));
        if let Err(err) = written {
            // Half a line is cut off; where that fails too it stays torn, and the next append cuts it.
            drop(file.set_len(begin));
            return Err(self.failed(err));
        }
        self.torn = false;
        self.len = begin.saturating_add(u64::try_from(line.len()).unwrap_or(u64::MAX));
        self.take(entry, mac);
        Ok(())
    }

    fn mac_of(&self, json: &[u8]) -> [u8; 32] {
        hmac(&self.key, &[&self.mac, json])
    }

    fn failed(&self, err: io::Error) -> AuditError {
        AuditError::File(FileError::new("write", &self.path, err))
    }

    fn take(&mut self, entry: AuditLine, mac: [u8; 32]) {
        self.seq = entry.seq;
        self.mac = mac;
        self.newest = entry.credential.map(|id| (entry.action, id));
        match (entry.action, entry.credential) {
            (Action::Stored, Some(id)) => drop(self.current.insert(id, entry.digest)),
            (Action::Removed, Some(id)) => drop(self.current.insert(id, None)),
            (Action::Released, _) => self.released = self.released.saturating_add(1),
            (Action::Created | Action::Stored | Action::Removed, _) => {}
        }
    }

    fn read_on(
        &mut self,
        file: &File,
        each: &mut dyn FnMut(&AuditLine, &str),
    ) -> Result<(), AuditError> {
        let size = file.metadata().map_err(|err| self.failed(err))?.len();
        if size < self.len {
            return Err(AuditError::Shrunk);
        }
        let mut reader = BufReader::new(file);
        reader
            .seek(SeekFrom::Start(self.len))
            .map_err(|err| self.failed(err))?;
        let mut line = Vec::new();
        loop {
            line.clear();
            // Bounded: a log that somebody filled with one endless line is not read into memory.
            let count = (&mut reader)
                .take(LINE_LIMIT as u64)
                .read_until(b'\n', &mut line)
                .map_err(|err| self.failed(err))?;
            let Some(text) = line.strip_suffix(b"\n") else {
                self.torn = !line.is_empty();
                return match line.len() {
                    LINE_LIMIT.. => Err(self.broken(Fault::Form)),
                    _ => Ok(()),
                };
            };
            let (entry, mac) = self.check(text)?;
            each(&entry, &hex(&mac));
            self.len = self
                .len
                .saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
            self.take(entry, mac);
        }
    }

    /// The entry of the next line, when it follows the ones before it.
    fn check(&self, line: &[u8]) -> Result<(AuditLine, [u8; 32]), AuditError> {
        let form = || self.broken(Fault::Form);
        let text = std::str::from_utf8(line).map_err(|_| form())?;
        let (mac, json) = text.split_once(' ').ok_or_else(form)?;
        let entry: Option<AuditLine> = serde_json::from_str(json).ok();
        let number = self.seq.saturating_add(1);
        let expected = self.mac_of(json.as_bytes());
        // Not a secret comparison: who can read the file has the MAC.
        if mac != hex(&expected) {
            return Err(self.broken(match entry {
                Some(entry) if entry.seq != number => Fault::Number(entry.seq),
                Some(_) => Fault::Mac,
                None => Fault::Form,
            }));
        }
        match entry {
            Some(entry) if entry.seq == number => Ok((entry, expected)),
            Some(_) | None => Err(form()),
        }
    }

    fn broken(&self, fault: Fault) -> AuditError {
        AuditError::Broken {
            line: self.seq.saturating_add(1),
            fault,
        }
    }
}

fn write_synced(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_all()
}

/// Free text in a line is bounded, so that a line is.
fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(64), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe takes what is written, and can't be synced (fsync(2): EINVAL).
    #[test]
    fn a_line_is_written_and_then_synced() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut file = File::from(std::os::fd::OwnedFd::from(writer));
        let synced = write_synced(&mut file, b"a line\n");
        assert_eq!(synced.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        drop(file);
        let mut line = String::new();
        reader.read_to_string(&mut line).unwrap();
        assert_eq!(line, "a line\n", "before it was synced");
    }
}
