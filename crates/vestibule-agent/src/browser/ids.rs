//! The ids by which one installation of Chromium is told from another. It makes them when a profile is new, writes them
//! into its preferences, and reads them again only at its next start, which costs 45 CPU seconds under emulation. A copy
//! of a running browser therefore gets its own where they are: in the preferences on disk, and in the memory of the one process
//! that holds them, at the same length. Nothing of the old ones may be left anywhere; otherwise this is an error, and the
//! caller starts the browser anew.
//!
//! Left the same in all copies are two small numbers that are made so as not to tell installations apart
//! (`low_entropy_source3` of 8000, `pseudo_low_entropy_source`): groups of field trials, which our policies switch off.
use super::copy;
use memchr::memmem;
use rand::Rng as _;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
};

/// Below the directory of the profile's data.
const FILES: [&str; 2] = ["Local State", "Default/Preferences"];
/// Ids that are not written as GUIDs.
const POINTERS: [&str; 3] = [
    "/user_experience_metrics/limited_entropy_randomization_source",
    "/autofill/ablation_seed",
    "/media_router/receiver_id_hash_token",
];
/// A preferences file has some 20 KiB.
const FILE_LIMIT: u64 = 8 << 20;
/// Below this a search could hit what is no id.
const SHORTEST: usize = 12;
const PAGE: u64 = 4096;
/// The memory is gone through so often, at most, until nothing old is in it.
const PASSES: u32 = 3;
/// Memory is read in such pieces.
const PIECE: u64 = 1 << 20;

/// Why the ids are still the old ones, or might be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdsError {
    #[error("read the browser's preferences `{0}`")]
    Read(&'static str, #[source] io::Error),
    #[error("understand the browser's preferences `{0}`")]
    Parse(&'static str, #[source] serde_json::Error),
    #[error("find the browser's ids: its preferences have none")]
    None,
    #[error("find the browser's process")]
    Process(#[source] io::Error),
    #[error("read or write the browser's memory")]
    Memory(#[source] io::Error),
    #[error("replace the browser's ids: its memory has {found} of {known}")]
    Missed { found: usize, known: usize },
    #[error("replace the browser's ids: an old one is left in its memory")]
    Left,
}

/// Whether the preferences have been written with ids in them.
pub(crate) fn are_known(profile: &Path) -> bool {
    known(profile).is_ok_and(|ids| !ids.is_empty())
}

/// Gives the running browser ids of its own. Blocks for a second or so.
///
/// # Errors
/// When one could not be found or replaced; then the browser must start anew with an empty profile.
pub(crate) fn renew(profile: &Path) -> Result<usize, IdsError> {
    let old = known(profile)?;
    if old.is_empty() {
        return Err(IdsError::None);
    }
    let pairs: Vec<(Vec<u8>, Vec<u8>)> = old
        .iter()
        .map(|id| (id.clone().into_bytes(), another(id).into_bytes()))
        .collect();
    let process = copy::process(profile).map_err(IdsError::Process)?;
    let memory = Memory::of(process).map_err(IdsError::Memory)?;
    let found = memory.replace(&pairs).map_err(IdsError::Memory)?;
    if found < pairs.len() {
        let known = pairs.len();
        return Err(IdsError::Missed { found, known });
    }
    for name in FILES {
        replace_in_file(&profile.join(name), &pairs).map_err(|err| IdsError::Read(name, err))?;
    }
    // What the process has copied while we went through it.
    for _ in 0..PASSES {
        if memory.replace(&pairs).map_err(IdsError::Memory)? == 0 {
            return Ok(pairs.len());
        }
    }
    Err(IdsError::Left)
}

fn known(profile: &Path) -> Result<BTreeSet<String>, IdsError> {
    let mut ids = BTreeSet::new();
    for name in FILES {
        let bytes = read(&profile.join(name)).map_err(|err| IdsError::Read(name, err))?;
        let prefs = serde_json::from_slice(&bytes).map_err(|err| IdsError::Parse(name, err))?;
        collect(&prefs, &mut ids);
        let named = POINTERS.iter().filter_map(|at| prefs.pointer(at)?.as_str());
        ids.extend(named.filter(|id| id.len() >= SHORTEST).map(str::to_owned));
    }
    Ok(ids)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, FILE_LIMIT), &mut bytes)?;
    Ok(bytes)
}

/// Every string that is a GUID, wherever it is.
fn collect(value: &Value, ids: &mut BTreeSet<String>) {
    match value {
        Value::String(text) if is_guid(text) => {
            ids.insert(text.clone());
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, ids)),
        Value::Object(values) => values.values().for_each(|value| collect(value, ids)),
        Value::String(_) | Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// RFC 9562, section 4.
fn is_guid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// A random text of the same shape.
fn another(id: &str) -> String {
    const BASE64: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let guid = is_guid(id);
    let digits: &[u8] = if guid {
        b"0123456789abcdef"
    } else if id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        b"0123456789ABCDEF"
    } else {
        BASE64
    };
    let mut rng = rand::rng();
    let mut new: Vec<u8> = id.bytes().collect();
    // The last digit before `=` holds bits that must be zero (RFC 4648, section 3.5).
    let last = id.trim_end_matches('=').len() - usize::from(id.ends_with('='));
    for (at, byte) in new.iter_mut().enumerate() {
        // A GUID's version and variant stay.
        let fixed = matches!(*byte, b'-' | b'=') || at >= last || guid && matches!(at, 14 | 19);
        if !fixed {
            *byte = digits[rng.random_range(0..digits.len())];
        }
    }
    String::from_utf8(new).unwrap_or_default()
}

fn replace_in_file(path: &Path, pairs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
    let mut bytes = read(path)?;
    for (old, new) in pairs {
        for at in memmem::find_iter(&bytes.clone(), old) {
            bytes[at..at + old.len()].copy_from_slice(new);
        }
    }
    // The same file: it stays the person's.
    let file = File::options().write(true).open(path)?;
    file.write_all_at(&bytes, 0)
}

/// The private memory of a process, as its owner's superior sees it (proc(5): `mem`, `maps`, `pagemap`).
struct Memory {
    mem: File,
    pagemap: File,
    /// From, and to.
    areas: Vec<(u64, u64)>,
}

impl Memory {
    fn of(process: u32) -> io::Result<Self> {
        let directory = format!("/proc/{process}");
        let areas = fs::read_to_string(format!("{directory}/maps"))?
            .lines()
            .filter_map(writable_area)
            .collect();
        Ok(Self {
            mem: File::options()
                .read(true)
                .write(true)
                .open(format!("{directory}/mem"))?,
            pagemap: File::open(format!("{directory}/pagemap"))?,
            areas,
        })
    }

    /// Replaces each first of a pair by its second. Says how many of the pairs were found at all.
    fn replace(&self, pairs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<usize> {
        let mut found = vec![false; pairs.len()];
        for run in self.runs() {
            let (from, to) = run?;
            let mut at = from;
            while at < to {
                let piece = usize::try_from((to - at).min(PIECE)).unwrap_or_default();
                let mut bytes = vec![0; piece];
                // What the process has given back meanwhile holds nothing.
                if self.mem.read_exact_at(&mut bytes, at).is_ok() {
                    self.replace_in(&bytes, at, pairs, &mut found)?;
                }
                at += piece as u64;
                if at < to {
                    // An id may lie across the border of two pieces.
                    at -= PAGE;
                }
            }
        }
        Ok(found.into_iter().filter(|found| *found).count())
    }

    fn replace_in(
        &self,
        bytes: &[u8],
        base: u64,
        pairs: &[(Vec<u8>, Vec<u8>)],
        found: &mut [bool],
    ) -> io::Result<()> {
        for ((old, new), found) in pairs.iter().zip(found) {
            for at in memmem::find_iter(bytes, old) {
                self.mem.write_all_at(new, base + at as u64)?;
                *found = true;
            }
        }
        Ok(())
    }

    /// Stretches of pages that are there and the process's own.
    fn runs(&self) -> impl Iterator<Item = io::Result<(u64, u64)>> {
        self.areas.iter().flat_map(|&(from, to)| {
            let pages = usize::try_from((to - from) / PAGE).unwrap_or_default();
            match self.present(from, pages) {
                Ok(runs) => runs.into_iter().map(Ok).collect::<Vec<_>>(),
                Err(err) => vec![Err(err)],
            }
        })
    }

    fn present(&self, from: u64, pages: usize) -> io::Result<Vec<(u64, u64)>> {
        const ENTRY: usize = 8;
        /// Entries that are read at a time.
        const BATCH: usize = 8192;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut entries = vec![0; ENTRY * BATCH];
        for batch in (0..pages).step_by(BATCH) {
            let count = BATCH.min(pages - batch);
            let entries = &mut entries[..count * ENTRY];
            let first = from / PAGE + batch as u64;
            self.pagemap.read_exact_at(entries, first * ENTRY as u64)?;
            for (index, entry) in entries.chunks_exact(ENTRY).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                // Bit 63: present; bit 61: a file's, or shared (admin-guide/mm/pagemap.rst).
                if entry >> 63 != 1 || (entry >> 61) & 1 == 1 {
                    continue;
                }
                let page = from + (batch + index) as u64 * PAGE;
                match runs.last_mut() {
                    Some((_, end)) if *end == page => *end += PAGE,
                    _ => runs.push((page, page + PAGE)),
                }
            }
        }
        Ok(runs)
    }
}

/// A line of `maps` that is readable, writable and private (proc(5)).
fn writable_area(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    fields
        .next()
        .filter(|mode| mode.starts_with("rw") && mode.ends_with('p'))?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some((address(from)?, address(to)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const GUID: &str = "50544a6e-330b-4c66-a0ae-be66983792e3";

    #[test]
    fn another_id_has_the_same_shape() {
        for id in [
            GUID,
            "37B7C6775B0F1818B95773C3BD62E0C7",
            "TpIaL9styRc=",
            "fw1UtZFSZoL+5Jdd6Pl7SMpTReKDpvuloqcPkx9MBFeKNyXQPAcoV75bNUhB4ZO/pltnKUJ7mV+KjS0viVaVAg==",
        ] {
            let new = another(id);
            assert_eq!(new.len(), id.len());
            assert_ne!(new, id);
            assert_eq!(is_guid(&new), is_guid(id));
            assert_eq!(new.ends_with('='), id.ends_with('='));
            let hex = |text: &str| {
                text.bytes()
                    .all(|b| b.is_ascii_hexdigit() && !b.is_ascii_lowercase())
            };
            assert_eq!(hex(&new), hex(id), "{new}");
        }
    }

    #[test]
    fn the_ids_of_a_running_process_are_replaced_in_its_memory_and_files() {
        let dir = camino_tempfile::tempdir().unwrap();
        let profile = dir.path().as_std_path();
        fs::create_dir(profile.join("Default")).unwrap();
        let token = "fw1UtZFSZoL+5Jdd6Pl7SMpTReKDpvuloqcPkx9MBFeKNyXQ";
        let prefs = format!(
            r#"{{"enterprise_profile_guid":"{GUID}","media_router":{{"receiver_id_hash_token":"{token}"}},"x":[1]}}"#
        );
        fs::write(profile.join("Default/Preferences"), &prefs).unwrap();
        assert!(!are_known(profile));
        fs::write(profile.join("Local State"), "{}").unwrap();
        assert!(are_known(profile));
        // A process that holds both on its heap, and says what it holds when it is asked.
        let script = "read -r line; echo ready; read -r _; echo \"$line\"";
        let mut child = std::process::Command::new("/bin/bash")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        symlink(
            format!("host-{}", child.id()),
            profile.join("SingletonLock"),
        )
        .unwrap();
        let (mut to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut lines = io::BufRead::lines(io::BufReader::new(from));
        io::Write::write_all(&mut to, format!("{GUID} {token}\n").as_bytes()).unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        assert_eq!(renew(profile).unwrap(), 2);
        io::Write::write_all(&mut to, b"\n").unwrap();
        let held = lines.next().unwrap().unwrap();
        child.wait().unwrap();
        let (guid, other) = held.split_once(' ').unwrap();
        assert!(is_guid(guid) && guid != GUID && other != token, "{held}");
        let text = fs::read_to_string(profile.join("Default/Preferences")).unwrap();
        assert!(text.contains(guid) && text.contains(other), "{text}");
        assert_eq!(text.len(), prefs.len());
        // A process that has none of them.
        let mut other = std::process::Command::new("/bin/sleep")
            .arg("60")
            .spawn()
            .unwrap();
        fs::remove_file(profile.join("SingletonLock")).unwrap();
        symlink(
            format!("host-{}", other.id()),
            profile.join("SingletonLock"),
        )
        .unwrap();
        assert!(matches!(
            renew(profile),
            Err(IdsError::Missed { found: 0, known: 2 })
        ));
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
