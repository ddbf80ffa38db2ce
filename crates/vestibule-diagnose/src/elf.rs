//! The few facts of an ELF file that decide whether `execve(2)` and the dynamic linker accept it (System V gABI).
use crate::{
    bytes::{le16, le32, le64},
    disk::Root,
};

/// Program headers looked at.
const HEADER_LIMIT: u16 = 128;
/// Bytes of one segment read: a dynamic section or string table of a large program is far smaller.
const SEGMENT_LIMIT: u64 = 1 << 20;
/// Bytes of one library name or run path.
const STRING_LIMIT: usize = 1024;
/// Libraries that one file may name.
const NEEDED_LIMIT: usize = 512;

/// `EM_X86_64`.
pub(crate) const X86_64: u16 = 62;
/// `EM_AARCH64`.
pub(crate) const AARCH64: u16 = 183;
/// `EM_386`.
pub(crate) const I386: u16 = 3;

/// What the loader looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Elf {
    pub machine: u16,
    /// `PT_INTERP`.
    pub interpreter: Option<String>,
    /// `DT_NEEDED`.
    pub needed: Vec<String>,
    /// `DT_RPATH` and `DT_RUNPATH`.
    pub run_path: Vec<String>,
}

/// Why a file with an ELF magic cannot be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// No ELF magic.
    NotElf,
    /// Cut short; with the machine, where the header says so much.
    Truncated(Option<u16>),
}

/// The name of an `e_machine`.
pub(crate) fn machine_name(machine: u16) -> String {
    match machine {
        X86_64 => "x86-64".into(),
        AARCH64 => "aarch64".into(),
        I386 => "i386".into(),
        40 => "arm".into(),
        243 => "riscv".into(),
        21 => "ppc64".into(),
        22 => "s390".into(),
        other => format!("machine {other}"),
    }
}

/// Reads the ELF file at `path` of `root`.
pub(crate) fn read(root: &Root, path: &str) -> Result<Elf, Bad> {
    let head = root.read_at(path, 0, 64).ok_or(Bad::Truncated(None))?;
    if !head.starts_with(b"\x7fELF") {
        return Err(Bad::NotElf);
    }
    let wide = head.get(4) == Some(&2);
    let little = head.get(5) == Some(&1);
    let machine = head.get(18..20).ok_or(Bad::Truncated(None))?;
    let machine = match machine {
        [a, b] if little => u16::from_le_bytes([*a, *b]),
        [a, b] => u16::from_be_bytes([*a, *b]),
        _ => return Err(Bad::Truncated(None)),
    };
    let mut elf = Elf {
        machine,
        ..Elf::default()
    };
    if !wide && little {
        // Of a program for 32 bits only the interpreter is looked at: its libraries are no part of a usual image.
        elf.interpreter = narrow_interpreter(root, path, &head);
    }
    if !wide || !little {
        return Ok(elf);
    }
    tables(root, path, &head, &mut elf).ok_or(Bad::Truncated(Some(machine)))?;
    Ok(elf)
}

/// `PT_INTERP` of an `ELFCLASS32` file.
fn narrow_interpreter(root: &Root, path: &str, head: &[u8]) -> Option<String> {
    let at = u64::from(le32(head, 28)?);
    let size = usize::from(le16(head, 42)?);
    let count = usize::from(le16(head, 44)?.min(HEADER_LIMIT));
    let raw = root.read_at(path, at, size.checked_mul(count)?)?;
    let found = raw
        .chunks_exact(size.max(32))
        .find(|h| le32(h, 0) == Some(3))?;
    let (offset, length) = (le32(found, 4)?, le32(found, 16)?);
    bytes_to_text(&root.read_at(
        path,
        u64::from(offset),
        usize::try_from(length.min(4096)).ok()?,
    )?)
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

fn tables(root: &Root, path: &str, head: &[u8], elf: &mut Elf) -> Option<()> {
    let at = le64(head, 32)?;
    let size = le16(head, 54)?;
    let count = le16(head, 56)?.min(HEADER_LIMIT);
    if size < 56 {
        return None;
    }
    let len = usize::from(size).checked_mul(usize::from(count))?;
    let raw = root.read_at(path, at, len).filter(|r| r.len() == len)?;
    let segments: Vec<Segment> = raw
        .chunks_exact(usize::from(size))
        .filter_map(|h| {
            Some(Segment {
                kind: le32(h, 0)?,
                offset: le64(h, 8)?,
                address: le64(h, 16)?,
                size: le64(h, 32)?,
            })
        })
        .collect();
    for s in &segments {
        match s.kind {
            3 => {
                elf.interpreter = bytes_to_text(&root.read_at(
                    path,
                    s.offset,
                    usize::try_from(s.size.min(4096)).ok()?,
                )?);
            }
            2 => dynamic(root, path, s, &segments, elf)?,
            _ => {}
        }
    }
    Some(())
}

fn dynamic(
    root: &Root,
    path: &str,
    s: &Segment,
    segments: &[Segment],
    elf: &mut Elf,
) -> Option<()> {
    let raw = root.read_at(
        path,
        s.offset,
        usize::try_from(s.size.min(SEGMENT_LIMIT)).ok()?,
    )?;
    let entries: Vec<(u64, u64)> = raw
        .chunks_exact(16)
        .filter_map(|e| Some((le64(e, 0)?, le64(e, 8)?)))
        .take_while(|(tag, _)| *tag != 0)
        .collect();
    let value = |tag| entries.iter().find(|(t, _)| *t == tag).map(|(_, v)| *v);
    let (table, table_size) = (value(5)?, value(10)?);
    let load = segments
        .iter()
        .find(|l| l.kind == 1 && table >= l.address && table < l.address.saturating_add(l.size))?;
    let offset = table.checked_sub(load.address)?.checked_add(load.offset)?;
    // One string at a time: the table of a large C++ library is megabytes long.
    let text = |at: u64| {
        let at = offset.checked_add(at).filter(|_| at < table_size)?;
        root.read_at(path, at, STRING_LIMIT)
            .as_deref()
            .and_then(bytes_to_text)
    };
    for (tag, at) in entries
        .iter()
        .filter(|(tag, _)| matches!(tag, 1 | 15 | 29))
        .take(NEEDED_LIMIT)
    {
        match tag {
            1 => elf.needed.extend(text(*at)),
            _ => elf.run_path.extend(
                text(*at)
                    .iter()
                    .flat_map(|p| p.split(':').map(str::to_owned)),
            ),
        }
    }
    Some(())
}

fn bytes_to_text(raw: &[u8]) -> Option<String> {
    let end = raw.iter().position(|b| *b == 0).unwrap_or(raw.len());
    String::from_utf8(raw.get(..end)?.to_vec())
        .ok()
        .filter(|t| !t.is_empty())
}
