//! Snapshots: which there are, which one fits a VM, and how they go.
//!
//! ```text
//! $VESTIBULE_HOME/snapshots/<id>/    what `vestibule_api::snapshot` says; the runner wrote it, and nobody writes again
//! …/.unfinished-<machine id>/        one that is being taken, renamed when it is whole
//! …/.unfinished-<machine id>.log     what its runner says. Whoever takes the snapshot locks it and hands it to the runner
//!                                    as standard error: while one of both lives, it is locked
//! …/.gone-<id>/                      one that is being removed
//! ```
use super::{Gc, Store, StoreError, io, named};
use crate::{digest, sparse};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use std::{
    fs::{File, TryLockError},
    io::{ErrorKind, Read as _},
    os::unix::fs::MetadataExt as _,
    str::FromStr as _,
    time::Duration,
};
use vestibule_api::{
    ids::{AliasName, ImageDigest, SnapshotId},
    machine::{DriverChoice, RestoreSpec},
    snapshot::{MANIFEST_FILE, MEMORY_FILE, SNAPSHOT_SCHEMA, STATE_FILE, SnapshotManifest},
    time::Timestamp,
};

/// A manifest of more bytes is none.
const MANIFEST_LIMIT: u64 = 1 << 20;
/// What a new snapshot replaces stays for so long at most: perhaps no VM comes up from the new one.
const KEEP_REPLACED: Duration = Duration::from_hours(24);
pub(super) const GONE: &str = ".gone-";

/// A snapshot as the store lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotView {
    pub id: SnapshotId,
    pub directory: Utf8PathBuf,
    pub image_digest: ImageDigest,
    /// What points to its image now.
    pub aliases: Vec<AliasName>,
    pub taken_at: Timestamp,
    pub memory_mib: u32,
    pub vcpus: u32,
    /// The guest's memory, holes included.
    pub memory_bytes: u64,
    /// On disk, everything of it.
    pub allocated_bytes: u64,
    pub driver: String,
    pub vmm_version: String,
    /// Whether a VM lives on it now.
    pub in_use: bool,
}

/// A snapshot that is as its manifest says, as far as can be seen without reading the memory.
struct Whole {
    id: SnapshotId,
    manifest: SnapshotManifest,
}

impl Whole {
    fn is_of(&self, image: &ImageDigest, memory_mib: u32, vcpus: u32) -> bool {
        let binding = &self.manifest.binding;
        (&binding.image_digest, binding.memory_mib, binding.vcpus) == (image, memory_mib, vcpus)
    }

    /// Each driver has snapshots of its own: none replaces another's.
    fn replaces(&self, other: &Self) -> bool {
        let theirs = &other.manifest.binding;
        self.is_of(&theirs.image_digest, theirs.memory_mib, theirs.vcpus)
            && self.driver() == other.driver()
            && self.age() > other.age()
    }

    fn driver(&self) -> Option<DriverChoice> {
        DriverChoice::of(&self.manifest.binding.driver)
    }

    /// Greater is newer; no two are equal.
    fn age(&self) -> (Timestamp, &SnapshotId) {
        (self.manifest.taken_at, &self.id)
    }
}

/// A snapshot that is not what was written, or that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedSnapshot {
    pub id: SnapshotId,
    /// In words.
    pub why: String,
}

/// The snapshots of one image for VMs of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// The newest first.
    pub whole: Vec<SnapshotId>,
    /// Those that are of it as far as anybody can tell.
    pub damaged: Vec<DamagedSnapshot>,
}

impl Candidates {
    /// In the order in which a VM tries them: a damaged one where there is no other, for its runner to refuse it.
    pub fn ids(&self) -> impl Iterator<Item = &SnapshotId> {
        let damaged = self.damaged.iter().map(|one| &one.id);
        self.whole.iter().chain(damaged)
    }
}

/// See [`DamagedSnapshot`].
struct Damaged {
    id: SnapshotId,
    flaw: Box<Flaw>,
}

impl Damaged {
    fn view(self) -> DamagedSnapshot {
        DamagedSnapshot {
            id: self.id,
            why: self.flaw.why,
        }
    }

    /// Whether it is of this image and size, as far as anybody can tell.
    fn may_be_of(
        &self,
        image: &ImageDigest,
        memory_mib: u32,
        vcpus: u32,
        driver: DriverChoice,
    ) -> bool {
        let binding = self.flaw.manifest.as_ref().map(|one| &one.binding);
        binding.is_none_or(|binding| {
            (&binding.image_digest, binding.memory_mib, binding.vcpus) == (image, memory_mib, vcpus)
                && driver.takes(&binding.driver)
        })
    }
}

/// What is wrong with a snapshot.
struct Flaw {
    why: String,
    /// What stands in its place, where that can be understood.
    manifest: Option<SnapshotManifest>,
    /// Whether the host's trouble kept it from being read: it may be whole all the same.
    unread: bool,
}

impl Flaw {
    fn new(why: String, manifest: Option<SnapshotManifest>) -> Box<Self> {
        Box::new(Self {
            why,
            manifest,
            unread: false,
        })
    }

    fn io(name: &str, err: &std::io::Error, manifest: Option<SnapshotManifest>) -> Box<Self> {
        Box::new(Self {
            why: format!("its `{name}` can't be read: {err}"),
            manifest,
            unread: err.kind() != ErrorKind::NotFound,
        })
    }
}

/// Every snapshot in the store.
#[derive(Default)]
struct All {
    /// The newest first.
    whole: Vec<Whole>,
    damaged: Vec<Damaged>,
}

/// A snapshot that nobody uses, nor can begin to while this lives.
pub(super) struct Locked {
    pub(super) id: SnapshotId,
    /// `None` where there is no manifest to lock, and so none to restore from.
    _manifest: Option<File>,
}

impl Store {
    pub(super) fn snapshots_dir(&self) -> Utf8PathBuf {
        self.home().join("snapshots")
    }

    /// The directory of a snapshot, whether it is there or not.
    pub fn snapshot_dir(&self, id: &SnapshotId) -> Utf8PathBuf {
        self.snapshots_dir().join(id.as_str())
    }

    /// What a VM of this size, made from this image by this driver, can be restored from: the first of
    /// [`Store::snapshots_for`]. Whether it fits this host is the runner's to say, and whether it is still there.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the store cannot be read.
    pub fn snapshot_for(
        &self,
        image: &ImageDigest,
        memory_mib: u32,
        vcpus: u32,
        driver: DriverChoice,
    ) -> Result<Option<RestoreSpec>, StoreError> {
        let all = self.snapshots_for(image, memory_mib, vcpus, driver)?;
        Ok(all.ids().next().map(|id| RestoreSpec {
            dir: self.snapshot_dir(id).into_string(),
            id: id.clone(),
        }))
    }

    /// The snapshots of this image for VMs of this size and driver. Only manifests are read.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the store cannot be read.
    pub fn snapshots_for(
        &self,
        image: &ImageDigest,
        memory_mib: u32,
        vcpus: u32,
        driver: DriverChoice,
    ) -> Result<Candidates, StoreError> {
        let fits = |one: &Whole| {
            one.is_of(image, memory_mib, vcpus) && driver.takes(&one.manifest.binding.driver)
        };
        let may_fit = |one: &Damaged| one.may_be_of(image, memory_mib, vcpus, driver);
        let All { whole, damaged } = self.look()?;
        let whole = whole.into_iter().filter(fits);
        let damaged = damaged.into_iter().filter(may_fit);
        Ok(Candidates {
            whole: whole.map(|one| one.id).collect(),
            damaged: damaged.map(Damaged::view).collect(),
        })
    }

    /// Every whole snapshot, the newest first.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the store cannot be read.
    pub fn snapshots(&self) -> Result<Vec<SnapshotView>, StoreError> {
        let (aliases, locked) = (self.aliases()?, shared_locks());
        let view = |one: Whole| {
            let directory = self.snapshot_dir(&one.id);
            let inode = directory
                .join(MANIFEST_FILE)
                .metadata()
                .map(|data| data.ino());
            let binding = one.manifest.binding;
            SnapshotView {
                id: one.id,
                aliases: aliases
                    .iter()
                    .filter(|(_, image)| *image == binding.image_digest)
                    .map(|(alias, _)| alias.clone())
                    .collect(),
                image_digest: binding.image_digest,
                taken_at: one.manifest.taken_at,
                memory_mib: binding.memory_mib,
                vcpus: binding.vcpus,
                memory_bytes: one.manifest.memory.bytes,
                allocated_bytes: sparse::disk_bytes(&directory),
                driver: binding.driver,
                vmm_version: binding.vmm_version,
                in_use: inode.is_ok_and(|inode| locked.contains(&inode)),
                directory,
            }
        };
        Ok(self.look()?.whole.into_iter().map(view).collect())
    }

    /// The snapshot that `name` names: an id, or the beginning of exactly one, of eight digits or more.
    ///
    /// # Errors
    /// [`StoreError::UnknownSnapshot`], [`StoreError::Ambiguous`].
    pub fn resolve_snapshot(&self, name: &str) -> Result<SnapshotId, StoreError> {
        let unknown = || StoreError::UnknownSnapshot {
            id: name.to_owned(),
        };
        named(self.snapshot_ids()?, SnapshotId::as_str, name)?.ok_or_else(unknown)
    }

    /// Removes a snapshot that no VM lives on. Returns the bytes that are free now.
    ///
    /// # Errors
    /// [`StoreError::SnapshotInUse`], [`StoreError::UnknownSnapshot`].
    pub fn rm_snapshot(&self, id: &SnapshotId) -> Result<u64, StoreError> {
        self.discard(&self.lock_snapshot(id)?)
    }

    /// Locks every snapshot of an image, so that all can go.
    pub(super) fn lock_snapshots_of(&self, image: &ImageDigest) -> Result<Vec<Locked>, StoreError> {
        let all = self.look()?.whole.into_iter();
        all.filter(|one| one.manifest.binding.image_digest == *image)
            .map(|one| self.lock_snapshot(&one.id))
            .collect()
    }

    /// Removes what is locked. Returns the bytes that are free now.
    pub(super) fn discard(&self, locked: &Locked) -> Result<u64, StoreError> {
        let directory = self.snapshot_dir(&locked.id);
        let bytes = sparse::disk_bytes(&directory);
        // Out of sight first: what is half removed is never a snapshot.
        let gone = self.snapshots_dir().join(format!("{GONE}{}", locked.id));
        std::fs::rename(&directory, &gone).map_err(io("take away", &directory))?;
        std::fs::remove_dir_all(&gone).map_err(io("remove", &gone))?;
        Ok(bytes)
    }

    fn lock_snapshot(&self, id: &SnapshotId) -> Result<Locked, StoreError> {
        let path = self.snapshot_dir(id).join(MANIFEST_FILE);
        let manifest = match File::open(&path) {
            Ok(file) => Some(file),
            Err(err) if err.kind() == ErrorKind::NotFound => {
                if !self.snapshot_dir(id).exists() {
                    return Err(StoreError::UnknownSnapshot { id: id.to_string() });
                }
                None
            }
            Err(err) => return Err(io("open", &path)(err)),
        };
        match manifest.as_ref().map_or(Ok(()), File::try_lock) {
            Ok(()) => Ok(Locked {
                id: id.clone(),
                _manifest: manifest,
            }),
            Err(TryLockError::WouldBlock) => Err(StoreError::SnapshotInUse { id: id.clone() }),
            Err(TryLockError::Error(err)) => Err(io("lock", &path)(err)),
        }
    }

    pub(super) fn snapshots_of(
        &self,
        image: &ImageDigest,
    ) -> Result<Vec<SnapshotView>, StoreError> {
        let mut all = self.snapshots()?;
        all.retain(|one| one.image_digest == *image);
        Ok(all)
    }

    /// The part of [`Store::gc`] that is about snapshots.
    pub(super) fn gc_snapshots(&self, keep: Duration, gone: &mut Gc) -> Result<(), StoreError> {
        let all = self.look()?;
        for id in self.useless_snapshots(&all, keep.min(KEEP_REPLACED))? {
            match self.rm_snapshot(&id) {
                Ok(bytes) => {
                    gone.freed_bytes += bytes;
                    gone.snapshots.push(id);
                }
                Err(StoreError::SnapshotInUse { .. }) => gone.snapshots_in_use.push(id),
                Err(err) => return Err(err),
            }
        }
        let (count, bytes) = self.sweep_snapshots()?;
        gone.unfinished_snapshots += count;
        gone.freed_bytes += bytes;
        Ok(())
    }

    /// Snapshots that nobody will restore: of an image that is gone, or replaced by a newer one of the same image and size: the
    /// last that was, when that newer one has been there for `keep`. A damaged one is replaced by any whole one; until then it is
    /// why VMs boot.
    fn useless_snapshots(&self, all: &All, keep: Duration) -> Result<Vec<SnapshotId>, StoreError> {
        let (images, now) = (self.digests()?, Timestamp::now());
        let is_replaced = |one: &Whole| {
            let mut newer = all.whole.iter().filter(|other| other.replaces(one));
            match (newer.next(), newer.next()) {
                (None, _) => false,
                (Some(newer), None) => newer.manifest.taken_at.plus(keep) <= now,
                (Some(_), Some(_)) => true,
            }
        };
        let useless =
            |one: &&Whole| !images.contains(&one.manifest.binding.image_digest) || is_replaced(one);
        let whole = all.whole.iter().filter(useless).map(|one| &one.id);
        let missed = |one: &Damaged| match &one.flaw.manifest {
            Some(manifest) => {
                let of = &manifest.binding;
                let same = |other: &Whole| {
                    other.is_of(&of.image_digest, of.memory_mib, of.vcpus)
                        && other.driver() == DriverChoice::of(&of.driver)
                };
                images.contains(&of.image_digest) && !all.whole.iter().any(same)
            }
            // Anybody's that has none.
            None => images.iter().any(|image| {
                let mut whole = all.whole.iter();
                !whole.any(|one| one.manifest.binding.image_digest == *image)
            }),
        };
        let damaged = all.damaged.iter();
        let damaged = damaged.filter(|one| !one.flaw.unread && !missed(one));
        Ok(whole.chain(damaged.map(|one| &one.id)).cloned().collect())
    }

    pub(super) fn snapshot_entries(&self) -> Result<Vec<String>, StoreError> {
        let path = self.snapshots_dir();
        let entries = path.read_dir_utf8().map_err(io("read", &path))?;
        let names = entries.filter_map(Result::ok);
        Ok(names.map(|entry| entry.file_name().to_owned()).collect())
    }

    fn snapshot_ids(&self) -> Result<Vec<SnapshotId>, StoreError> {
        let names = self.snapshot_entries()?;
        Ok(names
            .iter()
            .filter_map(|name| SnapshotId::from_str(name).ok())
            .collect())
    }

    fn look(&self) -> Result<All, StoreError> {
        let mut all = All::default();
        for id in self.snapshot_ids()? {
            let directory = self.snapshot_dir(&id);
            match read_whole(&directory, &id) {
                Ok(manifest) => all.whole.push(Whole { id, manifest }),
                // It was removed meanwhile.
                Err(_) if !directory.exists() => {}
                Err(flaw) => all.damaged.push(Damaged { id, flaw }),
            }
        }
        all.whole.sort_by(|a, b| b.age().cmp(&a.age()));
        Ok(all)
    }
}

/// The manifest, if it is the one of the id and the files that it names have their length.
fn read_whole(directory: &Utf8Path, id: &SnapshotId) -> Result<SnapshotManifest, Box<Flaw>> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(directory.join(MANIFEST_FILE))?
            .take(MANIFEST_LIMIT)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|err| Flaw::io(MANIFEST_FILE, &err, None))?;
    let manifest = serde_json::from_slice::<SnapshotManifest>(&bytes);
    if digest::of(&bytes) != id.as_str() {
        let why = "its manifest is not what was written".to_owned();
        return Err(Flaw::new(why, manifest.ok()));
    }
    let manifest = manifest.map_err(|err| {
        let why = format!("its manifest can't be understood: {err}");
        Flaw::new(why, None)
    })?;
    if manifest.schema != SNAPSHOT_SCHEMA {
        let why = format!("its manifest has schema {}", manifest.schema);
        return Err(Flaw::new(why, Some(manifest)));
    }
    for (name, expected) in [
        (MEMORY_FILE, manifest.memory.bytes),
        (STATE_FILE, manifest.state.bytes),
    ] {
        match directory.join(name).metadata().map(|data| data.len()) {
            Ok(found) if found == expected => {}
            Ok(found) => {
                let why = format!("its `{name}` has {found} bytes, the manifest says {expected}");
                return Err(Flaw::new(why, Some(manifest)));
            }
            Err(err) => return Err(Flaw::io(name, &err, Some(manifest))),
        }
    }
    Ok(manifest)
}

/// Inodes with a shared lock, as the kernel lists them (proc_locks(5)). Trying the lock would tell as well, and make a
/// runner that starts in this moment believe that its snapshot is being removed. The device is not compared: where a file
/// system has several (btrfs), the list has another one than stat(2).
fn shared_locks() -> Vec<u64> {
    let text = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let inode = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let ["FLOCK", _, "READ", _, place, ..] = words.get(1..)? else {
            return None;
        };
        place.rsplit(':').next()?.parse().ok()
    };
    text.lines().filter_map(inode).collect()
}

#[cfg(test)]
mod tests;
