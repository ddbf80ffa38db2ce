//! A viewer's WebSocket whose connection somebody else may write to: the runner, or [`vestibule_api::view::pump`] here.
use super::Close;
use crate::listen::Stream;
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, WebSocketConfig},
    },
};

/// Read at a time: people say little. The library's own 128 KiB are each viewer's for as long as it watches.
const READ_BUFFER: usize = 4 << 10;

/// The WebSocket: what the viewer says, and the good-bye.
pub(crate) type Socket = WebSocketStream<Connection>;

/// The connection of a [`Socket`].
#[derive(Debug)]
pub(crate) struct Connection {
    read: Reader,
    out: Out,
}

#[derive(Debug)]
enum Reader {
    Plain(OwnedReadHalf),
    Tls(ReadHalf<Box<TlsStream<TcpStream>>>),
}

/// The half that is written to.
#[derive(Debug)]
pub(crate) enum Writer {
    Plain(OwnedWriteHalf),
    Tls(WriteHalf<Box<TlsStream<TcpStream>>>),
}

impl Writer {
    /// The connection, where its bytes are the viewer's as they are: then somebody else may write them.
    pub(super) fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(write) => Some(write.as_ref()),
            Self::Tls(_) => None,
        }
    }
}

impl AsyncWrite for Writer {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(write) => Pin::new(write).poll_write(cx, bytes),
            Self::Tls(write) => Pin::new(write).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(write) => Pin::new(write).poll_flush(cx),
            Self::Tls(write) => Pin::new(write).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(write) => Pin::new(write).poll_shutdown(cx),
            Self::Tls(write) => Pin::new(write).poll_shutdown(cx),
        }
    }
}

#[derive(Debug)]
enum Out {
    Viewer(Writer),
    /// Somebody else writes to the viewer; what the WebSocket says of itself (pongs, the answer to a close) waits for the
    /// end of a frame there.
    Elsewhere(mpsc::Sender<Bytes>),
}

/// The server's side of an upgraded connection, from which `first` has been read already.
///
/// # Errors
/// When the connection takes no options.
pub(crate) async fn open(stream: Stream, first: Bytes) -> io::Result<Socket> {
    // An update is written whole: there is nothing to wait for.
    let (read, write) = match stream {
        Stream::Plain(tcp) => {
            tcp.set_nodelay(true)?;
            let (read, write) = tcp.into_split();
            (Reader::Plain(read), Writer::Plain(write))
        }
        Stream::Tls(tls) => {
            tls.get_ref().0.set_nodelay(true)?;
            let (read, write) = tokio::io::split(tls);
            (Reader::Tls(read), Writer::Tls(write))
        }
    };
    let connection = Connection {
        read,
        out: Out::Viewer(write),
    };
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .max_message_size(Some(super::MESSAGE_LIMIT))
        .max_frame_size(Some(super::MESSAGE_LIMIT));
    let first = first.into();
    Ok(WebSocketStream::from_partially_read(connection, first, Role::Server, Some(config)).await)
}

impl Connection {
    /// Takes the half that is written to; control frames go to `controls` meanwhile.
    pub(super) fn take(&mut self, controls: mpsc::Sender<Bytes>) -> Option<Writer> {
        match std::mem::replace(&mut self.out, Out::Elsewhere(controls)) {
            Out::Viewer(write) => Some(write),
            Out::Elsewhere(_) => None,
        }
    }

    /// Gives it back, between two frames.
    pub(super) fn put(&mut self, write: Writer) {
        self.out = Out::Viewer(write);
    }
}

/// Says good-bye with code and reason. A viewer that is gone does not hear it.
pub(crate) async fn close(socket: &mut Socket, close: &Close) {
    let frame = CloseFrame {
        code: (close.code as u16).into(),
        reason: close.short().into(),
    };
    let farewell = async {
        if socket.send(Message::Close(Some(frame))).await.is_ok() {
            // Until the other side's close: one that is sent into unread data can be lost with a reset.
            while let Some(Ok(_)) = socket.next().await {}
        }
    };
    drop(tokio::time::timeout(Duration::from_secs(2), farewell).await);
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.read {
            Reader::Plain(read) => Pin::new(read).poll_read(cx, buf),
            Reader::Tls(read) => Pin::new(read).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.out {
            Out::Viewer(write) => Pin::new(write).poll_write(cx, bytes),
            Out::Elsewhere(controls) => {
                // Of many pings it is enough to answer the last few (RFC 6455 section 5.5.3).
                drop(controls.try_send(Bytes::copy_from_slice(bytes)));
                Poll::Ready(Ok(bytes.len()))
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.out {
            Out::Viewer(write) => Pin::new(write).poll_flush(cx),
            Out::Elsewhere(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.out {
            Out::Viewer(write) => Pin::new(write).poll_shutdown(cx),
            Out::Elsewhere(_) => Poll::Ready(Ok(())),
        }
    }
}
