//! Hard dependencies: `Requires=`, `Requisite=`, `BindsTo=` on units that are not there, masked, failing or gone.
use super::{Candidate, Strength, about, load, waiting};
use crate::{
    case::{Case, DiskCase},
    units::{Load, Unit, condition, names, programs::Ending, service::Service},
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
    for key in ["Requires", "BindsTo"] {
        for (dep, quote) in waiting::named(disk, &unit, key) {
            out.extend(unloadable(disk, name, &dep, &quote));
            if waiting::is_after(&disk.boot, &unit.name, &dep) {
                out.extend(failing(case, disk, name, &dep, &quote));
            }
            if key == "BindsTo" {
                out.extend(bound(case, disk, name, &dep, &quote));
            }
        }
    }
    for (dep, quote) in waiting::named(disk, &unit, "Requisite") {
        out.extend(requisite(disk, &unit, &dep, &quote));
    }
    out
}

fn unloadable(disk: &DiskCase<'_>, name: &str, dep: &str, quote: &Quote) -> Option<Candidate> {
    if matches!(
        names::unit_type(dep),
        "device" | "slice" | "scope" | "mount" | "swap"
    ) {
        return None;
    }
    let (cause, why) = match &disk.units.load(dep).load {
        Load::Missing => (
            Cause::RequiredUnitMissing,
            format!("the unit requires {dep}, which does not exist"),
        ),
        Load::Masked(_) => (
            Cause::RequiredUnitMasked,
            format!("the unit requires {dep}, which is masked"),
        ),
        Load::Loaded | Load::Refused(_) => return None,
    };
    let version = disk.units.systemd_version();
    // Measured: systemd 252 starts such a unit at boot all the same.
    let strength = if version.is_some_and(|v| v >= DROPS_JOBS_SINCE) {
        Strength::Static
    } else {
        return None;
    };
    let f = about(
        name,
        cause,
        quote.clone(),
        format!("{why}; this systemd drops the start job"),
        format!("install or unmask {dep}, or use Wants="),
    )
    .refuted_by("a `Started` line of the unit in the same boot");
    Some(Candidate::fixed(f).strength(strength))
}

/// A required unit whose start fails as far as the disk tells, so that the unit's own job fails with it.
fn failing(
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
    // A skipped unit satisfies a requirement.
    if condition::first_false(&unit, "Condition", &disk.facts(&unit, case)).is_some() {
        return None;
    }
    let (because, why) = start_fails(case, disk, &unit)?;
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

/// Whether a service's start job fails, and the line that says so. For `Type=simple` a missing program is no failed job.
fn start_fails(case: &Case<'_>, disk: &DiskCase<'_>, unit: &Unit) -> Option<(Quote, String)> {
    if let Some((_, quote, why, _)) = load::refusal(disk, &unit.name) {
        return Some((quote, why));
    }
    let service = Service::new(unit, disk.base.root, &disk.base.accounts);
    let awaited = service.start_is_awaited() || service.kind() == "exec";
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
        let quote = || crate::units::quote_assignment(&command.assignment);
        match waiting::ending_of(disk, &command) {
            Some(Ending::Failure) => return Some((quote(), "this command fails".into())),
            Some(Ending::Test(op, path)) if waiting::test_fails(disk, op, &path) == Some(true) => {
                return Some((quote(), "this command fails".into()));
            }
            _ => {}
        }
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
