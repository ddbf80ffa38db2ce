//! One verdict out of many findings: the earliest stage with the strongest evidence.
use crate::{
    case::Case,
    rules::{self, Candidate, Strength},
};
use std::collections::HashSet;
use vestibule_api::{
    cause::{Cause, Note, Stage},
    finding::{Finding, Verdict, VerdictKind},
};

/// Runs every rule and weighs what they say.
pub(crate) fn judge(case: &Case<'_>) -> Verdict {
    let mut candidates: Vec<Candidate> =
        rules::VM_RULES.iter().flat_map(|rule| rule(case)).collect();
    for unit in &case.units {
        let runs = {
            let log = case.unit_log(unit);
            log.speaks() || log.runs() && reached_its_program(case, unit)
        };
        let found = rules::UNIT_RULES.iter().flat_map(|rule| rule(case, unit));
        candidates.extend(found.filter(|c| !(runs && c.refuted_by_run)));
    }
    let (missed, failure) = match &case.host.failure {
        Some(finding) if finding.cause.is_missed_milestone() => (Some(finding.clone()), None),
        other => (None, other.clone()),
    };
    candidates.extend(failure.map(|finding| Candidate::observed(finding).specific(1)));
    let explained: HashSet<Cause> = candidates
        .iter()
        .filter(|c| c.strength >= Strength::Conditional)
        .flat_map(|c| c.explains.iter().copied())
        .collect();
    let mut weighed: Vec<Candidate> = candidates
        .into_iter()
        .filter(|c| !explained.contains(&c.finding.cause))
        .collect();
    weighed.sort_by_key(rank);
    let notes = rules::notes::all(case);
    let mut findings = dedup(
        weighed
            .iter()
            .filter(|c| c.strength >= Strength::Conditional)
            .map(|c| c.finding.clone())
            // The runner saw where the VM stopped: that is the verdict only where nothing says why.
            .chain(missed),
    );
    let finding = if findings.is_empty() {
        None
    } else {
        Some(findings.remove(0))
    };
    let suspicions: Vec<Finding> = dedup(
        weighed
            .iter()
            .filter(|c| c.strength == Strength::Suspicion)
            .map(|c| c.finding.clone()),
    );
    let verdict = match &finding {
        Some(_) => VerdictKind::Cause,
        None if suspicions.is_empty() && looks_healthy(case) => VerdictKind::Healthy,
        None => VerdictKind::Unknown,
    };
    findings.extend(suspicions);
    Verdict {
        verdict,
        finding,
        also: findings,
        notes,
        looked_at: looked_at(case),
        collect_next: if verdict == VerdictKind::Unknown {
            collect_next(case)
        } else {
            Vec::new()
        },
        elapsed_ms: 0,
    }
}

/// Strong evidence before weak, then the earlier stage, then what says more.
fn rank(
    c: &Candidate,
) -> (
    bool,
    Stage,
    std::cmp::Reverse<u8>,
    std::cmp::Reverse<Strength>,
) {
    (
        c.strength < Strength::Static,
        c.finding.stage,
        std::cmp::Reverse(c.specific),
        std::cmp::Reverse(c.strength),
    )
}

/// One finding of each cause and unit, the first.
fn dedup(findings: impl Iterator<Item = Finding>) -> Vec<Finding> {
    let mut seen = HashSet::new();
    findings
        .filter(|f| seen.insert((f.cause, f.unit.clone())))
        .collect()
}

/// `Started` alone proves nothing for `Type=simple`; for types that wait it does.
fn reached_its_program(case: &Case<'_>, unit: &str) -> bool {
    let Some(disk) = &case.disk else { return false };
    let loaded = disk.units.load(unit);
    let service = crate::units::service::Service::new(&loaded, disk.base.root, &disk.base.accounts);
    service.start_is_awaited()
}

/// Whether nothing in the evidence speaks against health, and enough was seen to say so.
fn looks_healthy(case: &Case<'_>) -> bool {
    if case.host.failed || case.units.is_empty() {
        return false;
    }
    if let Some(report) = &case.report {
        let active = |name: &String| {
            report
                .units
                .iter()
                .any(|u| u.name == *name && u.active == "active")
        };
        if case.units.iter().all(active) {
            return true;
        }
    }
    let seen = case.units.iter().all(|u| case.unit_log(u).runs());
    let sound = case.disk.as_ref().is_some_and(|d| {
        case.units
            .iter()
            .all(|u| d.units.load(u).is_loaded() && d.boot.starts(u))
    });
    if seen {
        return true;
    }
    // Silence of a run is no proof of health, unless the unit's own settings explain it.
    let explained = rules::notes::all(case)
        .iter()
        .any(|n| !matches!(n.note, Note::EvidenceClock | Note::EvidenceFileSystemErrors));
    sound && (!case.has_run() || explained)
}

fn looked_at(case: &Case<'_>) -> Vec<String> {
    let kinds = [
        (case.disk.is_some(), "disk"),
        (case.serial_given, "serial"),
        (case.journal_given, "journal"),
        (case.cmdline.is_some(), "cmdline"),
        (case.report.is_some(), "report"),
        (case.host.exit.is_some() || case.host.phase.is_some(), "vmm"),
    ];
    kinds
        .iter()
        .filter(|(there, _)| *there)
        .map(|(_, kind)| (*kind).to_owned())
        .collect()
}

fn collect_next(case: &Case<'_>) -> Vec<String> {
    let mut next = Vec::new();
    if let Some(why) = &case.disk_error {
        next.push(format!("a disk that can be read ({why})"));
    } else if case.disk.is_none() {
        next.push("the disk, or the image that the VM was made from (--disk)".to_owned());
    }
    if !case.serial_given {
        next.push("the serial console from its first byte (--serial), with console=ttyS0 on the command line".to_owned());
    }
    if !case.log.has_journal {
        next.push(
            "the journal of that boot (--journal), or StandardOutput=journal+console for the unit"
                .to_owned(),
        );
    }
    if case.report.is_none() {
        next.push("the agent's report, or `systemctl list-jobs` in the guest".to_owned());
    }
    next
}
