//! A packet filter of the image that keeps the host from the unit's port: nftables, iptables, ufw.
use super::{Candidate, about, isolation};
use crate::{
    case::{Case, DiskCase},
    nft,
    units::{condition, quote_disk, service::Service},
};
use std::collections::BTreeMap;
use vestibule_api::{cause::Cause, finding::Quote};

/// A packet filter of the image that drops the unit's port.
pub fn firewall(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let (Some(disk), Some(port)) = (&case.disk, case.port_of(name)) else {
        return Vec::new();
    };
    let root = disk.base.root;
    let starts = |n: &str| disk.boot.starts(n) && disk.units.load(n).is_loaded();
    let quote = nftables(case, disk, port);
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
        format!("the guest's packet filter lets no connection from outside through to port {port}"),
        format!("accept tcp dport {port}, or do not enable the filter"),
    )
    .refuted_by(format!("an answer on port {port} from outside the guest"));
    vec![Candidate::fixed(f).despite_run()]
}

/// The line of a ruleset of this boot that blocks the port. Of several rulesets one must not take away another's rules: in
/// which order they come is not asked.
fn nftables(case: &Case<'_>, disk: &DiskCase<'_>, port: u16) -> Option<Quote> {
    let root = disk.base.root;
    let files = rulesets(case, disk);
    let alone = files.len() == 1 || !files.iter().any(|f| nft::removes(root, f));
    if files.is_empty() || !alone {
        return None;
    }
    let world = world(case, disk, port);
    let place = files
        .iter()
        .find_map(|file| nft::blocker(root, file, &world))?;
    Some(quote_disk(&place.file, Some(place.line), &place.text))
}

/// The files that services of this boot load with `nft -f`.
fn rulesets(case: &Case<'_>, disk: &DiskCase<'_>) -> Vec<String> {
    let root = disk.base.root;
    let mut files = Vec::new();
    for name in disk.boot.jobs.keys().filter(|n| n.ends_with(".service")) {
        let unit = disk.units.load(name);
        if !unit.is_loaded() {
            continue;
        }
        let service = Service::new(&unit, root, &disk.base.accounts);
        let mut own = Vec::new();
        for command in service.commands().into_iter().filter_map(Result::ok) {
            let is_nft = command.program.rsplit('/').next() == Some("nft");
            if is_nft && root.exists(&full_path(&command.program)) {
                own.extend(loaded_file(&command.args));
            } else if root
                .read_at(&command.program, 0, 64)
                .is_some_and(|head| runs_nft(&head))
            {
                own.push(command.program);
            }
        }
        // A oneshot that does not remain runs its ExecStop= at once, and with it `nft flush ruleset`.
        let stays = service.kind() != "oneshot"
            || unit.flag("Service", "RemainAfterExit") == Some(true)
            || !unit.has("Service", "ExecStop");
        let facts = disk.facts(&unit, case);
        let skipped = ["Condition", "Assert"]
            .iter()
            .any(|kind| condition::first_false(&unit, kind, &facts).is_some());
        if !own.is_empty() && stays && !skipped {
            files.extend(own);
        }
    }
    files.sort();
    files.dedup();
    files
}

fn full_path(program: &str) -> String {
    if program.starts_with('/') {
        program.to_owned()
    } else {
        format!("/usr/sbin/{program}")
    }
}

/// The file of `nft -f FILE`. `--check` loads nothing, and other options change what the file means.
fn loaded_file(args: &[String]) -> Option<String> {
    match args {
        [option, file] if matches!(option.as_str(), "-f" | "--file") => Some(file.clone()),
        [one] => one.strip_prefix("--file=").map(str::to_owned),
        _ => None,
    }
    .filter(|file| file.starts_with('/'))
}

/// Whether a file begins with `#!/usr/sbin/nft -f`.
fn runs_nft(head: &[u8]) -> bool {
    let head = String::from_utf8_lossy(head);
    let line = head.lines().next().unwrap_or_default();
    let mut words = line
        .strip_prefix("#!")
        .unwrap_or_default()
        .split_whitespace();
    words.next().is_some_and(|w| w.ends_with("/nft")) && words.next() == Some("-f")
}

/// Who connects to whom.
fn world(case: &Case<'_>, disk: &DiskCase<'_>, port: u16) -> nft::World {
    let networking = disk.networking(case);
    let addresses = networking.applied().map(|n| n.addresses());
    let addresses = addresses.unwrap_or_default();
    let own = match addresses.as_slice() {
        [(address, _)] => address.split('/').next().map(str::to_owned),
        _ => None,
    };
    let guest = case.expected_address.clone().or(own);
    let text = disk.base.root.read_text("/etc/services");
    nft::World {
        port,
        host: isolation::host_address(case, disk),
        guest: guest.and_then(|g| g.parse().ok()),
        services: text.map(|t| tcp_services(&t)).unwrap_or_default(),
    }
}

/// `services(5)`.
fn tcp_services(text: &str) -> BTreeMap<String, u16> {
    let mut out = BTreeMap::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, port, aliases @ ..] = words.as_slice() else {
            continue;
        };
        let number = port.strip_suffix("/tcp").and_then(|p| p.parse().ok());
        if let Some(number) = number {
            for name in std::iter::once(name).chain(aliases) {
                out.insert((*name).to_owned(), number);
            }
        }
    }
    out
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
