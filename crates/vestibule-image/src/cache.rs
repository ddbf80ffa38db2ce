//! What is kept between builds, below `$VESTIBULE_HOME/cache`: layers by the key of their inputs, downloads, and the
//! working directory of the build that runs.
//!
//! A layer is made in the working directory and renamed into place, so that one that is there is whole. A build holds
//! the lock of its recipe; what a killed one left in the working directory goes when the next one takes the lock.
use crate::digest;
use camino::{Utf8Path, Utf8PathBuf};
use std::io::{Read as _, Write as _};

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("{what} `{path}`")]
    Io {
        what: &'static str,
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("another {what} is running ({holder})")]
    Busy { what: String, holder: String },
}

/// The cache of one store.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    root: Utf8PathBuf,
}

/// One layer: a directory that is complete and never changes.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) directory: Utf8PathBuf,
    /// Whether it was there before.
    pub(crate) cached: bool,
    /// Digest of its content, as its maker computed it.
    pub(crate) id: String,
}

/// The build's exclusive use of its recipe's working directory.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) directory: Utf8PathBuf,
    /// In memory where there is room, else below `directory`.
    pub(crate) scratch: Utf8PathBuf,
    _lock: std::fs::File,
}

impl Drop for Work {
    fn drop(&mut self) {
        for path in [&self.directory, &self.scratch] {
            // What cannot be removed now goes when the next build begins.
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

fn io(what: &'static str, path: &Utf8Path) -> impl FnOnce(std::io::Error) -> CacheError {
    move |err| CacheError::Io {
        what,
        path: path.to_owned(),
        err,
    }
}

impl Cache {
    pub(crate) fn new(home: &Utf8Path) -> Self {
        Self {
            root: home.join("cache"),
        }
    }

    /// A directory of the cache, made if it is not there.
    pub(crate) fn directory(&self, name: &str) -> Result<Utf8PathBuf, CacheError> {
        let path = self.root.join(name);
        std::fs::create_dir_all(&path).map_err(io("create", &path))?;
        Ok(path)
    }

    /// Takes the lock of that name, which is held until the file is closed; `what` is what only one may do at a time.
    pub(crate) fn lock(&self, name: &str, what: String) -> Result<std::fs::File, CacheError> {
        let path = self.directory("locks")?.join(name);
        let mut lock = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io("open the lock", &path))?;
        if lock.try_lock().is_err() {
            let mut holder = String::new();
            let _ = (&lock).take(200).read_to_string(&mut holder);
            return Err(CacheError::Busy {
                what,
                holder: holder.trim().to_owned(),
            });
        }
        let text = format!(
            "process {} since {}\n",
            std::process::id(),
            vestibule_api::time::Timestamp::now()
        );
        lock.set_len(0)
            .and_then(|()| lock.write_all(text.as_bytes()))
            .map_err(io("write the lock", &path))?;
        Ok(lock)
    }

    /// Takes the lock of `recipe` and an empty working directory.
    pub(crate) fn work(&self, recipe: &str) -> Result<Work, CacheError> {
        let lock = self.lock(recipe, format!("build of recipe `{recipe}`"))?;
        let directory = self.root.join("work").join(recipe);
        let scratch = scratch(&directory);
        for path in [&directory, &scratch] {
            empty(path)?;
        }
        Ok(Work {
            directory,
            scratch,
            _lock: lock,
        })
    }

    /// The layer of that kind and key; `make` fills an empty directory and says the digest of the content.
    pub(crate) fn layer<E: From<CacheError>>(
        &self,
        work: &Work,
        kind: &str,
        key: &str,
        renew: bool,
        make: impl FnOnce(&Utf8Path) -> Result<String, E>,
    ) -> Result<Layer, E> {
        let directory = self
            .directory("layers")?
            .join(format!("{kind}-{}", &key[..24]));
        if !renew && let Ok(id) = std::fs::read_to_string(directory.join("id")) {
            touch(&directory);
            return Ok(Layer {
                directory,
                cached: true,
                id,
            });
        }
        let new = work.directory.join(kind);
        empty(&new)?;
        let id = make(&new)?;
        std::fs::write(new.join("id"), &id).map_err(io("write", &new))?;
        if directory.exists() {
            std::fs::remove_dir_all(&directory).map_err(io("remove", &directory))?;
        }
        std::fs::rename(&new, &directory).map_err(io("put into place", &directory))?;
        Ok(Layer {
            directory,
            cached: false,
            id,
        })
    }

    /// Removes layers that no build used for `days`, and downloads as old. Returns the bytes that are free now.
    pub(crate) fn gc(&self, days: u64) -> Result<u64, CacheError> {
        let mut freed = 0;
        let limit = std::time::Duration::from_secs(days * 86_400);
        for name in ["layers", "debs"] {
            let directory = self.directory(name)?;
            for entry in directory
                .read_dir_utf8()
                .map_err(io("read", &directory))?
                .filter_map(Result::ok)
            {
                let age = entry
                    .metadata()
                    .and_then(|data| data.modified())
                    .ok()
                    .and_then(|at| at.elapsed().ok());
                if age.is_none_or(|age| age < limit) {
                    continue;
                }
                freed += crate::sparse::disk_bytes(entry.path());
                let path = entry.path();
                let gone = if path.is_dir() {
                    std::fs::remove_dir_all(path)
                } else {
                    std::fs::remove_file(path)
                };
                gone.map_err(io("remove", path))?;
            }
        }
        Ok(freed)
    }
}

/// A layer's own time is when it was last used.
fn touch(directory: &Utf8Path) {
    if let Ok(file) = std::fs::File::open(directory) {
        let _ = file.set_modified(std::time::SystemTime::now());
    }
}

fn empty(path: &Utf8Path) -> Result<(), CacheError> {
    if path.exists() {
        std::fs::remove_dir_all(path).map_err(io("remove what a killed build left in", path))?;
    }
    std::fs::create_dir_all(path).map_err(io("create", path))
}

/// Unpacking packages is bound by the disk's fsync; in memory it takes a third of the time. The name depends on the
/// working directory, so that a killed build's is found again.
fn scratch(directory: &Utf8Path) -> Utf8PathBuf {
    const ROOM: u64 = 4 << 30;
    let shm = Utf8Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shm.as_std_path())
        .map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let name = digest::of(directory.as_str().as_bytes());
    let name = format!("vestibule-build-{}", &name[..16]);
    if free >= ROOM {
        shm.join(name)
    } else if rustix::process::geteuid().is_root() {
        directory.join("scratch")
    } else {
        // The user who owns the files in mmdebstrap's namespace can't get into a home of mode 0700.
        Utf8Path::new("/var/tmp").join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_build_of_a_recipe_at_a_time() {
        let home = camino_tempfile::tempdir().unwrap();
        let cache = Cache::new(home.path());
        let work = cache.work("tiny").unwrap();
        let second = cache.work("tiny").unwrap_err().to_string();
        assert!(second.contains(&std::process::id().to_string()), "{second}");
        cache.work("browser").unwrap();
        drop(work);
        cache.work("tiny").unwrap();
    }

    #[test]
    fn a_layer_is_made_once_and_only_whole_ones_are_found() {
        let home = camino_tempfile::tempdir().unwrap();
        let cache = Cache::new(home.path());
        let work = cache.work("tiny").unwrap();
        let key = digest::of(b"key");
        let failed = cache.layer(&work, "x", &key, false, |path| {
            std::fs::write(path.join("half"), "").unwrap();
            Err(CacheError::Busy {
                what: String::new(),
                holder: String::new(),
            })
        });
        assert!(failed.is_err());
        let make = |path: &Utf8Path| {
            assert!(!path.join("half").exists());
            Ok::<_, CacheError>("id".to_owned())
        };
        assert!(!cache.layer(&work, "x", &key, false, make).unwrap().cached);
        let again = cache.layer(&work, "x", &key, false, |_| -> Result<String, CacheError> {
            unreachable!()
        });
        assert_eq!(again.unwrap().id, "id");
    }
}
