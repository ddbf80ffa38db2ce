//! What the disk says of a unit's programs: the program, its account, the paths that it names, its confinement.
use super::{Candidate, Strength, about};
use crate::{
    case::{Case, DiskCase},
    disk::{
        Resolved,
        xattr::{CAPABILITY, Capabilities},
    },
    units::{
        Unit, capabilities, command,
        exec::{As, Problem},
        names, programs, quote_assignment, quote_disk,
        runtime_paths::Presence,
        service::Service,
    },
};
use vestibule_api::{cause::Cause, finding::Finding};

const REFUTES: &str = "a line that the unit's own process printed in the same boot";

/// A loaded service with a start job, where the disk has one.
pub(super) fn service_of<'c>(
    case: &'c Case<'_>,
    name: &str,
) -> Option<(&'c DiskCase<'c>, std::rc::Rc<Unit>)> {
    // The lifetimes of the case's parts are all at least the borrow's.
    let disk: &'c DiskCase<'c> = case.disk.as_ref()?;
    let unit = disk.units.load(name);
    (unit.is_loaded() && names::unit_type(&unit.name) == "service").then_some((disk, unit))
}

/// Whether paths of the unit lie in another root than the disk's.
fn has_other_root(unit: &Unit) -> bool {
    ["RootDirectory", "RootImage"]
        .iter()
        .any(|k| unit.has("Service", k))
}

/// The programs of `Exec…=`, in the order in which they run.
pub fn commands(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name).filter(|(_, u)| !has_other_root(u)) else {
        return Vec::new();
    };
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    let env = service.environment().values();
    let user = unit
        .value("Service", "User")
        .and_then(|u| service.expand(u).ok());
    let group = unit
        .value("Service", "Group")
        .and_then(|g| service.expand(g).ok());
    for command in service
        .commands()
        .into_iter()
        .filter_map(Result::ok)
        .filter(|c| !c.optional && c.key != "ExecCondition")
    {
        let who = As {
            user: user.as_deref().filter(|_| !command.privileged),
            group: group.as_deref().filter(|_| !command.privileged),
            path: unit
                .value("Service", "ExecSearchPath")
                .map(str::to_owned)
                .or_else(|| env.get("PATH").cloned()),
            library_path: env.get("LD_LIBRARY_PATH").cloned(),
        };
        let real = command.program.clone();
        if real.starts_with('/')
            && disk.paths.presence(disk.base.root, &real) == Presence::Unknown
            && !disk.base.root.exists(&real)
        {
            continue;
        }
        if let Some(f) = hidden_program(&unit, name, &real) {
            return vec![Candidate::fixed(f.refuted_by(REFUTES)).specific(6)];
        }
        if let Some(problem) = disk.resolver.check(&real, &who) {
            let f = from_problem(name, problem)
                .and(quote_assignment(&command.assignment))
                .refuted_by(REFUTES);
            return vec![Candidate::fixed(f).specific(6)];
        }
        if let Some(f) = refused_capabilities(disk, &unit, name, &command) {
            return vec![Candidate::fixed(f.refuted_by(REFUTES)).specific(6)];
        }
        if let Some(found) = script(disk, &service, name, &command, &env) {
            return vec![found];
        }
    }
    Vec::new()
}

fn from_problem(name: &str, problem: Problem) -> Finding {
    match problem {
        Problem::Missing(q) => about(
            name,
            Cause::ExecMissing,
            q,
            "the program that the unit runs is not in the image",
            "install it, or correct the path",
        ),
        Problem::NotExecutable(q, why) => about(
            name,
            Cause::ExecNotExecutable,
            q,
            format!("the program may not be executed: {why}"),
            "give it execute permission on a file system that allows it",
        ),
        Problem::WrongArchitecture(q, why) => about(
            name,
            Cause::ExecWrongArchitecture,
            q,
            format!("the program is for another machine: {why}"),
            "install the program for the guest's architecture",
        ),
        Problem::Format(q, why) => about(
            name,
            Cause::ExecFormat,
            q,
            format!("the kernel cannot execute the file: {why}"),
            "give a script a first line like #!/bin/sh; replace a damaged binary",
        ),
        Problem::Interpreter(q, why) => about(
            name,
            Cause::ExecInterpreterMissing,
            q,
            format!("the file exists and its interpreter does not: {why}"),
            "install the interpreter, save the script with LF line ends, or build the program for this image's C library",
        ),
        Problem::Library(q, why) => about(
            name,
            Cause::SharedLibraryMissing,
            q,
            format!("the dynamic linker ends the program before it begins: {why}"),
            "install the package that holds the library",
        ),
    }
}

/// A program that the unit's own sandbox hides or forbids.
fn hidden_program(unit: &Unit, name: &str, program: &str) -> Option<Finding> {
    let covers = |key: &str| {
        unit.all("Service", key).into_iter().find(|a| {
            a.value
                .split_whitespace()
                .map(|p| p.trim_start_matches(['-', '+']))
                .any(|p| {
                    let p = p.split(':').next().unwrap_or(p);
                    program == p
                        || program
                            .strip_prefix(p)
                            .is_some_and(|r| r.starts_with('/') || p == "/")
                })
        })
    };
    if let Some(a) = covers("NoExecPaths")
        .filter(|_| covers("ExecPaths").is_none())
        .or_else(|| covers("InaccessiblePaths"))
    {
        return Some(about(
            name,
            Cause::ExecNotExecutable,
            quote_assignment(a),
            "the unit's own settings forbid to execute its program",
            "name the program in ExecPaths=, or remove the restriction",
        ));
    }
    let home = ["/home/", "/root/", "/run/user/"]
        .iter()
        .any(|h| program.starts_with(h));
    let protect = unit
        .last("Service", "ProtectHome")
        .filter(|a| matches!(a.value.as_str(), "yes" | "true" | "1" | "on" | "tmpfs"));
    protect.filter(|_| home).map(|a| {
        about(
            name,
            Cause::ExecMissing,
            quote_assignment(a),
            "ProtectHome= hides the directory of the unit's program from it",
            "install the program outside the home directories",
        )
    })
}

/// A program whose file gives it capabilities at once, which the unit's bounding set keeps from it: the kernel refuses to
/// execute it (`capabilities(7)`, *Safety checking for capability-dumb binaries*).
fn refused_capabilities(
    disk: &DiskCase<'_>,
    unit: &Unit,
    name: &str,
    command: &command::Command,
) -> Option<Finding> {
    let (set, line) = capabilities::bounding_set(unit).filter(|_| !command.privileged)?;
    let root = disk.base.root;
    let path = disk
        .resolver
        .locate(&command.program, &As::default())
        .ok()?;
    let Resolved::Found(real, _) = root.resolve(&path) else {
        return None;
    };
    // Of a script the interpreter's file counts, and on such a mount no file gives any.
    let head = root.read_at(&real, 0, 2)?;
    if head == b"#!"
        || disk
            .base
            .fstab
            .covering(&real)
            .is_some_and(|m| m.has("nosuid"))
    {
        return None;
    }
    let given = Capabilities::parse(&root.xattr(&real, CAPABILITY)?)?;
    // What is inheritable may come from AmbientCapabilities=.
    let missing = given.permitted & !set & !given.inheritable;
    (given.effective && missing != 0).then(|| {
        let names = capabilities::names(missing);
        let quote = quote_disk(&path, None, &format!("[{CAPABILITY} {}=ep]", capabilities::names(given.permitted)));
        about(
            name,
            Cause::ExecNotExecutable,
            quote,
            format!("the program may not be executed: its file gives it {names}, which the unit's bounding set does not hold"),
            "add them to CapabilityBoundingSet=, or take them from the file: setcap -r",
        )
        .and(quote_assignment(line))
    })
}

/// The script that a known interpreter is told to run.
fn script(
    disk: &DiskCase<'_>,
    service: &Service<'_>,
    name: &str,
    cmd: &command::Command,
    env: &std::collections::BTreeMap<String, String>,
) -> Option<Candidate> {
    let script = command::substitute(&programs::script_of(cmd)?, env);
    let path = if script.starts_with('/') {
        script.clone()
    } else {
        let dir = service
            .working_directory()
            .map_or_else(String::new, |(d, _)| d);
        format!("{}/{script}", dir.trim_end_matches('/'))
    };
    let root = disk.base.root;
    let node = cmd
        .program
        .rsplit('/')
        .next()
        .is_some_and(|n| n.starts_with("node"));
    // Node finds `server` as server.js, server.json, server/index.js.
    let tries = if node {
        vec![
            path.clone(),
            format!("{path}.js"),
            format!("{path}.cjs"),
            format!("{path}/package.json"),
            format!("{path}/index.js"),
        ]
    } else {
        vec![path.clone()]
    };
    if disk.paths.presence(root, &path) != Presence::Unknown
        && !tries.iter().any(|p| root.exists(p))
    {
        let why = format!(
            "the interpreter {} is there, and the program that it is told to run is not",
            cmd.program
        );
        let f = about(
            name,
            Cause::ProgramFileMissing,
            quote_disk(&path, None, "[does not exist]"),
            why,
            "install the program, or correct the path",
        )
        .and(quote_assignment(&cmd.assignment))
        .refuted_by(REFUTES);
        return Some(Candidate::fixed(f).specific(6));
    }
    let file = tries.iter().find(|p| {
        root.stat(p)
            .is_some_and(|m| m.kind == crate::disk::Kind::File)
    })?;
    node.then(|| super::runtime::missing_module(disk, name, file))
        .flatten()
}

/// `User=`, `Group=`, `SupplementaryGroups=`.
pub fn accounts(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name).filter(|(_, u)| !has_other_root(u)) else {
        return Vec::new();
    };
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    let dynamic = unit.flag("Service", "DynamicUser") == Some(true);
    let accounts = &disk.base.accounts;
    let mut out = Vec::new();
    let keys = [
        ("User", Cause::UserMissing),
        ("Group", Cause::GroupMissing),
        ("SupplementaryGroups", Cause::GroupMissing),
    ];
    for (key, cause) in keys {
        let lines = if key == "SupplementaryGroups" {
            unit.all("Service", key)
        } else {
            unit.last("Service", key).into_iter().collect()
        };
        for a in lines {
            for word in a.value.split_whitespace() {
                let Ok(account) = service.expand(word) else {
                    continue;
                };
                let known = if cause == Cause::UserMissing {
                    accounts.has_user(&account)
                } else {
                    accounts.has_group(&account)
                };
                if known || account.is_empty() || (dynamic && key != "SupplementaryGroups") {
                    continue;
                }
                let (what, file) = if cause == Cause::UserMissing {
                    ("user", "/etc/passwd")
                } else {
                    ("group", "/etc/group")
                };
                let why = format!(
                    "{key}= names the {what} {account}, which is neither in {file} nor made at boot by sysusers.d"
                );
                let f = about(
                    name,
                    cause,
                    quote_assignment(a),
                    why,
                    format!("create the {what} in the image"),
                )
                .and(quote_disk(file, None, &format!("[no line {account}:]")))
                .refuted_by(REFUTES);
                out.push(Candidate::fixed(f).specific(7));
            }
        }
    }
    out
}

/// Directories and files that the unit names: working directory, environment, credentials, namespaces.
pub fn paths(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name).filter(|(_, u)| !has_other_root(u)) else {
        return Vec::new();
    };
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
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
        let is_file = disk
            .base
            .root
            .stat(&path)
            .is_some_and(|m| m.kind != crate::disk::Kind::Dir);
        if absent(&path) || is_file {
            let why = format!(
                "the unit changes to {path} before it runs anything, and {}",
                if is_file {
                    "that is no directory"
                } else {
                    "there is no such directory"
                }
            );
            let f = about(
                name,
                Cause::WorkingDirectoryMissing,
                quote_assignment(a),
                why,
                "create the directory in the image, or correct the path",
            );
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

/// AppArmor, SELinux, and filters whose effect is known without running the program.
pub fn security(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name) else {
        return Vec::new();
    };
    let mut out = Vec::new();
    if let Some(a) = unit
        .last("Service", "AppArmorProfile")
        .filter(|a| !a.value.starts_with('-') && a.value != "unconfined")
    {
        let off = case
            .cmdline
            .as_deref()
            .is_some_and(|c| c.split_whitespace().any(|w| w == "apparmor=0"));
        let profiles = disk.base.root.list("/etc/apparmor.d");
        let defined = profiles
            .iter()
            .filter(|e| e.meta.kind == crate::disk::Kind::File)
            .any(|e| {
                e.name == a.value
                    || disk
                        .base
                        .root
                        .read_text(&format!("/etc/apparmor.d/{}", e.name))
                        .is_some_and(|t| {
                            t.contains(&format!("profile {}", a.value))
                                || t.contains(&format!("{} {{", a.value))
                        })
            });
        let loads =
            disk.boot.starts("apparmor.service") && disk.units.load("apparmor.service").is_loaded();
        let confined = defined && loads;
        if !off && !confined {
            let why = format!(
                "the unit runs under the AppArmor profile {}, which nothing in this image {}",
                a.value,
                if defined { "loads" } else { "defines" }
            );
            let f = about(
                name,
                Cause::SecurityProfileMissing,
                quote_assignment(a),
                why,
                "ship and load the profile, or write AppArmorProfile=-…",
            );
            out.push(Candidate::fixed(
                f.refuted_by("a kernel without AppArmor, which ignores the line"),
            ));
        }
    }
    let jit = unit
        .last("Service", "MemoryDenyWriteExecute")
        .filter(|a| crate::text::boolean(&a.value) == Some(true));
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    if let (Some(a), Some(main)) = (jit, service.main()) {
        let head = disk
            .base
            .root
            .read_at(&main.program, 0, 128)
            .unwrap_or_default();
        let first = String::from_utf8_lossy(&head)
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned();
        let via_shebang = first.starts_with("#!") && first.split([' ', '/']).any(programs::is_jit);
        let plain = main.args.iter().any(|a| a == "--jitless");
        if !plain && (programs::is_jit(&main.program) || via_shebang) {
            let f = about(
                name,
                Cause::MemoryProtection,
                quote_assignment(a),
                format!(
                    "{} compiles code while it runs, and this setting refuses memory that is writable and executable",
                    main.program
                ),
                "remove MemoryDenyWriteExecute= for this unit",
            );
            out.push(Candidate::fixed(f.refuted_by(REFUTES)).strength(Strength::Static));
        }
    }
    out
}
