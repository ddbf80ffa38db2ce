//! The unit model: what systemd would load from a disk and queue at boot, without running it.
//!
//! [`UnitSet`] answers "which file is this unit, and what does it say together with its drop-ins?" as PID 1 does:
//! search path, masks, aliases, templates, drop-ins, `.wants` links (`reference/systemd.md` has what was measured of 252).
//! [`boot`] builds the start transaction on top, [`exec`] resolves what a service would run.
pub mod boot;
pub mod capabilities;
pub mod card;
pub mod command;
pub mod condition;
pub mod covers;
pub mod envfile;
pub mod exec;
pub mod fstab;
pub mod generators;
pub mod install;
mod libraries;
mod links;
pub mod manager;
pub mod names;
pub mod network;
pub mod parse;
pub mod programs;
pub mod runtime_paths;
pub mod service;
pub mod specifier;
pub mod users;

use crate::{
    disk::{Kind, Resolved, Root},
    text,
};
use links::Directories;
pub use links::{DirLink, Pull};
pub use parse::Assignment;
use std::{
    cell::{OnceCell, RefCell},
    collections::{BTreeMap, HashMap, HashSet},
    rc::Rc,
};
use vestibule_api::finding::Quote;

/// Where PID 1 looks for units on a disk, first wins. What lies under `/run` is made at boot and not on a disk.
const SEARCH: [&str; 6] = [
    "/etc/systemd/system.control",
    "/etc/systemd/system",
    "/etc/systemd/system.attached",
    "/usr/local/lib/systemd/system",
    "/lib/systemd/system",
    "/usr/lib/systemd/system",
];

/// Assignments of one unit with all its drop-ins.
const MERGED_LIMIT: usize = 50_000;

/// Bytes of systemd's library that are read; it has 3 MiB.
const LIBRARY_LIMIT: usize = 16 << 20;

/// How loading a unit ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    Loaded,
    /// No file of that name.
    Missing,
    /// Masked, and by what.
    Masked(Quote),
    /// The fragment cannot be parsed.
    Refused(Quote),
}

/// A unit with its drop-ins merged.
#[derive(Clone, Debug)]
pub struct Unit {
    /// The canonical name; aliases lead here.
    pub name: String,
    pub load: Load,
    /// The file that was loaded.
    pub fragment: Option<String>,
    /// Files of the same name later in the search path, which this one hides.
    pub hidden: Vec<String>,
    /// Fragment first, then drop-ins in their order.
    pub assignments: Vec<Assignment>,
}

impl Unit {
    /// Whether systemd would have it in memory.
    pub fn is_loaded(&self) -> bool {
        self.load == Load::Loaded
    }

    /// The assignments of a key that count: an empty one resets those before it.
    pub fn all<'a>(&'a self, section: &str, key: &str) -> Vec<&'a Assignment> {
        let mut found = Vec::new();
        for a in self
            .assignments
            .iter()
            .filter(|a| a.section == section && a.key == key)
        {
            if a.value.is_empty() {
                found.clear();
            } else {
                found.push(a);
            }
        }
        found
    }

    /// The last assignment of a key.
    pub fn last<'a>(&'a self, section: &str, key: &str) -> Option<&'a Assignment> {
        self.all(section, key).pop()
    }

    /// The last value of a key.
    pub fn value<'a>(&'a self, section: &str, key: &str) -> Option<&'a str> {
        self.last(section, key).map(|a| a.value.as_str())
    }

    /// A boolean key.
    pub fn flag(&self, section: &str, key: &str) -> Option<bool> {
        self.value(section, key).and_then(text::boolean)
    }

    /// A time span in seconds.
    pub fn seconds(&self, section: &str, key: &str) -> Option<f64> {
        self.value(section, key).and_then(text::seconds)
    }

    /// Whether a key is set at all.
    pub fn has(&self, section: &str, key: &str) -> bool {
        self.last(section, key).is_some()
    }

    /// `Description=`, or the name.
    pub fn description(&self) -> &str {
        self.value("Unit", "Description").unwrap_or(&self.name)
    }

    /// Whether implicit dependencies are added.
    pub fn default_dependencies(&self) -> bool {
        self.flag("Unit", "DefaultDependencies").unwrap_or(true)
    }

    /// Quotes the assignment that decides a key, or the file where none does.
    pub fn quote(&self, section: &str, key: &str) -> Quote {
        self.last(section, key)
            .map_or_else(|| self.quote_file(), quote_assignment)
    }

    /// Quotes the unit's file as a whole.
    pub fn quote_file(&self) -> Quote {
        match &self.fragment {
            Some(path) => quote_disk(path, None, &format!("[unit file of {}]", self.name)),
            None => quote_disk(
                "/etc/systemd/system",
                None,
                &format!("no unit file named {}", self.name),
            ),
        }
    }
}

/// A quote of a line on the disk.
pub fn quote_disk(path: &str, line: Option<u64>, text: &str) -> Quote {
    Quote {
        source: format!("disk:{path}"),
        line,
        text: text::shorten(text, 300),
    }
}

/// Quotes one assignment.
pub fn quote_assignment(a: &Assignment) -> Quote {
    quote_disk(&a.file, Some(a.line), &format!("{}={}", a.key, a.value))
}

/// What comes from outside the unit files: masks and wants of the command line and of generators, presets of a first boot.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    /// Masked units, and by what.
    pub masked: HashMap<String, Quote>,
    /// Extra wants: (target, unit, pull, by what).
    pub wants: Vec<(String, String, Pull, Quote)>,
    /// Aliases made: alias → unit.
    pub aliases: HashMap<String, String>,
}

/// The units of one disk.
#[derive(Debug)]
pub struct UnitSet<'a> {
    pub root: &'a Root,
    pub overlay: Overlay,
    search: Vec<String>,
    aliases: HashMap<String, String>,
    units: RefCell<HashMap<String, Rc<Unit>>>,
    files: OnceCell<BTreeMap<String, String>>,
    directories: OnceCell<Directories>,
    links: RefCell<HashMap<String, Rc<[DirLink]>>>,
}

enum Found {
    File(String),
    Masked(Quote),
    Alias(String),
}

impl<'a> UnitSet<'a> {
    /// The units on `root`.
    pub fn new(root: &'a Root) -> Self {
        let mut seen = HashSet::new();
        let search: Vec<String> = SEARCH
            .iter()
            .filter(|dir| match root.resolve(dir) {
                Resolved::Found(real, _) => seen.insert(real),
                Resolved::Missing(_) | Resolved::Broken(_) => false,
            })
            .map(|dir| (*dir).to_owned())
            .collect();
        let mut set = Self {
            root,
            overlay: Overlay::default(),
            search,
            aliases: HashMap::new(),
            units: RefCell::default(),
            files: OnceCell::new(),
            directories: OnceCell::new(),
            links: RefCell::default(),
        };
        set.aliases = set.scan_aliases();
        set
    }

    /// Sets what comes from outside; forgets what was loaded before.
    pub fn with_overlay(mut self, overlay: Overlay) -> Self {
        self.overlay = overlay;
        self.units.borrow_mut().clear();
        self
    }

    /// Every unit name that has a file, with its path, first of the search path.
    pub fn files(&self) -> &BTreeMap<String, String> {
        self.files.get_or_init(|| {
            let mut files = BTreeMap::new();
            for dir in &self.search {
                let entries = self.root.list(dir);
                for entry in entries.iter().filter(|e| names::is_valid(&e.name)) {
                    files
                        .entry(entry.name.clone())
                        .or_insert_with(|| format!("{dir}/{}", entry.name));
                }
            }
            files
        })
    }

    fn scan_aliases(&self) -> HashMap<String, String> {
        let mut seen = HashSet::new();
        let mut aliases = HashMap::new();
        for dir in &self.search {
            for entry in self
                .root
                .list(dir)
                .iter()
                .filter(|e| names::is_valid(&e.name))
            {
                if seen.insert(entry.name.clone())
                    && entry.meta.kind == Kind::Symlink
                    && let Some(Found::Alias(target)) = self.look(dir, &entry.name, &entry.name)
                {
                    aliases.insert(entry.name.clone(), target);
                }
            }
        }
        aliases
    }

    /// The names under which a canonical unit is known besides its own.
    pub fn aliases_of(&self, name: &str) -> Vec<String> {
        let of = self.aliases.iter().chain(&self.overlay.aliases);
        let mut list: Vec<String> = of
            .filter(|(_, t)| *t == name)
            .map(|(a, _)| a.clone())
            .collect();
        list.sort();
        list
    }

    fn look(&self, dir: &str, file: &str, name: &str) -> Option<Found> {
        let path = format!("{dir}/{file}");
        let (_, meta) = self.root.resolve_parent(&path)?;
        match meta.kind {
            Kind::File if meta.size == 0 => {
                Some(Found::Masked(quote_disk(&path, None, "[empty file]")))
            }
            Kind::File => Some(Found::File(path)),
            Kind::Symlink => self.look_link(&path, name),
            Kind::Dir | Kind::Special => None,
        }
    }

    fn look_link(&self, path: &str, name: &str) -> Option<Found> {
        let target = self.root.link(path)?;
        let masked = || {
            Found::Masked(quote_disk(
                path,
                None,
                &format!("symbolic link to {target}"),
            ))
        };
        if target == "/dev/null" {
            return Some(masked());
        }
        let Resolved::Found(real, meta) = self.root.resolve(path) else {
            return None;
        };
        match meta.kind {
            Kind::Special => return Some(masked()),
            Kind::File if meta.size == 0 => return Some(masked()),
            Kind::File => {}
            Kind::Dir | Kind::Symlink => return None,
        }
        let (dir, base) = real.rsplit_once('/')?;
        let in_search = self.search.iter().any(|s| match self.root.resolve(s) {
            Resolved::Found(real_dir, _) => real_dir == dir,
            Resolved::Missing(_) | Resolved::Broken(_) => false,
        });
        let same = base == name || names::template_of(name).is_some_and(|t| t == base);
        if same || !in_search || !names::is_valid(base) {
            return Some(Found::File(real));
        }
        let target = names::instance(name)
            .map_or_else(|| base.to_owned(), |i| names::with_instance(base, i));
        Some(Found::Alias(target))
    }

    fn find(&self, name: &str) -> (Option<Found>, Vec<String>) {
        let mut found = None;
        let mut hidden = Vec::new();
        for file in std::iter::once(name.to_owned()).chain(names::template_of(name)) {
            for dir in &self.search {
                match self.look(dir, &file, name) {
                    Some(Found::File(path)) if found.is_some() => hidden.push(path),
                    Some(other) if found.is_none() => found = Some(other),
                    Some(_) | None => {}
                }
            }
            if found.is_some() {
                break;
            }
        }
        (found, hidden)
    }

    /// The canonical name behind `name`.
    pub fn canonical(&self, name: &str) -> String {
        let mut name = name.to_owned();
        for _ in 0..8 {
            let next = self
                .aliases
                .get(&name)
                .or_else(|| self.overlay.aliases.get(&name))
                .cloned();
            let next = next.or_else(|| {
                let (inst, template) = (names::instance(&name)?, names::template_of(&name)?);
                Some(names::with_instance(self.aliases.get(&template)?, inst))
            });
            match next {
                Some(next) if next != name => name = next,
                _ => break,
            }
        }
        name
    }

    /// Loads a unit as PID 1 would.
    pub fn load(&self, name: &str) -> Rc<Unit> {
        let name = self.canonical(name);
        if let Some(unit) = self.units.borrow().get(&name) {
            return Rc::clone(unit);
        }
        let unit = Rc::new(self.read(&name));
        self.units.borrow_mut().insert(name, Rc::clone(&unit));
        unit
    }

    fn read(&self, name: &str) -> Unit {
        let mut unit = Unit {
            name: name.to_owned(),
            load: Load::Missing,
            fragment: None,
            hidden: Vec::new(),
            assignments: Vec::new(),
        };
        if let Some(by) = self.overlay.masked.get(name) {
            unit.load = Load::Masked(by.clone());
            return unit;
        }
        let (found, hidden) = self.find(name);
        unit.hidden = hidden;
        match found {
            None | Some(Found::Alias(_)) => return unit,
            Some(Found::Masked(by)) => {
                unit.load = Load::Masked(by);
                return unit;
            }
            Some(Found::File(path)) => {
                let parsed = parse::parse(&self.root.read(&path).unwrap_or_default(), &path);
                unit.assignments = parsed.assignments;
                unit.load = match parsed.refused {
                    None => Load::Loaded,
                    Some((line, why)) => {
                        Load::Refused(quote_disk(&path, Some(line), &format!("[{why}]")))
                    }
                };
                unit.fragment = Some(path);
            }
        }
        for path in self.dropins(name) {
            let parsed = parse::parse(&self.root.read(&path).unwrap_or_default(), &path);
            unit.assignments.extend(parsed.assignments);
            unit.assignments.truncate(MERGED_LIMIT);
        }
        unit
    }

    fn names_with_aliases(&self, name: &str) -> Vec<String> {
        let mut all = names::dropin_names(name);
        for alias in self.aliases_of(name) {
            all.extend(names::dropin_names(&alias));
        }
        all
    }

    /// The drop-in files of a unit, in the order in which they apply.
    pub fn dropins(&self, name: &str) -> Vec<String> {
        let mut by_name: BTreeMap<String, String> = BTreeMap::new();
        for owner in self.names_with_aliases(name) {
            for dir in self.directories_named(&format!("{owner}.d")) {
                let entries = self.root.list(dir);
                for entry in entries.iter().filter(|e| e.name.ends_with(".conf")) {
                    by_name
                        .entry(entry.name.clone())
                        .or_insert_with(|| format!("{dir}/{}", entry.name));
                }
            }
        }
        by_name
            .into_values()
            .filter(|p| self.root.stat(p).is_some_and(|m| m.kind == Kind::File))
            .collect()
    }

    /// What of a unit's directory is like a unit search directory: for callers that look at raw entries.
    pub fn search_path(&self) -> &[String] {
        &self.search
    }

    /// systemd's private library, whose name has its version: the path, and the version.
    fn systemd_library(&self) -> Option<(String, u32)> {
        let dirs = [
            "/usr/lib/x86_64-linux-gnu/systemd",
            "/usr/lib/aarch64-linux-gnu/systemd",
            "/usr/lib/systemd",
        ];
        dirs.iter().find_map(|dir| {
            self.root.list(dir).iter().find_map(|e| {
                let rest = e.name.strip_prefix("libsystemd-shared-")?;
                let version = rest.split(['.', '-', '~']).next()?.parse().ok()?;
                Some((format!("{dir}/{}", e.name), version))
            })
        })
    }

    /// The major version of the systemd on the disk, by its private library.
    pub fn systemd_version(&self) -> Option<u32> {
        self.systemd_library().map(|(_, version)| version)
    }

    /// Whether systemd was built with a feature: the words `+FEATURE` and `-FEATURE` of `systemctl --version` stand in its
    /// library.
    pub fn systemd_has(&self, feature: &str) -> Option<bool> {
        let (path, _) = self.systemd_library()?;
        let bytes = self.root.read_at(&path, 0, LIBRARY_LIMIT)?;
        let holds = |sign: char| {
            let word = format!("{sign}{feature}");
            bytes.windows(word.len()).any(|w| w == word.as_bytes())
        };
        match (holds('+'), holds('-')) {
            (true, false) => Some(true),
            (false, true) => Some(false),
            (true, true) | (false, false) => None,
        }
    }
}
