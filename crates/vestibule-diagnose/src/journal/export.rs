//! The journal export format (<https://systemd.io/JOURNAL_EXPORT_FORMATS/>): fields a line each, an empty line between
//! entries; a field with a newline or binary data is its name, a newline, a 64-bit length and the bytes.
use super::{ENTRY_LIMIT, Entry, Journal, value_text};
use crate::bytes::le64;

/// Parses `bytes`; stops with a note at the first field that is cut short.
pub fn parse(bytes: &[u8], source: &str) -> Journal {
    let mut journal = Journal {
        source: source.to_owned(),
        ..Journal::default()
    };
    let mut rest = bytes;
    let mut entry = Entry::default();
    let mut fields: u32 = 0;
    while !rest.is_empty() {
        let end = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        let line = rest.get(..end).unwrap_or_default();
        rest = rest.get(end.saturating_add(1)..).unwrap_or_default();
        if line.is_empty() {
            push(&mut journal, &mut entry, &mut fields);
            continue;
        }
        fields = fields.saturating_add(1);
        if let Some(eq) = line.iter().position(|b| *b == b'=') {
            let value = line.get(eq.saturating_add(1)..).unwrap_or_default();
            take(&mut entry, line.get(..eq).unwrap_or_default(), value);
            continue;
        }
        let len = le64(rest, 0).and_then(|n| usize::try_from(n).ok());
        let Some((len, value)) = len.and_then(|n| Some((n, rest.get(8..n.checked_add(8)?)?)))
        else {
            journal.note("a binary field is cut short".into());
            break;
        };
        take(&mut entry, line, value);
        rest = rest.get(len.saturating_add(9)..).unwrap_or_default();
    }
    push(&mut journal, &mut entry, &mut fields);
    journal
}

fn take(entry: &mut Entry, name: &[u8], value: &[u8]) {
    if let Ok(name) = std::str::from_utf8(name) {
        entry.take(name, value_text(value));
    }
}

fn push(journal: &mut Journal, entry: &mut Entry, fields: &mut u32) {
    if *fields > 0 {
        if journal.entries.len() >= ENTRY_LIMIT {
            let half = journal.entries.len().checked_div(2).unwrap_or(0);
            journal.entries.drain(..half);
            journal.note(format!(
                "more than {ENTRY_LIMIT} entries: the oldest were dropped"
            ));
        }
        journal.entries.push(std::mem::take(entry));
    }
    *fields = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_binary_fields() {
        let mut bytes =
            b"__MONOTONIC_TIMESTAMP=5\nMESSAGE=a=b\nUNIT=x.service\n\nMESSAGE\n".to_vec();
        bytes.extend(3_u64.to_le_bytes());
        bytes.extend(b"a\nb\n_PID=7\n\nMESSAGE\n\x09");
        let journal = parse(&bytes, "journal");
        assert_eq!(journal.entries.len(), 3);
        assert_eq!(&*journal.entries[0].message, "a=b");
        assert_eq!(journal.entries[0].subject.as_deref(), Some("x.service"));
        assert_eq!(
            (&*journal.entries[1].message, journal.entries[1].pid),
            ("a\nb", Some(7))
        );
        assert_eq!(journal.damage.len(), 1);
    }
}
