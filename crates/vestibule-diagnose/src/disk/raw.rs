//! What `ext4-view` keeps to itself and this crate needs: the bytes of an inode, and which blocks a file lies in. The
//! journal and extended attributes are read with it, and the content of files and links, which `ext4-view` finds by nothing but a
//! walk from the root that verifies each directory on the way again. Layout: `Documentation/filesystems/ext4/` of the kernel.
use super::source::Window;
use crate::bytes::{le16, le32};
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const EXTENTS_FLAG: u32 = 0x8_0000;
const INLINE_DATA_FLAG: u32 = 0x1000_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
/// As in the kernel: no tree of extents is deeper.
const EXTENT_DEPTH: u16 = 5;
/// Runs of blocks of one file; a journal of 1 GiB has a few dozen, the worst directory some thousand.
const RUN_LIMIT: usize = 65_536;
/// Blocks of one directory that are searched.
const DIRECTORY_BLOCKS: u64 = 16_384;
/// Names of directories kept in memory, of all directories together: 8 MiB.
const NAMES_LIMIT: usize = 65_536;
/// Flags of an inode whose content is not what lies in its blocks: compressed, encrypted, in the inode.
const OTHERWISE_FLAGS: u32 = 0x4 | 0x800 | INLINE_DATA_FLAG;
/// A link's target of less than so many bytes lies in the inode.
const FAST_LINK: u64 = 60;
/// The inode of `/`.
const ROOT_INODE: u32 = 2;

/// Blocks of a file that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// First block within the file.
    pub logical: u64,
    /// First block on the disk.
    pub physical: u64,
    pub len: u64,
}

/// An inode, as it lies on the disk.
pub(crate) struct Inode(Vec<u8>);

impl Inode {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn flags(&self) -> u32 {
        le32(&self.0, 0x20).unwrap_or(0)
    }

    fn kind(&self) -> u16 {
        le16(&self.0, 0).unwrap_or(0) & 0xf000
    }

    fn is_dir(&self) -> bool {
        self.kind() == 0x4000
    }

    /// Where the file's blocks are, or the root of a tree that says so.
    fn map(&self) -> Option<&[u8]> {
        self.bytes().get(0x28..0x64)
    }

    /// Bytes of the file.
    pub(crate) fn size(&self) -> u64 {
        let high = le32(&self.0, 0x6c).unwrap_or(0);
        u64::from(le32(&self.0, 0x4).unwrap_or(0)) | (u64::from(high) << 32)
    }
}

/// Where inodes are, by the superblock.
pub(crate) struct Raw {
    window: Window,
    pub block_size: u64,
    pub blocks: u64,
    first_data_block: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_size: u64,
    descriptor_size: u64,
    /// What directories hold, by the directory's inode; `None` for one that cannot be read or is too large to keep.
    names: RefCell<HashMap<u32, Option<Rc<Names>>>>,
    kept: Cell<usize>,
}

/// Inodes by name.
type Names = HashMap<Box<[u8]>, u32>;

impl Raw {
    /// A reader of the file system that begins at the window's start; none where its geometry makes no sense, or where its
    /// group descriptors are spread over the disk (`meta_bg`).
    pub(crate) fn open(window: &Window) -> Option<Self> {
        let sb = window.bytes(1024, 1024)?;
        let incompat = le32(&sb, 0x60)?;
        if le16(&sb, 0x38)? != 0xef53 || incompat & INCOMPAT_META_BG != 0 {
            return None;
        }
        let wide = incompat & INCOMPAT_64BIT != 0;
        let high = if wide { le32(&sb, 0x150)? } else { 0 };
        // A file system of before 1997 has neither field.
        let inode_size = if le32(&sb, 0x4c)? == 0 {
            128
        } else {
            u64::from(le16(&sb, 0x58)?)
        };
        let raw = Self {
            block_size: 1024_u64
                .checked_shl(le32(&sb, 0x18)?)
                .filter(|n| *n <= 65_536)?,
            blocks: u64::from(le32(&sb, 0x4)?) | (u64::from(high) << 32),
            first_data_block: u64::from(le32(&sb, 0x14)?),
            inodes: le32(&sb, 0x0)?,
            inodes_per_group: le32(&sb, 0x28)?,
            inode_size,
            descriptor_size: if wide {
                u64::from(le16(&sb, 0xfe)?)
            } else {
                32
            },
            window: window.clone(),
            names: RefCell::default(),
            kept: Cell::new(0),
        };
        let sound = raw.block_size >= 1024
            && raw.inodes_per_group > 0
            && (128..=raw.block_size).contains(&raw.inode_size)
            && (32..=1024).contains(&raw.descriptor_size);
        sound.then_some(raw)
    }

    /// A block of the file system.
    pub(crate) fn block(&self, number: u64) -> Option<Vec<u8>> {
        if number == 0 || number >= self.blocks {
            return None;
        }
        self.window.bytes(
            number.checked_mul(self.block_size)?,
            usize::try_from(self.block_size).ok()?,
        )
    }

    /// The inode with this number.
    pub(crate) fn inode(&self, number: u32) -> Option<Inode> {
        let index = number.checked_sub(1).filter(|_| number <= self.inodes)?;
        let group = u64::from(index.checked_div(self.inodes_per_group)?);
        let within = u64::from(index.checked_rem(self.inodes_per_group)?);
        let table = self
            .first_data_block
            .checked_add(1)?
            .checked_mul(self.block_size)?;
        let at = table.checked_add(group.checked_mul(self.descriptor_size)?)?;
        let descriptor = self
            .window
            .bytes(at, usize::try_from(self.descriptor_size).ok()?)?;
        let high = if self.descriptor_size >= 64 {
            le32(&descriptor, 0x28)?
        } else {
            0
        };
        let first = u64::from(le32(&descriptor, 0x8)?) | (u64::from(high) << 32);
        let at = first
            .checked_mul(self.block_size)?
            .checked_add(within.checked_mul(self.inode_size)?)?;
        self.window
            .bytes(at, usize::try_from(self.inode_size).ok()?)
            .map(Inode)
    }

    /// The number of the inode at `path`, whose every component is what it says: no link is followed. None, too, in a directory
    /// that is too large to keep.
    pub(crate) fn find(&self, path: &str) -> Option<u32> {
        let mut number = ROOT_INODE;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            number = *self.names(number)?.get(part.as_bytes())?;
        }
        Some(number)
    }

    /// What the directory with this inode holds, read the first time.
    fn names(&self, number: u32) -> Option<Rc<Names>> {
        if let Some(known) = self.names.borrow().get(&number) {
            return known.clone();
        }
        let room = NAMES_LIMIT.saturating_sub(self.kept.get());
        let names = self.read_names(number, room).map(Rc::new);
        let more = names.as_ref().map_or(0, |names| names.len());
        self.kept.set(self.kept.get().saturating_add(more));
        self.names.borrow_mut().insert(number, names.clone());
        names
    }

    fn read_names(&self, number: u32, most: usize) -> Option<Names> {
        let directory = self.inode(number).filter(Inode::is_dir)?;
        let mut names = Names::new();
        let mut left = DIRECTORY_BLOCKS;
        for run in self.runs(&directory)? {
            for offset in 0..run.len {
                left = left.checked_sub(1)?;
                // An index, where there is one, looks like deleted entries to who reads block by block.
                for (name, inode) in entries(&self.block(run.physical.checked_add(offset)?)?) {
                    names.entry(name.into()).or_insert(inode);
                }
                if names.len() > most {
                    return None;
                }
            }
        }
        Some(names)
    }

    /// At most `len` bytes of a regular file from `offset` on. None where that is `ext4-view`'s to say: of a file whose extents do
    /// not all stand in its inode (it verifies the blocks that hold others), or whose content is not what lies in its blocks.
    pub(crate) fn read(&self, number: u32, offset: u64, len: usize) -> Option<Vec<u8>> {
        let inode = self.inode(number).filter(|inode| inode.kind() == 0x8000)?;
        self.content(&inode, offset, len)
    }

    /// The target of a symbolic link; none as for [`Raw::read`].
    pub(crate) fn link(&self, number: u32) -> Option<String> {
        let inode = self.inode(number).filter(|inode| inode.kind() == 0xa000)?;
        let size = inode.size();
        let target = if size < FAST_LINK && inode.flags() & (EXTENTS_FLAG | OTHERWISE_FLAGS) == 0 {
            inode.map()?.get(..usize::try_from(size).ok()?)?.to_vec()
        } else {
            self.content(&inode, 0, usize::try_from(self.block_size.min(size)).ok()?)?
        };
        String::from_utf8(target).ok()
    }

    fn content(&self, inode: &Inode, offset: u64, len: usize) -> Option<Vec<u8>> {
        let map = inode.map()?;
        let verified = inode.flags() & EXTENTS_FLAG != 0 && le16(map, 6) != Some(0);
        if inode.flags() & OTHERWISE_FLAGS != 0 || verified {
            return None;
        }
        let end = offset.saturating_add(len as u64).min(inode.size());
        // What no run holds reads as zeros.
        let mut out = vec![0; usize::try_from(end.saturating_sub(offset)).ok()?];
        for run in self.runs(inode)? {
            let (first, last) = (
                run.logical.checked_mul(self.block_size)?,
                run.logical
                    .checked_add(run.len)?
                    .checked_mul(self.block_size)?,
            );
            let (from, to) = (first.max(offset), last.min(end));
            if from >= to || run.physical == 0 {
                continue;
            }
            let within = usize::try_from(from.checked_sub(offset)?).ok()?;
            let until = usize::try_from(to.checked_sub(offset)?).ok()?;
            let at = run
                .physical
                .checked_mul(self.block_size)?
                .checked_add(from.checked_sub(first)?)?;
            self.window
                .read_exact(at, out.get_mut(within..until)?)
                .ok()?;
        }
        Some(out)
    }

    /// Where the blocks of a file are, in the file's order; holes are left out. None where that makes no sense.
    pub(crate) fn runs(&self, inode: &Inode) -> Option<Vec<Run>> {
        if inode.flags() & INLINE_DATA_FLAG != 0 {
            return None;
        }
        let map = inode.map()?;
        let mut runs = Vec::new();
        if inode.flags() & EXTENTS_FLAG != 0 {
            self.extents(map, EXTENT_DEPTH, &mut runs)?;
            return Some(runs);
        }
        let mut logical = 0_u64;
        let blocks = inode.size().div_ceil(self.block_size);
        for (at, depth) in (0..15).zip([0_u32; 12].into_iter().chain(1..4)) {
            let number = le32(map, usize::checked_mul(at, 4)?)?;
            self.pointers(number, depth, &mut logical, blocks, &mut runs)?;
        }
        Some(runs)
    }

    fn extents(&self, node: &[u8], most: u16, runs: &mut Vec<Run>) -> Option<()> {
        let depth = le16(node, 6)?;
        if le16(node, 0)? != EXTENT_MAGIC || depth > most {
            return None;
        }
        let entries = node
            .get(12..)?
            .chunks_exact(12)
            .take(usize::from(le16(node, 2)?));
        for entry in entries {
            if depth > 0 {
                let child = u64::from(le32(entry, 4)?) | (u64::from(le16(entry, 8)?) << 32);
                // One level less each time: no ring of nodes is followed for ever.
                self.extents(&self.block(child)?, depth.checked_sub(1)?, runs)?;
            } else {
                let len = u64::from(le16(entry, 4)?);
                let physical = u64::from(le32(entry, 8)?) | (u64::from(le16(entry, 6)?) << 32);
                // Longer ones are allocated and not written: they read as zeros.
                if len <= 32_768 {
                    push(
                        runs,
                        Run {
                            logical: u64::from(le32(entry, 0)?),
                            physical,
                            len,
                        },
                    )?;
                }
            }
        }
        Some(())
    }

    /// The blocks below a pointer of an inode without extents.
    fn pointers(
        &self,
        number: u32,
        depth: u32,
        logical: &mut u64,
        blocks: u64,
        runs: &mut Vec<Run>,
    ) -> Option<()> {
        let below = self.block_size.checked_div(4)?.checked_pow(depth)?;
        if *logical >= blocks || number == 0 {
            *logical = logical.checked_add(below)?;
            return Some(());
        }
        let Some(next) = depth.checked_sub(1) else {
            push(
                runs,
                Run {
                    logical: *logical,
                    physical: u64::from(number),
                    len: 1,
                },
            )?;
            *logical = logical.checked_add(1)?;
            return Some(());
        };
        for pointer in self.block(u64::from(number))?.chunks_exact(4) {
            self.pointers(le32(pointer, 0)?, next, logical, blocks, runs)?;
        }
        Some(())
    }
}

/// Adds a run, to the one before it where it continues that one.
fn push(runs: &mut Vec<Run>, run: Run) -> Option<()> {
    if let Some(last) = runs.last_mut()
        && last.logical.checked_add(last.len) == Some(run.logical)
        && last.physical.checked_add(last.len) == Some(run.physical)
    {
        last.len = last.len.checked_add(run.len)?;
        return Some(());
    }
    (runs.len() < RUN_LIMIT).then(|| runs.push(run))
}

/// The names in a block of a directory, and their inodes.
fn entries(block: &[u8]) -> impl Iterator<Item = (&[u8], u32)> {
    let mut rest = Some(block);
    std::iter::from_fn(move || {
        loop {
            let entry = rest?;
            let (inode, len) = (le32(entry, 0)?, le16(entry, 4)?);
            rest = entry.get(usize::from(len).max(8)..);
            let end = usize::from(*entry.get(6)?).checked_add(8)?;
            if let Some(name) = entry.get(8..end).filter(|_| inode != 0) {
                return Some((name, inode));
            }
        }
    })
}
