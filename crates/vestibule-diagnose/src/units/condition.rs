//! `Condition…=` and `Assert…=` as far as a disk and a command line decide them (`systemd.unit(5)`, "Conditions and Asserts").
use super::{
    Assignment, Unit, names,
    runtime_paths::{Presence, RuntimePaths},
    service::glob_files,
};
use crate::{
    disk::{Kind, Root},
    elf, text,
};

/// What is known of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    True,
    False,
    Unknown,
}

impl Outcome {
    fn of(known: bool) -> Self {
        if known { Self::True } else { Self::False }
    }

    fn not(self) -> Self {
        match self {
            Self::True => Self::False,
            Self::False => Self::True,
            Self::Unknown => Self::Unknown,
        }
    }
}

impl From<Presence> for Outcome {
    fn from(presence: Presence) -> Self {
        match presence {
            Presence::There => Self::True,
            Presence::Absent => Self::False,
            Presence::Unknown => Self::Unknown,
        }
    }
}

/// What checks are decided with.
#[derive(Debug)]
pub struct Facts<'a> {
    pub root: &'a Root,
    pub paths: &'a RuntimePaths,
    pub cmdline: Option<&'a str>,
    pub first_boot: bool,
    pub machine: Option<u16>,
    /// `uname -r`, where known.
    pub kernel: Option<&'a str>,
    /// Directories that systemd makes for the unit come after conditions, so they do not count.
    pub unit: &'a Unit,
}

/// The first check of a kind (`Condition` or `Assert`) that is false, by systemd's rule: every plain one must hold, and
/// of those with `|` at least one.
pub fn first_false<'u>(unit: &'u Unit, prefix: &str, facts: &Facts<'_>) -> Option<&'u Assignment> {
    let mut keys: Vec<&str> = unit
        .assignments
        .iter()
        .filter(|a| a.section == "Unit")
        .map(|a| a.key.as_str())
        .collect();
    keys.retain(|k| k.starts_with(prefix));
    keys.sort_unstable();
    keys.dedup();
    // An empty assignment of any condition key resets the whole list (`config_parse_unit_condition_*`), per key is near enough.
    let checks: Vec<&Assignment> = keys.iter().flat_map(|k| unit.all("Unit", k)).collect();
    let mut any_of: Option<(Outcome, &Assignment)> = None;
    for a in checks {
        let kind = a.key.strip_prefix(prefix).unwrap_or_default();
        let (triggering, outcome) = decide(kind, &a.value, facts);
        if triggering {
            let so_far = any_of.map_or(Outcome::False, |(o, _)| o);
            let now = match (so_far, outcome) {
                (Outcome::True, _) | (_, Outcome::True) => Outcome::True,
                (Outcome::Unknown, _) | (_, Outcome::Unknown) => Outcome::Unknown,
                (Outcome::False, Outcome::False) => Outcome::False,
            };
            any_of = Some((now, any_of.map_or(a, |(_, first)| first)));
        } else if outcome == Outcome::False {
            return Some(a);
        }
    }
    any_of.filter(|(o, _)| *o == Outcome::False).map(|(_, a)| a)
}

/// What is known of one check outside a unit file: the `[Match]` sections of `systemd.network(5)` have the same ones.
pub fn holds(kind: &str, value: &str, facts: &Facts<'_>) -> Outcome {
    decide(kind, value, facts).1
}

fn decide(kind: &str, value: &str, facts: &Facts<'_>) -> (bool, Outcome) {
    let value = value.trim();
    let (triggering, value) = value
        .strip_prefix('|')
        .map_or((false, value), |v| (true, v.trim_start()));
    let (negated, value) = value
        .strip_prefix('!')
        .map_or((false, value), |v| (true, v.trim_start()));
    let outcome =
        resolved(value, facts).map_or(Outcome::Unknown, |value| check(kind, &value, facts));
    (triggering, if negated { outcome.not() } else { outcome })
}

/// The value with its specifiers resolved; none where one says what only a boot knows, as `%v` of a disk without a kernel.
fn resolved(value: &str, facts: &Facts<'_>) -> Option<String> {
    let name = facts.unit.name.as_str();
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('%') | None => out.push('%'),
            Some('i' | 'I') => out.push_str(names::instance(name).unwrap_or_default()),
            Some('p' | 'P') => out.push_str(names::prefix(name)),
            Some('n') => out.push_str(name),
            Some('v') => out.push_str(facts.kernel?),
            Some(_) => return None,
        }
    }
    Some(out)
}

fn check(kind: &str, value: &str, facts: &Facts<'_>) -> Outcome {
    let path_is =
        |wanted: &dyn Fn(&crate::disk::Meta) -> bool| match facts.paths.presence(facts.root, value)
        {
            Presence::Absent => Outcome::False,
            Presence::Unknown => Outcome::Unknown,
            Presence::There => facts
                .root
                .stat(value)
                .map_or(Outcome::Unknown, |m| Outcome::of(wanted(&m))),
        };
    match kind {
        "PathExists" => facts.paths.presence(facts.root, value).into(),
        "PathExistsGlob" => {
            let dir = value.split(['*', '?', '[']).next().unwrap_or_default();
            let dir = dir.rsplit_once('/').map_or("/", |(d, _)| d);
            match facts
                .paths
                .presence(facts.root, if dir.is_empty() { "/" } else { dir })
            {
                Presence::Absent => Outcome::False,
                Presence::Unknown => Outcome::Unknown,
                Presence::There if glob_files(facts.root, value).is_empty() => Outcome::False,
                Presence::There => Outcome::True,
            }
        }
        "PathIsDirectory" => path_is(&|m| m.kind == Kind::Dir),
        "PathIsSymbolicLink" => match facts.paths.presence(facts.root, value) {
            Presence::Absent => Outcome::False,
            Presence::Unknown => Outcome::Unknown,
            Presence::There => Outcome::of(facts.root.link(value).is_some()),
        },
        "DirectoryNotEmpty" => match facts.paths.presence(facts.root, value) {
            Presence::Absent => Outcome::False,
            Presence::Unknown => Outcome::Unknown,
            Presence::There => Outcome::of(!facts.root.list(value).is_empty()),
        },
        "FileNotEmpty" => path_is(&|m| m.kind == Kind::File && m.size > 0),
        "FileIsExecutable" => path_is(&|m| m.kind == Kind::File && m.mode & 0o111 != 0),
        "FirstBoot" => text::boolean(value).map_or(Outcome::Unknown, |want| {
            Outcome::of(want == facts.first_boot)
        }),
        "KernelCommandLine" => facts.cmdline.map_or(Outcome::Unknown, |line| {
            Outcome::of(line.split_whitespace().any(|w| {
                w == value || (!value.contains('=') && w.split('=').next() == Some(value))
            }))
        }),
        "Virtualization" => virtualization(value),
        "Architecture" => architecture(value, facts.machine),
        "Host" => host(value, facts),
        "User" => Outcome::of(matches!(value, "root" | "0" | "@system")),
        "Group" => Outcome::of(matches!(value, "root" | "0")),
        "KernelVersion" => facts
            .kernel
            .map_or(Outcome::Unknown, |k| kernel_version(value, k)),
        "Environment" | "Security" | "Capability" | "ACPower" | "NeedsUpdate" | "Memory"
        | "CPUs" => Outcome::Unknown,
        _ => Outcome::Unknown,
    }
}

/// Vestibule's guests, and everything that has a kernel and a disk of its own, are virtual machines, not containers.
fn virtualization(value: &str) -> Outcome {
    match value {
        "vm" | "yes" | "true" | "1" | "on" => Outcome::True,
        "no" | "false" | "0" | "off" | "container" | "docker" | "podman" | "lxc"
        | "lxc-libvirt" | "systemd-nspawn" | "openvz" | "rkt" | "wsl" | "proot" | "pouch"
        | "private-users" => Outcome::False,
        _ => Outcome::Unknown,
    }
}

/// The static host name, or the machine's id. A name from elsewhere counts only where `/etc/hostname` gives none (`hostname(5)`).
fn host(value: &str, facts: &Facts<'_>) -> Outcome {
    let read = |path| {
        facts
            .root
            .read_text(path)
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase()
    };
    let id = value.replace('-', "").to_ascii_lowercase();
    if id.len() == 32 && id.chars().all(|c| c.is_ascii_hexdigit()) {
        let own = read("/etc/machine-id");
        return if own.len() == 32 {
            Outcome::of(own == id)
        } else {
            Outcome::Unknown
        };
    }
    let name = read("/etc/hostname");
    let elsewhere = facts
        .cmdline
        .is_some_and(|line| line.contains("systemd.hostname="));
    if name.is_empty() || name.contains(['#', '\n']) || elsewhere {
        return Outcome::Unknown;
    }
    Outcome::of(text::glob(&value.to_ascii_lowercase(), &name))
}

fn architecture(value: &str, machine: Option<u16>) -> Outcome {
    let own = match machine {
        Some(elf::X86_64) => "x86-64",
        Some(elf::AARCH64) => "arm64",
        Some(elf::I386) => "x86",
        Some(_) | None => return Outcome::Unknown,
    };
    Outcome::of(value == "native" || value == own)
}

fn kernel_version(value: &str, kernel: &str) -> Outcome {
    let number = |v: &str| -> Vec<u64> {
        v.split(['.', '-', '+'])
            .map_while(|p| p.parse().ok())
            .take(3)
            .collect()
    };
    let ops = ["<=", ">=", "!=", "<", ">", "="];
    let Some((op, version)) = ops
        .iter()
        .find_map(|op| value.strip_prefix(op).map(|v| (*op, v.trim())))
    else {
        return Outcome::of(text::glob(value, kernel));
    };
    let order = number(kernel).cmp(&number(version));
    Outcome::of(match op {
        "<=" => order.is_le(),
        ">=" => order.is_ge(),
        "!=" => order.is_ne(),
        "<" => order.is_lt(),
        ">" => order.is_gt(),
        _ => order.is_eq(),
    })
}
