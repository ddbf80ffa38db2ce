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

/// Connects to the socket at `path`, and to none that a link there leads to: in a jail the VMM may put one, which would have the
/// runner speak with somebody else's socket.
///
/// # Errors
/// `ENOENT` and `ECONNREFUSED` where nobody listens.
pub(crate) async fn connect(path: &Utf8Path) -> io::Result<UnixStream> {
    let socket = rustix::fs::open(
        path.as_std_path(),
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_leads_to_no_socket() {
        let dir = camino_tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let (socket, link) = (deep.join("socket"), deep.join("link"));
        let _listener = listen(&socket).unwrap();
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        connect(&socket).await.unwrap();
        let err = connect(&link).await.unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::ConnectionRefused);
        let err = connect(&deep.join("nothing")).await.unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::NotFound);
    }
}
