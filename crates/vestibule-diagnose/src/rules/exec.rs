//! What the disk says of a unit's programs: the program, its account, the paths that it names, its confinement.
use super::{Candidate, Strength, about, paths, scripts};
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

/// Whether the unit's processes may do more than its user and group.
pub(super) fn may_do_more(unit: &Unit) -> bool {
    let keys = ["SupplementaryGroups", "AmbientCapabilities"];
    keys.iter().any(|key| unit.has("Service", key))
}

/// Whether paths of the unit lie in another root than the disk's.
pub(super) fn has_other_root(unit: &Unit) -> bool {
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
            more: may_do_more(&unit),
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
        if let Some(f) = forbidden_program(&unit, name, &real) {
            return vec![Candidate::fixed(f.refuted_by(REFUTES)).specific(6)];
        }
        if let Some(cover) = paths::hidden(disk, &service, &real, !command.privileged) {
            let why = format!("the unit does not see its program: {}", cover.why);
            let fix = "install the program where nothing is mounted over it";
            let f = about(name, Cause::ExecMissing, cover.quote, why, fix)
                .and(quote_assignment(&command.assignment));
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
        if let Some(found) = scripts::script(disk, &service, name, &command, &env, &who) {
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

/// A program that the unit's own sandbox forbids.
fn forbidden_program(unit: &Unit, name: &str, program: &str) -> Option<Finding> {
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
    None
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
            .resolver
            .mounts
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
