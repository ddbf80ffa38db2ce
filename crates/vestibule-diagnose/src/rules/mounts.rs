//! Rules about what is mounted: the root file system itself, and the mounts that a boot requires.
use super::{Candidate, Strength, boot::is_own, vm};
use crate::{
    case::{Case, DiskCase},
    units::{Pull, boot::pulls, names, quote_disk},
};
use vestibule_api::{cause::Cause, finding::Quote};

/// The image ends before its file system does, and a kernel refuses to mount that (`ext4_check_geometry`).
pub fn incomplete_image(case: &Case<'_>) -> Vec<Candidate> {
    let superblock = case.disk.as_ref().and_then(|d| d.base.root.superblock());
    let (Some(superblock), Some(len)) = (superblock, case.image_len) else {
        return Vec::new();
    };
    let needed = superblock.blocks.saturating_mul(superblock.block_size);
    if needed <= len || case.reached_userspace() {
        return Vec::new();
    }
    let quote = quote_disk(
        "superblock",
        None,
        &format!(
            "{} blocks of {} bytes",
            superblock.blocks, superblock.block_size
        ),
    );
    let why = format!(
        "the root file system has {needed} bytes and its image only {len}: the image is incomplete, and the kernel does not mount it"
    );
    let f = vm(
        Cause::KernelPanic,
        quote,
        why,
        "copy or build the image again; it was cut short",
    )
    .refuted_by("`EXT4-fs (vda): mounted filesystem` on the console; then only this copy of the image is incomplete");
    vec![Candidate::fixed(f).explaining(&[Cause::InitMissing, Cause::InitCrashed])]
}

/// A mount that the boot requires, by `fstab` or by a unit of its own.
struct Required {
    target: String,
    source: String,
    quote: Quote,
}

/// The first required mount of a device that nothing shows to be there.
fn required(case: &Case<'_>, disk: &DiskCase<'_>) -> Option<Required> {
    let mut entries = disk.base.fstab.entries.iter();
    let entry = entries.find(|m| {
        m.is_required() && m.target != "/" && m.device().is_some_and(|s| !is_own(case, s))
    });
    let by_fstab = entry.map(|m| Required {
        target: m.target.clone(),
        source: m.source.clone(),
        quote: m.quote.clone(),
    });
    by_fstab.or_else(|| by_unit(case, disk))
}

/// `local-fs.target` requires a mount unit, as `RequiredBy=` makes it.
fn by_unit(case: &Case<'_>, disk: &DiskCase<'_>) -> Option<Required> {
    let target = "local-fs.target";
    let local = disk.units.load(target);
    let all = pulls(disk.units, &local);
    let mut required = all.into_iter().filter(|(name, pull, _)| {
        matches!(pull, Pull::Requires | Pull::BindsTo) && names::unit_type(name) == "mount"
    });
    required.find_map(|(name, _, _)| {
        let unit = disk.units.load(&name);
        let source = unit.value("Mount", "What")?.to_owned();
        let tag = source
            .strip_prefix("/dev/disk/by-")
            .and_then(|link| link.split_once('/'))
            .map(|(tag, id)| format!("{}={id}", tag.to_uppercase()));
        let source = tag.unwrap_or(source);
        let tagged = ["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="];
        let device = source.starts_with("/dev/") || tagged.iter().any(|t| source.starts_with(t));
        let starts = unit.is_loaded() && disk.boot.starts(target);
        (starts && device && !is_own(case, &source)).then(|| Required {
            target: unit.value("Mount", "Where").unwrap_or(&name).to_owned(),
            source,
            quote: unit.quote("Mount", "What"),
        })
    })
}

/// A mount waits for a device that is not there.
pub fn mount_device(case: &Case<'_>) -> Vec<Candidate> {
    let mut out = Vec::new();
    let timed_out = case.log.first(|l| {
        l.text.starts_with("Timed out waiting for device")
            || l.text.contains(".device: Job") && l.text.contains("timed out")
    });
    let emergency = case.log.any_of(&[
        "Dependency failed for local-fs.target",
        "Reached target emergency.target",
        "You are in emergency mode",
    ]);
    let entry = case.disk.as_ref().and_then(|disk| required(case, disk));
    let fix = "add nofail to the entry, or give the VM the device";
    if let (Some(line), Some(stop)) = (timed_out, emergency) {
        let why = "a file system that the boot requires waits for a device that never appears; systemd then gives up and starts emergency mode";
        let mut f = vm(Cause::MountDeviceMissing, line.quote(), why, fix).and(stop.quote());
        if let Some(entry) = entry {
            f = f.and(entry.quote);
        }
        out.push(Candidate::observed(
            f.refuted_by("`Found device` for it later in the same boot"),
        ));
    } else if let Some(entry) = entry
        && case
            .log
            .first(|l| l.text.contains("Reached target local-fs.target"))
            .is_none()
    {
        let why = format!(
            "local-fs.target requires {}, and nothing shows that the VM has {}; the boot waits 90 s and ends in emergency mode",
            entry.target, entry.source
        );
        let f = vm(Cause::MountDeviceMissing, entry.quote, why, fix)
            .refuted_by("`Reached target local-fs.target` on the console");
        // What a run says later in the boot outweighs it.
        let strength = if case.has_run() {
            Strength::Conditional
        } else {
            Strength::Static
        };
        out.push(Candidate::fixed(f).strength(strength));
    }
    out
}
