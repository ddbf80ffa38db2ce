//! Files below the person's home directory. The agent is root and the person's programs own the directory, so every path
//! is resolved by the kernel beneath it (openat2(2), `RESOLVE_BENEATH`): a symlink cannot lead out.
use crate::guest::Person;
use rustix::{
    fs::{
        AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchown, fstat, mkdirat,
        openat2, renameat,
    },
    io::Errno,
};
use std::{
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};
use zeroize::Zeroizing;

/// A larger file is not a credential.
pub(crate) const FILE_LIMIT: u64 = 1 << 20;

/// Why a file below the home directory could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HomeError {
    #[error("open the home directory `{}`", path.display())]
    Home {
        path: PathBuf,
        #[source]
        err: Errno,
    },
    #[error("use `{0}`: a path below the home directory is relative and has no `..`")]
    Path(String),
    #[error("{what} `{path}` in the home directory")]
    File {
        what: &'static str,
        path: String,
        #[source]
        err: std::io::Error,
    },
    #[error("read `{path}`: it is larger than {FILE_LIMIT} bytes")]
    TooLarge { path: String },
}

/// The identity of one state of a file: whoever writes to it, or replaces it, changes this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What stands in a file.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) bytes: Zeroizing<Vec<u8>>,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) stamp: Stamp,
}

/// The home directory.
#[derive(Debug)]
pub(crate) struct Home {
    fd: OwnedFd,
    owner: Option<(Uid, Gid)>,
}

impl Home {
    /// Opens `path`; what is written there belongs to `person`.
    ///
    /// # Errors
    /// When there is no such directory.
    pub(crate) fn open(path: &Path, person: Option<&Person>) -> Result<Self, HomeError> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let fd =
            rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|err| HomeError::Home {
                path: path.to_owned(),
                err,
            })?;
        let owner = person.map(|person| (Uid::from_raw(person.uid), Gid::from_raw(person.gid)));
        Ok(Self { fd, owner })
    }

    /// The last `limit` bytes of the file at `path`, as text; empty where there is no such file.
    pub(crate) fn tail(&self, path: &str, limit: u64) -> String {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = below(path).ok().and_then(|below| {
            openat2(&self.fd, below, flags, Mode::empty(), ResolveFlags::BENEATH).ok()
        });
        let Some(mut file) = opened.map(File::from) else {
            return String::new();
        };
        let mut bytes = Vec::new();
        let length = file.metadata().map_or(0, |metadata| {
            if metadata.is_file() {
                metadata.len()
            } else {
                0
            }
        });
        let from = std::io::SeekFrom::Start(length.saturating_sub(limit));
        if length > 0 && file.seek(from).is_ok() {
            // Half a log is as good as none is bad: what could be read counts.
            let _ = file.take(limit).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Reads the file at `path`; none where there is none, or something that is not a file.
    ///
    /// # Errors
    /// When it cannot be read, or is larger than [`FILE_LIMIT`].
    pub(crate) fn read(&self, path: &str) -> Result<Option<Content>, HomeError> {
        let failed = |err: std::io::Error| HomeError::File {
            what: "read",
            path: path.to_owned(),
            err,
        };
        // Opening a FIFO must not block.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = match openat2(
            &self.fd,
            below(path)?,
            flags,
            Mode::empty(),
            ResolveFlags::BENEATH,
        ) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(err) => return Err(failed(err.into())),
        };
        let stat = fstat(&fd).map_err(|err| failed(err.into()))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Ok(None);
        }
        let mut bytes = Zeroizing::new(Vec::new());
        File::from(fd)
            .take(FILE_LIMIT + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        if u64::try_from(bytes.len()).is_ok_and(|len| len > FILE_LIMIT) {
            return Err(HomeError::TooLarge {
                path: path.to_owned(),
            });
        }
        let stamp = Stamp {
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (
                stat.st_mtime,
                i64::try_from(stat.st_mtime_nsec).unwrap_or(0),
            ),
            changed: (
                stat.st_ctime,
                i64::try_from(stat.st_ctime_nsec).unwrap_or(0),
            ),
        };
        Ok(Some(Content {
            bytes,
            mode: stat.st_mode & 0o7777,
            stamp,
        }))
    }

    /// Writes the file at `path` (mode 0600) in one step, with the directories that lead to it (mode 0700).
    ///
    /// # Errors
    /// When a part of the path cannot be made or leads out of the home directory.
    pub(crate) fn write(&self, path: &str, bytes: &[u8]) -> Result<(), HomeError> {
        let failed = |err: Errno| HomeError::File {
            what: "write",
            path: path.to_owned(),
            err: err.into(),
        };
        let whole = below(path)?;
        let name = whole
            .file_name()
            .ok_or_else(|| HomeError::Path(path.to_owned()))?;
        let directory = self
            .make_directories(whole.parent().unwrap_or_else(|| Path::new("")))
            .map_err(failed)?;
        let temporary = format!(".vestibule-{}", uuid::Uuid::new_v4().simple());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = openat2(
            &directory,
            &*temporary,
            flags,
            Mode::from_raw_mode(0o600),
            ResolveFlags::BENEATH,
        )
        .map_err(failed)?;
        if let Some((uid, gid)) = self.owner {
            fchown(&fd, Some(uid), Some(gid)).map_err(failed)?;
        }
        File::from(fd)
            .write_all(bytes)
            .map_err(|err| HomeError::File {
                what: "write",
                path: path.to_owned(),
                err,
            })?;
        renameat(&directory, &*temporary, &directory, name).map_err(failed)
    }

    fn make_directories(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
        let mut here = openat2(&self.fd, ".", flags, Mode::empty(), ResolveFlags::BENEATH)?;
        for part in path.components() {
            let made = mkdirat(&here, part.as_os_str(), Mode::from_raw_mode(0o700));
            if let (Ok(()), Some((uid, gid))) = (made, self.owner) {
                chownat(
                    &here,
                    part.as_os_str(),
                    Some(uid),
                    Some(gid),
                    AtFlags::SYMLINK_NOFOLLOW,
                )?;
            }
            here = openat2(
                &here,
                part.as_os_str(),
                flags,
                Mode::empty(),
                ResolveFlags::BENEATH,
            )?;
        }
        Ok(here)
    }
}

/// `path`, if it is relative and goes only down.
fn below(path: &str) -> Result<&Path, HomeError> {
    let parts = Path::new(path);
    let good = !path.is_empty()
        && parts
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
    if good {
        Ok(parts)
    } else {
        Err(HomeError::Path(path.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    #[test]
    fn nothing_leads_out_of_the_home_directory() {
        let dir = camino_tempfile::tempdir().unwrap();
        let home_path = dir.path().join("home");
        fs::create_dir(&home_path).unwrap();
        fs::write(dir.path().join("shadow"), "root").unwrap();
        symlink("../shadow", home_path.join("link")).unwrap();
        symlink("/etc", home_path.join("etc")).unwrap();
        let home = Home::open(home_path.as_std_path(), None).unwrap();
        for bad in ["link", "etc/passwd"] {
            assert!(
                matches!(home.read(bad), Err(HomeError::File { .. })),
                "{bad}"
            );
        }
        for bad in ["", "/etc/passwd", "../shadow", "a/../../shadow"] {
            assert!(matches!(home.read(bad), Err(HomeError::Path(_))), "{bad}");
        }
        assert!(matches!(
            home.write("etc/new", b"x"),
            Err(HomeError::File { .. })
        ));
        assert!(!Path::new("/etc/new").exists());
    }

    #[test]
    fn a_file_is_written_whole_and_read_back() {
        let dir = camino_tempfile::tempdir().unwrap();
        let home = Home::open(dir.path().as_std_path(), None).unwrap();
        assert!(home.read(".config/x/y.json").unwrap().is_none());
        home.write(".config/x/y.json", b"{}").unwrap();
        let first = home.read(".config/x/y.json").unwrap().unwrap();
        assert_eq!((&first.bytes[..], first.mode), (&b"{}"[..], 0o600));
        home.write(".config/x/y.json", b"[]").unwrap();
        assert_ne!(
            home.read(".config/x/y.json").unwrap().unwrap().stamp,
            first.stamp
        );
        let mode = fs::metadata(dir.path().join(".config/x"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_eq!(
            fs::read_dir(dir.path().join(".config/x")).unwrap().count(),
            1
        );
        assert!(home.read(".config/x").unwrap().is_none());
        home.write("log", b"0123456789").unwrap();
        assert_eq!(
            (home.tail("log", 4).as_str(), home.tail("log", 64).as_str()),
            ("6789", "0123456789")
        );
        assert_eq!(
            (
                home.tail(".config", 4).as_str(),
                home.tail("none", 4).as_str()
            ),
            ("", "")
        );
    }
}
