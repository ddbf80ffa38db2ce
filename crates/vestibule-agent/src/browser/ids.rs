//! The ids by which one installation of Chromium is told from another. It makes them when a profile is new, writes them
//! into its preferences, and reads them again only at its next start, which costs 45 CPU seconds under emulation. A copy
//! of a running browser therefore gets its own where they are: in the preferences on disk, and in the memory of the one process
//! that holds them, at the same length. That process stands still meanwhile: a block of its heap that it frees is not written
//! to when it is another one's, and no old id is moved to where we have looked already. An id that is in the preferences and
//! not in the memory is an error, and the caller starts the browser anew.
//!
//! Left the same in all copies are two small numbers that are made so as not to tell installations apart
//! (`low_entropy_source3` of 8000, `pseudo_low_entropy_source`): groups of field trials, which our policies switch off.
use super::{
    copy,
    memory::{self, Stopped},
};
use memchr::memmem;
use rand::Rng as _;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
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
/// Crashpad's own id of an installation, in binary (client/settings.cc, `Settings::Data`). It is read anew at each use.
const CRASHPAD: &str = "Crash Reports/settings.dat";
const CRASHPAD_MAGIC: &[u8] = b"sdPC";
const CRASHPAD_ID: u64 = 24;
/// Chromium writes a file beside the old one, under a name that begins so, and renames it.
const UNFINISHED: &str = ".org.chromium.Chromium.";

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
    #[error("stop the browser")]
    Stop(#[source] io::Error),
    #[error("read or write the browser's memory")]
    Memory(#[source] io::Error),
    #[error("read or write what the browser was writing")]
    Unfinished(#[source] io::Error),
    #[error("replace the browser's ids: its memory has {found} of {known}")]
    Missed { found: usize, known: usize },
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
    let process = copy::process(profile).map_err(IdsError::Process)?;
    let stopped = Stopped::new(process).map_err(IdsError::Stop)?;
    let old = known(profile)?;
    if old.is_empty() {
        return Err(IdsError::None);
    }
    let pairs: Vec<(Vec<u8>, Vec<u8>)> = old
        .iter()
        .map(|id| (id.clone().into_bytes(), another(id).into_bytes()))
        .collect();
    let found = memory::replace(&stopped, &pairs).map_err(IdsError::Memory)?;
    if found < pairs.len() {
        let known = pairs.len();
        return Err(IdsError::Missed { found, known });
    }
    for name in FILES {
        let file = profile.join(name);
        replace_in_file(&file, &pairs).map_err(|err| IdsError::Read(name, err))?;
        for file in unfinished_beside(&file).map_err(IdsError::Unfinished)? {
            replace_in_file(&file, &pairs).map_err(IdsError::Unfinished)?;
        }
    }
    renew_crashpad(&profile.join(CRASHPAD)).map_err(|err| IdsError::Read(CRASHPAD, err))?;
    Ok(pairs.len())
}

/// There is no file before Crashpad has been asked for anything.
fn renew_crashpad(path: &Path) -> io::Result<()> {
    let file = match File::options().read(true).write(true).open(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let mut magic = [0; CRASHPAD_MAGIC.len()];
    file.read_exact_at(&mut magic, 0)?;
    if magic != CRASHPAD_MAGIC {
        return Err(io::ErrorKind::InvalidData.into());
    }
    file.write_all_at(&uuid::Uuid::new_v4().to_bytes_le(), CRASHPAD_ID)
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

fn unfinished_beside(file: &Path) -> io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(file.parent().unwrap_or(file))? {
        let entry = entry?;
        let unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
        if unfinished && entry.file_type()?.is_file() {
            all.push(entry.path());
        }
    }
    Ok(all)
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
        // What the browser was about to put in the file's place, and Crashpad's settings.
        let unfinished = profile.join("Default/.org.chromium.Chromium.AbCdEf");
        fs::write(&unfinished, &prefs[..prefs.len() / 2]).unwrap();
        fs::create_dir(profile.join("Crash Reports")).unwrap();
        let crashpad = [b"sdPC\x01".as_slice(), &[0; 19], &[7; 16]].concat();
        fs::write(profile.join(CRASHPAD), &crashpad).unwrap();
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
        assert_eq!(
            fs::read_to_string(unfinished).unwrap(),
            text[..prefs.len() / 2]
        );
        let settings = fs::read(profile.join(CRASHPAD)).unwrap();
        assert_eq!((settings.len(), &settings[..24]), (40, &crashpad[..24]));
        assert_ne!(settings[24..], crashpad[24..]);
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
