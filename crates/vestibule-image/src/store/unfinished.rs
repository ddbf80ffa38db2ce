//! Snapshots that are being taken, and what is left of those that never were.
use super::{SnapshotView, Store, StoreError, io, snapshots::GONE};
use crate::{boot, cache::Cache, sparse};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    collections::BTreeSet,
    fs::{File, TryLockError},
    io::{ErrorKind, Result as IoResult},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    str::FromStr as _,
};
use vestibule_api::ids::{ImageDigest, MachineId, SnapshotId};

const UNFINISHED: &str = ".unfinished-";
const LOG: &str = ".log";

/// A snapshot that is being taken. What is left of it goes when this is dropped.
pub(crate) struct Unfinished {
    path: Utf8PathBuf,
    log_path: Utf8PathBuf,
    log: File,
}

impl Unfinished {
    /// Where the runner saves to: nothing is there yet.
    pub(crate) fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// Where its runner's words go.
    pub(crate) fn log(&self) -> &Utf8Path {
        &self.log_path
    }

    /// The log, open and locked, for the runner.
    pub(crate) fn stderr(&self) -> Result<File, StoreError> {
        self.log.try_clone().map_err(io("open", &self.log_path))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // What cannot be removed now goes with `gc`.
        let _ = std::fs::remove_dir_all(&self.path);
        let _ = std::fs::remove_file(&self.log_path);
    }
}

impl Store {
    /// The lock of whoever takes a snapshot of this image with so many MiB and CPUs.
    pub(crate) fn snapshot_turn(
        &self,
        image: &ImageDigest,
        (memory_mib, vcpus): (u32, u32),
    ) -> Result<File, StoreError> {
        let what = format!(
            "snapshot of image {} with {memory_mib} MiB and {vcpus} CPUs",
            image.short()
        );
        let name = format!("snapshot-{image}-{memory_mib}-{vcpus}");
        Ok(Cache::new(self.home()).lock(&name, what)?)
    }

    /// Takes a place for a snapshot that `machine` will be saved into.
    pub(crate) fn begin_snapshot(&self, machine: MachineId) -> Result<Unfinished, StoreError> {
        let path = self.snapshots_dir().join(format!("{UNFINISHED}{machine}"));
        let log_path = Utf8PathBuf::from(format!("{path}{LOG}"));
        loop {
            let log = File::options()
                .append(true)
                .create_new(true)
                .mode(0o600)
                .open(&log_path)
                .map_err(io("create", &log_path))?;
            log.lock().map_err(io("lock", &log_path))?;
            // `gc` may have taken it away before it was locked.
            if log.metadata().map_err(io("look at", &log_path))?.nlink() > 0 {
                return Ok(Unfinished {
                    path,
                    log_path,
                    log,
                });
            }
        }
    }

    /// Puts a snapshot that was saved into the store, by one rename.
    pub(crate) fn keep_snapshot(
        &self,
        unfinished: &Unfinished,
        id: &SnapshotId,
    ) -> Result<SnapshotView, StoreError> {
        let directory = self.snapshot_dir(id);
        std::fs::rename(&unfinished.path, &directory)
            .map_err(io("put into the store", &directory))?;
        let all = self.snapshots()?;
        all.into_iter()
            .find(|one| one.id == *id)
            .ok_or_else(|| StoreError::UnknownSnapshot { id: id.to_string() })
    }

    /// Removes what a killed runner or a killed removal left. Returns how many there were, and their bytes.
    pub(crate) fn sweep_snapshots(&self) -> Result<(usize, u64), StoreError> {
        let (mut count, mut bytes) = (0, 0);
        let names = self.snapshot_entries()?;
        let left = names
            .iter()
            .filter(|name| name.starts_with(UNFINISHED) || name.starts_with(GONE));
        let left: BTreeSet<&str> = left
            .map(|name| name.strip_suffix(LOG).unwrap_or(name))
            .collect();
        for name in left {
            let path = self.snapshots_dir().join(name);
            let log = Utf8PathBuf::from(format!("{path}{LOG}"));
            let Ok(_lock) = abandoned(&log)? else {
                continue;
            };
            let machine = name.strip_prefix(UNFINISHED).map(MachineId::from_str);
            if let Some(Ok(machine)) = machine {
                let of_machine = |part| self.home().join(part).join(machine.to_string());
                boot::salvage(&of_machine("vms"), &of_machine("evidence"));
            }
            count += 1;
            bytes += sparse::disk_bytes(&path) + sparse::disk_bytes(&log);
            absent_is_well(std::fs::remove_dir_all(&path)).map_err(io("remove", &path))?;
            absent_is_well(std::fs::remove_file(&log)).map_err(io("remove", &log))?;
        }
        Ok((count, bytes))
    }
}

/// Somebody is at work.
struct Busy;

/// The lock of an unfinished snapshot that nobody works on. Without a log there is none: the log is there first.
fn abandoned(log: &Utf8Path) -> Result<Result<Option<File>, Busy>, StoreError> {
    let file = match File::open(log) {
        Ok(file) => file,
        Err(err) if err.kind() == ErrorKind::NotFound => return Ok(Ok(None)),
        Err(err) => return Err(io("open", log)(err)),
    };
    match file.try_lock() {
        Ok(()) => Ok(Ok(Some(file))),
        Err(TryLockError::WouldBlock) => Ok(Err(Busy)),
        Err(TryLockError::Error(err)) => Err(io("lock", log)(err)),
    }
}

fn absent_is_well(result: IoResult<()>) -> IoResult<()> {
    match result {
        Err(err) if err.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests;
