//! The readers against their oracles, and against damage: whatever the bytes, an answer in bounded time, and no panic.
#![expect(
    clippy::unwrap_used,
    reason = "a fixture that cannot be read fails the test"
)]

use flate2::read::GzDecoder;
use proptest::prelude::*;
use std::{
    io::Read,
    sync::LazyLock,
    time::{Duration, Instant},
};
use vestibule_diagnose::{
    Evidence, diagnose,
    disk::{Root, Tree, ext4::Ext4Tree},
    journal::{FileState, Journal},
    units::parse,
};

fn fixture(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/data/{name}.gz", env!("CARGO_MANIFEST_DIR"));
    let mut out = Vec::new();
    GzDecoder::new(std::fs::File::open(path).unwrap())
        .read_to_end(&mut out)
        .unwrap();
    out
}

static EXPORT: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("small.export"));
static COMPACT: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("compact-zstd.journal"));
static REGULAR: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("regular-zstd.journal"));
static LZ4: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("lz4-compact.journal"));
static DISK: LazyLock<Vec<u8>> = LazyLock::new(|| fixture("disk.ext4"));

/// No single answer may take longer; the machine is shared and the build is not optimised.
const LIMIT: Duration = Duration::from_secs(30);

fn timed<T>(work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let out = work();
    assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
    out
}

/// `small.export` was written by hand; `systemd-journal-remote` 252 made the native files of it.
#[test]
fn native_files_say_what_the_export_says() {
    let export = Journal::parse(&EXPORT, "journal");
    assert_eq!(export.entries.len(), 40);
    for bytes in [&*COMPACT, &*REGULAR] {
        let native = Journal::parse(bytes, "journal");
        assert_eq!(native.state, FileState::Offline);
        assert_eq!(native.entries.len(), 40, "{:?}", native.damage);
        for (a, b) in export.entries.iter().zip(&native.entries) {
            assert_eq!(
                (&a.message, &a.subject, &a.speaker, a.pid),
                (&b.message, &b.subject, &b.speaker, b.pid)
            );
            assert_eq!(
                (&a.boot_id, a.monotonic_us, a.realtime_us),
                (&b.boot_id, b.monotonic_us, b.realtime_us)
            );
        }
    }
    assert!(
        export.entries.iter().any(|e| e.message.len() > 1000),
        "one message is long enough to be compressed"
    );
}

/// Without its arrays a file still has its entries: what a killed VM leaves.
#[test]
fn entries_are_salvaged_without_their_arrays() {
    for bytes in [&*COMPACT, &*REGULAR] {
        let mut broken = bytes.clone();
        // `entry_array_offset` of the header.
        broken[176..184].fill(0);
        assert_eq!(Journal::parse(&broken, "journal").entries.len(), 40);
        let number = |at: usize| {
            usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
        };
        // The hash tables come first, the entries after them.
        let tables = (number(104) + number(112)).max(number(120) + number(128));
        let used = broken.iter().rposition(|b| *b != 0).unwrap();
        let half = Journal::parse(&broken[..tables + (used - tables) / 2], "journal");
        assert!(
            (5..40).contains(&half.entries.len()) && !half.damage.is_empty(),
            "{}",
            half.entries.len()
        );
    }
}

#[test]
fn a_disk_is_read_raw_and_inside_a_partition_table() {
    let names = |bytes: Vec<u8>| {
        let root = Root::new(Ext4Tree::open(bytes).unwrap());
        assert_eq!(root.read_text("/etc/hostname").as_deref(), Some("small\n"));
        assert!(
            root.superblock()
                .is_some_and(|s| s.free_blocks > 0 && s.block_size == 1024 && s.error_count == 0)
        );
        root.list("/etc").len()
    };
    let raw = names(DISK.clone());
    let mut mbr = vec![0_u8; 1 << 20];
    mbr[510..512].copy_from_slice(&[0x55, 0xaa]);
    mbr[450] = 0x83;
    mbr[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    mbr[458..462].copy_from_slice(&u32::try_from(DISK.len() / 512).unwrap().to_le_bytes());
    mbr.extend_from_slice(&DISK);
    assert_eq!(names(mbr), raw);
    let mut gpt = vec![0_u8; 1 << 20];
    gpt[512..520].copy_from_slice(b"EFI PART");
    gpt[512 + 72..512 + 80].copy_from_slice(&2_u64.to_le_bytes());
    gpt[512 + 80..512 + 84].copy_from_slice(&128_u32.to_le_bytes());
    gpt[512 + 84..512 + 88].copy_from_slice(&128_u32.to_le_bytes());
    gpt[1024..1040].fill(7);
    gpt[1024 + 32..1024 + 40].copy_from_slice(&2048_u64.to_le_bytes());
    gpt[1024 + 40..1024 + 48].copy_from_slice(&(2047 + DISK.len() as u64 / 512).to_le_bytes());
    gpt.extend_from_slice(&DISK);
    assert_eq!(names(gpt), raw);
}

/// Bytes with some of them changed, and perhaps the end cut off.
fn damaged(
    bytes: &[u8],
    changes: &[(prop::sample::Index, u8)],
    keep: Option<prop::sample::Index>,
) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for (at, value) in changes {
        let at = at.index(out.len());
        out[at] = *value;
    }
    if let Some(keep) = keep {
        out.truncate(keep.index(out.len()));
    }
    out
}

fn changes(max: usize) -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..max)
}

/// Every read that a diagnosis makes, and a walk over the whole tree.
fn walk(root: &Root) {
    let mut todo = vec![String::new()];
    let mut seen = 0;
    while let Some(dir) = todo.pop() {
        for entry in root
            .list(if dir.is_empty() { "/" } else { &dir })
            .iter()
            .take(200)
        {
            let path = format!("{dir}/{}", entry.name);
            seen += 1;
            let _ = (
                root.stat(&path),
                root.read_at(&path, 0, 1 << 16),
                root.link(&path),
                root.xattrs(&path),
            );
            if seen < 2_000 && path.len() < 200 {
                todo.push(path);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn journals_survive_damage(
        at in changes(60), keep in prop::option::of(any::<prop::sample::Index>()), form in 0_usize..3,
    ) {
        let source = [&*COMPACT, &*REGULAR, &*LZ4][form];
        let used = source.iter().rposition(|b| *b != 0).unwrap();
        let bytes = damaged(&source[..used], &at, keep);
        let journal = timed(|| Journal::parse(&bytes, "journal"));
        prop_assert!(journal.entries.len() <= 40 + at.len());
        let export = damaged(&EXPORT, &at, keep);
        let _ = timed(|| Journal::parse(&export, "journal"));
    }

    #[test]
    fn disks_survive_damage(
        at in changes(200), low in changes(40), keep in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = damaged(&DISK, &at, keep);
        // The metadata at the front is where damage hurts.
        for (place, value) in low {
            let len = bytes.len().min(64 << 10);
            if len > 0 {
                bytes[place.index(len)] = value;
            }
        }
        timed(|| {
            if let Ok(tree) = Ext4Tree::open(bytes.clone()) {
                let _ = tree.damage();
                walk(&Root::new(tree));
            }
            if let Ok(tree) = Ext4Tree::open(bytes) {
                let _ = diagnose(&Evidence::new().disk(tree).unit("vm-browser-agent.service"));
            }
        });
    }

    #[test]
    fn units_and_consoles_survive_anything(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let parsed = timed(|| parse::parse(&bytes, "f"));
        prop_assert!(parsed.assignments.len() <= bytes.len());
        let _ = timed(|| diagnose(&Evidence::new().serial(bytes.clone()).journal(&bytes, "journal")));
    }

    #[test]
    fn consoles_of_lines_survive(lines in prop::collection::vec(
        "(\\[ *[0-9]{1,4}\\.[0-9]{1,6}\\] )?(\\[  OK  \\] |systemd\\[1\\]: )?(Started|Failed|Job|Kernel panic|A start job is running for) [ -~…]{0,60}", 0..60)) {
        let _ = timed(|| diagnose(&Evidence::new().serial(lines.join("\n")).cmdline("console=ttyS0 root=/dev/vda")));
    }
}

/// A file that says of itself to be enormous is answered from what there is.
#[test]
fn hostile_sizes_cost_nothing() {
    let mut journal = COMPACT.clone();
    for at in (272..journal.len().min(200_000)).step_by(8) {
        if journal[at] == 1 || journal[at] == 3 {
            let end = (at + 16).min(journal.len());
            journal[at + 8..end].fill(0xff);
        }
    }
    timed(|| Journal::parse(&journal, "journal"));
    let mut disk = DISK.clone();
    disk[1024 + 4..1024 + 8].fill(0xff);
    timed(|| Ext4Tree::open(disk).map(|t| walk(&Root::new(t))).ok());
    timed(|| parse::parse(&b"[Unit]\nA=\\\n".repeat(100_000), "f"));
    timed(|| diagnose(&Evidence::new().serial(b"[  OK  ] Started x\n".repeat(200_000))));
}
