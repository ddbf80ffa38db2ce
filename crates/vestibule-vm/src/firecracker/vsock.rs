//! The stream over Firecracker's hybrid vsock (its docs/vsock.md): a Unix socket on which `CONNECT <port>` reaches a port of
//! the guest's, and sockets beside it on which the guest reaches the host.
//!
//! ```text
//! host                       Firecracker             guest
//! connect stream.sock ──────▶
//! CONNECT 1024\n      ──────▶ connect ──────────────▶ port 1024
//!                     ◀────── OK 1073741824\n ◀────── accepted
//! stream.sock_1025    ◀────── connect ◀────────────── "I listen", at each time that it begins to
//! ```
use super::request::VSOCK;
use camino::Utf8Path;
use std::{io, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::watch,
};
use vestibule_api::stream::{VSOCK_LISTENS_PORT, VSOCK_PORT};

/// `OK <port>\n`, with the longest port there is.
const ANSWER_LIMIT: usize = 20;
/// A guest that listens accepts at once; a VMM that does not answer for so long has lost the connection (Firecracker fact 10).
const ATTEMPT_LIMIT: Duration = Duration::from_secs(10);
/// One call of [`dial`] goes on for so long. A guest that boots is told apart from one that never will by who calls again.
const DIAL_LIMIT: Duration = Duration::from_secs(30);
/// A guest that boots says when it begins to listen, and nobody asks it before: a request that waits for a device which the guest
/// has not set up yet costs the guest's boot 2 s under an emulated processor (9.1 against 11.4 s to the agent's answer). After so long its
/// word is taken for lost.
const WORD_LIMIT: Duration = Duration::from_secs(20);
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
/// Each attempt is work for the guest.
const BACKOFF_LAST: Duration = Duration::from_secs(2);

/// A process that has no descriptor left cannot accept.
const AFTER_AN_ERROR: Duration = Duration::from_millis(500);

/// Connects to the guest's port, and tries again until it listens. After a restore a connection may be accepted and end
/// before a byte has come (Firecracker fact 11): that shows in the handshake, and whoever dialled dials again. A guest that
/// `boots` is asked when it has said that it listens.
///
/// # Errors
/// The last attempt's, when nothing listened for [`DIAL_LIMIT`].
pub(super) async fn dial(
    directory: &Utf8Path,
    mut listens: watch::Receiver<u64>,
    boots: bool,
) -> io::Result<UnixStream> {
    let socket = directory.join(VSOCK);
    let deadline = tokio::time::Instant::now() + DIAL_LIMIT;
    let mut backoff = BACKOFF_FIRST;
    if boots && *listens.borrow() == 0 {
        told(&mut listens, WORD_LIMIT).await;
    }
    loop {
        listens.mark_unchanged();
        let attempt = tokio::time::timeout(ATTEMPT_LIMIT, connect(&socket, VSOCK_PORT));
        let err = tokio::select! {
            attempted = attempt => match attempted {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(err)) => err,
                Err(_) => silent(),
            },
            // What was asked before the guest had a device may stay without an answer; now there is one to be had.
            Ok(()) = listens.changed() => continue,
        };
        if tokio::time::Instant::now() >= deadline {
            return Err(err);
        }
        told(&mut listens, backoff).await;
        backoff = (backoff * 2).min(BACKOFF_LAST);
    }
}

/// Waits until the guest says that it listens, or for so long.
async fn told(listens: &mut watch::Receiver<u64>, limit: Duration) {
    let told = tokio::time::timeout(limit, listens.changed()).await;
    if matches!(told, Ok(Err(_))) {
        // Nobody hears it any more.
        tokio::time::sleep(limit).await;
    }
}

fn silent() -> io::Error {
    let words = format!("the VMM did not answer `CONNECT {VSOCK_PORT}` within {ATTEMPT_LIMIT:?}");
    io::Error::new(io::ErrorKind::TimedOut, words)
}

/// One attempt.
async fn connect(socket: &Utf8Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = crate::socket::connect(socket).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    // Byte by byte: what comes after the line is the guest's.
    let mut line = Vec::with_capacity(ANSWER_LIMIT);
    loop {
        let byte = match stream.read_u8().await {
            Ok(byte) => byte,
            // An unbound port is an end without a word (Firecracker fact 8).
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(refused(&format!(
                    "nothing in the guest listens on port {port}"
                )));
            }
            Err(err) => return Err(err),
        };
        if byte == b'\n' {
            break;
        }
        if line.len() == ANSWER_LIMIT {
            return Err(unexpected(&line));
        }
        line.push(byte);
    }
    let answered = line
        .strip_prefix(b"OK ")
        .is_some_and(|port| !port.is_empty() && port.iter().all(u8::is_ascii_digit));
    if answered {
        Ok(stream)
    } else {
        Err(unexpected(&line))
    }
}

fn refused(words: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionRefused, words)
}

fn unexpected(line: &[u8]) -> io::Error {
    let said = crate::log::printable(&String::from_utf8_lossy(line));
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the VMM answered `{said}` where `OK <port>` was expected"),
    )
}

/// Counts the times that the guest said that it listens, until the receiver and the machine are gone. `owner` is the user that
/// the VMM runs as, where that is another one.
///
/// # Errors
/// When the socket cannot be made.
pub(super) fn hear(directory: &Utf8Path, owner: Option<u32>) -> io::Result<watch::Receiver<u64>> {
    let path = directory.join(format!("{VSOCK}_{VSOCK_LISTENS_PORT}"));
    // Nobody else makes one: what is there was left by an earlier VM of this directory (Firecracker fact 9).
    super::unlink(&path)?;
    let listener = crate::socket::listen(&path)?;
    if owner.is_some() {
        std::os::unix::fs::chown(&path, owner, owner)?;
    }
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let (told, listens) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = told.closed() => return,
            };
            match accepted {
                // That somebody came is all that there is to it.
                Ok(_) => told.send_modify(|count| *count += 1),
                Err(err) => {
                    tracing::debug!(error = %err, "the guest's word that it listens was lost");
                    tokio::time::sleep(AFTER_AN_ERROR).await;
                }
            }
        }
    });
    Ok(listens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use camino_tempfile::Utf8TempDir;

    /// What the VMM's end of one connection does after it has read the request.
    #[derive(Clone, Copy)]
    enum Peer {
        Says(&'static [u8]),
        Ends,
    }

    /// A socket that speaks as Firecracker's does, one behaviour for each connection; the last one stays.
    fn vmm(peers: &'static [Peer]) -> Utf8TempDir {
        let dir = camino_tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(VSOCK)).unwrap();
        tokio::spawn(async move {
            for peer in peers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; b"CONNECT 1024\n".len()];
                stream.read_exact(&mut request).await.unwrap();
                assert_eq!(request, b"CONNECT 1024\n");
                if let Peer::Says(words) = peer {
                    stream.write_all(words).await.unwrap();
                    tokio::spawn(async move {
                        let mut rest = Vec::new();
                        let _ = stream.read_to_end(&mut rest).await;
                    });
                }
            }
        });
        dir
    }

    #[tokio::test]
    async fn a_guest_that_does_not_listen_yet_is_asked_again() {
        // Firecracker fact 8: an end without a word, twice; then the guest listens, and speaks at once.
        let dir = vmm(&[Peer::Ends, Peer::Ends, Peer::Says(b"OK 1073741824\nhello")]);
        let listens = hear(dir.path(), None).unwrap();
        let mut stream = dial(dir.path(), listens, false).await.unwrap();
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"hello");
    }

    #[tokio::test]
    async fn a_guest_that_says_that_it_listens_is_asked_at_once() {
        // The first connection was lost on its way.
        let dir = vmm(&[Peer::Says(b""), Peer::Says(b"OK 1073741824\n")]);
        let listens = hear(dir.path(), None).unwrap();
        let says = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let path = dir.path().join("stream.sock_1025");
            UnixStream::connect(path).await.unwrap()
        };
        let begun = std::time::Instant::now();
        let (dialled, _) = tokio::join!(dial(dir.path(), listens, false), says);
        dialled.unwrap();
        assert!(begun.elapsed() < ATTEMPT_LIMIT / 2, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_guest_that_boots_is_not_asked_before_it_listens() {
        let dir = camino_tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(dir.path().join(VSOCK)).unwrap();
        let listens = hear(dir.path(), None).unwrap();
        let dialled = dial(dir.path(), listens, true);
        let guest = async {
            let early = tokio::time::timeout(BACKOFF_LAST / 4, socket.accept()).await;
            assert!(early.is_err(), "it was asked");
            drop(
                UnixStream::connect(dir.path().join("stream.sock_1025"))
                    .await
                    .unwrap(),
            );
            let (mut stream, _) = socket.accept().await.unwrap();
            stream.write_all(b"OK 1073741824\n").await.unwrap();
            stream
        };
        let (dialled, _stream) = tokio::join!(dialled, guest);
        dialled.unwrap();
    }

    #[tokio::test]
    async fn what_is_no_answer_is_said() {
        for said in [
            &b"NO\n"[..],
            b"OK \n",
            b"OK x\n",
            b"OK 123456789012345678901234567890",
        ] {
            let dir = camino_tempfile::tempdir().unwrap();
            let path = dir.path().join(VSOCK);
            let listener = UnixListener::bind(&path).unwrap();
            let (connected, accepted) = tokio::join!(connect(&path, 1024), async {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(said).await.unwrap();
                stream
            });
            let err = connected.unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::InvalidData, "{err}");
            drop(accepted);
        }
    }

    #[tokio::test]
    async fn the_guest_is_heard() {
        let dir = camino_tempfile::tempdir().unwrap();
        // Left by an earlier VM.
        drop(UnixListener::bind(dir.path().join("stream.sock_1025")).unwrap());
        let mut listens = hear(dir.path(), None).unwrap();
        for count in 1..=2 {
            drop(
                UnixStream::connect(dir.path().join("stream.sock_1025"))
                    .await
                    .unwrap(),
            );
            let heard = tokio::time::timeout(Duration::from_secs(10), listens.changed()).await;
            heard.unwrap().unwrap();
            assert_eq!(*listens.borrow_and_update(), count);
        }
    }
}
