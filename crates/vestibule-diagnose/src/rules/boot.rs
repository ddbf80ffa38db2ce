//! Rules about the boot itself: kernel, root device, init, mounts, checks, memory, disk space.
use super::{Candidate, Strength, notes::superblock_errors, vm};
use crate::{
    case::Case,
    log::{Line, Speaker},
    units::{exec::Problem, install::MachineId, quote_disk},
};
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
};

/// The kernel or the initrd does not find the root file system.
pub fn root_device(case: &Case<'_>) -> Vec<Candidate> {
    let log = &case.log;
    let marks = [
        "VFS: Cannot open root device",
        "VFS: Unable to mount root fs",
        "gave up waiting for root device",
        "Gave up waiting for root file system device",
        "Gave up waiting for root device",
        "find the disk with serial `vestibule-root`",
        "Timed out waiting for device dev-disk-by",
        "dracut-initqueue timeout",
    ];
    let line = log
        .any_of(&marks)
        .or_else(|| log.first(|l| l.text.contains("ALERT!") && l.text.contains("does not exist")));
    let Some(line) = line.filter(|l| l.is_console()) else {
        return Vec::new();
    };
    if line.text.starts_with("Timed out waiting")
        && case.reached_userspace()
        && log.containing("initrd").is_none()
    {
        return Vec::new();
    }
    let disks = visible_disks(case, line);
    let asked = case.cmdline.as_deref().and_then(|c| {
        c.split_whitespace()
            .find(|w| w.starts_with("root="))
            .map(str::to_owned)
    });
    let asked = asked.unwrap_or_else(|| "the root device".to_owned());
    let finding = if disks.is_empty() {
        let unbootable = "the kernel sees no block device at all: no driver for the disk is built in or in the initrd";
        vm(Cause::RootDriverMissing, line.quote(), unbootable, "boot with the initrd that belongs to this kernel, or with a kernel that has virtio_blk and ext4 built in")
            .refuted_by("a line `virtio_blk … [vda]` before this one")
    } else {
        let why = format!(
            "{asked} is not among the disks that the guest has: {}",
            disks.join(", ")
        );
        vm(
            Cause::RootDeviceMissing,
            line.quote(),
            why,
            "name a device that exists (virtio disks are /dev/vda …), or use root=UUID= or LABEL=",
        )
        .refuted_by("the named device in the list of partitions that the kernel printed")
    };
    vec![Candidate::observed(finding).explaining(&[
        Cause::KernelPanic,
        Cause::InitCrashed,
        Cause::InitMissing,
        Cause::VmmExited,
    ])]
}

fn visible_disks(case: &Case<'_>, line: &Line) -> Vec<String> {
    let listed = ["block devices:", "the kernel shows "]
        .iter()
        .find_map(|m| line.text.split_once(m));
    if let Some((_, listed)) = listed.filter(|(_, l)| !l.starts_with("no ")) {
        return listed.split_whitespace().map(str::to_owned).collect();
    }
    let mut disks = Vec::new();
    for l in case
        .log
        .lines
        .iter()
        .filter(|l| l.speaker == Speaker::Kernel)
    {
        let found = l
            .text
            .strip_prefix("virtio_blk ")
            .and_then(|t| t.split_once('['))
            .and_then(|(_, t)| t.split_once(']'));
        if let Some((name, _)) = found {
            disks.push(name.to_owned());
        } else if l.text.starts_with("sd ") && l.text.contains("Attached SCSI disk") {
            disks.push("sda".to_owned());
        } else if l.text.starts_with("nvme nvme") && l.text.contains("queues") {
            disks.push("nvme0n1".to_owned());
        }
    }
    disks
}

/// Panics that no other rule explains.
pub fn panics(case: &Case<'_>) -> Vec<Candidate> {
    let Some(panic) = case.log.containing("Kernel panic - not syncing") else {
        return Vec::new();
    };
    let log = &case.log;
    let text = panic.text.as_str();
    let memory = text.contains("deadlocked on memory") || text.contains("Out of memory");
    if memory {
        let why = "the kernel had no memory left and nothing that it could end";
        return vec![Candidate::observed(memory_finding(panic.quote(), why))];
    }
    let libs = log.first(|l| {
        l.text.contains("error while loading shared libraries") && l.text.contains("init")
    });
    let missing = log.any_of(&[
        "No working init found",
        "Requested init",
        "can't execute '/sbin/init'",
        "No init found",
    ]);
    let candidate = if text.contains("Attempted to kill init") {
        let (quote, why) = match libs {
            Some(line) => (
                line.quote(),
                "PID 1 could not be linked: a library that it needs is missing".to_owned(),
            ),
            None => match missing {
                Some(line) => {
                    let f = init_missing(line.quote()).and(panic.quote());
                    return vec![Candidate::observed(f)];
                }
                None => (
                    panic.quote(),
                    "PID 1 ended, and the kernel cannot go on without it".to_owned(),
                ),
            },
        };
        let f = vm(
            Cause::InitCrashed,
            quote,
            why,
            "rebuild the image: check that the package that holds init is complete",
        )
        .and(panic.quote())
        .refuted_by("later lines of PID 1 in the same boot");
        Candidate::observed(f).explaining(&[Cause::KernelPanic, Cause::VmmExited])
    } else if let Some(line) = missing {
        Candidate::observed(init_missing(line.quote()).and(panic.quote()))
    } else {
        let f = vm(
            Cause::KernelPanic,
            panic.quote(),
            "the kernel stopped and says why in this line",
            "read the lines before it; try the kernel that the image was built with",
        )
        .refuted_by("kernel lines with a later time in the same boot");
        let errors = superblock_errors(case).filter(|_| text.contains("EXT4-fs"));
        let f = match errors {
            Some(errors) => f.and(errors),
            None => f,
        };
        Candidate::observed(f)
            .specific(1)
            .explaining(&[Cause::VmmExited])
    };
    vec![candidate]
}

fn init_missing(quote: Quote) -> Finding {
    vm(
        Cause::InitMissing,
        quote,
        "the root file system is there, and no program that can be PID 1",
        "install systemd-sysv in the image, or correct init= on the command line",
    )
    .refuted_by("a line of PID 1 in the same boot")
}

/// What the disk says of PID 1.
pub fn init_on_disk(case: &Case<'_>) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let root = disk.base.root;
    if case.reached_userspace() || !(root.is_dir("/etc") && root.is_dir("/usr")) {
        return Vec::new();
    }
    let asked = case.cmdline.as_deref().and_then(|c| {
        c.split_whitespace()
            .rev()
            .find_map(|w| w.strip_prefix("init="))
    });
    let candidates = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];
    let path = match asked {
        Some(path) => path,
        None => match candidates.iter().find(|p| root.exists(p)) {
            Some(path) if *path != "/bin/sh" => path,
            Some(_) | None => {
                let f = init_missing(quote_disk("/sbin/init", None, "[does not exist]"));
                return vec![Candidate::fixed(f)];
            }
        },
    };
    let finding = match disk.resolver.check(path, &Default::default()) {
        None => return Vec::new(),
        Some(Problem::Missing(q)) => init_missing(q),
        Some(
            Problem::NotExecutable(q, why)
            | Problem::Format(q, why)
            | Problem::WrongArchitecture(q, why),
        ) => {
            let mut f = init_missing(q);
            f.why = format!("{path} cannot be executed: {why}");
            f
        }
        Some(Problem::Interpreter(q, why) | Problem::Library(q, why)) => vm(
            Cause::InitCrashed,
            q,
            format!("{path} ends as soon as it starts: {why}"),
            "rebuild the image: the package that holds this file is incomplete",
        )
        .refuted_by("lines of PID 1 on the console"),
    };
    vec![Candidate::fixed(finding).explaining(&[Cause::KernelPanic])]
}

/// A mount of `fstab` waits for a device that is not there.
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
    let entry = case.disk.as_ref().and_then(|d| {
        d.base.fstab.entries.iter().find(|m| {
            m.is_required() && m.target != "/" && m.device().is_some_and(|s| !is_own(case, s))
        })
    });
    let fix = "add nofail to the entry, or give the VM the device";
    if let (Some(line), Some(stop)) = (timed_out, emergency) {
        let why = "a file system that the boot requires waits for a device that never appears; systemd then gives up and starts emergency mode";
        let mut f = vm(Cause::MountDeviceMissing, line.quote(), why, fix).and(stop.quote());
        if let Some(entry) = entry {
            f = f.and(entry.quote.clone());
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
        let f = vm(Cause::MountDeviceMissing, entry.quote.clone(), why, fix)
            .refuted_by("`Reached target local-fs.target` on the console");
        out.push(Candidate::fixed(f).strength(Strength::Conditional));
    }
    out
}

/// Whether a device of `fstab` is the disk itself.
pub(super) fn is_own(case: &Case<'_>, source: &str) -> bool {
    let superblock = case.disk.as_ref().and_then(|d| d.base.root.superblock());
    let by_id = superblock.is_some_and(|s| {
        source
            .strip_prefix("UUID=")
            .is_some_and(|u| u.eq_ignore_ascii_case(&s.uuid))
            || source.strip_prefix("LABEL=").is_some_and(|l| l == s.label)
    });
    let root = case.cmdline.as_deref().and_then(|c| {
        c.split_whitespace()
            .rev()
            .find_map(|w| w.strip_prefix("root="))
    });
    by_id || root == Some(source) || (root.is_none() && source == "/dev/vda")
}

/// The root file system needs a check that the boot cannot finish.
pub fn filesystem_check(case: &Case<'_>) -> Vec<Candidate> {
    let log = &case.log;
    let manual = log.any_of(&[
        "UNEXPECTED INCONSISTENCY",
        "RUN fsck MANUALLY",
        "fsck failed with exit status 4",
        "Failed to start systemd-fsck-root.service",
        "requires a manual fsck",
        "File system check of the root filesystem failed",
    ]);
    let fix = "build or clone the image again; never write to a disk that a VM uses";
    let recorded = |f: Finding| match superblock_errors(case) {
        Some(errors) => f.and(errors),
        None => f,
    };
    if let Some(line) = manual {
        let f = vm(
            Cause::FilesystemCheckFailed,
            line.quote(),
            "the check of the root file system found damage that it does not repair by itself",
            fix,
        )
        .refuted_by("`Reached target local-fs.target` later in the same boot");
        return vec![Candidate::observed(recorded(f))];
    }
    let check = log.first(|l| {
        l.text.contains("systemd-fsck-root") && l.text.contains("File System Check on Root")
    });
    let reboot = log.first(|l| {
        l.text.starts_with("reboot: ")
            || l.text.contains("Reached target reboot.target")
            || l.text == "Rebooting."
    });
    let up = log.first(|l| {
        l.text.contains("Reached target multi-user.target")
            || l.text.contains("Reached target sysinit.target")
    });
    if let (Some(check), Some(reboot), None) = (check, reboot, up) {
        let why = "the check of the root file system repaired it and asked for a reboot before anything else started; a VM that may not reboot is gone";
        let f = vm(Cause::FilesystemCheckFailed, check.quote(), why, fix)
            .and(reboot.quote())
            .refuted_by("a reboot that somebody asked for: then sysinit.target was reached before");
        return vec![Candidate::observed(recorded(f)).explaining(&[Cause::VmmExited])];
    }
    Vec::new()
}

/// systemd-firstboot asks a question on the console.
pub fn first_boot_prompt(case: &Case<'_>) -> Vec<Candidate> {
    let prompt = case.log.first(|l| {
        l.text.contains("Please configure your system!")
            || l.text.contains("-- Press any key to proceed --")
            || (l.text.contains("Please enter") && l.text.contains("(empty to skip"))
    });
    let passed = case
        .log
        .first(|l| l.text.contains("Reached target sysinit.target"));
    let fix = "mask systemd-firstboot.service, or set a machine-id before the first boot (or systemd.firstboot=no)";
    if let Some(line) = prompt.filter(|_| passed.is_none()) {
        let f = vm(
            Cause::FirstBootPrompt,
            line.quote(),
            "systemd-firstboot waits for a key on the console, and sysinit.target waits for it",
            fix,
        )
        .refuted_by("`Reached target sysinit.target` later in the same boot");
        return vec![Candidate::observed(f)];
    }
    let Some(disk) = case.disk.as_ref().filter(|_| passed.is_none()) else {
        return Vec::new();
    };
    let MachineId::FirstBoot(quote) = &disk.base.machine_id else {
        return Vec::new();
    };
    let unit = disk.units.load("systemd-firstboot.service");
    let off = [
        "systemd.firstboot=no",
        "systemd.firstboot=0",
        "systemd.firstboot=false",
    ];
    let off = case
        .cmdline
        .as_deref()
        .is_some_and(|c| c.split_whitespace().any(|w| off.contains(&w)));
    let Some(command) = unit
        .value("Service", "ExecStart")
        .filter(|_| unit.is_loaded() && !off && disk.boot.starts(&unit.name))
    else {
        return Vec::new();
    };
    let root = disk.base.root;
    let open = [
        ("--prompt-locale", "/etc/locale.conf"),
        ("--prompt-timezone", "/etc/localtime"),
        ("--prompt-keymap", "/etc/vconsole.conf"),
        ("--prompt-root-password", "/etc/shadow"),
    ];
    let all = command.split_whitespace().any(|w| w == "--prompt");
    let missing = open.iter().find(|(word, path)| {
        (all || command.split_whitespace().any(|w| w == *word))
            && root.resolve_parent(path).is_none()
    });
    let Some((_, path)) = missing else {
        return Vec::new();
    };
    let why = format!(
        "this is a first boot, and {path} does not exist: systemd-firstboot asks for it on the console and sysinit.target waits"
    );
    let f = vm(Cause::FirstBootPrompt, quote.clone(), why, fix)
        .and(quote_disk(path, None, "[does not exist]"))
        .refuted_by("`Finished systemd-firstboot.service` on the console");
    vec![Candidate::fixed(f)]
}

fn memory_finding(quote: Quote, why: &str) -> Finding {
    vm(
        Cause::OutOfMemoryGuest,
        quote,
        why,
        "give the VM more memory than the image's manifest declares as its minimum",
    )
    .refuted_by("`constraint=CONSTRAINT_MEMCG` in the same line: then it is the unit's own limit")
}

/// The guest as a whole ran out of memory.
pub fn out_of_memory(case: &Case<'_>) -> Vec<Candidate> {
    let line = case.log.first(|l| {
        l.speaker == Speaker::Kernel
            && (l.text.contains("global_oom")
                || l.text.starts_with("Out of memory: Killed process")
                || l.text.contains("Out of memory and no killable processes"))
    });
    line.map(|l| {
        let f = memory_finding(
            l.quote(),
            "the kernel ended a process because no memory was left in the whole guest",
        );
        Candidate::observed(f).explaining(&[
            Cause::Crashed,
            Cause::OutOfMemoryCgroup,
            Cause::StartLimitHit,
            Cause::KernelPanic,
        ])
    })
    .into_iter()
    .collect()
}

/// A generator holds up PID 1 before any unit is loaded.
pub fn generator_hangs(case: &Case<'_>) -> Vec<Candidate> {
    let hanging = case
        .disk
        .as_ref()
        .and_then(|d| d.base.generators.iter().find_map(|g| g.hangs.clone()));
    let custom = case.disk.as_ref().and_then(|d| {
        d.base
            .generators
            .first()
            .map(|g| quote_disk(&g.path, None, "[a generator of its own]"))
    });
    let fix = "remove the generator, or make it end at once: PID 1 waits for every generator before it loads a unit";
    let refutes = "less than a few seconds between PID 1's first lines and `Queued start job for default target`";
    let killed = case.log.first(|l| {
        l.text.contains("system-generators/")
            && (l.text.contains("terminated by signal") || l.text.contains("timed out"))
    });
    if let Some(quote) = killed
        .map(Line::quote)
        .or_else(|| generator_gap(case).filter(|_| custom.is_some() || case.disk.is_none()))
    {
        let mut f = vm(
            Cause::GeneratorHangs,
            quote,
            "PID 1 waited for a generator until it lost patience, and loaded no unit meanwhile",
            fix,
        )
        .refuted_by(refutes);
        if let Some(q) = hanging.or(custom) {
            f = f.and(q);
        }
        return vec![Candidate::observed(f)];
    }
    match hanging {
        Some(quote) if generator_gap(case).is_some() || !case.has_run() => {
            let f = vm(
                Cause::GeneratorHangs,
                quote,
                "this generator does not end, and PID 1 waits 90 s for it before it loads any unit",
                fix,
            )
            .refuted_by(refutes);
            vec![Candidate::fixed(f).despite_run()]
        }
        Some(_) | None => Vec::new(),
    }
}

/// The line after a silence of a minute between PID 1's first lines and its first job.
fn generator_gap(case: &Case<'_>) -> Option<Quote> {
    let mut last: Option<f64> = None;
    for line in case.log.lines.iter().filter(|l| l.is_console()) {
        let Some(at) = line.at else { continue };
        if line.text.starts_with("Queued start job for default target") {
            return (at - last? > 60.0).then(|| line.quote());
        }
        if line.speaker == Speaker::Manager {
            last = Some(at);
        }
    }
    None
}
