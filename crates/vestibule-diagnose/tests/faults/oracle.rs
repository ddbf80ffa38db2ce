//! What `systemd-analyze --root verify` says of every recorded case, beside what we say of its disk: the table of
//! `reference/systemd.md`, made anew. It fails where we see less than systemd does.
use crate::{agrees, expect, static_evidence};
use anyhow::{Context, Result};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use vestibule_api::finding::VerdictKind;
use vestibule_diagnose::diagnose;

/// Whether it has something to say of the unit or of what the boot would load.
fn flagged(root: &Path, unit: &str) -> Result<bool> {
    for what in [unit, "default.target"] {
        let output = Command::new("systemd-analyze")
            .arg(format!("--root={}", root.display()))
            .args(["--man=no", "verify", what])
            .stdin(Stdio::null())
            .output()
            .context("start systemd-analyze")?;
        if !output.status.success() || mentions(&output.stderr, unit) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Warnings of Debian's own units are in every tree.
fn mentions(said: &[u8], unit: &str) -> bool {
    String::from_utf8_lossy(said)
        .lines()
        .any(|line| line.contains(unit))
}

#[derive(Default)]
struct Row {
    of: usize,
    systemd: usize,
    ours: usize,
}

#[test]
#[ignore = "takes two minutes: cargo test -p vestibule-diagnose --test faults oracle -- --ignored --nocapture"]
fn we_see_what_systemd_analyze_sees_and_more() -> Result<()> {
    let Some((faults, base)) = crate::faults("oracle")? else {
        return Ok(());
    };
    let mut cases: Vec<PathBuf> = fs::read_dir(&faults)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("expect.toml").is_file())
        .collect();
    cases.sort();
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    let mut less = Vec::new();
    println!(
        "{:<46} {:<28} systemd-analyze  ours (disk alone)",
        "case", "expected"
    );
    for dir in cases {
        let expect = expect(&dir)?;
        let mutated = base.mutate(&dir, expect.packing)?;
        let systemd = flagged(&mutated.dir, &expect.unit)?;
        let verdict = diagnose(&static_evidence(&expect, &mutated)?);
        let ours = verdict.verdict == VerdictKind::Cause;
        let fault = expect.verdict != "healthy";
        let row = rows
            .entry(if fault {
                "faults"
            } else {
                "controls and traps"
            })
            .or_default();
        row.of += 1;
        row.systemd += usize::from(systemd);
        row.ours += usize::from(ours);
        if fault && systemd && !agrees(&expect, &verdict) {
            less.push(expect.id.clone());
        }
        let said = |flagged| if flagged { "flagged" } else { "–" };
        println!(
            "{:<46} {:<28} {:<16} {}",
            expect.id,
            expect.cause.as_deref().unwrap_or("healthy"),
            said(systemd),
            verdict.finding.map_or("–", |finding| finding.cause.id())
        );
    }
    for (name, row) in &rows {
        println!(
            "{name}: systemd-analyze flagged {} of {}, ours {}",
            row.systemd, row.of, row.ours
        );
    }
    assert!(
        less.is_empty(),
        "systemd-analyze sees, and we do not: {less:?}"
    );
    Ok(())
}
