//! What a program file is: an ELF executable with its interpreter, or a script with its own.

/// So many bytes hold the headers that matter.
pub(crate) const HEAD: u64 = 64 * 1024;

/// What the first bytes of a file say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// x86-64, with the program interpreter where it is dynamic.
    Elf {
        interpreter: Option<String>,
    },
    ElfOther {
        machine: u16,
    },
    /// Words of the `#!` line.
    Script(Vec<String>),
    Other,
}

const X86_64: u16 = 62;
const PT_INTERP: u32 = 3;

/// Reads the format from a file's first [`HEAD`] bytes.
pub(crate) fn format(head: &[u8]) -> Format {
    if let Some(rest) = head.strip_prefix(b"#!") {
        let line = rest.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let words = String::from_utf8_lossy(line);
        return Format::Script(words.split_whitespace().map(str::to_owned).collect());
    }
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return Format::Other;
    }
    match number::<2>(head, 18).and_then(|machine| u16::try_from(machine).ok()) {
        Some(X86_64) => Format::Elf {
            interpreter: interpreter(head),
        },
        Some(machine) => Format::ElfOther { machine },
        None => Format::Other,
    }
}

fn interpreter(head: &[u8]) -> Option<String> {
    let (table, size, count) = (
        number::<8>(head, 32)?,
        number::<2>(head, 54)?,
        number::<2>(head, 56)?,
    );
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(size)?)?;
        if number::<4>(head, at)? == u64::from(PT_INTERP) {
            let from = usize::try_from(number::<8>(head, at.checked_add(8)?)?).ok()?;
            let bytes = head.get(from..)?.split(|byte| *byte == 0).next()?;
            return String::from_utf8(bytes.to_vec()).ok();
        }
    }
    None
}

/// A little-endian number of `N` bytes.
fn number<const N: usize>(head: &[u8], at: u64) -> Option<u64> {
    let bytes: &[u8; N] = head.get(usize::try_from(at).ok()?..)?.first_chunk()?;
    let mut wide = [0; 8];
    wide.get_mut(..N)?.copy_from_slice(bytes);
    Some(u64::from_le_bytes(wide))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_apart() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let Format::Elf {
            interpreter: Some(interpreter),
        } = format(&own)
        else {
            panic!("{:?}", format(&own[..64]))
        };
        assert!(interpreter.contains("ld-linux"), "{interpreter}");
        assert_eq!(
            format(b"#!/usr/bin/env node\nx"),
            Format::Script(vec!["/usr/bin/env".into(), "node".into()])
        );
        assert_eq!(format(b"MZ"), Format::Other);
        let mut arm = own[..64].to_vec();
        arm[18] = 183;
        assert_eq!(format(&arm), Format::ElfOther { machine: 183 });
    }

    #[test]
    fn cut_headers_do_no_harm() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        for len in 0..256 {
            format(&own[..len]);
        }
    }
}
