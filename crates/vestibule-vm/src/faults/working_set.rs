//! Which pages a copy of a snapshot needs at once: what its first copy asked for in its first seconds, kept beside the snapshot.
//! Numbers of pages alone; a copy that does without them, or with another's, is the slower and nothing else.
use camino::Utf8Path;
use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    ops::Range,
    os::unix::fs::OpenOptionsExt as _,
};

/// In the snapshot's directory: a JSON array of first pages and how many follow.
pub(crate) const FILE: &str = "working-set.json";
const LIMIT: u64 = 4 << 20;

/// What was recorded, as ranges below `pages`; none where nothing was.
pub(super) fn read(directory: &Utf8Path, pages: u64) -> Vec<Range<u64>> {
    let read = || {
        let mut bytes = Vec::new();
        let file = File::open(directory.join(FILE)).ok()?;
        file.take(LIMIT).read_to_end(&mut bytes).ok()?;
        serde_json::from_slice::<Vec<(u64, u64)>>(&bytes).ok()
    };
    let ranges = read().unwrap_or_default().into_iter();
    ranges
        .map(|(first, count)| first.min(pages)..first.saturating_add(count).min(pages))
        .filter(|range| !range.is_empty())
        .collect()
}

/// Keeps these pages, in whatever order.
pub(super) fn write(directory: &Utf8Path, mut pages: Vec<u64>) -> io::Result<()> {
    pages.sort_unstable();
    pages.dedup();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            Some(_) | None => ranges.push((page, 1)),
        }
    }
    let partial = directory.join(format!(".{FILE}.{}", std::process::id()));
    let written = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .and_then(|mut file| file.write_all(&serde_json::to_vec(&ranges)?))
        .and_then(|()| std::fs::rename(&partial, directory.join(FILE)));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_in_ranges() {
        let dir = camino_tempfile::tempdir().unwrap();
        assert!(read(dir.path(), 100).is_empty());
        write(dir.path(), vec![7, 3, 4, 5, 90, 4]).unwrap();
        assert_eq!(read(dir.path(), 100), [3..6, 7..8, 90..91]);
        assert_eq!(read(dir.path(), 5).first(), Some(&(3..5)));
        for nonsense in [
            "",
            "{}",
            "[[1]]",
            "[[18446744073709551615,18446744073709551615]]",
        ] {
            std::fs::write(dir.path().join(FILE), nonsense).unwrap();
            assert!(read(dir.path(), 100).is_empty(), "{nonsense}");
        }
    }
}
