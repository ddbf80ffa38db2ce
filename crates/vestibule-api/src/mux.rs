//! The one stream between host and guest, made many: the handshake, then yamux, then one [`Open`] header a stream.
//!
//! One task owns the yamux connection; everybody else holds a [`Mux`], which is cheap to clone, or the one [`Incoming`].
//! Every queue is bounded: at most [`STREAM_LIMIT`] streams may be open in each direction, each with a window of its own,
//! so a reader that does not read stops its own writer and nobody else. The connection ends when the transport does,
//! when [`Mux::close`] is called, or when the last handle and the last stream are gone; then streams read end of file.
//!
//! ```text
//! Mux::open ──request──▶ driver task ──▶ transport ──▶ peer's driver ──▶ header reader ──▶ Incoming::accept
//! ```
mod handshake;

pub use handshake::{BadKey, HandshakeError, StreamKey, guest_handshake, host_handshake};

use crate::stream::{OPEN_LIMIT, Open};
use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

/// Streams that each side may have open at once. A further [`Mux::open`] waits; a peer that does not wait is reset.
pub const STREAM_LIMIT: usize = 128;
/// yamux ends the whole connection at its own limit, so it is set where two honest sides never come.
const YAMUX_STREAMS: usize = 4 * STREAM_LIMIT;
/// The least that yamux accepts for [`YAMUX_STREAMS`]; the sum of all receive windows never exceeds it.
const WINDOW_LIMIT: usize = YAMUX_STREAMS * yamux::DEFAULT_CREDIT as usize;
/// An opener has so long to send its header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer has so long to take the goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Which side of the connection this is. By convention the host is the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Host,
    Guest,
}

/// Why a stream could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum MuxError {
    /// The transport ended, or one side said goodbye.
    #[error("the stream between host and guest has ended")]
    Ended,
    /// The transport failed, or the peer broke the protocol.
    #[error("the stream between host and guest broke")]
    Broken(#[source] Arc<yamux::ConnectionError>),
    #[error("send the header of a stream")]
    Header(#[source] Arc<io::Error>),
}

/// Why a stream that the peer opened was dropped.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the header of a stream is longer than {OPEN_LIMIT} bytes")]
    TooLong,
    #[error("the header of a stream did not come within {HEADER_TIMEOUT:?}")]
    TooSlow,
    #[error("read the header of a stream")]
    Read(#[source] io::Error),
    #[error("understand the header of a stream")]
    Unknown(#[source] serde_json::Error),
}

enum Request {
    Open(oneshot::Sender<Result<yamux::Stream, MuxError>>),
    Close,
}

/// Opens streams. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Mux {
    requests: mpsc::Sender<Request>,
    outbound: Arc<Semaphore>,
    end: watch::Receiver<Option<MuxError>>,
}

/// Streams that the peer opens.
#[derive(Debug)]
pub struct Incoming {
    queue: mpsc::Receiver<Result<(Open, MuxStream), OpenError>>,
    // Keeps the connection alive for a side that only accepts.
    _mux: Mux,
}

/// One multiplexed stream, after its header. Dropping it without a shutdown resets it.
#[derive(Debug)]
pub struct MuxStream {
    inner: Compat<yamux::Stream>,
    _permit: OwnedSemaphorePermit,
    _alive: mpsc::Sender<Request>,
}

/// Starts the multiplexer on a transport whose handshake is done. Needs a tokio runtime.
pub fn start<S>(io: S, side: Side) -> (Mux, Incoming)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut config = yamux::Config::default();
    config.set_max_num_streams(YAMUX_STREAMS);
    config.set_max_connection_receive_window(Some(WINDOW_LIMIT));
    let mode = match side {
        Side::Host => yamux::Mode::Client,
        Side::Guest => yamux::Mode::Server,
    };
    let (requests, inbox) = mpsc::channel(STREAM_LIMIT);
    let (accepted, queue) = mpsc::channel(STREAM_LIMIT);
    let (ended, end) = watch::channel(None);
    let driver = Driver {
        connection: yamux::Connection::new(io.compat(), config, mode),
        alive: requests.downgrade(),
        inbox,
        waiting: None,
        accepted,
        inbound: Arc::new(Semaphore::new(STREAM_LIMIT)),
    };
    tokio::spawn(async move {
        let why = driver.run().await;
        ended.send_replace(Some(why));
    });
    let mux = Mux {
        requests,
        outbound: Arc::new(Semaphore::new(STREAM_LIMIT)),
        end,
    };
    let incoming = Incoming {
        queue,
        _mux: mux.clone(),
    };
    (mux, incoming)
}

impl Mux {
    /// Opens a stream and sends its header. Waits while [`STREAM_LIMIT`] streams of this side are open.
    ///
    /// # Errors
    /// When the connection has ended. That the peer refuses the service shows as end of file.
    pub async fn open(&self, open: Open) -> Result<MuxStream, MuxError> {
        let permit = Arc::clone(&self.outbound)
            .acquire_owned()
            .await
            .map_err(|_| MuxError::Ended)?;
        let (reply, answer) = oneshot::channel();
        let request = self.requests.send(Request::Open(reply));
        request.await.map_err(|_| self.why_ended())?;
        let stream = answer.await.map_err(|_| self.why_ended())??;
        let mut stream = MuxStream::new(stream, permit, self.requests.clone());
        let mut line = serde_json::to_vec(&open).map_err(|err| header_error(err.into()))?;
        line.push(b'\n');
        stream.write_all(&line).await.map_err(header_error)?;
        stream.flush().await.map_err(header_error)?;
        Ok(stream)
    }

    /// Says goodbye to the peer and ends the connection, and with it every stream.
    pub async fn close(&self) {
        // A send that fails means that it has ended already.
        let _ = self.requests.send(Request::Close).await;
        self.ended().await;
    }

    /// Waits until the connection has ended, and says why.
    pub async fn ended(&self) -> MuxError {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or(MuxError::Ended),
            Err(_) => MuxError::Ended,
        }
    }

    fn why_ended(&self) -> MuxError {
        self.end.borrow().clone().unwrap_or(MuxError::Ended)
    }
}

fn header_error(err: io::Error) -> MuxError {
    MuxError::Header(Arc::new(err))
}

impl Incoming {
    /// The next stream of the peer's, with its header read; `None` when the connection has ended. An error concerns one
    /// stream, which has been reset; the next call goes on.
    pub async fn accept(&mut self) -> Option<Result<(Open, MuxStream), OpenError>> {
        self.queue.recv().await
    }
}

struct Driver<T> {
    connection: yamux::Connection<Compat<T>>,
    inbox: mpsc::Receiver<Request>,
    /// A request that yamux cannot serve yet.
    waiting: Option<oneshot::Sender<Result<yamux::Stream, MuxError>>>,
    accepted: mpsc::Sender<Result<(Open, MuxStream), OpenError>>,
    inbound: Arc<Semaphore>,
    alive: mpsc::WeakSender<Request>,
}

enum Step {
    Inbound(yamux::Stream),
    Close,
    End(MuxError),
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    async fn run(mut self) -> MuxError {
        loop {
            match poll_fn(|cx| self.poll_step(cx)).await {
                Step::Inbound(stream) => self.receive(stream),
                Step::End(why) => return why,
                Step::Close => break,
            }
        }
        let goodbye = poll_fn(|cx| self.connection.poll_close(cx));
        // A peer that does not read cannot keep the connection open.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, goodbye).await;
        MuxError::Ended
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        loop {
            if let Some(reply) = self.waiting.take() {
                match self.connection.poll_new_outbound(cx) {
                    // Who asked may have gone away; the stream is then dropped unused.
                    Poll::Ready(Ok(stream)) => drop(reply.send(Ok(stream))),
                    Poll::Ready(Err(err)) => {
                        let why = end_of(err);
                        let _ = reply.send(Err(why.clone()));
                        return Poll::Ready(Step::End(why));
                    }
                    Poll::Pending => {
                        self.waiting = Some(reply);
                        break;
                    }
                }
            }
            match self.inbox.poll_recv(cx) {
                Poll::Ready(Some(Request::Open(reply))) => self.waiting = Some(reply),
                Poll::Ready(Some(Request::Close) | None) => return Poll::Ready(Step::Close),
                Poll::Pending => break,
            }
        }
        self.connection
            .poll_next_inbound(cx)
            .map(|inbound| match inbound {
                Some(Ok(stream)) => Step::Inbound(stream),
                Some(Err(err)) => Step::End(end_of(err)),
                None => Step::End(MuxError::Ended),
            })
    }

    /// Reads the header of a stream in a task of its own, so that a slow opener holds up nobody.
    fn receive(&self, stream: yamux::Stream) {
        let (Ok(permit), Some(alive)) = (
            Arc::clone(&self.inbound).try_acquire_owned(),
            self.alive.upgrade(),
        ) else {
            return;
        };
        let accepted = self.accepted.clone();
        tokio::spawn(async move {
            let stream = MuxStream::new(stream, permit, alive);
            let header = tokio::time::timeout(HEADER_TIMEOUT, read_open(stream)).await;
            // A stream waits in the queue with its permit; an error has none, so it does not wait.
            let _ = match header.unwrap_or(Err(OpenError::TooSlow)) {
                Ok(opened) => accepted.send(Ok(opened)).await.is_ok(),
                Err(err) => accepted.try_send(Err(err)).is_ok(),
            };
        });
    }
}

fn end_of(err: yamux::ConnectionError) -> MuxError {
    if matches!(err, yamux::ConnectionError::Closed) {
        MuxError::Ended
    } else {
        MuxError::Broken(Arc::new(err))
    }
}

/// Reads one line and not a byte beyond it: what follows belongs to the service.
async fn read_open(mut stream: MuxStream) -> Result<(Open, MuxStream), OpenError> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await.map_err(OpenError::Read)? {
            b'\n' => break,
            _ if line.len() + 1 >= OPEN_LIMIT => return Err(OpenError::TooLong),
            byte => line.push(byte),
        }
    }
    let open = serde_json::from_slice(&line).map_err(OpenError::Unknown)?;
    Ok((open, stream))
}

impl MuxStream {
    fn new(
        stream: yamux::Stream,
        permit: OwnedSemaphorePermit,
        alive: mpsc::Sender<Request>,
    ) -> Self {
        Self {
            inner: stream.compat(),
            _permit: permit,
            _alive: alive,
        }
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
