//! The bytes that are relayed: what a VNC server says (RFC 6143), as fast as it is taken.
//!
//! After the handshake come FramebufferUpdates with raw rectangles, from a ring that both ends compute: the viewer can
//! compare what arrives with what was sent. Pixels are pseudo-random, so nothing on the way could shrink them.
use anyhow::{Result, ensure};
use std::{
    io::{Read, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::{Duration, Instant},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Size of the screen.
const WIDTH: u16 = 1280;
const HEIGHT: u16 = 800;
/// Bytes a pixel takes.
const PIXEL: usize = 4;
/// The runner copies so much at a time.
const RUNNER_CHUNK: usize = 64 << 10;
/// Of a paced stream; its ring is a second of it.
const UPDATES_A_SECOND: u32 = 30;
/// An update where nobody does anything: a cursor that blinks.
const BLINK: usize = 1 << 10;
/// The ring of small updates has at least so many bytes.
const RING: usize = 8 << 20;
const NAME: &[u8] = b"pour";

/// Which updates come, and how they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Whole screens of 1280×800, written 64 KiB at a time, as the runner writes what it copies: a video.
    Bulk,
    /// Updates between 64 bytes and 64 KiB, each size class equally often and each update written by itself: somebody
    /// reads, scrolls and types.
    Updates,
    /// Thirty updates a second, of 2 to 40 KiB: what a browser's window really makes of a viewer's way.
    Paced,
    /// One small update a second: nobody does anything.
    Quiet,
}

impl Pattern {
    /// The patterns of the relay's bench, in the order in which they are measured.
    pub const ALL: [Self; 3] = [Self::Bulk, Self::Updates, Self::Paced];

    /// The name on the command line and in reports.
    pub const fn id(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Updates => "updates",
            Self::Paced => "paced",
            Self::Quiet => "quiet",
        }
    }

    /// How long after an update the next one comes; none: as soon as it is taken.
    fn pace(self) -> Option<Duration> {
        match self {
            Self::Bulk | Self::Updates => None,
            Self::Paced => Some(Duration::from_secs(1) / UPDATES_A_SECOND),
            Self::Quiet => Some(Duration::from_secs(1)),
        }
    }

    /// The pattern with this name.
    pub fn from_id(id: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pattern| pattern.id() == id)
    }
}

/// A stream's bytes after the handshake: `bytes` again and again, written as `cuts` say.
#[derive(Debug)]
pub struct Ring {
    pub bytes: Vec<u8>,
    /// Where each write ends, ascending; the last is the length of `bytes`.
    cuts: Vec<usize>,
    pace: Option<Duration>,
}

impl Ring {
    /// The ring of a pattern; always the same.
    pub fn new(pattern: Pattern) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut bytes = Vec::new();
        let mut cuts = Vec::new();
        match pattern {
            Pattern::Bulk => {
                for _ in 0..2 {
                    update(&mut bytes, WIDTH, HEIGHT, &mut random);
                }
                cuts.extend((RUNNER_CHUNK..bytes.len()).step_by(RUNNER_CHUNK));
                cuts.push(bytes.len());
            }
            Pattern::Updates => {
                while bytes.len() < RING {
                    // 2^6 to 2^16 bytes: the exponent is uniform, and so is the place between two powers.
                    let class = 64usize << (random.next() % 10);
                    let size = class + index(random.next()) % class;
                    line(&mut bytes, size, &mut random);
                    cuts.push(bytes.len());
                }
            }
            Pattern::Paced => {
                for _ in 0..UPDATES_A_SECOND {
                    let size = (2 << 10) + index(random.next()) % (38 << 10);
                    line(&mut bytes, size, &mut random);
                    cuts.push(bytes.len());
                }
            }
            Pattern::Quiet => {
                line(&mut bytes, BLINK, &mut random);
                cuts.push(bytes.len());
            }
        }
        Self {
            bytes,
            cuts,
            pace: pattern.pace(),
        }
    }

    /// Writes it round after round until the other end goes away.
    fn pour(&self, to: &mut impl Write) -> std::io::Result<()> {
        let mut next = Instant::now();
        loop {
            let mut begin = 0;
            for end in &self.cuts {
                if let Some(pace) = self.pace {
                    next += pace;
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                to.write_all(&self.bytes[begin..*end])?;
                begin = *end;
            }
        }
    }
}

/// An update of about so many bytes: one line.
fn line(bytes: &mut Vec<u8>, size: usize, random: &mut Random) {
    let pixels = (size.saturating_sub(20) / PIXEL).max(1);
    update(bytes, u16::try_from(pixels).unwrap_or(u16::MAX), 1, random);
}

fn index(value: u64) -> usize {
    usize::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// Marsaglia's xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A FramebufferUpdate with one raw rectangle (RFC 6143 sections 7.6.1 and 7.7.1).
fn update(bytes: &mut Vec<u8>, width: u16, height: u16, random: &mut Random) {
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 0]);
    bytes.extend(width.to_be_bytes());
    bytes.extend(height.to_be_bytes());
    bytes.extend([0; 4]);
    let end = bytes.len() + usize::from(width) * usize::from(height) * PIXEL;
    while bytes.len() < end {
        let word = random.next().to_le_bytes();
        bytes.extend(&word[..word.len().min(end - bytes.len())]);
    }
}

/// Shakes hands as a VNC server and pours; returns when the other end goes away. What the client says after the handshake
/// has to be read by somebody else, who begins when `begun` is called.
///
/// # Errors
/// When the client does not speak RFB 3.8.
pub fn serve(
    ring: &Ring,
    read: &mut impl Read,
    write: &mut impl Write,
    begun: impl FnOnce(),
) -> Result<()> {
    write.write_all(b"RFB 003.008\n")?;
    let mut version = [0; 12];
    read.read_exact(&mut version)?;
    ensure!(
        &version == b"RFB 003.008\n",
        "the client speaks another version"
    );
    write.write_all(&[1, 1])?;
    read.read_exact(&mut [0])?;
    write.write_all(&[0; 4])?;
    read.read_exact(&mut [0])?;
    write.write_all(&server_init())?;
    begun();
    // The other end goes away when it has seen enough.
    ring.pour(write).ok();
    Ok(())
}

/// The screen as a stream, for a runner that takes the viewer's connection over: what [`serve`] says, an update for each
/// read, and what is said to it is counted and forgotten.
#[derive(Debug)]
pub struct Screen {
    ring: Arc<Ring>,
    /// Words of the handshake that are still to be said, each after so many bytes of the client's.
    words: std::vec::IntoIter<(usize, Vec<u8>)>,
    next: Option<(usize, Vec<u8>)>,
    heard: usize,
    listener: Option<Waker>,
    begin: usize,
    cut: usize,
    pace: Option<tokio::time::Interval>,
    due: bool,
}

impl Screen {
    /// A screen before its handshake.
    pub fn new(ring: Arc<Ring>) -> Self {
        let mut words = vec![
            (0, b"RFB 003.008\n".to_vec()),
            (12, vec![1, 1]),
            (13, vec![0; 4]),
            (14, server_init()),
        ]
        .into_iter();
        let next = words.next();
        let pace = ring.pace.map(tokio::time::interval);
        Self {
            ring,
            words,
            next,
            heard: 0,
            listener: None,
            begin: 0,
            cut: 0,
            pace,
            due: false,
        }
    }
}

impl AsyncRead for Screen {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        if let Some((after, word)) = &mut this.next {
            if this.heard < *after {
                this.listener = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let now = word.len().min(buf.remaining());
            buf.put_slice(&word[..now]);
            word.drain(..now);
            if word.is_empty() {
                this.next = this.words.next();
            }
            return Poll::Ready(Ok(()));
        }
        if let Some(pace) = &mut this.pace
            && !this.due
        {
            ready!(pace.poll_tick(cx));
            this.due = true;
        }
        let end = this.ring.cuts[this.cut];
        let now = (end - this.begin).min(buf.remaining());
        buf.put_slice(&this.ring.bytes[this.begin..this.begin + now]);
        this.begin += now;
        if this.begin == end {
            this.due = false;
            this.cut += 1;
            if this.cut == this.ring.cuts.len() {
                (this.cut, this.begin) = (0, 0);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Screen {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.heard += bytes.len();
        if let Some(listener) = self.listener.take() {
            listener.wake();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// RFC 6143 section 7.3.2: 32 bits a pixel, little-endian, red 16, green 8, blue 0.
fn server_init() -> Vec<u8> {
    let mut init = Vec::new();
    init.extend(WIDTH.to_be_bytes());
    init.extend(HEIGHT.to_be_bytes());
    init.extend([32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]);
    init.extend([0, 0, 0, 4]);
    init.extend(NAME);
    init
}

/// The client's half of the handshake; afterwards the ring begins. `talk` writes to the server and then reads so many bytes.
///
/// # Errors
/// When the server's half is not what [`serve`] says.
pub fn shake_hands(mut talk: impl FnMut(&[u8], usize) -> Result<Vec<u8>>) -> Result<()> {
    ensure!(talk(b"", 12)? == b"RFB 003.008\n", "no RFB 3.8 server");
    ensure!(talk(b"RFB 003.008\n", 2)? == [1, 1], "security types");
    ensure!(talk(&[1], 4)? == [0; 4], "security result");
    ensure!(
        talk(&[1], server_init().len())? == server_init(),
        "ServerInit"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_ring_is_always_the_same_and_cut_into_all_of_it() {
        for pattern in Pattern::ALL {
            let (a, b) = (Ring::new(pattern), Ring::new(pattern));
            assert!(a.bytes == b.bytes && a.cuts == b.cuts);
            assert_eq!(a.cuts.last(), Some(&a.bytes.len()));
            assert!(a.cuts.is_sorted());
            assert_eq!(Pattern::from_id(pattern.id()), Some(pattern));
        }
        let updates = Ring::new(Pattern::Updates);
        let sizes = updates.cuts.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(sizes.clone().min().unwrap() < 128 && sizes.max().unwrap() > 32 << 10);
    }

    /// For hangs, not for slowness: a debug build beside VMs needed 20 s.
    const PATIENCE: Duration = Duration::from_secs(180);

    #[tokio::test]
    async fn the_client_that_the_tests_use_understands_it() {
        let (client, server) = UnixStream::pair().unwrap();
        let pouring = std::thread::spawn(move || {
            let ring = Ring::new(Pattern::Bulk);
            let mut rest = server.try_clone().unwrap();
            let begun = move || {
                drop(std::thread::spawn(move || {
                    std::io::copy(&mut rest, &mut std::io::sink())
                }));
            };
            serve(&ring, &mut server.try_clone().unwrap(), &mut &server, begun)
        });
        client.set_nonblocking(true).unwrap();
        let rfb = crate::rfb::Rfb::connect(tokio::net::UnixStream::from_std(client).unwrap())
            .await
            .unwrap();
        let seen = rfb
            .wait_for("a whole screen", PATIENCE, |frame| {
                (frame.pixel(WIDTH - 1, HEIGHT - 1) != [0; 3]).then(|| frame.size())
            })
            .await
            .unwrap();
        assert_eq!(seen, (WIDTH, HEIGHT));
        drop(rfb);
        // The same screen as a stream.
        let rfb = crate::rfb::Rfb::connect(Screen::new(Arc::new(Ring::new(Pattern::Bulk))))
            .await
            .unwrap();
        rfb.wait_for("a whole screen", PATIENCE, |frame| {
            (frame.pixel(WIDTH - 1, HEIGHT - 1) != [0; 3]).then_some(())
        })
        .await
        .unwrap();
        drop(rfb);
        // Off this thread: the client's connection ends only when the runtime runs.
        let ended = tokio::task::spawn_blocking(move || pouring.join().unwrap().unwrap());
        tokio::time::timeout(PATIENCE, ended)
            .await
            .unwrap()
            .unwrap();
    }
}
