//! Disks by serial number, and the config drive: what the host tells this VM about itself.
use crate::uevent::Uevents;
use rustix::{fs::OFlags, io::Errno};
use std::{
    fs, io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};
use vestibule_api::stream::{CONFIG_DRIVE_LEN, CONFIG_DRIVE_SERIAL, ConfigDrive};

/// Why a disk or its content could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriveError {
    #[error("listen to the kernel's device events")]
    Subscribe(#[source] Errno),
    #[error("find the disk with serial `{serial}` within {waited_s} s; the kernel shows {found}")]
    Missing {
        serial: String,
        waited_s: u64,
        found: String,
    },
    #[error("read the config drive `{}`", path.display())]
    Read {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("understand the config drive")]
    Parse(#[source] serde_json::Error),
}

/// Waits for the disk with `serial` and returns its device node. Under a VMM whose disks have no serial numbers of ours the
/// kernel's command line says which is which by name.
///
/// # Errors
/// After `limit`, with the names and serials of the disks that are there.
pub(crate) fn find_disk(serial: &str, limit: Duration) -> Result<PathBuf, DriveError> {
    let sys = Path::new("/sys/block");
    let options = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let told = told(&options, serial);
    let name = Uevents::subscribe()
        .map_err(DriveError::Subscribe)?
        .wait_for(limit, || {
            disks(sys).into_iter().find(|(name, its)| match told {
                Some(told) => name == told,
                None => its == serial,
            })
        })
        .map(|(name, _)| name);
    name.map(|name| Path::new("/dev").join(name))
        .ok_or_else(|| DriveError::Missing {
            serial: serial.to_owned(),
            waited_s: limit.as_secs(),
            found: describe(&disks(sys)),
        })
}

/// The disk's name, where a kernel command line has it: `vestibule.root=vda` for the serial `vestibule-root`.
fn told<'a>(options: &'a str, serial: &str) -> Option<&'a str> {
    let key = serial.replacen('-', ".", 1);
    options
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix(key.as_str())?.strip_prefix('='))
}

/// Name and serial of every disk under `sys`; a disk without a serial has an empty one.
fn disks(sys: &Path) -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir(sys) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| {
            // virtio-blk shows its serial beside the disk's attributes, not under `device/`.
            let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            (
                entry.file_name().to_string_lossy().into_owned(),
                serial.trim().to_owned(),
            )
        })
        .collect()
}

fn describe(disks: &[(String, String)]) -> String {
    if disks.is_empty() {
        return "no disk at all".to_owned();
    }
    let mut names: Vec<_> = disks
        .iter()
        .map(|(name, serial)| format!("{name} (`{serial}`)"))
        .collect();
    names.sort();
    names.join(", ")
}

/// A page-aligned buffer, as `O_DIRECT` asks for.
#[repr(align(4096))]
struct Page([u8; CONFIG_DRIVE_LEN]);

/// Reads the config drive, past the page cache: after a restore the host has written it anew.
///
/// # Errors
/// When the disk is not there, cannot be read or does not hold what it should.
pub(crate) fn read(limit: Duration) -> Result<ConfigDrive, DriveError> {
    let path = find_disk(CONFIG_DRIVE_SERIAL, limit)?;
    let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(direct)
        .open(&path);
    let mut page = Box::new(Page([0; CONFIG_DRIVE_LEN]));
    file.and_then(|file| file.read_exact_at(&mut page.0, 0))
        .map_err(|err| DriveError::Read { path, err })?;
    let parsed = parse(&page.0);
    zeroize::Zeroize::zeroize(&mut page.0);
    parsed
}

/// JSON, padded with NUL.
fn parse(bytes: &[u8]) -> Result<ConfigDrive, DriveError> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    serde_json::from_slice(&bytes[..end]).map_err(DriveError::Parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drive_is_json_padded_with_nul() {
        let drive = ConfigDrive {
            machine_id: vestibule_api::ids::MachineId::generate(),
            generation: 3,
            stream_key: "a2V5".into(),
            now_micros: 5,
            entropy: String::new(),
            hostname: "guest".into(),
        };
        let mut bytes = serde_json::to_vec(&drive).unwrap();
        bytes.resize(CONFIG_DRIVE_LEN, 0);
        assert_eq!(parse(&bytes).unwrap().machine_id, drive.machine_id);
        assert!(matches!(
            parse(&[0; CONFIG_DRIVE_LEN]),
            Err(DriveError::Parse(_))
        ));
    }

    #[test]
    fn disks_are_told_apart_by_serial() {
        let sys = camino_tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "vestibule-root\n"), ("vdb", "vestibule-config")] {
            fs::create_dir(sys.path().join(name)).unwrap();
            fs::write(sys.path().join(name).join("serial"), serial).unwrap();
        }
        fs::create_dir(sys.path().join("loop0")).unwrap();
        let found = disks(sys.path().as_std_path());
        assert!(found.contains(&("vda".into(), "vestibule-root".into())));
        assert_eq!(
            describe(&found),
            "loop0 (``), vda (`vestibule-root`), vdb (`vestibule-config`)"
        );
        assert_eq!(describe(&[]), "no disk at all");
    }

    #[test]
    fn the_command_line_may_name_the_disks() {
        let options = "quiet vestibule.rootless=x vestibule.root=vda vestibule.config=vdb\n";
        assert_eq!(told(options, "vestibule-root"), Some("vda"));
        assert_eq!(told(options, CONFIG_DRIVE_SERIAL), Some("vdb"));
        assert_eq!(told("quiet", CONFIG_DRIVE_SERIAL), None);
    }
}
