//! What a run said: PID 1's lines about the unit, the program's own lines, jobs still running, the agent's report.
use super::{Candidate, about};
use crate::{
    case::Case,
    elf,
    log::{Line, console, run::UnitLog},
    text::ellipsized,
    units::service::Service,
};
use vestibule_api::{cause::Cause, finding::Finding};

/// Causes that a repeated start only repeats.
const GENERAL: &[Cause] = &[Cause::StartLimitHit];

struct Pattern {
    needle: &'static str,
    cause: Cause,
    specific: u8,
    why: &'static str,
    fix: &'static str,
}

const fn p(
    needle: &'static str,
    cause: Cause,
    specific: u8,
    why: &'static str,
    fix: &'static str,
) -> Pattern {
    Pattern {
        needle,
        cause,
        specific,
        why,
        fix,
    }
}

/// Lines of PID 1 about a unit, in order of how much they explain. The first that matches decides.
const MANAGER: &[Pattern] = &[
    p(
        "deleted to break ordering cycle",
        Cause::OrderingCycle,
        8,
        "systemd deleted the unit's start job to break an ordering cycle",
        "remove one of the orderings that PID 1 names",
    ),
    p(
        "is masked",
        Cause::UnitMasked,
        6,
        "PID 1 says that the unit is masked",
        "remove the mask",
    ),
    p(
        "Service has no ExecStart=",
        Cause::UnitWithoutExec,
        8,
        "PID 1 refuses the unit because it has no command",
        "give the [Service] section an ExecStart=",
    ),
    p(
        "Service lacks both ExecStart= and ExecStop=",
        Cause::UnitWithoutExec,
        8,
        "PID 1 refuses the unit because it has no command",
        "give the [Service] section an ExecStart=",
    ),
    p(
        "Neither a valid executable name nor an absolute path",
        Cause::ExecPathInvalid,
        8,
        "PID 1 refuses the unit's command",
        "write an absolute path, or a bare program name",
    ),
    p(
        "Failed to resolve unit specifiers in",
        Cause::ExecPathInvalid,
        6,
        "PID 1 refuses a specifier in the unit",
        "write a literal % as %%",
    ),
    p(
        "Unit configuration has fatal error",
        Cause::ExecPathInvalid,
        5,
        "PID 1 refuses a path in the unit",
        "correct the line that PID 1 names before this one",
    ),
    p(
        "Refusing.",
        Cause::UnitSettingsRefused,
        6,
        "PID 1 refuses the unit's combination of settings",
        "correct the setting that PID 1 names",
    ),
    p(
        "failed to load properly",
        Cause::UnitFileUnreadable,
        6,
        "PID 1 cannot parse the unit's file",
        "save the file as UTF-8 text with correct section headers",
    ),
    p(
        "was skipped because of an unmet condition check",
        Cause::ConditionUnmet,
        8,
        "a condition was false, so the unit was skipped",
        "make the condition true, or remove it",
    ),
    p(
        "was skipped because no trigger condition checks were met",
        Cause::ConditionUnmet,
        8,
        "none of the unit's alternatives was true, so it was skipped",
        "make one of them true, or remove them",
    ),
    p(
        "Skipped due to 'exec-condition'",
        Cause::ConditionUnmet,
        8,
        "the unit's ExecCondition= said no, so it was skipped",
        "make the command succeed, or remove it",
    ),
    p(
        "asserts failed",
        Cause::AssertFailed,
        8,
        "an assertion was false, so the start job failed",
        "make the assertion true, or remove it",
    ),
    p(
        "Assertion failed for",
        Cause::AssertFailed,
        7,
        "an assertion was false, so the start job failed",
        "make the assertion true, or remove it",
    ),
    p(
        "but unit isn't active",
        Cause::BoundUnitStopped,
        8,
        "the unit that it is bound to was not active any more",
        "use Wants=, or give that unit RemainAfterExit=yes",
    ),
    p(
        "/start timed out",
        Cause::JobTimeout,
        8,
        "the job was given up while it waited",
        "remove JobTimeoutSec=, or what the unit waits for",
    ),
    p(
        "Timed out starting",
        Cause::JobTimeout,
        7,
        "the job was given up while it waited",
        "remove JobTimeoutSec=, or what the unit waits for",
    ),
    p(
        "Failed to load environment files",
        Cause::EnvironmentFileMissing,
        8,
        "an environment file does not exist, so the unit fails before it runs",
        "create the file, or write EnvironmentFile=-",
    ),
    p(
        "status=217/USER",
        Cause::UserMissing,
        7,
        "the user that the unit names does not exist",
        "create the user in the image",
    ),
    p(
        "status=216/GROUP",
        Cause::GroupMissing,
        7,
        "the group that the unit names does not exist",
        "create the group in the image",
    ),
    p(
        "status=200/CHDIR",
        Cause::WorkingDirectoryMissing,
        7,
        "the unit cannot change to its working directory",
        "create the directory in the image",
    ),
    p(
        "status=226/NAMESPACE",
        Cause::NamespacePathMissing,
        7,
        "systemd could not set up the unit's mount namespace",
        "create the path, or put a dash before it",
    ),
    p(
        "status=231/APPARMOR",
        Cause::SecurityProfileMissing,
        7,
        "the unit's AppArmor profile is not loaded",
        "ship and load the profile",
    ),
    p(
        "status=229/SELINUX",
        Cause::SecurityProfileMissing,
        7,
        "the unit's SELinux context cannot be used",
        "ship the policy, or remove the line",
    ),
    p(
        "status=243/CREDENTIALS",
        Cause::CredentialMissing,
        7,
        "a credential that the unit loads is not there",
        "provide it, or give a default with SetCredential=",
    ),
    p(
        "status=228/SECCOMP",
        Cause::KilledBySeccomp,
        7,
        "the unit's system call filter could not be applied",
        "correct SystemCallFilter=",
    ),
    p(
        "status=31/SYS",
        Cause::KilledBySeccomp,
        7,
        "the program made a system call that the unit's filter does not allow",
        "widen SystemCallFilter=",
    ),
    p(
        "status=4/ILL",
        Cause::IllegalInstruction,
        7,
        "the program used an instruction that this CPU does not have",
        "give the VM a CPU model with that instruction, or build the program for this one",
    ),
    p(
        "Watchdog timeout",
        Cause::WatchdogKilled,
        8,
        "the program did not ping systemd's watchdog in time",
        "send WATCHDOG=1 in time, or remove WatchdogSec=",
    ),
    p(
        "result 'watchdog'",
        Cause::WatchdogKilled,
        8,
        "the program did not ping systemd's watchdog in time",
        "send WATCHDOG=1 in time, or remove WatchdogSec=",
    ),
    p(
        "start-pre operation timed out",
        Cause::PreStartFailed,
        7,
        "a command before the program did not end in time",
        "make the command end",
    ),
    p(
        "start operation timed out",
        Cause::NeverNotifiedReady,
        7,
        "the program never said that it was ready",
        "send READY=1, or use another Type=",
    ),
    p(
        "status=11/SEGV",
        Cause::Crashed,
        4,
        "the program died of a segmentation fault",
        "find the crash in the program's own output or a core dump",
    ),
    p(
        "status=6/ABRT",
        Cause::Crashed,
        4,
        "the program aborted",
        "find the reason in the program's own output",
    ),
    p(
        "status=7/BUS",
        Cause::Crashed,
        4,
        "the program died of a bus error",
        "look for a truncated file that it maps",
    ),
    p(
        "status=8/FPE",
        Cause::Crashed,
        4,
        "the program died of an arithmetic error",
        "find the crash in the program's own output",
    ),
    p(
        "status=5/TRAP",
        Cause::Crashed,
        4,
        "the program died of a trap",
        "find the reason in the program's own output",
    ),
    p(
        "result 'core-dump'",
        Cause::Crashed,
        3,
        "the program dumped core",
        "find the crash in the core dump",
    ),
];

/// PID 1 about the unit.
pub fn manager_lines(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let log = case.unit_log(name);
    let mut out = Vec::new();
    if let Some(found) = exec_step(case, &log, name) {
        out.push(Candidate::observed(found).specific(7).explaining(GENERAL));
    }
    if let Some(found) = memory_limit(case, &log, name) {
        out.push(
            Candidate::observed(found)
                .specific(8)
                .explaining(&[Cause::StartLimitHit, Cause::Crashed]),
        );
    }
    for pattern in MANAGER {
        if let Some(line) = log.said(pattern.needle) {
            let cause = refine(case, name, pattern.cause);
            let f = about(name, cause, line.quote(), pattern.why, pattern.fix)
                .refuted_by("a later `Started` line of the unit, and its process still there");
            out.push(
                Candidate::observed(f)
                    .specific(pattern.specific)
                    .explaining(if pattern.specific > 4 { GENERAL } else { &[] }),
            );
            break;
        }
    }
    out.extend(dependency(case, &log, name));
    out.extend(pre_start(case, &log, name));
    if let Some(line) = log.said("Start request repeated too quickly") {
        let mut f = about(
            name,
            Cause::StartLimitHit,
            line.quote(),
            "the program ended so often in so short a time that systemd gave up",
            "repair the program: the first failure is the reason",
        )
        .refuted_by("a later `Started` line of the unit");
        if let Some(first) = log.said("Main process exited") {
            f = f.and(first.quote());
        }
        out.push(Candidate::observed(f).specific(2));
    }
    out.extend(ended_cleanly(case, &log, name));
    out.extend(vm_wide(case, name));
    out
}

/// MDWE turns an abort into a memory protection finding.
fn refine(case: &Case<'_>, name: &str, cause: Cause) -> Cause {
    let denies = case.disk.as_ref().is_some_and(|d| {
        d.units.load(name).flag("Service", "MemoryDenyWriteExecute") == Some(true)
    });
    if cause == Cause::Crashed && denies {
        Cause::MemoryProtection
    } else {
        cause
    }
}

/// `Failed to locate|execute PROGRAM: reason`, which `status=203/EXEC` only repeats.
fn exec_step(case: &Case<'_>, log: &UnitLog<'_>, name: &str) -> Option<Finding> {
    let line = log.manager.iter().find(|l| {
        l.text.contains("Failed to locate executable ")
            || l.text.contains("Failed to execute ")
            || l.text.contains("Failed at step EXEC spawning ")
    });
    let line = line.copied().or_else(|| log.said("status=203/EXEC"))?;
    let tail = line
        .text
        .split_once(": ")
        .map_or(line.text.as_str(), |(_, t)| t);
    let located = tail.starts_with("Failed to locate executable");
    let program = tail
        .split_whitespace()
        .find(|w| w.starts_with('/'))
        .map(|w| w.trim_end_matches(':').to_owned());
    let on_disk = case.disk.as_ref().zip(program.as_ref());
    let there = on_disk.map(|(d, p)| d.base.root.exists(p));
    let (cause, why, fix) = if tail.contains("Permission denied") {
        (
            Cause::ExecNotExecutable,
            "the program may not be executed",
            "give it execute permission on a file system that allows it",
        )
    } else if tail.contains("Exec format error") {
        let machine = on_disk.and_then(|(d, p)| {
            Some((elf::read(d.base.root, p).ok()?.machine, d.resolver.machine?))
        });
        match machine {
            Some((is, want)) if is != want => (
                Cause::ExecWrongArchitecture,
                "the program is built for another architecture",
                "install the program for the guest's architecture",
            ),
            _ => (
                Cause::ExecFormat,
                "the file is neither a binary nor a script with an interpreter line",
                "give a script a first line like #!/bin/sh; replace a damaged binary",
            ),
        }
    } else if tail.contains("No such file")
        && !located
        && (tail.starts_with("Failed to execute") || there == Some(true))
    {
        (
            Cause::ExecInterpreterMissing,
            "the file exists, and the interpreter that it names does not",
            "install the interpreter, or correct the file's first line",
        )
    } else if tail.contains("No such file") {
        (
            Cause::ExecMissing,
            "the program is not there",
            "install it, or correct the path",
        )
    } else if tail.contains("status=203/EXEC") {
        (
            Cause::ExecMissing,
            "systemd could not execute the program; the line that says why is not in the evidence",
            "look at the program's path in the image",
        )
    } else {
        return None;
    };
    Some(
        about(name, cause, line.quote(), why, fix)
            .refuted_by("a line that the unit's own process printed in the same boot"),
    )
}

fn memory_limit(case: &Case<'_>, log: &UnitLog<'_>, name: &str) -> Option<Finding> {
    let kernel = case.log.first(|l| {
        (l.text.contains("CONSTRAINT_MEMCG") && l.text.contains(name))
            || l.text
                .starts_with("Memory cgroup out of memory: Killed process")
    });
    let said = log
        .said("result 'oom-kill'")
        .or_else(|| log.said("killed by the OOM killer"));
    let global = case
        .log
        .first(|l| {
            l.text.contains("global_oom") || l.text.starts_with("Out of memory: Killed process")
        })
        .is_some();
    let line = match (kernel, said) {
        (Some(line), Some(_)) => line,
        (Some(line), None) if line.text.contains(name) => line,
        (None, Some(line)) if !global => line,
        _ => return None,
    };
    Some(
        about(
            name,
            Cause::OutOfMemoryCgroup,
            line.quote(),
            "the unit reached its own memory limit and the kernel ended a process of it",
            "raise MemoryMax= of the unit",
        )
        .refuted_by("`global_oom` in the kernel's line: then the whole guest is out of memory"),
    )
}

/// `Dependency failed for UNIT`: the root of the chain is the cause.
fn dependency(case: &Case<'_>, log: &UnitLog<'_>, name: &str) -> Option<Candidate> {
    let line = log.began("Dependency failed for")?;
    if log.said("but unit isn't active").is_some()
        || log.said("deleted to break ordering cycle").is_some()
    {
        return None;
    }
    let disk = case.disk.as_ref();
    let named: Vec<(String, &str)> = disk
        .map(|d| {
            let unit = d.units.load(name);
            ["Requires", "BindsTo", "Requisite"]
                .iter()
                .flat_map(|k| {
                    super::waiting::named(d, &unit, k)
                        .into_iter()
                        .map(move |(n, _)| (n, *k))
                })
                .collect()
        })
        .unwrap_or_default();
    let failed = named
        .iter()
        .find_map(|(n, _)| case.unit_log(n).ended_badly().map(|l| (n.clone(), l)));
    let f = match failed {
        Some((dep, because)) => about(
            name,
            Cause::RequiredUnitFailed,
            because.quote(),
            format!("the unit requires {dep}, and {dep} failed"),
            format!("repair {dep}, or use Wants="),
        )
        .and(line.quote()),
        None => match named.iter().find(|(_, key)| *key == "Requisite") {
            Some((dep, _)) => about(
                name,
                Cause::RequisiteInactive,
                line.quote(),
                format!("the unit demands that {dep} is active already, and it was not"),
                format!("use Requires= with After={dep}"),
            ),
            None => {
                // Without a disk: the first unit that failed before.
                let because = case
                    .log
                    .lines
                    .iter()
                    .take_while(|l| !std::ptr::eq(*l, line))
                    .find(|l| l.text.starts_with("Failed to start "));
                let quote = because.unwrap_or(line).quote();
                about(
                    name,
                    Cause::RequiredUnitFailed,
                    quote,
                    "a unit that it requires failed",
                    "repair that unit, or use Wants=",
                )
                .and(line.quote())
            }
        },
    };
    Some(Candidate::observed(f.refuted_by("a later `Started` line of the unit")).specific(6))
}

/// `Control process exited` before the program was started.
fn pre_start(case: &Case<'_>, log: &UnitLog<'_>, name: &str) -> Option<Candidate> {
    let line = log.said("Control process exited")?;
    let has_pre = case
        .disk
        .as_ref()
        .map(|d| d.units.load(name).has("Service", "ExecStartPre"));
    if has_pre == Some(false)
        || log.said("result 'exec-condition'").is_some()
        || line.text.contains("code=exited, status=0")
    {
        return None;
    }
    let f = about(
        name,
        Cause::PreStartFailed,
        line.quote(),
        "a command that runs before the program failed, so the program was not started",
        "make the command succeed, or put a dash before it",
    )
    .refuted_by("a `Started` line of the unit before this one: then it was a stop command");
    (log.started().is_none()).then(|| Candidate::observed(f).specific(6).explaining(GENERAL))
}

/// `Deactivated successfully` as the last word on a service that should stay.
fn ended_cleanly(case: &Case<'_>, log: &UnitLog<'_>, name: &str) -> Option<Candidate> {
    let line = log.said("Deactivated successfully")?;
    let stopped = log.began("Stopping ").is_some() || log.began("Stopped ").is_some();
    let simple = match &case.disk {
        Some(disk) => {
            let unit = disk.units.load(name);
            let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
            unit.is_loaded() && service.kind() != "oneshot"
        }
        None => true,
    };
    let last_start = log
        .manager
        .iter()
        .rposition(|l| l.text.starts_with("Started "));
    let last_end = log
        .manager
        .iter()
        .rposition(|l| l.text.contains("Deactivated successfully"));
    let bound = log.said("but unit isn't active").is_some();
    if !simple || bound || last_start > last_end {
        return None;
    }
    if stopped {
        return stopped_with_bound(case, line, name);
    }
    let f = about(
        name,
        Cause::ExitedCleanly,
        line.quote(),
        "the program ended with success, and the unit with it: nothing failed and nothing runs",
        "run the program in the foreground, or use Type=oneshot with RemainAfterExit=yes",
    )
    .refuted_by("a later `Started` line of the unit");
    Some(Candidate::observed(f).specific(3))
}

/// A stop that follows the end of a unit that it is bound to.
fn stopped_with_bound(case: &Case<'_>, line: &Line, name: &str) -> Option<Candidate> {
    let disk = case.disk.as_ref()?;
    let unit = disk.units.load(name);
    let (dep, ended) = ["BindsTo", "Requires", "PartOf"]
        .iter()
        .flat_map(|k| super::waiting::named(disk, &unit, k))
        .find_map(|(dep, _)| {
            let log = case.unit_log(&dep);
            let ended = log
                .said("Deactivated successfully")
                .or_else(|| log.ended_badly())?;
            Some((dep, ended.quote()))
        })?;
    let f = about(
        name,
        Cause::BoundUnitStopped,
        ended,
        format!("{dep} ended, and systemd stopped the unit with it"),
        format!("use Wants=, or give {dep} RemainAfterExit=yes"),
    )
    .and(line.quote())
    .refuted_by("a stop that somebody asked for");
    Some(Candidate::observed(f).specific(6))
}

/// Lines about the unit that PID 1 says without the unit's field.
fn vm_wide(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let mut out = Vec::new();
    let deleted = case.log.first(|l| {
        l.text
            .contains(&format!("Job {name}/start deleted to break ordering cycle"))
    });
    if let Some(line) = deleted {
        let f = about(
            name,
            Cause::OrderingCycle,
            line.quote(),
            "systemd deleted the unit's start job to break an ordering cycle",
            "remove one of the orderings that PID 1 names",
        )
        .refuted_by("a `Started` line of the unit in the same boot");
        out.push(Candidate::observed(f).specific(8));
    }
    let ignored = case.log.first(|l| {
        l.text.contains("dependency dropin") && l.text.contains("ignoring") && {
            let stem = name.rsplit_once('.').map_or(name, |(s, _)| s);
            l.text.contains(&format!("/{name} ")) || l.text.contains(&format!("/{stem} "))
        }
    });
    if let Some(line) = ignored.filter(|_| case.unit_log(name).started().is_none()) {
        let f = about(
            name,
            Cause::EnablementLinkInvalid,
            line.quote(),
            "PID 1 ignores the entry that should enable the unit",
            format!("remove it and run `systemctl --root=… enable {name}`"),
        )
        .refuted_by("a `Started` line of the unit in the same boot");
        out.push(Candidate::observed(f).specific(8));
    }
    out
}

/// What the program itself printed, and what stands on a console without a name.
pub fn program_lines(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    const SAID: &[Pattern] = &[
        p(
            "error while loading shared libraries",
            Cause::SharedLibraryMissing,
            8,
            "the dynamic linker ended the program before it began",
            "install the package that holds the library",
        ),
        p(
            "Cannot find module",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and the script or module that it is told to run is missing",
            "install the program and its dependencies",
        ),
        p(
            "ERR_MODULE_NOT_FOUND",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and a module is missing",
            "install the program's dependencies",
        ),
        p(
            "ModuleNotFoundError",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and a module is missing",
            "install the program's dependencies",
        ),
        p(
            "can't open file",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and the script that it is told to run is missing",
            "install the program, or correct the path",
        ),
        p(
            "Unable to access jarfile",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and its archive is missing",
            "install the program, or correct the path",
        ),
        p(
            "EADDRINUSE",
            Cause::PortInUse,
            8,
            "another process holds the port",
            "find the other listener, or change the port",
        ),
        p(
            "Address already in use",
            Cause::PortInUse,
            8,
            "another process holds the port",
            "find the other listener, or change the port",
        ),
        p(
            "address already in use",
            Cause::PortInUse,
            8,
            "another process holds the port",
            "find the other listener, or change the port",
        ),
        p(
            "EADDRNOTAVAIL",
            Cause::WrongAddress,
            6,
            "the program binds to an address that the guest does not have",
            "bind to 0.0.0.0",
        ),
        p(
            "getaddrinfo ENOTFOUND",
            Cause::LocalhostUnresolvable,
            8,
            "the program cannot resolve the name that it binds to",
            "bind to an address, or add the name to /etc/hosts",
        ),
        p(
            "getaddrinfo EAI_AGAIN",
            Cause::LocalhostUnresolvable,
            8,
            "the program cannot resolve the name that it binds to",
            "bind to an address, or add the name to /etc/hosts",
        ),
        p(
            "Name or service not known",
            Cause::LocalhostUnresolvable,
            7,
            "the program cannot resolve the name that it binds to",
            "bind to an address, or add the name to /etc/hosts",
        ),
        p(
            "No usable sandbox",
            Cause::BrowserNotReady,
            6,
            "Chromium found no sandbox that it can use",
            "allow user namespaces to the browser's user",
        ),
        p(
            "ENOSPC",
            Cause::DiskFull,
            8,
            "the program could not write because the file system is full",
            "make the image or its overlay larger",
        ),
        p(
            "EROFS",
            Cause::RootReadOnly,
            8,
            "the program could not write because the file system is read-only",
            "mount the root read-write, or give it an overlay",
        ),
    ];
    let log = case.unit_log(name);
    let refutes = "a later line of the program that says that it is ready";
    let mut out = Vec::new();
    for pattern in SAID {
        let line = log.printed(|t| t.contains(pattern.needle)).or_else(|| {
            // Without a unit's field, a console line counts where the unit itself is known to have failed.
            case.log
                .first(|l| l.is_console() && l.unit.is_none() && l.text.contains(pattern.needle))
                .filter(|_| log.ended_badly().is_some())
        });
        if let Some(line) = line {
            let f = about(name, pattern.cause, line.quote(), pattern.why, pattern.fix)
                .refuted_by(refutes);
            out.push(
                Candidate::observed(f)
                    .specific(pattern.specific)
                    .explaining(&[Cause::StartLimitHit, Cause::Crashed]),
            );
            break;
        }
    }
    let mdwe = case.disk.as_ref().and_then(|d| {
        let unit = d.units.load(name);
        (unit.flag("Service", "MemoryDenyWriteExecute") == Some(true))
            .then(|| unit.quote("Service", "MemoryDenyWriteExecute"))
    });
    let refused = log.printed(|t| {
        t.contains("SetPermissions")
            || t.contains("Failed to reserve virtual memory for CodeRange")
            || t.contains("mprotect")
            || t.contains("Fatal process out of memory")
    });
    if let Some((setting, line)) = mdwe.zip(refused) {
        let f = about(
            name,
            Cause::MemoryProtection,
            line.quote(),
            "the program asked for executable memory and the unit's settings refuse it",
            "remove MemoryDenyWriteExecute= for this unit",
        )
        .and(setting)
        .refuted_by(refutes);
        out.push(
            Candidate::observed(f)
                .specific(8)
                .explaining(&[Cause::Crashed, Cause::StartLimitHit]),
        );
    }
    out
}

/// The last job that PID 1 reported as running, when the unit was never started.
pub fn waiting_jobs(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let unit = case.unit_log(name);
    if unit.started().is_some() || unit.ended_badly().is_some() {
        return Vec::new();
    }
    let jobs: Vec<(&Line, console::RunningJob)> = case
        .log
        .lines
        .iter()
        .filter_map(|l| Some((l, console::running_job(&l.text)?)))
        .collect();
    let Some((line, job)) = jobs
        .iter()
        .rev()
        .max_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds))
    else {
        return Vec::new();
    };
    let ended = |what: &str| {
        case.log
            .lines
            .iter()
            .rev()
            .take_while(|l| l.number > line.number)
            .any(|l| {
                let rest = ["Started ", "Finished ", "Found device ", "Failed to start "]
                    .iter()
                    .find_map(|v| l.text.strip_prefix(v));
                rest.is_some_and(|r| {
                    r.starts_with(what.split('…').next().unwrap_or(what))
                        || r.contains(what)
                        || ellipsized(what, r.split(" - ").next().unwrap_or(r))
                })
            })
    };
    if job.seconds < 30.0 || ended(&job.what) || ellipsized(&job.what, name) {
        return Vec::new();
    }
    // Only what the unit waits for may be blamed, where the disk knows.
    if let Some(disk) = &case.disk {
        let waits = disk.boot.waits_for(&disk.units.canonical(name));
        let known = waits.keys().any(|w| {
            let full = disk.units.load(w);
            ellipsized(&job.what, w)
                || ellipsized(&job.what, full.description())
                || ellipsized(&job.what, &format!("{w} - {}", full.description()))
        });
        if !known {
            return Vec::new();
        }
    }
    let network = job.what.contains("wait-online")
        || job.what.contains("Wait for Network")
        || job.what.contains("online");
    let cause = if network {
        Cause::WaitsForNetworkOnline
    } else {
        Cause::WaitsForUnit
    };
    let why = format!(
        "the start job of {} had run for {:.0} s when the log ended, and the unit was never started",
        job.what, job.seconds
    );
    let f = about(
        name,
        cause,
        line.quote(),
        why,
        "give that unit a timeout, or do not order the unit after it",
    )
    .refuted_by("a `Started` line of the unit in the same boot");
    vec![Candidate::observed(f)]
}

/// The agent's report: units, jobs and what they wait for.
pub fn reported(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(report) = &case.report else {
        return Vec::new();
    };
    let quote = |text: String| vestibule_api::finding::Quote {
        source: "report".into(),
        line: None,
        text,
    };
    let mut out = Vec::new();
    if let Some(job) = report
        .jobs
        .iter()
        .find(|j| j.unit == name && j.kind == "start" && !j.waits_for.is_empty())
    {
        let on = job.waits_for.join(", ");
        let network = job
            .waits_for
            .iter()
            .any(|w| w.contains("network-online") || w.contains("wait-online"));
        let cause = if network {
            Cause::WaitsForNetworkOnline
        } else {
            Cause::WaitsForUnit
        };
        let f = about(
            name,
            cause,
            quote(format!(
                "job {} of {} is {} and waits for {on}",
                job.id, job.unit, job.state
            )),
            format!("the unit's start job waits for {on}"),
            "make that unit end, or drop the ordering",
        )
        .refuted_by("the unit active in a later report");
        out.push(Candidate::observed(f));
    }
    let Some(unit) = report.units.iter().find(|u| u.name == name) else {
        return out;
    };
    let text = format!(
        "{}: load {}, active {} ({}), result {}",
        unit.name, unit.load, unit.active, unit.sub, unit.result
    );
    let cause = match (
        unit.load.as_str(),
        unit.active.as_str(),
        unit.result.as_str(),
    ) {
        ("masked", _, _) => Some(Cause::UnitMasked),
        ("not-found", _, _) => Some(Cause::UnitFileMissing),
        (_, "failed", "start-limit-hit") => Some(Cause::StartLimitHit),
        (_, "failed", "timeout") => Some(Cause::NeverNotifiedReady),
        (_, "failed", "watchdog") => Some(Cause::WatchdogKilled),
        (_, "failed", "oom-kill") => Some(Cause::OutOfMemoryCgroup),
        (_, "failed", "signal" | "core-dump") => Some(Cause::Crashed),
        _ => None,
    };
    if let Some(cause) = cause {
        let f = about(
            name,
            cause,
            quote(text),
            format!(
                "systemd in the guest says so of the unit: {}",
                cause.meaning()
            ),
            "see the unit's own lines for the reason",
        )
        .refuted_by("the unit active in a later report");
        out.push(Candidate::observed(f).specific(3));
    }
    out
}
