//! Why a start job is skipped, dropped, or still waits.
use super::{Candidate, Strength, about};
use crate::{
    case::{Case, DiskCase},
    log::Line,
    units::{
        Unit, boot, condition, names,
        programs::{self, Ending},
        quote_assignment,
        service::Service,
    },
};
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
};

/// Seconds that a unit may wait for another without being late.
const SHORT_WAIT: f64 = 15.0;

/// Conditions and asserts that the disk decides.
pub fn conditions(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let unit = disk.units.load(name);
    if !unit.is_loaded() || !disk.boot.starts(name) {
        return Vec::new();
    }
    let facts = disk.facts(&unit, case);
    let refutes = "a `Started` line of the unit in the same boot";
    if let Some(a) = condition::first_false(&unit, "Condition", &facts) {
        let why = format!(
            "{}={} is false in this image, so systemd skips the unit: nothing fails and nothing starts",
            a.key, a.value
        );
        let f = about(
            name,
            Cause::ConditionUnmet,
            quote_assignment(a),
            why,
            "make the condition true in the image, or remove it",
        );
        return vec![Candidate::fixed(f.refuted_by(refutes)).specific(6)];
    }
    if let Some(a) = condition::first_false(&unit, "Assert", &facts) {
        let why = format!(
            "{}={} is false in this image, so the start job fails",
            a.key, a.value
        );
        let f = about(
            name,
            Cause::AssertFailed,
            quote_assignment(a),
            why,
            "make the assertion true in the image, or remove it",
        );
        return vec![Candidate::fixed(f.refuted_by(refutes)).specific(6)];
    }
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    for command in service.commands_of("ExecCondition") {
        let fails = match programs::ending(&command) {
            Some(Ending::Failure) => true,
            Some(Ending::Test(op, path)) => test_fails(disk, op, &path) == Some(true),
            Some(Ending::Success(_) | Ending::Never) | None => false,
        };
        if fails {
            let f = about(
                name,
                Cause::ConditionUnmet,
                quote_assignment(&command.assignment),
                "this condition command fails in this image, so systemd skips the unit",
                "make the command succeed in the image, or remove it",
            );
            return vec![Candidate::fixed(f.refuted_by(refutes)).specific(6)];
        }
    }
    Vec::new()
}

/// Whether `test -op path` fails, where the disk decides.
pub(super) fn test_fails(disk: &DiskCase<'_>, op: char, path: &str) -> Option<bool> {
    use crate::{disk::Kind, units::runtime_paths::Presence};
    match disk.paths.presence(disk.base.root, path) {
        Presence::Absent => Some(true),
        Presence::Unknown => None,
        Presence::There => {
            let meta = disk.base.root.stat(path)?;
            Some(!match op {
                'e' | 'r' | 'w' => true,
                'f' => meta.kind == Kind::File,
                'd' => meta.kind == Kind::Dir,
                's' => meta.size > 0,
                'x' => meta.mode & 0o111 != 0,
                'S' | 'p' | 'b' | 'c' => meta.kind == Kind::Special,
                _ => return None,
            })
        }
    }
}

/// An ordering cycle through the unit.
pub fn cycle(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let canonical = disk.units.canonical(name);
    if disk.boot.matters(&canonical) || !disk.units.load(name).is_loaded() {
        return Vec::new();
    }
    let Some(path) = disk.boot.cycle(&canonical) else {
        return Vec::new();
    };
    let ring: Vec<&str> = path.iter().map(|(later, _, _)| later.as_str()).collect();
    let why = format!(
        "each of these is ordered after the next, in a ring: {} → {name}; systemd breaks it by deleting a start job that nothing requires",
        ring.join(" → ")
    );
    let mut quotes = path.iter().filter_map(|(_, _, quote)| quote.clone());
    let first = quotes
        .next()
        .unwrap_or_else(|| disk.units.load(name).quote_file());
    let mut f = about(
        name,
        Cause::OrderingCycle,
        first,
        why,
        "remove one of the quoted After= or Before= lines",
    );
    for q in quotes.take(3) {
        f = f.and(q);
    }
    vec![
        Candidate::fixed(f.refuted_by(
            "a `Started` line of the unit in the same boot: systemd deleted another job",
        ))
        .specific(6),
    ]
}

/// A unit of the same transaction conflicts with it.
pub fn conflict(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let canonical = disk.units.canonical(name);
    if !disk.boot.starts(name) {
        return Vec::new();
    }
    let Some((other, quote)) = disk.boot.conflict(&canonical) else {
        return Vec::new();
    };
    let why = format!(
        "{other} is started by the same boot and conflicts with the unit; systemd drops the job of the one that is conflicted with, without a word"
    );
    let f = about(
        name,
        Cause::ConflictingUnit,
        quote,
        why,
        format!("remove the Conflicts= of {other}, or do not start both"),
    );
    vec![
        Candidate::fixed(f.refuted_by("a `Started` line of the unit in the same boot")).specific(6),
    ]
}

/// Predecessors whose start never ends.
pub fn waits_for_others(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let canonical = disk.units.canonical(name);
    if !disk.boot.starts(name) {
        return Vec::new();
    }
    let mut out = Vec::new();
    let silent = case.has_run() && case.unit_log(name).is_empty();
    for (predecessor, chain) in disk.boot.waits_for(&canonical) {
        let unit = disk.units.load(&predecessor);
        let last = chain.last().and_then(|(_, q)| q.clone());
        let starting = silent.then(|| still_starting(case, &predecessor)).flatten();
        if let Some((line, seconds)) = starting {
            let f = about(
                name,
                Cause::WaitsForUnit,
                line.quote(),
                format!(
                    "the unit is ordered after {predecessor}, whose start had not ended {seconds:.0} s later, when the log ended"
                ),
                format!("make {predecessor} end, give it TimeoutStartSec=, or drop the ordering"),
            );
            let f = last.into_iter().fold(f, Finding::and);
            let f = f.refuted_by(format!(
                "`Finished` or `Started {predecessor}` in the same boot"
            ));
            out.push(Candidate::observed(f).specific(6));
            continue;
        }
        let Some((quote, limit)) = never_ends(case, disk, &unit) else {
            continue;
        };
        let until = if limit.is_finite() {
            format!("for {limit:.0} s")
        } else {
            "for ever".to_owned()
        };
        if let Some(own) = job_limit(&unit_of(disk, name)).filter(|l| *l < limit) {
            let f = job_timeout(name, own, &unit_of(disk, name), quote);
            out.push(Candidate::fixed(f));
            continue;
        }
        // Soon given up, it only delays the unit; whether the unit requires it is another rule's question.
        if limit <= SHORT_WAIT {
            continue;
        }
        let why = format!(
            "the unit is ordered after {predecessor}, whose start does not end; it waits {until}"
        );
        let mut f = about(
            name,
            Cause::WaitsForUnit,
            quote,
            why,
            format!("make {predecessor} end, give it TimeoutStartSec=, or drop the ordering"),
        );
        if let Some(q) = last {
            f = f.and(q);
        }
        let f = f.refuted_by(format!(
            "`Finished` or `Started {predecessor}` in the same boot"
        ));
        out.push(Candidate::fixed(f).specific(6));
    }
    out
}

/// The `Starting` line of a service whose start had not ended, and how much longer the log goes on. A wait for the network is
/// told by [`super::network`].
fn still_starting<'c>(case: &'c Case<'_>, predecessor: &str) -> Option<(&'c Line, f64)> {
    const PATIENCE: f64 = 30.0;
    if names::unit_type(predecessor) != "service" || predecessor.contains("wait-online") {
        return None;
    }
    let line = case.unit_log(predecessor).open_start()?;
    let seconds = case.log.end()? - case.log.time_of(line)?;
    (seconds > PATIENCE).then_some((line, seconds))
}

fn unit_of(disk: &DiskCase<'_>, name: &str) -> std::rc::Rc<Unit> {
    disk.units.load(name)
}

/// Seconds after which the unit's own job is given up while it waits.
pub(super) fn job_limit(unit: &Unit) -> Option<f64> {
    unit.seconds("Unit", "JobTimeoutSec").filter(|s| *s > 0.0)
}

pub(super) fn job_timeout(name: &str, limit: f64, unit: &Unit, wait: Quote) -> Finding {
    let why = format!(
        "the unit's job is given up after {limit:.0} s, which is less than what it may have to wait"
    );
    about(
        name,
        Cause::JobTimeout,
        unit.quote("Unit", "JobTimeoutSec"),
        why,
        "remove JobTimeoutSec=, or remove what the unit waits for",
    )
    .and(wait)
    .refuted_by("a `Started` line of the unit in the same boot")
}

/// The line that keeps a unit's start from ending, and how long systemd lets it, where the disk tells.
fn never_ends(case: &Case<'_>, disk: &DiskCase<'_>, unit: &Unit) -> Option<(Quote, f64)> {
    if names::unit_type(&unit.name) != "service" || !unit.is_loaded() {
        return None;
    }
    // A run that shows its end refutes it.
    if case.unit_log(&unit.name).started().is_some() {
        return None;
    }
    if condition::first_false(unit, "Condition", &disk.facts(unit, case)).is_some() {
        return None;
    }
    let service = Service::new(unit, disk.base.root, &disk.base.accounts);
    for command in service.commands().into_iter().filter_map(Result::ok) {
        let blocks = match command.key.as_str() {
            "ExecStart" => service.start_is_awaited(),
            _ => true,
        };
        if blocks && ending_of(disk, &command) == Some(Ending::Never) {
            return Some((
                quote_assignment(&command.assignment),
                service.start_timeout(),
            ));
        }
    }
    None
}

/// How a command ends, also through a shell script on the disk.
pub(super) fn ending_of(
    disk: &DiskCase<'_>,
    command: &crate::units::command::Command,
) -> Option<Ending> {
    programs::ending(command).or_else(|| {
        let path = if command.program.starts_with('/') {
            command.program.clone()
        } else {
            return None;
        };
        let path = programs::script_of(command).unwrap_or(path);
        let text = disk.base.root.read_script(&path)?;
        let shell = text.lines().next()?;
        shell
            .contains("sh")
            .then(|| programs::script_ending(&text))?
    })
}

/// Units that a unit names as `key`.
pub(super) fn named(disk: &DiskCase<'_>, unit: &Unit, key: &str) -> Vec<(String, Quote)> {
    unit.all("Unit", key)
        .into_iter()
        .flat_map(|a| {
            a.value
                .split_whitespace()
                .map(move |n| (n.to_owned(), quote_assignment(a)))
        })
        .map(|(n, q)| (disk.units.canonical(&n), q))
        .collect()
}

/// Whether the transaction orders `later` after `earlier`.
pub(super) fn is_after(boot: &boot::Boot<'_>, later: &str, earlier: &str) -> bool {
    boot.is_directly_after(later, earlier)
}

/// The strength of something that depends on what happens outside.
pub(super) const OUTSIDE: Strength = Strength::Conditional;
