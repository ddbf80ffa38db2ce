//! Errors that the kernel recorded in the superblock.
use crate::Disk;
use anyhow::{Context, Result};
use vestibule_api::{
    cause::{Cause, Note},
    finding::{Verdict, VerdictKind},
};

/// Three errors, the last of them an hour after `mounted`, and the behaviour that the file system has for them.
fn failed(disk: &Disk, mounted: u64, behaviour: u16) -> Result<()> {
    let last = 1_700_003_600;
    disk.debugfs(&format!(
        "ssv mtime @{mounted}\nssv error_count 3\nssv errors {behaviour}\nssv state 2\n\
         ssv first_error_time @1600000000\nssv first_error_func ext4_lookup\nssv first_error_line 1712\n\
         ssv first_error_ino 264\nssv last_error_time @{last}\nssv last_error_func ext4_validate_block_bitmap\n\
         ssv last_error_line 420\nssv last_error_block 1026\n"
    ))
}

fn errors(verdict: &Verdict) -> Option<&str> {
    let note = verdict
        .notes
        .iter()
        .find(|n| n.note == Note::EvidenceFileSystemErrors)?;
    note.evidence.first().map(|q| q.text.as_str())
}

/// The control: what mke2fs made has had no error, and the same tree is healthy.
#[test]
fn a_clean_disk_says_nothing_of_errors() -> Result<()> {
    let disk = Disk::with_service()?;
    disk.pack(&[])?;
    let verdict = disk.verdict()?;
    assert_eq!(verdict.verdict, VerdictKind::Healthy, "{verdict:#?}");
    assert_eq!(errors(&verdict), None);
    Ok(())
}

/// Errors of before the last mount: quoted, and no cause.
#[test]
fn errors_of_long_ago_are_a_note() -> Result<()> {
    let disk = Disk::with_service()?;
    disk.pack(&[])?;
    failed(&disk, 1_700_010_000, 2)?;
    let verdict = disk.verdict()?;
    assert_eq!(verdict.verdict, VerdictKind::Healthy, "{verdict:#?}");
    let said = errors(&verdict).context("no note of the errors")?;
    assert_eq!(
        said,
        "error_count=3; state has the error flag; first error in ext4_lookup:1712, inode 264, at 1600000000 s since 1970; \
         last error in ext4_validate_block_bitmap:420, block 1026, at 1700003600 s since 1970"
    );
    Ok(())
}

/// An error of the last mount made the file system read-only, where that is what it does then.
#[test]
fn an_error_while_mounted_made_the_root_read_only() -> Result<()> {
    let disk = Disk::with_service()?;
    disk.pack(&[])?;
    failed(&disk, 1_700_000_000, 2)?;
    let verdict = disk.verdict()?;
    let finding = verdict.finding.context("no cause")?;
    assert_eq!(finding.cause, Cause::RootReadOnly);
    assert_eq!(finding.evidence[0].source, "disk:superblock");
    assert!(
        finding.evidence[0].text.starts_with("error_count=3; "),
        "{finding:#?}"
    );
    // `errors=continue` goes on; the file system's own setting or the mount's, which counts more.
    failed(&disk, 1_700_000_000, 1)?;
    let verdict = disk.verdict()?;
    assert_eq!(verdict.verdict, VerdictKind::Healthy, "{verdict:#?}");
    assert!(errors(&verdict).is_some());
    disk.file("etc/fstab", "/dev/vda / ext4 errors=remount-ro 0 1\n")?;
    disk.pack(&[])?;
    failed(&disk, 1_700_000_000, 1)?;
    let finding = disk.verdict()?.finding.context("no cause")?;
    assert_eq!(finding.cause, Cause::RootReadOnly);
    assert!(
        finding
            .evidence
            .iter()
            .any(|q| q.source == "disk:/etc/fstab"),
        "{finding:#?}"
    );
    Ok(())
}

/// What a check on the console says is proven by what the superblock has.
#[test]
fn a_check_that_fails_quotes_the_superblock() -> Result<()> {
    use vestibule_diagnose::{Evidence, diagnose, disk::ext4::Ext4Tree};
    let disk = Disk::with_service()?;
    disk.pack(&[])?;
    failed(&disk, 1_700_010_000, 1)?;
    let console = "[    3.1] systemd[1]: Starting systemd-fsck-root.service - File System Check on Root Device...\n\
                   /dev/vda: UNEXPECTED INCONSISTENCY; RUN fsck MANUALLY.\n";
    let evidence = Evidence::new()
        .disk(Ext4Tree::open(std::fs::read(disk.image())?)?)
        .serial(console)
        .unit(crate::UNIT);
    let finding = diagnose(&evidence).finding.context("no cause")?;
    assert_eq!(finding.cause, Cause::FilesystemCheckFailed);
    let sources: Vec<_> = finding.evidence.iter().map(|q| q.source.as_str()).collect();
    assert_eq!(sources, ["serial", "disk:superblock"]);
    Ok(())
}
