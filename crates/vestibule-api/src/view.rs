//! The view's last stretch: RFB in binary WebSocket frames (RFC 6455), written on the viewer's own connection by whoever
//! holds the stream to the guest.
//!
//! A relay costs what its copies and wake-ups cost, so the controller hands the viewer's connection to the runner instead
//! of relaying. It keeps the connection too: it reads what the viewer says, and says good-bye.
//!
//! ```text
//! viewer ◀──frames────────────────────── runner ◀── guest     (take_over)
//!    └─────▶ controller ──records──▶ runner ──▶ guest          (send, follow)
//! ```
//! After `101` with [`FRAMES`] the runner says [`READY`], the controller sends one byte with the connection beside it
//! (`SCM_RIGHTS`, unix(7)), and then:
//!
//! | who | record |
//! |---|---|
//! | controller | `kind: u8, length: u16, bytes`: 0 for the guest, 1 a whole control frame for the viewer |
//! | controller | end of file: stop between two frames |
//! | runner | `0: u8, count: u64`: so many bytes more went to the viewer, once a second at most |
//! | runner | `end: u8, count: u64`: it has ended between two frames, for this reason ([`End`]) |
//!
//! Numbers are big-endian. Nobody else writes to the viewer between [`hand_over`] and the [`End`].
use crate::descriptor;
use bytes::Bytes;
use std::{
    future::poll_fn,
    io,
    os::fd::BorrowedFd,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::Poll,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::{Notify, mpsc, oneshot},
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};

/// The upgrade of `GET /view` after which RFB goes byte for byte.
pub const RAW: &str = "rfb";
/// The upgrade of `GET /view` after which the viewer's connection is handed over.
pub const FRAMES: &str = "rfb-frames";
/// The runner's first byte: whatever is sent now, it reads itself, ancillary data too.
const READY: u8 = b'r';

/// A viewer that takes nothing for so long is let go.
pub const SLOW: Duration = Duration::from_secs(30);
/// A ping so often keeps what is in between from forgetting the connection.
pub const PING: Duration = Duration::from_secs(20);
/// Control frames that wait for the end of a frame. Those beyond are dropped: pongs, of which the latest suffices.
pub const CONTROLS: usize = 8;
/// How often the runner says how many bytes went to the viewer.
const REPORT: Duration = Duration::from_secs(1);

/// Payload of a frame: what the guest has sent by then, and at most this.
const CHUNK: usize = 256 << 10;
/// The longest header of a frame that is not masked (section 5.2).
const HEADER: usize = 10;
/// An empty ping (section 5.5.2).
const PING_FRAME: [u8; 2] = [0x89, 0];

const FOR_GUEST: u8 = 0;
const FOR_VIEWER: u8 = 1;
const COUNT: u8 = 0;

/// Why no more frames are written. The viewer's connection is between two frames then, unless it is [`End::Viewer`] or
/// [`End::Slow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum End {
    /// The guest closed without a word.
    Silent = 1,
    /// The guest closed.
    Guest = 2,
    /// The viewer is gone.
    Viewer = 3,
    /// The viewer took nothing for [`SLOW`].
    Slow = 4,
    /// It was asked for.
    Told = 5,
}

impl End {
    fn from_wire(byte: u8) -> io::Result<Self> {
        [
            Self::Silent,
            Self::Guest,
            Self::Viewer,
            Self::Slow,
            Self::Told,
        ]
        .into_iter()
        .find(|end| *end as u8 == byte)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a record of no known kind"))
    }
}

/// Writes what the guest says to the viewer, a frame for what there is without waiting, until one of them ends or `told` resolves.
/// A viewer that is slower than the guest slows the guest down: nothing is read while a frame is under way.
///
/// `controls` are whole control frames that go between; `sent` is shown each payload once it is written.
pub async fn pump(
    mut guest: impl AsyncRead + Unpin,
    mut viewer: impl AsyncWrite + Unpin,
    mut controls: mpsc::Receiver<Bytes>,
    mut told: oneshot::Receiver<()>,
    mut sent: impl FnMut(&[u8]),
) -> End {
    let mut ping = interval_at(Instant::now() + PING, PING);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // A header is written right before its payload, so that both go with one call and without a copy.
    let mut buffer = vec![0; HEADER + CHUNK];
    let mut silent = true;
    loop {
        let written = tokio::select! {
            biased;
            _ = &mut told => return End::Told,
            _ = ping.tick() => write(&mut viewer, &PING_FRAME).await,
            Some(frame) = controls.recv() => write(&mut viewer, &frame).await,
            read = fill(&mut guest, &mut buffer[HEADER..]) => match read {
                Ok(0) | Err(_) => return if silent { End::Silent } else { End::Guest },
                Ok(count) => {
                    silent = false;
                    let begin = frame(&mut buffer, count);
                    let written = write(&mut viewer, &buffer[begin..HEADER + count]).await;
                    if written.is_ok() {
                        sent(&buffer[HEADER..HEADER + count]);
                    }
                    written
                }
            },
        };
        if let Err(end) = written {
            return end;
        }
    }
}

/// Reads once, and on as long as there is something without waiting: a frame costs more than its bytes. Zero is the end.
async fn fill(guest: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> io::Result<usize> {
    let mut buffer = ReadBuf::new(buffer);
    poll_fn(|cx| {
        loop {
            let before = buffer.filled().len();
            match Pin::new(&mut *guest).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) => {}
                // What has been read goes first; the next call hears the error again.
                Poll::Ready(Err(err)) if before == 0 => return Poll::Ready(Err(err)),
                Poll::Pending if before == 0 => return Poll::Pending,
                Poll::Ready(Err(_)) | Poll::Pending => return Poll::Ready(Ok(before)),
            }
            let now = buffer.filled().len();
            if now == before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(now));
            }
        }
    })
    .await
}

async fn write(viewer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), End> {
    match timeout(SLOW, viewer.write_all(bytes)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(End::Viewer),
        Err(_) => Err(End::Slow),
    }
}

/// Makes the `count` bytes after [`HEADER`] a binary frame (section 5.2); where it begins.
fn frame(buffer: &mut [u8], count: usize) -> usize {
    const FIN_BINARY: u8 = 0x82;
    let mut head = [0; HEADER];
    head[0] = FIN_BINARY;
    let long = (count as u64).to_be_bytes();
    let length = match count {
        0..126 => {
            head[1] = long[7];
            2
        }
        126..=0xffff => {
            head[1] = 126;
            head[2..4].copy_from_slice(&long[6..]);
            4
        }
        _ => {
            head[1] = 127;
            head[2..].copy_from_slice(&long);
            10
        }
    };
    buffer[HEADER - length..HEADER].copy_from_slice(&head[..length]);
    HEADER - length
}

/// The controller's part: gives `viewer` to the runner on the other end of `runner`, whose first bytes came with its reply.
///
/// # Errors
/// When the runner is gone, or says something else first.
pub async fn hand_over(
    runner: &mut UnixStream,
    first: &[u8],
    viewer: BorrowedFd<'_>,
) -> io::Result<()> {
    let ready = match first {
        [] => runner.read_u8().await?,
        [byte] => *byte,
        [..] => 0,
    };
    if ready != READY {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the runner is not ready for a connection",
        ));
    }
    let send = || descriptor::send(&*runner, READY, viewer);
    runner.async_io(Interest::WRITABLE, send).await
}

async fn receive(controller: &UnixStream) -> io::Result<TcpStream> {
    let receive = || descriptor::receive(controller);
    let fd = controller.async_io(Interest::READABLE, receive).await?;
    let fd = fd.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the controller sent no connection",
        )
    })?;
    TcpStream::from_std(std::net::TcpStream::from(fd))
}

/// The controller's part: sends what the viewer said to the guest.
///
/// # Errors
/// When the runner is gone.
pub async fn send(runner: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    for chunk in bytes.chunks(usize::from(u16::MAX)) {
        record(runner, FOR_GUEST, chunk).await?;
    }
    Ok(())
}

/// The controller's part: has the control frame `bytes` written to the viewer between two frames.
///
/// # Errors
/// When the runner is gone.
pub async fn send_control(runner: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    record(runner, FOR_VIEWER, bytes).await
}

async fn record(runner: &mut (impl AsyncWrite + Unpin), kind: u8, bytes: &[u8]) -> io::Result<()> {
    let length = u16::try_from(bytes.len())
        .map_err(|err| io::Error::new(io::ErrorKind::InvalidInput, err))?
        .to_be_bytes();
    let record = [&[kind, length[0], length[1]], bytes].concat();
    runner.write_all(&record).await
}

/// The controller's part: follows what the runner says of its download until it ends. `None`: the runner is gone, perhaps
/// amid a frame.
pub async fn follow(mut runner: impl AsyncRead + Unpin, sent: impl Fn(u64)) -> Option<End> {
    loop {
        let mut record = [0; 9];
        runner.read_exact(&mut record).await.ok()?;
        let [kind, count @ ..] = record;
        sent(u64::from_be_bytes(count));
        if kind != COUNT {
            return End::from_wire(kind).ok();
        }
    }
}

/// The runner's part: takes the viewer's connection from `controller` and relays until one side ends, or `over` resolves.
/// `shown` is called when the first frame of the screen has gone to the viewer.
///
/// # Errors
/// When the controller goes away or breaks the protocol before the download begins.
pub async fn take_over(
    mut controller: UnixStream,
    guest: impl AsyncRead + AsyncWrite,
    over: impl Future<Output = ()>,
    shown: impl FnOnce(),
) -> io::Result<End> {
    controller.write_all(&[READY]).await?;
    let viewer = receive(&controller).await?;
    let (from_controller, mut to_controller) = controller.into_split();
    let (from_guest, mut to_guest) = tokio::io::split(guest);
    let (tell, told) = oneshot::channel();
    let (queue, controls) = mpsc::channel(CONTROLS);
    let sent = AtomicU64::new(0);
    let begun = Notify::new();
    let (start, last) = (Instant::now(), AtomicU64::new(0));
    let now = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut first = FirstFrame::new(|| begun.notify_one());
    let count = |payload: &[u8]| {
        sent.fetch_add(payload.len() as u64, Ordering::Relaxed);
        last.store(now(), Ordering::Relaxed);
        first.take(payload);
    };
    // A frame does not say how long it is before it has been decoded; the server is silent after it, for the viewer asks
    // for the next one.
    let showing = async {
        begun.notified().await;
        loop {
            let silent = Duration::from_millis(now().saturating_sub(last.load(Ordering::Relaxed)));
            match SILENCE.checked_sub(silent) {
                Some(rest) if !rest.is_zero() => tokio::time::sleep(rest).await,
                Some(_) | None => break,
            }
        }
        shown();
        std::future::pending::<()>().await;
    };
    let upload = async {
        tokio::select! {
            _ = take_records(from_controller, &mut to_guest, &queue) => {}
            () = over => {}
        }
        drop(tell);
        std::future::pending::<()>().await;
    };
    let counting = async {
        loop {
            tokio::time::sleep(REPORT).await;
            let bytes = sent.swap(0, Ordering::Relaxed);
            if bytes > 0 && report(&mut to_controller, COUNT, bytes).await.is_err() {
                // The upload hears that the controller is gone.
                std::future::pending::<()>().await;
            }
        }
    };
    let end = tokio::select! {
        end = pump(from_guest, viewer, controls, told, count) => end,
        () = upload => End::Told,
        () = counting => End::Told,
        () = showing => End::Told,
    };
    let rest = sent.load(Ordering::Relaxed);
    // A controller that is gone does not hear it, and nothing is left to do for it.
    drop(report(&mut to_controller, end as u8, rest).await);
    drop(to_guest.shutdown().await);
    Ok(end)
}

/// Waits for the first `FramebufferUpdate` in what an RFB server says (RFC 6143 section 7).
struct FirstFrame<F> {
    /// What the server has said so far; at most [`GREETING`].
    said: Vec<u8>,
    /// Told of its beginning. None: it was told, or what the server says is not understood.
    shown: Option<F>,
}

/// A server that says nothing for so long has said its frame.
const SILENCE: Duration = Duration::from_millis(60);
/// Before its first frame, a server says less.
const GREETING: usize = 8 << 10;

impl<F: FnOnce()> FirstFrame<F> {
    fn new(shown: F) -> Self {
        Self {
            said: Vec::new(),
            shown: Some(shown),
        }
    }

    fn take(&mut self, payload: &[u8]) {
        if self.shown.is_none() {
            return;
        }
        let room = GREETING.saturating_sub(self.said.len());
        self.said.extend(payload.iter().take(room));
        let full = (self.said.len() == GREETING).then_some(false);
        if let Some(begun) = first_frame(&self.said).or(full) {
            self.said = Vec::new();
            if let Some(shown) = self.shown.take().filter(|_| begun) {
                shown();
            }
        }
    }
}

/// Whether a frame with pixels has begun after version, security `None`, its result and `ServerInit`. `None`: not yet to be
/// told; `false`: it never will be.
fn first_frame(said: &[u8]) -> Option<bool> {
    const UPDATE: u8 = 0;
    const BELL: u8 = 2;
    const CUT_TEXT: u8 = 3;
    // Both in the community's wiki of the protocol (rfbproto): TigerVNC says them before its first frame.
    const END_OF_CONTINUOUS_UPDATES: u8 = 150;
    const FENCE: u8 = 248;
    let length = |at: usize| {
        let bytes: [u8; 4] = said.get(at..at + 4)?.try_into().ok()?;
        // Negative for an extended clipboard.
        usize::try_from(i32::from_be_bytes(bytes).unsigned_abs()).ok()
    };
    let types = usize::from(*said.get(12)?);
    let init = 13 + types + 4;
    let mut at = init.checked_add(24)?.checked_add(length(init + 20)?)?;
    loop {
        at = match *said.get(at)? {
            UPDATE => match without_pixels(said, at)? {
                Some(end) => end,
                None => return Some(true),
            },
            BELL | END_OF_CONTINUOUS_UPDATES => at + 1,
            CUT_TEXT => at.checked_add(8)?.checked_add(length(at + 4)?)?,
            FENCE => at + 9 + usize::from(*said.get(at + 8)?),
            _ => return Some(false),
        };
    }
}

/// Where the `FramebufferUpdate` at `at` ends, if all its rectangles are pseudo-encodings (RFC 6143 section 7.8 and the wiki of
/// rfbproto): the screen's size, a cursor, and the like. The outer `None`: not yet to be told.
#[expect(
    clippy::option_option,
    reason = "two different things may not be known"
)]
fn without_pixels(said: &[u8], at: usize) -> Option<Option<usize>> {
    const LAST_RECT: i32 = -224;
    let short = |at: usize| {
        let bytes: [u8; 2] = said.get(at..at + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_be_bytes(bytes)))
    };
    let long = |at: usize| {
        let bytes: [u8; 4] = said.get(at..at + 4)?.try_into().ok()?;
        Some(i32::from_be_bytes(bytes))
    };
    let rectangles = short(at + 2)?;
    let mut at = at + 4;
    for _ in 0..rectangles {
        let (width, height, encoding) = (short(at + 4)?, short(at + 6)?, long(at + 8)?);
        at += 12;
        at += match encoding {
            LAST_RECT => break,
            // Cursor: pixels of four bytes, and a mask of a bit each.
            -239 => width * height * 4 + width.div_ceil(8) * height,
            // DesktopSize; that the server understands extended key events and mouse buttons.
            -223 | -258 | -316 => 0,
            // LED state.
            -261 => 1,
            // DesktopName.
            -307 => 4 + usize::try_from(long(at)?).ok()?,
            // ExtendedDesktopSize: screens of 16 bytes.
            -308 => 4 + 16 * usize::from(*said.get(at)?),
            _ => return Some(None),
        };
    }
    Some(Some(at))
}

async fn report(
    controller: &mut (impl AsyncWrite + Unpin),
    kind: u8,
    bytes: u64,
) -> io::Result<()> {
    let mut record = [kind; 9];
    record[1..].copy_from_slice(&bytes.to_be_bytes());
    controller.write_all(&record).await
}

/// Until the controller says no more, or the guest takes no more.
async fn take_records(
    mut controller: impl AsyncRead + Unpin,
    guest: &mut (impl AsyncWrite + Unpin),
    controls: &mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let mut head = [0; 3];
        controller.read_exact(&mut head).await?;
        let [kind, length @ ..] = head;
        buffer.resize(usize::from(u16::from_be_bytes(length)), 0);
        controller.read_exact(&mut buffer).await?;
        if kind == FOR_GUEST {
            guest.write_all(&buffer).await?;
            guest.flush().await?;
        } else {
            drop(controls.try_send(Bytes::copy_from_slice(&buffer)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_first_frame_is_told_once_and_not_before_it_begins() {
        let mut said = b"RFB 003.008\n\x01\x01\0\0\0\0".to_vec();
        said.extend([0; 20]);
        said.extend(b"\0\0\0\x04vnc1");
        // A fence with two bytes of its own, a cut text, a bell, and the end of continuous updates.
        said.extend(b"\xf8\0\0\0\x80\0\0\0\x02ab\x03\0\0\0\0\0\0\x01x\x02\x96");
        let shown = Cell::new(0);
        let mut first = FirstFrame::new(|| shown.set(shown.get() + 1));
        for byte in &said {
            first.take(&[*byte]);
        }
        // An update that only says the size, with one screen, and a cursor of 2 by 2.
        let mut update = b"\0\0\0\x02".to_vec();
        update.extend(b"\0\0\0\0\x05\0\x03\0\xff\xff\xfe\xcc\x01\0\0\0");
        update.extend([0; 16]);
        update.extend(b"\0\0\0\0\0\x02\0\x02\xff\xff\xff\x11");
        update.extend([9; 18]);
        for byte in &update {
            first.take(&[*byte]);
        }
        assert_eq!(shown.get(), 0);
        // One with pixels: Tight.
        let frame = b"\0\0\0\x01\0\0\0\0\x05\0\x03\0\0\0\0\x07";
        for _ in 0..2 {
            first.take(frame);
        }
        assert_eq!(shown.get(), 1);

        let mut other = FirstFrame::new(|| shown.set(9));
        other.take(&said);
        other.take(&[77]);
        other.take(&[0; GREETING]);
        let mut endless = FirstFrame::new(|| shown.set(9));
        said.extend(b"\x03\0\0\0\x7f\xff\xff\xff");
        said.resize(GREETING - 1, 0);
        endless.take(&said);
        assert_eq!(endless.said.len(), GREETING - 1);
        endless.take(&[0; 2]);
        assert_eq!((shown.get(), endless.said.len()), (1, 0));
    }
}
