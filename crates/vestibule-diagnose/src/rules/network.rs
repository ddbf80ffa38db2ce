//! The network on the way to readiness: a unit behind `network-online.target`, a configuration that matches no card, a
//! card without a driver. The costliest failures of the earlier system are in this file.
use super::{Candidate, Strength, about, vm, waiting};
use crate::{
    case::{Case, DiskCase},
    units::{
        network::{self, Network},
        quote_disk,
    },
};
use vestibule_api::{cause::Cause, finding::Quote};

/// `systemd-networkd-wait-online --timeout=` and its like, in seconds.
const WAIT_DEFAULT: f64 = 120.0;

/// What the run says of waiting for the network.
enum Wait {
    /// It ended well.
    Over,
    /// It was given up, or was still going on when the log ended.
    Long(Quote),
    /// The log does not say.
    Unknown,
}

fn wait_seen(case: &Case<'_>, service: &str) -> Wait {
    let log = case.unit_log(service);
    if let Some(line) = log.ended_badly() {
        return Wait::Long(line.quote());
    }
    if log.began("Finished ").is_some() {
        return Wait::Over;
    }
    if case
        .log
        .first(|l| l.text.starts_with("Reached target network-online.target"))
        .is_some()
        && log.is_empty()
    {
        return Wait::Over;
    }
    match log.began("Starting ") {
        Some(line) => Wait::Long(line.quote()),
        None => Wait::Unknown,
    }
}

/// A unit that waits until the network is *online*.
pub fn waits_for_network(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return logged_wait(case, name);
    };
    let canonical = disk.units.canonical(name);
    if !disk.boot.starts(name) || !disk.units.load(name).is_loaded() {
        return Vec::new();
    }
    let waits = disk.boot.waits_for(&canonical);
    let Some((service, chain)) = waits
        .iter()
        .find(|(n, _)| network::is_wait_online(n) && disk.units.load(n).is_loaded())
    else {
        return Vec::new();
    };
    let link = chain
        .last()
        .and_then(|(_, q)| q.clone())
        .unwrap_or_else(|| disk.units.load(name).quote_file());
    let seen = wait_seen(case, service);
    let strength = match &seen {
        Wait::Over => return Vec::new(),
        Wait::Long(_) => Strength::Observed,
        Wait::Unknown => waiting::OUTSIDE,
    };
    let observed = match seen {
        Wait::Long(quote) => Some(quote),
        Wait::Over | Wait::Unknown => None,
    };
    let card = disk.base.networks.iter().find(|n| n.can_match_card());
    let limit = wait_limit(disk, service);
    let own_limit = waiting::job_limit(&disk.units.load(name)).filter(|l| *l < limit);
    let networkd = service.starts_with("systemd-networkd");
    let mut configured = disk.base.networks.iter().filter(|n| n.is_configured());
    let configured = configured.next();
    let (cause, config, why) = match card {
        None if networkd && configured.is_none() => (
            Cause::WaitsForNetworkOnline,
            disk.units.load(service).quote_file(),
            format!(
                "the unit is ordered after network-online.target; no .network file is for a card, so systemd-networkd manages none, and {service} holds the unit back for up to {limit:.0} s"
            ),
        ),
        None if networkd => {
            let line = configured.and_then(Network::match_quote);
            let line = line
                .unwrap_or_else(|| quote_disk("/etc/systemd/network", None, "[no .network file]"));
            (Cause::NetworkMatchesNoLink, line, "no .network file matches a card that a VM can have, so the card stays unmanaged and the network never comes online".to_owned())
        }
        Some(net)
            if net.addresses().is_empty()
                || !service.starts_with("systemd-networkd")
                || observed.is_some() =>
        {
            let line = net
                .dhcp()
                .or_else(|| net.match_quote())
                .unwrap_or_else(|| quote_disk(&net.path, None, "[no address]"));
            (
                Cause::WaitsForNetworkOnline,
                line,
                format!(
                    "the unit is ordered after network-online.target, and {service} holds that back until somebody outside gives the card an address, for up to {limit:.0} s"
                ),
            )
        }
        None => (
            Cause::WaitsForNetworkOnline,
            disk.units.load(service).quote_file(),
            format!(
                "the unit is ordered after network-online.target, which {service} holds back until the network answers"
            ),
        ),
        Some(_) => return Vec::new(),
    };
    // Without any configuration a machine may have no card at all, and whether that holds anything up only a run tells.
    let silent = observed.is_none() && !case.host.failed;
    if networkd && card.is_none() && configured.is_none() && silent {
        return Vec::new();
    }
    let fix = if cause == Cause::NetworkMatchesNoLink {
        "correct Name= in [Match] (virtio cards are eth0, or ens3 and the like), or drop the dependency on network-online.target"
    } else {
        "order the unit after network.target or nothing, and mask the wait-online service"
    };
    if let Some(own) = own_limit {
        let f = waiting::job_timeout(name, own, &disk.units.load(name), link);
        return vec![
            Candidate::fixed(f)
                .strength(strength)
                .explaining(&[Cause::WaitsForNetworkOnline]),
        ];
    }
    let mut f = match observed {
        Some(quote) => about(name, cause, quote, why, fix).and(config).and(link),
        None => about(name, cause, config, why, fix).and(link),
    };
    f = f.refuted_by("`Finished systemd-networkd-wait-online.service` before the unit's deadline in the same boot");
    let candidate =
        Candidate::fixed(f)
            .strength(strength)
            .specific(if cause == Cause::NetworkMatchesNoLink {
                7
            } else {
                6
            });
    vec![if strength == Strength::Observed {
        candidate.despite_run()
    } else {
        candidate
    }]
}

fn wait_limit(disk: &DiskCase<'_>, service: &str) -> f64 {
    let unit = disk.units.load(service);
    let command = unit.value("Service", "ExecStart").unwrap_or_default();
    let set = command
        .split_whitespace()
        .find_map(|w| w.strip_prefix("--timeout="))
        .and_then(crate::text::seconds);
    set.map_or(WAIT_DEFAULT, |s| if s <= 0.0 { f64::INFINITY } else { s })
}

/// Without a disk: the log shows the wait and nothing of the unit.
fn logged_wait(case: &Case<'_>, name: &str) -> Vec<Candidate> {
    let unit = case.unit_log(name);
    let reached = case
        .log
        .first(|l| l.text.starts_with("Reached target multi-user.target"));
    if !unit.is_empty() || reached.is_some() || !case.log.has_console && !case.log.has_journal {
        return Vec::new();
    }
    let description = "Wait for Network to be Configured";
    let service = "systemd-networkd-wait-online.service";
    let log = crate::log::run::UnitLog::new(&case.log, service, Some(description));
    let Some(start) = log
        .began("Starting ")
        .filter(|_| log.began("Finished ").is_none())
    else {
        return Vec::new();
    };
    let f = about(
        name,
        Cause::WaitsForNetworkOnline,
        start.quote(),
        "the boot's last open job waits for the network, and the unit was never started",
        "order the unit after network.target or nothing, and mask the wait-online service",
    )
    .refuted_by("a `Started` line of the unit in the same boot");
    vec![Candidate::observed(f).strength(waiting::OUTSIDE)]
}

/// The image relies on a card, and the kernel has no driver for it.
pub fn driver_missing(case: &Case<'_>) -> Vec<Candidate> {
    let Some(disk) = &case.disk else {
        return Vec::new();
    };
    let card = disk.base.networks.iter().find(|n| n.can_match_card());
    let Some(card) = card.filter(|c| c.dhcp().is_some() || !c.addresses().is_empty()) else {
        return Vec::new();
    };
    let config = card
        .match_quote()
        .unwrap_or_else(|| quote_disk(&card.path, None, "[a network file]"));
    let fix = "install the kernel's modules in the image, or use a kernel with virtio_net built in";
    let networkd = case
        .log
        .first(|l| l.text.starts_with("Started systemd-networkd.service"));
    let link = case.log.first(|l| {
        (l.text.contains("Gained carrier")
            || l.text.contains("Link UP")
            || l.text.contains("found matching network")
            || l.text.contains("Configuring with")
            || l.text.contains("renamed from eth"))
            && !l.text.starts_with("lo:")
    });
    let virtio = case.log.first(|l| l.text.contains("virtio_net virtio"));
    if link.is_some() || virtio.is_some() {
        return Vec::new();
    }
    let journal_from_networkd = case.log.has_journal && networkd.is_some();
    let waited = ["systemd-networkd-wait-online.service"]
        .iter()
        .find_map(|s| match wait_seen(case, s) {
            Wait::Long(q) => Some(q),
            Wait::Over | Wait::Unknown => None,
        });
    let mut out = Vec::new();
    if let (true, Some(waited)) = (journal_from_networkd, waited) {
        // networkd logs every link that it takes; a journal without any means that there was no card to take.
        let complete = case.journals_reach(&waited);
        let f = vm(Cause::NetworkDriverMissing, waited, "networkd ran and met no card at all, although its configuration would match any: the guest has no network card that its kernel can drive", fix)
            .and(config.clone())
            .refuted_by("a line of networkd about eth0 or ens3 in the same boot");
        if complete {
            out.push(Candidate::observed(f).explaining(&[Cause::WaitsForNetworkOnline]));
        }
    }
    out.extend(modules_on_disk(case, disk, &config, fix));
    out
}

/// A modules directory of the kernel that boots, without the driver.
fn modules_on_disk(
    case: &Case<'_>,
    disk: &DiskCase<'_>,
    config: &Quote,
    fix: &str,
) -> Option<Candidate> {
    let root = disk.base.root;
    let releases: Vec<String> = match &case.kernel {
        Some(release) => vec![release.clone()],
        None => root
            .list("/usr/lib/modules")
            .iter()
            .map(|e| e.name.clone())
            .collect(),
    };
    let [release] = releases.as_slice() else {
        return None;
    };
    let base = format!("/usr/lib/modules/{release}");
    let Some(builtin) = root.read_text(&format!("{base}/modules.builtin")) else {
        let asked =
            case.kernel_given && !root.list("/usr/lib/modules").is_empty() && !root.is_dir(&base);
        let quote = quote_disk(
            "/usr/lib/modules",
            None,
            &format!("[no directory {release}]"),
        );
        let f = vm(
            Cause::NetworkDriverMissing,
            quote,
            format!("the disk holds modules, and none for the kernel {release} that boots it"),
            fix,
        )
        .and(config.clone())
        .refuted_by("a kernel with virtio_net built in, or an initrd that loads it");
        return asked.then(|| Candidate::fixed(f).strength(waiting::OUTSIDE));
    };
    let net = format!("{base}/kernel/drivers/net");
    let there = root
        .list(&net)
        .iter()
        .any(|e| e.name.starts_with("virtio_net.ko"))
        || builtin.contains("/virtio_net.ko");
    let f = vm(
        Cause::NetworkDriverMissing,
        quote_disk(
            &net,
            None,
            "[no virtio_net.ko, and it is not in modules.builtin]",
        ),
        format!("the kernel {release} has no driver for a virtio network card"),
        fix,
    )
    .and(config.clone())
    .refuted_by("an initrd that loads virtio_net, or a line of the kernel about eth0");
    (!there && root.is_dir(&net))
        .then(|| Candidate::fixed(f).explaining(&[Cause::WaitsForNetworkOnline]))
}

impl Case<'_> {
    /// Whether the journal goes on until `quote`'s time: only then its silence means something.
    fn journals_reach(&self, quote: &Quote) -> bool {
        quote.source.starts_with("journal")
            || quote.source.starts_with("disk:")
            || self
                .log
                .first(|l| !l.is_console() && l.text.contains("wait-online"))
                .is_some()
    }
}
