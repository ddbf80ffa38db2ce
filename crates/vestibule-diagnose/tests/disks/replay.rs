//! Journals that a killed VM left: written by debugfs, replayed in memory, and compared with what `e2fsck` makes of a copy.
use crate::{Disk, ask, run};
use anyhow::{Context, Result};
use proptest::prelude::*;
use std::{fs, sync::LazyLock, time::Instant};
use vestibule_diagnose::disk::{Root, ext4::Ext4Tree};

const BLOCK: usize = 1024;
const MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];

/// Features of a file system, and how debugfs opens its journal: every form of tags and checksums.
const KINDS: [(&str, &str); 5] = [
    ("metadata_csum,64bit", "jo -c -v 3"),
    ("metadata_csum,64bit", "jo -c -v 2"),
    ("metadata_csum,64bit", "jo"),
    ("^metadata_csum,^64bit", "jo"),
    ("^metadata_csum,^64bit,^extent", "jo"),
];

fn padded(text: &[u8]) -> Vec<u8> {
    let mut block = text.to_vec();
    block.resize(BLOCK, b'.');
    block
}

fn dirty_tree(features: &str) -> Result<Disk> {
    let disk = Disk::new()?;
    for name in ["state", "other"] {
        disk.file(
            &format!("etc/{name}"),
            std::str::from_utf8(&padded(b"old"))?,
        )?;
    }
    fs::create_dir(disk.tree().join("usr"))?;
    disk.pack(&["-b", "1024", "-J", "size=1", "-O", features])?;
    Ok(disk)
}

impl Disk {
    fn block_of(&self, path: &str) -> Result<u64> {
        let blocks = ask(&self.image(), &format!("blocks {path}"))?;
        let first = blocks.split_whitespace().next().context("no block")?;
        Ok(first.parse()?)
    }

    /// A transaction that writes `content` to the first block of `path`.
    fn write_of(&self, path: &str, content: &[u8]) -> Result<String> {
        let block = self.block_of(path)?;
        let file = self
            .dir
            .path()
            .join(format!("new-{}", path.replace('/', "-")));
        fs::write(&file, padded(content))?;
        Ok(format!("jw -b {block} {file}\n"))
    }

    /// What `e2fsck` makes of a copy.
    fn repaired(&self, path: &str) -> Result<Vec<u8>> {
        let copy = self.dir.path().join("copy");
        fs::write(&copy, fs::read(self.image())?)?;
        run("e2fsck", &["-fy", copy.as_str()])?;
        Ok(ask(&copy, &format!("cat {path}"))?.into_bytes())
    }
}

/// Ours is what `e2fsck` would make of it, and `starts`.
fn agrees(disk: &Disk, path: &str, starts: &[u8], about: &str) -> Result<()> {
    let root = disk.read()?;
    let ours = root
        .read(path)
        .with_context(|| format!("{about}: {path} cannot be read"))?;
    assert_eq!(root.damage(), Vec::<String>::new(), "{about}");
    assert!(
        root.superblock().is_some_and(|s| s.needs_recovery),
        "{about}: nothing to replay"
    );
    assert!(
        ours.starts_with(starts),
        "{about}: {path} begins with {:?}",
        ours.get(..8)
    );
    let theirs = disk.repaired(path)?;
    if starts != MAGIC {
        assert!(ours == theirs, "{about}: e2fsck has {:?}", theirs.get(..8));
    }
    Ok(())
}

#[test]
fn a_journal_is_replayed_as_e2fsck_does() -> Result<()> {
    for (features, open) in KINDS {
        let about = format!("{features} {open}");
        let disk = dirty_tree(features)?;
        let write = disk.write_of("/etc/state", b"new")?;
        disk.debugfs(&format!("{open}\n{write}jc\n"))?;
        // The disk itself has the old content, and is not written.
        let before = fs::read(disk.image())?;
        let at = usize::try_from(disk.block_of("/etc/state")?)? * BLOCK;
        assert!(before[at..].starts_with(b"old"), "{about}");
        agrees(&disk, "/etc/state", b"new", &about)?;
        agrees(&disk, "/etc/other", b"old", &about)?;
        assert!(before == fs::read(disk.image())?, "{about}");
    }
    Ok(())
}

/// A block that begins with the journal's own magic is kept without it.
#[test]
fn an_escaped_block_gets_its_begin_back() -> Result<()> {
    for (features, open) in KINDS {
        let disk = dirty_tree(features)?;
        let write = disk.write_of("/etc/state", &[&MAGIC[..], b"new"].concat())?;
        disk.debugfs(&format!("{open}\n{write}jc\n"))?;
        agrees(&disk, "/etc/state", &MAGIC, &format!("{features} {open}"))?;
        assert!(
            disk.read()?
                .read("/etc/state")
                .is_some_and(|c| c[4..].starts_with(b"new"))
        );
    }
    Ok(())
}

/// A block that a later transaction revoked has been something else since: what the journal has of it is not written.
#[test]
fn a_revoked_block_is_left_alone() -> Result<()> {
    for (features, open) in KINDS {
        let disk = dirty_tree(features)?;
        let block = disk.block_of("/etc/state")?;
        let (state, other) = (
            disk.write_of("/etc/state", b"new")?,
            disk.write_of("/etc/other", b"new")?,
        );
        let about = format!("{features} {open}");
        disk.debugfs(&format!("{open}\n{state}{other}jw -r {block}\njc\n"))?;
        agrees(&disk, "/etc/state", b"old", &about)?;
        agrees(&disk, "/etc/other", b"new", &about)?;
        // Written again after that, it counts.
        disk.debugfs(&format!("{open}\n{state}jc\n"))?;
        agrees(&disk, "/etc/state", b"new", &about)?;
    }
    Ok(())
}

/// What was not committed did not happen.
#[test]
fn a_transaction_without_its_commit_is_left_out() -> Result<()> {
    let disk = dirty_tree("metadata_csum,64bit")?;
    let (state, other) = (
        disk.write_of("/etc/state", b"new")?,
        disk.write_of("/etc/other", b"new")?,
    );
    disk.debugfs(&format!("jo -c\n{state}{other}jc\n"))?;
    let mut bytes = fs::read(disk.image())?;
    let commits = log_blocks(&bytes, 2);
    assert_eq!(commits.len(), 2);
    bytes[commits[1]..commits[1] + BLOCK].fill(0);
    fs::write(disk.image(), bytes)?;
    agrees(&disk, "/etc/state", b"new", "first")?;
    agrees(&disk, "/etc/other", b"old", "second")
}

/// Where blocks of the journal of this kind (1: descriptor, 2: commit) are in the image.
fn log_blocks(image: &[u8], kind: u8) -> Vec<usize> {
    let head = [&MAGIC[..], &[0, 0, 0, kind]].concat();
    (0..image.len())
        .step_by(BLOCK)
        .filter(|at| image[*at..].starts_with(&head))
        .collect()
}

/// A log that goes on at its begin when its end is reached.
#[test]
fn a_wrapped_log_is_followed() -> Result<()> {
    for features in ["^metadata_csum,^64bit", "^metadata_csum,64bit"] {
        let disk = dirty_tree(features)?;
        let (state, other) = (
            disk.write_of("/etc/state", b"new")?,
            disk.write_of("/etc/other", b"new")?,
        );
        disk.debugfs(&format!("jo\n{state}{other}jc\n"))?;
        let log: Vec<usize> = ask(&disk.image(), "blocks <8>")?
            .split_whitespace()
            .map(|n| Ok(n.parse::<usize>()? * BLOCK))
            .collect::<Result<_>>()?;
        // The same log two blocks before the journal's end: its blocks, and where the superblock says that it starts.
        let mut bytes = fs::read(disk.image())?;
        let whole = bytes.clone();
        let blocks = log.len().min(usize::try_from(be32(&whole, log[0] + 16))?);
        let turn = |n: usize| 1 + (n - 1 + blocks - 1 - 2) % (blocks - 1);
        for from in 1..blocks {
            let to = log[turn(from)];
            bytes[to..to + BLOCK].copy_from_slice(&whole[log[from]..log[from] + BLOCK]);
        }
        let start = u32::try_from(turn(1))?;
        bytes[log[0] + 28..log[0] + 32].copy_from_slice(&start.to_be_bytes());
        fs::write(disk.image(), bytes)?;
        agrees(&disk, "/etc/state", b"new", features)?;
        agrees(&disk, "/etc/other", b"new", features)?;
    }
    Ok(())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .fold(0, |n, b| (n << 8) | u32::from(*b))
}

/// A block of the journal whose checksum is wrong is not written, and that is said.
#[test]
fn a_damaged_block_is_said() -> Result<()> {
    let disk = dirty_tree("metadata_csum,64bit")?;
    let write = disk.write_of("/etc/state", b"new")?;
    disk.debugfs(&format!("jo -c\n{write}jc\n"))?;
    let mut bytes = fs::read(disk.image())?;
    let descriptor = *log_blocks(&bytes, 1).first().context("no descriptor")?;
    bytes[descriptor + BLOCK + 100] ^= 1;
    let root = Root::new(Ext4Tree::open(bytes)?);
    assert!(
        root.read("/etc/state")
            .is_some_and(|c| c.starts_with(b"old"))
    );
    let damage = root.damage();
    assert!(
        damage.iter().any(|d| d.contains("has a wrong checksum")),
        "{damage:?}"
    );
    Ok(())
}

/// A dirty disk without checksums, so that damage is followed and not refused.
static DIRTY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let disk = dirty_tree("^metadata_csum,^64bit").expect("the disk is made");
    let (state, other) = (
        disk.write_of("/etc/state", b"new"),
        disk.write_of("/etc/other", b"new"),
    );
    let (state, other) = (state.expect("a transaction"), other.expect("a transaction"));
    disk.debugfs(&format!("jo\n{state}{other}jw -r 9\njc\n"))
        .expect("the journal is written");
    fs::read(disk.image()).expect("the disk is read")
});

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bits flipped in the journal and in its inode, and the end cut off.
    #[test]
    fn journals_survive_damage(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..64, any::<u8>()), 1..40),
        keep in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = DIRTY.clone();
        let places: Vec<usize> = (1..=5).flat_map(|kind| log_blocks(&DIRTY, kind)).collect();
        prop_assert!(places.len() >= 5, "{places:?}");
        for (place, offset, value) in flips {
            bytes[places[place.index(places.len())] + offset] = value;
        }
        if let Some(keep) = keep {
            bytes.truncate(keep.index(bytes.len()));
        }
        let start = Instant::now();
        if let Ok(tree) = Ext4Tree::open(bytes) {
            let root = Root::new(tree);
            let _ = (root.read("/etc/state"), root.list("/etc"), root.xattrs("/etc/state"));
            prop_assert!(root.damage().len() <= 24);
        }
        prop_assert!(start.elapsed().as_secs() < 30);
    }
}
