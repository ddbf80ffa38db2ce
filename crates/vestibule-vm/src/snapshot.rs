//! A snapshot's files on the host: trimmed, digested and sealed after a save, checked before a restore.
//!
//! The memory is as large as the guest's, so what is read of it is only what is not a hole, and a file that has been
//! checked is not read again while nothing can have changed it: [`VERIFIED_FILE`] keeps device, inode, size, mtime and
//! ctime together with the host's boot id. Every way of changing a file's content through the kernel changes its ctime,
//! and no system call sets one; only a clock that was set back to the same nanosecond, or a write to the raw disk, goes
//! unseen, and only root can do either. What a crash leaves unwritten shows after the boot, when the file is read again. What a
//! disk loses while the host is up does not: a page that the kernel dropped is read again by whichever copy touches it.
//! Whoever could forge the note could as well forge the runner: both belong
//! to the same user.
use crate::{file::FileIdentity, kept::boot_id};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
};
use vestibule_api::{
    ids::SnapshotId,
    machine::{DriverChoice, RestoreSpec, Saved},
    snapshot::{
        Binding, MANIFEST_FILE, MEMORY_FILE, SNAPSHOT_SCHEMA, STATE_FILE, SavedFile,
        SnapshotManifest,
    },
    time::Timestamp,
};

/// Beside the manifest: which files were found whole, and when they were what they were.
pub const VERIFIED_FILE: &str = "verified.json";
/// What [`SavedFile::sha256`] calls a block.
const BLOCK: usize = 64 << 10;
/// A hole is made of whole pages.
const PAGE: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];
const MANIFEST_LIMIT: u64 = 1 << 20;

/// Why a snapshot cannot be restored. Its text is a reason to boot instead.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("read the snapshot's `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("use the snapshot: it is being removed")]
    Removed,
    #[error("use the snapshot `{id}`: its manifest is another one's, `{found}`")]
    OtherManifest { id: String, found: String },
    #[error("understand the snapshot's manifest")]
    Parse(#[source] serde_json::Error),
    #[error("use the snapshot's `{name}`: it has {found} bytes, the manifest says {expected}")]
    Length {
        name: &'static str,
        found: u64,
        expected: u64,
    },
    #[error(
        "use the snapshot's `{name}`: its content is not what was saved (SHA-256 {found}, the manifest says {expected})"
    )]
    Content {
        name: &'static str,
        found: String,
        expected: String,
    },
    #[error("restore the snapshot: {0}")]
    Mismatch(String),
}

/// A snapshot that is held: while this exists, nobody removes it.
#[derive(Debug)]
pub struct Snapshot {
    pub manifest: SnapshotManifest,
    pub memory: Utf8PathBuf,
    pub state: File,
    /// Locked shared (flock(2)) for as long as it is open.
    pub hold: File,
}

impl Snapshot {
    /// Opens, holds and checks the snapshot that `spec` names. Blocks on the disk.
    ///
    /// # Errors
    /// When it is missing, is another one, or a file is not what was saved.
    pub fn open(spec: &RestoreSpec) -> Result<Self, SnapshotError> {
        let directory = Utf8Path::new(&spec.dir);
        let path = directory.join(MANIFEST_FILE);
        let (hold, bytes) = manifest_bytes(&path)?;
        let found = hex(Sha256::digest(&bytes));
        if found != spec.id.as_str() {
            let id = spec.id.to_string();
            return Err(SnapshotError::OtherManifest { id, found });
        }
        let manifest: SnapshotManifest =
            serde_json::from_slice(&bytes).map_err(SnapshotError::Parse)?;
        verify(directory, &manifest)?;
        let state = directory.join(STATE_FILE);
        Ok(Self {
            manifest,
            memory: directory.join(MEMORY_FILE),
            state: File::open(&state).map_err(|err| SnapshotError::Read { path: state, err })?,
            hold,
        })
    }
}

/// Whose snapshot it is, where it can be read. Nothing is held or checked: [`Snapshot::open`] does.
pub fn driver_of(spec: &RestoreSpec) -> Option<DriverChoice> {
    let (_hold, bytes) = manifest_bytes(&Utf8Path::new(&spec.dir).join(MANIFEST_FILE)).ok()?;
    let manifest: SnapshotManifest = serde_json::from_slice(&bytes).ok()?;
    DriverChoice::of(&manifest.binding.driver)
}

fn manifest_bytes(path: &Utf8Path) -> Result<(File, Vec<u8>), SnapshotError> {
    let read = || -> io::Result<Option<(File, Vec<u8>)>> {
        let hold = File::open(path)?;
        match flock(&hold, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(err) => return Err(err.into()),
        }
        let mut bytes = Vec::new();
        (&hold).take(MANIFEST_LIMIT).read_to_end(&mut bytes)?;
        Ok(Some((hold, bytes)))
    };
    read()
        .map_err(|err| SnapshotError::Read {
            path: path.to_owned(),
            err,
        })?
        .ok_or(SnapshotError::Removed)
}

/// What a file was when it was found whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    #[serde(flatten)]
    file: FileIdentity,
    sha256: String,
}

/// `verified.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verified {
    boot_id: String,
    memory: Stamp,
    state: Stamp,
}

fn stamp(file: &File, sha256: &str) -> io::Result<Stamp> {
    Ok(Stamp {
        file: file.metadata()?.into(),
        sha256: sha256.to_owned(),
    })
}

/// Checks both files, or sees that they were checked.
fn verify(directory: &Utf8Path, manifest: &SnapshotManifest) -> Result<(), SnapshotError> {
    let open = |name: &'static str, saved: &SavedFile| {
        let path = directory.join(name);
        let read = |path: &Utf8Path| -> io::Result<(File, Stamp)> {
            let file = File::open(path)?;
            let stamp = stamp(&file, &saved.sha256)?;
            Ok((file, stamp))
        };
        let (file, stamp) = read(&path).map_err(|err| SnapshotError::Read { path, err })?;
        if stamp.file.bytes == saved.bytes {
            Ok((file, stamp))
        } else {
            Err(SnapshotError::Length {
                name,
                found: stamp.file.bytes,
                expected: saved.bytes,
            })
        }
    };
    let (memory, memory_stamp) = open(MEMORY_FILE, &manifest.memory)?;
    let (state, state_stamp) = open(STATE_FILE, &manifest.state)?;
    let now = boot_id().ok().map(|boot_id| Verified {
        boot_id,
        memory: memory_stamp,
        state: state_stamp,
    });
    let path = directory.join(VERIFIED_FILE);
    let known = || {
        let bytes = std::fs::read(&path).ok()?;
        serde_json::from_slice::<Verified>(&bytes).ok()
    };
    if now.is_some() && known() == now {
        return Ok(());
    }
    for (name, file, saved) in [
        (MEMORY_FILE, &memory, &manifest.memory),
        (STATE_FILE, &state, &manifest.state),
    ] {
        let found = digest(file).map_err(|err| SnapshotError::Read {
            path: directory.join(name),
            err,
        })?;
        if found != saved.sha256 {
            return Err(SnapshotError::Content {
                name,
                found,
                expected: saved.sha256.clone(),
            });
        }
    }
    // Without the note the next restore reads the files again; nothing else comes of it.
    if let Some(now) = now {
        let _ = note(directory, &now);
    }
    Ok(())
}

fn note(directory: &Utf8Path, verified: &Verified) -> io::Result<()> {
    let partial = directory.join(format!(".{VERIFIED_FILE}.{}", std::process::id()));
    let written = create(&partial, true)
        .and_then(|mut file| file.write_all(&serde_json::to_vec(verified)?))
        .and_then(|()| std::fs::rename(&partial, directory.join(VERIFIED_FILE)));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn create(path: &Utf8Path, again: bool) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600);
    if again {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    options.open(path)
}

/// Makes the memory file of a VM that will be saved. All its room is taken at once: a disk that filled up later would
/// end the VMM with SIGBUS in the middle of a write of the guest's.
///
/// # Errors
/// `ENOSPC` where the disk has no room for the guest's whole memory.
pub fn make_memory(directory: &Utf8Path, memory_mib: u32) -> io::Result<Utf8PathBuf> {
    let path = directory.join(MEMORY_FILE);
    let file = create(&path, false)?;
    fallocate(
        &file,
        FallocateFlags::empty(),
        0,
        u64::from(memory_mib) << 20,
    )?;
    Ok(path)
}

/// Makes the file for the VMM's state.
///
/// # Errors
/// When it exists, or cannot be made.
pub fn make_state(directory: &Utf8Path) -> io::Result<File> {
    create(&directory.join(STATE_FILE), false)
}

/// Trims the memory, digests both files and writes the manifest. Nobody writes to the files any more. Blocks on the disk.
///
/// # Errors
/// When the disk fails or is full.
pub fn seal(directory: &Utf8Path, binding: Binding) -> io::Result<Saved> {
    let open = |name: &str| {
        File::options()
            .read(true)
            .write(true)
            .open(directory.join(name))
    };
    let (memory, state) = (open(MEMORY_FILE)?, open(STATE_FILE)?);
    trim(&memory)?;
    // A jailed Firecracker, whom the files are bound for, is another user; the directory lets nobody else in. Changed later, they
    // would have to be read again.
    let foreign = rustix::process::geteuid().is_root()
        && DriverChoice::of(&binding.driver) == Some(DriverChoice::Firecracker);
    let saved = |file: &File| -> io::Result<SavedFile> {
        let sha256 = digest(file)?;
        // Blocks are counted when they are written, not before.
        file.sync_all()?;
        if foreign {
            file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
        }
        let meta = file.metadata()?;
        Ok(SavedFile {
            bytes: meta.len(),
            allocated_bytes: meta.blocks() * 512,
            sha256,
        })
    };
    let manifest = SnapshotManifest {
        schema: SNAPSHOT_SCHEMA,
        binding,
        taken_at: Timestamp::now(),
        memory: saved(&memory)?,
        state: saved(&state)?,
    };
    let bytes = serde_json::to_vec_pretty(&manifest)?;
    let mut file = create(&directory.join(MANIFEST_FILE), false)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    if let Ok(boot_id) = boot_id() {
        let verified = Verified {
            boot_id,
            memory: stamp(&memory, &manifest.memory.sha256)?,
            state: stamp(&state, &manifest.state.sha256)?,
        };
        let _ = note(directory, &verified);
    }
    let id: SnapshotId = hex(Sha256::digest(&bytes))
        .parse()
        .map_err(io::Error::other)?;
    Ok(Saved { id, manifest })
}

/// Makes holes of all pages that are zero. Room that was taken and never written is zero as well.
fn trim(file: &File) -> io::Result<()> {
    let punch = |from: u64, to: u64| {
        if from == to {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, from, to - from)
    };
    // Zero so far from here to where we are.
    let mut zero_from = 0;
    let mut at = 0;
    blocks(file, |number, block| {
        let start = number * BLOCK as u64;
        for (index, page) in block.chunks(PAGE).enumerate() {
            at = start + (index * PAGE) as u64;
            if page != &ZEROS[..page.len()] {
                punch(zero_from, at)?;
                zero_from = at + page.len() as u64;
            }
        }
        Ok(())
    })?;
    punch(zero_from, file.metadata()?.len().max(zero_from))?;
    Ok(())
}

/// The digest that a manifest holds (see [`SavedFile::sha256`]). Blocks on the disk.
///
/// # Errors
/// When the file cannot be read.
pub fn digest(file: &File) -> io::Result<String> {
    let mut sha = Sha256::new();
    blocks(file, |number, block| {
        if block != &ZEROS[..block.len()] {
            sha.update(number.to_le_bytes());
            sha.update(block);
        }
        Ok(())
    })?;
    sha.update(file.metadata()?.len().to_le_bytes());
    Ok(hex(sha.finalize()))
}

/// Calls `each` with every block that is not a hole.
fn blocks(file: &File, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let len = file.metadata()?.len();
    let mut buffer = vec![0; BLOCK];
    let mut at = 0;
    while at < len {
        at = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data - data % BLOCK as u64,
            Err(Errno::NXIO) => return Ok(()),
            Err(err) => return Err(err.into()),
        };
        let length = usize::try_from(len - at).unwrap_or(BLOCK).min(BLOCK);
        file.read_exact_at(&mut buffer[..length], at)?;
        each(at / BLOCK as u64, &buffer[..length])?;
        at += length as u64;
    }
    Ok(())
}

pub(crate) fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding() -> Binding {
        Binding {
            image_digest: "a".repeat(64).parse().unwrap(),
            agent_build: String::new(),
            driver: String::new(),
            vmm_version: String::new(),
            machine: String::new(),
            cpu: String::new(),
            cpu_features: Vec::new(),
            memory_mib: 8,
            vcpus: 1,
            runner: String::new(),
            arguments: String::new(),
            cmdline: String::new(),
            tsc_khz: 1,
        }
    }

    /// A snapshot of 8 MiB with three pages of data.
    fn snapshot(directory: &Utf8Path) -> RestoreSpec {
        let memory = File::options()
            .write(true)
            .open(make_memory(directory, 8).unwrap())
            .unwrap();
        for at in [4096, 1 << 20, (8 << 20) - 4096] {
            memory.write_all_at(&[7; 4096], at).unwrap();
        }
        // Pages that were used and are zero again.
        memory.write_all_at(&[0; 1 << 20], 4 << 20).unwrap();
        make_state(directory).unwrap().write_all(b"state").unwrap();
        let saved = seal(directory, binding()).unwrap();
        assert_eq!(saved.manifest.memory.bytes, 8 << 20);
        assert!(
            saved.manifest.memory.allocated_bytes <= 3 * 4096,
            "{saved:?}"
        );
        RestoreSpec {
            id: saved.id,
            dir: directory.to_string(),
        }
    }

    #[test]
    fn a_sealed_snapshot_opens_and_a_damaged_one_does_not() {
        let dir = camino_tempfile::tempdir().unwrap();
        let spec = snapshot(dir.path());
        assert_eq!(Snapshot::open(&spec).unwrap().manifest.binding, binding());
        let mode = dir.path().join(MEMORY_FILE).metadata().unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let memory = File::options()
            .write(true)
            .open(dir.path().join(MEMORY_FILE))
            .unwrap();
        memory.write_all_at(&[6], (1 << 20) + 5).unwrap();
        let err = Snapshot::open(&spec).unwrap_err();
        assert!(
            matches!(err, SnapshotError::Content { name: "memory", .. }),
            "{err}"
        );
        memory.write_all_at(&[7], (1 << 20) + 5).unwrap();
        Snapshot::open(&spec).unwrap();
        memory.set_len(5 << 20).unwrap();
        let err = Snapshot::open(&spec).unwrap_err();
        assert!(matches!(err, SnapshotError::Length { .. }), "{err}");
        memory.set_len(8 << 20).unwrap();
        assert!(matches!(
            Snapshot::open(&spec),
            Err(SnapshotError::Content { .. })
        ));
    }

    #[test]
    fn what_was_checked_is_not_read_again() {
        let dir = camino_tempfile::tempdir().unwrap();
        let spec = snapshot(dir.path());
        let path = dir.path().join(VERIFIED_FILE);
        assert!(path.exists());
        // After a boot of the host it is.
        let note = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, note.replace(boot_id().unwrap().trim(), "x")).unwrap();
        Snapshot::open(&spec).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), note);
    }

    #[test]
    fn the_id_is_the_manifests_and_a_removal_waits() {
        let dir = camino_tempfile::tempdir().unwrap();
        let mut spec = snapshot(dir.path());
        let held = Snapshot::open(&spec).unwrap();
        let lock = File::open(dir.path().join(MANIFEST_FILE)).unwrap();
        assert!(flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err());
        drop(held);
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(matches!(Snapshot::open(&spec), Err(SnapshotError::Removed)));
        drop(lock);
        spec.id = "0".repeat(64).parse().unwrap();
        let err = Snapshot::open(&spec).unwrap_err();
        assert!(matches!(err, SnapshotError::OtherManifest { .. }), "{err}");
    }
}
