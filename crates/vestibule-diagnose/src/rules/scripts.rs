//! What an interpreter or a wrapper is told to run: the script, what is loaded before it, the program behind `env` and `sh -c`.
use super::{Candidate, about, node, paths};
use crate::{
    case::DiskCase,
    disk::Resolved,
    text,
    units::{
        command::{self, Command},
        exec::{As, Problem},
        programs, quote_assignment, quote_disk,
        runtime_paths::Presence,
        service::Service,
    },
};
use std::collections::BTreeMap;
use vestibule_api::{cause::Cause, finding::Quote};

const REFUTES: &str = "a line that the unit's own process printed in the same boot";

/// The file that a known interpreter is told to run, and what Node loads with it.
pub(super) fn script(
    disk: &DiskCase<'_>,
    service: &Service<'_>,
    name: &str,
    cmd: &Command,
    env: &BTreeMap<String, String>,
    who: &As<'_>,
) -> Option<Candidate> {
    if let Some(found) = wrapped(disk, name, cmd, who) {
        return Some(found);
    }
    let root = disk.base.root;
    let directory = service
        .working_directory()
        .map_or_else(String::new, |(d, _)| d);
    let absolute = |path: &str| {
        if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("{}/{path}", directory.trim_end_matches('/'))
        }
    };
    let missing = |path: &str, quote: Quote, wrong: &str| {
        let why = format!(
            "the interpreter {} is there, and {path}, which it is told to run, {wrong}",
            cmd.program
        );
        let fix = "install the program where the unit sees and may read it, or correct the path";
        let f = about(name, Cause::ProgramFileMissing, quote, why, fix)
            .and(quote_assignment(&cmd.assignment))
            .refuted_by(REFUTES);
        Candidate::fixed(f).specific(6)
    };
    let stem = cmd.program.rsplit('/').next().unwrap_or_default();
    let is_node = stem.starts_with("node");
    let before = if is_node {
        node::preloads(&cmd.args)
    } else {
        Vec::new()
    };
    let main = programs::script_of(cmd).map(|script| command::substitute(&script, env));
    let mut file = None;
    for named in before.iter().chain(&main) {
        let path = absolute(named);
        let found = if is_node {
            node::file(root, &path)
        } else {
            root.exists(&path).then(|| path.clone())
        };
        let Some(found) = found else {
            if disk.paths.presence(root, &path) == Presence::Unknown {
                return None;
            }
            return Some(missing(
                &path,
                quote_disk(&path, None, "[does not exist]"),
                "is not",
            ));
        };
        if let Some(cover) = paths::hidden(disk, service, &found, !cmd.privileged) {
            return Some(missing(
                &path,
                cover.quote,
                &format!("is hidden from it: {}", cover.why),
            ));
        }
        if let Resolved::Found(real, _) = root.resolve(&found)
            && let Some(why) = disk.resolver.why_not_read(&real, who)
        {
            return Some(missing(
                &path,
                quote_disk(&found, None, &format!("[{why}]")),
                &format!("cannot be read: {why}"),
            ));
        }
        file = Some(found);
    }
    let file = file.filter(|_| is_node && main.is_some())?;
    node::missing_module(disk, name, &file, env)
}

/// The program that `env` or a shell with one command is told to run.
fn wrapped(disk: &DiskCase<'_>, name: &str, cmd: &Command, who: &As<'_>) -> Option<Candidate> {
    let inner = match (cmd.program.rsplit('/').next()?, cmd.args.as_slice()) {
        ("env", [first, ..]) if !first.starts_with('-') && !first.contains('=') => first.clone(),
        ("sh" | "bash" | "dash", [flag, line, ..]) if flag == "-c" => {
            let plain = |c: char| c.is_ascii_alphanumeric() || "/._- =:,@".contains(c);
            let words = text::words(line).filter(|_| line.chars().all(plain))?;
            let words = words.strip_prefix(&["exec".to_owned()]).unwrap_or(&words);
            words.first().filter(|w| w.starts_with('/'))?.clone()
        }
        _ => return None,
    };
    let known =
        !inner.starts_with('/') || disk.paths.presence(disk.base.root, &inner) == Presence::Absent;
    let Some(Problem::Missing(quote)) = disk.resolver.check(&inner, who).filter(|_| known) else {
        return None;
    };
    let why = format!(
        "{} is there, and {inner}, which it is told to run, is not",
        cmd.program
    );
    let f = about(
        name,
        Cause::ProgramFileMissing,
        quote,
        why,
        "install it, or correct the path",
    )
    .and(quote_assignment(&cmd.assignment))
    .refuted_by(REFUTES);
    Some(Candidate::fixed(f).specific(6))
}
