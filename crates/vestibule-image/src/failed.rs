//! A build that failed, as a verdict: which cause, and the lines that prove it.
use crate::{BuildError, BuildOptions, Store, recipe::Recipe};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    time::SystemTime,
};
use vestibule_api::{
    cause::Cause,
    error::Chain,
    finding::{Finding, Quote},
};

/// So many of the log's last lines are quoted.
const LINES: usize = 12;
/// And looked for in so many of its last bytes.
const TAIL: u64 = 64 * 1024;

/// Why there is no image. `began` is when the build did: a log of an earlier one proves nothing.
///
/// An image that would not come up has the lint's own finding; everything else is `build-failed`, with the error and, where
/// the build came so far, the end of its log.
pub fn failed(
    store: &Store,
    options: &BuildOptions,
    err: &BuildError,
    began: SystemTime,
) -> Finding {
    if let BuildError::Broken { finding, .. } = err {
        return (**finding).clone();
    }
    let said = Quote {
        source: "build".to_owned(),
        line: None,
        text: Chain(err).to_string(),
    };
    let log = log_of(store, options).and_then(|log| end_of(&log, began));
    let finding = Finding::new(
        Cause::BuildFailed,
        said,
        Cause::BuildFailed.meaning(),
        match &log {
            Some(end) => format!("correct what the error names; the whole log is {}", end.source),
            None => "correct what the error names: an input, package or command that is missing or failed".to_owned(),
        },
    )
    .refuted_by("an image of this recipe's digest in the store");
    match log {
        Some(end) => finding.and(end),
        None => finding,
    }
}

fn log_of(store: &Store, options: &BuildOptions) -> Option<Utf8PathBuf> {
    let recipe = Recipe::load(&options.recipe).ok()?;
    store.build_log(&recipe.name).ok()
}

/// The last lines of a log that this build wrote.
fn end_of(log: &Utf8Path, began: SystemTime) -> Option<Quote> {
    let mut file = File::open(log).ok()?;
    let meta = file.metadata().ok()?;
    if meta.modified().ok()? < began {
        return None;
    }
    file.seek(SeekFrom::Start(meta.len().saturating_sub(TAIL)))
        .ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = lines.get(lines.len().saturating_sub(LINES)..)?;
    (!last.is_empty()).then(|| Quote {
        source: log.to_string(),
        line: None,
        text: last.join("\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_the_log_of_this_build_is_quoted() {
        let dir = camino_tempfile::tempdir().unwrap();
        let log = dir.path().join("tiny.log");
        let text: String = (0..40).map(|n| format!("line {n}\n\n")).collect();
        std::fs::write(&log, text).unwrap();
        let written = std::fs::metadata(&log).unwrap().modified().unwrap();
        let quote = end_of(&log, written).unwrap();
        assert!(quote.text.starts_with("line 28\n") && quote.text.ends_with("line 39"));
        assert!(end_of(&log, written + Duration::from_secs(1)).is_none());
    }
}
