//! A guest's root file system, read without mounting it.
//!
//! [`Tree`] is the small set of questions that a backend answers about one path without following a final symbolic
//! link. [`Root`] adds what every reader of a guest's files needs: symbolic links resolved *inside* the guest, bounded
//! reads, and a cache, so that a thousand lookups cost a thousand hash probes.
pub mod dir;
pub mod ext4;
mod journal;
pub mod partition;
mod raw;
pub mod source;
pub mod superblock;
pub mod xattr;

use crate::text;
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

pub use superblock::Superblock;
pub use xattr::Xattr;

/// What a directory entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Dir,
    Symlink,
    /// A device, socket or FIFO.
    Special,
}

/// What is known of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    pub kind: Kind,
    /// Permission bits, `0o7777`.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes.
    pub size: u64,
}

/// One directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub meta: Meta,
}

/// A file system tree. Paths are absolute; the last component is never followed.
///
/// Answers are `None` where there is nothing, and also where the file system is damaged: the backend then remembers
/// what it met for [`Tree::damage`].
pub trait Tree {
    /// The inode behind `path`.
    fn lstat(&self, path: &str) -> Option<Meta>;
    /// At most `len` bytes of a regular file from `offset` on.
    fn read_at(&self, path: &str, offset: u64, len: usize) -> Option<Vec<u8>>;
    /// The target of a symbolic link.
    fn link(&self, path: &str) -> Option<String>;
    /// The entries of a directory, without `.` and `..`, at most `limit` of them.
    fn list(&self, path: &str, limit: usize) -> Option<Vec<Entry>>;
    /// The extended attributes of `path` itself, in no order; bounded. Empty where there are none.
    fn xattrs(&self, path: &str) -> Vec<Xattr>;
    /// Reads of the file system that failed, in words; bounded.
    fn damage(&self) -> Vec<String>;
    /// The superblock, where the tree is an ext4 file system.
    fn superblock(&self) -> Option<&Superblock> {
        None
    }
}

/// Configuration files longer than this are cut: nothing that PID 1 reads is longer.
const CONFIG_LIMIT: usize = 1 << 20;
/// Directory entries looked at in one directory.
const LIST_LIMIT: usize = 65_536;
/// As in the kernel: so many symbolic links on one path are a loop.
const LINK_LIMIT: u32 = 40;
/// No path of a Linux system call is longer.
const PATH_LIMIT: usize = 4096;
/// Files are read in blocks of so many bytes where less is asked for: one library is asked for a hundred times, and each
/// time the file system would be walked from its root.
const BLOCK: usize = 16_384;
/// Bytes of blocks kept; then they are forgotten.
const BLOCKS_LIMIT: usize = 8 << 20;
/// Files whose extended attributes are kept; then they are forgotten.
const XATTRS_LIMIT: usize = 16;
/// Lookups for one diagnosis. A tree made to be slow ends here rather than in minutes.
const LOOKUP_BUDGET: u32 = 400_000;

/// Where a path leads inside the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// The real path and its inode, which is never a symbolic link.
    Found(String, Meta),
    /// Nothing there; the first component that does not exist.
    Missing(String),
    /// Too many links, or a component that is not a directory.
    Broken(String),
}

/// A tree with symbolic links resolved inside it.
pub struct Root {
    tree: Box<dyn Tree>,
    metas: RefCell<HashMap<String, Option<Meta>>>,
    listings: RefCell<HashMap<String, Rc<Vec<Entry>>>>,
    links: RefCell<HashMap<String, Option<Rc<str>>>>,
    blocks: RefCell<Blocks>,
    xattrs: RefCell<HashMap<String, Rc<[Xattr]>>>,
    budget: Cell<u32>,
}

/// Blocks of files by path and number; `None` for one that could not be read.
#[derive(Default)]
struct Blocks {
    kept: HashMap<(String, u64), Option<Rc<[u8]>>>,
    bytes: usize,
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").finish_non_exhaustive()
    }
}

impl Root {
    /// A guest's root over `tree`.
    pub fn new(tree: impl Tree + 'static) -> Self {
        Self {
            tree: Box::new(tree),
            metas: RefCell::default(),
            listings: RefCell::default(),
            links: RefCell::default(),
            blocks: RefCell::default(),
            xattrs: RefCell::default(),
            budget: Cell::new(LOOKUP_BUDGET),
        }
    }

    /// The superblock, where the root is an ext4 file system.
    pub fn superblock(&self) -> Option<&Superblock> {
        self.tree.superblock()
    }

    /// What could not be read so far.
    pub fn damage(&self) -> Vec<String> {
        self.tree.damage()
    }

    fn spend(&self) -> bool {
        let left = self.budget.get();
        self.budget.set(left.saturating_sub(1));
        left > 0
    }

    /// The inode at an already resolved parent; the last component is not followed.
    pub fn lstat_real(&self, path: &str) -> Option<Meta> {
        if let Some(known) = self.metas.borrow().get(path) {
            return *known;
        }
        if !self.spend() {
            return None;
        }
        let meta = self.tree.lstat(path);
        self.metas.borrow_mut().insert(path.to_owned(), meta);
        meta
    }

    /// Follows every symbolic link of `path`, as the guest's kernel would with this root.
    pub fn resolve(&self, path: &str) -> Resolved {
        self.walk(path, true)
    }

    /// As [`Root::resolve`], but the last component is not followed.
    pub fn resolve_parent(&self, path: &str) -> Option<(String, Meta)> {
        match self.walk(path, false) {
            Resolved::Found(real, meta) => Some((real, meta)),
            Resolved::Missing(_) | Resolved::Broken(_) => None,
        }
    }

    fn walk(&self, path: &str, follow_last: bool) -> Resolved {
        if path.len() > PATH_LIMIT {
            return Resolved::Broken(text::shorten(path, 80));
        }
        let mut todo: Vec<String> = split_reversed(path);
        let mut real = String::new();
        let mut links: u32 = 0;
        let root = Meta {
            kind: Kind::Dir,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
        };
        let mut meta = root;
        while let Some(part) = todo.pop() {
            if part == ".." {
                let cut = real.rfind('/').unwrap_or(0);
                real.truncate(cut);
                meta = if real.is_empty() {
                    root
                } else {
                    self.lstat_real(&real).unwrap_or(root)
                };
                continue;
            }
            if meta.kind != Kind::Dir {
                return Resolved::Broken(real);
            }
            let next = format!("{real}/{part}");
            if next.len() > PATH_LIMIT {
                return Resolved::Broken(text::shorten(&next, 80));
            }
            let Some(found) = self.lstat_real(&next) else {
                return Resolved::Missing(next);
            };
            if found.kind == Kind::Symlink && (follow_last || !todo.is_empty()) {
                links = links.saturating_add(1);
                let Some(target) = self.link_real(&next).filter(|_| links <= LINK_LIMIT) else {
                    return Resolved::Broken(next);
                };
                if target.starts_with('/') {
                    real.clear();
                    meta = root;
                }
                todo.extend(split_reversed(&target));
                continue;
            }
            real = next;
            meta = found;
        }
        Resolved::Found(
            if real.is_empty() {
                "/".to_owned()
            } else {
                real
            },
            meta,
        )
    }

    /// The inode that `path` leads to.
    pub fn stat(&self, path: &str) -> Option<Meta> {
        match self.resolve(path) {
            Resolved::Found(_, meta) => Some(meta),
            Resolved::Missing(_) | Resolved::Broken(_) => None,
        }
    }

    /// Whether `path` leads to something.
    pub fn exists(&self, path: &str) -> bool {
        self.stat(path).is_some()
    }

    /// Whether `path` leads to a directory.
    pub fn is_dir(&self, path: &str) -> bool {
        self.stat(path).is_some_and(|m| m.kind == Kind::Dir)
    }

    /// The target of the symbolic link at `path` itself.
    pub fn link(&self, path: &str) -> Option<String> {
        let (real, meta) = self.resolve_parent(path)?;
        let target = (meta.kind == Kind::Symlink).then(|| self.link_real(&real))?;
        target.map(|target| target.to_string())
    }

    /// The target of the symbolic link at an already resolved path.
    fn link_real(&self, path: &str) -> Option<Rc<str>> {
        if let Some(known) = self.links.borrow().get(path) {
            return known.clone();
        }
        let target: Option<Rc<str>> = self.tree.link(path).map(Into::into);
        self.links
            .borrow_mut()
            .insert(path.to_owned(), target.clone());
        target
    }

    /// The content of a regular file, cut at 1 MiB.
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.read_at(path, 0, CONFIG_LIMIT)
    }

    /// At most `len` bytes of a regular file from `offset` on.
    pub fn read_at(&self, path: &str, offset: u64, len: usize) -> Option<Vec<u8>> {
        let Resolved::Found(real, meta) = self.resolve(path) else {
            return None;
        };
        if meta.kind != Kind::File {
            return None;
        }
        let rest = meta.size.saturating_sub(offset);
        let want = usize::try_from(rest).unwrap_or(usize::MAX).min(len);
        if want > BLOCK {
            return self
                .spend()
                .then(|| self.tree.read_at(&real, offset, len))?;
        }
        let mut found = Vec::with_capacity(want);
        while found.len() < want {
            let at = offset.saturating_add(found.len() as u64);
            let number = at.checked_div(BLOCK as u64)?;
            let skip = usize::try_from(at.checked_rem(BLOCK as u64)?).ok()?;
            let block = self.block(&real, number)?;
            let left = want.saturating_sub(found.len());
            let part = block.get(skip..).unwrap_or_default();
            if part.is_empty() {
                break; // the file is shorter than its inode says
            }
            found.extend_from_slice(part.get(..left).unwrap_or(part));
        }
        Some(found)
    }

    /// A block of the file at an already resolved path; the last one is shorter.
    fn block(&self, path: &str, number: u64) -> Option<Rc<[u8]>> {
        let key = (path.to_owned(), number);
        if let Some(known) = self.blocks.borrow().kept.get(&key) {
            return known.clone();
        }
        if !self.spend() {
            return None;
        }
        let start = number.saturating_mul(BLOCK as u64);
        let read: Option<Rc<[u8]>> = self.tree.read_at(path, start, BLOCK).map(Into::into);
        let mut blocks = self.blocks.borrow_mut();
        if blocks.bytes > BLOCKS_LIMIT {
            *blocks = Blocks::default();
        }
        blocks.bytes = blocks.bytes.saturating_add(BLOCK);
        blocks.kept.insert(key, read.clone());
        read
    }

    /// The extended attributes of what `path` leads to.
    pub fn xattrs(&self, path: &str) -> Rc<[Xattr]> {
        let Resolved::Found(real, _) = self.resolve(path) else {
            return Rc::default();
        };
        if let Some(known) = self.xattrs.borrow().get(&real) {
            return Rc::clone(known);
        }
        if !self.spend() {
            return Rc::default();
        }
        let read: Rc<[Xattr]> = self.tree.xattrs(&real).into();
        let mut kept = self.xattrs.borrow_mut();
        if kept.len() >= XATTRS_LIMIT {
            kept.clear();
        }
        kept.insert(real, Rc::clone(&read));
        read
    }

    /// The value of one extended attribute of what `path` leads to.
    pub fn xattr(&self, path: &str, name: &str) -> Option<Vec<u8>> {
        let all = self.xattrs(path);
        all.iter().find(|a| a.name == name).map(|a| a.value.clone())
    }

    /// A text file; bytes that are not UTF-8 are replaced.
    pub fn read_text(&self, path: &str) -> Option<String> {
        self.read(path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The text of a program with a `#!` line; nothing more than that is read of another.
    pub fn read_script(&self, path: &str) -> Option<String> {
        self.read_at(path, 0, 2).filter(|head| head == b"#!")?;
        self.read_text(path)
    }

    /// The entries of the directory that `path` leads to, sorted by name; empty where there is none.
    pub fn list(&self, path: &str) -> Rc<Vec<Entry>> {
        let Resolved::Found(
            real,
            Meta {
                kind: Kind::Dir, ..
            },
        ) = self.resolve(path)
        else {
            return Rc::default();
        };
        if let Some(known) = self.listings.borrow().get(&real) {
            return Rc::clone(known);
        }
        if !self.spend() {
            return Rc::default();
        }
        let mut entries = self.tree.list(&real, LIST_LIMIT).unwrap_or_default();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let base = if real == "/" { "" } else { real.as_str() };
        let mut metas = self.metas.borrow_mut();
        for entry in &entries {
            metas.insert(format!("{base}/{}", entry.name), Some(entry.meta));
        }
        drop(metas);
        let entries = Rc::new(entries);
        self.listings.borrow_mut().insert(real, Rc::clone(&entries));
        entries
    }
}

fn split_reversed(path: &str) -> Vec<String> {
    path.split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .rev()
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_resolved_inside_the_root() {
        let dir = std::env::temp_dir().join(format!("vestibule-root-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("usr/bin")).unwrap();
        std::fs::write(dir.join("usr/bin/tool"), b"x").unwrap();
        let _ = std::os::unix::fs::symlink("usr/bin", dir.join("bin"));
        let _ = std::os::unix::fs::symlink("/bin/../bin/tool", dir.join("abs"));
        let _ = std::os::unix::fs::symlink("../../../../usr", dir.join("up"));
        let _ = std::os::unix::fs::symlink("loop", dir.join("loop"));
        let root = Root::new(dir::DirTree::new(&dir));
        assert!(matches!(root.resolve("/abs"), Resolved::Found(p, _) if p == "/usr/bin/tool"));
        assert!(
            matches!(root.resolve("/up/bin/tool"), Resolved::Found(p, _) if p == "/usr/bin/tool")
        );
        assert_eq!(root.resolve("/loop"), Resolved::Broken("/loop".into()));
        assert_eq!(
            root.resolve("/bin/none/x"),
            Resolved::Missing("/usr/bin/none".into())
        );
        assert_eq!(
            root.resolve("/abs/x"),
            Resolved::Broken("/usr/bin/tool".into())
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
