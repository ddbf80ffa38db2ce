//! One `Exec…=` line (`systemd.service(5)`, "Command lines"): prefixes, words, specifiers, variables.
use super::{Assignment, specifier::Specifiers};
use crate::text;
use std::collections::BTreeMap;

/// A command as the unit gives it.
#[derive(Clone, Debug)]
pub struct Command {
    /// `ExecStart`, `ExecStartPre`, …
    pub key: String,
    pub assignment: Assignment,
    /// `-`: a failure is ignored.
    pub optional: bool,
    /// `+`, `!`: runs with full privileges.
    pub privileged: bool,
    pub program: String,
    /// Without `argv[0]`.
    pub args: Vec<String>,
}

/// Why systemd refuses an `Exec…=` line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Neither absolute nor a bare name.
    Relative(String),
    Specifier(String),
    Quoting,
    /// Ends with a slash.
    Directory(String),
    Unsafe(String),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Relative(path) => write!(
                f,
                "`{path}` is neither an absolute path nor a bare program name"
            ),
            Self::Specifier(s) => write!(
                f,
                "`{s}` is not a specifier that systemd knows; a literal % is written %%"
            ),
            Self::Quoting => f.write_str("a quote is not closed"),
            Self::Directory(path) => write!(f, "`{path}` names a directory"),
            Self::Unsafe(path) => write!(f, "`{path}` contains characters that systemd refuses"),
        }
    }
}

/// Parses one assignment; a line may hold several commands separated by ` ; `.
pub(crate) fn parse(a: &Assignment, specifiers: &Specifiers<'_>) -> Vec<Result<Command, Refusal>> {
    let Some(words) = text::words(&a.value) else {
        return if a.value.starts_with('-') {
            Vec::new()
        } else {
            vec![Err(Refusal::Quoting)]
        };
    };
    words
        .split(|w| w == ";")
        .filter(|w| !w.is_empty())
        .filter_map(|w| one(a, w, specifiers))
        .collect()
}

fn one(
    a: &Assignment,
    words: &[String],
    specifiers: &Specifiers<'_>,
) -> Option<Result<Command, Refusal>> {
    let (first, rest) = words.split_first()?;
    let path = first.trim_start_matches(['@', '-', ':', '+', '!', '|']);
    let prefix = first.strip_suffix(path).unwrap_or_default();
    let optional = prefix.contains('-');
    // With `@` the second word is argv[0].
    let rest = if prefix.contains('@') {
        rest.get(1..).unwrap_or_default()
    } else {
        rest
    };
    let refuse = |r| if optional { None } else { Some(Err(r)) };
    let program = match specifiers.expand(path) {
        Ok(program) => program,
        Err(s) => return refuse(Refusal::Specifier(s)),
    };
    if program.is_empty() || program.chars().any(char::is_control) {
        return refuse(Refusal::Unsafe(text::shorten(path, 80)));
    }
    if !program.starts_with('/') && program.contains('/') {
        return refuse(Refusal::Relative(program));
    }
    if program.ends_with('/') {
        return refuse(Refusal::Directory(program));
    }
    let mut args = Vec::new();
    for word in rest {
        match specifiers.expand(word) {
            Ok(arg) => args.push(arg),
            Err(s) => return refuse(Refusal::Specifier(s)),
        }
    }
    Some(Ok(Command {
        key: a.key.clone(),
        assignment: a.clone(),
        optional,
        privileged: prefix.contains('+') || prefix.contains('!'),
        program,
        args,
    }))
}

/// `$VAR` and `${VAR}` of an argument filled in from the unit's environment; unknown ones vanish, as in systemd.
pub fn substitute(arg: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = arg;
    while let Some((head, tail)) = rest.split_once('$') {
        out.push_str(head);
        let braced = tail.strip_prefix('{').and_then(|t| t.split_once('}'));
        let (name, after) = match braced {
            Some((name, after)) => (name, after),
            None => {
                let end = tail
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .unwrap_or(tail.len());
                (
                    tail.get(..end).unwrap_or_default(),
                    tail.get(end..).unwrap_or_default(),
                )
            }
        };
        if name.is_empty() {
            out.push('$');
        } else if let Some(value) = env.get(name) {
            out.push_str(value);
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
