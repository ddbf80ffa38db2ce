//! The grammar of one rule (`nft(8)`, "Expressions", "Statements"): conditions, and the verdict at their end.
use super::{
    model::{Condition, Element, Ending, Key, Rule, Values, Verdict},
    parse::Parser,
};

/// Protocols beside TCP: a rule that names a field of theirs holds for their packets alone.
const OTHER_PROTOCOLS: [&str; 14] = [
    "udp", "udplite", "sctp", "dccp", "icmp", "icmpv6", "igmp", "esp", "ah", "comp", "gre",
    "vxlan", "arp", "ip6",
];

/// Fields of a header that decide nothing here; nft knows no others.
const TCP_FIELDS: [&str; 9] = [
    "flags", "sequence", "ackseq", "doff", "reserved", "window", "checksum", "urgptr", "option",
];
const IP_FIELDS: [&str; 10] = [
    "version",
    "hdrlength",
    "dscp",
    "ecn",
    "length",
    "id",
    "frag-off",
    "ttl",
    "checksum",
    "option",
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

impl Parser {
    /// A verdict, where one stands here.
    pub(super) fn verdict(&mut self) -> Option<Verdict> {
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

    /// One rule, up to the end of its statement.
    pub(super) fn rule(&mut self) -> Option<Rule> {
        let mut rule = Rule {
            place: self.place()?,
            conditions: Vec::new(),
            ending: Ending::Verdict(Verdict::Continue),
        };
        while !self.at_end() {
            // nft refuses a rule that goes on after its verdict.
            let ended = !matches!(rule.ending, Ending::Verdict(Verdict::Continue));
            if ended && self.peek() != "comment" {
                return None;
            }
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
                        field if TCP_FIELDS.contains(&field) => Key::Other,
                        _ => return None,
                    };
                    self.relation(&mut rule, what)?;
                }
                "ip" => {
                    let what = match self.next()?.as_str() {
                        "saddr" => Key::SourceAddress,
                        "daddr" => Key::DestinationAddress,
                        "protocol" => Key::Protocol,
                        field if IP_FIELDS.contains(&field) => Key::Other,
                        _ => return None,
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
                "udp" if !matches!(self.peek(), "dport" | "sport" | "length" | "checksum") => {
                    return None;
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
        rule.conditions.push(if what == Key::Other {
            Condition::Perhaps
        } else {
            Condition::Is {
                what,
                negated,
                values,
            }
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
