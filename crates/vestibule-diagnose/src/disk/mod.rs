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
/// Names kept of those that were looked up; then they are forgotten.
const DENTRIES_LIMIT: usize = 65_536;
/// No path of a Linux system call is longer.
const PATH_LIMIT: usize = 4096;
/// Files are read in blocks of so many bytes where less is asked for: one library is asked for a hundred times, and each
/// time the file system would be walked from its root.
const BLOCK: usize = 4096;
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
    dentries: RefCell<Dentries>,
    listings: RefCell<HashMap<String, Rc<Vec<Entry>>>>,
    links: RefCell<HashMap<String, Option<Rc<str>>>>,
    blocks: RefCell<Blocks>,
    xattrs: RefCell<HashMap<String, Rc<[Xattr]>>>,
    budget: Cell<u32>,
}

/// What was found under the names that were looked up, directory by directory, as a kernel keeps it; also that there is nothing.
struct Dentries {
    directories: Vec<Directory>,
    names: usize,
}

/// One directory of [`Dentries`]; [`TOP`] is its own parent.
struct Directory {
    meta: Meta,
    parent: usize,
    children: HashMap<Box<str>, Option<Child>>,
}

#[derive(Clone, Copy)]
struct Child {
    meta: Meta,
    /// Which of [`Dentries::directories`], where it is one.
    directory: Option<usize>,
}

/// The root directory in [`Dentries`].
const TOP: usize = 0;

impl Default for Dentries {
    fn default() -> Self {
        Self {
            directories: vec![Directory {
                meta: ROOT_META,
                parent: TOP,
                children: HashMap::new(),
            }],
            names: 0,
        }
    }
}

impl Dentries {
    fn get(&self, directory: usize, name: &str) -> Option<Option<Child>> {
        let directory = self.directories.get(directory)?;
        directory.children.get(name).copied()
    }

    fn insert(&mut self, directory: usize, name: &str, meta: Option<Meta>) -> Option<Child> {
        let next = self.directories.len();
        let child = meta.map(|meta| Child {
            meta,
            directory: (meta.kind == Kind::Dir).then_some(next),
        });
        if let Some(meta) = meta.filter(|meta| meta.kind == Kind::Dir) {
            self.directories.push(Directory {
                meta,
                parent: directory,
                children: HashMap::new(),
            });
        }
        if let Some(directory) = self.directories.get_mut(directory) {
            directory.children.insert(name.into(), child);
            self.names = self.names.saturating_add(1);
        }
        child
    }

    /// The directory above one, and its inode.
    fn above(&self, directory: usize) -> (usize, Meta) {
        let parent = self.directories.get(directory).map_or(TOP, |d| d.parent);
        let meta = self.directories.get(parent).map_or(ROOT_META, |d| d.meta);
        (parent, meta)
    }
}

/// How far a path was followed.
struct Walk {
    /// The real path, empty for the root.
    real: String,
    meta: Meta,
    /// Which of [`Dentries::directories`], where `real` is one.
    directory: Option<usize>,
    links: u32,
}

impl Walk {
    fn restart(&mut self) {
        self.real.clear();
        self.meta = ROOT_META;
        self.directory = Some(TOP);
    }
}

const ROOT_META: Meta = Meta {
    kind: Kind::Dir,
    mode: 0o755,
    uid: 0,
    gid: 0,
    size: 0,
};

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
            dentries: RefCell::default(),
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
        self.resolve_parent(path).map(|(_, meta)| meta)
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
        let mut dentries = self.dentries.borrow_mut();
        if dentries.names > DENTRIES_LIMIT {
            *dentries = Dentries::default();
        }
        let mut walk = Walk {
            real: String::with_capacity(path.len()),
            meta: ROOT_META,
            directory: Some(TOP),
            links: 0,
        };
        if let Err(ended) = self.follow(&mut dentries, &mut walk, path, follow_last) {
            return ended;
        }
        if walk.real.is_empty() {
            walk.real.push('/');
        }
        Resolved::Found(walk.real, walk.meta)
    }

    /// Goes on from where `walk` is. Calls itself for each link, at most [`LINK_LIMIT`] times.
    fn follow(
        &self,
        dentries: &mut Dentries,
        walk: &mut Walk,
        path: &str,
        follow_last: bool,
    ) -> Result<(), Resolved> {
        let mut parts = path
            .split('/')
            .filter(|p| !p.is_empty() && *p != ".")
            .peekable();
        while let Some(part) = parts.next() {
            let Some(directory) = walk.directory else {
                return Err(Resolved::Broken(std::mem::take(&mut walk.real)));
            };
            let before = walk.real.len();
            if part == ".." {
                let cut = walk.real.rfind('/').unwrap_or(0);
                walk.real.truncate(cut);
                let (parent, meta) = dentries.above(directory);
                (walk.directory, walk.meta) = (Some(parent), meta);
                continue;
            }
            walk.real.push('/');
            walk.real.push_str(part);
            if walk.real.len() > PATH_LIMIT {
                return Err(Resolved::Broken(text::shorten(&walk.real, 80)));
            }
            let Some(found) = self.child(dentries, directory, part, &walk.real) else {
                return Err(Resolved::Missing(std::mem::take(&mut walk.real)));
            };
            if found.meta.kind == Kind::Symlink && (follow_last || parts.peek().is_some()) {
                walk.links = walk.links.saturating_add(1);
                let target = self.link_real(&walk.real);
                let Some(target) = target.filter(|_| walk.links <= LINK_LIMIT) else {
                    return Err(Resolved::Broken(std::mem::take(&mut walk.real)));
                };
                if target.starts_with('/') {
                    walk.restart();
                } else {
                    walk.real.truncate(before);
                }
                self.follow(dentries, walk, &target, true)?;
                continue;
            }
            walk.meta = found.meta;
            walk.directory = found.directory;
        }
        Ok(())
    }

    /// What `directory`, whose entry `name` has the real path `path`, holds under that name.
    fn child(
        &self,
        dentries: &mut Dentries,
        directory: usize,
        name: &str,
        path: &str,
    ) -> Option<Child> {
        if let Some(known) = dentries.get(directory, name) {
            return known;
        }
        if !self.spend() {
            return None;
        }
        dentries.insert(directory, name, self.tree.lstat(path))
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
        let bytes = self.read(path)?;
        let text = String::from_utf8(bytes);
        Some(text.unwrap_or_else(|err| String::from_utf8_lossy(err.as_bytes()).into_owned()))
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
        let entries = Rc::new(entries);
        self.listings.borrow_mut().insert(real, Rc::clone(&entries));
        entries
    }
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
        for through_a_file in ["/abs/x", "/abs/.."] {
            assert_eq!(
                root.resolve(through_a_file),
                Resolved::Broken("/usr/bin/tool".into())
            );
        }
        assert!(matches!(root.resolve("/bin/../../bin/.."), Resolved::Found(p, _) if p == "/usr"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
