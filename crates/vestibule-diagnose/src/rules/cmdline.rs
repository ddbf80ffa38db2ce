//! Rules about words of the kernel's command line that lead away from the disk, or from what starts its units
//! (`kernel-command-line(7)`, the kernel's `admin-guide/kernel-parameters`).
use super::{Candidate, about, vm};
use crate::{case::Case, disk::Resolved, units::quote_disk};
use vestibule_api::{cause::Cause, finding::Quote};

/// The last word that begins with `key`, and its value.
fn last<'c>(case: &'c Case<'_>, key: &str) -> Option<(Quote, &'c str)> {
    let mut words = case.cmdline.as_deref()?.split_whitespace().rev();
    words.find_map(|word| {
        let value = word.strip_prefix(key)?;
        let quote = Quote {
            source: "cmdline".into(),
            line: None,
            text: word.to_owned(),
        };
        Some((quote, value))
    })
}

/// `root=` names another file system than the one that is here. A partition is no contradiction: what is here may be a copy of it.
pub fn root_on_disk(case: &Case<'_>) -> Vec<Candidate> {
    let superblock = case.disk.as_ref().and_then(|d| d.base.root.superblock());
    let (Some(superblock), Some((word, root))) = (superblock, last(case, "root=")) else {
        return Vec::new();
    };
    if case.reached_userspace() {
        return Vec::new();
    }
    let id = |tag: &str, path: &str| {
        let value = root.strip_prefix(tag).or_else(|| root.strip_prefix(path));
        value.map(|v| v.trim_matches('"'))
    };
    let uuid = id("UUID=", "/dev/disk/by-uuid/");
    let label = id("LABEL=", "/dev/disk/by-label/");
    let (why, is) = if uuid.is_some_and(|u| !u.eq_ignore_ascii_case(&superblock.uuid)) {
        (
            "the root file system has another UUID than the command line asks for",
            format!("UUID {}", superblock.uuid),
        )
    } else if label.is_some_and(|l| l != superblock.label) {
        (
            "the root file system has another label than the command line asks for",
            format!("label `{}`", superblock.label),
        )
    } else {
        return Vec::new();
    };
    let f = vm(
        Cause::RootDeviceMissing,
        word,
        why,
        "name a device that exists (virtio disks are /dev/vda …), or use root=UUID= or LABEL=",
    )
    .and(quote_disk("superblock", None, &is))
    .refuted_by("lines of PID 1 in a boot with this command line");
    vec![Candidate::fixed(f)]
}

/// `init=` names a shell, which starts no units.
pub fn init_is_a_shell(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    const SHELLS: [&str; 7] = ["ash", "bash", "busybox", "dash", "ksh", "sh", "zsh"];
    let (Some(disk), Some((word, init))) = (&case.disk, last(case, "init=")) else {
        return Vec::new();
    };
    let mut words = case
        .cmdline
        .as_deref()
        .unwrap_or_default()
        .split_whitespace();
    let Resolved::Found(real, _) = disk.base.root.resolve(init) else {
        return Vec::new();
    };
    let program = real.rsplit('/').next().unwrap_or_default();
    // What follows ` -- ` is given to it, and may be a command that goes on to systemd.
    if case.reached_userspace() || !SHELLS.contains(&program) || words.any(|w| w == "--") {
        return Vec::new();
    }
    let f = about(
        name,
        Cause::DefaultTargetWrong,
        word,
        format!("the kernel starts {real} as PID 1 in place of systemd, so no target is reached and no unit starts"),
        "take init= off the command line",
    )
    .refuted_by("lines of systemd as PID 1 in a boot with this command line");
    vec![Candidate::fixed(f).specific(8)]
}
