//! What ext4's superblock says beyond the tree: errors, free space, last mount (`fs/ext4/ext4.h`, `struct ext4_super_block`).
use super::source::Window;
use crate::bytes::{le16, le32, le64};

const MAGIC: u16 = 0xef53;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_64BIT: u32 = 0x80;
/// Group descriptors summed for the free counts; more groups than this are 16 TiB.
const GROUP_LIMIT: u64 = 131_072;

/// The parts of the superblock that diagnosis uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Superblock {
    /// Bytes of a block.
    pub block_size: u64,
    pub blocks: u64,
    /// Free blocks, reserved ones included, by the group descriptors.
    pub free_blocks: u64,
    /// Blocks that only root may use.
    pub reserved_blocks: u64,
    pub inodes: u64,
    pub free_inodes: u64,
    /// `EXT4_VALID_FS` was cleared: mounted, or not unmounted.
    pub dirty: bool,
    /// `EXT4_ERROR_FS`: the kernel met an error.
    pub error_flag: bool,
    /// The journal holds transactions to replay.
    pub needs_recovery: bool,
    /// Errors since the last check.
    pub error_count: u32,
    /// The first of them.
    pub first_error: Option<Recorded>,
    /// The last of them.
    pub last_error: Option<Recorded>,
    /// Seconds since 1970 of the last mount; 0: never mounted.
    pub mounted_at: u64,
    /// Seconds since 1970 of the last check.
    pub checked_at: u64,
    /// Mounts since the last check.
    pub mount_count: u16,
    /// Where it was mounted last.
    pub last_mounted: String,
    /// File system UUID, lower case with dashes.
    pub uuid: String,
    pub label: String,
    /// `errors=` default: 1 continue, 2 remount read-only, 3 panic.
    pub on_error: u16,
}

/// An error that the kernel met and wrote into the superblock (`__ext4_error`, `save_error_info`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Seconds since 1970 by the clock of who met it; 0 where it had none.
    pub at: u64,
    /// Function of the kernel, and its line.
    pub function: String,
    pub line: u32,
    /// The inode it was about; 0: none.
    pub inode: u32,
    /// The block it was about; 0: none.
    pub block: u64,
    /// `EXT4_ERR_…`, which is not the number of `errno`; 0: not recorded, as before Linux 5.8.
    pub code: u8,
}

impl Recorded {
    /// Reads one, from the places of its time, that time's high byte, inode, block, function, line, and code.
    fn read(
        sb: &[u8],
        [at, at_high, inode, block, function, line, code]: [usize; 7],
    ) -> Option<Self> {
        let found = Self {
            at: time(sb, at, at_high)?,
            function: text(sb, function, 32),
            line: le32(sb, line)?,
            inode: le32(sb, inode)?,
            block: le64(sb, block)?,
            code: *sb.get(code)?,
        };
        (found != Self::default()).then_some(found)
    }

    /// What the kernel would have printed of it.
    pub fn text(&self) -> String {
        let mut words = Vec::new();
        if !self.function.is_empty() {
            words.push(format!("in {}:{}", self.function, self.line));
        }
        if self.code != 0 {
            words.push(code_name(self.code));
        }
        if self.inode != 0 {
            words.push(format!("inode {}", self.inode));
        }
        if self.block != 0 {
            words.push(format!("block {}", self.block));
        }
        if self.at != 0 {
            words.push(format!("at {} s since 1970", self.at));
        }
        words.join(", ")
    }
}

/// `EXT4_ERR_…` of `fs/ext4/ext4.h`.
fn code_name(code: u8) -> String {
    const NAMES: [&str; 16] = [
        "UNKNOWN",
        "EIO",
        "ENOMEM",
        "EFSBADCRC",
        "EFSCORRUPTED",
        "ENOSPC",
        "ENOKEY",
        "EROFS",
        "EFBIG",
        "EEXIST",
        "ERANGE",
        "EOVERFLOW",
        "EBUSY",
        "ENOTDIR",
        "ENOTEMPTY",
        "ESHUTDOWN",
    ];
    let name = usize::from(code)
        .checked_sub(1)
        .and_then(|at| NAMES.get(at));
    name.map_or_else(|| format!("error {code}"), |name| (*name).to_owned())
}

impl Superblock {
    /// The superblock of an ext file system that begins at the window's start.
    pub(crate) fn read(window: &Window) -> Option<Self> {
        let sb = window.bytes(1024, 1024)?;
        if le16(&sb, 0x38)? != MAGIC {
            return None;
        }
        let incompat = le32(&sb, 0x60)?;
        let wide = incompat & INCOMPAT_64BIT != 0;
        let state = le16(&sb, 0x3a)?;
        let mut found = Self {
            block_size: 1024_u64.checked_shl(le32(&sb, 0x18)?.min(6))?,
            blocks: hi_lo(&sb, 0x4, wide.then_some(0x150))?,
            free_blocks: hi_lo(&sb, 0xc, wide.then_some(0x158))?,
            reserved_blocks: hi_lo(&sb, 0x8, wide.then_some(0x154))?,
            inodes: u64::from(le32(&sb, 0x0)?),
            free_inodes: u64::from(le32(&sb, 0x10)?),
            dirty: state & 1 == 0,
            error_flag: state & 2 != 0,
            needs_recovery: incompat & INCOMPAT_RECOVER != 0,
            error_count: le32(&sb, 0x194)?,
            first_error: Recorded::read(&sb, [0x198, 0x278, 0x19c, 0x1a0, 0x1a8, 0x1c8, 0x27a]),
            last_error: Recorded::read(&sb, [0x1cc, 0x279, 0x1d0, 0x1d8, 0x1e0, 0x1d4, 0x27b]),
            mounted_at: time(&sb, 0x2c, 0x275)?,
            checked_at: time(&sb, 0x40, 0x277)?,
            mount_count: le16(&sb, 0x34)?,
            last_mounted: text(&sb, 0x88, 64),
            uuid: uuid(sb.get(0x68..0x78)?),
            label: text(&sb, 0x78, 16),
            on_error: le16(&sb, 0x3c)?,
        };
        // A mounted file system writes the totals rarely; the descriptors are nearer to the truth.
        if let Some((blocks, inodes)) = group_totals(window, &sb, &found, wide) {
            found.free_blocks = blocks;
            found.free_inodes = inodes;
        }
        Some(found)
    }

    /// What it says of errors since the last check, in words; none where there were none.
    pub fn errors(&self) -> Option<String> {
        if self.error_count == 0 && !self.error_flag {
            return None;
        }
        let mut words = vec![format!("error_count={}", self.error_count)];
        if self.error_flag {
            words.push("state has the error flag".to_owned());
        }
        let named = [("first", &self.first_error), ("last", &self.last_error)];
        for (name, error) in named {
            words.extend(error.as_ref().map(|e| format!("{name} error {}", e.text())));
        }
        Some(words.join("; "))
    }

    /// Whether the last error came after the last mount: then that mount ended as [`Superblock::on_error`] says.
    pub fn failed_while_mounted(&self) -> bool {
        let last = self.last_error.as_ref().map_or(0, |e| e.at);
        self.error_count > 0 && self.mounted_at > 0 && last >= self.mounted_at
    }

    /// Free blocks that any user may take.
    pub fn free_for_users(&self) -> u64 {
        self.free_blocks.saturating_sub(self.reserved_blocks)
    }
}

fn group_totals(window: &Window, sb: &[u8], found: &Superblock, wide: bool) -> Option<(u64, u64)> {
    let per_group = u64::from(le32(sb, 0x20)?);
    let first = u64::from(le32(sb, 0x14)?);
    let groups = found.blocks.checked_sub(first)?.div_ceil(per_group.max(1));
    let size = if wide { u64::from(le16(sb, 0xfe)?) } else { 32 };
    // Bigalloc counts clusters and meta_bg spreads the table: leave the superblock's own totals.
    let cluster = le32(sb, 0x1c)? != le32(sb, 0x18)?;
    let meta_bg = le32(sb, 0x60)? & 0x10 != 0;
    if groups > GROUP_LIMIT || !(32..=1024).contains(&size) || cluster || meta_bg {
        return None;
    }
    let at = first.checked_add(1)?.checked_mul(found.block_size)?;
    let table = window.bytes(at, usize::try_from(groups.checked_mul(size)?).ok()?)?;
    let (mut blocks, mut inodes) = (0_u64, 0_u64);
    for group in table.chunks_exact(usize::try_from(size).ok()?) {
        let high = |at| {
            if size >= 64 {
                le16(group, at).unwrap_or(0)
            } else {
                0
            }
        };
        let count =
            |low, hi| u64::from(le16(group, low).unwrap_or(0)) | (u64::from(high(hi)) << 16);
        blocks = blocks.saturating_add(count(0xc, 0x2c));
        inodes = inodes.saturating_add(count(0xe, 0x2e));
    }
    (blocks <= found.blocks && inodes <= found.inodes).then_some((blocks, inodes))
}

fn hi_lo(sb: &[u8], low: usize, high: Option<usize>) -> Option<u64> {
    let high = high.map_or(Some(0), |at| le32(sb, at))?;
    Some(u64::from(le32(sb, low)?) | (u64::from(high) << 32))
}

/// A time of 40 bits, the highest 8 of them elsewhere.
fn time(sb: &[u8], low: usize, high: usize) -> Option<u64> {
    Some(u64::from(le32(sb, low)?) | (u64::from(*sb.get(high)?) << 32))
}

fn text(sb: &[u8], at: usize, len: usize) -> String {
    let raw = sb.get(at..at.saturating_add(len)).unwrap_or_default();
    let end = raw.iter().position(|b| *b == 0).unwrap_or(raw.len());
    let text = String::from_utf8_lossy(raw.get(..end).unwrap_or_default()).into_owned();
    text.chars().filter(|c| !c.is_control()).collect()
}

fn uuid(raw: &[u8]) -> String {
    le64(raw, 0).map(|_| ()).map_or_else(String::new, |()| {
        let hex: String = raw.iter().map(|b| format!("{b:02x}")).collect();
        let part = |a, b| hex.get(a..b).unwrap_or_default().to_owned();
        [
            part(0, 8),
            part(8, 12),
            part(12, 16),
            part(16, 20),
            part(20, 32),
        ]
        .join("-")
    })
}
