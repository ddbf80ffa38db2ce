//! Where the bytes of a disk come from: anything that can be read at an offset.
use std::{
    cell::RefCell,
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
