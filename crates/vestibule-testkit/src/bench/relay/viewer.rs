//! The near end of a relay: a WebSocket client (RFC 6455) that costs as little as one can, so that on few cores it is not
//! what is measured. It compares the first round of the ring byte for byte and then counts: what it counts it leaves to
//! the kernel to drop (`MSG_TRUNC`, tcp(7)), without a copy.
use super::stream::{self, Ring};
use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    time::Duration,
};

/// A relay that says nothing for so long has failed.
const SILENCE: Duration = Duration::from_secs(10);
/// Read at a time.
const CHUNK: usize = 1 << 20;
/// A response head has fewer bytes.
const HEAD: usize = 16 << 10;

/// An open WebSocket.
#[derive(Debug)]
pub(super) struct Viewer {
    tcp: TcpStream,
    /// Bytes of the current frame's payload that are still to come.
    rest: u64,
    /// Where the first round is read to, and a place for the kernel to name when it drops.
    buffer: Vec<u8>,
    frames: u64,
}

impl Viewer {
    /// Opens the WebSocket at `path` and shakes hands with the RFB server behind it.
    ///
    /// # Errors
    /// When either handshake fails.
    pub(super) fn open(address: SocketAddr, path: &str) -> Result<Self> {
        let mut tcp =
            TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        tcp.set_read_timeout(Some(SILENCE))?;
        tcp.set_nodelay(true)?;
        // The key need not be secret or random: it keeps caches from answering (section 10.3).
        write!(
            tcp,
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Protocol: binary\r\n\r\n"
        )?;
        let head = head(&mut tcp)?;
        ensure!(
            head.starts_with("HTTP/1.1 101 "),
            "no WebSocket: {}",
            head.lines().next().unwrap_or_default()
        );
        let mut viewer = Self {
            tcp,
            rest: 0,
            buffer: vec![0; CHUNK],
            frames: 0,
        };
        stream::shake_hands(|words, reply| viewer.talk(words, reply))
            .context("shake hands with the screen")?;
        Ok(viewer)
    }

    fn talk(&mut self, words: &[u8], reply: usize) -> Result<Vec<u8>> {
        if !words.is_empty() {
            let length = u8::try_from(words.len()).context("a word of the handshake is short")?;
            // Clients mask (section 5.3); with a key of zeros the payload stays as it is.
            let frame = [&[0x82, 0x80 | length, 0, 0, 0, 0], words].concat();
            self.tcp.write_all(&frame).context("send a frame")?;
        }
        let mut bytes = vec![0; reply];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Fills `bytes` with payload.
    fn read(&mut self, mut bytes: &mut [u8]) -> Result<()> {
        while !bytes.is_empty() {
            let now = self.available(bytes.len())?;
            let (head, after) = bytes.split_at_mut(now);
            self.tcp.read_exact(head).context("read a frame")?;
            self.rest -= now as u64;
            bytes = after;
        }
        Ok(())
    }

    /// Reads one round of the ring and compares it.
    ///
    /// # Errors
    /// When another byte arrived than was sent.
    pub(super) fn compare(&mut self, ring: &Ring) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        for (number, expected) in ring.bytes.chunks(CHUNK).enumerate() {
            let got = &mut buffer[..expected.len()];
            self.read(got)?;
            ensure!(
                got == expected,
                "byte {} and on are not what was sent",
                number * CHUNK
            );
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Drops what comes for so long; how many bytes of payload it was, and in how many frames.
    ///
    /// # Errors
    /// When nothing comes, or the relay closes.
    pub(super) fn count(&mut self, time: Duration) -> Result<(u64, u64)> {
        let begun = std::time::Instant::now();
        let (mut bytes, frames) = (0, self.frames);
        while begun.elapsed() < time {
            let now = self.available(CHUNK)?;
            let (_, dropped) = rustix::net::recv(
                &self.tcp,
                &mut self.buffer[..now],
                rustix::net::RecvFlags::TRUNC,
            )
            .context("drop a frame")?;
            ensure!(dropped > 0, "the relay ended");
            self.rest -= dropped as u64;
            bytes += dropped as u64;
        }
        Ok((bytes, self.frames - frames))
    }

    /// At most `limit` bytes of payload that can be read next; at least one.
    fn available(&mut self, limit: usize) -> Result<usize> {
        while self.rest == 0 {
            self.next_frame()?;
        }
        Ok(usize::try_from(self.rest).unwrap_or(usize::MAX).min(limit))
    }

    /// Reads a frame's header (section 5.2). A ping is dropped: nobody waits 20 s for our pong.
    fn next_frame(&mut self) -> Result<()> {
        let mut head = [0; 2];
        self.tcp
            .read_exact(&mut head)
            .context("read a frame's header")?;
        let length = match head[1] {
            126 => {
                let mut bytes = [0; 2];
                self.tcp.read_exact(&mut bytes)?;
                u64::from(u16::from_be_bytes(bytes))
            }
            127 => {
                let mut bytes = [0; 8];
                self.tcp.read_exact(&mut bytes)?;
                u64::from_be_bytes(bytes)
            }
            length @ 0..126 => u64::from(length),
            128.. => bail!("the relay masks its frames"),
        };
        match head[0] & 0x0f {
            0 | 2 => {
                self.rest = length;
                self.frames += 1;
            }
            9 | 10 => self
                .tcp
                .read_exact(&mut vec![0; usize::try_from(length)?])?,
            8 => bail!("the relay closed: {}", self.reason(length)?),
            other => bail!("a frame of type {other}"),
        }
        Ok(())
    }

    fn reason(&mut self, length: u64) -> Result<String> {
        let mut bytes = vec![0; usize::try_from(length.min(125))?];
        self.tcp.read_exact(&mut bytes)?;
        let (code, reason) = bytes.split_at(bytes.len().min(2));
        Ok(format!("{code:?} {}", String::from_utf8_lossy(reason)))
    }
}

/// Who takes a source's stream itself, without a relay.
#[derive(Debug)]
pub(super) struct Drain {
    unix: UnixStream,
    buffer: Vec<u8>,
}

impl Drain {
    /// Connects to the socket at `path` and shakes hands.
    ///
    /// # Errors
    /// When the handshake fails.
    pub(super) fn open(path: &Utf8Path) -> Result<Self> {
        let mut unix = UnixStream::connect(path).with_context(|| format!("connect to `{path}`"))?;
        unix.set_read_timeout(Some(SILENCE))?;
        stream::shake_hands(|words, reply| {
            unix.write_all(words)?;
            let mut bytes = vec![0; reply];
            unix.read_exact(&mut bytes)?;
            Ok(bytes)
        })?;
        Ok(Self {
            unix,
            buffer: vec![0; CHUNK],
        })
    }

    /// Reads for so long; how many bytes.
    ///
    /// # Errors
    /// When nothing comes.
    pub(super) fn count(&mut self, time: Duration) -> Result<u64> {
        let (begun, mut bytes) = (std::time::Instant::now(), 0);
        while begun.elapsed() < time {
            let read = self.unix.read(&mut self.buffer).context("read")?;
            ensure!(read > 0, "the source ended");
            bytes += read as u64;
        }
        Ok(bytes)
    }
}

/// The response's head, byte by byte: what follows it belongs to the frames.
fn head(tcp: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        tcp.read_exact(&mut byte).context("read the response")?;
        head.push(byte[0]);
        ensure!(head.len() < HEAD, "the response's head does not end");
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
