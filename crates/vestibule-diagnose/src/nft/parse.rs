//! The grammar of a ruleset (`nft(8)`, "Tables", "Chains", "Rules", "Sets"), down to conditions and verdicts.
use super::token::{Place, Token};
use std::{collections::BTreeMap, iter::Peekable, vec::IntoIter};

/// What a file leaves loaded.
#[derive(Debug, Default)]
pub(super) struct Ruleset {
    /// By family and name.
    pub tables: BTreeMap<(String, String), Table>,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    /// `flags dormant`: nothing of it applies.
    pub dormant: bool,
    pub chains: BTreeMap<String, Chain>,
    pub sets: BTreeMap<String, Set>,
}

#[derive(Debug, Default)]
pub(super) struct Chain {
    pub base: Option<Hook>,
    /// The line of `policy drop`.
    pub drops: Option<Place>,
    pub rules: Vec<Rule>,
}

/// Where a base chain is attached.
#[derive(Debug)]
pub(super) struct Hook {
    /// `filter`, `nat`, `route`.
    pub kind: String,
    pub name: String,
}

/// A named set or map.
#[derive(Debug, Default)]
pub(super) struct Set {
    pub elements: Vec<Element>,
    /// Rules or others add to it while the system runs.
    pub changes: bool,
}

#[derive(Debug)]
pub(super) struct Element {
    pub key: String,
    /// In a verdict map.
    pub verdict: Option<Verdict>,
}

#[derive(Debug)]
pub(super) struct Rule {
    pub place: Place,
    /// All must hold.
    pub conditions: Vec<Condition>,
    pub ending: Ending,
}

#[derive(Debug)]
pub(super) enum Condition {
    /// Holds for no TCP packet over IPv4.
    Never,
    /// Nothing on a disk decides it.
    Perhaps,
    Is {
        what: Key,
        negated: bool,
        values: Values,
    },
}

#[derive(Debug)]
pub(super) enum Ending {
    Verdict(Verdict),
    /// `vmap`: the verdict that the packet's key has.
    Map(Key, Values),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Accept,
    Drop,
    Continue,
    Return,
    Jump(String),
    Goto(String),
    /// Changes the packet or gives it to somebody else: what follows is not known.
    Unclear,
}

/// What of a packet a rule looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    SourcePort,
    DestinationPort,
    SourceAddress,
    DestinationAddress,
    InputInterface,
    OutputInterface,
    Protocol,
    Family,
    State,
    Other,
}

#[derive(Debug)]
pub(super) enum Values {
    List(Vec<Element>),
    Named(String),
}

/// Sets written inside sets.
const NESTED: usize = 16;

const FAMILIES: [&str; 6] = ["ip", "ip6", "inet", "arp", "bridge", "netdev"];

/// Protocols beside TCP: a rule that names a field of theirs holds for their packets alone.
const OTHER_PROTOCOLS: [&str; 14] = [
    "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "esp", "ah", "comp", "gre",
    "vxlan", "arp", "ip6",
];

/// Statements and expressions that are known and lead somewhere else, or are not followed.
const NOT_FOLLOWED: [&str; 29] = [
    "dnat", "redirect", "queue", "tproxy", "synproxy", "notrack", "dup", "fwd", "flow", "secmark",
    "reset", "socket", "rt", "osf", "exthdr", "numgen", "jhash", "symhash", "ipsec", "vlan",
    "frag", "hbh", "dst", "mh", "srh", "set", "xt", "last", "geneve",
];

/// Keys of `meta`, all of which but a few may stand without that word.
const META: [&str; 33] = [
    "l4proto",
    "nfproto",
    "protocol",
    "iif",
    "iifname",
    "oif",
    "oifname",
    "iifgroup",
    "oifgroup",
    "iiftype",
    "oiftype",
    "iifkind",
    "oifkind",
    "mark",
    "skuid",
    "skgid",
    "pkttype",
    "length",
    "priority",
    "cpu",
    "rtclassid",
    "cgroup",
    "random",
    "nftrace",
    "time",
    "day",
    "hour",
    "ibrname",
    "obrname",
    "sdif",
    "sdifname",
    "secpath",
    "broute",
];

/// Reads a ruleset. None where something is not understood, or `nft` would refuse it.
pub(super) fn parse(tokens: Vec<Token>) -> Option<Ruleset> {
    let mut parser = Parser {
        tokens: tokens.into_iter().peekable(),
        last: None,
    };
    let mut ruleset = Ruleset::default();
    while parser.skip_ends() {
        parser.command(&mut ruleset)?;
    }
    Some(ruleset)
}

struct Parser {
    tokens: Peekable<IntoIter<Token>>,
    last: Option<Token>,
}

impl Parser {
    /// The next word; empty at the end.
    fn peek(&mut self) -> &str {
        self.tokens.peek().map_or("", |t| t.text.as_str())
    }

    fn next(&mut self) -> Option<String> {
        self.last = self.tokens.next();
        self.last.as_ref().map(|t| t.text.clone())
    }

    fn eat(&mut self, text: &str) -> bool {
        let hit = self.peek() == text;
        if hit {
            self.next();
        }
        hit
    }

    fn want(&mut self, text: &str) -> Option<()> {
        self.eat(text).then_some(())
    }

    fn place(&mut self) -> Option<Place> {
        let token = self.tokens.peek().or(self.last.as_ref());
        token.map(|t| (*t.place).clone())
    }

    /// Skips line ends; whether anything is left.
    fn skip_ends(&mut self) -> bool {
        while self.eat(";") {}
        !self.peek().is_empty()
    }

    /// Whether a statement ends here.
    fn at_end(&mut self) -> bool {
        matches!(self.peek(), "" | ";" | "}")
    }

    /// Skips what is left of a statement, with its blocks.
    fn skip_statement(&mut self) {
        while !self.at_end() {
            if !self.skip_block() {
                self.next();
            }
        }
    }

    /// Skips `{ … }`; whether there was one.
    fn skip_block(&mut self) -> bool {
        if !self.eat("{") {
            return false;
        }
        let mut open = 1_usize;
        while open > 0 {
            match self.next().as_deref() {
                Some("{") => open = open.saturating_add(1),
                Some("}") => open = open.saturating_sub(1),
                Some(_) => {}
                None => break,
            }
        }
        true
    }

    fn family(&mut self) -> String {
        if FAMILIES.contains(&self.peek()) {
            return self.next().unwrap_or_default();
        }
        "ip".to_owned()
    }

    fn table_name(&mut self) -> Option<(String, String)> {
        Some((self.family(), self.next()?))
    }

    fn command(&mut self, rules: &mut Ruleset) -> Option<()> {
        match self.next()?.as_str() {
            "flush" => self.flush(rules)?,
            "delete" | "destroy" => {
                self.want("table")?;
                let name = self.table_name()?;
                rules.tables.remove(&name)?;
            }
            "insert" => {
                self.want("rule")?;
                self.add_rule(rules, true)?;
            }
            "add" | "create" => {
                let kind = self.next()?;
                self.add(rules, &kind)?;
            }
            kind => self.add(rules, kind)?,
        }
        self.at_end().then_some(())
    }

    fn flush(&mut self, rules: &mut Ruleset) -> Option<()> {
        match self.next()?.as_str() {
            "ruleset" if FAMILIES.contains(&self.peek()) => {
                let family = self.next()?;
                rules.tables.retain(|(f, _), _| *f != family);
            }
            "ruleset" => rules.tables.clear(),
            "table" => {
                let name = self.table_name()?;
                for chain in rules.tables.get_mut(&name)?.chains.values_mut() {
                    chain.rules.clear();
                }
            }
            "chain" => {
                let name = self.table_name()?;
                let chain = self.next()?;
                let table = rules.tables.get_mut(&name)?;
                table.chains.get_mut(&chain)?.rules.clear();
            }
            "set" | "map" => {
                let name = self.table_name()?;
                let set = self.next()?;
                let table = rules.tables.get_mut(&name)?;
                table.sets.get_mut(&set)?.elements.clear();
            }
            _ => return None,
        }
        Some(())
    }

    fn add(&mut self, rules: &mut Ruleset, kind: &str) -> Option<()> {
        match kind {
            "table" => {
                let name = self.table_name()?;
                let table = rules.tables.entry(name).or_default();
                if self.eat("{") {
                    self.table(table)?;
                }
            }
            "chain" => {
                let name = self.table_name()?;
                let chain = self.next()?;
                let table = rules.tables.get_mut(&name)?;
                let chain = table.chains.entry(chain).or_default();
                if self.eat("{") {
                    self.chain(chain)?;
                }
            }
            "set" | "map" => {
                let name = self.table_name()?;
                let set = self.next()?;
                let table = rules.tables.get_mut(&name)?;
                self.set(table.sets.entry(set).or_default())?;
            }
            "element" => {
                let name = self.table_name()?;
                let set = self.next()?;
                let elements = self.elements(0)?;
                let table = rules.tables.get_mut(&name)?;
                table.sets.get_mut(&set)?.elements.extend(elements);
            }
            "rule" => self.add_rule(rules, false)?,
            _ => return None,
        }
        Some(())
    }

    fn add_rule(&mut self, rules: &mut Ruleset, first: bool) -> Option<()> {
        let name = self.table_name()?;
        let chain = self.next()?;
        let rule = self.rule()?;
        let table = rules.tables.get_mut(&name)?;
        let list = &mut table.chains.get_mut(&chain)?.rules;
        let at = if first { 0 } else { list.len() };
        list.insert(at, rule);
        Some(())
    }

    fn table(&mut self, table: &mut Table) -> Option<()> {
        while self.skip_ends() {
            match self.next()?.as_str() {
                "}" => return Some(()),
                "chain" => {
                    let name = self.next()?;
                    self.want("{")?;
                    self.chain(table.chains.entry(name).or_default())?;
                }
                "set" | "map" => {
                    let name = self.next()?;
                    self.set(table.sets.entry(name).or_default())?;
                }
                "flags" => {
                    while !self.at_end() {
                        table.dormant |= self.next()? == "dormant";
                    }
                }
                "comment" | "flowtable" | "counter" | "quota" | "limit" | "ct" | "secmark"
                | "synproxy" => self.skip_statement(),
                _ => return None,
            }
        }
        None
    }

    fn chain(&mut self, chain: &mut Chain) -> Option<()> {
        while self.skip_ends() {
            match self.peek() {
                "}" => return self.want("}"),
                "type" => {
                    self.next();
                    let kind = self.next()?;
                    self.want("hook")?;
                    let name = self.next()?;
                    chain.base = Some(Hook { kind, name });
                    self.skip_statement();
                }
                "policy" => {
                    let place = self.place();
                    self.next();
                    chain.drops = match self.next()?.as_str() {
                        "drop" => place,
                        "accept" => None,
                        _ => return None,
                    };
                }
                "comment" | "flags" | "devices" => self.skip_statement(),
                _ => chain.rules.push(self.rule()?),
            }
            if !self.at_end() {
                return None;
            }
        }
        None
    }

    fn set(&mut self, set: &mut Set) -> Option<()> {
        self.want("{")?;
        while self.skip_ends() {
            match self.next()?.as_str() {
                "}" => return Some(()),
                "elements" => {
                    self.want("=")?;
                    set.elements.extend(self.elements(0)?);
                }
                "flags" => {
                    while !self.at_end() {
                        set.changes |= matches!(self.next()?.as_str(), "dynamic" | "timeout");
                    }
                }
                "type" | "typeof" | "timeout" | "size" | "policy" | "gc-interval"
                | "auto-merge" | "counter" | "comment" => self.skip_statement(),
                _ => return None,
            }
        }
        None
    }

    /// `{ a, b-c, d : verdict }`, sets inside sets included.
    fn elements(&mut self, depth: usize) -> Option<Vec<Element>> {
        if depth > NESTED {
            return None;
        }
        let mut out = Vec::new();
        self.want("{")?;
        while self.skip_ends() {
            match self.peek() {
                "}" => {
                    self.next();
                    return Some(out);
                }
                "," => {
                    self.next();
                }
                "{" => out.extend(self.elements(depth.saturating_add(1))?),
                _ => out.push(self.element()?),
            }
        }
        None
    }

    fn element(&mut self) -> Option<Element> {
        let mut element = Element {
            key: self.next()?,
            verdict: None,
        };
        loop {
            match self.peek() {
                "" => return None,
                "," | "}" => return Some(element),
                ":" => {
                    self.next();
                    // A map to anything else than a verdict is not followed.
                    element.verdict = self.verdict();
                    if element.verdict.is_none() {
                        self.next()?;
                    }
                }
                ";" => {
                    self.next();
                }
                _ => {
                    // Ranges with blanks are one value; `timeout 1h` and the like keep it from being decided.
                    let word = self.next()?;
                    element.key.push_str(&word);
                }
            }
        }
    }

    fn verdict(&mut self) -> Option<Verdict> {
        let verdict = match self.peek() {
            "accept" => Verdict::Accept,
            "drop" => Verdict::Drop,
            "continue" => Verdict::Continue,
            "return" => Verdict::Return,
            "jump" => {
                self.next();
                return self.next().map(Verdict::Jump);
            }
            "goto" => {
                self.next();
                return self.next().map(Verdict::Goto);
            }
            _ => return None,
        };
        self.next();
        Some(verdict)
    }

    fn rule(&mut self) -> Option<Rule> {
        let mut rule = Rule {
            place: self.place()?,
            conditions: Vec::new(),
            ending: Ending::Verdict(Verdict::Continue),
        };
        while !self.at_end() {
            if let Some(verdict) = self.verdict() {
                rule.ending = Ending::Verdict(verdict);
                continue;
            }
            let head = self.next()?;
            match head.as_str() {
                "tcp" | "th" => {
                    let what = match self.next()?.as_str() {
                        "dport" => Key::DestinationPort,
                        "sport" => Key::SourcePort,
                        _ => Key::Other,
                    };
                    self.relation(&mut rule, what)?;
                }
                "ip" => {
                    let what = match self.next()?.as_str() {
                        "saddr" => Key::SourceAddress,
                        "daddr" => Key::DestinationAddress,
                        "protocol" => Key::Protocol,
                        _ => Key::Other,
                    };
                    self.relation(&mut rule, what)?;
                }
                "ct" => self.conntrack(&mut rule)?,
                "meta" => {
                    let key = self.next()?;
                    self.meta(&mut rule, &key)?;
                }
                "ether" => {
                    self.next()?;
                    self.relation(&mut rule, Key::Other)?;
                }
                "fib" => {
                    while matches!(
                        self.peek(),
                        "saddr" | "daddr" | "mark" | "iif" | "oif" | "."
                    ) {
                        self.next();
                    }
                    if matches!(self.peek(), "type" | "oifname") {
                        self.next();
                    }
                    self.relation(&mut rule, Key::Other)?;
                }
                "reject" => {
                    rule.ending = Ending::Verdict(Verdict::Drop);
                    while !self.at_end() && self.peek() != "comment" {
                        self.next();
                    }
                }
                "masquerade" | "snat" => {
                    rule.ending = Ending::Verdict(Verdict::Accept);
                    self.skip_statement();
                }
                key if OTHER_PROTOCOLS.contains(&key) => {
                    rule.conditions.push(Condition::Never);
                    self.skip_statement();
                }
                key if META.contains(&key) => self.meta(&mut rule, key)?,
                key if NOT_FOLLOWED.contains(&key) || key.starts_with('@') => {
                    rule.ending = Ending::Verdict(Verdict::Unclear);
                    self.skip_statement();
                }
                key => self.statement(&mut rule, key)?,
            }
        }
        Some(rule)
    }

    /// Statements that decide nothing, or not on a disk.
    fn statement(&mut self, rule: &mut Rule, head: &str) -> Option<()> {
        match head {
            "counter" => {
                if self.eat("packets") {
                    self.next()?;
                    self.want("bytes")?;
                    self.next()?;
                } else if self.eat("name") {
                    self.next()?;
                }
            }
            "comment" => {
                self.next()?;
            }
            "log" => self.log()?,
            "limit" | "quota" => {
                while matches!(
                    self.peek(),
                    "rate" | "over" | "until" | "name" | "burst" | "used"
                ) || self.peek().starts_with(|c: char| c.is_ascii_digit())
                    || self.peek().contains("bytes")
                    || self.peek() == "packets"
                {
                    if self.next()? == "name" {
                        self.next()?;
                    }
                }
                rule.conditions.push(Condition::Perhaps);
            }
            "meter" | "add" | "update" | "delete" => {
                while !self.at_end() && self.peek() != "{" {
                    self.next();
                }
                if !self.skip_block() {
                    return None;
                }
                rule.conditions.push(Condition::Perhaps);
            }
            _ => return None,
        }
        Some(())
    }

    fn log(&mut self) -> Option<()> {
        loop {
            match self.peek() {
                "prefix" | "level" | "group" | "snaplen" | "queue-threshold" => {
                    self.next();
                    self.next()?;
                }
                "flags" => {
                    self.next();
                    if matches!(self.next()?.as_str(), "tcp" | "ip") {
                        self.next()?;
                    }
                    while self.eat(",") {
                        self.next()?;
                    }
                }
                _ => return Some(()),
            }
        }
    }

    fn conntrack(&mut self, rule: &mut Rule) -> Option<()> {
        match self.next()?.as_str() {
            "state" => self.relation(rule, Key::State),
            "status" | "direction" | "mark" | "zone" | "helper" | "label" | "expiration" | "id"
            | "timeout" | "expectation" | "event" => self.relation(rule, Key::Other),
            "count" => {
                self.eat("over");
                self.next()?;
                rule.conditions.push(Condition::Perhaps);
                Some(())
            }
            "original" | "reply" | "bytes" | "packets" | "avgpkt" | "l3proto" | "protocol" => {
                rule.ending = Ending::Verdict(Verdict::Unclear);
                self.skip_statement();
                Some(())
            }
            _ => None,
        }
    }

    fn meta(&mut self, rule: &mut Rule, key: &str) -> Option<()> {
        let what = match key {
            "l4proto" => Key::Protocol,
            "nfproto" | "protocol" => Key::Family,
            "iif" | "iifname" => Key::InputInterface,
            "oif" | "oifname" => Key::OutputInterface,
            _ if META.contains(&key) => Key::Other,
            _ => return None,
        };
        self.relation(rule, what)?;
        // An interface that does not exist yet has no index: nft refuses the file.
        let by_index = matches!(key, "iif" | "oif");
        if let Some(Condition::Is { values, .. }) = rule.conditions.last()
            && by_index
            && !matches!(values, Values::List(v) if v.iter().all(|e| matches!(e.key.as_str(), "lo" | "1")))
        {
            return None;
        }
        Some(())
    }

    /// What stands behind a key: a comparison, a map of verdicts, or `set`.
    fn relation(&mut self, rule: &mut Rule, what: Key) -> Option<()> {
        let mut what = what;
        while matches!(self.peek(), "&" | "|" | "^" | "<<" | ">>" | "." | "/") {
            what = Key::Other;
            let joins = self.next()? == ".";
            if self.eat("(") {
                while !self.at_end() && !self.eat(")") {
                    self.next();
                }
            } else {
                self.next()?;
                // The second half of `ip saddr . tcp dport`.
                while joins
                    && !self.at_end()
                    && !matches!(self.peek(), "." | "{" | "vmap" | "==" | "!=")
                    && !self.peek().starts_with('@')
                {
                    self.next();
                }
            }
        }
        let mut negated = false;
        match self.peek() {
            "vmap" => {
                self.next();
                let values = self.values()?;
                rule.ending = Ending::Map(what, values);
                return Some(());
            }
            "set" => {
                self.next();
                self.skip_to_verdict();
                return Some(());
            }
            "==" | "eq" => {
                self.next();
            }
            "!=" | "ne" => {
                self.next();
                negated = true;
            }
            "<" | ">" | "<=" | ">=" | "lt" | "gt" | "le" | "ge" => {
                let sign = self.next()?;
                let number: Option<u16> = self.next()?.parse().ok();
                let range = match (sign.as_str(), number) {
                    ("<" | "lt", Some(n)) => format!("0-{}", n.saturating_sub(1)),
                    ("<=" | "le", Some(n)) => format!("0-{n}"),
                    (">" | "gt", Some(n)) => format!("{}-65535", n.saturating_add(1)),
                    (_, Some(n)) => format!("{n}-65535"),
                    (_, None) => String::new(),
                };
                let values = Values::List(vec![Element {
                    key: range,
                    verdict: None,
                }]);
                rule.conditions.push(Condition::Is {
                    what,
                    negated,
                    values,
                });
                return Some(());
            }
            _ => {}
        }
        let values = self.values()?;
        rule.conditions.push(match what {
            Key::Other => Condition::Perhaps,
            _ => Condition::Is {
                what,
                negated,
                values,
            },
        });
        Some(())
    }

    /// `meta mark set ct mark and 0xff`: nothing of it decides.
    fn skip_to_verdict(&mut self) {
        while !self.at_end()
            && !matches!(
                self.peek(),
                "accept" | "drop" | "return" | "continue" | "jump" | "goto" | "counter" | "comment"
            )
        {
            if !self.skip_block() {
                self.next();
            }
        }
    }

    fn values(&mut self) -> Option<Values> {
        if self.peek() == "{" {
            return self.elements(0).map(Values::List);
        }
        if let Some(name) = self.peek().strip_prefix('@') {
            let name = name.to_owned();
            self.next();
            return Some(Values::Named(name));
        }
        let mut list = Vec::new();
        loop {
            if self.at_end() {
                return None;
            }
            let mut key = self.next()?;
            if self.eat("-") {
                key = format!("{key}-{}", self.next()?);
            }
            list.push(Element { key, verdict: None });
            if !matches!(self.peek(), "," | "|" | "/") {
                return Some(Values::List(list));
            }
            self.next();
        }
    }
}
