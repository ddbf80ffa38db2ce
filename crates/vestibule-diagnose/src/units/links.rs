//! Directories in the search path: drop-ins, and the links by which one unit pulls another in (`systemd.unit(5)`).
use super::{UnitSet, names};
use crate::disk::{Entry, Kind};
use std::{
    collections::{BTreeMap, HashMap},
    rc::Rc,
};

/// How one unit pulls another in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pull {
    Wants,
    Requires,
    BindsTo,
    Upholds,
}

/// An entry of a `.wants`, `.requires` or `.upholds` directory.
#[derive(Clone, Debug)]
pub struct DirLink {
    pub pull: Pull,
    /// The full path of the entry.
    pub path: String,
    /// Its file name, which is all that counts.
    pub entry: String,
    /// Where it leads, if it is a link.
    pub target: Option<String>,
    /// Why systemd ignores it; none: it counts.
    pub ignored: Option<&'static str>,
}

/// The directories in the search path, links to directories included.
#[derive(Debug, Default)]
pub(super) struct Directories {
    /// As (path, file name), in the search path's order.
    all: Vec<(String, String)>,
    /// File name → which of `all`.
    by_name: HashMap<String, Vec<usize>>,
}

impl UnitSet<'_> {
    fn known_directories(&self) -> &Directories {
        self.directories.get_or_init(|| {
            let mut found = Directories::default();
            for dir in &self.search {
                for entry in self.root.list(dir).iter() {
                    let path = format!("{dir}/{}", entry.name);
                    let is_dir = match entry.meta.kind {
                        Kind::Dir => true,
                        Kind::Symlink => self.root.is_dir(&path),
                        Kind::File | Kind::Special => false,
                    };
                    if is_dir {
                        let of_name = found.by_name.entry(entry.name.clone()).or_default();
                        of_name.push(found.all.len());
                        found.all.push((path, entry.name.clone()));
                    }
                }
            }
            found
        })
    }

    /// The directories of this name in the search path.
    pub(super) fn directories_named(&self, name: &str) -> impl Iterator<Item = &str> {
        let known = self.known_directories();
        let of_name = known.by_name.get(name).into_iter().flatten();
        of_name.filter_map(|at| known.all.get(*at).map(|(path, _)| path.as_str()))
    }

    /// The entries of a unit's `.wants`, `.requires` and `.upholds` directories.
    pub fn dir_links(&self, name: &str) -> Rc<[DirLink]> {
        if let Some(known) = self.links.borrow().get(name) {
            return Rc::clone(known);
        }
        let read = self.read_links(name);
        self.links
            .borrow_mut()
            .insert(name.to_owned(), Rc::clone(&read));
        read
    }

    fn read_links(&self, name: &str) -> Rc<[DirLink]> {
        let mut found: BTreeMap<(&str, String), DirLink> = BTreeMap::new();
        let owners = self.names_with_aliases(name);
        for (suffix, pull) in [
            ("wants", Pull::Wants),
            ("requires", Pull::Requires),
            ("upholds", Pull::Upholds),
        ] {
            for owner in &owners {
                for dir in self.directories_named(&format!("{owner}.{suffix}")) {
                    for entry in self.root.list(dir).iter() {
                        found
                            .entry((suffix, entry.name.clone()))
                            .or_insert_with(|| self.read_link(pull, dir, entry));
                    }
                }
            }
        }
        found.into_values().collect()
    }

    fn read_link(&self, pull: Pull, dir: &str, entry: &Entry) -> DirLink {
        let path = format!("{dir}/{}", entry.name);
        let target = self.root.link(&path);
        let ignored = if entry.meta.kind != Kind::Symlink {
            Some("not a symbolic link")
        } else if target.as_deref() == Some("/dev/null") {
            Some("a link to /dev/null, which masks the dependency")
        } else {
            (!names::is_valid(&entry.name)).then_some("not a valid unit name")
        };
        DirLink {
            pull,
            path,
            entry: entry.name.clone(),
            target,
            ignored,
        }
    }

    /// Every directory in the search path that may hold units' dependencies, as (directory, file name).
    pub fn dependency_dirs(&self) -> impl Iterator<Item = &(String, String)> {
        let ends = [".wants", ".requires", ".upholds"];
        let all = self.directories().iter();
        all.filter(move |(_, name)| ends.iter().any(|end| name.ends_with(end)))
    }

    /// Every directory in the search path, links to directories included, as (directory, file name).
    pub fn directories(&self) -> &[(String, String)] {
        &self.known_directories().all
    }
}
