//! What programs and the agent say: the program's own lines, jobs that still run, the agent's report.
use super::{
    Candidate, about,
    patterns::{Pattern, p},
};
use crate::{
    case::Case,
    log::{Line, console, run::UnitLog},
    text::ellipsized,
    units::service::Service,
};
use vestibule_api::cause::Cause;

/// What the program itself printed, and what stands on a console without a name.
pub fn program_lines(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    const SAID: &[Pattern] = &[
        p(
            "error while loading shared libraries",
            Cause::SharedLibraryMissing,
            8,
            "the dynamic linker ended the program before it began",
            "install the package that holds the library",
        ),
        // What the linker says of a library that is older than the program: a version or a symbol is not in it.
        p(
            "' not found (required by ",
            Cause::SharedLibraryMissing,
            8,
            "the program was built for another version of a library than the one in the image",
            "install the library in the version that the program needs, or a build of the program for this system",
        ),
        p(
            "symbol lookup error: ",
            Cause::SharedLibraryMissing,
            8,
            "a library in the image does not have what the program needs of it",
            "install the library in the version that the program needs, or a build of the program for this system",
        ),
        p(
            "Cannot find module",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and the script or module that it is told to run is missing",
            "install the program and its dependencies",
        ),
        p(
            "ERR_MODULE_NOT_FOUND",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and a module is missing",
            "install the program's dependencies",
        ),
        p(
            "ModuleNotFoundError",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and a module is missing",
            "install the program's dependencies",
        ),
        p(
            "can't open file",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and the script that it is told to run is missing",
            "install the program, or correct the path",
        ),
        p(
            "Unable to access jarfile",
            Cause::ProgramFileMissing,
            8,
            "the interpreter runs, and its archive is missing",
            "install the program, or correct the path",
        ),
        p(
            "EADDRINUSE",
            Cause::PortInUse,
            8,
            "another process holds the port",
            "find the other listener, or change the port",
        ),
        p(
            "Address already in use",
            Cause::PortInUse,
            8,
            "another process holds the port",
            "find the other listener, or change the port",
        ),
        p(
            "address already in use",
            Cause::PortInUse,
            8,
            "another process holds the port",
            "find the other listener, or change the port",
        ),
        p(
            "EADDRNOTAVAIL",
            Cause::WrongAddress,
            6,
            "the program binds to an address that the guest does not have",
            "bind to 0.0.0.0",
        ),
        p(
            "getaddrinfo ENOTFOUND",
            Cause::LocalhostUnresolvable,
            8,
            "the program cannot resolve the name that it binds to",
            "bind to an address, or add the name to /etc/hosts",
        ),
        p(
            "getaddrinfo EAI_AGAIN",
            Cause::LocalhostUnresolvable,
            8,
            "the program cannot resolve the name that it binds to",
            "bind to an address, or add the name to /etc/hosts",
        ),
        p(
            "Name or service not known",
            Cause::LocalhostUnresolvable,
            7,
            "the program cannot resolve the name that it binds to",
            "bind to an address, or add the name to /etc/hosts",
        ),
        p(
            "No usable sandbox",
            Cause::BrowserNotReady,
            6,
            "Chromium found no sandbox that it can use",
            "allow user namespaces to the browser's user",
        ),
        p(
            "ENOSPC",
            Cause::DiskFull,
            8,
            "the program could not write because the file system is full",
            "make the image or its overlay larger",
        ),
        p(
            "EROFS",
            Cause::RootReadOnly,
            8,
            "the program could not write because the file system is read-only",
            "mount the root read-write, or give it an overlay",
        ),
    ];
    let log = case.unit_log(name);
    let refutes = "a later line of the program that says that it is ready";
    let mut out = Vec::new();
    // A program that listens met none of what keeps one from starting; it may mention it.
    let listens = log.runs() && log.listens().is_some();
    for pattern in SAID
        .iter()
        .filter(|p| !listens || STANDS.contains(&p.cause))
    {
        let means = |t: &str| t.contains(pattern.needle) && !is_of_watches(t);
        let line = log.printed(means).or_else(|| {
            // Without a unit's field, a console line counts where the unit itself is known to have failed.
            case.log
                .first(|l| l.is_console() && l.unit.is_none() && means(&l.text))
                .filter(|_| log.ended_badly().is_some())
        });
        if let Some(line) = line {
            let found = if pattern.cause == Cause::LocalhostUnresolvable {
                unresolved(case, &log, line)
            } else {
                Some((pattern.cause, pattern.why, pattern.fix))
            };
            let Some((cause, why, fix)) = found else {
                continue;
            };
            let f = about(name, cause, line.quote(), why, fix).refuted_by(refutes);
            out.push(
                Candidate::observed(f)
                    .specific(pattern.specific)
                    .explaining(&[Cause::StartLimitHit, Cause::Crashed]),
            );
            break;
        }
    }
    let mdwe = case.disk.as_ref().and_then(|d| {
        let unit = d.units.load(name);
        (unit.flag("Service", "MemoryDenyWriteExecute") == Some(true))
            .then(|| unit.quote("Service", "MemoryDenyWriteExecute"))
    });
    let refused = log.printed(|t| {
        t.contains("SetPermissions")
            || t.contains("Failed to reserve virtual memory for CodeRange")
            || t.contains("mprotect")
            || t.contains("Fatal process out of memory")
    });
    if let Some((setting, line)) = mdwe.zip(refused) {
        let f = about(
            name,
            Cause::MemoryProtection,
            line.quote(),
            "the program asked for executable memory and the unit's settings refuse it",
            "remove MemoryDenyWriteExecute= for this unit",
        )
        .and(setting)
        .refuted_by(refutes);
        out.push(
            Candidate::observed(f)
                .specific(8)
                .explaining(&[Cause::Crashed, Cause::StartLimitHit]),
        );
    }
    out
}

/// What a program that listens may suffer from all the same.
const STANDS: [Cause; 3] = [Cause::DiskFull, Cause::RootReadOnly, Cause::BrowserNotReady];

/// Whether a line is about the kernel's limit of watches on files (inotify(7)), which has the error of a full disk.
pub(super) fn is_of_watches(text: &str) -> bool {
    ["inotify", "file watchers", "Failed to watch"]
        .iter()
        .any(|w| text.contains(w))
}

/// Which name a program could not resolve: its own, or that of somebody outside, which matters where it ends for it.
fn unresolved(
    case: &Case<'_>,
    log: &UnitLog<'_>,
    line: &Line,
) -> Option<(Cause, &'static str, &'static str)> {
    let asked = ["ENOTFOUND ", "EAI_AGAIN "]
        .iter()
        .find_map(|m| line.text.split_once(m))
        .and_then(|(_, rest)| rest.split_whitespace().next())
        .map(|n| n.trim_end_matches([',', ';', ':', '.', '\'', '"']));
    // Outside there are domains; `localhost` and the guest's own name have no dot, or are what the unit is told to bind to.
    let outside = asked.filter(|n| n.contains('.') && !is_told(case, &log.name, n));
    match outside {
        None => Some((
            Cause::LocalhostUnresolvable,
            "the program cannot resolve the name that it binds to",
            "bind to an address, or add the name to /etc/hosts",
        )),
        Some(_) if log.ended_badly().is_some() => Some((
            Cause::NameNotFound,
            "the program ended after it had asked for a name that has no address",
            "correct the name or the resolver, or let the program go on without it",
        )),
        Some(_) => None,
    }
}

/// Whether the unit's environment or command names a host.
fn is_told(case: &Case<'_>, unit: &str, host: &str) -> bool {
    let Some(disk) = &case.disk else {
        return false;
    };
    let loaded = disk.units.load(unit);
    let service = Service::new(&loaded, disk.base.root, &disk.base.accounts);
    let binds = super::reach::HOST_NAMES.iter();
    let set = service.environment().set;
    let mut values = binds.filter_map(|n| set.get(*n));
    let own = disk.base.root.read_text("/etc/hostname");
    values.any(|v| v.value == host)
        || own.is_some_and(|h| h.trim() == host)
        || service
            .main()
            .is_some_and(|m| m.args.iter().any(|a| a.contains(host)))
}

/// The last job that PID 1 reported as running, when the unit was never started.
pub fn waiting_jobs(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let unit = case.unit_log(name);
    if unit.started().is_some() || unit.ended_badly().is_some() {
        return Vec::new();
    }
    let jobs: Vec<(&Line, console::RunningJob)> = case
        .log
        .lines
        .iter()
        .filter(|l| !l.stopping)
        .filter_map(|l| Some((l, console::running_job(&l.text)?)))
        .collect();
    let Some((line, job)) = jobs
        .iter()
        .rev()
        .filter(|(line, job)| !has_ended(case, line, &job.what))
        .max_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds))
    else {
        return Vec::new();
    };
    if job.seconds < 30.0 || ellipsized(&job.what, name) {
        return Vec::new();
    }
    // Only what the unit waits for may be blamed, where the disk knows.
    if let Some(disk) = &case.disk {
        let waits = disk.boot.waits_for(&disk.units.canonical(name));
        let known = waits.keys().any(|w| {
            let full = disk.units.load(w);
            ellipsized(&job.what, w)
                || ellipsized(&job.what, full.description())
                || ellipsized(&job.what, &format!("{w} - {}", full.description()))
        });
        if !known {
            return Vec::new();
        }
    }
    let network = job.what.contains("wait-online")
        || job.what.contains("Wait for Network")
        || job.what.contains("online");
    let cause = if network {
        Cause::WaitsForNetworkOnline
    } else {
        Cause::WaitsForUnit
    };
    let why = format!(
        "the start job of {} had run for {:.0} s when the log ended, and the unit was never started",
        job.what, job.seconds
    );
    let f = about(
        name,
        cause,
        line.quote(),
        why,
        "give that unit a timeout, or do not order the unit after it",
    )
    .refuted_by("a `Started` line of the unit in the same boot");
    vec![Candidate::observed(f)]
}

/// Whether a job that PID 1 reported as running ended: later on the console, or anywhere in a journal, which has no reports.
/// Both names may be cut, each in its own place.
fn has_ended(case: &Case<'_>, report: &Line, what: &str) -> bool {
    let head = |text: &str| text.split('…').next().unwrap_or_default().to_owned();
    let wanted = head(what);
    case.log
        .lines
        .iter()
        .filter(|l| l.source != report.source || l.number > report.number)
        .any(|l| {
            let rest = ["Started ", "Finished ", "Found device ", "Failed to start "]
                .iter()
                .find_map(|v| l.text.strip_prefix(v));
            rest.is_some_and(|r| {
                let shown = head(r);
                shown.starts_with(&wanted)
                    || shown != r && wanted.starts_with(&shown)
                    || r.contains(what)
            })
        })
}

/// The agent's report: units, jobs and what they wait for.
pub fn reported(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(report) = &case.report else {
        return Vec::new();
    };
    let quote = |text: String| vestibule_api::finding::Quote {
        source: "report".into(),
        line: None,
        text,
    };
    let mut out = Vec::new();
    if let Some(job) = report
        .jobs
        .iter()
        .find(|j| j.unit == name && j.kind == "start" && !j.waits_for.is_empty())
    {
        let on = job.waits_for.join(", ");
        let network = job
            .waits_for
            .iter()
            .any(|w| w.contains("network-online") || w.contains("wait-online"));
        let cause = if network {
            Cause::WaitsForNetworkOnline
        } else {
            Cause::WaitsForUnit
        };
        let f = about(
            name,
            cause,
            quote(format!(
                "job {} of {} is {} and waits for {on}",
                job.id, job.unit, job.state
            )),
            format!("the unit's start job waits for {on}"),
            "make that unit end, or drop the ordering",
        )
        .refuted_by("the unit active in a later report");
        out.push(Candidate::observed(f));
    }
    let Some(unit) = report.units.iter().find(|u| u.name == name) else {
        return out;
    };
    let text = format!(
        "{}: load {}, active {} ({}), result {}",
        unit.name, unit.load, unit.active, unit.sub, unit.result
    );
    let cause = match (
        unit.load.as_str(),
        unit.active.as_str(),
        unit.result.as_str(),
    ) {
        ("masked", _, _) => Some(Cause::UnitMasked),
        ("not-found", _, _) => Some(Cause::UnitFileMissing),
        (_, "failed", "start-limit-hit") => Some(Cause::StartLimitHit),
        (_, "failed", "timeout") => Some(Cause::NeverNotifiedReady),
        (_, "failed", "watchdog") => Some(Cause::WatchdogKilled),
        (_, "failed", "oom-kill") => Some(Cause::OutOfMemoryCgroup),
        (_, "failed", "signal" | "core-dump") => Some(Cause::Crashed),
        _ => None,
    };
    if let Some(cause) = cause {
        let f = about(
            name,
            cause,
            quote(text),
            format!(
                "systemd in the guest says so of the unit: {}",
                cause.meaning()
            ),
            "see the unit's own lines for the reason",
        )
        .refuted_by("the unit active in a later report");
        out.push(Candidate::observed(f).specific(3));
    }
    out
}
