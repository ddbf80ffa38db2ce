//! Three packets of one connection walked through a ruleset: the host's first, the guest's answer, the host's next one.
//! What may go both ways counts as let through: only a certain drop is one.
use super::{
    model::{Chain, Condition, Element, Ending, Key, Rule, Ruleset, Table, Values, Verdict},
    token::Place,
};
use std::{cell::Cell, collections::BTreeMap, net::Ipv4Addr};

/// Jumps inside jumps (`NFT_JUMP_STACK_SIZE` of the kernel).
const DEPTH: usize = 16;
/// Chains that are walked for one packet; chains that jump to each other many times would be walked for ever.
const WALKS: u32 = 10_000;

/// Names of cards that are none of the VMM's.
const VIRTUAL: [&str; 17] = [
    "docker",
    "podman",
    "br-",
    "virbr",
    "vmbr",
    "veth",
    "wg",
    "tun",
    "tap",
    "tailscale",
    "cni",
    "flannel",
    "cali",
    "dummy",
    "lxc",
    "ppp",
    "wl",
];

const OTHER_PROTOCOLS: [&str; 14] = [
    "udp",
    "17",
    "icmp",
    "1",
    "icmpv6",
    "ipv6-icmp",
    "58",
    "igmp",
    "2",
    "sctp",
    "esp",
    "ah",
    "gre",
    "udplite",
];

/// What is known of the connection.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// On which the guest listens.
    pub port: u16,
    pub host: Option<Ipv4Addr>,
    pub guest: Option<Ipv4Addr>,
    /// Names of TCP ports (`services(5)`).
    pub services: BTreeMap<String, u16>,
}

impl World {
    fn ports(&self, value: &str) -> Option<(u16, u16)> {
        let number = |text: &str| {
            let named = || self.services.get(text).copied();
            text.parse::<u16>().ok().or_else(named)
        };
        match number(value) {
            Some(port) => Some((port, port)),
            None => value
                .split_once('-')
                .and_then(|(a, b)| Some((number(a)?, number(b)?))),
        }
    }

    /// Whether `nft` knows a value of this kind, as far as it can be told.
    fn knows(&self, what: Key, value: &str) -> bool {
        match what {
            _ if value == "*" => true,
            Key::SourcePort | Key::DestinationPort => self.ports(value).is_some(),
            Key::SourceAddress | Key::DestinationAddress => addresses(value).is_some(),
            Key::State => STATES.contains(&value),
            Key::InputInterface
            | Key::OutputInterface
            | Key::Protocol
            | Key::Family
            | Key::Other => true,
        }
    }

    /// Whether `nft` would load a rule: its values are known, and what it names is there.
    fn loads(&self, table: &Table, rule: &Rule) -> bool {
        let values_load = |what: Key, values: &Values| match values {
            Values::List(list) => list
                .iter()
                .all(|e| self.knows(what, &e.key) && verdict_loads(table, e.verdict.as_ref())),
            Values::Named(name) => table.sets.get(name).is_some_and(|set| {
                set.elements
                    .iter()
                    .all(|e| verdict_loads(table, e.verdict.as_ref()))
            }),
        };
        let ending = match &rule.ending {
            Ending::Verdict(verdict) => verdict_loads(table, Some(verdict)),
            Ending::Map(what, values) => values_load(*what, values),
        };
        ending
            && rule.conditions.iter().all(|condition| match condition {
                Condition::Never | Condition::Perhaps => true,
                Condition::Is { what, values, .. } => values_load(*what, values),
            })
    }
}

fn verdict_loads(table: &Table, verdict: Option<&Verdict>) -> bool {
    match verdict {
        Some(Verdict::Jump(name) | Verdict::Goto(name)) => table.chains.contains_key(name),
        Some(
            Verdict::Accept
            | Verdict::Drop
            | Verdict::Continue
            | Verdict::Return
            | Verdict::Unclear,
        )
        | None => true,
    }
}

const STATES: [&str; 5] = ["new", "established", "related", "invalid", "untracked"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Truth {
    No,
    Maybe,
    Yes,
}

impl Truth {
    fn of(known: bool) -> Self {
        if known { Self::Yes } else { Self::No }
    }

    fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
            Self::Yes => Self::No,
        }
    }
}

struct Packet<'a> {
    world: &'a World,
    incoming: bool,
    state: &'static str,
    /// Walks left.
    walks: Cell<u32>,
}

impl Packet<'_> {
    fn hooks(&self) -> [&'static str; 2] {
        if self.incoming {
            ["prerouting", "input"]
        } else {
            ["output", "postrouting"]
        }
    }

    fn is(&self, what: Key, value: &str) -> Truth {
        match what {
            Key::DestinationPort => self.port(self.incoming, value),
            Key::SourcePort => self.port(!self.incoming, value),
            Key::SourceAddress => self.address(!self.incoming, value),
            Key::DestinationAddress => self.address(self.incoming, value),
            Key::InputInterface if self.incoming => card(value),
            Key::OutputInterface if !self.incoming => card(value),
            Key::Protocol if matches!(value, "tcp" | "6") => Truth::Yes,
            Key::Protocol if OTHER_PROTOCOLS.contains(&value) => Truth::No,
            Key::Family if matches!(value, "ipv4" | "ip") => Truth::Yes,
            Key::Family if matches!(value, "ipv6" | "ip6" | "arp") => Truth::No,
            Key::State => Truth::of(value == self.state),
            Key::InputInterface
            | Key::OutputInterface
            | Key::Protocol
            | Key::Family
            | Key::Other => Truth::Maybe,
        }
    }

    fn port(&self, guests: bool, value: &str) -> Truth {
        // The host's own port is any that a client may get.
        let (low, high) = if guests {
            (self.world.port, self.world.port)
        } else {
            (1024, u16::MAX)
        };
        match self.world.ports(value) {
            None => Truth::Maybe,
            Some((a, b)) if a <= low && high <= b => Truth::Yes,
            Some((a, b)) if b < low || high < a => Truth::No,
            Some(_) => Truth::Maybe,
        }
    }

    fn address(&self, guests: bool, value: &str) -> Truth {
        let known = if guests {
            self.world.guest
        } else {
            self.world.host
        };
        let Some((low, high)) = addresses(value) else {
            return Truth::Maybe;
        };
        match known.map(u32::from) {
            Some(address) => Truth::of((low..=high).contains(&address)),
            None if low == 0 && high == u32::MAX => Truth::Yes,
            None => Truth::Maybe,
        }
    }
}

fn addresses(value: &str) -> Option<(u32, u32)> {
    if let Some((a, b)) = value.split_once('-') {
        let (a, b): (Ipv4Addr, Ipv4Addr) = (a.parse().ok()?, b.parse().ok()?);
        return Some((a.into(), b.into()));
    }
    let (address, bits) = value.split_once('/').unwrap_or((value, "32"));
    let address = u32::from(address.parse::<Ipv4Addr>().ok()?);
    let bits: u32 = bits.parse().ok().filter(|b| *b <= 32)?;
    let mask = u32::MAX.checked_shr(bits).unwrap_or(0);
    Some((address & !mask, address | mask))
}

/// Whether a card of the VMM has this name.
fn card(value: &str) -> Truth {
    let bare = value.trim_end_matches('*');
    if value == "*" {
        Truth::Yes
    } else if value == "lo" || VIRTUAL.iter().any(|v| bare.starts_with(v)) {
        Truth::No
    } else {
        Truth::Maybe
    }
}

/// How a packet may leave a chain.
#[derive(Default)]
struct Ways {
    accept: bool,
    drop: Option<Place>,
    /// Back to where it came from.
    on: bool,
    unclear: bool,
}

impl Ways {
    fn add(&mut self, other: Self) {
        self.accept |= other.accept;
        self.unclear |= other.unclear;
        self.drop = self.drop.take().or(other.drop);
    }
}

/// The line that certainly drops the connection.
pub(super) fn blocker(ruleset: &Ruleset, world: &World) -> Option<Place> {
    for table in ruleset.tables.values() {
        let mut rules = table.chains.values().flat_map(|c| &c.rules);
        if !rules.all(|rule| world.loads(table, rule)) {
            return None;
        }
    }
    let packets = [(true, "new"), (false, "established"), (true, "established")];
    let mut found = None;
    for (incoming, state) in packets {
        let packet = Packet {
            world,
            incoming,
            state,
            walks: Cell::new(WALKS),
        };
        for ((family, _), table) in &ruleset.tables {
            if !matches!(family.as_str(), "ip" | "inet") || table.dormant {
                continue;
            }
            for chain in table.chains.values() {
                let Some(hook) = chain.base.as_ref() else {
                    continue;
                };
                // Chains of type nat see a connection's first packet alone.
                let seen = hook.kind != "nat" || state == "new";
                if !seen || !packet.hooks().contains(&hook.name.as_str()) {
                    continue;
                }
                let mut ways = walk(table, chain, &packet, 0);
                if ways.on {
                    match &chain.drops {
                        Some(policy) => ways.drop = ways.drop.or_else(|| Some(policy.clone())),
                        None => ways.accept = true,
                    }
                }
                if ways.unclear {
                    return None;
                }
                if !ways.accept {
                    found = found.or(ways.drop);
                }
            }
        }
    }
    found
}

fn walk(table: &Table, chain: &Chain, packet: &Packet<'_>, depth: usize) -> Ways {
    let mut ways = Ways::default();
    let mut back = false;
    let Some(left) = packet.walks.get().checked_sub(1) else {
        ways.unclear = true;
        return ways;
    };
    packet.walks.set(left);
    for rule in &chain.rules {
        for (truth, verdict) in verdicts(table, rule, packet) {
            let mut goes_on = false;
            match &verdict {
                Verdict::Accept => ways.accept = true,
                Verdict::Drop => ways.drop = ways.drop.or_else(|| Some(rule.place.clone())),
                Verdict::Continue => goes_on = true,
                Verdict::Return => back = true,
                Verdict::Unclear => ways.unclear = true,
                Verdict::Jump(name) | Verdict::Goto(name) => {
                    let Some(next) = table.chains.get(name).filter(|_| depth < DEPTH) else {
                        ways.unclear = true;
                        return ways;
                    };
                    let inner = walk(table, next, packet, depth.saturating_add(1));
                    if matches!(verdict, Verdict::Jump(_)) {
                        goes_on = inner.on;
                    } else {
                        back |= inner.on;
                    }
                    ways.add(inner);
                }
            }
            if truth == Truth::Yes && !goes_on {
                ways.on = back;
                return ways;
            }
        }
    }
    ways.on = true;
    ways
}

/// The verdicts that a rule may have for a packet, in the order in which they are tried.
fn verdicts(table: &Table, rule: &Rule, packet: &Packet<'_>) -> Vec<(Truth, Verdict)> {
    let mut all = Truth::Yes;
    for condition in &rule.conditions {
        let truth = match condition {
            Condition::Never => Truth::No,
            Condition::Perhaps => Truth::Maybe,
            Condition::Is {
                what,
                negated,
                values,
            } => {
                let truth = any(table, *what, values, packet);
                if *negated { truth.not() } else { truth }
            }
        };
        match truth {
            Truth::No => return Vec::new(),
            Truth::Maybe => all = Truth::Maybe,
            Truth::Yes => {}
        }
    }
    let (what, values) = match &rule.ending {
        Ending::Verdict(verdict) => return vec![(all, verdict.clone())],
        Ending::Map(what, values) => (*what, values),
    };
    let (elements, changes) = elements(table, values);
    if changes {
        return vec![(Truth::Maybe, Verdict::Unclear)];
    }
    let mut out = Vec::new();
    for element in elements {
        let truth = match packet.is(what, &element.key) {
            Truth::Yes => all,
            // `*` stands for all that is not named.
            Truth::Maybe | Truth::No if element.key == "*" => all,
            Truth::Maybe => Truth::Maybe,
            Truth::No => Truth::No,
        };
        if truth != Truth::No {
            let verdict = element.verdict.clone().unwrap_or(Verdict::Unclear);
            out.push((truth, verdict));
        }
    }
    out
}

fn any(table: &Table, what: Key, values: &Values, packet: &Packet<'_>) -> Truth {
    let (elements, changes) = elements(table, values);
    let mut hit = if changes { Truth::Maybe } else { Truth::No };
    for element in elements {
        match packet.is(what, &element.key) {
            Truth::Yes => return Truth::Yes,
            Truth::Maybe => hit = Truth::Maybe,
            Truth::No => {}
        }
    }
    hit
}

/// The elements of a set, and whether that may be other ones in the running system. One without any is filled by somebody.
fn elements<'t>(table: &'t Table, values: &'t Values) -> (&'t [Element], bool) {
    match values {
        Values::List(list) => (list, false),
        Values::Named(name) => match table.sets.get(name) {
            Some(set) => (&set.elements, set.changes || set.elements.is_empty()),
            None => (&[], true),
        },
    }
}
