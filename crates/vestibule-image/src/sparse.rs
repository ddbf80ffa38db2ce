//! Copies and sizes of files with holes.
use camino::Utf8Path;
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use std::{io, os::unix::fs::MetadataExt as _};

/// Copies an image: shares its blocks where the file system can (`FICLONE`), else copies the data between its holes.
///
/// # Errors
/// When a file cannot be read or written; an existing `to` is replaced.
pub fn clone_image(from: &Utf8Path, to: &Utf8Path) -> io::Result<()> {
    let source = std::fs::File::open(from)?;
    let target = std::fs::File::create(to)?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let len = source.metadata()?.len();
    target.set_len(len)?;
    let mut at = 0;
    while at < len {
        let data = match seek(&source, SeekFrom::Data(at)) {
            Ok(data) => data,
            // ENXIO: only a hole follows (lseek(2)).
            Err(rustix::io::Errno::NXIO) => break,
            Err(err) => return Err(err.into()),
        };
        let end = seek(&source, SeekFrom::Hole(data))?;
        let (mut read, mut written) = (data, data);
        while read < end {
            let left = usize::try_from(end - read).unwrap_or(usize::MAX);
            if copy_file_range(&source, Some(&mut read), &target, Some(&mut written), left)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

/// Bytes on disk of a file or of everything below a directory, holes not counted. What cannot be read counts nothing.
pub(crate) fn disk_bytes(path: &Utf8Path) -> u64 {
    let Ok(metadata) = path.symlink_metadata() else {
        return 0;
    };
    let own = metadata.blocks() * 512;
    if !metadata.is_dir() {
        return own;
    }
    let below = path
        .read_dir_utf8()
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    own + below.map(|entry| disk_bytes(entry.path())).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn a_copy_has_the_same_bytes_and_keeps_its_holes() {
        let directory = camino_tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("a"), directory.path().join("b"));
        let file = std::fs::File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 32 << 20).unwrap();
        clone_image(&from, &to).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        assert!(disk_bytes(&to) < 1 << 20, "{}", disk_bytes(&to));
    }
}
