//! What a virtual machine's network card is called, as far as it is known before a boot: the kernel's name, what udev
//! makes of it (`systemd.link(5)`, `systemd.net-naming-scheme(7)`), and which `[Match]` sections can be for it.
use super::{
    condition::{self, Facts, Outcome},
    network::configurations,
    parse::Assignment,
    quote_assignment,
};
use crate::text;
use vestibule_api::finding::Quote;

/// Drivers of the cards that virtual machines have; the first is the one of QEMU's and Firecracker's own.
const DRIVERS: [&str; 4] = ["virtio_net", "e1000", "e1000e", "vmxnet3"];

/// The network card of a virtual machine.
#[derive(Clone, Debug)]
pub struct Card {
    /// Names that it has in any case.
    sure: Vec<String>,
    /// Names that it may have, alternative names included.
    maybe: Vec<String>,
    /// The line of a `.link` file that gives it a name of its own.
    pub renamed: Option<Quote>,
}

/// Names that udev may find for a card by its place.
fn plausible() -> Vec<String> {
    let mut names: Vec<String> = ["eno1", "end0"].map(str::to_owned).into();
    for slot in 0..32 {
        names.push(format!("ens{slot}"));
        names.push(format!("enp0s{slot}"));
        names.push(format!("enp{slot}s0"));
    }
    names
}

impl Card {
    /// The card of a machine with these files and this kernel command line.
    pub fn new(facts: &Facts<'_>) -> Self {
        let words = || facts.cmdline.unwrap_or_default().split_whitespace();
        // Names by place are those of PCI slots; a card on virtio-mmio has none.
        let on_pci = !words().any(|w| w == "pci=off");
        let mut by_place = if on_pci { plausible() } else { Vec::new() };
        let policy = on_pci && !words().any(|w| w == "net.ifnames=0");
        if policy {
            // Where udev finds none, the kernel's name stays; of two cards it may be the second one's.
            by_place.extend(["eth0", "eth1"].map(str::to_owned));
        }
        let mut card: Option<Self> = None;
        let mut decided = false;
        for (_, link) in configurations(facts.root, ".link") {
            let (outcome, _) = matches(&link, facts, |list| of(list_matches(list, "eth0")));
            if outcome == Outcome::False {
                continue;
            }
            let named = Self::of_link(&link, &by_place, policy);
            card = Some(match card {
                None if outcome == Outcome::True => named,
                None => named.unsure(&[]),
                Some(card) => card.unsure(&named.names()),
            });
            // The first file that matches is the only one that counts.
            decided = outcome == Outcome::True;
            if decided {
                break;
            }
        }
        let by_kernel = Self {
            sure: vec!["eth0".to_owned()],
            maybe: by_place.clone(),
            renamed: None,
        };
        let card = match card {
            Some(card) if decided => card,
            Some(card) => card.unsure(&by_kernel.names()),
            None => by_kernel.unsure(&[]),
        };
        let asked: Vec<&str> = words().filter(|w| w.starts_with("ifname=")).collect();
        let given = asked.iter().filter_map(|w| w.split(['=', ':']).nth(1));
        let given: Vec<String> = given.map(str::to_owned).collect();
        if given.is_empty() {
            card
        } else {
            card.unsure(&given)
        }
    }

    /// The card as a `.link` file that is for it names it.
    fn of_link(link: &[Assignment], by_place: &[String], policy: bool) -> Self {
        let last = |key| {
            let mut backwards = link.iter().rev();
            let found = backwards.find(|a| a.section == "Link" && a.key == key);
            found.filter(|a| !a.value.is_empty())
        };
        let own = last("Name");
        let mut maybe = patterns(link, "Link", "AlternativeName");
        if last("AlternativeNamesPolicy").is_some() {
            maybe.extend_from_slice(by_place);
        }
        let name = own.map_or("eth0", |a| &a.value).to_owned();
        if policy && last("NamePolicy").is_some() {
            maybe.push(name);
            maybe.extend_from_slice(by_place);
            return Self {
                sure: Vec::new(),
                maybe,
                renamed: None,
            };
        }
        Self {
            sure: vec![name],
            maybe,
            renamed: own.map(quote_assignment),
        }
    }

    fn names(&self) -> Vec<String> {
        [self.sure.as_slice(), self.maybe.as_slice()].concat()
    }

    /// The same, and it may have these names instead.
    fn unsure(&self, others: &[String]) -> Self {
        Self {
            sure: Vec::new(),
            maybe: [self.names().as_slice(), others].concat(),
            renamed: None,
        }
    }

    /// Whether one of its names is in the list; any name counts, alternative ones too (`net_condition_test_ifname`).
    fn is_named(&self, list: &[String]) -> Outcome {
        let fits = |name: &String| list_matches(list, name);
        if self.sure.iter().any(fits) {
            return Outcome::True;
        }
        match (self.maybe.iter().any(fits), self.maybe.iter().all(fits)) {
            (true, true) if self.sure.is_empty() => Outcome::True,
            (true, _) => Outcome::Unknown,
            (false, _) => Outcome::False,
        }
    }

    /// Whether a `.network` file's `[Match]` is for it, and the line that decides where one alone does.
    pub fn is_matched<'f>(
        &self,
        file: &'f [Assignment],
        facts: &Facts<'_>,
    ) -> (Outcome, Option<&'f Assignment>) {
        matches(file, facts, |list| self.is_named(list))
    }
}

fn of(known: bool) -> Outcome {
    if known { Outcome::True } else { Outcome::False }
}

/// The words of a list, with what is said of its assignments: they add up, an empty one resets, and a `!` before the first
/// word is meant for each.
fn patterns(file: &[Assignment], section: &str, key: &str) -> Vec<String> {
    let mut out = Vec::new();
    for a in file.iter().filter(|a| a.section == section && a.key == key) {
        let (not, words) = match a.value.strip_prefix('!') {
            Some(rest) => ("!", rest),
            None => ("", a.value.as_str()),
        };
        if a.value.is_empty() {
            out.clear();
        }
        out.extend(words.split_whitespace().map(|w| format!("{not}{w}")));
    }
    out
}

/// As `net_condition_test_strv`: none of those with `!`, and one of the others where there are any.
fn list_matches(list: &[String], value: &str) -> bool {
    let (not, plain): (Vec<&String>, Vec<&String>) = list.iter().partition(|p| p.starts_with('!'));
    let refused = not.iter().filter_map(|p| p.strip_prefix('!'));
    !refused.into_iter().any(|p| text::glob(p, value))
        && (plain.is_empty() || plain.iter().any(|p| text::glob(p, value)))
}

/// What is known of a `[Match]` section, and the first line that says so; `named` decides the names in it.
fn matches<'f>(
    file: &'f [Assignment],
    facts: &Facts<'_>,
    named: impl Fn(&[String]) -> Outcome,
) -> (Outcome, Option<&'f Assignment>) {
    let lines = || file.iter().filter(|a| a.section == "Match");
    let mut outcomes = Vec::new();
    for line in lines() {
        // Lists add up, and of several conditions of one kind the last one counts: each key is decided at its last line.
        let last = lines().rfind(|a| a.key == line.key);
        let list = patterns(file, "Match", &line.key);
        if last.is_some_and(|last| std::ptr::eq(last, line)) && !list.is_empty() {
            let outcome = setting(line, &list, facts, &named);
            outcomes.extend(outcome.map(|outcome| (outcome, line)));
        }
    }
    let first = |wanted| outcomes.iter().find(|(o, _)| *o == wanted);
    match first(Outcome::False).or_else(|| first(Outcome::Unknown)) {
        Some((outcome, line)) => (*outcome, Some(line)),
        // A section without a setting that systemd knows is for no card at all.
        None => (of(!outcomes.is_empty()), None),
    }
}

/// What is known of one setting of `[Match]`; none where systemd does not know it.
fn setting(
    line: &Assignment,
    list: &[String],
    facts: &Facts<'_>,
    named: impl Fn(&[String]) -> Outcome,
) -> Option<Outcome> {
    Some(match line.key.as_str() {
        "Name" | "OriginalName" => named(list),
        "Type" => of(list_matches(list, "ether")),
        "Driver" => match DRIVERS.iter().filter(|d| list_matches(list, d)).count() {
            0 => Outcome::False,
            n if n == DRIVERS.len() => Outcome::True,
            _ => Outcome::Unknown,
        },
        // A card has neither a kind nor anything of a wireless one.
        "Kind" | "WLANInterfaceType" => of(list.iter().all(|p| p.starts_with('!'))),
        "SSID" | "BSSID" => Outcome::False,
        "Path" if list.iter().all(|p| p.contains("-usb-")) => Outcome::False,
        "MACAddress" | "PermanentMACAddress" | "Path" | "Property" | "Credential" | "Firmware" => {
            Outcome::Unknown
        }
        "Host" | "Virtualization" | "KernelCommandLine" | "KernelVersion" | "Architecture" => {
            condition::holds(&line.key, &line.value, facts)
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(words: &str) -> Vec<String> {
        let a = |value: &str| Assignment {
            section: "Match".into(),
            key: "Name".into(),
            value: value.into(),
            file: "f".into(),
            line: 1,
        };
        patterns(&[a(words)], "Match", "Name")
    }

    #[test]
    fn a_list_is_decided_as_networkd_does() {
        assert!(list_matches(&list("eth* en*"), "ens3"));
        assert!(!list_matches(&list("!eth* en*"), "eth0"));
        // Nothing but exclusions takes everything else; a second `!` is a part of the name.
        assert!(list_matches(&list("!eth* !en*"), "ens3"));
        assert!(!list_matches(&list("wan0"), "eth0"));
    }

    #[test]
    fn an_alternative_name_is_enough() {
        let card = |sure: &[&str], maybe: &[&str]| Card {
            sure: sure.iter().map(|s| (*s).to_owned()).collect(),
            maybe: maybe.iter().map(|s| (*s).to_owned()).collect(),
            renamed: None,
        };
        let pci = card(&["eth0"], &["ens3", "enp0s3"]);
        assert_eq!(pci.is_named(&list("eth0")), Outcome::True);
        assert_eq!(pci.is_named(&list("ens3")), Outcome::Unknown);
        assert_eq!(pci.is_named(&list("eth1")), Outcome::False);
        assert_eq!(card(&["eth0"], &[]).is_named(&list("ens3")), Outcome::False);
        assert_eq!(
            card(&[], &["ens3", "eth0"]).is_named(&list("e*")),
            Outcome::True
        );
    }
}
