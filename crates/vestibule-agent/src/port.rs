//! The virtio-serial port to the host, as an async byte stream.
//!
//! Two things make the port unlike a socket (drivers/char/virtio_console.c). While no host is connected, `read` returns
//! 0 and `poll` says HUP, always; tokio never forgets a HUP, so an `AsyncFd` on the port would spin. Therefore the port
//! hangs in an epoll of ours, edge-triggered, and tokio waits for *that* descriptor. And the port has no connections: a
//! read of 0 after the host was there means that it went away, which is the end of this stream; the port is then
//! opened again and [`Port::connected`] waits for the next host.
use crate::uevent::Uevents;
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fs::{Mode, OFlags},
    io::Errno,
};
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    #[error("listen to the kernel's device events")]
    Subscribe(#[source] Errno),
    #[error("find the virtio port `{name}` within {waited_s} s")]
    Missing { name: String, waited_s: u64 },
    #[error("open the virtio port `{}`", path.display())]
    Open {
        path: PathBuf,
        #[source]
        err: Errno,
    },
    #[error("wait for the host on the virtio port")]
    Wait(#[source] io::Error),
}

/// Waits for the port called `name` and returns its device node. Blocks; at most `limit`.
///
/// # Errors
/// When no such port appears in time.
pub(crate) fn find(name: &str, limit: Duration) -> Result<PathBuf, PortError> {
    let class = Path::new("/sys/class/virtio-ports");
    Uevents::subscribe()
        .map_err(PortError::Subscribe)?
        .wait_for(limit, || named(class, name))
        .map(|device| Path::new("/dev").join(device))
        .ok_or_else(|| PortError::Missing {
            name: name.to_owned(),
            waited_s: limit.as_secs(),
        })
}

/// The device (`vport1p1`) under `class` whose attribute `name` is `name`; without udev there is no link by name.
fn named(class: &Path, name: &str) -> Option<String> {
    fs::read_dir(class).ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("name")).ok()?;
        (found.trim() == name).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}

/// An open port.
#[derive(Debug)]
pub(crate) struct Port {
    fd: OwnedFd,
    readable: Edge,
    writable: Edge,
}

impl Port {
    /// Opens the port at `path`. The kernel allows one opener.
    ///
    /// # Errors
    /// [`Errno::BUSY`] while somebody else has it open.
    pub(crate) fn open(path: &Path) -> Result<Self, PortError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let opened =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|err| PortError::Open {
                path: path.to_owned(),
                err,
            })?;
        Self::from_fd(opened).map_err(PortError::Wait)
    }

    fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let readable = Edge::new(&fd, epoll::EventFlags::IN)?;
        let writable = Edge::new(&fd, epoll::EventFlags::OUT)?;
        Ok(Self {
            fd,
            readable,
            writable,
        })
    }

    /// Waits until a host is connected.
    ///
    /// # Errors
    /// When the port is gone.
    pub(crate) async fn connected(&self) -> Result<(), PortError> {
        std::future::poll_fn(|cx| {
            loop {
                if !self.hung_up()? {
                    return Poll::Ready(Ok(()));
                }
                ready!(self.writable.poll(cx))?;
            }
        })
        .await
        .map_err(PortError::Wait)
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec::default()))?;
        Ok(fds[0].revents().contains(PollFlags::HUP))
    }
}

impl AsyncRead for Port {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match rustix::io::read(&self.fd, buf.initialize_unfilled()) {
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => ready!(self.readable.poll(cx))?,
                Err(Errno::INTR) => {}
                Err(err) => return Poll::Ready(Err(err.into())),
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.fd, buf) {
                Ok(written) => return Poll::Ready(Ok(written)),
                // A full queue and a host that is gone look alike here; the reader notices the latter.
                Err(Errno::AGAIN) => ready!(self.writable.poll(cx))?,
                Err(Errno::INTR) => {}
                Err(err) => return Poll::Ready(Err(err.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One direction's edge-triggered epoll: becomes readable each time the port's state changes, and only then.
#[derive(Debug)]
struct Edge(AsyncFd<OwnedFd>);

impl Edge {
    fn new(fd: &OwnedFd, flags: epoll::EventFlags) -> io::Result<Self> {
        let inner = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &inner,
            fd,
            epoll::EventData::new_u64(0),
            flags | epoll::EventFlags::ET,
        )?;
        #[expect(
            unsafe_code,
            reason = "tokio asks for a promise about the descriptor that only its owner can give"
        )]
        // SAFETY: `inner` owns its descriptor and moves into the AsyncFd, so it stays open, and the same, until the AsyncFd
        // is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(inner, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Waits for the next edge. Who waits has tried before, so an edge seen twice costs one more try and no more.
    fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; 1];
            let (seen, _) =
                epoll::wait(guard.get_inner(), &mut events, Some(&Timespec::default()))?;
            let any = !seen.is_empty();
            guard.clear_ready();
            if any {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn pair() -> (Port, Port) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        (Port::from_fd(a).unwrap(), Port::from_fd(b).unwrap())
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_beyond_every_buffer() {
        let (mut near, mut far) = pair();
        near.connected().await.unwrap();
        let sent: Vec<u8> = (0..2_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            near.write_all(&sent).await.unwrap();
            let mut answer = [0u8; 4];
            near.read_exact(&mut answer).await.unwrap();
            answer
        });
        let mut got = vec![0; expected.len()];
        far.read_exact(&mut got).await.unwrap();
        assert!(got == expected);
        far.write_all(b"done").await.unwrap();
        assert_eq!(&writer.await.unwrap(), b"done");
    }

    #[tokio::test]
    async fn waiting_for_a_byte_uses_no_processor() {
        let (mut near, mut far) = pair();
        let before = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let mut byte = [0u8; 1];
        let quiet =
            tokio::time::timeout(Duration::from_millis(300), near.read_exact(&mut byte)).await;
        assert!(quiet.is_err());
        let after = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        assert!(after.tv_sec == before.tv_sec && after.tv_nsec - before.tv_nsec < 50_000_000);
        far.write_all(b"x").await.unwrap();
        near.read_exact(&mut byte).await.unwrap();
        drop(far);
        assert_eq!(near.read(&mut byte).await.unwrap(), 0);
    }

    #[test]
    fn a_port_is_found_by_its_name() {
        let class = camino_tempfile::tempdir().unwrap();
        for (device, name) in [
            ("vport1p1", "org.qemu.x\n"),
            ("vport1p2", "vestibule.stream\n"),
        ] {
            fs::create_dir(class.path().join(device)).unwrap();
            fs::write(class.path().join(device).join("name"), name).unwrap();
        }
        let class = class.path().as_std_path();
        assert_eq!(
            named(class, "vestibule.stream").as_deref(),
            Some("vport1p2")
        );
        assert_eq!(named(class, "other"), None);
    }
}
