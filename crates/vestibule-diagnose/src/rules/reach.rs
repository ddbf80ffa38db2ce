//! The unit runs and nobody reaches it: address, port, namespaces, filters.
use super::{Candidate, Strength, about, exec::service_of};
use crate::{
    case::Case,
    disk::Root,
    units::{
        envfile, manager, names, network, programs, quote_assignment, quote_disk,
        service::{Environment, Service, Variable},
    },
};
use regex::Regex;
use std::sync::LazyLock;
use vestibule_api::{cause::Cause, finding::Quote};

pub(super) const HOST_NAMES: [&str; 8] = [
    "HOST",
    "BIND",
    "BIND_HOST",
    "BIND_ADDR",
    "BIND_ADDRESS",
    "LISTEN_HOST",
    "LISTEN_ADDR",
    "LISTEN_ADDRESS",
];
pub(super) const PORT_NAMES: [&str; 4] = ["PORT", "AGENT_PORT", "HTTP_PORT", "LISTEN_PORT"];

/// Whether an address or name is the guest's loopback; names by `/etc/hosts`, where that is asked first
/// (`nsswitch.conf(5)`).
fn is_loopback(root: &Root, value: &str) -> bool {
    let host = value.trim_matches(['[', ']']);
    let fixed = |host: &str| host == "localhost" || host == "::1" || host.starts_with("127.");
    if fixed(host) {
        return true;
    }
    let nss = root.read_text("/etc/nsswitch.conf").unwrap_or_default();
    let mut sources = nss
        .lines()
        .find_map(|l| l.trim_start().strip_prefix("hosts:"))
        .unwrap_or("files")
        .split_whitespace();
    let addresses = addresses_in_hosts(root, host);
    sources.next() == Some("files") && !addresses.is_empty() && addresses.iter().all(|a| fixed(a))
}

/// The addresses that `/etc/hosts` has for a name.
fn addresses_in_hosts(root: &Root, name: &str) -> Vec<String> {
    let text = root.read_text("/etc/hosts").unwrap_or_default();
    let lines = text.lines().map(|l| l.split('#').next().unwrap_or(l));
    let mut out = Vec::new();
    for line in lines {
        let mut words = line.split_whitespace();
        if let Some(address) = words.next()
            && words.any(|w| w.eq_ignore_ascii_case(name))
        {
            out.push(address.to_owned());
        }
    }
    out
}

/// What `env NAME=value program` puts over the unit's environment (`env(1)`).
fn add_env_arguments(service: &Service<'_>, env: &mut Environment) {
    let Some(main) = service.main() else { return };
    if main.program.rsplit('/').next() != Some("env") {
        return;
    }
    for arg in &main.args {
        let Some((name, value)) = arg.split_once('=').filter(|(n, _)| envfile::is_name(n)) else {
            return;
        };
        let variable = Variable {
            value: value.to_owned(),
            quote: quote_assignment(&main.assignment),
        };
        env.set.insert(name.to_owned(), variable);
    }
}

/// The effective `HOST` and `PORT` of the unit, and what of its environment was lost.
pub fn address_and_port(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name) else {
        return logged_port(case, name);
    };
    let Some(port) = case.port_of(name) else {
        return Vec::new();
    };
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    let root = disk.base.root;
    let defaults = manager::default_environment(root, case.cmdline.as_deref());
    let mut env = service.environment_over(defaults);
    add_env_arguments(&service, &mut env);
    let mut out = Vec::new();
    let host = HOST_NAMES
        .iter()
        .find_map(|n| env.set.get(*n))
        .cloned()
        .or_else(|| {
            argument(
                &service,
                &["--host", "--bind", "--listen", "--address", "--hostname"],
            )
        });
    let set_port = PORT_NAMES
        .iter()
        .find_map(|n| env.set.get(*n))
        .cloned()
        .or_else(|| argument(&service, &["--port", "-p"]));
    if let Some(host) = &host {
        if let Some(f) = lost_line(name, &env, &HOST_NAMES, |v| !is_loopback(root, v))
            .filter(|_| is_loopback(root, &host.value))
        {
            out.push(f);
        } else if is_loopback(root, &host.value) {
            let f = about(
                name,
                Cause::ListensOnLoopback,
                host.quote.clone(),
                "the unit binds to the guest's loopback, where only the guest reaches it",
                "bind to 0.0.0.0, or reach it over the stream",
            )
            .refuted_by("a listener on 0.0.0.0 or [::] in the agent's report");
            out.push(Candidate::fixed(f).despite_run());
        }
        out.extend(unresolvable(root, name, host));
    }
    if let Some(set) = set_port.filter(|p| p.value.trim().parse::<u16>().is_ok_and(|p| p != port)) {
        if let Some(f) = lost_line(name, &env, &PORT_NAMES, |v| v == port.to_string()) {
            out.push(f);
        } else {
            let f = about(
                name,
                Cause::ListensOnWrongPort,
                set.quote,
                format!(
                    "the unit listens on port {}, and port {port} is expected",
                    set.value.trim()
                ),
                format!("set the port to {port}"),
            )
            .refuted_by(format!("a listener on port {port} in the agent's report"));
            out.push(Candidate::fixed(f).despite_run());
        }
    }
    if out.is_empty() {
        out.extend(logged_port(case, name));
    }
    out
}

fn argument(service: &Service<'_>, options: &[&str]) -> Option<Variable> {
    let main = service.main()?;
    let quote = quote_assignment(&main.assignment);
    let mut args = main.args.iter();
    while let Some(arg) = args.next() {
        let value = match arg.split_once('=') {
            Some((option, value)) if options.contains(&option) => Some(value.to_owned()),
            Some(_) => None,
            None if options.contains(&arg.as_str()) => args.next().cloned(),
            None => None,
        };
        if let Some(value) = value {
            // `--bind 127.0.0.1:8080`
            let value = value
                .rsplit_once(':')
                .map_or_else(|| value.clone(), |(h, _)| h.to_owned());
            return Some(Variable { value, quote });
        }
    }
    None
}

static PAIR: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r#"\b([A-Za-z_][A-Za-z0-9_]*)["']?\s*[=:]\s*["']?([^"',;}\s]*)"#).ok()
});

/// A line that would have set one of `names` to what is expected, and was ignored: shell, YAML, JSON, a byte order mark
/// before the name.
fn lost_line(
    name: &str,
    env: &Environment,
    names: &[&str],
    wanted: impl Fn(&str) -> bool,
) -> Option<Candidate> {
    let pattern = PAIR.as_ref()?;
    let (text, quote) = env.ignored.iter().find(|(text, _)| {
        pattern.captures_iter(text).any(|pair| {
            let part = |n| pair.get(n).map_or("", |m| m.as_str());
            names.contains(&part(1)) && wanted(part(2))
        })
    })?;
    let why = format!(
        "systemd ignores `{}`: that is no assignment NAME=value; so another value of the variable applies",
        text.trim()
    );
    let f = about(
        name,
        Cause::EnvironmentIgnored,
        quote.clone(),
        why,
        "write NAME=value, one a line, in UTF-8 without a byte order mark",
    )
    .refuted_by("the expected value in the unit's own output");
    Some(Candidate::fixed(f).despite_run().specific(7))
}

fn unresolvable(root: &Root, name: &str, host: &Variable) -> Option<Candidate> {
    let value = host.value.trim();
    let is_name = value.parse::<std::net::IpAddr>().is_err()
        && value
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c))
        && !value.is_empty();
    let nss = root.read_text("/etc/nsswitch.conf").unwrap_or_default();
    let hosts_line = nss
        .lines()
        .find(|l| l.trim_start().starts_with("hosts:"))
        .unwrap_or("hosts: files dns");
    if !is_name || hosts_line.contains("myhostname") || hosts_line.contains("resolve") {
        return None;
    }
    let known = !addresses_in_hosts(root, value).is_empty();
    let f = about(
        name,
        Cause::LocalhostUnresolvable,
        host.quote.clone(),
        format!("the unit binds to the name {value}, which nothing in the image resolves"),
        "write an address, or add the name to /etc/hosts",
    )
    .and(quote_disk(
        "/etc/hosts",
        None,
        &format!("[no line for {value}]"),
    ))
    .refuted_by("the unit's own `listening` line");
    (!known).then(|| {
        Candidate::fixed(f)
            .specific(7)
            .explaining(&[Cause::ListensOnLoopback])
    })
}

static LISTENING: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?i)\b(?:listening|listens|serving|server (?:running|started)|bound)\b[^\n]*?(?:port[ =:]+|:)(\d{2,5})\b").ok()
});

/// The port and address that the program itself says it listens on.
pub(super) fn logged_port(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(port) = case.port_of(name) else {
        return Vec::new();
    };
    let log = case.unit_log(name);
    let mut own = log.own.iter();
    let Some((line, said)) = own.find_map(|l| {
        let pattern = LISTENING.as_ref()?;
        let said: u16 = pattern.captures(&l.text)?.get(1)?.as_str().parse().ok()?;
        Some((l, said))
    }) else {
        return Vec::new();
    };
    if said != port {
        let f = about(
            name,
            Cause::ListensOnWrongPort,
            line.quote(),
            format!("the program says that it listens on port {said}, and port {port} is expected"),
            format!("set the port to {port}"),
        )
        .refuted_by(format!("a listener on port {port} in the agent's report"));
        return vec![Candidate::observed(f).specific(4)];
    }
    if line.text.contains("127.0.0.1")
        || line.text.contains("localhost:")
        || line.text.contains("[::1]")
    {
        let f = about(
            name,
            Cause::ListensOnLoopback,
            line.quote(),
            "the program says that it listens on the guest's loopback",
            "bind to 0.0.0.0, or reach it over the stream",
        )
        .refuted_by("a listener on 0.0.0.0 or [::] in the agent's report");
        return vec![Candidate::observed(f).specific(4)];
    }
    Vec::new()
}

/// The image gives itself another address than the one under which it is looked for.
pub fn wrong_address(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    if !disk.boot.starts(name) {
        return Vec::new();
    }
    let networking = disk.networking(case);
    let Some(net) = networking.applied() else {
        return Vec::new();
    };
    let addresses = net.addresses();
    let Some((own, quote)) = addresses
        .first()
        .map(|(a, q)| (a.split('/').next().unwrap_or(a).to_owned(), q.clone()))
    else {
        return Vec::new();
    };
    let asked = case.cmdline.as_deref().and_then(network::cmdline_address);
    let slirp = || {
        // QEMU's user network: the gateway is .2, and forwarded ports lead to .15 unless told otherwise.
        let is = net.gateways().iter().any(|g| g == "10.0.2.2") && own.starts_with("10.0.2.");
        is.then(|| ("10.0.2.15".to_owned(), "the gateway 10.0.2.2 is that of QEMU's user network, which forwards ports to 10.0.2.15".to_owned()))
    };
    let expected = case
        .expected_address
        .clone()
        .map(|a| (a, "the host expects that address".to_owned()))
        .or_else(|| {
            asked.map(|(a, word)| {
                (
                    a,
                    format!("the command line gives the guest another address: {word}"),
                )
            })
        })
        .or_else(slirp);
    let Some((expected, because)) = expected else {
        return Vec::new();
    };
    if addresses
        .iter()
        .any(|(a, _)| a.split('/').next() == Some(expected.as_str()))
        || net.dhcp().is_some()
    {
        return Vec::new();
    }
    let f = about(
        name,
        Cause::WrongAddress,
        quote,
        format!("the image sets {own}, and the guest is looked for at {expected}: {because}"),
        format!("remove the address from the image, or set {expected}"),
    )
    .refuted_by(format!("an answer from {own} to the host"));
    vec![Candidate::fixed(f).despite_run()]
}

static EMPTY_LOOP: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?:for\s*\(\s*;\s*;\s*\)|while\s*\(\s*(?:true|1|!0)\s*\))\s*(?:;|\{\s*;?\s*\})")
        .ok()
});

/// A program with one thread that contains a loop without end and without body: it accepts and never answers.
pub fn blocked_loop(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name) else {
        return Vec::new();
    };
    let service = Service::new(&unit, disk.base.root, &disk.base.accounts);
    let Some(script) = service.main().and_then(|m| programs::script_of(&m)) else {
        return Vec::new();
    };
    let main_is_node = service.main().is_some_and(|m| {
        m.program
            .rsplit('/')
            .next()
            .is_some_and(|n| n.starts_with("node"))
    });
    let path = if script.starts_with('/') {
        script
    } else {
        format!(
            "{}/{script}",
            service
                .working_directory()
                .map_or_else(String::new, |(d, _)| d)
        )
    };
    let text = disk.base.root.read_text(&path).unwrap_or_default();
    let hit = EMPTY_LOOP.as_ref().and_then(|r| {
        (1_u64..)
            .zip(text.lines())
            .find(|(_, l)| !l.trim_start().starts_with("//") && r.is_match(l))
    });
    let Some((line, content)) = hit.filter(|_| main_is_node && names::unit_type(name) == "service")
    else {
        return Vec::new();
    };
    let quote: Quote = quote_disk(&path, Some(line), content);
    let f = about(name, Cause::ListeningNotAnswering, quote, "the program has one thread for everything, and this loop never gives it back: connections are accepted by the kernel and never answered", "remove the loop, or move the work to a worker thread")
        .refuted_by("an answer on the unit's port");
    vec![Candidate::fixed(f).strength(Strength::Static).despite_run()]
}
