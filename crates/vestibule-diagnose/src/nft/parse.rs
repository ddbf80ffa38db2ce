//! The grammar of a ruleset (`nft(8)`, "Tables", "Chains", "Sets"): commands and blocks. [`super::rule`] has the rules.
use super::{
    model::{Chain, Element, Hook, Ruleset, Set, Table},
    token::{Place, Token},
};
use std::{iter::Peekable, vec::IntoIter};

/// Sets written inside sets.
const NESTED: usize = 16;

const TYPES: [&str; 3] = ["filter", "nat", "route"];
const HOOKS: [&str; 7] = [
    "prerouting",
    "input",
    "forward",
    "output",
    "postrouting",
    "ingress",
    "egress",
];

const FAMILIES: [&str; 6] = ["ip", "ip6", "inet", "arp", "bridge", "netdev"];

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

pub(super) struct Parser {
    tokens: Peekable<IntoIter<Token>>,
    last: Option<Token>,
}

impl Parser {
    /// The next word; empty at the end.
    pub(super) fn peek(&mut self) -> &str {
        self.tokens.peek().map_or("", |t| t.text.as_str())
    }

    pub(super) fn next(&mut self) -> Option<String> {
        self.last = self.tokens.next();
        self.last.as_ref().map(|t| t.text.clone())
    }

    pub(super) fn eat(&mut self, text: &str) -> bool {
        let hit = self.peek() == text;
        if hit {
            self.next();
        }
        hit
    }

    pub(super) fn want(&mut self, text: &str) -> Option<()> {
        self.eat(text).then_some(())
    }

    pub(super) fn place(&mut self) -> Option<Place> {
        let token = self.tokens.peek().or(self.last.as_ref());
        token.map(|t| (*t.place).clone())
    }

    /// Skips line ends; whether anything is left.
    fn skip_ends(&mut self) -> bool {
        while self.eat(";") {}
        !self.peek().is_empty()
    }

    /// Whether a statement ends here.
    pub(super) fn at_end(&mut self) -> bool {
        matches!(self.peek(), "" | ";" | "}")
    }

    /// Skips what is left of a statement, with its blocks.
    pub(super) fn skip_statement(&mut self) {
        while !self.at_end() {
            if !self.skip_block() {
                self.next();
            }
        }
    }

    /// Skips `{ … }`; whether there was one.
    pub(super) fn skip_block(&mut self) -> bool {
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
        matches!(self.peek(), "" | ";").then_some(())
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
                    self.want(";")?;
                }
                "set" | "map" => {
                    let name = self.next()?;
                    self.set(table.sets.entry(name).or_default())?;
                    self.want(";")?;
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
                    chain.base = Some(self.hook()?);
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
            // A brace does not end a statement (nft 1.0.6; later ones are milder).
            self.want(";")?;
        }
        None
    }

    fn hook(&mut self) -> Option<Hook> {
        let kind = self.next().filter(|k| TYPES.contains(&k.as_str()))?;
        self.want("hook")?;
        let name = self.next().filter(|n| HOOKS.contains(&n.as_str()))?;
        let mut ordered = false;
        while !self.at_end() {
            ordered |= self.peek() == "priority";
            if !self.skip_block() {
                self.next();
            }
        }
        ordered.then_some(Hook { kind, name })
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
    pub(super) fn elements(&mut self, depth: usize) -> Option<Vec<Element>> {
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
}
