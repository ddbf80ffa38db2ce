//! What is wrong with a pack, all of it at once: which key of which file, and what was expected there.
use std::fmt;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Dotted path with indices from 0: `flow[0].url.hosts[2]`; empty for the file as a whole.
    pub key: String,
    /// What stands there and what was expected, in words.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.key.is_empty() {
            f.write_str(&self.what)
        } else {
            write!(f, "`{}`: {}", self.key, self.what)
        }
    }
}

/// Everything that is wrong with one pack; never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct PackErrors {
    /// The file's name, as it was given.
    pub file: String,
    pub problems: Vec<Problem>,
}

impl fmt::Display for PackErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}: {problem}", self.file)?;
        }
        Ok(())
    }
}

/// So many problems are said of one pack; whoever mends these finds the others.
const PROBLEMS_LIMIT: usize = 200;

/// Collects problems below a key.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Problem>);

impl Problems {
    pub(super) fn add(&mut self, key: impl Into<String>, what: impl Into<String>) {
        if self.0.len() < PROBLEMS_LIMIT {
            self.0.push(Problem {
                key: key.into(),
                what: what.into(),
            });
        }
    }

    /// Adds `what()` under `key` unless `ok`. It is not made where it would not be said.
    pub(super) fn unless(&mut self, ok: bool, key: &str, what: impl FnOnce() -> String) {
        if !ok && self.0.len() < PROBLEMS_LIMIT {
            self.add(key, what());
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `value` when nothing is wrong, else the errors of `file`.
    pub(super) fn or<T>(self, file: &str, value: T) -> Result<T, PackErrors> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(self.of(file))
        }
    }

    pub(super) fn of(self, file: &str) -> PackErrors {
        PackErrors {
            file: file.to_owned(),
            problems: self.0,
        }
    }
}

/// Shows a value in a message: quoted, without control characters, cut to a readable length.
pub(super) fn show(value: &str) -> String {
    let cut: String = value.chars().take(80).collect();
    let more = if cut.len() < value.len() { "…" } else { "" };
    format!("`{}{more}`", cut.escape_debug())
}

/// The candidate nearest to `word`, when it is near enough to have been meant.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .map(|c| (distance(word, c), c))
        .filter(|(d, c)| *d <= 1 + c.len() / 4)
        .min()
        .map(|(_, c)| c)
}

/// Levenshtein's distance between two short words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_finds_its_word() {
        let keys = ["hosts", "sources", "path_prefix"];
        assert_eq!(nearest("host", keys.into_iter()), Some("hosts"));
        assert_eq!(
            nearest("path_perfix", keys.into_iter()),
            Some("path_prefix")
        );
        assert_eq!(nearest("colour", keys.into_iter()), None);
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
