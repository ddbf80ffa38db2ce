//! Files that are either there as a whole or not at all, and readable by their owner only.
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
};

/// A file operation that failed, with its path.
#[derive(Debug, thiserror::Error)]
#[error("{operation} `{path}`")]
pub struct FileError {
    operation: &'static str,
    path: Utf8PathBuf,
    #[source]
    err: io::Error,
}

impl FileError {
    pub(crate) fn new(operation: &'static str, path: &Utf8Path, err: io::Error) -> Self {
        Self {
            operation,
            path: path.to_owned(),
            err,
        }
    }

    /// Whether the file was not there.
    pub fn is_not_found(&self) -> bool {
        self.err.kind() == io::ErrorKind::NotFound
    }
}

/// Makes `path` and its missing parents, mode 0700.
pub(crate) fn make_dir(path: &Utf8Path) -> Result<(), FileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|err| FileError::new("create directory", path, err))
}

/// Opens `path` for reading and appending, mode 0600 where it is new.
pub(crate) fn open_append(path: &Utf8Path) -> Result<File, FileError> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|err| FileError::new("open", path, err))
}

/// The whole file, refused when it has more than `limit` bytes.
pub(crate) fn read(path: &Utf8Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let read = || {
        let mut bytes = Vec::new();
        let file = File::open(path)?;
        let count = file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if u64::try_from(count).is_ok_and(|count| count > limit) {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        Ok(bytes)
    };
    read().map_err(|err| FileError::new("read", path, err))
}

/// Writes `bytes` to a file beside `path`, mode 0600, and syncs it. [`commit`] or [`discard`] is next.
pub(crate) fn stage(path: &Utf8Path, bytes: &[u8]) -> Result<Utf8PathBuf, FileError> {
    let staged = Utf8PathBuf::from(format!("{path}.new"));
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&staged)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|err| {
        discard(&staged);
        FileError::new("write", &staged, err)
    })?;
    Ok(staged)
}

/// Gives a staged file its name, durably.
pub(crate) fn commit(staged: &Utf8Path, path: &Utf8Path) -> Result<(), FileError> {
    std::fs::rename(staged, path).map_err(|err| FileError::new("rename to", path, err))?;
    sync_parent(path)
}

/// Removes a staged file; one that is not there is fine.
pub(crate) fn discard(staged: &Utf8Path) {
    drop(std::fs::remove_file(staged));
}

/// Makes a change of `path`'s directory durable.
pub(crate) fn sync_parent(path: &Utf8Path) -> Result<(), FileError> {
    let parent = path.parent().unwrap_or_else(|| Utf8Path::new("."));
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(|err| FileError::new("sync directory", parent, err))
}
