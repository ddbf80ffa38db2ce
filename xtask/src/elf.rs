//! Just enough of ELF (System V ABI, chapters 4 and 5) to tell a static position-independent executable from others.
use anyhow::{Context as _, bail, ensure};

const ET_DYN: u16 = 3;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const EM_X86_64: u16 = 62;

/// Checks that `bytes` are an x86-64 executable that is relocated by itself: position-independent, with a dynamic
/// section for its own relocations, and without a program interpreter.
///
/// # Errors
/// Says what it is instead.
pub(crate) fn ensure_static_pie(bytes: &[u8]) -> anyhow::Result<()> {
    ensure!(
        bytes.starts_with(b"\x7fELF\x02\x01"),
        "not a 64-bit little-endian ELF file"
    );
    ensure!(u16_at(bytes, 18)? == EM_X86_64, "not for x86-64");
    let kind = u16_at(bytes, 16)?;
    ensure!(kind == ET_DYN, "not position-independent (e_type {kind})");
    let kinds = segments(bytes)?;
    if kinds.contains(&PT_INTERP) {
        bail!("dynamically linked: it names a program interpreter");
    }
    ensure!(
        kinds.contains(&PT_DYNAMIC),
        "no dynamic section, so it cannot relocate itself"
    );
    Ok(())
}

/// `p_type` of each program header.
fn segments(bytes: &[u8]) -> anyhow::Result<Vec<u32>> {
    let table = usize::try_from(u64::from_le_bytes(field(bytes, 32)?))?;
    let size = usize::from(u16_at(bytes, 54)?);
    let count = usize::from(u16_at(bytes, 56)?);
    (0..count)
        .map(|index| Ok(u32::from_le_bytes(field(bytes, table + index * size)?)))
        .collect()
}

fn u16_at(bytes: &[u8], at: usize) -> anyhow::Result<u16> {
    Ok(u16::from_le_bytes(field(bytes, at)?))
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> anyhow::Result<[u8; N]> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .with_context(|| format!("ELF file ends before byte {at}"))
}

#[cfg(test)]
mod tests {
    use super::ensure_static_pie;

    #[test]
    fn a_dynamic_program_is_refused() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let refusal = ensure_static_pie(&own).unwrap_err().to_string();
        assert!(refusal.contains("program interpreter"), "{refusal}");
    }

    #[test]
    fn anything_cut_or_foreign_is_refused() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        for bytes in [&own[..0], &own[..20], &own[..63], b"#!/bin/sh\n"] {
            assert!(ensure_static_pie(bytes).is_err());
        }
    }
}
