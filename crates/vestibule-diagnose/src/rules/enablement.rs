//! Why a unit that must run has no start job at all.
use super::{Candidate, Strength, about};
use crate::{
    case::{Case, DiskCase},
    units::{DirLink, Load, Unit, generators::Generator, names, quote_disk},
};
use vestibule_api::{cause::Cause, finding::Quote};

const REFUTES: &str = "a `Starting` or `Started` line of the unit in the same boot";

/// A unit outside the start transaction: masked, missing, not enabled, enabled in the wrong place.
pub fn never_queued(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let unit = disk.units.load(name);
    if let Load::Masked(by) = &unit.load {
        let why = if by.source == "cmdline" {
            "the kernel command line masks the unit"
        } else if by.source.contains("-generators/") {
            "a generator masks the unit in generator.early, which outranks /etc"
        } else {
            "the first file of this name in the search path masks the unit: systemd will never start it, and says nothing"
        };
        let f = about(
            name,
            Cause::UnitMasked,
            by.clone(),
            why,
            format!("remove the mask (`systemctl unmask {name}` in the image)"),
        );
        return vec![Candidate::fixed(f.refuted_by(REFUTES)).specific(8)];
    }
    if unit.load != Load::Missing && disk.boot.starts(name) {
        return Vec::new();
    }
    if let Some(by) = generated(disk, name) {
        let f = about(
            name,
            Cause::UnitNotEnabled,
            by,
            "nothing on the disk starts the unit; a generator may, and what it makes is known only at boot",
            format!("look below /run/systemd/generator of a VM that runs; or enable {name} itself"),
        );
        return vec![Candidate::fixed(f.refuted_by(REFUTES)).strength(Strength::Suspicion)];
    }
    if unit.load == Load::Missing {
        let found = only_template(disk, name).or_else(|| missing(disk, name));
        return found.into_iter().collect();
    }
    if let Some(by) = activated_otherwise(disk, &unit.name) {
        let f = about(
            name,
            Cause::UnitNotEnabled,
            by,
            "nothing starts the unit at boot; only an event does",
            "enable the unit itself, if it must run without that event",
        );
        return vec![Candidate::fixed(f.refuted_by(REFUTES)).strength(Strength::Suspicion)];
    }
    vec![not_pulled(disk, name, &unit)]
}

fn missing(disk: &DiskCase<'_>, name: &str) -> Option<Candidate> {
    let wanted = disk.boot.jobs.get(name).and_then(Option::as_ref);
    let quote = match wanted {
        Some(pulled) => pulled.quote.clone(),
        None => quote_disk(
            "/etc/systemd/system",
            None,
            &format!("[no {name} here nor later in the search path]"),
        ),
    };
    let why = "the unit is asked for, and no file of that name is in the search path; systemd ignores the want without a word";
    let f = about(
        name,
        Cause::UnitFileMissing,
        quote,
        why,
        format!("install {name} in /usr/lib/systemd/system or /etc/systemd/system"),
    );
    Some(
        Candidate::fixed(f.refuted_by("a generator that makes a unit of this name at boot"))
            .specific(8),
    )
}

/// The first line of a generator, comments aside, that is about something.
fn line_of(
    disk: &DiskCase<'_>,
    generator: &Generator,
    about: impl Fn(&str) -> bool,
) -> Option<Quote> {
    let text = disk
        .base
        .root
        .read_text(&generator.path)
        .unwrap_or_default();
    let mut lines = (1_u64..).zip(text.lines());
    let (line, text) =
        lines.find(|(_, line)| !line.trim_start().starts_with('#') && about(line))?;
    Some(quote_disk(&generator.path, Some(line), text))
}

/// What may make or start the unit at boot though the disk has no link to it: a generator that speaks of it or of its template,
/// or a SysV script with a start link (`systemd-sysv-generator(8)`).
fn generated(disk: &DiskCase<'_>, name: &str) -> Option<Quote> {
    let root = disk.base.root;
    let template = names::template_of(name);
    let speaks = |line: &str| {
        let of = |unit: &str| line.contains(unit);
        of(name) || template.as_deref().is_some_and(of)
    };
    let mut generators = disk.base.generators.iter().filter(|g| g.masks.is_empty());
    if let Some(line) = generators.find_map(|generator| line_of(disk, generator, speaks)) {
        return Some(line);
    }
    root.stat("/usr/lib/systemd/system-generators/systemd-sysv-generator")?;
    let script = name.strip_suffix(".service")?;
    root.stat(&format!("/etc/init.d/{script}"))?;
    // Runlevels 2 to 4 are multi-user.target, 5 is graphical.target.
    (2..=5).find_map(|level| {
        let dir = format!("/etc/rc{level}.d");
        let entries = root.list(&dir);
        let entry = entries.iter().find(|entry| {
            let order = entry.name.strip_prefix('S');
            order.and_then(|rest| rest.get(2..)) == Some(script)
        })?;
        Some(quote_disk(
            &format!("{dir}/{}", entry.name),
            None,
            "[a SysV start link]",
        ))
    })
}

/// A socket, timer, path, D-Bus name or udev rule that would start the unit on an event.
fn activated_otherwise(disk: &DiskCase<'_>, name: &str) -> Option<Quote> {
    if let Some(by) = disk.boot.triggered.get(name) {
        return Some(disk.units.load(by).quote_file());
    }
    let root = disk.base.root;
    for dir in ["/etc/udev/rules.d", "/usr/lib/udev/rules.d"] {
        for entry in root.list(dir).iter().filter(|e| e.name.ends_with(".rules")) {
            let path = format!("{dir}/{}", entry.name);
            let text = root.read_text(&path).unwrap_or_default();
            let hit = (1_u64..)
                .zip(text.lines())
                .find(|(_, l)| l.contains("SYSTEMD_WANTS") && l.contains(name));
            if let Some((line, text)) = hit {
                return Some(quote_disk(&path, Some(line), text));
            }
        }
    }
    None
}

fn not_pulled(disk: &DiskCase<'_>, name: &str, unit: &Unit) -> Candidate {
    if let Some(candidate) = bad_link(disk, name) {
        return candidate;
    }
    if let Some(candidate) = only_template(disk, name) {
        return candidate;
    }
    if let Some(candidate) = unreached(disk, name) {
        return candidate;
    }
    let target = &disk.boot.target;
    let policy = disk.presets();
    let (mut why, fix) = if unit.all("Install", "WantedBy").is_empty()
        && unit.all("Install", "RequiredBy").is_empty()
    {
        ("nothing that boots pulls the unit in, and it has no [Install] section, so that `systemctl enable` does nothing".to_owned(),
         format!("add [Install] WantedBy={target} and enable the unit"))
    } else {
        (
            format!("nothing that {target} pulls in wants or requires the unit"),
            format!("enable it in the image: `systemctl --root=… enable {name}`"),
        )
    };
    let mut f_quote = None;
    if let (false, Some(quote), _) = policy.enables(name) {
        why.push_str("; the preset policy disables it, so `systemctl preset` after `enable` removes the link, and a first boot does not enable it");
        f_quote = Some(quote.clone());
    }
    let mut f = about(name, Cause::UnitNotEnabled, unit.quote_file(), why, fix).refuted_by(REFUTES);
    if let Some(q) = f_quote {
        f = f.and(q);
    }
    if disk.boot.target != "graphical.target" {
        f = f.and(disk.boot.target_quote.clone());
    }
    Candidate::fixed(f)
}

/// An entry that means the unit and that systemd ignores.
fn bad_link(disk: &DiskCase<'_>, name: &str) -> Option<Candidate> {
    let stem = name.rsplit_once('.').map_or(name, |(s, _)| s);
    let means = |entry: &str| {
        let plain = entry.trim_end();
        plain == name
            || plain == stem
            || plain.eq_ignore_ascii_case(name)
            || plain
                .strip_prefix(name)
                .is_some_and(|r| r.starts_with(['.', '~', '-', ' ']))
    };
    let finding = |path: &str, why: String| {
        let f = about(
            name,
            Cause::EnablementLinkInvalid,
            quote_disk(
                path,
                None,
                &disk.base.root.link(path).map_or_else(
                    || "[not a symbolic link]".to_owned(),
                    |t| format!("symbolic link to {t}"),
                ),
            ),
            why,
            format!("remove it and run `systemctl --root=… enable {name}`"),
        );
        Candidate::fixed(f.refuted_by(REFUTES)).specific(7)
    };
    for owner in disk.boot.jobs.keys() {
        let links = disk.units.dir_links(owner);
        let hit = links
            .iter()
            .find(|l: &&DirLink| l.ignored.is_some() && means(&l.entry));
        if let Some(link) = hit {
            let reason = link.ignored.unwrap_or_default();
            return Some(finding(
                &link.path,
                format!("the entry that should enable the unit is {reason}; systemd ignores it"),
            ));
        }
        // A link of another name to the unit's file: only the name counts, so it asks for a unit that is not there.
        let wrong = links.iter().find(|l| {
            l.ignored.is_none()
                && l.entry != name
                && l.target
                    .as_deref()
                    .is_some_and(|t| t.rsplit('/').next() == Some(name))
                && !disk.units.load(&l.entry).is_loaded()
        });
        if let Some(link) = wrong {
            return Some(finding(
                &link.path,
                format!(
                    "the link leads to the unit's file, but only its own name counts, and `{}` is no unit",
                    link.entry
                ),
            ));
        }
    }
    // A directory that no unit has: `multi-user.wants` or `multi-user.target.want` for `multi-user.target.wants`.
    for (dir, dir_name) in disk.units.directories() {
        let (owner, kind) = dir_name.rsplit_once('.').unwrap_or((dir_name, ""));
        let why = match kind {
            "wants" | "requires" | "upholds" if names::is_valid(owner) => continue,
            "wants" | "requires" | "upholds" => format!("`{owner}` is no unit's name"),
            _ => format!("`{dir_name}` is no unit's name with .wants, .requires or .upholds"),
        };
        let entries = disk.base.root.list(dir);
        // In a drop-in directory a name like that may be a drop-in's.
        let mut entries = entries.iter().filter(|e| !e.name.ends_with(".conf"));
        if let Some(entry) = entries.find(|e| means(&e.name)) {
            return Some(finding(
                &format!("{dir}/{}", entry.name),
                format!("{why}, so systemd never looks into this directory"),
            ));
        }
    }
    // The same link directly in the search path's root, or in a directory outside it.
    for dir in [
        "/etc/systemd",
        "/etc/systemd/user",
        "/usr/lib/systemd",
        "/etc/systemd/system/default.target",
    ] {
        for entry in disk
            .base
            .root
            .list(dir)
            .iter()
            .filter(|e| e.name.ends_with(".wants"))
        {
            let path = format!("{dir}/{}/{name}", entry.name);
            if disk.base.root.resolve_parent(&path).is_some() {
                return Some(finding(
                    &path,
                    "the link lies outside the directories that the system manager reads"
                        .to_owned(),
                ));
            }
        }
    }
    None
}

/// There is no file but the template's, and nothing asks for an instance: for the one that is meant, or for any where the name
/// that is meant has none.
fn only_template(disk: &DiskCase<'_>, name: &str) -> Option<Candidate> {
    let plain = names::instance(name).is_none();
    let template = match name.rsplit_once('.') {
        Some((stem, kind)) if plain => format!("{stem}@.{kind}"),
        Some(_) | None => names::template_of(name)?,
    };
    let files = disk.units.files();
    let file = files.get(&template).filter(|_| !files.contains_key(name))?;
    let file = quote_disk(file, None, &format!("[unit file of {template}]"));
    let link = disk
        .units
        .dependency_dirs()
        .into_iter()
        .find_map(|(dir, _)| {
            let path = format!("{dir}/{template}");
            disk.base
                .root
                .resolve_parent(&path)
                .map(|_| quote_disk(&path, None, "[the template itself, without an instance]"))
        });
    // Where something asks for the very name, another cause says more: its target is not reached, or it has no file.
    let asked = disk.boot.jobs.contains_key(name) || enabled_somewhere(disk, name).is_some();
    if (link.is_none() && asked) || (plain && has_enabled_instance(disk, &template)) {
        return None;
    }
    let quote = link.unwrap_or(file);
    let (why, fix) = if plain {
        let instance = names::with_instance(&template, "1");
        let why =
            format!("there is only the template {template}; nothing asks for an instance of it");
        (
            why,
            format!(
                "enable an instance: `systemctl --root=… enable {instance}`; or install {name} without an `@`"
            ),
        )
    } else {
        let why =
            format!("only the template {template} exists; nothing asks for the instance {name}");
        (
            why,
            format!("enable the instance: `systemctl --root=… enable {name}`"),
        )
    };
    let f = about(name, Cause::TemplateWithoutInstance, quote, why, fix);
    Some(
        Candidate::fixed(f.refuted_by("a generator or udev rule that starts the instance"))
            .specific(7),
    )
}

/// Whether an instance of the template has an entry of its own under some unit's directory.
fn has_enabled_instance(disk: &DiskCase<'_>, template: &str) -> bool {
    let is_one = |entry: &str| names::template_of(entry).is_some_and(|t| t == template);
    disk.units.dependency_dirs().any(|(dir, _)| {
        let entries = disk.base.root.list(dir);
        entries.iter().any(|e| is_one(&e.name))
    })
}

/// The first link under any unit's directory that names the unit: (owner, path).
fn enabled_somewhere(disk: &DiskCase<'_>, name: &str) -> Option<(String, String)> {
    disk.units
        .dependency_dirs()
        .into_iter()
        .find_map(|(dir, dir_name)| {
            let owner = dir_name
                .rsplit_once('.')
                .map(|(o, _)| o.to_owned())
                .filter(|o| names::is_valid(o))?;
            let found = disk.base.root.list(dir).iter().any(|e| e.name == name);
            found.then(|| (disk.units.canonical(&owner), format!("{dir}/{name}")))
        })
}

/// It is enabled, by somebody who is not reached: a wrong default target, or a target that this boot does not want.
fn unreached(disk: &DiskCase<'_>, name: &str) -> Option<Candidate> {
    let from_overlay = disk
        .units
        .overlay
        .wants
        .iter()
        .find(|(_, n, _, _)| n == name)
        .map(|(t, _, _, q)| (disk.units.canonical(t), q.clone()));
    let (owner, quote) = enabled_somewhere(disk, name)
        .map(|(owner, path)| {
            let text = disk
                .base
                .root
                .link(&path)
                .map_or_else(String::new, |t| format!("symbolic link to {t}"));
            (owner, quote_disk(&path, None, &text))
        })
        .or(from_overlay)
        .or_else(|| named_by_unit(disk, name))?;
    let target = &disk.boot.target;
    // The targets that every server boots to: not reaching them is the default target's doing, not the unit's.
    let usual = matches!(
        owner.as_str(),
        "multi-user.target"
            | "basic.target"
            | "sysinit.target"
            | "network.target"
            | "sockets.target"
            | "timers.target"
    );
    let f = if usual || disk.boot.fell_back {
        let why = format!(
            "the unit is enabled for {owner}, and this boot goes to {target}, which does not reach {owner}"
        );
        about(name, Cause::DefaultTargetWrong, disk.boot.target_quote.clone(), why, "point default.target to multi-user.target (or graphical.target), or take systemd.unit= off the command line").and(quote)
    } else {
        let why = format!(
            "the unit is enabled for {owner}, and nothing that {target} pulls in reaches {owner}; `is-enabled` says enabled all the same"
        );
        about(
            name,
            Cause::WantedByUnreachedTarget,
            quote,
            why,
            format!(
                "enable it for a target that boots: WantedBy={}",
                if target.is_empty() {
                    "multi-user.target"
                } else {
                    target
                }
            ),
        )
        .and(disk.boot.target_quote.clone())
    };
    Some(Candidate::fixed(f.refuted_by(REFUTES)).specific(6))
}

/// Another unit, itself not started, that names this one.
fn named_by_unit(disk: &DiskCase<'_>, name: &str) -> Option<(String, Quote)> {
    disk.units
        .files()
        .keys()
        .filter(|n| !names::is_template(n))
        .find_map(|owner| {
            let unit = disk.units.load(owner);
            if unit.name == name || !unit.is_loaded() || disk.boot.starts(owner) {
                return None;
            }
            ["Wants", "Requires", "BindsTo", "Upholds"]
                .iter()
                .find_map(|key| {
                    let a = unit
                        .all("Unit", key)
                        .into_iter()
                        .find(|a| a.value.split_whitespace().any(|w| w == name))?;
                    Some((unit.name.clone(), crate::units::quote_assignment(a)))
                })
        })
}

/// A generator that names the unit: what it makes cannot be known from the disk.
pub fn generator_masks(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    if !disk.units.load(name).is_loaded() || !disk.boot.starts(name) {
        return Vec::new();
    }
    // What it hangs below the unit does not stop the unit.
    let means = |line: &str| {
        let mut after = line.split(name).skip(1);
        let beside = [".wants", ".requires", ".d"];
        after.any(|rest| !beside.iter().any(|end| rest.starts_with(end)))
    };
    let mut out = Vec::new();
    for generator in &disk.base.generators {
        let Some(line) = line_of(disk, generator, means) else {
            continue;
        };
        let f = about(
            name,
            Cause::UnitMasked,
            line,
            "a generator names the unit, and what it makes of it is known only at boot",
            "read the generator, or remove it",
        )
        .refuted_by(REFUTES);
        // Silence of a boot that went far enough makes the suspicion a finding.
        let reached = case
            .log
            .first(|l| l.text.contains("Reached target multi-user.target"));
        let silent = reached.is_some() && case.unit_log(name).is_empty();
        out.push(Candidate::fixed(f).strength(if silent {
            Strength::Observed
        } else {
            Strength::Suspicion
        }));
    }
    out
}
