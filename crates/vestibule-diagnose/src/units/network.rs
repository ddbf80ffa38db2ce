//! systemd-networkd's configuration (`systemd.network(5)`): which file a virtual machine's network card gets, and
//! whether *online* then depends on somebody outside.
use super::{
    Unit,
    card::Card,
    condition::{Facts, Outcome},
    names, parse, quote_assignment, quote_disk,
    users::Accounts,
};
use crate::disk::{Kind, Meta, Resolved, Root};
use std::collections::BTreeMap;
use vestibule_api::finding::Quote;

const DIRS: [&str; 3] = [
    "/etc/systemd/network",
    "/usr/local/lib/systemd/network",
    "/usr/lib/systemd/network",
];

/// A `.network` file.
#[derive(Clone, Debug)]
pub struct Network {
    pub path: String,
    pub assignments: Vec<parse::Assignment>,
    /// The word of the command line that it was made of, where systemd-network-generator made it.
    pub generated: Option<Quote>,
    /// Whether it is for the card.
    pub matches: Outcome,
    /// The line of `[Match]` that decides that, where one alone does.
    decided_by: Option<Quote>,
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

    fn quote(&self, a: &parse::Assignment) -> Quote {
        let generated = self.generated.clone();
        generated.unwrap_or_else(|| quote_assignment(a))
    }

    /// The line of `[Match]` that decides whether it is for the card, or the first one.
    pub fn match_quote(&self) -> Option<Quote> {
        let mut lines = self.assignments.iter();
        let first = || lines.find(|a| a.section == "Match").map(quote_assignment);
        let decided_by = self.generated.clone().or_else(|| self.decided_by.clone());
        decided_by.or_else(first)
    }

    /// Whether `[Match]` asks for more than a name and a type, so that of two cards with the same name it may get one only.
    pub fn is_particular(&self) -> bool {
        let keys = [
            "MACAddress",
            "PermanentMACAddress",
            "Path",
            "Driver",
            "Property",
        ];
        let mut lines = self.assignments.iter();
        lines.any(|a| a.section == "Match" && keys.contains(&a.key.as_str()))
    }

    /// Static addresses, with where they stand.
    pub fn addresses(&self) -> Vec<(String, Quote)> {
        let sections = [("Network", "Address"), ("Address", "Address")];
        sections
            .iter()
            .flat_map(|(s, k)| self.values(s, k))
            .map(|a| (a.value.clone(), self.quote(a)))
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
            .then(|| self.quote(line))
    }
}

/// Every file with this suffix that is no mask, by name and then by directory, with the assignments of its drop-ins.
pub(super) fn configurations(root: &Root, suffix: &str) -> Vec<(String, Vec<parse::Assignment>)> {
    let mut out = Vec::new();
    for (name, path) in names_in(root, &DIRS.map(str::to_owned), suffix) {
        let bytes = root.read(&path).unwrap_or_default();
        if bytes.is_empty() {
            continue;
        }
        let mut assignments = parse::parse(&bytes, &path).assignments;
        for path in dropins(root, &name) {
            let bytes = root.read(&path).unwrap_or_default();
            assignments.extend(parse::parse(&bytes, &path).assignments);
        }
        out.push((path, assignments));
    }
    out
}

/// The files of some directories by name; of two with one name the first counts.
pub fn names_in(root: &Root, dirs: &[String], suffix: &str) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for dir in dirs {
        let listing = root.list(dir);
        for entry in listing.iter().filter(|e| e.name.ends_with(suffix)) {
            files
                .entry(entry.name.clone())
                .or_insert_with(|| format!("{dir}/{}", entry.name));
        }
    }
    files
}

fn dropins(root: &Root, name: &str) -> Vec<String> {
    let dirs = DIRS.map(|dir| format!("{dir}/{name}.d"));
    names_in(root, &dirs, ".conf").into_values().collect()
}

/// What systemd-networkd makes of a disk and a command line.
#[derive(Clone, Debug)]
pub struct Networking {
    pub card: Card,
    /// The files that it takes, in the order in which it tries them.
    pub networks: Vec<Network>,
    /// Files that somebody meant for it and that it does not take, with the reason.
    pub unused: Vec<(Quote, String)>,
}

impl Networking {
    /// Reads them; `networkd` is the unit of the program that does, `generator` whether a command line's `ip=` becomes a file.
    pub fn read(facts: &Facts<'_>, accounts: &Accounts, networkd: &Unit, generator: bool) -> Self {
        let root = facts.root;
        let reader = accounts.ids(
            networkd.value("Service", "User"),
            networkd.value("Service", "Group"),
        );
        let mut out = Self {
            card: Card::new(facts),
            networks: Vec::new(),
            unused: unused(root),
        };
        for (path, assignments) in configurations(root, ".network") {
            let name = path.rsplit('/').next().unwrap_or_default();
            // A drop-in that cannot be read costs the whole file (`config_parse_many`).
            let files = std::iter::once(path.clone()).chain(dropins(root, name));
            let closed = reader.as_ref().and_then(|(uid, gids)| {
                files.into_iter().find_map(|f| closed(root, &f, *uid, gids))
            });
            match closed {
                Some(quote) => {
                    let user = networkd.value("Service", "User").unwrap_or("root");
                    let why = format!("systemd-networkd, which runs as {user}, may not read it");
                    out.unused.push((quote, why));
                }
                None => out.take(path, assignments, None, facts),
            }
        }
        if let Some((path, assignments, word)) =
            generated(facts.cmdline.unwrap_or_default()).filter(|_| generator)
        {
            out.take(path, assignments, Some(word), facts);
        }
        let name = |n: &Network| n.path.rsplit('/').next().map(str::to_owned);
        out.networks.sort_by_key(name);
        out
    }

    fn take(
        &mut self,
        path: String,
        assignments: Vec<parse::Assignment>,
        generated: Option<Quote>,
        facts: &Facts<'_>,
    ) {
        let (matches, line) = self.card.is_matched(&assignments, facts);
        let decided_by = line.map(quote_assignment);
        self.networks.push(Network {
            path,
            assignments,
            generated,
            matches,
            decided_by,
        });
    }

    /// The file that the card gets, or may get.
    pub fn applied(&self) -> Option<&Network> {
        let mut all = self.networks.iter();
        all.find(|n| n.matches != Outcome::False)
    }

    /// What somebody has configured, rather than systemd's package brought it.
    pub fn configured(&self) -> impl Iterator<Item = &Network> {
        self.networks.iter().filter(|n| n.is_configured())
    }
}

/// What keeps `uid` from reading a file, where its owner and mode do. An access list may let it.
fn closed(root: &Root, path: &str, uid: u32, gids: &[u32]) -> Option<Quote> {
    const ACCESS_LIST: &str = "system.posix_acl_access";
    let Resolved::Found(real, meta) = root.resolve(path) else {
        return None;
    };
    let denied = |path: &str, meta: Meta, needed: u32| {
        let shift = match (meta.uid == uid, gids.contains(&meta.gid)) {
            (true, _) => 6,
            (false, true) => 3,
            (false, false) => 0,
        };
        let refused = (meta.mode >> shift) & needed != needed && uid != 0;
        (refused && root.xattr(path, ACCESS_LIST).is_none()).then(|| {
            let text = format!("[mode {:04o}, owner {}:{}]", meta.mode, meta.uid, meta.gid);
            quote_disk(path, None, &text)
        })
    };
    let parents = real.match_indices('/').filter(|(at, _)| *at > 0);
    let closed = parents.into_iter().find_map(|(at, _)| {
        let dir = real.get(..at)?;
        denied(dir, root.lstat_real(dir)?, 0o1)
    });
    let dir = path.rsplit_once('/').map_or("/", |(dir, _)| dir);
    closed
        .or_else(|| denied(dir, root.stat(dir)?, 0o4))
        .or_else(|| denied(&real, meta, 0o4))
}

/// Files in `/etc` that are masks, or have a network's sections and another suffix than a network's.
fn unused(root: &Root) -> Vec<(Quote, String)> {
    let [dir, hidden @ ..] = DIRS;
    let mut out = Vec::new();
    for entry in root.list(dir).iter() {
        let path = format!("{dir}/{}", entry.name);
        let bytes = root.read(&path).unwrap_or_default();
        if entry.name.ends_with(".network") {
            let shadows = hidden
                .iter()
                .any(|d| root.exists(&format!("{d}/{}", entry.name)));
            let stem = entry.name.trim_end_matches(".network");
            if bytes.is_empty() && shadows && !SYSTEMDS_OWN.contains(&stem) {
                let why =
                    "it is a mask: the file of the same name that a package brought is not used";
                let to = root.link(&path).map_or_else(
                    || "[empty file]".to_owned(),
                    |to| format!("symbolic link to {to}"),
                );
                out.push((quote_disk(&path, None, &to), why.to_owned()));
            }
        } else if entry.meta.kind == Kind::File && !entry.name.ends_with(".link") {
            let parsed = parse::parse(&bytes, &path).assignments;
            let has = |section| parsed.iter().any(|a| a.section == section);
            if has("Match") && has("Network") {
                let why =
                    "its name does not end in .network, so systemd-networkd does not look at it";
                out.push((
                    quote_disk(&path, None, "[a network's sections]"),
                    why.to_owned(),
                ));
            }
        }
    }
    out
}

/// The file that systemd-network-generator(8) makes of `ip=`; none of a word that it refuses.
fn generated(cmdline: &str) -> Option<(String, Vec<parse::Assignment>, Quote)> {
    let word = cmdline
        .split_whitespace()
        .rev()
        .find(|w| w.starts_with("ip="))?;
    let fields: Vec<&str> = word.strip_prefix("ip=")?.split(':').collect();
    let mut lines: Vec<(&str, &str, String)> = Vec::new();
    let (name, mode) = match fields.as_slice() {
        [mode] => ("", *mode),
        [name, mode] => (*name, *mode),
        [client, _, gateway, _, _, name, mode, ..] => {
            let address = [
                ("Network", "Address", *client),
                ("Route", "Gateway", *gateway),
            ];
            let set = address.iter().filter(|(_, _, v)| !v.is_empty());
            lines.extend(set.map(|(s, k, v)| (*s, *k, (*v).to_owned())));
            (*name, *mode)
        }
        _ => return None,
    };
    let dhcp = match mode {
        "none" | "off" => "no",
        "dhcp" => "ipv4",
        "dhcp6" => "ipv6",
        "on" | "any" => "yes",
        "auto6" | "link6" => "no",
        _ => return None,
    };
    lines.push(("Network", "DHCP", dhcp.to_owned()));
    let (path, key, value) = if name.is_empty() {
        (
            "/run/systemd/network/91-default.network".to_owned(),
            "Type",
            "!loopback",
        )
    } else {
        (
            format!("/run/systemd/network/90-{name}.network"),
            "Name",
            name,
        )
    };
    lines.push(("Match", key, value.to_owned()));
    let assignments = lines
        .into_iter()
        .map(|(section, key, value)| parse::Assignment {
            section: section.to_owned(),
            key: key.to_owned(),
            value,
            file: path.clone(),
            line: 1,
        });
    let quote = Quote {
        source: "cmdline".into(),
        line: None,
        text: word.to_owned(),
    };
    Some((path.clone(), assignments.collect(), quote))
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
