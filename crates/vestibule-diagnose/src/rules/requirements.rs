//! Hard dependencies: `Requires=`, `Requisite=`, `BindsTo=` on units that are not there, masked, failing or gone.
use super::{Candidate, Strength, about, boot as whole_boot, load, waiting};
use crate::{
    case::{Case, DiskCase},
    units::{
        Load, Pull, Unit, boot,
        command::Command,
        condition, names,
        programs::{self, Ending},
        quote_assignment,
        service::Service,
    },
};
use vestibule_api::{cause::Cause, finding::Quote};

/// Systemd 252 was measured to start such a unit all the same, 257 to drop its job; between them nobody measured.
const DROPS_JOBS_SINCE: u32 = 257;

/// All hard dependencies of a unit.
pub fn requirements(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let unit = disk.units.load(name);
    if !unit.is_loaded() || !disk.boot.starts(name) {
        return Vec::new();
    }
    let mut out = Vec::new();
    for (dep, pull, quote) in boot::pulls(disk.units, &unit) {
        let dep = disk.units.canonical(&dep);
        let binds = match pull {
            Pull::Requires => false,
            Pull::BindsTo => true,
            Pull::Wants | Pull::Upholds => continue,
        };
        let after = waiting::is_after(&disk.boot, &unit.name, &dep);
        out.extend(unloadable(disk, name, &dep, &quote, binds && after));
        if after {
            out.extend(failing(case, disk, name, &dep, &quote, binds));
        }
        if binds {
            out.extend(bound(case, disk, name, &dep, &quote));
        }
    }
    out.extend(unmounted(case, disk, &unit));
    for (dep, quote) in waiting::named(disk, &unit, "Requisite") {
        out.extend(requisite(disk, &unit, &dep, &quote));
    }
    out
}

/// A unit that is required and cannot be loaded. Whether that matters depends: `Requires=` makes no job for it, and systemd 252 was
/// measured to start the unit at boot all the same. `BindsTo=` with `After=` (`held`) is looked at once more when the unit's turn
/// comes (`unit_verify_deps`), in every version: what is not there is not active.
fn unloadable(
    disk: &DiskCase<'_>,
    name: &str,
    dep: &str,
    quote: &Quote,
    held: bool,
) -> Option<Candidate> {
    if matches!(
        names::unit_type(dep),
        "device" | "slice" | "scope" | "mount" | "swap"
    ) {
        return None;
    }
    let (cause, why) = match &disk.units.load(dep).load {
        Load::Missing => (Cause::RequiredUnitMissing, format!("{dep} does not exist")),
        Load::Masked(_) => (Cause::RequiredUnitMasked, format!("{dep} is masked")),
        Load::Loaded | Load::Refused(_) => return None,
    };
    let what = if held {
        "is bound to it, so systemd does not start it"
    } else if drops_jobs(disk) {
        "requires it, so this systemd drops the start job"
    } else {
        return None;
    };
    let f = about(
        name,
        cause,
        quote.clone(),
        format!("{why}; the unit {what}"),
        format!("install or unmask {dep}, or use Wants="),
    )
    .refuted_by("a `Started` line of the unit in the same boot");
    // What PID 1 says of it, that the other unit is not active, is the consequence.
    let consequences = &[Cause::BoundUnitStopped, Cause::RequiredUnitFailed];
    Some(Candidate::fixed(f).explaining(consequences))
}

/// Whether this systemd drops the job of a unit that requires one that cannot be loaded.
fn drops_jobs(disk: &DiskCase<'_>) -> bool {
    let version = disk.units.systemd_version();
    version.is_some_and(|v| v >= DROPS_JOBS_SINCE)
}

/// A required unit whose start fails as far as the disk tells, so that the unit's own job fails with it.
fn failing(
    case: &Case<'_>,
    disk: &DiskCase<'_>,
    name: &str,
    dep: &str,
    quote: &Quote,
    binds: bool,
) -> Option<Candidate> {
    let unit = disk.units.load(dep);
    if names::unit_type(dep) != "service" {
        return None;
    }
    let refused = load::refusal(disk, &unit.name).map(|(_, because, why, _)| (because, why));
    // As with one that is not there, no job is made for a unit that is refused, which holds up only who is bound to it.
    if (refused.is_some() && !binds && !drops_jobs(disk))
        || (refused.is_none() && !unit.is_loaded())
    {
        return None;
    }
    // A skipped unit satisfies a requirement.
    if condition::first_false(&unit, "Condition", &disk.facts(&unit, case)).is_some() {
        return None;
    }
    let (because, why) = refused.or_else(|| start_fails(case, disk, &unit))?;
    let f = about(
        name,
        Cause::RequiredUnitFailed,
        because,
        format!("the unit requires {dep} and starts after it, and {dep} fails: {why}"),
        format!("repair {dep}, or use Wants="),
    )
    .and(quote.clone())
    .refuted_by(format!("`Finished` or `Started {dep}` in the same boot"));
    Some(
        Candidate::fixed(f)
            .specific(6)
            .explaining(&[Cause::UnitNotEnabled]),
    )
}

/// A mount that a path of the unit needs (`RequiresMountsFor=`, and the directories of `systemd.exec(5)` that imply it) and whose
/// device is not there. An entry without `nofail` stops the whole boot, which is another cause.
fn unmounted(case: &Case<'_>, disk: &DiskCase<'_>, unit: &Unit) -> Option<Candidate> {
    let service = Service::new(unit, disk.base.root, &disk.base.accounts);
    let mut needs: Vec<(String, Quote)> = Vec::new();
    for a in unit.all("Unit", "RequiresMountsFor") {
        let paths = a
            .value
            .split_whitespace()
            .filter_map(|p| service.expand(p).ok());
        needs.extend(paths.map(|p| (p, quote_assignment(a))));
    }
    for key in ["WorkingDirectory", "RootDirectory", "RootImage"] {
        let own = unit
            .last("Service", key)
            .filter(|a| a.value.starts_with('/'));
        needs.extend(own.and_then(|a| Some((service.expand(&a.value).ok()?, quote_assignment(a)))));
    }
    let (entry, quote) = needs.into_iter().find_map(|(path, quote)| {
        let mut entries = disk.base.fstab.entries.iter();
        let entry = entries.find(|m| {
            let below = path
                .strip_prefix(m.target.as_str())
                .filter(|_| m.target.len() > 1);
            below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                && (m.has("nofail") || m.has("noauto"))
                && m.device()
                    .is_some_and(|source| !whole_boot::is_own(case, source))
        })?;
        Some((entry, quote))
    })?;
    let f = about(
        &unit.name,
        Cause::RequiredUnitFailed,
        entry.quote.clone(),
        format!(
            "the unit requires the mount of {}, and nothing shows that the VM has {}",
            entry.target, entry.source
        ),
        format!(
            "give the VM the device, or do not make the unit depend on {}",
            entry.target
        ),
    )
    .and(quote)
    .refuted_by(format!("`Mounted {}` in the same boot", entry.target));
    Some(
        Candidate::fixed(f)
            .strength(Strength::Conditional)
            .specific(6),
    )
}

/// Whether a service's start job fails, and the line that says so. For `Type=simple` a missing program is no failed job.
fn start_fails(case: &Case<'_>, disk: &DiskCase<'_>, unit: &Unit) -> Option<(Quote, String)> {
    let assert = condition::first_false(unit, "Assert", &disk.facts(unit, case));
    if let Some(a) = assert {
        return Some((
            quote_assignment(a),
            "its assertion is false in this image".into(),
        ));
    }
    let service = Service::new(unit, disk.base.root, &disk.base.accounts);
    let awaited = service.start_is_awaited() || service.kind() == "exec";
    // Which status a command ends with is not looked at: one of those may be meant.
    let forgiven = unit.has("Service", "SuccessExitStatus");
    let mut earlier: Vec<Command> = Vec::new();
    if let Some((path, quote)) = service.environment().missing.into_iter().next() {
        return Some((quote, format!("its environment file {path} does not exist")));
    }
    for command in service
        .commands()
        .into_iter()
        .filter_map(Result::ok)
        .filter(|c| !c.optional)
    {
        if command.key == "ExecCondition" || (command.key == "ExecStart" && !awaited) {
            continue;
        }
        let quote = || quote_assignment(&command.assignment);
        let fails = match waiting::ending_of(disk, &command) {
            Some(Ending::Failure) => !forgiven,
            Some(Ending::Test(op, path)) => {
                !forgiven
                    && !earlier.iter().any(|c| programs::may_make(c, &path))
                    && waiting::test_fails(disk, op, &path) == Some(true)
            }
            Some(Ending::Success(_) | Ending::Never) | None => false,
        };
        if fails {
            return Some((quote(), "this command fails".into()));
        }
        let limit = service.start_timeout();
        if limit.is_finite() && waiting::ending_of(disk, &command) == Some(Ending::Never) {
            let why = format!("this command does not end, and systemd ends it after {limit:.0} s");
            return Some((quote(), why));
        }
        earlier.push(command);
    }
    let broken = super::exec::commands(case, &unit.name)
        .into_iter()
        .next()
        .filter(|_| awaited);
    broken.map(|c| {
        (
            c.finding
                .evidence
                .into_iter()
                .next()
                .unwrap_or_else(|| unit.quote_file()),
            c.finding.why,
        )
    })
}

/// `BindsTo=` a service that ends by itself: the unit is stopped with it.
fn bound(
    case: &Case<'_>,
    disk: &DiskCase<'_>,
    name: &str,
    dep: &str,
    quote: &Quote,
) -> Option<Candidate> {
    let unit = disk.units.load(dep);
    if names::unit_type(dep) != "service" || !unit.is_loaded() {
        return None;
    }
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    let stays = unit.flag("Service", "RemainAfterExit") == Some(true);
    let restarts = matches!(
        unit.value("Service", "Restart"),
        Some("always" | "on-success")
    );
    let skipped = condition::first_false(&unit, "Condition", &disk.facts(&unit, case)).is_some();
    let ends = match service.main().and_then(|c| waiting::ending_of(disk, &c)) {
        Some(Ending::Success(_) | Ending::Failure) => true,
        Some(Ending::Never | Ending::Test(..)) | None => false,
    };
    let gone = skipped || (ends && !stays && !restarts);
    if !gone {
        return None;
    }
    let why = format!(
        "the unit is bound to {dep}, which {}; systemd stops the unit with it",
        if skipped {
            "is skipped"
        } else {
            "ends by itself"
        }
    );
    let f = about(
        name,
        Cause::BoundUnitStopped,
        unit.quote("Service", "ExecStart"),
        why,
        format!("use Wants=, or give {dep} RemainAfterExit=yes"),
    )
    .and(quote.clone())
    .refuted_by(format!("{dep} still active when the unit is looked for"));
    Some(Candidate::fixed(f).specific(6))
}

/// `Requisite=` a unit that nothing starts before it.
fn requisite(disk: &DiskCase<'_>, unit: &Unit, dep: &str, quote: &Quote) -> Option<Candidate> {
    let loaded = disk.units.load(dep).is_loaded();
    // No job can be made to verify it, and such a unit starts (booted with 252), as with `Requires=`.
    if !loaded && !drops_jobs(disk) {
        return None;
    }
    let starts = loaded && disk.boot.starts(dep);
    // Wanted by the same boot but not ordered before: at the time of the check it is not active yet.
    let ordered = waiting::is_after(&disk.boot, &unit.name, dep);
    if starts && ordered {
        return None;
    }
    let why = if starts {
        format!(
            "the unit demands that {dep} is active already, and is not ordered after it, so the check comes too early"
        )
    } else {
        format!("the unit demands that {dep} is active already, and nothing in this boot starts it")
    };
    let f = about(
        &unit.name,
        Cause::RequisiteInactive,
        quote.clone(),
        why,
        format!("use Requires= with After={dep}"),
    )
    .refuted_by(format!("`Started {dep}` before the unit's own start"));
    Some(Candidate::fixed(f).specific(6))
}
