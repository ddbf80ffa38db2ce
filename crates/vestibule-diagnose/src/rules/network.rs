//! The network on the way to readiness: a unit behind `network-online.target`, a configuration that matches no card, a
//! card without a driver. The costliest failures of the earlier system are in this file.
use super::{Candidate, Strength, about, vm, waiting};
use crate::{
    case::{Case, DiskCase},
    log::Line,
    units::{
        condition::Outcome,
        network::{self, Networking},
        quote_disk,
    },
};
use vestibule_api::{cause::Cause, finding::Quote};

/// `systemd-networkd-wait-online --timeout=` and its like, in seconds.
const WAIT_DEFAULT: f64 = 120.0;

/// How the names of systemd-networkd's units begin.
const NETWORKD: &str = "systemd-networkd";
const WAIT_ONLINE: &str = "systemd-networkd-wait-online.service";

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
        .find(|(n, _)| network::is_wait_online(n) && waits_really(disk, n))
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
    let limit = wait_limit(disk, service);
    let own_limit = waiting::job_limit(&disk.units.load(name)).filter(|l| *l < limit);
    let networking = disk.networking(case);
    let why = unmanaged(case, networking, service)
        .or_else(|| unanswered(disk, networking, service, observed.is_some()));
    let Some(Why { cause, config, why }) = why else {
        return Vec::new();
    };
    let why = format!(
        "the unit is ordered after network-online.target, which {service} holds back for up to {limit:.0} s: {why}"
    );
    let fix = if cause == Cause::NetworkMatchesNoLink {
        "make a .network file match the card (virtio cards are eth0, or ens3 and the like) and readable, or drop the dependency on network-online.target"
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

/// Whether a wait-online service waits: it is loaded, and so is what it belongs to, without which it fails at once.
fn waits_really(disk: &DiskCase<'_>, service: &str) -> bool {
    let unit = disk.units.load(service);
    let command = unit.value("Service", "ExecStart").unwrap_or_default();
    let networkd = disk.units.load("systemd-networkd.service").is_loaded();
    let own = service.starts_with(NETWORKD);
    unit.is_loaded() && (!own || networkd && command.contains("wait-online"))
}

/// Why the network does not come online.
struct Why {
    cause: Cause,
    config: Quote,
    why: String,
}

/// systemd-networkd takes no card, so that there is never one that is online.
fn unmanaged(case: &Case<'_>, networking: &Networking, service: &str) -> Option<Why> {
    if !service.starts_with(NETWORKD) {
        return None;
    }
    let card = card_seen(case);
    let no_link = |config, why: String| {
        Some(Why {
            cause: Cause::NetworkMatchesNoLink,
            config,
            why,
        })
    };
    let nothing = || quote_disk("/etc/systemd/network", None, "[no .network file]");
    if let Some(net) = networking.applied() {
        // A file for one card among several: whether it is this one, the run tells.
        let left = card.filter(|_| net.matches == Outcome::Unknown && ignored_links(case))?;
        return no_link(
            net.match_quote().unwrap_or_else(nothing),
            format!(
                "systemd-networkd took no card although there is one ({}), so this is not for it",
                left.text
            ),
        );
    }
    if let Some((quote, why)) = networking.unused.first() {
        let why = format!("{why}, and no other file is for the card, which stays unmanaged");
        return no_link(quote.clone(), why);
    }
    let mut configured = networking.configured();
    match (configured.next(), &networking.card.renamed) {
        (Some(net), Some(renamed)) => no_link(
            renamed.clone(),
            format!(
                "this gives the card a name that {} does not match, so it stays unmanaged",
                net.path
            ),
        ),
        (Some(net), None) => no_link(
            net.match_quote().unwrap_or_else(nothing),
            "no .network file matches a card that this VM can have, so it stays unmanaged"
                .to_owned(),
        ),
        (None, _) if card.is_some() => no_link(
            nothing(),
            "there is a card, and no .network file is for it, so it stays unmanaged".to_owned(),
        ),
        (None, _) => Some(Why {
            cause: Cause::WaitsForNetworkOnline,
            config: nothing(),
            why: "no .network file is for a card, so systemd-networkd manages none".to_owned(),
        }),
    }
}

/// Somebody outside has to answer: a DHCP server, a router, or whoever a service of another program asks.
fn unanswered(
    disk: &DiskCase<'_>,
    networking: &Networking,
    service: &str,
    observed: bool,
) -> Option<Why> {
    let (config, why) = match networking.applied() {
        Some(net) if net.addresses().is_empty() || !service.starts_with(NETWORKD) || observed => {
            let line = net.dhcp().or_else(|| net.match_quote());
            (
                line.unwrap_or_else(|| quote_disk(&net.path, None, "[no address]")),
                "the card that this is for has to get an address from somebody outside",
            )
        }
        Some(_) => return None,
        None => (
            disk.units.load(service).quote_file(),
            "somebody in the network has to answer first",
        ),
    };
    Some(Why {
        cause: Cause::WaitsForNetworkOnline,
        config,
        why: why.to_owned(),
    })
}

/// A line that only a network card beside `lo` brings about.
fn card_seen<'c>(case: &'c Case<'_>) -> Option<&'c Line> {
    case.log.first(|l| {
        l.text.contains("renamed from eth")
            || l.text.contains("virtio_net virtio")
            // udev does not look for a name of lo.
            || l.text.starts_with("Network interface NamePolicy= disabled")
    })
}

/// A line of networkd, or of the kernel, about a card that networkd has taken.
fn link_taken<'c>(case: &'c Case<'_>) -> Option<&'c Line> {
    let marks = [
        "Gained carrier",
        "Link UP",
        "found matching network",
        "Configuring with",
    ];
    case.log
        .first(|l| marks.iter().any(|m| l.text.contains(m)) && !l.text.starts_with("lo:"))
}

/// Whether networkd was heard, until the wait was over, and spoke of no card.
fn ignored_links(case: &Case<'_>) -> bool {
    let started = |l: &Line| l.text.starts_with("Started systemd-networkd.service");
    let Wait::Long(waited) = wait_seen(case, WAIT_ONLINE) else {
        return false;
    };
    case.log.has_journal
        && case.log.first(started).is_some()
        && link_taken(case).is_none()
        && case.journals_reach(&waited)
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
    let networking = disk.networking(case);
    let card = networking.applied();
    let Some(card) = card.filter(|c| c.dhcp().is_some() || !c.addresses().is_empty()) else {
        return Vec::new();
    };
    let config = card
        .match_quote()
        .unwrap_or_else(|| quote_disk(&card.path, None, "[a network file]"));
    let fix = "install the kernel's modules in the image, or use a kernel with virtio_net built in";
    let driven = ["renamed from eth", "virtio_net virtio"];
    if link_taken(case).is_some() || case.log.any_of(&driven).is_some() {
        return Vec::new();
    }
    let mut out = Vec::new();
    // networkd logs every link that it takes; a journal without any means that there was no card to take, unless the file is
    // for one among several, or for a name that the card need not have.
    let any = card.matches == Outcome::True || !card.is_particular() && card_seen(case).is_none();
    if let Wait::Long(waited) = wait_seen(case, WAIT_ONLINE)
        && any
        && ignored_links(case)
    {
        let f = vm(Cause::NetworkDriverMissing, waited, "networkd ran and met no card at all, although its configuration would match any: the guest has no network card that its kernel can drive", fix)
            .and(config.clone())
            .refuted_by("a line of networkd about eth0 or ens3 in the same boot");
        out.push(Candidate::observed(f).explaining(&[Cause::WaitsForNetworkOnline]));
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
    if !there && root.is_dir(&format!("{base}/kernel")) {
        return Some(Candidate::fixed(f).explaining(&[Cause::WaitsForNetworkOnline]));
    }
    if builtin.contains("/virtio_net.ko") {
        return None;
    }
    let f = vm(
        Cause::NetworkDriverMissing,
        denied(case, disk)?,
        "the driver of a virtio network card is a module, and this keeps it from being loaded",
        "take the line or the word away",
    )
    .and(config.clone())
    .refuted_by("an initrd that loads virtio_net by itself, or a line of the kernel about eth0");
    Some(Candidate::fixed(f).strength(waiting::OUTSIDE))
}

/// What keeps udev from loading virtio_net: `modprobe.d(5)`'s `blacklist`, which counts for names that a device asks by, an
/// `install` of nothing, or the command line's words of the kernel (`module_blacklist=`) and of kmod (`modprobe.blacklist=`).
fn denied(case: &Case<'_>, disk: &DiskCase<'_>) -> Option<Quote> {
    let is_driver = |name: &str| name.replace('-', "_") == "virtio_net";
    let words = case
        .cmdline
        .as_deref()
        .unwrap_or_default()
        .split_whitespace();
    for word in words {
        let list = word
            .strip_prefix("module_blacklist=")
            .or_else(|| word.strip_prefix("modprobe.blacklist="));
        if list.is_some_and(|list| list.split(',').any(is_driver)) {
            return Some(Quote {
                source: "cmdline".into(),
                line: None,
                text: word.to_owned(),
            });
        }
    }
    let root = disk.base.root;
    let dirs = [
        "/etc/modprobe.d",
        "/usr/local/lib/modprobe.d",
        "/usr/lib/modprobe.d",
    ];
    let files = network::names_in(root, &dirs.map(str::to_owned), ".conf");
    files.into_values().find_map(|path| {
        let text = root.read_text(&path)?;
        let mut lines = (1_u64..).zip(text.lines());
        lines.find_map(|(number, line)| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let denies = match words.as_slice() {
                ["blacklist", name, ..] => is_driver(name),
                [
                    "install",
                    name,
                    "/bin/false" | "/bin/true" | "/usr/bin/false" | "/usr/bin/true",
                    ..,
                ] => is_driver(name),
                _ => false,
            };
            denies.then(|| quote_disk(&path, Some(number), line))
        })
    })
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
