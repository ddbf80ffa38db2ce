//! systemd-networkd's configuration (`systemd.network(5)`): which file a virtual machine's network card gets, and
//! whether *online* then depends on somebody outside.
use super::{names, parse, quote_assignment};
use crate::{disk::Root, text};
use std::collections::BTreeMap;
use vestibule_api::finding::Quote;

const DIRS: [&str; 3] = [
    "/etc/systemd/network",
    "/usr/local/lib/systemd/network",
    "/usr/lib/systemd/network",
];

/// Names that a VMM's card may have in a guest, alternative names included (`systemd.net-naming-scheme(7)`).
fn is_plausible(pattern: &str) -> bool {
    let mut candidates = vec![
        "eth0".to_owned(),
        "eth1".to_owned(),
        "eno1".to_owned(),
        "end0".to_owned(),
    ];
    for slot in 0..32 {
        candidates.push(format!("ens{slot}"));
        candidates.push(format!("enp0s{slot}"));
        candidates.push(format!("enp{slot}s0"));
    }
    candidates.iter().any(|c| text::glob(pattern, c))
}

/// A `.network` file.
#[derive(Clone, Debug)]
pub struct Network {
    pub path: String,
    pub assignments: Vec<parse::Assignment>,
}

/// What systemd itself installs, for tunnels, containers and the like: nobody's configuration of a card
/// (systemd's source, `network/`).
const SYSTEMDS_OWN: [&str; 8] = [
    "80-6rd-tunnel",
    "80-container-host0",
    "80-container-vb",
    "80-container-ve",
    "80-container-vz",
    "80-namespace-ns-tun",
    "80-vm-vt",
    "80-wifi-adhoc",
];

impl Network {
    /// Whether somebody has configured this, rather than systemd's package brought it.
    pub fn is_configured(&self) -> bool {
        let name = self.path.strip_prefix("/usr/lib/systemd/network/");
        let stem = name.and_then(|name| name.strip_suffix(".network"));
        stem.is_none_or(|stem| !SYSTEMDS_OWN.contains(&stem))
    }

    fn values(&self, section: &str, key: &str) -> Vec<&parse::Assignment> {
        self.assignments
            .iter()
            .filter(|a| a.section == section && a.key == key)
            .collect()
    }

    /// The lines of `[Match]`.
    pub fn match_quote(&self) -> Option<Quote> {
        self.assignments
            .iter()
            .find(|a| a.section == "Match")
            .map(quote_assignment)
    }

    /// Whether it can match an Ethernet card of a virtual machine.
    pub fn can_match_card(&self) -> bool {
        self.assignments
            .iter()
            .filter(|a| a.section == "Match")
            .all(|a| {
                let value = a.value.trim();
                let (negated, value) = value
                    .strip_prefix('!')
                    .map_or((false, value), |v| (true, v));
                let mut words = value.split_whitespace();
                let any = match a.key.as_str() {
                    "Name" if negated => return true,
                    "Name" | "OriginalName" => words.any(is_plausible),
                    "Type" => words.any(|w| text::glob(w, "ether")),
                    "Driver" => words.any(|w| {
                        ["virtio_net", "e1000", "e1000e", "vmxnet3"]
                            .iter()
                            .any(|d| text::glob(w, d))
                    }),
                    "Kind" => false,
                    _ => return true,
                };
                any != negated
            })
    }

    /// Static addresses, with where they stand.
    pub fn addresses(&self) -> Vec<(String, Quote)> {
        let sections = [("Network", "Address"), ("Address", "Address")];
        sections
            .iter()
            .flat_map(|(s, k)| self.values(s, k))
            .map(|a| (a.value.clone(), quote_assignment(a)))
            .collect()
    }

    /// `Gateway=`.
    pub fn gateways(&self) -> Vec<String> {
        let sections = [("Network", "Gateway"), ("Route", "Gateway")];
        sections
            .iter()
            .flat_map(|(s, k)| self.values(s, k))
            .map(|a| a.value.clone())
            .collect()
    }

    /// The line that asks for a lease, where one does.
    pub fn dhcp(&self) -> Option<Quote> {
        let line = self.values("Network", "DHCP").pop()?;
        (!matches!(line.value.as_str(), "no" | "false" | "none" | "0" | "off"))
            .then(|| quote_assignment(line))
    }

    /// Whether `RequiredForOnline=no` or `Unmanaged=yes` takes it out of *online*.
    pub fn counts_for_online(&self) -> bool {
        let last = |key| {
            self.values("Link", key)
                .pop()
                .and_then(|a| text::boolean(&a.value))
        };
        last("RequiredForOnline") != Some(false) && last("Unmanaged") != Some(true)
    }
}

/// Every `.network` file of a disk, in the order in which networkd tries them.
pub fn networks(root: &Root) -> Vec<Network> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for dir in DIRS {
        for entry in root
            .list(dir)
            .iter()
            .filter(|e| e.name.ends_with(".network"))
        {
            files
                .entry(entry.name.clone())
                .or_insert_with(|| format!("{dir}/{}", entry.name));
        }
    }
    let mut out = Vec::new();
    for (name, path) in files {
        let bytes = root.read(&path).unwrap_or_default();
        if bytes.is_empty() {
            continue;
        }
        let mut assignments = parse::parse(&bytes, &path).assignments;
        for dir in DIRS {
            let dir = format!("{dir}/{name}.d");
            for entry in root.list(&dir).iter().filter(|e| e.name.ends_with(".conf")) {
                let path = format!("{dir}/{}", entry.name);
                assignments
                    .extend(parse::parse(&root.read(&path).unwrap_or_default(), &path).assignments);
            }
        }
        out.push(Network { path, assignments });
    }
    out
}

/// The address that `ip=` on the kernel command line gives, with the word.
pub fn cmdline_address(cmdline: &str) -> Option<(String, String)> {
    let word = cmdline
        .split_whitespace()
        .rev()
        .find(|w| w.starts_with("ip="))?;
    let address = word.strip_prefix("ip=")?.split(':').next()?;
    address
        .parse::<std::net::Ipv4Addr>()
        .ok()
        .map(|a| (a.to_string(), word.to_owned()))
}

/// Whether a unit's name is that of a service that waits for the network.
pub fn is_wait_online(name: &str) -> bool {
    names::prefix(name).ends_with("wait-online") || name == "NetworkManager-wait-online.service"
}
