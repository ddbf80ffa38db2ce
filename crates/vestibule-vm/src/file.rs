//! Whether a file is still the one that was looked at, without reading it again.
use serde::{Deserialize, Serialize};
use std::{fs::Metadata, os::unix::fs::MetadataExt as _};

/// A file that was replaced or changed has another one: its content cannot change without `ctime` (inode(7)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileIdentity {
    device: u64,
    inode: u64,
    pub(crate) bytes: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl From<Metadata> for FileIdentity {
    fn from(meta: Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}
