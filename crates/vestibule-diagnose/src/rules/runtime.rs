//! What the disk tells of a program's run: commands whose end is known, modules that a script cannot find, ports taken.
use super::{Candidate, Strength, about, exec::service_of, node, waiting};
use crate::{
    case::{Case, DiskCase},
    units::{
        names,
        programs::{self, Ending},
        quote_assignment, quote_disk,
        service::Service,
    },
};
use vestibule_api::cause::Cause;

const REFUTES: &str = "a line that the unit's own process printed in the same boot";

/// Commands whose end is known before they run.
pub fn known_endings(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name) else {
        return Vec::new();
    };
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    let before = service.commands_of("ExecStartPre");
    for (index, command) in before.iter().enumerate().filter(|(_, c)| !c.optional) {
        let made = |path: &str| {
            let mut earlier = before.iter().take(index);
            earlier.any(|c| programs::may_make(c, path))
        };
        let quote = quote_assignment(&command.assignment);
        let fix = "make the command succeed in the image, or put a dash before it";
        let fails = match waiting::ending_of(disk, command) {
            Some(Ending::Failure) => Some(Strength::Static),
            Some(Ending::Test(_, path)) if made(&path) => None,
            Some(Ending::Test(op, path)) => match waiting::test_fails(disk, op, &path) {
                Some(true) => Some(Strength::Static),
                Some(false) => None,
                // Nothing on the disk makes it; a unit that runs would have.
                None => Some(Strength::Conditional).filter(|_| !made_by_somebody(disk, &path)),
            },
            Some(Ending::Success(_) | Ending::Never) | None => None,
        };
        if let Some(strength) = fails {
            let f = about(
                name,
                Cause::PreStartFailed,
                quote,
                "this command runs before the program and fails, so the program is never started",
                fix,
            )
            .refuted_by(REFUTES);
            return vec![Candidate::fixed(f).strength(strength)];
        }
        if waiting::ending_of(disk, command) == Some(Ending::Never) {
            let f = about(
                name,
                Cause::PreStartFailed,
                quote,
                "this command runs before the program and never ends",
                fix,
            )
            .refuted_by(REFUTES);
            return vec![Candidate::fixed(f)];
        }
    }
    let Some(main) = service.main() else {
        return Vec::new();
    };
    let quote = quote_assignment(&main.assignment);
    let simple = matches!(service.kind(), "simple" | "exec" | "idle");
    let restart = unit.value("Service", "Restart").unwrap_or("no");
    match waiting::ending_of(disk, &main) {
        Some(Ending::Failure)
            if matches!(restart, "always" | "on-failure") && repeats_too_fast(&unit) =>
        {
            let f = about(name, Cause::StartLimitHit, quote, "the program fails at once, and with this restart delay systemd gives up after five starts in ten seconds", "repair the program; a restart delay of more than two seconds never reaches the limit").refuted_by(REFUTES);
            vec![Candidate::fixed(f)]
        }
        Some(Ending::Success(s))
            if simple && s < 60.0 && !matches!(restart, "always" | "on-success") =>
        {
            let f = about(
                name,
                Cause::ExitedCleanly,
                quote,
                "the program ends with success, and the unit with it",
                "run the program in the foreground, or use Type=oneshot with RemainAfterExit=yes",
            )
            .refuted_by("the unit's process still there later");
            vec![Candidate::fixed(f)]
        }
        Some(Ending::Never) if matches!(service.kind(), "notify" | "notify-reload" | "forking") => {
            let f = about(
                name,
                Cause::NeverNotifiedReady,
                quote,
                "the program never says that it is ready, and systemd ends it",
                "use Type=simple or Type=exec, or a program that calls sd_notify",
            )
            .refuted_by("a `Started` line of the unit in the same boot");
            vec![Candidate::fixed(f)]
        }
        _ => backgrounds(disk, &service, name, &main, restart)
            .into_iter()
            .collect(),
    }
}

/// `NetworkNamespacePath=` (systemd.exec(5)) to a name of ip-netns(8) that nothing in the image makes: no unit of the boot and
/// no script that one runs speaks of such namespaces. A program may make one all the same, so the disk alone does not decide.
pub fn network_namespace(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name) else {
        return Vec::new();
    };
    let named = unit.last("Service", "NetworkNamespacePath");
    let Some(a) = named.filter(|a| a.value.contains("/run/netns/")) else {
        return Vec::new();
    };
    let made = disk.boot.jobs.keys().any(|job| {
        let other = disk.units.load(job);
        let service = Service::new(&other, disk.base.root, &disk.base.accounts);
        let says = other.assignments.iter();
        says.filter(|s| s.key != a.key)
            .any(|s| s.value.contains("netns"))
            || service.commands().into_iter().flatten().any(|c| {
                let script = programs::script_of(&c).unwrap_or(c.program);
                let text = disk.base.root.read_script(&script);
                text.is_some_and(|t| t.contains("netns"))
            })
    });
    if made {
        return Vec::new();
    }
    let f = about(
        name,
        Cause::NamespacePathMissing,
        quote_assignment(a),
        format!(
            "systemd cannot open {}: nothing in this image makes that network namespace",
            a.value
        ),
        "make the namespace before the unit starts, or remove the line",
    )
    .refuted_by(REFUTES);
    let found = Candidate::fixed(f).strength(Strength::Conditional);
    vec![found.specific(7).explaining(&[Cause::PrivateNetwork])]
}

/// Whether nothing on the disk would make a runtime path: no unit of the boot names it in its own files.
fn made_by_somebody(disk: &DiskCase<'_>, path: &str) -> bool {
    disk.boot.jobs.keys().any(|job| {
        let unit = disk.units.load(job);
        unit.assignments.iter().any(|a| {
            a.key != "ExecStartPre"
                && (a.value.contains(path)
                    || (path.starts_with("/tmp/.X11-unix") && a.value.contains("Xtigervnc")))
        })
    })
}

fn repeats_too_fast(unit: &crate::units::Unit) -> bool {
    let delay = unit.seconds("Service", "RestartSec").unwrap_or(0.1);
    let section = |key| {
        unit.seconds("Unit", key)
            .or_else(|| unit.seconds("Service", key))
    };
    let interval = section("StartLimitIntervalSec")
        .or_else(|| section("StartLimitInterval"))
        .unwrap_or(10.0);
    let burst: f64 = unit
        .value("Unit", "StartLimitBurst")
        .or_else(|| unit.value("Service", "StartLimitBurst"))
        .and_then(|v| v.parse().ok())
        .unwrap_or(5.0);
    interval > 0.0 && burst > 0.0 && delay * burst < interval
}

/// `Type=simple` with a script that starts its server in the background and ends.
fn backgrounds(
    disk: &DiskCase<'_>,
    service: &Service<'_>,
    name: &str,
    main: &crate::units::command::Command,
    restart: &str,
) -> Option<Candidate> {
    if !matches!(service.kind(), "simple" | "exec" | "idle")
        || matches!(restart, "always" | "on-success")
        || service.unit.flag("Service", "RemainAfterExit") == Some(true)
    {
        return None;
    }
    let script = programs::script_of(main).unwrap_or_else(|| main.program.clone());
    let text = disk.base.root.read_script(&script)?;
    let shell = text
        .lines()
        .next()
        .is_some_and(|l| l.ends_with("sh") || l.contains("sh "));
    let line = programs::backgrounds_and_ends(&text).filter(|_| shell)?;
    let content = text
        .lines()
        .nth(usize::try_from(line).ok()?.saturating_sub(1))
        .unwrap_or_default();
    let f = about(name, Cause::ExitedCleanly, quote_disk(&script, Some(line), content), "the script starts the server in the background and ends; systemd takes that as the end of the service and kills the server", "use exec and no `&` for the last command, or Type=forking")
        .and(quote_assignment(&main.assignment))
        .refuted_by("the server's process still in the unit's cgroup later");
    Some(Candidate::fixed(f))
}

/// Another unit of the boot holds the port.
pub fn listeners_taken(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let (Some(disk), Some(port)) = (&case.disk, case.port_of(name)) else {
        return Vec::new();
    };
    let own = disk.units.canonical(name);
    // A service that only its socket starts is not meant to be up before somebody connects.
    let own_opens = disk.boot.starts(&own) && opens_its_own_socket(disk, &own);
    for socket in disk
        .boot
        .jobs
        .keys()
        .filter(|n| names::unit_type(n) == "socket")
    {
        let unit = disk.units.load(socket);
        let serves = names::prefix(socket) == names::prefix(&own)
            || unit.value("Socket", "Service") == Some(own.as_str());
        if !unit.is_loaded() || (serves && !own_opens) {
            continue;
        }
        for a in unit.all("Socket", "ListenStream") {
            if a.value == port.to_string() || a.value.ends_with(&format!(":{port}")) {
                let f = about(
                    name,
                    Cause::PortInUse,
                    quote_assignment(a),
                    format!("{socket} of the same boot listens on port {port}, so the unit cannot"),
                    "give one of them another port",
                )
                .refuted_by("the unit's own `listening` line in the same boot");
                return vec![Candidate::fixed(f)];
            }
        }
    }
    Vec::new()
}

/// Whether a service is a Node script of one file that takes no socket from systemd (`sd_listen_fds(3)`): one that never
/// speaks of a descriptor, nor asks for a module that may.
fn opens_its_own_socket(disk: &DiskCase<'_>, name: &str) -> bool {
    let root = disk.base.root;
    let unit = disk.units.load(name);
    let service = Service::new(&unit, root, &disk.base.accounts);
    let script = service.main().filter(|m| m.program.ends_with("/node"));
    let script = script.and_then(|m| programs::script_of(&m));
    let text = script.and_then(|s| root.read_text(&s)).unwrap_or_default();
    let mut words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    let hands_over = words.any(|w| {
        matches!(w, "fd" | "import" | "eval" | "Pipe" | "systemd") || w.starts_with("LISTEN_")
    });
    let builtin = |module: &str| {
        let bare = module.strip_prefix("node:").unwrap_or(module);
        node::BUILTIN.contains(&format!(" {bare} "))
    };
    let modules_known = text.matches("require").count()
        == text
            .split("require(")
            .skip(1)
            .filter_map(|rest| rest.split(['\'', '"']).nth(1))
            .filter(|m| builtin(m))
            .count();
    text.contains(".listen(") && !hands_over && modules_known
}
