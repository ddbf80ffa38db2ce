//! The journal of ext3 and ext4 (`fs/jbd2`, `include/linux/jbd2.h`), replayed in memory: what a mount after a crash would
//! write to the disk first is laid over it. `ext4-view` replays one kind of journal only (64-bit, third checksums), without
//! wrapped logs, escaped blocks, and blocks revoked by a later transaction; it is shown the replayed disk.
use super::{
    raw::{Raw, Run},
    source::{ByteSource, Window},
};
use crate::bytes::{le32, le64};
use crc::{CRC_32_ISCSI, Crc, Digest};
use std::{
    collections::{BTreeMap, HashMap},
    io,
};

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;

const WIDE: u32 = 0x2;
const CHECKSUM_V2: u32 = 0x8;
const CHECKSUM_V3: u32 = 0x10;
const FAST_COMMIT: u32 = 0x20;
/// Revocation records, asynchronous commits, and what is above.
const KNOWN: u32 = 0x3f;

const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST_TAG: u32 = 8;

/// Blocks of the log that are looked at: 256 MiB of 4 KiB. A log is replayed from where it was checkpointed last, which is
/// rarely a tenth of it.
const BLOCK_LIMIT: usize = 65_536;

static CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// CRC-32C as the kernel keeps it: without the last inversion.
fn crc32c(digest: Digest<'_, u32>) -> u32 {
    !digest.finalize()
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    le32(bytes, at).map(u32::swap_bytes)
}

/// A block as the log has it.
#[derive(Clone, Copy, Debug)]
struct Logged {
    /// Where on the disk the log keeps it.
    at: u64,
    /// Its first four bytes were the log's own magic, and are zero in the log.
    escaped: bool,
}

/// What a replay changes.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    blocks: BTreeMap<u64, Logged>,
    /// What could not be replayed, in words.
    pub damage: Vec<String>,
}

/// One log, by its superblock.
struct Log<'a> {
    raw: &'a Raw,
    runs: Vec<Run>,
    /// First block of the log proper, and the one behind its last.
    first: u64,
    end: u64,
    sequence: u32,
    start: u64,
    features: u32,
    /// The log's UUID, with which every checksum begins.
    seed: Digest<'static, u32>,
}

impl Replay {
    /// Reads the log of a file system that needs recovery. None where there is none on this disk that can be read.
    pub(crate) fn read(raw: &Raw, window: &Window) -> Option<Self> {
        let sb = window.bytes(1024, 1024)?;
        let inode = raw.inode(le32(&sb, 0xe0).filter(|n| *n != 0)?)?;
        let log = Log::open(raw, raw.runs(&inode)?)?;
        let mut replay = Self::default();
        if log.features & !KNOWN != 0 {
            replay.damage.push(format!(
                "replay the journal: unknown features {:#x}",
                log.features & !KNOWN
            ));
            return Some(replay);
        }
        if log.start != 0 {
            log.scan(&mut replay);
        }
        if log.features & FAST_COMMIT != 0 {
            replay
                .damage
                .push("replay the journal: fast commits are left out".to_owned());
        }
        Some(replay)
    }

    /// Bytes at `offset`, with what the log has for them.
    fn patch(
        &self,
        window: &Window,
        block_size: u64,
        offset: u64,
        buf: &mut [u8],
    ) -> io::Result<()> {
        let (Some(first), Some(last)) = (
            offset.checked_div(block_size),
            offset
                .saturating_add(buf.len() as u64)
                .checked_div(block_size),
        ) else {
            return Ok(());
        };
        for (block, logged) in self.blocks.range(first..=last) {
            let begin = block.saturating_mul(block_size);
            let from = begin.max(offset);
            let to = begin
                .saturating_add(block_size)
                .min(offset.saturating_add(buf.len() as u64));
            let range = usize::try_from(from.saturating_sub(offset))
                .ok()
                .zip(usize::try_from(to.saturating_sub(offset)).ok());
            let Some(part) = range
                .and_then(|(a, b)| buf.get_mut(a..b))
                .filter(|p| !p.is_empty())
            else {
                continue;
            };
            let inside = from.saturating_sub(begin);
            window.read_exact(
                logged.at.saturating_mul(block_size).saturating_add(inside),
                part,
            )?;
            if logged.escaped {
                let magic = MAGIC.to_be_bytes();
                let skip = usize::try_from(inside).unwrap_or(usize::MAX);
                for (to, from) in part.iter_mut().zip(magic.iter().skip(skip)) {
                    *to = *from;
                }
            }
        }
        Ok(())
    }
}

impl<'a> Log<'a> {
    fn open(raw: &'a Raw, runs: Vec<Run>) -> Option<Self> {
        let sb = raw.block(runs.first().filter(|r| r.logical == 0)?.physical)?;
        let kind = be32(&sb, 4)?;
        if be32(&sb, 0)? != MAGIC || u64::from(be32(&sb, 0xc)?) != raw.block_size {
            return None;
        }
        let features = match kind {
            SUPERBLOCK_V1 => 0,
            SUPERBLOCK_V2 => be32(&sb, 0x28)?,
            _ => return None,
        };
        let (max, first) = (u64::from(be32(&sb, 0x10)?), u64::from(be32(&sb, 0x14)?));
        // The end of the log belongs to fast commits, where they are on (256 blocks where it does not say).
        let fast = match be32(&sb, 0x54)? {
            _ if features & FAST_COMMIT == 0 => 0,
            0 => 256,
            n => u64::from(n),
        };
        let mut seed = CRC.digest();
        seed.update(sb.get(0x30..0x40)?);
        let log = Self {
            raw,
            runs,
            first,
            end: max.checked_sub(fast)?,
            sequence: be32(&sb, 0x18)?,
            start: u64::from(be32(&sb, 0x1c)?),
            features,
            seed,
        };
        let inside = log.start == 0 || (log.first..log.end).contains(&log.start);
        (log.first >= 1 && inside).then_some(log)
    }

    fn physical(&self, logical: u64) -> Option<u64> {
        let next = self.runs.partition_point(|run| run.logical <= logical);
        let run = self.runs.get(next.checked_sub(1)?)?;
        let offset = logical.checked_sub(run.logical).filter(|o| *o < run.len)?;
        run.physical.checked_add(offset)
    }

    fn checksums(&self) -> bool {
        self.features & (CHECKSUM_V2 | CHECKSUM_V3) != 0
    }

    /// Follows the log from where it begins to its end: the first block that is not the next one of its sequence.
    fn scan(&self, replay: &mut Replay) {
        let mut walk = Walk {
            log: self,
            at: self.start,
            left: BLOCK_LIMIT,
        };
        let mut committed: Vec<(u32, u64, Logged)> = Vec::new();
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let mut sequence = self.sequence;
        let (mut blocks, mut revokes) = (Vec::new(), Vec::new());
        while let Some((_, block)) = walk.next() {
            if be32(&block, 0) != Some(MAGIC) || be32(&block, 8) != Some(sequence) {
                break;
            }
            let whole = match be32(&block, 4) {
                Some(DESCRIPTOR) if self.tail_fits(&block) => {
                    self.descriptor(&block, sequence, &mut walk, &mut blocks, replay)
                }
                Some(REVOKE) if self.tail_fits(&block) => self.revocations(&block, &mut revokes),
                Some(COMMIT) if self.commit_fits(&block) => {
                    committed.extend(
                        blocks
                            .drain(..)
                            .map(|(block, logged)| (sequence, block, logged)),
                    );
                    for block in revokes.drain(..) {
                        revoked.insert(block, sequence);
                    }
                    sequence = sequence.wrapping_add(1);
                    Some(())
                }
                Some(DESCRIPTOR | REVOKE | COMMIT) => {
                    replay.damage.push(format!(
                        "replay the journal: a block of transaction {sequence} has a wrong checksum"
                    ));
                    None
                }
                _ => None,
            };
            if whole.is_none() {
                break;
            }
        }
        if walk.left == 0 {
            replay
                .damage
                .push("replay the journal: it is too long".to_owned());
        }
        for (sequence, block, logged) in committed {
            // Revoked by this transaction or a later one (`tid_geq`): the block has been something else since.
            let gone = revoked
                .get(&block)
                .is_some_and(|by| by.wrapping_sub(sequence) < 1 << 31);
            if !gone && block < self.raw.blocks {
                replay.blocks.insert(block, logged);
            }
        }
    }

    /// The blocks that a descriptor names, which follow it in the log.
    fn descriptor(
        &self,
        block: &[u8],
        sequence: u32,
        walk: &mut Walk<'_, '_>,
        blocks: &mut Vec<(u64, Logged)>,
        replay: &mut Replay,
    ) -> Option<()> {
        let (third, second) = (
            self.features & CHECKSUM_V3 != 0,
            self.features & CHECKSUM_V2 != 0,
        );
        let wide = self.features & WIDE != 0;
        let size = match (third, second, wide) {
            (true, _, _) => 16,
            (false, second, wide) => usize::from(second)
                .saturating_mul(2)
                .saturating_add(if wide { 12 } else { 8 }),
        };
        let tail = if self.checksums() { 4 } else { 0 };
        let mut tags = block.get(12..block.len().checked_sub(tail)?)?;
        while let Some(tag) = tags.get(..size) {
            let low = u64::from(be32(tag, 0)?);
            let (flags, high) = if third {
                (be32(tag, 4)?, if wide { be32(tag, 8)? } else { 0 })
            } else {
                (be32(tag, 4)? & 0xffff, if wide { be32(tag, 8)? } else { 0 })
            };
            let (at, content) = walk.next()?;
            let fits = !self.checksums() || {
                let mut digest = self.seed.clone();
                digest.update(&sequence.to_be_bytes());
                digest.update(&content);
                let sum = crc32c(digest);
                if third {
                    be32(tag, 12)? == sum
                } else {
                    be32(tag, 4)? >> 16 == sum & 0xffff
                }
            };
            let number = low | (u64::from(high) << 32);
            if fits {
                blocks.push((
                    number,
                    Logged {
                        at,
                        escaped: flags & ESCAPED != 0,
                    },
                ));
            } else if replay.damage.len() < 8 {
                replay.damage.push(format!(
                    "replay the journal: what it has of block {number} has a wrong checksum"
                ));
            }
            if flags & LAST_TAG != 0 {
                break;
            }
            let uuid = if flags & SAME_UUID == 0 { 16 } else { 0 };
            tags = tags.get(size.checked_add(uuid)?..)?;
        }
        Some(())
    }

    fn revocations(&self, block: &[u8], revokes: &mut Vec<u64>) -> Option<()> {
        let used = usize::try_from(be32(block, 12)?).ok()?.min(block.len());
        let entries = block.get(16..used)?;
        if self.features & WIDE != 0 {
            revokes.extend(
                entries
                    .chunks_exact(8)
                    .filter_map(|e| le64(e, 0))
                    .map(u64::swap_bytes),
            );
        } else {
            revokes.extend(
                entries
                    .chunks_exact(4)
                    .filter_map(|e| be32(e, 0))
                    .map(u64::from),
            );
        }
        Some(())
    }

    /// Whether the checksum at the end of a descriptor or revocation block is right.
    fn tail_fits(&self, block: &[u8]) -> bool {
        !self.checksums()
            || block
                .len()
                .checked_sub(4)
                .is_some_and(|at| self.sum_fits(block, at))
    }

    fn commit_fits(&self, block: &[u8]) -> bool {
        !self.checksums() || self.sum_fits(block, 16)
    }

    /// Whether the block's checksum is the one at `at`, which counts as zero in it.
    fn sum_fits(&self, block: &[u8], at: usize) -> bool {
        let (Some(before), Some(after)) = (block.get(..at), block.get(at.saturating_add(4)..))
        else {
            return false;
        };
        let mut digest = self.seed.clone();
        digest.update(before);
        digest.update(&[0; 4]);
        digest.update(after);
        be32(block, at) == Some(crc32c(digest))
    }
}

/// The blocks of a log one after the other; behind its last comes its first.
struct Walk<'w, 'a> {
    log: &'w Log<'a>,
    at: u64,
    left: usize,
}

impl Walk<'_, '_> {
    fn next(&mut self) -> Option<(u64, Vec<u8>)> {
        self.left = self.left.checked_sub(1)?;
        let physical = self.log.physical(self.at)?;
        let block = self.log.raw.block(physical)?;
        self.at = self.at.checked_add(1)?;
        if self.at >= self.log.end {
            self.at = self.log.first;
        }
        Some((physical, block))
    }
}

/// A file system as it would be after a mount.
pub(crate) struct Replayed {
    window: Window,
    block_size: u64,
    replay: Replay,
    /// Without the flag that says that it needs recovery.
    superblock: Vec<u8>,
}

const SUPERBLOCK: u64 = 1024;
const RECOVER: u8 = 0x4;
const METADATA_CHECKSUMS: u32 = 0x400;

impl Replayed {
    /// The file system in `window` with `replay` laid over it.
    pub(crate) fn new(window: Window, raw: &Raw, replay: Replay) -> Option<Self> {
        let mut superblock = window.bytes(SUPERBLOCK, 1024)?;
        replay
            .patch(&window, raw.block_size, SUPERBLOCK, &mut superblock)
            .ok()?;
        *superblock.get_mut(0x60)? &= !RECOVER;
        if le32(&superblock, 0x64)? & METADATA_CHECKSUMS != 0 {
            let mut digest = CRC.digest();
            digest.update(superblock.get(..0x3fc)?);
            superblock
                .get_mut(0x3fc..)?
                .copy_from_slice(&crc32c(digest).to_le_bytes());
        }
        Some(Self {
            window,
            block_size: raw.block_size,
            replay,
            superblock,
        })
    }

    pub(crate) fn damage(&self) -> &[String] {
        &self.replay.damage
    }
}

impl ByteSource for Replayed {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let rest = self.window.len.saturating_sub(offset);
        let n = usize::try_from(rest).unwrap_or(usize::MAX).min(buf.len());
        let Some(buf) = buf.get_mut(..n) else {
            return Ok(0);
        };
        self.window.read_exact(offset, buf)?;
        self.replay
            .patch(&self.window, self.block_size, offset, buf)?;
        for (at, byte) in (SUPERBLOCK..).zip(&self.superblock) {
            if let Some(to) = at
                .checked_sub(offset)
                .and_then(|i| buf.get_mut(usize::try_from(i).ok()?))
            {
                *to = *byte;
            }
        }
        Ok(n)
    }

    fn len(&self) -> u64 {
        self.window.len
    }
}
