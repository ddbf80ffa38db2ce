//! Files that the controller could not use as it should.
use camino::{Utf8Path, Utf8PathBuf};
use std::io;

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
