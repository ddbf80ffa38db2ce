//! `Condition…=` and `Assert…=` as far as a disk and a command line decide them (`systemd.unit(5)`, "Conditions and Asserts").
use super::{
    Assignment, Unit, install, names,
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
    let mut checks: Vec<&Assignment> = Vec::new();
    let all = unit.assignments.iter().filter(|a| a.section == "Unit");
    for a in all.filter(|a| a.key.starts_with(prefix)) {
        // An empty assignment resets the checks of every kind.
        if a.value.is_empty() {
            checks.clear();
        } else {
            checks.push(a);
        }
    }
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
        "OSRelease" => os_release(value, facts.root),
        "PathIsMountPoint" if value == "/" => Outcome::True,
        // What is mounted by `fstab` or a unit is not known here; nothing else mounts.
        "PathIsMountPoint" | "PathIsEncrypted" => match facts.paths.presence(facts.root, value) {
            Presence::Absent => Outcome::False,
            Presence::There if kind == "PathIsMountPoint" && !KERNEL_MOUNTS.contains(&value) => {
                Outcome::False
            }
            Presence::There | Presence::Unknown => Outcome::Unknown,
        },
        // It is an error, and false, where the path is not there.
        "PathIsReadWrite" if facts.paths.presence(facts.root, value) == Presence::Absent => {
            Outcome::False
        }
        "Environment" => environment(value, facts),
        // `is_selinux_enabled(3)`: without a configuration there is none, whatever the kernel holds.
        "Security" if value == "selinux" && !facts.root.exists("/etc/selinux/config") => {
            Outcome::False
        }
        "User" => Outcome::of(matches!(value, "root" | "0" | "@system")),
        "Group" => Outcome::of(matches!(value, "root" | "0")),
        "KernelVersion" => facts
            .kernel
            .map_or(Outcome::Unknown, |k| kernel_version(value, k)),
        // The rest depends on the machine: `Capability`, `ACPower`, `NeedsUpdate`, `Memory`, `CPUs`, `Firmware` and others.
        _ => Outcome::Unknown,
    }
}

/// Where PID 1 mounts by itself before any unit.
const KERNEL_MOUNTS: [&str; 6] = ["/dev", "/dev/shm", "/proc", "/run", "/sys", "/tmp"];

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

/// `ID=debian "VERSION_ID>=12"`: each against `os-release(5)`, the first of `/etc` and `/usr/lib`.
fn os_release(value: &str, root: &Root) -> Outcome {
    let files = ["/etc/os-release", "/usr/lib/os-release"];
    let Some(release) = files.iter().find_map(|f| root.read_text(f)) else {
        return Outcome::Unknown;
    };
    let actual = |key: &str| {
        let mut lines = release.lines().rev();
        let value = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        text::words(value)?.into_iter().next()
    };
    let mut all = Outcome::True;
    for word in text::words(value).unwrap_or_default() {
        let Some(at) = word.find(['!', '<', '=', '>']) else {
            return Outcome::Unknown;
        };
        let (key, rest) = word.split_at(at);
        let wanted = rest.trim_start_matches(['!', '<', '=', '>']);
        let actual = actual(key);
        match rest.strip_suffix(wanted) {
            Some("=") if actual.as_deref() != Some(wanted) => return Outcome::False,
            Some("!=") if actual.as_deref() == Some(wanted) => return Outcome::False,
            Some("=" | "!=") => {}
            Some(op @ ("<" | "<=" | ">" | ">="))
                if is_number(wanted) && actual.as_deref().is_some_and(is_number) =>
            {
                let op = format!("{op}{wanted}");
                if kernel_version(&op, &actual.unwrap_or_default()) == Outcome::False {
                    return Outcome::False;
                }
            }
            Some(_) | None => all = Outcome::Unknown,
        }
    }
    all
}

/// Digits and dots alone, which every way to compare versions orders alike.
fn is_number(version: &str) -> bool {
    !version.is_empty() && version.chars().all(|c| c.is_ascii_digit() || c == '.')
}

/// PID 1's own environment block (`systemd.unit(5)`): what the command line sets, `ManagerEnvironment=`'s, and a few variables that
/// systemd sets itself.
fn environment(value: &str, facts: &Facts<'_>) -> Outcome {
    let (name, wanted) = value
        .split_once('=')
        .map_or((value, None), |(n, v)| (n, Some(v)));
    let own = [
        "PATH",
        "HOME",
        "TERM",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "container",
        "INVOCATION_ID",
    ];
    let Some(line) = facts
        .cmdline
        .filter(|_| !own.contains(&name) && !name.starts_with("LC_"))
    else {
        return Outcome::Unknown;
    };
    let settings =
        install::daemon_setting(facts.root, "system.conf", "Manager", "ManagerEnvironment");
    if settings.is_some() {
        return Outcome::Unknown;
    }
    let mut set = None;
    for word in line.split_whitespace() {
        let word = word.strip_prefix("systemd.setenv=").unwrap_or(word);
        let pair = word.split_once('=').unwrap_or((word, ""));
        set = Some(pair.1).filter(|_| pair.0 == name).or(set);
    }
    Outcome::of(match (set, wanted) {
        (Some(set), Some(wanted)) => set == wanted,
        (set, None) => set.is_some(),
        (None, Some(_)) => false,
    })
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
