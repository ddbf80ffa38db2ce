//! The unit runs and nobody reaches it: address, port, namespaces, filters.
use super::{Candidate, Strength, about, exec::service_of};
use crate::{
    case::Case,
    units::{
        names, network, programs, quote_assignment, quote_disk,
        service::{Environment, Service, Variable},
    },
};
use regex::Regex;
use std::sync::LazyLock;
use vestibule_api::{cause::Cause, finding::Quote};

const HOST_NAMES: [&str; 8] = [
    "HOST",
    "BIND",
    "BIND_HOST",
    "BIND_ADDR",
    "BIND_ADDRESS",
    "LISTEN_HOST",
    "LISTEN_ADDR",
    "LISTEN_ADDRESS",
];
const PORT_NAMES: [&str; 4] = ["PORT", "AGENT_PORT", "HTTP_PORT", "LISTEN_PORT"];

fn is_loopback(value: &str) -> bool {
    let host = value.trim_matches(['[', ']']);
    host == "localhost" || host == "::1" || host.starts_with("127.")
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
    let env = service.environment();
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
        if let Some(f) = lost_line(name, &env, &HOST_NAMES, |v| !is_loopback(v))
            .filter(|_| is_loopback(&host.value))
        {
            out.push(f);
        } else if is_loopback(&host.value) {
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
        out.extend(unresolvable(disk.base.root, name, host));
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

/// A line of an environment file that would have set one of `names` to what is expected, and was ignored.
fn lost_line(
    name: &str,
    env: &Environment,
    names: &[&str],
    wanted: impl Fn(&str) -> bool,
) -> Option<Candidate> {
    let (text, quote) = env.ignored.iter().find(|(text, _)| {
        let line = text
            .trim()
            .strip_prefix("export ")
            .or_else(|| text.trim().strip_prefix("set "))
            .unwrap_or_else(|| text.trim());
        let pair = line.split_once('=').or_else(|| line.split_once(':'));
        pair.is_some_and(|(n, v)| {
            names.contains(&n.trim()) && wanted(v.trim().trim_matches(['"', '\'']))
        })
    })?;
    let why = format!(
        "systemd ignores `{}`: an environment file is not a shell script; so another value of the variable applies",
        text.trim()
    );
    let f = about(
        name,
        Cause::EnvironmentIgnored,
        quote.clone(),
        why,
        "write NAME=value without `export`",
    )
    .refuted_by("the expected value in the unit's own output");
    Some(Candidate::fixed(f).despite_run().specific(7))
}

fn unresolvable(root: &crate::disk::Root, name: &str, host: &Variable) -> Option<Candidate> {
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
    let listed = root.read_text("/etc/hosts").unwrap_or_default();
    let known = listed.lines().any(|l| {
        l.split('#')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .any(|h| h == value)
    });
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
fn logged_port(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(port) = case.port_of(name) else {
        return Vec::new();
    };
    let log = case.unit_log(name);
    let Some(pattern) = LISTENING.as_ref() else {
        return Vec::new();
    };
    let Some((line, said)) = log.own.iter().find_map(|l| {
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

/// Namespaces and cgroup filters of the unit.
pub fn isolation(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((_, unit)) = service_of(case, name) else {
        return Vec::new();
    };
    if case.port_of(name).is_none() {
        return Vec::new();
    }
    let mut out = Vec::new();
    let refutes = "an answer on the unit's port from outside the guest";
    let private = unit
        .last("Service", "PrivateNetwork")
        .filter(|a| crate::text::boolean(&a.value) == Some(true))
        .or_else(|| unit.last("Service", "NetworkNamespacePath"));
    if let Some(a) = private {
        let f = about(
            name,
            Cause::PrivateNetwork,
            quote_assignment(a),
            "the unit runs in a network namespace of its own, in which nobody else can reach it",
            "remove the line for this unit",
        )
        .refuted_by(refutes);
        out.push(Candidate::fixed(f).despite_run());
    }
    let denied = unit.all("Service", "IPAddressDeny").into_iter().find(|a| {
        a.value.split_whitespace().any(|w| {
            matches!(
                w,
                "any" | "0.0.0.0/0" | "::/0" | "10.0.0.0/8" | "10.0.2.0/24"
            )
        })
    });
    let allowed = unit
        .all("Service", "IPAddressAllow")
        .into_iter()
        .flat_map(|a| {
            a.value
                .split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        });
    let opened = allowed.into_iter().any(|w| {
        !matches!(w.as_str(), "localhost" | "multicast" | "link-local")
            && !w.starts_with("127.")
            && w != "::1"
    });
    if let Some(a) = denied.filter(|_| !opened) {
        let f = about(name, Cause::AddressFiltered, quote_assignment(a), "systemd's address filter on the unit's cgroup drops every packet from outside the guest", "allow the host's address with IPAddressAllow=, or remove the filter").refuted_by(refutes);
        out.push(Candidate::fixed(f).despite_run());
    }
    let families = unit.all("Service", "RestrictAddressFamilies");
    let words: Vec<&str> = families
        .iter()
        .flat_map(|a| a.value.split_whitespace())
        .collect();
    let allow_list = words
        .first()
        .is_some_and(|w| !w.starts_with('~') && *w != "none");
    let has_inet = words
        .iter()
        .any(|w| w.trim_start_matches('~').starts_with("AF_INET"));
    let deny_inet = words.first().is_some_and(|w| w.starts_with('~')) && has_inet;
    if let Some(a) = families
        .last()
        .filter(|_| (allow_list && !has_inet) || deny_inet || words.contains(&"none"))
    {
        let f = about(
            name,
            Cause::AddressFiltered,
            quote_assignment(a),
            "the unit may not open an internet socket at all",
            "add AF_INET and AF_INET6",
        )
        .refuted_by(refutes);
        out.push(Candidate::fixed(f).despite_run());
    }
    let bind = unit
        .all("Service", "SocketBindDeny")
        .into_iter()
        .find(|a| a.value.contains("any") || a.value.contains("8080"));
    if let Some(a) = bind.filter(|_| unit.all("Service", "SocketBindAllow").is_empty()) {
        let f = about(
            name,
            Cause::AddressFiltered,
            quote_assignment(a),
            "systemd refuses the unit to bind its port",
            "allow it with SocketBindAllow=",
        )
        .refuted_by(refutes);
        out.push(Candidate::fixed(f).despite_run());
    }
    out
}

/// A packet filter of the image that drops the unit's port.
pub fn firewall(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let (Some(disk), Some(port)) = (&case.disk, case.port_of(name)) else {
        return Vec::new();
    };
    let root = disk.base.root;
    let starts = |n: &str| disk.boot.starts(n) && disk.units.load(n).is_loaded();
    let quote = if starts("nftables.service") {
        let path = "/etc/nftables.conf";
        root.read_text(path).and_then(|text| {
            nft_drops(&with_includes(root, &text), port)
                .map(|(line, content)| quote_disk(path, Some(line), &content))
        })
    } else {
        None
    };
    let quote = quote.or_else(|| {
        let services = [
            "netfilter-persistent.service",
            "iptables.service",
            "iptables-persistent.service",
        ];
        let path = "/etc/iptables/rules.v4";
        let text = services
            .iter()
            .any(|s| starts(s))
            .then(|| root.read_text(path))??;
        iptables_drops(&text, port).map(|(line, content)| quote_disk(path, Some(line), &content))
    });
    let quote = quote.or_else(|| {
        let path = "/etc/ufw/ufw.conf";
        let text = starts("ufw.service").then(|| root.read_text(path))??;
        let (line, content) = (1_u64..)
            .zip(text.lines())
            .find(|(_, l)| l.trim() == "ENABLED=yes")?;
        let rules = root.read_text("/etc/ufw/user.rules").unwrap_or_default();
        (!rules.contains(&format!("--dport {port} ")))
            .then(|| quote_disk(path, Some(line), content))
    });
    let Some(quote) = quote else {
        return Vec::new();
    };
    let f = about(
        name,
        Cause::FirewallDrops,
        quote,
        format!(
            "the guest's packet filter drops what comes in and makes no exception for port {port}"
        ),
        format!("accept tcp dport {port}, or do not enable the filter"),
    )
    .refuted_by(format!("an answer on port {port} from outside the guest"));
    vec![Candidate::fixed(f).despite_run()]
}

fn with_includes(root: &crate::disk::Root, text: &str) -> String {
    let mut out = text.to_owned();
    for line in text.lines() {
        let Some(path) = line
            .trim()
            .strip_prefix("include ")
            .map(|p| p.trim_matches(['"', '\'']))
        else {
            continue;
        };
        for file in crate::units::service::glob_files(root, path) {
            out.push('\n');
            out.push_str(&root.read_text(&file).unwrap_or_default());
        }
    }
    out
}

/// The line of an nftables ruleset whose input chain drops by policy, without a rule that accepts `port`; or that drops it by name.
fn nft_drops(text: &str, port: u16) -> Option<(u64, String)> {
    let port_word = port.to_string();
    let names_port = |line: &str| {
        line.contains("dport")
            && line
                .split(|c: char| !c.is_ascii_digit() && c != '-')
                .any(|w| {
                    w == port_word
                        || w.split_once('-').is_some_and(|(a, b)| {
                            a.parse::<u16>().is_ok_and(|a| a <= port)
                                && b.parse::<u16>().is_ok_and(|b| port <= b)
                        })
                })
    };
    let mut in_input = false;
    let mut policy = None;
    let mut accepted = false;
    // Statements are separated by newlines and semicolons alike.
    for (number, line) in (1_u64..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default();
        for statement in line.split_inclusive([';', '{', '}']) {
            let statement = statement.trim();
            if statement.contains("chain ") {
                in_input = false;
            }
            if statement.contains("hook input") {
                in_input = true;
            }
            if !in_input {
                continue;
            }
            if statement.contains("policy drop") {
                policy = Some((number, line.trim().to_owned()));
            }
            if names_port(statement) && (statement.contains("drop") || statement.contains("reject"))
            {
                return Some((number, line.trim().to_owned()));
            }
            let last_drop = matches!(
                statement.trim_end_matches(';'),
                "drop" | "reject" | "counter drop" | "counter reject"
            );
            if last_drop && !accepted {
                policy = Some((number, line.trim().to_owned()));
            }
            let bare = statement.trim_end_matches([';', '}']).trim();
            if (names_port(line) && statement.contains("accept"))
                || names_port(statement)
                || bare == "accept"
                || bare == "counter accept"
            {
                accepted |= line.contains("accept");
            }
        }
    }
    policy.filter(|_| !accepted)
}

fn iptables_drops(text: &str, port: u16) -> Option<(u64, String)> {
    let accepted = text.lines().any(|l| {
        l.starts_with("-A INPUT")
            && l.contains("ACCEPT")
            && (l.contains(&format!("--dport {port} ")) || l.trim() == "-A INPUT -j ACCEPT")
    });
    let hit = (1_u64..).zip(text.lines()).find(|(_, l)| {
        l.starts_with(":INPUT DROP")
            || (l.starts_with("-A INPUT")
                && (l.contains("DROP") || l.contains("REJECT"))
                && (l.contains(&format!("--dport {port} ")) || !l.contains("port")))
    });
    hit.filter(|_| !accepted).map(|(n, l)| (n, l.to_owned()))
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
