//! Units that systemd refuses to load, and units that another file of the same name hides.
use super::{Candidate, about};
use crate::{
    case::{Case, DiskCase},
    units::{
        Load, Unit, command::Refusal, names, parse, quote_assignment, quote_disk, service::Service,
    },
};
use vestibule_api::{cause::Cause, finding::Quote};

const REFUTES: &str = "a `Started` line of the unit in the same boot";

/// Settings for which systemd 252 refuses a service (`service_verify`, `unit_load_fragment`).
pub fn refused(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    refusal(disk, name)
        .map(|(cause, quote, why, fix)| {
            Candidate::fixed(about(name, cause, quote, why, fix).refuted_by(REFUTES)).specific(7)
        })
        .into_iter()
        .collect()
}

/// Why a unit cannot be loaded: cause, evidence, why, fix.
pub(super) fn refusal(disk: &DiskCase<'_>, name: &str) -> Option<(Cause, Quote, String, String)> {
    let unit = disk.units.load(name);
    if let Load::Refused(quote) = &unit.load {
        let why = "systemd refuses the file at this line, and with it the unit";
        return Some((
            Cause::UnitFileUnreadable,
            quote.clone(),
            why.into(),
            "save the file as UTF-8 text with correct section headers".into(),
        ));
    }
    if !unit.is_loaded() || names::unit_type(&unit.name) != "service" {
        return None;
    }
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    let commands = service.commands();
    let mut refusals = commands.iter().filter_map(|c| c.as_ref().err());
    if let Some((refusal, quote)) = refusals.find(|(r, _)| *r != Refusal::Quoting) {
        let why = format!("systemd refuses the unit: {refusal}");
        let fix = "write an absolute path, or a bare program name";
        return Some((Cause::ExecPathInvalid, quote.clone(), why, fix.into()));
    }
    // A line with an open quote is ignored (measured with 252), which matters where it was the only command.
    let open = commands
        .iter()
        .filter_map(|c| c.as_ref().err())
        .find(|(r, _)| *r == Refusal::Quoting);
    if let Some((_, quote)) = open
        && service.main().is_none()
    {
        let why = "systemd ignores the line because a quote is not closed, and without ExecStart= it refuses the unit";
        return Some((
            Cause::UnitWithoutExec,
            quote.clone(),
            why.into(),
            "close the quote".into(),
        ));
    }
    refused_path(&unit, &service)
        .or_else(|| without_exec(&unit))
        .or_else(|| combination(&unit, &service))
}

fn refused_path(unit: &Unit, service: &Service<'_>) -> Option<(Cause, Quote, String, String)> {
    for key in ["WorkingDirectory", "RootDirectory", "RootImage", "PIDFile"] {
        let Some(a) = unit.last("Service", key) else {
            continue;
        };
        let (path, optional) = a
            .value
            .strip_prefix('-')
            .map_or((a.value.as_str(), false), |p| (p, true));
        let fix = "write an absolute path; a literal % is written %%".to_owned();
        match service.expand(path) {
            Err(s) if !optional => {
                return Some((
                    Cause::ExecPathInvalid,
                    quote_assignment(a),
                    format!("systemd refuses the unit: `{s}` in {key}= is not a specifier"),
                    fix,
                ));
            }
            Ok(p) if key != "PIDFile" && !optional && p != "~" && !p.starts_with('/') => {
                return Some((
                    Cause::ExecPathInvalid,
                    quote_assignment(a),
                    format!("systemd refuses the unit: {key}= is not an absolute path"),
                    fix,
                ));
            }
            Ok(_) | Err(_) => {}
        }
    }
    for key in ["User", "Group"] {
        let Some(a) = unit.last("Service", key) else {
            continue;
        };
        let bad = a.value.contains([' ', '/', ':', ',']) || a.value.starts_with('-');
        if bad || service.expand(&a.value).is_err() {
            let why = format!("systemd refuses the unit: {key}= is not a valid name");
            return Some((
                Cause::UnitSettingsRefused,
                quote_assignment(a),
                why,
                "write the name of an account".into(),
            ));
        }
    }
    None
}

fn without_exec(unit: &Unit) -> Option<(Cause, Quote, String, String)> {
    let has = |key| unit.has("Service", key);
    let remains = unit.flag("Service", "RemainAfterExit") == Some(true);
    let success_action = unit
        .value("Unit", "SuccessAction")
        .is_some_and(|v| v != "none");
    if has("ExecStart") || success_action || (has("ExecStop") && remains) {
        return None;
    }
    let mut quote = unit.quote_file();
    let mut why =
        "the merged unit has no ExecStart= in [Service], so systemd refuses it".to_owned();
    if let Some(a) = unit
        .assignments
        .iter()
        .find(|a| a.key == "ExecStart" && !a.value.is_empty())
    {
        quote = quote_assignment(a);
        why = format!(
            "ExecStart= stands in [{}], where systemd ignores it; in [Service] there is none, so systemd refuses the unit",
            a.section
        );
        if a.section == "Service" {
            why = "a later empty ExecStart= takes the command away and gives no new one, so systemd refuses the unit".to_owned();
        }
    } else if let Some(a) = unit
        .assignments
        .iter()
        .find(|a| is_near("ExecStart", &a.key))
    {
        quote = quote_assignment(a);
        why = format!(
            "`{}` is not a key that systemd knows (ExecStart is); without ExecStart= it refuses the unit",
            a.key
        );
    }
    Some((
        Cause::UnitWithoutExec,
        quote,
        why,
        "give the [Service] section an ExecStart=".into(),
    ))
}

/// Whether one edit, a transposition or a change of case makes `b` of `a`.
fn is_near(a: &str, b: &str) -> bool {
    if a.eq_ignore_ascii_case(b) {
        return true;
    }
    let (a, b): (Vec<char>, Vec<char>) = (
        a.to_lowercase().chars().collect(),
        b.to_lowercase().chars().collect(),
    );
    if a.len().abs_diff(b.len()) > 1 {
        return false;
    }
    let head = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let tail = a
        .iter()
        .rev()
        .zip(b.iter().rev())
        .take_while(|(x, y)| x == y)
        .count();
    let longer = a.len().max(b.len());
    let same_letters = {
        let (mut x, mut y) = (a.clone(), b.clone());
        x.sort_unstable();
        y.sort_unstable();
        x == y
    };
    head.saturating_add(tail).saturating_add(1) >= longer
        || (same_letters && head.saturating_add(tail).saturating_add(2) >= longer)
}

fn combination(unit: &Unit, service: &Service<'_>) -> Option<(Cause, Quote, String, String)> {
    let refuse = |key: &str, why: &str, fix: &str| {
        Some((
            Cause::UnitSettingsRefused,
            unit.quote("Service", key),
            format!("systemd refuses the unit: {why}"),
            fix.to_owned(),
        ))
    };
    let kind = service.kind();
    let restart = unit.value("Service", "Restart").unwrap_or("no");
    if kind == "oneshot" && matches!(restart, "always" | "on-success") {
        return refuse(
            "Restart",
            "Type=oneshot does not go with Restart=always or on-success",
            "use Type=simple, or Restart=on-failure",
        );
    }
    if kind != "oneshot" && service.commands_of("ExecStart").len() > 1 {
        return refuse(
            "ExecStart",
            "more than one ExecStart= is allowed only for Type=oneshot",
            "use one command, or reset the list with an empty ExecStart= first",
        );
    }
    if kind == "oneshot" && unit.value("Service", "ExitType") == Some("cgroup") {
        return refuse(
            "ExitType",
            "ExitType=cgroup is not allowed for Type=oneshot",
            "remove ExitType=",
        );
    }
    if unit.value("Service", "Type") == Some("dbus") && !unit.has("Service", "BusName") {
        return refuse("Type", "Type=dbus needs BusName=", "add BusName=");
    }
    let kill_mode = unit.value("Service", "KillMode").unwrap_or("control-group");
    if unit.has("Service", "PAMName") && !matches!(kill_mode, "control-group" | "mixed") {
        return refuse(
            "KillMode",
            "PAMName= needs KillMode=control-group or mixed",
            "remove KillMode=",
        );
    }
    if unit.flag("Service", "DynamicUser") == Some(true)
        && unit.value("Service", "User") == Some("root")
    {
        return None;
    }
    None
}

/// Another file of the same name, later in the search path, that differs; the winner is the one that fails.
pub fn shadowed(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let unit = disk.units.load(name);
    let (Some(winner), Some(hidden)) = (&unit.fragment, unit.hidden.first()) else {
        return Vec::new();
    };
    let read = |path: &str| disk.base.root.read(path).unwrap_or_default();
    let (own, other) = (read(winner), read(hidden));
    if own == other {
        return Vec::new();
    }
    // An override is legal; it is a cause where the winner cannot run and the hidden one could.
    let better = parse::parse(&other, hidden);
    if better.refused.is_some()
        || !winner_is_broken(case, disk, &unit)
        || !hidden_is_sound(disk, &unit, hidden, &better)
    {
        return Vec::new();
    }
    let first_difference = unit
        .last("Service", "ExecStart")
        .map_or_else(|| quote_disk(winner, None, "[differs]"), quote_assignment);
    let why = format!(
        "{winner} comes before {hidden} in the search path, so the older file wins, and it cannot run; the one that it hides could"
    );
    let f = about(
        name,
        Cause::UnitShadowed,
        first_difference,
        why,
        format!("remove {winner}"),
    )
    .and(quote_disk(hidden, None, "[hidden by it]"))
    .refuted_by("a unit that runs although it comes from the first file");
    vec![Candidate::fixed(f).specific(9).explaining(&[
        Cause::ExecMissing,
        Cause::ExecNotExecutable,
        Cause::ExecFormat,
        Cause::ExecInterpreterMissing,
        Cause::ExecWrongArchitecture,
        Cause::SharedLibraryMissing,
        Cause::ProgramFileMissing,
        Cause::WorkingDirectoryMissing,
        Cause::UserMissing,
        Cause::GroupMissing,
        Cause::EnvironmentFileMissing,
        Cause::UnitWithoutExec,
        Cause::UnitSettingsRefused,
        Cause::ExecPathInvalid,
        Cause::UnitFileUnreadable,
        Cause::StartLimitHit,
        Cause::ConditionUnmet,
        Cause::AssertFailed,
    ])]
}

fn winner_is_broken(case: &Case<'_>, disk: &DiskCase<'_>, unit: &Unit) -> bool {
    refusal(disk, &unit.name).is_some()
        || !super::exec::commands(case, &unit.name).is_empty()
        || !super::exec::accounts(case, &unit.name).is_empty()
        || !super::paths::paths(case, &unit.name).is_empty()
        || !super::waiting::conditions(case, &unit.name).is_empty()
        || !super::runtime::known_endings(case, &unit.name).is_empty()
}

/// Whether the hidden file's program is there and may be executed.
fn hidden_is_sound(disk: &DiskCase<'_>, unit: &Unit, path: &str, parsed: &parse::Parsed) -> bool {
    let hidden = Unit {
        fragment: Some(path.to_owned()),
        assignments: parsed.assignments.clone(),
        hidden: Vec::new(),
        load: Load::Loaded,
        name: unit.name.clone(),
    };
    let service = Service::new(&hidden, disk.base.root, &disk.base.accounts);
    service.main().is_some_and(|c| {
        disk.resolver
            .check(&c.program, &Default::default())
            .is_none()
    })
}

#[cfg(test)]
mod tests {
    use super::is_near;

    #[test]
    fn near_keys() {
        assert!(
            is_near("ExecStart", "ExecSart")
                && is_near("ExecStart", "execstart")
                && is_near("ExecStart", "ExceStart")
        );
        assert!(!is_near("ExecStart", "ExecStop") && !is_near("ExecStart", "ExecStartPre"));
    }
}
