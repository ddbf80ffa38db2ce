//! Native journal files (<https://systemd.io/JOURNAL_FILE_FORMAT/>): regular and compact, keyed hash, LZ4 and Zstandard.
//!
//! First the entry arrays are followed, as `journalctl` does. Where they end early or lead to something broken, every
//! object is looked at in the order of the file: a VM that was killed leaves entries that no array names yet.
use super::{ENTRY_LIMIT, Entry, FIELD_LIMIT, FileState, Journal, is_wanted, value_text};
use crate::bytes::{le32, le64};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::Read,
    rc::Rc,
};

/// First bytes of every journal file.
pub const SIGNATURE: &[u8] = b"LPKSHHRH";

const INCOMPATIBLE_COMPACT: u32 = 16;
const INCOMPATIBLE_KNOWN: u32 = 31;
const DATA: u8 = 1;
const ENTRY: u8 = 3;
const ENTRY_ARRAY: u8 = 6;
const TYPES: u8 = 7;
const XZ: u8 = 1;
const LZ4: u8 = 2;
const ZSTD: u8 = 4;
/// Items of one entry; journald itself stops at 1,024.
const ITEM_LIMIT: usize = 1_024;
/// Bytes that all compressed fields of a file may expand to.
const EXPANDED_LIMIT: usize = 16 << 20;

struct File<'a> {
    bytes: &'a [u8],
    compact: bool,
    fields: HashMap<u64, Option<(String, Rc<str>)>>,
    boots: HashMap<[u8; 16], Rc<str>>,
    expanded: usize,
}

struct Object<'a> {
    kind: u8,
    flags: u8,
    body: &'a [u8],
}

/// Parses `bytes`, of which the end may be missing.
pub fn parse(bytes: &[u8], source: &str) -> Journal {
    let mut journal = Journal {
        source: source.to_owned(),
        ..Journal::default()
    };
    let Some((header_size, array, promised)) = header(bytes, &mut journal) else {
        journal.note("the header is cut short".into());
        return journal;
    };
    let compact = le32(bytes, 12).unwrap_or(0) & INCOMPATIBLE_COMPACT != 0;
    let mut file = File {
        bytes,
        compact,
        fields: HashMap::new(),
        boots: HashMap::new(),
        expanded: 0,
    };
    let mut offsets = file.strict(array);
    if (offsets.len() as u64) < promised || offsets.is_empty() {
        let before = offsets.len();
        offsets.extend(file.scan(header_size));
        journal.note(format!(
            "the entry arrays name {before} of {promised} entries; {} were found by looking at every object",
            offsets.len()
        ));
    }
    let mut entries: BTreeMap<(u64, u64), Entry> = BTreeMap::new();
    let mut broken: u64 = 0;
    for offset in offsets {
        match file.entry(offset) {
            Some(entry) => {
                entries.insert((entry.seqnum, offset), entry);
                if entries.len() > ENTRY_LIMIT {
                    entries.pop_first();
                }
            }
            None => broken = broken.saturating_add(1),
        }
    }
    if broken > 0 {
        journal.note(format!("{broken} entries cannot be read"));
    }
    journal.entries = entries.into_values().collect();
    journal
}

fn header(bytes: &[u8], journal: &mut Journal) -> Option<(u64, u64, u64)> {
    let incompatible = le32(bytes, 12)?;
    if incompatible & !INCOMPATIBLE_KNOWN != 0 {
        journal.note(format!("unknown incompatible flags {incompatible:#x}"));
    }
    journal.state = match bytes.get(16)? {
        0 => FileState::Offline,
        1 => FileState::Online,
        2 => FileState::Archived,
        _ => FileState::Unknown,
    };
    journal.machine_id = hex(bytes.get(40..56)?);
    Some((
        le64(bytes, 88)?.clamp(208, 4096),
        le64(bytes, 176)?,
        le64(bytes, 152)?,
    ))
}

fn hex(raw: &[u8]) -> String {
    raw.iter().map(|b| format!("{b:02x}")).collect()
}

impl<'a> File<'a> {
    fn object(&self, offset: u64) -> Option<Object<'a>> {
        let at = usize::try_from(offset)
            .ok()
            .filter(|o| o % 8 == 0 && *o > 0)?;
        let head = self.bytes.get(at..at.checked_add(16)?)?;
        let size = usize::try_from(le64(head, 8)?).ok()?;
        let body = self.bytes.get(at..at.checked_add(size)?)?;
        let (kind, flags) = (*head.first()?, *head.get(1)?);
        (size >= 16 && kind > 0 && kind <= TYPES).then_some(Object { kind, flags, body })
    }

    /// Offsets of entries by the chain of arrays.
    fn strict(&self, first: u64) -> Vec<u64> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        let mut array = first;
        while array != 0 && seen.insert(array) {
            let Some(object) = self.object(array).filter(|o| o.kind == ENTRY_ARRAY) else {
                break;
            };
            let items = object.body.get(24..).unwrap_or_default();
            let width = if self.compact { 4 } else { 8 };
            for item in items.chunks_exact(width) {
                let offset = if self.compact {
                    le32(item, 0).map(u64::from)
                } else {
                    le64(item, 0)
                };
                match offset {
                    Some(0) | None => break,
                    Some(offset) => found.push(offset),
                }
            }
            if found.len() > self.bytes.len() / 64 {
                break;
            }
            array = le64(object.body, 16).unwrap_or(0);
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Offsets of everything that looks like an entry, in the order of the file.
    fn scan(&self, start: u64) -> Vec<u64> {
        let mut found = Vec::new();
        let mut at = start.next_multiple_of(8);
        while let Some(rest) = usize::try_from(at)
            .ok()
            .and_then(|o| self.bytes.get(o..))
            .filter(|r| r.len() >= 16)
        {
            // A step of eight bytes where nothing plausible stands: the file is at most that much slower to read.
            let step = match self.object(at) {
                Some(o) if o.kind == ENTRY && self.plausible(&o) => {
                    found.push(at);
                    o.body.len() as u64
                }
                Some(o)
                    if o.kind != ENTRY
                        && rest.get(2..8).is_some_and(|r| r.iter().all(|b| *b == 0)) =>
                {
                    o.body.len() as u64
                }
                Some(_) | None => 8,
            };
            let Some(next) = at.checked_add(step).map(|n| n.next_multiple_of(8)) else {
                break;
            };
            at = next;
        }
        found
    }

    fn plausible(&self, object: &Object<'_>) -> bool {
        let width = if self.compact { 4 } else { 16 };
        object.body.len().checked_sub(64).is_some_and(|n| {
            n.checked_rem(width).is_some_and(|r| r < 8) && n <= width.saturating_mul(ITEM_LIMIT)
        })
    }

    fn entry(&mut self, offset: u64) -> Option<Entry> {
        let object = self.object(offset).filter(|o| o.kind == ENTRY)?;
        let body = object.body;
        let boot: [u8; 16] = body.get(40..56)?.try_into().ok()?;
        let mut entry = Entry {
            seqnum: le64(body, 16)?,
            realtime_us: le64(body, 24)?,
            monotonic_us: le64(body, 32)?,
            boot_id: Rc::clone(
                self.boots
                    .entry(boot)
                    .or_insert_with(|| Rc::from(hex(&boot))),
            ),
            ..Entry::default()
        };
        let items = body.get(64..)?;
        let width = if self.compact { 4 } else { 16 };
        for item in items.chunks_exact(width).take(ITEM_LIMIT) {
            let offset = if self.compact {
                u64::from(le32(item, 0)?)
            } else {
                le64(item, 0)?
            };
            if let Some((name, value)) = self.field(offset) {
                entry.take(&name, value);
            }
        }
        Some(entry)
    }

    fn field(&mut self, offset: u64) -> Option<(String, Rc<str>)> {
        if let Some(known) = self.fields.get(&offset) {
            return known.clone();
        }
        let value = self.read_field(offset);
        self.fields.insert(offset, value.clone());
        value
    }

    fn read_field(&mut self, offset: u64) -> Option<(String, Rc<str>)> {
        let object = self.object(offset).filter(|o| o.kind == DATA)?;
        let payload = object.body.get(if self.compact { 72 } else { 64 }..)?;
        let expanded;
        let payload = match object.flags & (XZ | LZ4 | ZSTD) {
            0 => payload,
            flag if self.expanded < EXPANDED_LIMIT => {
                expanded = expand(flag, payload)?;
                self.expanded = self.expanded.saturating_add(expanded.len());
                &expanded
            }
            _ => return None,
        };
        let eq = payload.iter().take(128).position(|b| *b == b'=')?;
        let name = payload.get(..eq).filter(|n| is_wanted(n))?;
        let value = payload.get(eq.saturating_add(1)..)?;
        Some((String::from_utf8(name.to_vec()).ok()?, value_text(value)))
    }
}

/// Expands a payload, at most to what is kept of a field.
fn expand(flag: u8, payload: &[u8]) -> Option<Vec<u8>> {
    let limit = FIELD_LIMIT.saturating_add(128);
    match flag {
        ZSTD => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload).ok()?;
            let mut out = Vec::new();
            // What was decoded before an error still is the field's beginning.
            let _ = decoder.take(limit as u64).read_to_end(&mut out);
            (!out.is_empty()).then_some(out)
        }
        LZ4 => {
            let size = usize::try_from(le64(payload, 0)?)
                .ok()
                .filter(|n| *n <= 1 << 20)?;
            let mut out = lz4_flex::block::decompress(payload.get(8..)?, size).ok()?;
            out.truncate(limit);
            Some(out)
        }
        // XZ is only in files of systemd before 2013's default changed; such fields are left out.
        _ => None,
    }
}
