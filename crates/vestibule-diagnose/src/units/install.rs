//! First boot and presets (`systemd.preset(5)`, `machine-id(5)`). A missing or "uninitialized" machine-id makes PID 1
//! apply every preset, enable-only; an empty one does not (measured). Nothing is written: the links become an overlay.
use super::{Overlay, Pull, UnitSet, names, parse, quote_disk};
use crate::{disk::Root, text};
use std::collections::BTreeMap;
use vestibule_api::finding::Quote;

const PRESET_DIRS: [&str; 4] = [
    "/etc/systemd/system-preset",
    "/usr/local/lib/systemd/system-preset",
    "/usr/lib/systemd/system-preset",
    "/lib/systemd/system-preset",
];

/// The word of the command line that says whether this is a first boot.
const FIRST_BOOT: &str = "systemd.condition-first-boot";

/// What `/etc/machine-id` says of the next boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineId {
    Set(String),
    /// Empty: a transient id is made, but it is no first boot.
    Empty,
    /// Missing or "uninitialized": a first boot.
    FirstBoot(Quote),
}

/// Reads `/etc/machine-id`.
pub fn machine_id(root: &Root, cmdline: &str) -> MachineId {
    let path = "/etc/machine-id";
    let id = match root.read_text(path) {
        None => MachineId::FirstBoot(quote_disk(path, None, "[does not exist]")),
        Some(text) => match text.trim() {
            "" => MachineId::Empty,
            "uninitialized" => MachineId::FirstBoot(quote_disk(path, Some(1), "uninitialized")),
            id => MachineId::Set(id.to_owned()),
        },
    };
    // `kernel-command-line(7)`: it decides whatever the file says.
    match (text::switch(cmdline, FIRST_BOOT), &id) {
        (Some(false), MachineId::FirstBoot(_)) => MachineId::Empty,
        (Some(true), MachineId::Empty | MachineId::Set(_)) => MachineId::FirstBoot(Quote {
            source: "cmdline".into(),
            line: None,
            text: FIRST_BOOT.to_owned(),
        }),
        _ => id,
    }
}

/// A preset rule.
#[derive(Clone, Debug)]
struct Rule {
    enable: bool,
    pattern: String,
    instances: Vec<String>,
    quote: Quote,
}

/// The preset policy of a disk.
#[derive(Clone, Debug, Default)]
pub struct Presets {
    rules: Vec<Rule>,
}

impl Presets {
    /// Every preset file, in the order of their names over all directories.
    pub fn read(root: &Root) -> Self {
        let mut files: BTreeMap<String, String> = BTreeMap::new();
        for dir in PRESET_DIRS {
            for entry in root
                .list(dir)
                .iter()
                .filter(|e| e.name.ends_with(".preset"))
            {
                files
                    .entry(entry.name.clone())
                    .or_insert_with(|| format!("{dir}/{}", entry.name));
            }
        }
        let mut rules = Vec::new();
        for path in files.into_values() {
            let text = root.read_text(&path).unwrap_or_default();
            for (line, content) in (1_u64..).zip(text.lines()) {
                let mut words = content.split_whitespace();
                let enable = match words.next() {
                    Some("enable") => true,
                    Some("disable") => false,
                    _ => continue,
                };
                let Some(pattern) = words.next() else {
                    continue;
                };
                rules.push(Rule {
                    enable,
                    pattern: pattern.to_owned(),
                    instances: words.map(str::to_owned).collect(),
                    quote: quote_disk(&path, Some(line), content),
                });
            }
        }
        Self { rules }
    }

    /// Whether the policy enables a unit, and the line that decides; no line: enabled by default.
    pub fn enables(&self, name: &str) -> (bool, Option<&Quote>, &[String]) {
        match self.rules.iter().find(|r| text::glob(&r.pattern, name)) {
            Some(rule) => (rule.enable, Some(&rule.quote), &rule.instances),
            None => (true, None, &[]),
        }
    }
}

/// The links that `preset-all`, enable-only, would make.
pub fn first_boot_overlay(units: &UnitSet<'_>, because: &Quote) -> Overlay {
    let presets = Presets::read(units.root);
    let mut overlay = Overlay::default();
    for name in units.files().keys() {
        let (enabled, quote, instances) = presets.enables(name);
        if !enabled || units.canonical(name) != *name {
            continue;
        }
        let quote = quote.unwrap_or(because);
        if names::is_template(name) {
            for inst in instances {
                enable(
                    units,
                    &names::with_instance(name, inst),
                    quote,
                    &mut overlay,
                    0,
                );
            }
            continue;
        }
        enable(units, name, quote, &mut overlay, 0);
    }
    overlay
}

fn enable(units: &UnitSet<'_>, name: &str, quote: &Quote, overlay: &mut Overlay, depth: u32) {
    let unit = units.load(name);
    if !unit.is_loaded() || depth > 4 {
        return;
    }
    let listed = |key: &str| -> Vec<String> {
        unit.all("Install", key)
            .iter()
            .flat_map(|a| a.value.split_whitespace().map(str::to_owned))
            .collect()
    };
    let name = match (
        names::is_template(name),
        unit.value("Install", "DefaultInstance"),
    ) {
        (true, Some(inst)) => names::with_instance(name, inst),
        (true, None) => return,
        (false, _) => name.to_owned(),
    };
    for (key, pull) in [
        ("WantedBy", Pull::Wants),
        ("RequiredBy", Pull::Requires),
        ("UpheldBy", Pull::Upholds),
    ] {
        for target in listed(key) {
            overlay
                .wants
                .push((target, name.clone(), pull, quote.clone()));
        }
    }
    for alias in listed("Alias") {
        if names::is_valid(&alias)
            && units.canonical(&alias) == alias
            && !units.load(&alias).is_loaded()
        {
            overlay.aliases.insert(alias, name.clone());
        }
    }
    for also in listed("Also") {
        if also != name {
            enable(units, &also, quote, overlay, depth.saturating_add(1));
        }
    }
}

/// `Storage=` and its like of a daemon's configuration with its drop-ins (`journald.conf(5)`).
pub fn daemon_setting(
    root: &Root,
    file: &str,
    section: &str,
    key: &str,
) -> Option<(String, Quote)> {
    let mut found = None;
    let mut paths = Vec::new();
    for base in ["/usr/lib/systemd", "/etc/systemd"] {
        paths.push(format!("{base}/{file}"));
    }
    let mut dropins: BTreeMap<String, String> = BTreeMap::new();
    for base in ["/etc/systemd", "/usr/local/lib/systemd", "/usr/lib/systemd"] {
        let dir = format!("{base}/{file}.d");
        for entry in root.list(&dir).iter().filter(|e| e.name.ends_with(".conf")) {
            dropins
                .entry(entry.name.clone())
                .or_insert_with(|| format!("{dir}/{}", entry.name));
        }
    }
    paths.extend(dropins.into_values());
    for path in paths {
        for a in parse::parse(&root.read(&path).unwrap_or_default(), &path).assignments {
            if a.section == section && a.key == key {
                found = Some((a.value.clone(), super::quote_assignment(&a)));
            }
        }
    }
    found.filter(|(value, _)| !value.is_empty())
}
