//! A ruleset as it is loaded: tables, chains, sets, and rules down to conditions and verdicts.
use super::token::Place;
use std::collections::BTreeMap;

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
