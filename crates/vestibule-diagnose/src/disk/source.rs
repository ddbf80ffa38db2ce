//! Where the bytes of a disk come from: anything that can be read at an offset.
use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    rc::Rc,
};

/// Bytes that can be read at an offset. Reads past the end are short, never an error.
pub trait ByteSource {
    /// Fills `buf` from `offset` on; returns how many bytes there were.
    ///
    /// # Errors
    /// What the medium says.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Bytes in the source.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl ByteSource for Vec<u8> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|o| self.get(o..))
            .unwrap_or_default();
        let n = rest.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
            to.copy_from_slice(from);
        }
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }
}

/// Any seekable reader, for instance an open file.
#[derive(Debug)]
pub struct SeekSource<R> {
    inner: RefCell<R>,
    len: u64,
}

impl<R: Read + Seek> SeekSource<R> {
    /// A source over `inner`, whose length is taken now.
    ///
    /// # Errors
    /// When the end cannot be sought.
    pub fn new(mut inner: R) -> io::Result<Self> {
        let len = inner.seek(SeekFrom::End(0))?;
        Ok(Self {
            inner: RefCell::new(inner),
            len,
        })
    }
}

impl SeekSource<File> {
    /// A source over an open file or block device.
    ///
    /// # Errors
    /// When its length cannot be found.
    pub fn file(file: File) -> io::Result<Self> {
        Self::new(file)
    }
}

impl<R: Read + Seek> ByteSource for SeekSource<R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut inner = self.inner.borrow_mut();
        inner.seek(SeekFrom::Start(offset))?;
        let mut done: usize = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|r| !r.is_empty()) {
            match inner.read(rest) {
                Ok(0) => break,
                Ok(n) => done = done.saturating_add(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn len(&self) -> u64 {
        self.len
    }
}

/// A part of a source: one partition.
#[derive(Clone)]
pub(crate) struct Window {
    pub source: Rc<dyn ByteSource>,
    pub start: u64,
    pub len: u64,
}

impl Window {
    /// Exactly `buf.len()` bytes, or an error.
    pub(crate) fn read_exact(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        let at = self.start.checked_add(offset);
        let (Some(_), Some(at)) = (end.filter(|e| *e <= self.len), at) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        if self.source.read_at(at, buf)? == buf.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// `len` bytes from `offset`, where they exist.
    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut buf = vec![0; len];
        self.read_exact(offset, &mut buf).ok()?;
        Some(buf)
    }
}

/// Bytes that are kept together: a block. With more, more is read than anybody asks for: 64 KiB were a third of a diagnosis.
const CHUNK: u64 = 4_096;
/// Chunks kept in memory: 16 MiB.
const CHUNKS: usize = 4096;

/// A window whose last chunks are kept: the same metadata is asked for again and again.
pub(crate) struct Cached {
    window: Window,
    kept: RefCell<Chunks>,
}

#[derive(Default)]
struct Chunks {
    by_number: HashMap<u64, Box<[u8]>>,
    oldest: VecDeque<u64>,
}

impl Cached {
    pub(crate) fn new(window: Window) -> Self {
        Self {
            window,
            kept: RefCell::default(),
        }
    }
}

impl ByteSource for Cached {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.window.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = buf.len().min(most);
        let Some(buf) = buf.get_mut(..wanted) else {
            return Ok(0);
        };
        if wanted as u64 >= CHUNK {
            self.window.read_exact(offset, buf)?;
            return Ok(wanted);
        }
        let mut kept = self.kept.borrow_mut();
        let mut done: usize = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let number = at.checked_div(CHUNK).unwrap_or(0);
            let within = usize::try_from(at.checked_rem(CHUNK).unwrap_or(0)).unwrap_or(0);
            let chunk = kept.chunk(&self.window, number)?;
            let part = chunk.get(within..).unwrap_or_default();
            let n = part.len().min(rest.len());
            let (Some(to), Some(part)) = (rest.get_mut(..n), part.get(..n).filter(|_| n > 0))
            else {
                break;
            };
            to.copy_from_slice(part);
            done = done.saturating_add(n);
        }
        Ok(done)
    }

    fn len(&self) -> u64 {
        self.window.len
    }
}

impl Chunks {
    fn chunk(&mut self, window: &Window, number: u64) -> io::Result<&[u8]> {
        if !self.by_number.contains_key(&number) {
            let start = number.saturating_mul(CHUNK);
            let len = window.len.saturating_sub(start).min(CHUNK);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            window.read_exact(start, &mut bytes)?;
            if self.oldest.len() >= CHUNKS
                && let Some(oldest) = self.oldest.pop_front()
            {
                self.by_number.remove(&oldest);
            }
            self.oldest.push_back(number);
            self.by_number.insert(number, bytes.into());
        }
        Ok(self
            .by_number
            .get(&number)
            .map(Box::as_ref)
            .unwrap_or_default())
    }
}
