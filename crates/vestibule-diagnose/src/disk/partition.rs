//! GPT and MBR partition tables (UEFI 2.10 section 5.3; the classic table at byte 446).
use super::source::{ByteSource, Window};
use crate::bytes::{le32, le64};
use std::rc::Rc;

/// A table with more entries than this is not looked at further.
const ENTRY_LIMIT: u64 = 256;

/// Windows that may hold a file system: the whole disk first, then each partition in table order.
pub(crate) fn candidates(source: &Rc<dyn ByteSource>) -> Vec<Window> {
    let whole = Window {
        source: Rc::clone(source),
        start: 0,
        len: source.len(),
    };
    let mut parts = Vec::new();
    for sector in [512_u64, 4096] {
        parts = gpt(&whole, sector);
        if !parts.is_empty() {
            break;
        }
    }
    if parts.is_empty() {
        parts = mbr(&whole);
    }
    let windows = parts.into_iter().filter_map(|(start, len)| {
        let len = len.min(source.len().checked_sub(start)?);
        Some(Window {
            source: Rc::clone(source),
            start,
            len,
        })
    });
    let mut all = vec![Window {
        source: Rc::clone(source),
        start: 0,
        len: source.len(),
    }];
    all.extend(windows);
    all
}

fn gpt(disk: &Window, sector: u64) -> Vec<(u64, u64)> {
    let Some(header) = disk
        .bytes(sector, 92)
        .filter(|h| h.starts_with(b"EFI PART"))
    else {
        return Vec::new();
    };
    let table = le64(&header, 72).and_then(|lba| lba.checked_mul(sector));
    let count = u64::from(le32(&header, 80).unwrap_or(0)).min(ENTRY_LIMIT);
    let size = u64::from(le32(&header, 84).unwrap_or(0));
    let Some(table) = table.filter(|_| (128..=4096).contains(&size)) else {
        return Vec::new();
    };
    let mut parts = Vec::new();
    for index in 0..count {
        let at = index.checked_mul(size).and_then(|o| table.checked_add(o));
        let Some(entry) = at.and_then(|at| disk.bytes(at, 128)) else {
            break;
        };
        if entry.iter().take(16).all(|b| *b == 0) {
            continue;
        }
        let (Some(first), Some(last)) = (le64(&entry, 32), le64(&entry, 40)) else {
            continue;
        };
        let sectors = last.checked_sub(first).and_then(|n| n.checked_add(1));
        let bounds = first
            .checked_mul(sector)
            .zip(sectors.and_then(|n| n.checked_mul(sector)));
        parts.extend(bounds);
    }
    parts
}

fn mbr(disk: &Window) -> Vec<(u64, u64)> {
    let Some(sector) = disk.bytes(0, 512).filter(|s| s.ends_with(&[0x55, 0xaa])) else {
        return Vec::new();
    };
    let mut parts = Vec::new();
    for entry in sector.get(446..510).unwrap_or_default().chunks_exact(16) {
        let kind = entry.get(4).copied().unwrap_or(0);
        let (Some(first), Some(count)) = (le32(entry, 8), le32(entry, 12)) else {
            continue;
        };
        if kind == 0 || kind == 0xee || count == 0 {
            continue;
        }
        let bounds = u64::from(first)
            .checked_mul(512)
            .zip(u64::from(count).checked_mul(512));
        parts.extend(bounds);
    }
    parts
}
