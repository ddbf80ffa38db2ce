//! A connection of the host's that ends when the guest's end is known to be gone, whatever the socket says.
use futures_util::{FutureExt, future::BoxFuture};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

/// Reads end of file once `closed` is done.
pub(crate) struct UntilClosed {
    socket: UnixStream,
    closed: BoxFuture<'static, ()>,
    ended: bool,
}

impl UntilClosed {
    pub(crate) fn new(
        socket: UnixStream,
        closed: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        Self {
            socket,
            closed: closed.boxed(),
            ended: false,
        }
    }
}

impl AsyncRead for UntilClosed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ended || self.closed.poll_unpin(cx).is_ready() {
            self.ended = true;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for UntilClosed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// Firecracker fact 11: the connection was accepted, and stays silent for ever.
    #[tokio::test]
    async fn a_read_that_waits_ends_when_the_other_end_is_known_to_be_gone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (gone, closed) = tokio::sync::oneshot::channel::<()>();
        let mut stream = UntilClosed::new(ours, async {
            let _ = closed.await;
        });
        theirs.write_all(b"hello").await.unwrap();
        let mut said = [0; 5];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
        stream.write_all(b"yes").await.unwrap();
        theirs.read_exact(&mut said[..3]).await.unwrap();
        let reader = tokio::spawn(async move { stream.read_u8().await });
        tokio::task::yield_now().await;
        assert!(!reader.is_finished());
        gone.send(()).unwrap();
        let read = tokio::time::timeout(Duration::from_secs(10), reader).await;
        let err = read.unwrap().unwrap().unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
        // The socket itself was never closed by them.
        drop(theirs);
    }

    #[tokio::test]
    async fn what_comes_after_that_is_nobodys() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut stream = UntilClosed::new(ours, async {});
        theirs.write_all(b"late").await.unwrap();
        for _ in 0..2 {
            assert_eq!(stream.read(&mut [0; 4]).await.unwrap(), 0);
        }
    }
}
