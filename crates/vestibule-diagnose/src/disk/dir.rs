//! A directory of this machine as a guest's root: a tree before it is packed, or a test's fixture.
use super::{Entry, Kind, Meta, Tree, Xattr};
use rustix::fs::{lgetxattr, llistxattr};
use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::PathBuf,
};

/// No list of names and no value is longer (`xattr(7)`).
const NAMES_LIMIT: usize = 65_536;

/// A directory. Symbolic links are read, never followed by this machine's kernel, because every path that
/// [`super::Root`] asks for is already resolved up to its last component.
#[derive(Debug)]
pub struct DirTree {
    base: PathBuf,
}

impl DirTree {
    /// The tree under `base`.
    pub fn new(base: impl Into<PathBuf>) -> Self {
        Self { base: base.into() }
    }

    fn host(&self, path: &str) -> PathBuf {
        self.base.join(path.trim_start_matches('/'))
    }
}

fn convert(meta: &fs::Metadata) -> Meta {
    let file_type = meta.file_type();
    let kind = if file_type.is_symlink() {
        Kind::Symlink
    } else if file_type.is_dir() {
        Kind::Dir
    } else if file_type.is_char_device() || file_type.is_block_device() || !file_type.is_file() {
        Kind::Special
    } else {
        Kind::File
    };
    Meta {
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        size: meta.len(),
    }
}

impl Tree for DirTree {
    fn lstat(&self, path: &str) -> Option<Meta> {
        fs::symlink_metadata(self.host(path))
            .ok()
            .as_ref()
            .map(convert)
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut file = fs::File::open(self.host(path)).ok()?;
        file.seek(SeekFrom::Start(offset)).ok()?;
        let mut out = Vec::new();
        file.take(len as u64).read_to_end(&mut out).ok()?;
        Some(out)
    }

    fn link(&self, path: &str) -> Option<String> {
        fs::read_link(self.host(path))
            .ok()?
            .into_os_string()
            .into_string()
            .ok()
    }

    fn list(&self, path: &str, limit: usize) -> Option<Vec<Entry>> {
        let entries = fs::read_dir(self.host(path))
            .ok()?
            .filter_map(Result::ok)
            .filter_map(|e| {
                let name = e.file_name().into_string().ok()?;
                Some(Entry {
                    name,
                    meta: convert(&e.metadata().ok()?),
                })
            });
        Some(entries.take(limit).collect())
    }

    fn xattrs(&self, path: &str) -> Vec<Xattr> {
        let host = self.host(path);
        let mut names = vec![0_u8; NAMES_LIMIT];
        let used = llistxattr(&host, &mut names).unwrap_or(0);
        let read = |name: &[u8]| {
            let name = std::str::from_utf8(name).ok().filter(|n| !n.is_empty())?;
            let mut value = vec![0_u8; NAMES_LIMIT];
            let len = lgetxattr(&host, name, &mut value).ok()?;
            value.truncate(len);
            Some(Xattr {
                name: name.to_owned(),
                value,
            })
        };
        names
            .get(..used)
            .unwrap_or_default()
            .split(|b| *b == 0)
            .filter_map(read)
            .collect()
    }

    fn damage(&self) -> Vec<String> {
        Vec::new()
    }
}
