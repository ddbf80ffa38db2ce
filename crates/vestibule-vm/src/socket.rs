//! Unix sockets by paths of any length. `sun_path` holds 107 bytes (unix(7)), and a home directory may be deeper than
//! that, so the directory is opened and the socket named through `/proc/self/fd`.
use camino::Utf8Path;
use rustix::fs::{Mode, OFlags};
use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
};
use tokio::net::UnixStream;

/// Binds and listens. The directory's mode (0700) keeps others out; the socket's own is 0600 as well.
///
/// # Errors
/// When the directory is missing or something of that name exists.
pub(crate) fn listen(path: &Utf8Path) -> io::Result<UnixListener> {
    let (directory, short) = shorten(path)?;
    let listener = UnixListener::bind(short)?;
    drop(directory);
    rustix::fs::chmod(path.as_std_path(), Mode::from_raw_mode(0o600))?;
    Ok(listener)
}

/// Connects to the socket at `path`.
///
/// # Errors
/// `ENOENT` and `ECONNREFUSED` where nobody listens.
pub(crate) async fn connect(path: &Utf8Path) -> io::Result<UnixStream> {
    let (_directory, short) = shorten(path)?;
    UnixStream::connect(short).await
}

fn shorten(path: &Utf8Path) -> io::Result<(OwnedFd, String)> {
    let (parent, name) = path
        .parent()
        .zip(path.file_name())
        .ok_or(io::ErrorKind::InvalidInput)?;
    let directory = rustix::fs::open(
        parent.as_std_path(),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let short = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    Ok((directory, short))
}
