//! Images that a kernel does not boot from: another root device than the command line's, nothing in it, cut short.
use crate::{Disk, UNIT};
use anyhow::Result;
use std::fs;
use vestibule_diagnose::{Evidence, diagnose};

const ID: &str = "11111111-2222-3333-4444-555555555555";

/// The cause of an image of which `len` bytes are left, with these words on the command line.
fn cause(disk: &Disk, words: &str, len: usize) -> Result<String> {
    let mut image = fs::read(disk.image())?;
    image.truncate(len);
    let evidence = Evidence::new().disk_image(image).unit(UNIT).cmdline(words);
    let finding = diagnose(&evidence).finding;
    Ok(finding.map_or_else(|| "none".into(), |f| f.cause.id().into()))
}

#[test]
fn a_root_device_is_the_image_or_it_is_missing() -> Result<()> {
    let disk = Disk::with_service()?;
    disk.pack(&["-U", ID, "-L", "web"])?;
    for (root, expected) in [
        ("/dev/vda", "none"),
        ("/dev/sda", "none"),
        ("UUID=11111111-2222-3333-4444-555555555555", "none"),
        ("LABEL=web", "none"),
        (
            "UUID=99999999-2222-3333-4444-555555555555",
            "root-device-missing",
        ),
        ("LABEL=other", "root-device-missing"),
        // The image may be a copy of a partition.
        ("/dev/vda1", "none"),
        ("/dev/nvme0n1", "none"),
        ("/dev/nvme0n1p1", "none"),
        ("PARTUUID=0000dead-01", "none"),
    ] {
        let got = cause(&disk, &format!("root={root} rw"), usize::MAX)?;
        assert_eq!(got, expected, "{root}");
    }
    Ok(())
}

#[test]
fn an_image_without_anything_has_no_init() -> Result<()> {
    let disk = Disk::new()?;
    disk.pack(&[])?;
    assert_eq!(
        cause(&disk, "root=/dev/vda rw", usize::MAX)?,
        "init-missing"
    );
    Ok(())
}

#[test]
fn an_image_that_was_cut_is_not_mounted() -> Result<()> {
    let disk = Disk::with_service()?;
    disk.pack(&[])?;
    assert_eq!(cause(&disk, "root=/dev/vda rw", 8 << 20)?, "kernel-panic");
    Ok(())
}
