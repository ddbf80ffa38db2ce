//! A log that a guest may fill as it likes: the beginning and the end are kept, the middle is dropped, and what was
//! dropped is said.
//!
//! Bytes go to plain files at once, so that they outlive a runner that is killed: `<name>` holds the beginning,
//! `<name>.1` and `<name>.2` take turns holding the end. Offsets are those of the whole output, kept or not.
use camino::{Utf8Path, Utf8PathBuf};
use rustix::pipe::{PipeFlags, pipe_with};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// How far a log has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written so far, dropped ones included.
    pub total: u64,
    /// Whether the writer has gone away.
    pub ended: bool,
}

/// A bounded log on disk; see the module.
#[derive(Debug)]
pub struct BoundedLog {
    state: Mutex<State>,
    progress: watch::Sender<Progress>,
}

#[derive(Debug)]
struct State {
    path: Utf8PathBuf,
    /// Bytes kept of the beginning, and at least so many of the end.
    keep: u64,
    head: Segment,
    /// The end: an older segment and the one being written.
    older: Option<Segment>,
    newer: Option<Segment>,
    /// Number of tail segments begun; its parity names the file.
    begun: u64,
    total: u64,
    /// Why bytes could not be kept, the first time.
    error: Option<String>,
}

#[derive(Debug)]
struct Segment {
    file: File,
    start: u64,
    len: u64,
}

impl Segment {
    fn create(path: &Utf8Path, start: u64) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        Ok(Self {
            file,
            start,
            len: 0,
        })
    }

    fn end(&self) -> u64 {
        self.start + self.len
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Bytes from `offset`, at most `max`; empty where this segment does not hold it.
    fn read(&self, offset: u64, max: usize) -> io::Result<Vec<u8>> {
        if offset < self.start || offset >= self.end() {
            return Ok(Vec::new());
        }
        let left = usize::try_from(self.end() - offset).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(max)];
        self.file.read_exact_at(&mut bytes, offset - self.start)?;
        Ok(bytes)
    }
}

impl BoundedLog {
    /// Creates the log's first file. The directory must exist.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create(path: &Utf8Path, keep: u64) -> io::Result<Arc<Self>> {
        let state = State {
            path: path.to_owned(),
            keep,
            head: Segment::create(path, 0)?,
            older: None,
            newer: None,
            begun: 0,
            total: 0,
            error: None,
        };
        Ok(Arc::new(Self {
            state: Mutex::new(state),
            progress: watch::Sender::new(Progress::default()),
        }))
    }

    /// Adds bytes at the end. A full disk drops them, and [`BoundedLog::render`] says so.
    pub fn append(&self, bytes: &[u8]) {
        let total = self.lock().append(bytes);
        self.progress.send_modify(|p| p.total = total);
    }

    /// Says that nothing will come any more.
    pub fn end(&self) {
        self.progress.send_modify(|p| p.ended = true);
    }

    /// How far the log is, and a way to wait for more.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Kept bytes from `offset` on, at most `max`, and the offset they begin at, which is later than `offset` where
    /// bytes were dropped. Empty at the end.
    ///
    /// # Errors
    /// When a file of the log cannot be read.
    pub fn read(&self, offset: u64, max: usize) -> io::Result<(u64, Vec<u8>)> {
        let state = self.lock();
        for segment in state.segments() {
            if segment.end() > offset && segment.len > 0 {
                let at = offset.max(segment.start);
                return Ok((at, segment.read(at, max)?));
            }
        }
        Ok((state.total, Vec::new()))
    }

    /// Where the last `bytes` begin, among those that are kept.
    pub fn tail_offset(&self, bytes: u64) -> u64 {
        self.lock().total.saturating_sub(bytes)
    }

    /// The whole log as kept, with a line where bytes are missing. At most three times `keep`.
    ///
    /// # Errors
    /// When a file of the log cannot be read.
    pub fn render(&self) -> io::Result<Vec<u8>> {
        let state = self.lock();
        let mut out = Vec::new();
        let mut at = 0;
        for segment in state.segments().filter(|s| s.len > 0) {
            if segment.start > at {
                out.extend_from_slice(dropped_line(segment.start - at).as_bytes());
            }
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            out.extend_from_slice(&segment.read(segment.start, len)?);
            at = segment.end();
        }
        if state.total > at {
            out.extend_from_slice(dropped_line(state.total - at).as_bytes());
        }
        if let Some(error) = &state.error {
            out.extend_from_slice(format!("\n[vestibule: {error}]\n").as_bytes());
        }
        Ok(out)
    }

    /// The last lines that are kept, of at most 16 KiB, as text without control characters.
    pub fn last_lines(&self) -> Vec<String> {
        const WINDOW: u64 = 16 << 10;
        let mut bytes = Vec::new();
        let mut at = self.tail_offset(WINDOW);
        while let Ok((start, more)) = self.read(at, 16 << 10) {
            if more.is_empty() {
                break;
            }
            at = start + more.len() as u64;
            bytes.extend_from_slice(&more);
        }
        String::from_utf8_lossy(&bytes)
            .lines()
            .map(printable)
            .filter(|line| !line.is_empty())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn segments(&self) -> impl Iterator<Item = &Segment> {
        [Some(&self.head), self.older.as_ref(), self.newer.as_ref()]
            .into_iter()
            .flatten()
    }

    fn append(&mut self, mut bytes: &[u8]) -> u64 {
        while !bytes.is_empty() {
            let taken = match self.append_some(bytes) {
                Ok(taken) => taken,
                Err(err) => {
                    self.error
                        .get_or_insert_with(|| format!("bytes could not be kept: {err}"));
                    // What was written of it is unknown; the next segment begins after it.
                    self.older = None;
                    self.newer = None;
                    bytes.len()
                }
            };
            self.total += taken as u64;
            bytes = &bytes[taken..];
        }
        self.total
    }

    /// Writes what fits into the segment whose turn it is.
    fn append_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fits = |room: u64| usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
        if self.head.end() == self.total && self.head.len < self.keep {
            let taken = fits(self.keep - self.head.len);
            self.head.append(&bytes[..taken])?;
            return Ok(taken);
        }
        if self
            .newer
            .as_ref()
            .is_none_or(|s| s.len >= self.keep.max(1))
        {
            let path = format!("{}.{}", self.path, 1 + self.begun % 2);
            self.older = self.newer.take();
            self.newer = Some(Segment::create(path.as_ref(), self.total)?);
            self.begun += 1;
        }
        let keep = self.keep.max(1);
        match &mut self.newer {
            Some(newer) => {
                let taken = fits(keep - newer.len);
                newer.append(&bytes[..taken])?;
                Ok(taken)
            }
            None => Ok(bytes.len()),
        }
    }
}

pub(crate) fn dropped_line(bytes: u64) -> String {
    format!("\n[vestibule: {bytes} bytes dropped here]\n")
}

/// One line as a person would read it: escape sequences and control characters removed, cut to 400 characters.
pub fn printable(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            // A CSI sequence ends with a byte from `@` to `~` (ECMA-48, 5.4).
            '\x1b' => {
                if chars.next() == Some('[') {
                    chars.by_ref().find(|c| ('@'..='~').contains(c));
                }
            }
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out.trim_end().chars().take(400).collect()
}

/// A pipe into `log`: what is written to the end that is returned arrives there, until it is closed.
///
/// # Errors
/// When there is no descriptor or thread to be had.
pub(crate) fn piped(name: &str, log: Arc<BoundedLog>) -> io::Result<OwnedFd> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
    pump(name, File::from(out), log)?;
    Ok(into)
}

/// A serial line's bytes come one by one. Taken one by one each would wake the reader and be a write to a file, on a processor that
/// the guest needs; so the reader rests for so long after it has taken what was there, and the pipe keeps what comes meanwhile.
const REST: Duration = Duration::from_millis(10);

/// Copies everything from `from` into `log` on a thread of its own, until end of file.
///
/// # Errors
/// When the thread cannot be started.
pub(crate) fn pump(name: &str, mut from: File, log: Arc<BoundedLog>) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(64 << 10)
        .spawn(move || {
            let mut buffer = vec![0; 8 << 10];
            loop {
                match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => {
                        log.append(&buffer[..n]);
                        if n < buffer.len() {
                            std::thread::sleep(REST);
                        }
                    }
                    Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            log.end();
        })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log(keep: u64) -> (camino_tempfile::Utf8TempDir, Arc<BoundedLog>) {
        let dir = camino_tempfile::tempdir().unwrap();
        let log = BoundedLog::create(&dir.path().join("serial.log"), keep).unwrap();
        (dir, log)
    }

    #[test]
    fn the_middle_is_dropped_and_said() {
        let (dir, log) = log(10);
        for n in 0..10 {
            log.append(format!("line {n:03}\n").as_bytes());
        }
        let text = String::from_utf8(log.render().unwrap()).unwrap();
        assert!(text.starts_with("line 000\nl\n[vestibule: "), "{text}");
        assert!(text.ends_with("line 009\n"), "{text}");
        let on_disk: u64 = dir
            .path()
            .read_dir_utf8()
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(on_disk <= 30, "{on_disk}");
    }

    #[test]
    fn lines_are_readable() {
        let (_dir, log) = log(1000);
        log.append(b"\x1b[0;32m  OK  \x1b[0m] Started\r\n\n[    1.0] Kernel panic\x07\n");
        assert_eq!(
            log.last_lines(),
            ["  OK  ] Started", "[    1.0] Kernel panic"]
        );
    }

    proptest! {
        #[test]
        fn what_is_kept_is_true(keep in 0u64..60, writes in prop::collection::vec(0usize..50, 0..40)) {
            let (_dir, log) = log(keep);
            let mut whole = Vec::new();
            for n in writes {
                let bytes: Vec<u8> = (0..n).map(|i| b'a' + u8::try_from((whole.len() + i) % 26).unwrap()).collect();
                log.append(&bytes);
                whole.extend(bytes);
            }
            let keep = usize::try_from(keep).unwrap();
            let mut at = 0;
            let mut seen = vec![false; whole.len()];
            loop {
                let (start, bytes) = log.read(at, 7).unwrap();
                if bytes.is_empty() { break; }
                let from = usize::try_from(start).unwrap();
                prop_assert_eq!(&whole[from..from + bytes.len()], &bytes[..]);
                seen[from..from + bytes.len()].fill(true);
                at = start + bytes.len() as u64;
            }
            prop_assert!(seen.iter().take(keep).all(|s| *s));
            prop_assert!(seen.iter().rev().take(keep).all(|s| *s));
        }
    }
}
