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
    io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _},
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

/// One line's content.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Entry {
    /// From 1, without gaps.
    pub(crate) seq: u64,
    pub(crate) at: Timestamp,
    pub(crate) action: Action,
    pub(crate) credential: Option<CredentialId>,
    /// SHA-256 of the record's file, for [`Action::Stored`].
    pub(crate) digest: Option<String>,
    pub(crate) actor: String,
    pub(crate) purpose: String,
}

/// What a check of the whole log found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditSummary {
    pub lines: u64,
    /// Lines that speak of a content that left.
    pub released: u64,
}

/// Why the audit log does not vouch for what is asked.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("use the audit log")]
    File(#[source] FileError),
    #[error(
        "line {line} of the audit log was changed, or the master key is another than the log's"
    )]
    Broken { line: u64 },
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
            current: HashMap::new(),
        }
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Reads and verifies the lines that were added since the last time, by whatever process.
    pub(crate) fn catch_up(&mut self) -> Result<(), AuditError> {
        let file = file::open_append(&self.path).map_err(AuditError::File)?;
        self.read_on(&file)
    }

    /// The digest that the record of `id` must have now.
    pub(crate) fn current(&self, id: CredentialId) -> Option<&str> {
        self.current.get(&id)?.as_deref()
    }

    pub(crate) fn summary(&self) -> AuditSummary {
        AuditSummary {
            lines: self.seq,
            released: self.released,
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
        self.read_on(&file)?;
        let entry = Entry {
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

    fn take(&mut self, entry: Entry, mac: [u8; 32]) {
        self.seq = entry.seq;
        self.mac = mac;
        match (entry.action, entry.credential) {
            (Action::Stored, Some(id)) => drop(self.current.insert(id, entry.digest)),
            (Action::Removed, Some(id)) => drop(self.current.insert(id, None)),
            (Action::Released, _) => self.released = self.released.saturating_add(1),
            (Action::Created | Action::Stored | Action::Removed, _) => {}
        }
    }

    fn read_on(&mut self, file: &File) -> Result<(), AuditError> {
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
            let count = reader
                .read_until(b'\n', &mut line)
                .map_err(|err| self.failed(err))?;
            let Some(text) = line.strip_suffix(b"\n") else {
                return Ok(());
            };
            let (entry, mac) = self.check(text)?;
            self.len = self
                .len
                .saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
            self.take(entry, mac);
        }
    }

    /// The entry of the next line, when it follows the ones before it.
    fn check(&self, line: &[u8]) -> Result<(Entry, [u8; 32]), AuditError> {
        let number = self.seq.saturating_add(1);
        let broken = || AuditError::Broken { line: number };
        if line.len() > LINE_LIMIT {
            return Err(broken());
        }
        let text = std::str::from_utf8(line).map_err(|_| broken())?;
        let (mac, json) = text.split_once(' ').ok_or_else(broken)?;
        let expected = self.mac_of(json.as_bytes());
        // Not a secret comparison: who can read the file has the MAC.
        if mac != hex(&expected) {
            return Err(broken());
        }
        let entry: Entry = serde_json::from_str(json).map_err(|_| broken())?;
        if entry.seq != number {
            return Err(broken());
        }
        Ok((entry, expected))
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
