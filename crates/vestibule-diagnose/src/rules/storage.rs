//! Rules about room and writability of the root file system.
use super::{Candidate, Strength, notes::superblock_errors, vm};
use crate::{
    case::Case,
    units::{Load, quote_disk},
};
use vestibule_api::{cause::Cause, finding::Quote};

/// The disk is full, by its superblock or by what programs said.
pub fn disk_space(case: &Case<'_>) -> Vec<Candidate> {
    let fix = "make the image larger, or find out what fills it; an overlay needs room for what the guest writes";
    let said = case.log.first(|l| {
        l.text.contains("No space left on device") && !super::said::is_of_watches(&l.text)
    });
    let superblock = case.disk.as_ref().and_then(|d| d.base.root.superblock());
    let free = superblock.filter(|s| s.blocks > 0).map(|s| {
        (
            s.free_blocks.saturating_mul(s.block_size),
            s.free_inodes,
            s.blocks,
        )
    });
    let overlay = case
        .cmdline
        .as_deref()
        .is_some_and(|c| c.contains("vestibule.overlay") || c.contains("overlayroot"));
    let full = free.filter(|(bytes, inodes, _)| (*bytes < 1 << 20 || *inodes < 8) && !overlay);
    let quote_super = full.map(|(bytes, inodes, blocks)| {
        quote_disk(
            "superblock",
            None,
            &format!("{bytes} bytes and {inodes} inodes are free of {blocks} blocks"),
        )
    });
    if let Some(line) = said {
        let mut f = vm(
            Cause::DiskFull,
            line.quote(),
            "something could not write because the file system is full",
            fix,
        );
        if let Some(q) = quote_super {
            f = f.and(q);
        }
        return vec![
            Candidate::observed(
                f.refuted_by("free blocks in the superblock of the disk after the run"),
            )
            .specific(7),
        ];
    }
    if let Some(quote) = quote_super {
        let f = vm(Cause::DiskFull, quote, "the root file system has no room: the journal cannot be kept and programs that write at their start fail", fix)
            .refuted_by("a root that is mounted under an overlay, which has room of its own");
        return vec![Candidate::fixed(f).specific(7)];
    }
    writers_failed(case, false).map(|(q, also)| {
        let why = "the services whose whole work is a small write to /var failed together, on a root that is mounted read-write";
        let f = vm(Cause::DiskFull, q, why, fix).and(also).refuted_by("free blocks in the superblock of the disk after the run");
        Candidate::observed(f).specific(7)
    }).into_iter().collect()
}

/// `systemd-random-seed` and `systemd-update-utmp` both failed, on a root mounted as asked.
fn writers_failed(case: &Case<'_>, read_only: bool) -> Option<(Quote, Quote)> {
    let failed = |name: &str, description: &str| {
        case.log.first(|l| {
            let rest = l
                .text
                .strip_prefix("Failed to start ")
                .map(|r| r.trim_end_matches('.'));
            rest.is_some_and(|r| {
                crate::text::ellipsized(r, &format!("{name} - {description}"))
                    || r == format!("{name} - {description}")
            })
        })
    };
    let seed = failed("systemd-random-seed.service", "Load/Save Random Seed")?;
    let utmp = failed(
        "systemd-update-utmp.service",
        "Record System Boot/Shutdown in UTMP",
    )?;
    (mounted_read_only(case) == read_only).then(|| (seed.quote(), utmp.quote()))
}

fn mounted_read_only(case: &Case<'_>) -> bool {
    let said = case
        .log
        .any_of(&["Remounting filesystem read-only", "Read-only file system"])
        .is_some();
    let cmdline_rw = case
        .cmdline
        .as_deref()
        .is_some_and(|c| c.split_whitespace().any(|w| w == "rw"));
    let fstab = case.disk.as_ref().and_then(|d| d.base.fstab.root());
    said || match fstab {
        Some(root) => root.has("ro"),
        None => case.disk.is_some() && !cmdline_rw,
    }
}

/// The root file system cannot be written.
pub fn read_only_root(case: &Case<'_>) -> Vec<Candidate> {
    let fix = "mount the root read-write (rw on the command line, no ro in fstab), or give it an overlay; after an ext4 error, build the image again";
    let remounted = case
        .log
        .first(|l| l.text.contains("Remounting filesystem read-only"));
    let said = case.log.first(|l| {
        // Every root is made read-only in the end.
        !l.stopping
            && (l.text.contains("Read-only file system")
                || l.text.contains("EROFS")
                || l.text.contains("read-only file system, "))
    });
    let fstab = case
        .disk
        .as_ref()
        .and_then(|d| d.base.fstab.root())
        .filter(|m| m.has("ro"));
    let overlay = case.cmdline.as_deref().is_some_and(|c| {
        c.contains("vestibule.overlay")
            || c.contains("overlayroot")
            || c.contains("systemd.volatile")
    });
    let writers = writers_failed(case, true);
    if let Some(line) = remounted.or(said) {
        let mut f = vm(
            Cause::RootReadOnly,
            line.quote(),
            "something could not write because the root file system is read-only",
            fix,
        )
        .refuted_by("`rw` for / in /proc/mounts of the running guest");
        if let Some(m) = fstab {
            f = f.and(m.quote.clone());
        }
        if let Some(errors) = superblock_errors(case).filter(|_| remounted.is_some()) {
            f = f.and(errors);
        }
        return vec![Candidate::observed(f).specific(7)];
    }
    if let Some((seed, utmp)) = writers {
        let f = vm(Cause::RootReadOnly, seed, "the services whose whole work is a small write to /var failed together, and the root is mounted read-only", fix).and(utmp)
            .refuted_by("`rw` for / in /proc/mounts of the running guest");
        return vec![Candidate::observed(f).specific(7)];
    }
    match fstab {
        Some(m) if !overlay => {
            let f = vm(Cause::RootReadOnly, m.quote.clone(), "systemd-remount-fs makes / read-only as this line says, so nothing under /var or /etc can be written", fix)
                .refuted_by("an overlay over the root");
            vec![Candidate::fixed(f).strength(Strength::Conditional)]
        }
        Some(_) | None if !overlay => remounted_after_error(case)
            .or_else(|| never_remounted(case))
            .into_iter()
            .collect(),
        Some(_) | None => Vec::new(),
    }
}

/// The kernel mounts the root read-only as it is told, and nothing mounts it anew: systemd-remount-fs does that for an entry of
/// `/` in `fstab` (`systemd-remount-fs.service(8)`).
fn never_remounted(case: &Case<'_>) -> Option<Candidate> {
    let disk = case.disk.as_ref()?;
    let cmdline = case.cmdline.as_deref()?;
    let mode = cmdline
        .split_whitespace()
        .rfind(|w| matches!(*w, "ro" | "rw"))?;
    let service = disk.units.load("systemd-remount-fs.service");
    let runs = case.units.iter().all(|unit| case.unit_log(unit).runs());
    if mode == "rw" || (runs && !case.units.is_empty()) {
        return None;
    }
    let missing = match (disk.base.fstab.root(), &service.load) {
        (_, Load::Masked(by)) => by.clone(),
        (None, Load::Loaded) => quote_disk("/etc/fstab", None, "[no entry for /]"),
        (_, Load::Loaded | Load::Missing | Load::Refused(_)) => return None,
    };
    let quote = Quote {
        source: "cmdline".into(),
        line: None,
        text: mode.to_owned(),
    };
    let f = vm(
        Cause::RootReadOnly,
        quote,
        "the kernel mounts / read-only as this word says, and nothing makes it writable, so nothing under /var or /etc can be written",
        "say rw on the command line, or give / an entry in /etc/fstab and leave systemd-remount-fs.service alone",
    )
    .and(missing)
    .refuted_by("`rw` for / in /proc/mounts of the running guest, or an initrd that mounts an overlay");
    Some(Candidate::fixed(f).strength(Strength::Conditional))
}

/// The kernel met an error during the last mount, of a file system that becomes read-only then, and somebody waits for a
/// unit that was not seen to run. An error of an earlier mount says nothing about the last one.
fn remounted_after_error(case: &Case<'_>) -> Option<Candidate> {
    const REMOUNT: u16 = 2;
    let disk = case.disk.as_ref()?;
    let superblock = disk.base.root.superblock()?;
    let option = disk.base.fstab.root().and_then(|m| {
        ["continue", "remount-ro", "panic"]
            .into_iter()
            .find(|v| m.has(&format!("errors={v}")))
    });
    let becomes_read_only = option.map_or(superblock.on_error == REMOUNT, |v| v == "remount-ro");
    let runs = case.units.iter().all(|unit| case.unit_log(unit).runs());
    if !superblock.failed_while_mounted() || !becomes_read_only || (runs && !case.units.is_empty())
    {
        return None;
    }
    let why = "the kernel met an error on the root file system while it was mounted last, and made it read-only then, as it is set to";
    let fix = "build or clone the image again, and never write to a disk that a VM uses; `e2fsck -fn` on a copy says what is wrong";
    let mut f = vm(Cause::RootReadOnly, superblock_errors(case)?, why, fix).and(quote_disk(
        "superblock",
        None,
        &format!(
            "mounted last at {} s since 1970, errors behaviour {}",
            superblock.mounted_at, superblock.on_error
        ),
    ));
    if let Some(root) = disk.base.fstab.root().filter(|_| option.is_some()) {
        f = f.and(root.quote.clone());
    }
    let f = f.refuted_by(
        "`rw` for / in /proc/mounts of the running guest; a clock that was wrong at the last mount",
    );
    Some(Candidate::fixed(f).strength(Strength::Conditional))
}
