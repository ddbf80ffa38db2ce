//! What the manager hands to every service: `DefaultEnvironment=` (`systemd-system.conf(5)`) and `systemd.setenv=` on the
//! kernel command line (`kernel-command-line(7)`), which counts more.
use super::{envfile, parse, quote_assignment, service::Variable};
use crate::{disk::Root, text};
use std::collections::BTreeMap;
use vestibule_api::finding::Quote;

/// Where drop-ins of `system.conf` lie on a disk, first wins.
const DROPINS: [&str; 3] = [
    "/etc/systemd/system.conf.d",
    "/usr/local/lib/systemd/system.conf.d",
    "/usr/lib/systemd/system.conf.d",
];

/// The variables that a service has before its own unit sets any.
pub fn default_environment(root: &Root, cmdline: Option<&str>) -> BTreeMap<String, Variable> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for dir in DROPINS {
        for entry in root.list(dir).iter().filter(|e| e.name.ends_with(".conf")) {
            files
                .entry(entry.name.clone())
                .or_insert_with(|| format!("{dir}/{}", entry.name));
        }
    }
    let mut set = BTreeMap::new();
    for path in std::iter::once("/etc/systemd/system.conf".to_owned()).chain(files.into_values()) {
        let parsed = parse::parse(&root.read(&path).unwrap_or_default(), &path);
        let lines = parsed.assignments.iter();
        for a in lines.filter(|a| a.section == "Manager" && a.key == "DefaultEnvironment") {
            if a.value.is_empty() {
                set.clear();
            }
            for word in text::words(&a.value).unwrap_or_default() {
                add(&mut set, &word, quote_assignment(a));
            }
        }
    }
    for word in cmdline.unwrap_or_default().split_whitespace() {
        if let Some(assignment) = word.strip_prefix("systemd.setenv=") {
            let quote = Quote {
                source: "cmdline".into(),
                line: None,
                text: word.to_owned(),
            };
            add(&mut set, assignment, quote);
        }
    }
    set
}

/// Specifiers of the manager are not followed: a value with one is not known.
fn add(set: &mut BTreeMap<String, Variable>, assignment: &str, quote: Quote) {
    if let Some((name, value)) = assignment.split_once('=')
        && envfile::is_name(name)
    {
        if value.contains('%') {
            set.remove(name);
        } else {
            let value = value.to_owned();
            set.insert(name.to_owned(), Variable { value, quote });
        }
    }
}
