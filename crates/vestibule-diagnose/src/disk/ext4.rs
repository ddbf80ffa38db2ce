//! An ext4 image as a [`Tree`]: `ext4-view` over a byte source, raw or inside a partition table. A journal that was not
//! replayed is replayed in memory; the image is never written.
use super::{
    Entry, Kind, Meta, Superblock, Tree, Xattr,
    journal::{Replay, Replayed},
    partition::candidates,
    raw::Raw,
    source::{ByteSource, Cached, Window},
    xattr,
};
use crate::text::shorten;
use ext4_view::{DirEntry, Ext4, Ext4Error, Ext4Read, FileType, Metadata};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    error::Error,
    rc::Rc,
};

/// Descriptions of damage kept.
const DAMAGE_LIMIT: usize = 16;
/// Directory entries kept in memory, of all directories together: 20 MiB.
const KEPT_LIMIT: usize = 65_536;

/// Why a disk cannot be read as a guest's root.
#[derive(Debug, thiserror::Error)]
pub enum OpenDiskError {
    /// Neither the disk nor one of its partitions begins with an ext superblock.
    #[error("find an ext4 file system on the disk: no superblock at its start nor in a partition")]
    NoFileSystem,
    /// A superblock is there, but the file system cannot be read.
    #[error("read the ext4 file system at byte {start}")]
    Unreadable {
        start: u64,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

/// An ext4 file system.
pub struct Ext4Tree {
    fs: Ext4,
    superblock: Superblock,
    /// What `ext4-view` does not read; none where the geometry is one that only it knows.
    raw: Option<Raw>,
    /// What the directories that were asked about hold; `None` for one that is too large to keep. `ext4-view` begins
    /// every lookup at the root and verifies each block on the way again, which was half of a diagnosis.
    directories: RefCell<HashMap<String, Option<Rc<Directory>>>>,
    kept: Cell<usize>,
    damage: RefCell<Vec<String>>,
}

/// The entries of a directory by name.
#[derive(Default)]
struct Directory {
    entries: BTreeMap<String, DirEntry>,
    /// Whether a name that is not there does not exist: all of it was read, and every name is UTF-8.
    whole: bool,
}

impl std::fmt::Debug for Ext4Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ext4Tree")
            .field("superblock", &self.superblock)
            .finish_non_exhaustive()
    }
}

/// The file system as a mount would leave it: its journal replayed. `ext4-view` tries by itself where that fails.
fn replayed(window: Window, before: Superblock) -> (Window, Superblock, Vec<String>) {
    let laid_over = Raw::open(&window).and_then(|raw| {
        let replay = Replay::read(&raw, &window)?;
        let source = Replayed::new(window.clone(), &raw, replay)?;
        let damage = source.damage().to_vec();
        let window = Window {
            start: 0,
            len: window.len,
            source: Rc::new(source),
        };
        // What the superblock says may be in the journal, too.
        let mut superblock = Superblock::read(&window)?;
        superblock.needs_recovery = true;
        Some((window, superblock, damage))
    });
    laid_over.unwrap_or_else(|| {
        let damage = "replay the journal: it has no superblock that can be read".to_owned();
        (window, before, vec![damage])
    })
}

impl Ext4Tree {
    /// Opens the root file system on `source`: the source itself, or the first partition that looks like a root.
    ///
    /// # Errors
    /// When there is no ext4 file system, or none that can be read.
    pub fn open(source: impl ByteSource + 'static) -> Result<Self, OpenDiskError> {
        let source: Rc<dyn ByteSource> = Rc::new(source);
        let mut failure = OpenDiskError::NoFileSystem;
        let mut fallback = None;
        for window in candidates(&source) {
            let Some(superblock) = Superblock::read(&window) else {
                continue;
            };
            let start = window.start;
            let (window, superblock, damage) = if superblock.needs_recovery {
                replayed(window, superblock)
            } else {
                (window, superblock, Vec::new())
            };
            let window = Window {
                start: 0,
                len: window.len,
                source: Rc::new(Cached::new(window)),
            };
            let raw = Raw::open(&window);
            match Ext4::load(Box::new(Whole(window))) {
                Ok(fs) => {
                    let tree = Self {
                        fs,
                        superblock,
                        raw,
                        directories: RefCell::default(),
                        kept: Cell::new(0),
                        damage: RefCell::new(damage),
                    };
                    if tree.looks_like_root() {
                        return Ok(tree);
                    }
                    fallback.get_or_insert(tree);
                }
                Err(e) => {
                    failure = OpenDiskError::Unreadable {
                        start,
                        source: Box::new(e),
                    }
                }
            }
        }
        fallback.ok_or(failure)
    }

    fn looks_like_root(&self) -> bool {
        ["/etc", "/usr"].iter().all(|p| self.lstat(p).is_some())
    }

    fn note(&self, what: &str, path: &str, error: &Ext4Error) {
        let absent = matches!(
            error,
            Ext4Error::NotFound
                | Ext4Error::NotADirectory
                | Ext4Error::IsADirectory
                | Ext4Error::NotASymlink
        );
        let mut damage = self.damage.borrow_mut();
        if !absent && damage.len() < DAMAGE_LIMIT {
            let text = format!("{what} {}: {error}", shorten(path, 120));
            if !damage.contains(&text) {
                damage.push(text);
            }
        }
    }

    fn try_read(&self, path: &str, offset: u64, len: usize) -> Result<Vec<u8>, Ext4Error> {
        let mut file = self.fs.open(path)?;
        let rest = file.metadata().len().saturating_sub(offset);
        file.seek_to(offset)?;
        let want = usize::try_from(rest).unwrap_or(usize::MAX).min(len);
        // The size may lie: grow with what is really there.
        let mut out = Vec::with_capacity(want.min(1 << 20));
        let mut buf = vec![0_u8; 65_536];
        while out.len() < want {
            let n = file.read_bytes(&mut buf)?;
            let Some(part) = buf
                .get(..n.min(want.saturating_sub(out.len())))
                .filter(|p| !p.is_empty())
            else {
                break;
            };
            out.extend_from_slice(part);
        }
        Ok(out)
    }

    /// Reads at most `limit` entries of the directory at `path`.
    fn read_directory(&self, path: &str, limit: usize) -> Result<Directory, Ext4Error> {
        let mut read = Directory {
            whole: true,
            ..Directory::default()
        };
        for entry in self.fs.read_dir(path)? {
            let entry = match entry {
                Ok(entry) if read.entries.len() < limit => entry,
                Ok(_) => {
                    read.whole = false;
                    break;
                }
                Err(e) => {
                    self.note("list", path, &e);
                    read.whole = false;
                    break;
                }
            };
            match entry.file_name().as_str().map(str::to_owned) {
                Ok(name) if name == "." || name == ".." => {}
                Ok(name) => {
                    read.entries.insert(name, entry);
                }
                Err(_) => read.whole = false,
            }
        }
        Ok(read)
    }

    /// The directory at `path`, read the first time; `None` where it is too large to keep.
    fn directory(&self, path: &str) -> Result<Option<Rc<Directory>>, Ext4Error> {
        if let Some(known) = self.directories.borrow().get(path) {
            return Ok(known.clone());
        }
        let kept = self.kept.get();
        // One more than there is room for tells that it is too large.
        let room = KEPT_LIMIT.saturating_sub(kept);
        let read = self.read_directory(path, room.saturating_add(1))?;
        let total = kept.saturating_add(read.entries.len());
        let read = (total <= KEPT_LIMIT).then(|| Rc::new(read));
        if read.is_some() {
            self.kept.set(total);
        }
        self.directories
            .borrow_mut()
            .insert(path.to_owned(), read.clone());
        Ok(read)
    }

    fn try_stat(&self, path: &str) -> Result<Metadata, Ext4Error> {
        if let Some((parent, name)) = path.rsplit_once('/').filter(|(_, name)| !name.is_empty())
            && let Ok(Some(parent)) = self.directory(if parent.is_empty() { "/" } else { parent })
        {
            if let Some(entry) = parent.entries.get(name) {
                return entry.metadata();
            }
            if parent.whole {
                return Err(Ext4Error::NotFound);
            }
        }
        self.fs.symlink_metadata(path)
    }

    fn try_list(&self, path: &str, limit: usize) -> Result<Vec<Entry>, Ext4Error> {
        let directory = match self.directory(path)? {
            Some(known) => known,
            None => Rc::new(self.read_directory(path, limit)?),
        };
        let mut entries = Vec::new();
        for (name, entry) in directory.entries.iter().take(limit) {
            match entry.metadata() {
                Ok(meta) => entries.push(Entry {
                    name: name.clone(),
                    meta: convert(&meta),
                }),
                Err(e) => self.note("read the inode of", path, &e),
            }
        }
        Ok(entries)
    }

    /// What the inode at `path` says by itself.
    fn raw<T>(&self, path: &str, ask: impl FnOnce(&Raw, u32) -> Option<T>) -> Option<T> {
        let raw = self.raw.as_ref()?;
        ask(raw, raw.find(path)?)
    }

    fn ok<T>(&self, what: &str, path: &str, result: Result<T, Ext4Error>) -> Option<T> {
        result.inspect_err(|e| self.note(what, path, e)).ok()
    }
}

impl Tree for Ext4Tree {
    fn lstat(&self, path: &str) -> Option<Meta> {
        let meta = self.ok("stat", path, self.try_stat(path));
        meta.as_ref().map(convert)
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let found = self.raw(path, |raw, inode| raw.read(inode, offset, len));
        found.or_else(|| self.ok("read", path, self.try_read(path, offset, len)))
    }

    fn link(&self, path: &str) -> Option<String> {
        if let Some(target) = self.raw(path, Raw::link) {
            return Some(target);
        }
        let target = self.ok("read link", path, self.fs.read_link(path))?;
        target.to_str().ok().map(str::to_owned)
    }

    fn list(&self, path: &str, limit: usize) -> Option<Vec<Entry>> {
        self.ok("list", path, self.try_list(path, limit))
    }

    fn xattrs(&self, path: &str) -> Vec<Xattr> {
        let read = self.raw(path, |raw, inode| Some(xattr::read(raw, inode)));
        let (found, wrong) = read.unwrap_or_default();
        let mut damage = self.damage.borrow_mut();
        if let Some(wrong) = wrong.filter(|_| damage.len() < DAMAGE_LIMIT) {
            damage.push(format!(
                "read the extended attributes of {}: {wrong}",
                shorten(path, 120)
            ));
        }
        found
    }

    fn damage(&self) -> Vec<String> {
        self.damage.borrow().clone()
    }

    fn superblock(&self) -> Option<&Superblock> {
        Some(&self.superblock)
    }
}

fn convert(meta: &Metadata) -> Meta {
    let kind = match meta.file_type() {
        FileType::Regular => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Symlink,
        FileType::BlockDevice | FileType::CharacterDevice | FileType::Fifo | FileType::Socket => {
            Kind::Special
        }
    };
    Meta {
        kind,
        mode: u32::from(meta.mode()),
        uid: meta.uid(),
        gid: meta.gid(),
        size: meta.len(),
    }
}

/// The whole of a window, for `ext4-view`.
struct Whole(Window);

impl Ext4Read for Whole {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0.read_exact(start_byte, dst)?)
    }
}
