//! The start transaction of a boot: the effective default target, everything that it pulls in, and who waits for whom
//! (`bootup(7)`, `systemd.unit(5)`, `systemd.special(7)`, and systemd's `transaction.c` for conflicts and cycles).
use super::{Load, Pull, Unit, UnitSet, names, quote_assignment, quote_disk};
use crate::text;
use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    rc::Rc,
};
use vestibule_api::finding::Quote;

/// Units in one transaction. A boot has a few hundred.
const UNIT_LIMIT: usize = 5_000;

/// Why a unit is in the transaction.
#[derive(Clone, Debug)]
pub struct Pulled {
    pub by: String,
    pub pull: Pull,
    pub quote: Quote,
}

/// The transaction that PID 1 would build.
#[derive(Debug)]
pub struct Boot<'a> {
    pub units: &'a UnitSet<'a>,
    /// The effective default target.
    pub target: String,
    /// What decides the target.
    pub target_quote: Quote,
    /// Whether the configured target did not load and systemd fell back to `rescue.target`.
    pub fell_back: bool,
    /// Units with a start job, and what pulled each in first (the target: none).
    pub jobs: BTreeMap<String, Option<Pulled>>,
    /// Units that something in the transaction would start on an event: socket, timer, path.
    pub triggered: BTreeMap<String, String>,
    after: HashMap<String, Vec<(String, Option<Quote>)>>,
    required: HashSet<String>,
}

/// The target that the kernel command line asks for, with the word that does.
pub fn target_of_cmdline(cmdline: &str) -> Option<(String, String)> {
    let mut target = None;
    for word in cmdline.split_whitespace() {
        let named = match word {
            "emergency" | "-b" => Some("emergency.target"),
            "rescue" | "single" | "s" | "S" | "1" => Some("rescue.target"),
            "2" => Some("runlevel2.target"),
            "3" => Some("runlevel3.target"),
            "4" => Some("runlevel4.target"),
            "5" => Some("runlevel5.target"),
            _ => word.strip_prefix("systemd.unit="),
        };
        if let Some(name) = named.filter(|n| !n.is_empty()) {
            target = Some((name.to_owned(), word.to_owned()));
        }
    }
    target
}

impl<'a> Boot<'a> {
    /// The transaction of `units` with this kernel command line.
    pub fn new(units: &'a UnitSet<'a>, cmdline: Option<&str>) -> Self {
        let asked = cmdline.and_then(target_of_cmdline);
        let (name, mut quote) = match asked {
            Some((name, word)) => {
                let quote = Quote {
                    source: "cmdline".into(),
                    line: None,
                    text: word,
                };
                (name, quote)
            }
            None => ("default.target".to_owned(), default_quote(units)),
        };
        let mut target = units.canonical(&name);
        let fell_back = !units.load(&target).is_loaded();
        if fell_back {
            quote.text = format!(
                "{} → does not load; systemd falls back to rescue.target",
                quote.text
            );
            target = "rescue.target".to_owned();
        }
        let mut boot = Self {
            units,
            target: target.clone(),
            target_quote: quote,
            fell_back,
            jobs: BTreeMap::from([(target, None)]),
            triggered: BTreeMap::new(),
            after: HashMap::new(),
            required: HashSet::new(),
        };
        boot.close();
        boot.order();
        boot.mark_required();
        boot
    }

    /// Whether a unit has a start job.
    pub fn starts(&self, name: &str) -> bool {
        self.jobs.contains_key(&self.units.canonical(name))
    }

    fn close(&mut self) {
        let mut queue = VecDeque::from([self.target.clone()]);
        while let Some(name) = queue.pop_front() {
            let unit = self.units.load(&name);
            if !unit.is_loaded() {
                continue;
            }
            for (dep, pull, quote) in pulls(self.units, &unit) {
                let dep = self.units.canonical(&dep);
                if self.jobs.len() < UNIT_LIMIT && !self.jobs.contains_key(&dep) {
                    self.jobs.insert(
                        dep.clone(),
                        Some(Pulled {
                            by: name.clone(),
                            pull,
                            quote,
                        }),
                    );
                    queue.push_back(dep);
                }
            }
            if let Some(service) = triggers(&unit) {
                let service = self.units.canonical(&service);
                // A timer that elapses soon starts its unit in every boot.
                if let Some(quote) = elapses_soon(&unit)
                    && self.jobs.len() < UNIT_LIMIT
                    && !self.jobs.contains_key(&service)
                {
                    let by = name.clone();
                    let pull = Pull::Wants;
                    self.jobs
                        .insert(service.clone(), Some(Pulled { by, pull, quote }));
                    queue.push_back(service.clone());
                }
                self.triggered
                    .entry(service)
                    .or_insert_with(|| name.clone());
            }
        }
    }

    fn order(&mut self) {
        let names: Vec<String> = self.jobs.keys().cloned().collect();
        for name in &names {
            let unit = self.units.load(name);
            for (dep, quote) in ordered_after(&unit) {
                self.add_after(name, &dep, quote);
            }
            for (later, quote) in listed(&unit, "Before") {
                self.add_after(&later, name, Some(quote));
            }
            match names::unit_type(name) {
                "socket" if unit.default_dependencies() => {
                    self.add_after("sockets.target", name, None);
                }
                "timer" if unit.default_dependencies() => {
                    self.add_after("timers.target", name, None);
                }
                "path" if unit.default_dependencies() => self.add_after("paths.target", name, None),
                _ => {}
            }
            if let Some(service) = triggers(&unit).filter(|_| names::unit_type(name) == "socket") {
                self.add_after(&service, name, None);
            }
        }
        for name in names.iter().filter(|n| names::unit_type(n) == "target") {
            let target = self.units.load(name);
            if !target.default_dependencies() {
                continue;
            }
            for (dep, _, quote) in pulls(self.units, &target) {
                let dep = self.units.canonical(&dep);
                let unit = self.units.load(&dep);
                // A target is ordered after what it wants, unless that is ordered after the target (no implied loops).
                if unit.is_loaded()
                    && unit.default_dependencies()
                    && !self.is_directly_after(&dep, name)
                {
                    self.add_after(name, &dep, Some(quote));
                }
            }
        }
    }

    fn add_after(&mut self, later: &str, earlier: &str, quote: Option<Quote>) {
        let (later, earlier) = (self.units.canonical(later), self.units.canonical(earlier));
        if later != earlier && self.jobs.contains_key(&later) && self.jobs.contains_key(&earlier) {
            let edges = self.after.entry(later).or_default();
            if !edges.iter().any(|(e, _)| *e == earlier) {
                edges.push((earlier, quote));
            }
        }
    }

    /// Whether `later` is itself ordered after `earlier`.
    pub fn is_directly_after(&self, later: &str, earlier: &str) -> bool {
        self.after
            .get(later)
            .is_some_and(|e| e.iter().any(|(name, _)| name == earlier))
    }

    /// Everything that a unit's job waits for, each with the chain that leads to it (nearest first, the unit last).
    pub fn waits_for(&self, name: &str) -> BTreeMap<String, Vec<(String, Option<Quote>)>> {
        let mut parents: BTreeMap<String, (String, Option<Quote>)> = BTreeMap::new();
        let mut queue = VecDeque::from([name.to_owned()]);
        while let Some(at) = queue.pop_front() {
            for (earlier, quote) in self.after.get(&at).into_iter().flatten() {
                if earlier != name && !parents.contains_key(earlier) {
                    parents.insert(earlier.clone(), (at.clone(), quote.clone()));
                    queue.push_back(earlier.clone());
                }
            }
        }
        let chain = |start: &String| {
            let mut chain = Vec::new();
            let mut at = start.clone();
            while let Some((later, quote)) = parents.get(&at).filter(|_| chain.len() < 64) {
                chain.push((later.clone(), quote.clone()));
                at.clone_from(later);
            }
            chain
        };
        parents
            .keys()
            .map(|start| (start.clone(), chain(start)))
            .collect()
    }

    /// The shortest ordering cycle through a unit, as (later, earlier, the line that says so).
    pub fn cycle(&self, name: &str) -> Option<Vec<(String, String, Option<Quote>)>> {
        let mut parents: HashMap<String, (String, Option<Quote>)> = HashMap::new();
        let mut queue = VecDeque::from([name.to_owned()]);
        while let Some(at) = queue.pop_front() {
            for (earlier, quote) in self.after.get(&at).into_iter().flatten() {
                if earlier == name {
                    let mut path = vec![(at.clone(), name.to_owned(), quote.clone())];
                    let mut step = at.clone();
                    while let Some((later, quote)) = parents.get(&step).filter(|_| path.len() < 64)
                    {
                        path.push((later.clone(), step.clone(), quote.clone()));
                        step.clone_from(later);
                    }
                    path.reverse();
                    return Some(path);
                }
                if !parents.contains_key(earlier) {
                    parents.insert(earlier.clone(), (at.clone(), quote.clone()));
                    queue.push_back(earlier.clone());
                }
            }
        }
        None
    }

    fn mark_required(&mut self) {
        let mut queue = VecDeque::from([self.target.clone()]);
        while let Some(name) = queue.pop_front() {
            if !self.required.insert(name.clone()) {
                continue;
            }
            let unit = self.units.load(&name);
            for (dep, pull, _) in pulls(self.units, &unit) {
                if matches!(pull, Pull::Requires | Pull::BindsTo) {
                    queue.push_back(self.units.canonical(&dep));
                }
            }
        }
    }

    /// Whether the boot's target requires the unit, so that its job may not be dropped.
    pub fn matters(&self, name: &str) -> bool {
        self.required.contains(name)
    }

    /// The unit whose `Conflicts=` removes this unit's start job, with the line that says so.
    pub fn conflict(&self, name: &str) -> Option<(String, Quote)> {
        if self.matters(name) {
            return None;
        }
        self.jobs
            .keys()
            .filter(|other| *other != name)
            .find_map(|other| {
                let unit = self.units.load(other);
                if !unit.is_loaded() {
                    return None;
                }
                let line = listed(&unit, "Conflicts")
                    .into_iter()
                    .find(|(n, _)| self.units.canonical(n) == name)?;
                Some((other.clone(), line.1))
            })
    }
}

fn default_quote(units: &UnitSet<'_>) -> Quote {
    for dir in units.search_path() {
        let path = format!("{dir}/default.target");
        if let Some(target) = units.root.link(&path) {
            return quote_disk(&path, None, &format!("symbolic link to {target}"));
        }
        if units.root.exists(&path) {
            return quote_disk(&path, None, "[a file of its own]");
        }
    }
    quote_disk(
        "/etc/systemd/system/default.target",
        None,
        "[does not exist]",
    )
}

fn listed(unit: &Unit, key: &str) -> Vec<(String, Quote)> {
    unit.all("Unit", key)
        .into_iter()
        .flat_map(|a| {
            a.value
                .split_whitespace()
                .map(move |n| (resolve_name(unit, n), quote_assignment(a)))
        })
        .collect()
}

/// A name in a dependency list: instances of the unit's own instance where a template is named, `%i` and friends filled in.
fn resolve_name(unit: &Unit, name: &str) -> String {
    let inst = names::instance(&unit.name).unwrap_or_default();
    let name = name
        .replace("%i", inst)
        .replace("%I", inst)
        .replace("%p", names::prefix(&unit.name))
        .replace("%n", &unit.name)
        .replace("%%", "%");
    if names::is_template(&name) {
        let inst = if inst.is_empty() {
            names::prefix(&unit.name)
        } else {
            inst
        };
        return names::with_instance(&name, inst);
    }
    name
}

/// What a unit pulls in, with the line that says so.
pub fn pulls(units: &UnitSet<'_>, unit: &Unit) -> Vec<(String, Pull, Quote)> {
    let mut found = Vec::new();
    if !matches!(unit.load, Load::Loaded) {
        return found;
    }
    for (key, pull) in [
        ("Requires", Pull::Requires),
        ("BindsTo", Pull::BindsTo),
        ("Wants", Pull::Wants),
        ("Upholds", Pull::Upholds),
    ] {
        found.extend(
            listed(unit, key)
                .into_iter()
                .map(|(name, quote)| (name, pull, quote)),
        );
    }
    for link in units
        .dir_links(&unit.name)
        .iter()
        .filter(|l| l.ignored.is_none())
    {
        let to = link.target.as_deref().unwrap_or_default();
        let quote = quote_disk(&link.path, None, &format!("symbolic link to {to}"));
        found.push((resolve_name(unit, &link.entry), link.pull, quote));
    }
    for (target, name, pull, quote) in &units.overlay.wants {
        if units.canonical(target) == unit.name {
            found.push((name.clone(), *pull, quote.clone()));
        }
    }
    if unit.default_dependencies()
        && matches!(
            names::unit_type(&unit.name),
            "service" | "socket" | "timer" | "path"
        )
    {
        found.push((
            "sysinit.target".to_owned(),
            Pull::Requires,
            unit.quote_file(),
        ));
    }
    if names::unit_type(&unit.name) == "service" && unit.value("Service", "Type") == Some("dbus") {
        found.push((
            "dbus.socket".to_owned(),
            Pull::Requires,
            unit.quote("Service", "Type"),
        ));
    }
    found
}

fn ordered_after(unit: &Rc<Unit>) -> Vec<(String, Option<Quote>)> {
    let mut found: Vec<(String, Option<Quote>)> = listed(unit, "After")
        .into_iter()
        .map(|(n, q)| (n, Some(q)))
        .collect();
    if !unit.is_loaded() {
        return found;
    }
    let kind = names::unit_type(&unit.name);
    if unit.default_dependencies() {
        match kind {
            "service" => found.extend([
                ("sysinit.target".into(), None),
                ("basic.target".into(), None),
            ]),
            "socket" | "path" | "timer" => found.push(("sysinit.target".into(), None)),
            _ => {}
        }
    }
    if kind == "service" && unit.value("Service", "Type") == Some("dbus") {
        found.push(("dbus.socket".into(), None));
    }
    found
}

/// The line by which a timer starts its unit within a minute of a boot (`systemd.timer(5)`).
fn elapses_soon(unit: &Unit) -> Option<Quote> {
    let keys = ["OnBootSec", "OnStartupSec", "OnActiveSec"];
    let mut lines = keys.iter().flat_map(|key| unit.all("Timer", key));
    let soon = lines.find(|a| text::seconds(&a.value).is_some_and(|s| s <= 60.0))?;
    Some(quote_assignment(soon))
}

fn triggers(unit: &Unit) -> Option<String> {
    let (section, key) = match names::unit_type(&unit.name) {
        "socket" => ("Socket", "Service"),
        "timer" => ("Timer", "Unit"),
        "path" => ("Path", "Unit"),
        _ => return None,
    };
    let stem = unit.name.rsplit_once('.').map_or("", |(s, _)| s);
    Some(
        unit.value(section, key)
            .map_or_else(|| format!("{stem}.service"), str::to_owned),
    )
}
