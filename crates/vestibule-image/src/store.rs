//! The store: images by digest, aliases that point to them, and what the aliases have pointed to.
//!
//! ```text
//! $VESTIBULE_HOME/images/<digest>/   manifest.json (its SHA-256 is the digest), root.ext4, vmlinuz, vmlinux, initrd, build.json,
//!                                    build.log, verification.json once verified
//! $VESTIBULE_HOME/aliases/<name>     symbolic link to ../images/<digest>, moved by rename
//! $VESTIBULE_HOME/aliases/.history/<name>   one line of JSON for each move
//! $VESTIBULE_HOME/snapshots/<id>/    memory of a VM made from an image, see `store/snapshots.rs`
//! ```
//! A runner holds a shared lock on the manifest of its image, and of its snapshot, for as long as its VM lives; removal
//! takes an exclusive one.
mod alias;
mod snapshots;
mod unfinished;

pub use alias::HistoryEntry;
pub use snapshots::{Candidates, DamagedSnapshot, SnapshotView};

use crate::{
    cache::{Cache, CacheError},
    digest, sparse,
    verify::Verification,
};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{os::unix::fs::DirBuilderExt as _, str::FromStr as _, time::Duration};
use vestibule_api::{
    ids::{AliasName, ImageDigest, SnapshotId},
    image::{ImageSnapshot, ImageView, Manifest},
    time::Timestamp,
};

/// Layers and downloads that no build used for so many days go with `gc`.
const KEEP_DAYS: u64 = 30;
/// `vestibule image gc` removes no image so soon after it was built: it may be about to be verified.
pub const KEEP_UNPUBLISHED: Duration = Duration::from_secs(24 * 60 * 60);
/// The shortest beginning of a digest that names an image.
const PREFIX: usize = 8;

/// Why the store cannot do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{what} `{path}`")]
    Io {
        what: &'static str,
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("understand `{path}`")]
    Decode {
        path: Utf8PathBuf,
        #[source]
        err: serde_json::Error,
    },
    #[error("no image or alias `{name}`; `vestibule image list` shows what there is")]
    Unknown { name: String },
    #[error("`{name}` is the beginning of {count} digests; give more of it")]
    Ambiguous { name: String, count: usize },
    #[error("image {} is damaged: its manifest's digest is {actual}", digest.short())]
    Damaged { digest: ImageDigest, actual: String },
    #[error("image {} has not been verified: run `vestibule image verify {}`", digest.short(), digest.short())]
    Unverified { digest: ImageDigest },
    #[error("image {} did not pass its verification: {why}", digest.short())]
    NotGreen { digest: ImageDigest, why: String },
    #[error("alias `{alias}` has pointed to no other image that is still there")]
    NoEarlier { alias: AliasName },
    #[error("image {} is what the alias `{alias}` points to", digest.short())]
    Aliased {
        digest: ImageDigest,
        alias: AliasName,
    },
    #[error("image {} is in use by a VM", digest.short())]
    InUse { digest: ImageDigest },
    #[error("no snapshot `{id}`; `vestibule image snapshots` shows what there is")]
    UnknownSnapshot { id: String },
    #[error("snapshot {} is in use by a VM; it can go when the VM has ended", id.short())]
    SnapshotInUse { id: SnapshotId },
    #[error(transparent)]
    Cache(#[from] CacheError),
}

fn io(what: &'static str, path: &Utf8Path) -> impl FnOnce(std::io::Error) -> StoreError {
    move |err| StoreError::Io {
        what,
        path: path.to_owned(),
        err,
    }
}

/// How long a phase took, and whether anything had to be done.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PhaseTime {
    pub phase: String,
    pub cached: bool,
    pub took_ms: u64,
}

/// `build.json`: what of a build is not in the manifest, because it differs from one to the next.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BuildRecord {
    pub built_at: Timestamp,
    pub took_ms: u64,
    /// Version of Vestibule that built it.
    pub program: String,
    pub phases: Vec<PhaseTime>,
}

/// All that the store knows of one image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    pub digest: ImageDigest,
    pub directory: Utf8PathBuf,
    pub aliases: Vec<AliasName>,
    pub manifest: Manifest,
    pub build: BuildRecord,
    pub verification: Option<Verification>,
    /// The newest first.
    pub snapshots: Vec<SnapshotView>,
}

impl Image {
    /// What a VM of the image's default size would be restored from.
    fn default_snapshot(&self) -> Option<&SnapshotView> {
        let size = (
            self.manifest.default_memory_mib,
            self.manifest.default_vcpus,
        );
        let fits = |one: &&SnapshotView| (one.memory_mib, one.vcpus) == size;
        self.snapshots.iter().find(fits)
    }
}

/// What [`Store::rm`] removed.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Removed {
    /// The image's, which went with it.
    pub snapshots: Vec<SnapshotId>,
    pub freed_bytes: u64,
}

/// What [`Store::gc`] removed.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Gc {
    pub images: Vec<ImageDigest>,
    /// Those of removed images, of images that are gone, those that a newer one replaces, and damaged ones that nobody misses.
    pub snapshots: Vec<SnapshotId>,
    /// How many snapshots were begun, or their removal was, and never finished.
    pub unfinished_snapshots: usize,
    /// Images that nothing points to but a VM uses.
    pub in_use: Vec<ImageDigest>,
    /// Snapshots that would go if no VM lived on them.
    pub snapshots_in_use: Vec<SnapshotId>,
    /// Images to which an alias would go back.
    pub rollback_targets: Vec<ImageDigest>,
    /// Images that were built less long ago than was asked for.
    pub young: Vec<ImageDigest>,
    pub freed_bytes: u64,
}

impl std::fmt::Display for Gc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "removed {} images and {} snapshots, {} MiB in all",
            self.images.len(),
            self.snapshots.len() + self.unfinished_snapshots,
            self.freed_bytes >> 20
        )?;
        for (kept, why) in [
            (self.in_use.len(), "a VM uses them"),
            (
                self.rollback_targets.len(),
                "an alias could be rolled back to them",
            ),
            (
                self.young.len(),
                "they are younger than a day (--all removes them)",
            ),
        ] {
            if kept > 0 {
                write!(f, "; {kept} images kept because {why}")?;
            }
        }
        if !self.snapshots_in_use.is_empty() {
            let kept = self.snapshots_in_use.len();
            write!(f, "; {kept} snapshots kept because a VM uses them")?;
        }
        Ok(())
    }
}

/// A shared lock on an image: it is not removed while this lives.
#[derive(Debug)]
pub struct Hold(#[expect(dead_code, reason = "the open file is the lock")] std::fs::File);

/// The images below one `$VESTIBULE_HOME`.
#[derive(Clone, Debug)]
pub struct Store {
    home: Utf8PathBuf,
}

impl Store {
    /// Opens the store, making its directories where they are not there.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(home: &Utf8Path) -> Result<Self, StoreError> {
        // Aliases are links with a relative target; paths handed out must not depend on the caller's directory.
        let home = camino::absolute_utf8(home).map_err(io("make absolute", home))?;
        for name in ["images", "aliases/.history", "snapshots"] {
            let path = home.join(name);
            // Whoever is first makes the home directory, in which secrets will lie.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(io("create", &path))?;
        }
        Ok(Self { home })
    }

    /// `$VESTIBULE_HOME`.
    pub fn home(&self) -> &Utf8Path {
        &self.home
    }

    /// The directory of an image, whether it is there or not.
    pub fn dir(&self, digest: &ImageDigest) -> Utf8PathBuf {
        self.home.join("images").join(digest.as_str())
    }

    /// The digest of a manifest's bytes.
    pub(crate) fn digest(manifest: &[u8]) -> ImageDigest {
        let text = digest::of(manifest);
        ImageDigest::try_from(text).expect("a SHA-256 in hex is a digest")
    }

    /// The digests of all images, sorted.
    fn digests(&self) -> Result<Vec<ImageDigest>, StoreError> {
        let path = self.home.join("images");
        let entries = path
            .read_dir_utf8()
            .map_err(io("read", &path))?
            .filter_map(Result::ok);
        let mut digests: Vec<ImageDigest> = entries
            .filter_map(|entry| ImageDigest::from_str(entry.file_name()).ok())
            .collect();
        digests.sort();
        Ok(digests)
    }

    /// Every image, the newest first.
    ///
    /// # Errors
    /// [`StoreError`] for the first that cannot be read.
    pub fn list(&self) -> Result<Vec<ImageView>, StoreError> {
        let view = |digest| self.inspect(digest).map(|image| view(&image));
        let mut views = self
            .digests()?
            .iter()
            .map(view)
            .collect::<Result<Vec<_>, _>>()?;
        views.sort_by_key(|view| std::cmp::Reverse(view.built_at));
        Ok(views)
    }

    /// All about one image.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], [`StoreError::Damaged`] when its manifest is not the one of the digest.
    pub fn inspect(&self, digest: &ImageDigest) -> Result<Image, StoreError> {
        let directory = self.dir(digest);
        let aliases = self
            .aliases()?
            .into_iter()
            .filter(|(_, target)| target == digest)
            .map(|(alias, _)| alias);
        Ok(Image {
            aliases: aliases.collect(),
            manifest: self.manifest(digest)?,
            build: read_json(&directory.join("build.json"))?,
            verification: optional(read_json(&directory.join("verification.json")))?,
            snapshots: self.snapshots_of(digest)?,
            digest: digest.clone(),
            directory,
        })
    }

    /// The manifest of an image, checked against the digest.
    ///
    /// # Errors
    /// As [`Store::inspect`].
    pub fn manifest(&self, digest: &ImageDigest) -> Result<Manifest, StoreError> {
        let path = self.dir(digest).join("manifest.json");
        let bytes = match std::fs::read(&path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                return Err(StoreError::Unknown {
                    name: digest.to_string(),
                });
            }
            other => other.map_err(io("read", &path))?,
        };
        let actual = Self::digest(&bytes);
        if actual != *digest {
            return Err(StoreError::Damaged {
                digest: digest.clone(),
                actual: actual.to_string(),
            });
        }
        serde_json::from_slice(&bytes).map_err(|err| StoreError::Decode { path, err })
    }

    /// The image that `name` names: an alias, a digest, or the beginning of exactly one, of eight digits or more.
    ///
    /// # Errors
    /// [`StoreError::Unknown`], [`StoreError::Ambiguous`].
    pub fn resolve(&self, name: &str) -> Result<ImageDigest, StoreError> {
        let digests = self.digests()?;
        if let Some((_, digest)) = self
            .aliases()?
            .into_iter()
            .find(|(alias, _)| alias.as_str() == name)
            && digests.contains(&digest)
        {
            return Ok(digest);
        }
        let unknown = || StoreError::Unknown {
            name: name.to_owned(),
        };
        named(digests, ImageDigest::as_str, name)?.ok_or_else(unknown)
    }

    /// Keeps an image from being removed.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when it is gone already.
    pub fn hold(&self, digest: &ImageDigest) -> Result<Hold, StoreError> {
        let path = self.dir(digest).join("manifest.json");
        let file = std::fs::File::open(&path).map_err(|_| StoreError::Unknown {
            name: digest.to_string(),
        })?;
        file.lock_shared().map_err(io("lock", &path))?;
        Ok(Hold(file))
    }

    /// Removes an image that no alias points to and no VM uses, and its snapshots with it.
    ///
    /// # Errors
    /// [`StoreError::Aliased`], [`StoreError::InUse`], [`StoreError::SnapshotInUse`]; nothing is removed then.
    pub fn rm(&self, digest: &ImageDigest) -> Result<Removed, StoreError> {
        if let Some((alias, _)) = self
            .aliases()?
            .into_iter()
            .find(|(_, target)| target == digest)
        {
            return Err(StoreError::Aliased {
                digest: digest.clone(),
                alias,
            });
        }
        let directory = self.dir(digest);
        let path = directory.join("manifest.json");
        let file = std::fs::File::open(&path).map_err(|_| StoreError::Unknown {
            name: digest.to_string(),
        })?;
        file.try_lock().map_err(|_| StoreError::InUse {
            digest: digest.clone(),
        })?;
        let snapshots = self.lock_snapshots_of(digest)?;
        let mut removed = Removed {
            snapshots: Vec::new(),
            freed_bytes: sparse::disk_bytes(&directory),
        };
        for snapshot in snapshots {
            removed.freed_bytes += self.discard(&snapshot)?;
            removed.snapshots.push(snapshot.id);
        }
        // Out of sight first: a half-removed directory is never an image.
        let gone = self.home.join("images").join(format!(".gone-{digest}"));
        std::fs::rename(&directory, &gone).map_err(io("take away", &directory))?;
        std::fs::remove_dir_all(&gone).map_err(io("remove", &gone))?;
        Ok(removed)
    }

    /// Removes images that nothing points to or uses, snapshots that no VM will begin from, and what is old in the cache.
    /// What a rollback would go back to stays, and so do images that were built less than `keep` ago, and what a snapshot replaced
    /// that was taken so lately, for a day at most.
    ///
    /// # Errors
    /// [`StoreError::Io`] for the first thing that cannot be removed; [`CacheError::Busy`] while somebody else removes.
    pub fn gc(&self, keep: Duration) -> Result<Gc, StoreError> {
        let mut gone = Gc::default();
        let cache = Cache::new(&self.home);
        let _lock = cache.lock("gc", "removal of images".to_owned())?;
        let targets = self.rollback_targets()?;
        for digest in self.digests()? {
            if targets.contains(&digest) {
                gone.rollback_targets.push(digest);
                continue;
            }
            if self.is_younger(&digest, keep) {
                if !self.aliases()?.iter().any(|(_, target)| *target == digest) {
                    gone.young.push(digest);
                }
                continue;
            }
            match self.rm(&digest) {
                Ok(removed) => {
                    gone.freed_bytes += removed.freed_bytes;
                    gone.snapshots.extend(removed.snapshots);
                    gone.images.push(digest);
                }
                Err(StoreError::Aliased { .. }) => {}
                Err(StoreError::InUse { .. } | StoreError::SnapshotInUse { .. }) => {
                    gone.in_use.push(digest);
                }
                Err(err) => return Err(err),
            }
        }
        self.gc_snapshots(keep, &mut gone)?;
        let images = self.home.join("images");
        for entry in images
            .read_dir_utf8()
            .map_err(io("read", &images))?
            .filter_map(Result::ok)
        {
            if entry.file_name().starts_with(".gone-") {
                std::fs::remove_dir_all(entry.path()).map_err(io("remove", entry.path()))?;
            }
        }
        gone.freed_bytes += cache.gc(KEEP_DAYS)?;
        Ok(gone)
    }

    /// Whether an image was built less than `age` ago. One whose record can't be read was not.
    fn is_younger(&self, digest: &ImageDigest, age: Duration) -> bool {
        read_json::<BuildRecord>(&self.dir(digest).join("build.json"))
            .is_ok_and(|record| record.built_at.plus(age) > Timestamp::now())
    }

    /// Where the log of a running build of `recipe` goes.
    pub(crate) fn build_log(&self, recipe: &str) -> Result<Utf8PathBuf, StoreError> {
        Ok(Cache::new(&self.home)
            .directory("logs")?
            .join(format!("{recipe}.log")))
    }

    fn built_path(&self, recipe: &str, key: &str) -> Result<Utf8PathBuf, StoreError> {
        Ok(Cache::new(&self.home)
            .directory("built")?
            .join(format!("{recipe}-{}", &key[..24])))
    }

    /// The image that a build with the same key gave, if it is still there.
    pub(crate) fn built(&self, recipe: &str, key: &str) -> Result<Option<ImageDigest>, StoreError> {
        let text = std::fs::read_to_string(self.built_path(recipe, key)?).unwrap_or_default();
        let digest = ImageDigest::from_str(text.trim()).ok();
        Ok(digest.filter(|digest| self.dir(digest).join("manifest.json").exists()))
    }

    /// Puts a finished image into the store by one rename. Returns whether it was there already.
    pub(crate) fn add(
        &self,
        recipe: &str,
        key: &str,
        digest: &ImageDigest,
        from: &Utf8Path,
        record: &BuildRecord,
    ) -> Result<bool, StoreError> {
        let directory = self.dir(digest);
        let there = directory.exists();
        if !there {
            write_json(&from.join("build.json"), record)?;
            let (log, kept) = (self.build_log(recipe)?, from.join("build.log"));
            let text = std::fs::read(&log).map_err(io("read", &log))?;
            std::fs::write(&kept, text).map_err(io("write", &kept))?;
            std::fs::rename(from, &directory).map_err(io("put into the store", &directory))?;
        }
        let path = self.built_path(recipe, key)?;
        std::fs::write(&path, digest.as_str()).map_err(io("write", &path))?;
        Ok(there)
    }

    /// Writes an image's verification beside it, by rename.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn attach(&self, report: &Verification) -> Result<(), StoreError> {
        let path = self.dir(&report.digest).join("verification.json");
        let new = path.with_extension("json.new");
        write_json(&new, report)?;
        std::fs::rename(&new, &path).map_err(io("put into place", &path))
    }
}

fn view(image: &Image) -> ImageView {
    ImageView {
        digest: image.digest.clone(),
        recipe: image.manifest.recipe.clone(),
        built_at: image.build.built_at,
        disk_bytes: sparse::disk_bytes(&image.directory),
        aliases: image.aliases.clone(),
        verified: image
            .verification
            .as_ref()
            .is_some_and(|report| report.green),
        features: image.manifest.features.clone(),
        kernel_release: image.manifest.kernel_release.clone(),
        default_memory_mib: image.manifest.default_memory_mib,
        default_vcpus: image.manifest.default_vcpus,
        snapshot: image.default_snapshot().map(|snapshot| ImageSnapshot {
            id: snapshot.id.clone(),
            taken_at: snapshot.taken_at,
            allocated_bytes: snapshot.allocated_bytes,
            memory_mib: snapshot.memory_mib,
        }),
    }
}

/// The one of `all` that `name` names, whole or by its beginning.
fn named<T>(all: Vec<T>, text: fn(&T) -> &str, name: &str) -> Result<Option<T>, StoreError> {
    let mut found = all
        .into_iter()
        .filter(|one| name.len() >= PREFIX && text(one).starts_with(name));
    match (found.next(), found.count()) {
        (first, 0) => Ok(first),
        (_, more) => Err(StoreError::Ambiguous {
            name: name.to_owned(),
            count: more + 1,
        }),
    }
}

fn read_json<T: DeserializeOwned>(path: &Utf8Path) -> Result<T, StoreError> {
    let bytes = std::fs::read(path).map_err(io("read", path))?;
    serde_json::from_slice(&bytes).map_err(|err| StoreError::Decode {
        path: path.to_owned(),
        err,
    })
}

fn optional<T>(read: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::Io { err, .. }) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}

fn write_json<T: Serialize>(path: &Utf8Path, value: &T) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec_pretty(value).map_err(|err| StoreError::Decode {
        path: path.to_owned(),
        err,
    })?;
    std::fs::write(path, bytes).map_err(io("write", path))
}

#[cfg(test)]
mod tests;
