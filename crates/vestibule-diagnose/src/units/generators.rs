//! Generators that did not come with the distribution (`systemd.generator(7)`). A shell script among them is read for
//! the two things that stop a boot: it never ends, or it masks a unit.
use super::{names, programs, quote_disk};
use crate::disk::{Kind, Root};
use std::collections::{HashMap, HashSet};
use vestibule_api::finding::Quote;

/// Where generators lie on a disk, first wins; `/run` is made at boot.
const DIRS: [&str; 3] = [
    "/etc/systemd/system-generators",
    "/usr/local/lib/systemd/system-generators",
    "/usr/lib/systemd/system-generators",
];

/// A generator that is not systemd's own.
#[derive(Clone, Debug)]
pub struct Generator {
    pub path: String,
    /// It cannot end within PID 1's patience; the line.
    pub hangs: Option<Quote>,
    /// Units that it masks ahead of `/etc`, with the line.
    pub masks: Vec<(String, Quote)>,
}

/// The custom generators of a disk that PID 1 runs: of each name the first, none where that is a link to `/dev/null` or empty.
pub fn custom(root: &Root) -> Vec<Generator> {
    let mut out = Vec::new();
    let mut decided: HashSet<String> = HashSet::new();
    for dir in DIRS {
        for entry in root.list(dir).iter() {
            let path = format!("{dir}/{}", entry.name);
            let masks_name = root.link(&path).is_some_and(|target| target == "/dev/null");
            if masks_name {
                decided.insert(entry.name.clone());
            }
            let Some(meta) = root.stat(&path).filter(|_| !decided.contains(&entry.name)) else {
                continue;
            };
            if meta.size == 0 || meta.mode & 0o111 != 0 {
                decided.insert(entry.name.clone());
            }
            let own = entry.name.starts_with("systemd-") && dir.starts_with("/usr/lib/");
            if own || meta.kind != Kind::File || meta.mode & 0o111 == 0 || meta.size == 0 {
                continue;
            }
            let Some(text) = root.read_script(&path) else {
                out.push(Generator {
                    path,
                    hangs: None,
                    masks: Vec::new(),
                });
                continue;
            };
            let hangs =
                endless(root, &text).map(|(line, content)| quote_disk(&path, Some(line), content));
            out.push(Generator {
                masks: masks(&text, &path),
                hangs,
                path,
            });
        }
    }
    out
}

/// The line by which a generator never ends: by itself, or because it waits for a path that is not there yet when PID 1 runs
/// generators, before anything else.
fn endless<'s>(root: &Root, script: &'s str) -> Option<(u64, &'s str)> {
    let mut lines = (1_u64..).zip(script.lines());
    if programs::script_ending(script) == Some(programs::Ending::Never) {
        let waits = |l: &str| l.contains("sleep") || l.contains("while") || l.contains("tail");
        return lines.find(|(_, l)| waits(l));
    }
    let (number, path) = programs::waiting_loop(script)?;
    let may_be_there = script.matches(&path).count() > 1 || root.exists(&path);
    lines.find(|(line, _)| *line == number && !may_be_there)
}

/// Lines that put a link to `/dev/null` or an empty file into the early directory, which outranks `/etc`.
fn masks(script: &str, path: &str) -> Vec<(String, Quote)> {
    let mut variables: HashMap<String, String> = HashMap::new();
    let mut out = Vec::new();
    for (number, raw) in (1_u64..).zip(script.lines()) {
        let mut line = raw.trim().to_owned();
        if line.starts_with('#') {
            continue;
        }
        for (index, place) in [("1", "@normal"), ("2", "@early"), ("3", "@late")] {
            line = line
                .replace(&format!("${{{index}}}"), place)
                .replace(&format!("${index}"), place);
        }
        for (name, value) in &variables {
            line = line
                .replace(&format!("${{{name}}}"), value)
                .replace(&format!("${name}"), value);
        }
        line = line.replace(['"', '\''], "");
        if let Some((name, value)) = line.split_once('=')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            && !value.contains(' ')
        {
            variables.insert(name.to_owned(), value.to_owned());
            continue;
        }
        let links = line.contains("ln ") && line.contains("/dev/null");
        let empties = line.contains("touch ")
            || line.starts_with(": >")
            || line.starts_with(":>")
            || line.starts_with("> ");
        if !links && !empties {
            continue;
        }
        for word in line
            .split([' ', ';', '>', '|', '&'])
            .filter_map(|w| w.strip_prefix("@early/"))
        {
            if names::is_valid(word) {
                out.push((word.to_owned(), quote_disk(path, Some(number), raw)));
            }
        }
    }
    out
}
