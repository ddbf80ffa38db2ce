//! What PID 1 said of a unit.
use super::{Candidate, about, patterns::MANAGER};
use crate::{
    case::Case,
    elf,
    log::{Line, Speaker, run::UnitLog},
    units::service::Service,
};
use vestibule_api::{cause::Cause, finding::Finding};

/// Causes that a repeated start only repeats.
const GENERAL: &[Cause] = &[Cause::StartLimitHit];

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
    out.extend(environment_ignored(case, &log, name));
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

/// `Deactivated successfully` as the last word on a service that should stay, or again and again.
fn ended_cleanly(case: &Case<'_>, log: &UnitLog<'_>, name: &str) -> Option<Candidate> {
    let line = log.said("Deactivated successfully")?;
    let restart = log.said("Scheduled restart job");
    // A restart says `Stopped` as well; only what was asked for says `Stopping`.
    let stopped =
        log.began("Stopping ").is_some() || restart.is_none() && log.began("Stopped ").is_some();
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
    let started_again = last_start > last_end && !repeats(case, log);
    if !simple || bound || started_again {
        return None;
    }
    if stopped {
        return stopped_with_bound(case, line, name);
    }
    let why = if restart.is_some() {
        "the program ends with success, and systemd starts it anew each time: nothing failed and nothing stays"
    } else {
        "the program ended with success, and the unit with it: nothing failed and nothing runs"
    };
    let mut f = about(
        name,
        Cause::ExitedCleanly,
        line.quote(),
        why,
        "run the program in the foreground, or use Type=oneshot with RemainAfterExit=yes",
    )
    .refuted_by("a `Started` line of the unit, and its process still there a minute later");
    if let Some(restart) = restart {
        f = f.and(restart.quote());
    }
    Some(Candidate::observed(f).specific(3))
}

/// Whether the log was cut within a loop of clean ends: the last start was seen, and a minute of life after it was not.
fn repeats(case: &Case<'_>, log: &UnitLog<'_>) -> bool {
    let ends = log
        .manager
        .iter()
        .filter(|l| l.text.contains("Deactivated successfully"));
    let last = log.manager.iter().rfind(|l| l.text.starts_with("Started "));
    let since = last.and_then(|l| l.at).zip(case.log.end());
    ends.count() > 2 && since.is_some_and(|(start, end)| end - start < 60.0)
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

/// A default target that starts next to nothing, as PID 1 names it; a later one (after an initrd's) counts.
fn default_target(case: &Case<'_>, name: &str) -> Option<Candidate> {
    const SMALL: [&str; 4] = [
        "rescue.target",
        "emergency.target",
        "basic.target",
        "sysinit.target",
    ];
    let log = case.unit_log(name);
    // Where a disk is there, it knows what the target pulls in.
    if case.disk.is_some() || log.started().is_some() || log.ended_badly().is_some() {
        return None;
    }
    let is_choice = |l: &&Line| {
        l.text.starts_with("Queued start job for default target ")
            || l.text.starts_with("Unit default.target not found")
            || l.text.starts_with("Falling back to rescue.target")
    };
    let mut choices = case
        .log
        .lines
        .iter()
        .filter(|l| l.speaker == Speaker::Manager);
    let line = choices.rfind(is_choice)?;
    let target = line
        .text
        .strip_prefix("Queued start job for default target ");
    if target.is_some_and(|t| !SMALL.iter().any(|s| t.starts_with(s))) {
        return None;
    }
    let f = about(
        name,
        Cause::DefaultTargetWrong,
        line.quote(),
        "this boot starts a target that pulls in next to nothing, and the unit was never started",
        "point default.target to multi-user.target or graphical.target; take words like `single` off the command line",
    )
    .refuted_by("`Reached target multi-user.target` in the same boot");
    let reached = case.log.containing("Reached target multi-user.target");
    reached
        .is_none()
        .then(|| Candidate::observed(f).specific(6))
}

/// A line of an environment file that systemd ignored, where the program then listens elsewhere. A disk says more.
fn environment_ignored(case: &Case<'_>, log: &UnitLog<'_>, name: &str) -> Option<Candidate> {
    if case.disk.is_some() {
        return None;
    }
    let elsewhere = super::reach::logged_port(case, name).into_iter().next()?;
    let line = log.said("Ignoring invalid environment assignment 'export ")?;
    let assigned = line.text.split_once("'export ").map(|(_, rest)| rest)?;
    let (variable, _) = assigned.split_once('=')?;
    let names = if elsewhere.finding.cause == Cause::ListensOnWrongPort {
        super::reach::PORT_NAMES.as_slice()
    } else {
        super::reach::HOST_NAMES.as_slice()
    };
    let mut f = about(
        name,
        Cause::EnvironmentIgnored,
        line.quote(),
        "systemd ignored this line, because an environment file is not a shell script; so another value of the variable applies",
        "write NAME=value without `export`",
    )
    .refuted_by("the expected value in the unit's own output");
    for quote in elsewhere.finding.evidence {
        f = f.and(quote);
    }
    names.contains(&variable.trim()).then(|| {
        Candidate::observed(f)
            .specific(7)
            .explaining(&[Cause::ListensOnWrongPort, Cause::ListensOnLoopback])
    })
}

/// Lines about the unit that PID 1 says without the unit's field.
fn vm_wide(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let mut out = Vec::new();
    out.extend(default_target(case, name));
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
