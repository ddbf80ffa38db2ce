//! Namespaces and filters of systemd around a unit that runs.
use super::{Candidate, about, exec::service_of};
use crate::{
    case::{Case, DiskCase},
    units::{Assignment, Load, Unit, names, parse, quote_assignment},
};
use std::net::Ipv4Addr;
use vestibule_api::cause::Cause;

/// Namespaces and cgroup filters of the unit.
pub fn isolation(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some((disk, unit)) = service_of(case, name) else {
        return Vec::new();
    };
    let Some(port) = case.port_of(name) else {
        return Vec::new();
    };
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
    if let Some(a) = address_filter(case, disk, &unit) {
        let f = about(
            name,
            Cause::AddressFiltered,
            quote_assignment(&a),
            "systemd's address filter on the unit's cgroup drops every packet from outside the guest",
            "allow the host's address with IPAddressAllow=, or remove the filter",
        )
        .refuted_by(refutes);
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
    let rules = |key| unit.all("Service", key).into_iter();
    let covers = |a: &&Assignment| {
        let mut words = a.value.split_whitespace();
        words.any(|w| bind_rule_covers(w, port))
    };
    let denied = rules("SocketBindDeny").find(covers);
    // Without the BPF framework systemd ignores the line with a warning; Debian 12 builds it without.
    let applies = |_: &&Assignment| {
        !rules("SocketBindAllow").any(|a| covers(&a))
            && disk.units.systemd_has("BPF_FRAMEWORK") == Some(true)
    };
    if let Some(a) = denied.filter(applies) {
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

/// A rule of `SocketBindDeny=` for TCP ports of both families.
fn bind_rule_covers(rule: &str, port: u16) -> bool {
    let ports = rule.strip_prefix("tcp:").unwrap_or(rule);
    let (low, high) = ports.split_once('-').unwrap_or((ports, ports));
    let within = || Some((low.parse::<u16>().ok()?..=high.parse().ok()?).contains(&port));
    matches!(rule, "any" | "tcp") || within() == Some(true)
}

/// The line of `IPAddressDeny=` that covers the host, of the unit or a slice above it. What any of them allows is allowed
/// (`systemd.resource-control(5)`).
fn address_filter(case: &Case<'_>, disk: &DiskCase<'_>, unit: &Unit) -> Option<Assignment> {
    let mut denied = None;
    let known = host_address(case, disk);
    // Without an address on the disk it is that of QEMU's user network, and what else may be allowed is not known.
    let host = known.unwrap_or(Ipv4Addr::new(10, 0, 2, 2));
    for layer in std::iter::once(unit.clone()).chain(slices(disk, unit)) {
        let section = if names::unit_type(&layer.name) == "slice" {
            "Slice"
        } else {
            "Service"
        };
        for a in layer.all(section, "IPAddressAllow") {
            let mut words = a.value.split_whitespace();
            let local = |w: &str| {
                matches!(w, "localhost" | "multicast" | "link-local")
                    || w.starts_with("127.")
                    || w == "::1"
            };
            if words.any(|w| filter_covers(w, host) || (known.is_none() && !local(w))) {
                return None;
            }
        }
        for a in layer.all(section, "IPAddressDeny") {
            let hit = a.value.split_whitespace().any(|w| filter_covers(w, host));
            denied = denied.or_else(|| hit.then(|| a.clone()));
        }
    }
    denied
}

/// The host as the guest sees it: the gateway, in QEMU's user network and behind a tap device alike.
pub(super) fn host_address(case: &Case<'_>, disk: &DiskCase<'_>) -> Option<Ipv4Addr> {
    let networking = disk.networking(case);
    networking.applied()?.gateways().first()?.parse().ok()
}

fn filter_covers(word: &str, host: Ipv4Addr) -> bool {
    let (address, bits) = word.split_once('/').unwrap_or((word, "32"));
    let within = || {
        let bits: u32 = bits.parse().ok().filter(|b| *b <= 32)?;
        let mask = u32::MAX.checked_shr(bits).unwrap_or(0);
        let address: Ipv4Addr = address.parse().ok()?;
        Some((u32::from(address) | mask) == (u32::from(host) | mask))
    };
    word == "any" || within() == Some(true)
}

/// The slices around a service, nearest first (`systemd.slice(5)`): most have no file, and drop-ins count all the same.
fn slices(disk: &DiskCase<'_>, unit: &Unit) -> Vec<Unit> {
    let default = || match names::instance(&unit.name) {
        Some(_) => format!(
            "system-{}.slice",
            names::prefix(&unit.name).replace('-', "\\x2d")
        ),
        None => "system.slice".to_owned(),
    };
    let named = unit.value("Service", "Slice").map(str::to_owned);
    let mut next = Some(named.unwrap_or_else(default));
    let mut out = Vec::new();
    while let Some(name) = next {
        let stem = name.strip_suffix(".slice").unwrap_or_default();
        next = match stem.rsplit_once('-') {
            Some((parent, _)) if !parent.is_empty() => Some(format!("{parent}.slice")),
            _ if stem == "-" || stem.is_empty() => None,
            _ => Some("-.slice".to_owned()),
        };
        let mut slice = (*disk.units.load(&name)).clone();
        if slice.load == Load::Missing {
            for path in disk.units.dropins(&name) {
                let bytes = disk.base.root.read(&path).unwrap_or_default();
                slice
                    .assignments
                    .extend(parse::parse(&bytes, &path).assignments);
            }
        }
        out.push(slice);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_cover_the_host_or_the_port() {
        let host = Ipv4Addr::new(10, 0, 2, 2);
        for (word, expected) in [
            ("any", true),
            ("10.0.0.0/8", true),
            ("0.0.0.0/0", true),
            ("10.0.2.2", true),
            ("10.0.2.3", false),
            ("192.168.0.0/16", false),
            ("::/0", false),
            ("localhost", false),
        ] {
            assert_eq!(filter_covers(word, host), expected, "{word}");
        }
        for (rule, expected) in [
            ("any", true),
            ("8080", true),
            ("tcp:8000-9000", true),
            ("tcp", true),
            ("udp:8080", false),
            ("18080", false),
            ("tcp:80", false),
        ] {
            assert_eq!(bind_rule_covers(rule, 8080), expected, "{rule}");
        }
    }
}
