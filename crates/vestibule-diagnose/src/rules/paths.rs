//! Directories and files that a unit names: working directory, environment, credentials, namespaces, another root.
use super::{
    Candidate, about,
    exec::{has_other_root, may_do_more, service_of},
};
use crate::{
    case::{Case, DiskCase},
    disk::{Kind, Resolved},
    units::{
        Unit,
        covers::{self, Cover},
        exec::As,
        programs, quote_assignment, quote_disk,
        runtime_paths::Presence,
        service::Service,
    },
};
use vestibule_api::{cause::Cause, finding::Quote};

const REFUTES: &str = "a line that the unit's own process printed in the same boot";

/// Directories and files that the unit names: working directory, environment, credentials, namespaces.
pub fn paths(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name) else {
        return Vec::new();
    };
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    if has_other_root(&unit) {
        return other_root(disk, &service, name).into_iter().collect();
    }
    let own = service.own_directories();
    let absent = |path: &str| {
        !own.iter()
            .any(|d| d == path || d.starts_with(&format!("{}/", path.trim_end_matches('/'))))
            && disk
                .paths
                .presence(disk.base.root, path.trim_end_matches('/'))
                == Presence::Absent
    };
    let mut out = Vec::new();
    if let (Some((path, false)), Some(a)) = (
        service.working_directory(),
        unit.last("Service", "WorkingDirectory"),
    ) {
        let wrong = if absent(&path) {
            Some(("there is no such directory".to_owned(), None))
        } else {
            not_entered(disk, &service, &path)
        };
        if let Some((wrong, because)) = wrong {
            let mut f = about(
                name,
                Cause::WorkingDirectoryMissing,
                quote_assignment(a),
                format!("the unit changes to {path} before it runs anything, and {wrong}"),
                "create the directory in the image for the unit's user, or correct the path",
            );
            if let Some(quote) = because {
                f = f.and(quote);
            }
            out.push(Candidate::fixed(f.refuted_by(REFUTES)).specific(7));
        }
    }
    let environment = service.environment();
    for (path, quote) in environment.unreadable {
        let f = about(
            name,
            Cause::EnvironmentFileMissing,
            quote,
            format!(
                "{path} holds NUL bytes, as UTF-16 does: systemd does not read it, so the unit fails before it runs"
            ),
            "save the file as UTF-8 without a byte order mark",
        );
        let f = f.refuted_by("a `Started` line of the unit in the same boot");
        out.push(Candidate::fixed(f).specific(8));
    }
    for (path, quote) in environment.missing {
        let static_part = path
            .split(['*', '?', '['])
            .next()
            .unwrap_or(&path)
            .trim_end_matches('/');
        if absent(&path) || (static_part != path && !disk.base.root.exists(&path)) {
            let f = about(
                name,
                Cause::EnvironmentFileMissing,
                quote,
                format!(
                    "{path} does not exist, and the line does not begin with a dash, so the unit fails before it runs"
                ),
                "create the file, or write EnvironmentFile=-",
            );
            out.push(
                Candidate::fixed(
                    f.refuted_by("a file that an earlier unit writes before this one starts"),
                )
                .specific(8),
            );
        }
    }
    out.extend(credentials(disk, &unit, name));
    out.extend(namespaces(&unit, name, &absent));
    out
}

fn credentials(disk: &DiskCase<'_>, unit: &Unit, name: &str) -> Vec<Candidate> {
    let mut out = Vec::new();
    let fallback: Vec<String> = unit
        .all("Service", "SetCredential")
        .iter()
        .map(|a| a.value.split(':').next().unwrap_or_default().to_owned())
        .collect();
    for key in ["LoadCredential", "LoadCredentialEncrypted"] {
        for a in unit.all("Service", key) {
            // Without a path, or with a relative one, the credential comes from the VMM or the boot loader.
            let Some((id, path)) = a.value.split_once(':').filter(|(_, p)| p.starts_with('/'))
            else {
                continue;
            };
            if fallback.iter().any(|f| f == id)
                || disk.paths.presence(disk.base.root, path) != Presence::Absent
            {
                continue;
            }
            let f = about(
                name,
                Cause::CredentialMissing,
                quote_assignment(a),
                format!("the credential {id} is to be loaded from {path}, which does not exist"),
                "put the file there, or give a default with SetCredential=",
            );
            out.push(Candidate::fixed(f.refuted_by(REFUTES)).specific(7));
        }
    }
    out
}

const NAMESPACE_KEYS: [&str; 9] = [
    "ReadWritePaths",
    "ReadOnlyPaths",
    "InaccessiblePaths",
    "ExecPaths",
    "NoExecPaths",
    "BindPaths",
    "BindReadOnlyPaths",
    "ReadWriteDirectories",
    "ReadOnlyDirectories",
];

fn namespaces(unit: &Unit, name: &str, absent: &dyn Fn(&str) -> bool) -> Vec<Candidate> {
    let mut out = Vec::new();
    for key in NAMESPACE_KEYS {
        for a in unit.all("Service", key) {
            for word in a.value.split_whitespace() {
                let path = word.trim_start_matches('+');
                // A dash makes it optional.
                if path.starts_with('-') {
                    continue;
                }
                let path = path.split(':').next().unwrap_or(path);
                if path.starts_with('/') && absent(path) {
                    let f = about(
                        name,
                        Cause::NamespacePathMissing,
                        quote_assignment(a),
                        format!(
                            "systemd cannot set up the unit's mount namespace: {path} does not exist"
                        ),
                        "create the path in the image, or put a dash before it",
                    );
                    out.push(Candidate::fixed(f.refuted_by(REFUTES)).specific(7));
                }
            }
        }
    }
    out
}

/// What hides `path` of the disk from the unit's programs (from those outside its sandbox, where not `sandboxed`), unless something
/// of the boot may put it there again.
pub(super) fn hidden(
    disk: &DiskCase<'_>,
    service: &Service<'_>,
    path: &str,
    sandboxed: bool,
) -> Option<Cover> {
    let Resolved::Found(real, _) = disk.base.root.resolve(path) else {
        return None;
    };
    let own = covers::of_unit(service.unit, &real).filter(|_| sandboxed);
    let cover = own.or_else(|| {
        let cover = covers::of_boot(&disk.resolver.mounts, &real)?;
        (!boot_may_make(disk, service, &real, &cover.target)).then_some(cover)
    });
    cover.filter(|_| !unit_may_make(service, &real))
}

/// Whether the unit itself may make `path` before its program runs.
fn unit_may_make(service: &Service<'_>, path: &str) -> bool {
    let mut own = service.own_directories().into_iter();
    let mut before = ["ExecCondition", "ExecStartPre"]
        .iter()
        .flat_map(|key| service.commands_of(key));
    own.any(|dir| dir == path || covers::is_below(path, &dir) || covers::is_below(&dir, path))
        || before.any(|command| programs::may_make(&command, path))
}

/// Whether something else may make `path` below what is mounted empty on `target`: `tmpfiles.d`, or a unit of the boot that names
/// the part below the mount, in its file or in its script.
fn boot_may_make(disk: &DiskCase<'_>, service: &Service<'_>, path: &str, target: &str) -> bool {
    let root = disk.base.root;
    let below = path
        .strip_prefix(target)
        .unwrap_or_default()
        .trim_start_matches('/');
    let first = below.split('/').next().unwrap_or_default();
    let top = format!("{}/{first}", target.trim_end_matches('/'));
    let mut others = disk
        .boot
        .jobs
        .keys()
        .filter(|job| **job != service.unit.name);
    disk.paths.is_made(path, target)
        || others.any(|job| {
            let unit = disk.units.load(job);
            let other = Service::new(&unit, root, &disk.base.accounts);
            let scripts = || {
                let programs = other
                    .commands()
                    .into_iter()
                    .filter_map(Result::ok)
                    .map(|c| c.program);
                programs.filter_map(|program| root.read_script(&program))
            };
            unit.assignments.iter().any(|a| a.value.contains(&top))
                || other.own_directories().contains(&top)
                || scripts().any(|text| text.contains(&top))
        })
}

/// Why the unit's processes cannot change to a directory: what is there is none, they do not see it, or may not enter it.
fn not_entered(
    disk: &DiskCase<'_>,
    service: &Service<'_>,
    path: &str,
) -> Option<(String, Option<Quote>)> {
    let root = disk.base.root;
    let Resolved::Found(real, meta) = root.resolve(path) else {
        let fresh = covers::is_below(path, "/run")
            && !unit_may_make(service, path)
            && !boot_may_make(disk, service, path, "/run");
        return fresh.then(|| ("nothing in the image makes it at boot".to_owned(), None));
    };
    if meta.kind != Kind::Dir {
        return Some(("that is no directory".to_owned(), None));
    }
    if let Some(cover) = hidden(disk, service, path, true) {
        return Some((cover.why, Some(cover.quote)));
    }
    let unit = service.unit;
    let account = |key| {
        unit.value("Service", key)
            .and_then(|v| service.expand(v).ok())
    };
    let (user, group) = (account("User"), account("Group"));
    let who = As {
        user: user.as_deref(),
        group: group.as_deref(),
        more: may_do_more(unit),
        ..As::default()
    };
    // What is made at boot may get another owner.
    let own = service.own_directories();
    let settled = disk.paths.presence(root, path) == Presence::There
        && !disk
            .paths
            .is_made(&real, real.rsplit_once('/').map_or("", |(above, _)| above))
        && !own
            .iter()
            .any(|dir| dir == path || covers::is_below(path, dir));
    let why = disk
        .resolver
        .why_not_entered(&real, &who)
        .filter(|_| settled)?;
    Some((why, None))
}

/// `RootDirectory=` or `RootImage=` that is not there, or a root without the unit's program.
fn other_root(disk: &DiskCase<'_>, service: &Service<'_>, name: &str) -> Option<Candidate> {
    let (unit, root) = (service.unit, disk.base.root);
    for key in ["RootDirectory", "RootImage"] {
        let Some(a) = unit.last("Service", key) else {
            continue;
        };
        let path = service.expand(&a.value).ok()?;
        if disk.paths.presence(root, path.trim_end_matches('/')) == Presence::Absent {
            let why = format!("systemd cannot set up the unit's root: {path} does not exist");
            let fix = "put it into the image, or correct the path";
            let f = about(
                name,
                Cause::NamespacePathMissing,
                quote_assignment(a),
                why,
                fix,
            );
            return Some(Candidate::fixed(f.refuted_by(REFUTES)).specific(7));
        }
    }
    let mounts = [
        "BindPaths",
        "BindReadOnlyPaths",
        "MountImages",
        "ExtensionImages",
        "ExtensionDirectories",
        "RootImage",
    ];
    if mounts.iter().any(|key| unit.has("Service", key)) {
        return None;
    }
    let a = unit.last("Service", "RootDirectory")?;
    let directory = service.expand(&a.value).ok()?;
    let main = service
        .main()
        .filter(|c| !c.privileged && !c.optional && c.program.starts_with('/'))?;
    let inside = format!("{}{}", directory.trim_end_matches('/'), main.program);
    // An absolute link is followed in the disk's root and not in the unit's: nothing is said of what it leads to.
    let (Resolved::Missing(at) | Resolved::Broken(at)) = root.resolve(&inside) else {
        return None;
    };
    let Resolved::Found(real, _) = root.resolve(&directory) else {
        return None;
    };
    if disk.paths.presence(root, &inside) != Presence::Absent || !covers::is_below(&at, &real) {
        return None;
    }
    let why = format!("the unit's root is {directory}, and its program is not in there");
    let quote = quote_disk(&inside, None, "[does not exist]");
    let f = about(
        name,
        Cause::ExecMissing,
        quote,
        why,
        "install the program below the unit's root",
    )
    .and(quote_assignment(a))
    .and(quote_assignment(&main.assignment));
    Some(Candidate::fixed(f.refuted_by(REFUTES)).specific(6))
}
