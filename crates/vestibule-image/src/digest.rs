//! SHA-256 in lower-case hex: of bytes, of files, of what flows through a reader.
use camino::Utf8Path;
use sha2::Digest as _;
use std::io::Read;

/// The digest of `bytes`.
pub(crate) fn of(bytes: &[u8]) -> String {
    hex(sha2::Sha256::digest(bytes).as_ref())
}

/// The digest of a file, holes read as zeros.
pub(crate) fn of_file(path: &Utf8Path) -> std::io::Result<String> {
    let mut reader = Reader::new(std::fs::File::open(path)?);
    let mut buffer = vec![0; 1 << 20];
    while reader.read(&mut buffer)? != 0 {}
    Ok(reader.finish())
}

/// The digest of a list of texts, such that no two lists have the same one.
pub(crate) fn of_list<T: AsRef<str>>(parts: impl IntoIterator<Item = T>) -> String {
    let mut hash = sha2::Sha256::new();
    for part in parts {
        let part = part.as_ref().as_bytes();
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(hash.finalize().as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Passes a reader's bytes on and digests them.
pub(crate) struct Reader<R> {
    inner: R,
    hash: sha2::Sha256,
}

impl<R: Read> Reader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            hash: sha2::Sha256::new(),
        }
    }

    /// The digest of what was read.
    pub(crate) fn finish(self) -> String {
        hex(self.hash.finalize().as_ref())
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}
