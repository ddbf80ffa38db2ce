//! Files that the controller could not use as it should.
use camino::{Utf8Path, Utf8PathBuf};
use std::{io, os::unix::fs::MetadataExt as _};

/// An operation on a file that failed, with its path.
#[derive(Debug, thiserror::Error)]
#[error("{operation} `{path}`")]
pub struct FileError {
    operation: &'static str,
    path: Utf8PathBuf,
    #[source]
    err: io::Error,
}

/// What an operating system's error was about.
pub(crate) fn failed(
    operation: &'static str,
    path: &Utf8Path,
) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |err| FileError {
        operation,
        path,
        err,
    }
}

/// The mode of a file that group or others may use, which one with a secret must not be; none: it is its owner's alone.
pub(crate) fn exposed(path: &Utf8Path) -> io::Result<Option<u32>> {
    let mode = std::fs::metadata(path)?.mode() & 0o777;
    Ok((mode & 0o077 != 0).then_some(mode))
}
