//! Content of files and targets of links, read of the packed image and of the tree that it was packed from.
use crate::Disk;
use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, symlink},
};
use vestibule_diagnose::disk::{Tree as _, dir::DirTree, ext4::Ext4Tree};

/// What the image's readers must not differ by: extents or block maps, wide or narrow descriptors, with and without checksums,
/// small blocks. (`ext4-view` reads neither inodes of 128 bytes nor content in inodes.)
const FORMS: [&[&str]; 4] = [
    &[],
    &["-b", "1024"],
    &["-O", "^extents,^64bit,^metadata_csum"],
    &["-O", "^64bit,^metadata_csum"],
];
/// Of a link's target: 59 bytes lie in the inode, 60 in a block.
const LINKS: [usize; 5] = [1, 58, 59, 60, 900];

fn tree() -> Result<Disk> {
    let disk = Disk::new()?;
    disk.file("etc/empty", "")?;
    disk.file("etc/short", "a line\n")?;
    disk.file("etc/hundred", &"x".repeat(100))?;
    let numbers: String = (0..9_000).map(|n| format!("{n}\n")).collect();
    disk.file("usr/lib/long", &numbers)?;
    // More runs than an inode has room for, with holes between, and a hole at the end.
    let sparse = File::create(disk.tree().join("usr/lib/sparse"))?;
    for n in 0..12_u64 {
        sparse.write_all_at(format!("part {n}").as_bytes(), n * 20_000 + 7)?;
    }
    sparse.set_len(400_000)?;
    let one_hole = File::create(disk.tree().join("usr/lib/hole"))?;
    one_hole.write_all_at(b"end", 50_000)?;
    for len in LINKS {
        symlink("t".repeat(len), disk.tree().join(format!("etc/link-{len}")))?;
    }
    for n in 0..400 {
        disk.file(
            &format!("usr/share/many/a-name-that-takes-some-room-{n}"),
            &n.to_string(),
        )?;
    }
    Ok(disk)
}

#[test]
fn an_image_says_what_was_packed() -> Result<()> {
    for form in FORMS {
        let disk = tree()?;
        disk.pack(form)?;
        let image = Ext4Tree::open(fs::read(disk.image())?)?;
        let packed = DirTree::new(disk.tree());
        for path in [
            "/etc/empty",
            "/etc/short",
            "/etc/hundred",
            "/usr/lib/long",
            "/usr/lib/sparse",
            "/usr/lib/hole",
            "/usr/share/many/a-name-that-takes-some-room-399",
        ] {
            for (offset, len) in [
                (0, 1 << 20),
                (0, 1),
                (3, 4096),
                (4095, 2),
                (19_999, 40_000),
                (399_999, 10),
                (1 << 30, 5),
            ] {
                let (ours, theirs) = (
                    image.read_at(path, offset, len),
                    packed.read_at(path, offset, len),
                );
                ensure!(
                    ours == theirs,
                    "{form:?}: {len} bytes of {path} from {offset}: {:?}, not {:?}; {:?}",
                    ours.map(|bytes| bytes.len()),
                    theirs.map(|bytes| bytes.len()),
                    image.damage()
                );
            }
        }
        for len in LINKS {
            let path = format!("/etc/link-{len}");
            let target = image.link(&path).context(path)?;
            ensure!(
                target == "t".repeat(len),
                "{form:?}: a link of {len}: {target}"
            );
        }
        ensure!(image.link("/etc/short").is_none() && image.read_at("/etc", 0, 1).is_none());
        ensure!(image.damage().is_empty(), "{form:?}: {:?}", image.damage());
    }
    Ok(())
}
