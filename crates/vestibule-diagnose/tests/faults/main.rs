//! Every reproduced failure of `faults/` (see its README): the tree is mutated, the evidence of the recorded boot is
//! read, and the verdict's cause is compared with `expect.toml`.
//!
//! Needs root (the mutations call `chroot`), the folder (`VESTIBULE_FAULTS`, default `../shared/faults` beside the
//! checkout) and a base tree (`VESTIBULE_FAULTS_BASE`, default `target/faults/base`, made by `base/mkbase.sh` in about a
//! minute). Without them the test says so and passes. `VESTIBULE_FAULT=047,049` runs a selection; `VESTIBULE_FAULTS_PACKED=1`
//! packs every case into an image, and not only some.
#![expect(
    clippy::print_stdout,
    reason = "the table of cases, and why they were skipped"
)]

mod healthy;
mod oracle;
#[path = "../program/mod.rs"]
mod program;
mod tree;
mod variants;
mod variants_programs;
mod variants_reach;
mod variants_units;
mod variants_vm;

use anyhow::{Context, Result};
use flate2::read::GzDecoder;
use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use tree::{Base, Mutated, Packing};
use vestibule_api::finding::{Verdict, VerdictKind};
use vestibule_diagnose::{
    Evidence, diagnose,
    disk::{dir::DirTree, ext4::Ext4Tree, source::SeekSource},
};

/// The checkout's own path: `systemctl --root`, which makes the base tree, takes none with `..` in it.
fn checkout() -> Result<PathBuf> {
    let relative = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    fs::canonicalize(&relative).with_context(|| relative.display().to_string())
}

/// The folder of faults, and its base tree with room for `test`'s changes; none, with a printed reason, where that is not
/// possible here.
fn faults(test: &str) -> Result<Option<(PathBuf, Base)>> {
    let checkout = checkout()?;
    let faults = std::env::var_os("VESTIBULE_FAULTS")
        .map_or_else(|| checkout.join("../shared/faults"), PathBuf::from);
    Ok(Base::find(test, &checkout, &faults)?.map(|base| (faults, base)))
}

/// `expect.toml`, as far as it is compared.
struct Expect {
    id: String,
    kind: String,
    verdict: String,
    cause: Option<String>,
    stage: Option<String>,
    note: Option<String>,
    unit: String,
    cmdline: String,
    packing: Packing,
}

fn expect(dir: &Path) -> Result<Expect> {
    let text = fs::read_to_string(dir.join("expect.toml"))?;
    let table: toml::Table = text.parse()?;
    let text = |key: &str| table.get(key).and_then(|v| v.as_str()).map(str::to_owned);
    let extra = text("kernel_cmdline_extra").unwrap_or_default();
    let console = if extra.contains("CONSOLE_OFF") {
        ""
    } else {
        "console=ttyS0 "
    };
    let root = text("vm_root").unwrap_or_else(|| "/dev/vda".into());
    let mode = text("vm_rw").unwrap_or_else(|| "rw".into());
    Ok(Expect {
        id: text("id").context("id")?,
        kind: text("kind").context("kind")?,
        verdict: text("verdict").context("verdict")?,
        cause: text("cause"),
        stage: text("stage"),
        note: text("note"),
        unit: text("unit").context("unit")?,
        cmdline: format!(
            "{console}root={root} {mode} net.ifnames=0 {}",
            extra.replace("CONSOLE_OFF", "")
        ),
        packing: if table.get("vm_imgfill").is_some() {
            Packing::Filled
        } else {
            Packing::None
        },
    })
}

fn gunzip(path: &Path) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    GzDecoder::new(fs::File::open(path).ok()?)
        .read_to_end(&mut out)
        .ok()?;
    Some(out)
}

/// Disk, command line and unit: what a case offers before it runs.
fn static_evidence(expect: &Expect, mutated: &Mutated) -> Result<Evidence> {
    let evidence = Evidence::new().unit(&expect.unit).cmdline(&expect.cmdline);
    Ok(match &mutated.image {
        Some(image) => evidence.disk(Ext4Tree::open(SeekSource::file(fs::File::open(image)?)?)?),
        None => evidence.disk(DirTree::new(&mutated.dir)),
    })
}

/// What the recorded boot left.
fn with_run(evidence: Evidence, dir: &Path) -> Evidence {
    let evidence = match gunzip(&dir.join("console.log.gz")) {
        Some(bytes) => evidence.serial(bytes),
        None => evidence,
    };
    match gunzip(&dir.join("journal.export.gz")) {
        Some(bytes) => evidence.journal(&bytes, "journal"),
        None => evidence,
    }
}

fn agrees(expect: &Expect, verdict: &Verdict) -> bool {
    let cause = verdict.finding.as_ref().map(|f| f.cause.id());
    if expect.verdict == "healthy" {
        return verdict.verdict == VerdictKind::Healthy;
    }
    let finding = verdict.finding.as_ref();
    cause == expect.cause.as_deref()
        && finding.map(|f| f.stage.id()) == expect.stage.as_deref()
        && finding.is_some_and(|f| f.unit.as_deref().is_none_or(|u| u == expect.unit))
}

fn short(verdict: &Verdict) -> String {
    match (&verdict.finding, verdict.verdict) {
        (Some(f), _) => f.cause.id().to_owned(),
        (None, VerdictKind::Healthy) => "healthy".into(),
        (None, VerdictKind::Cause | VerdictKind::Unknown) => "unknown".into(),
    }
}

/// Cases whose cause is not on the disk: what happened only at run time, or outside the guest.
const NOT_ON_DISK: [&str; 15] = [
    "040", "071", "077", "079", "080", "082", "090", "096", "098", "099", "120", "121", "106",
    "102", "110",
];

fn cases(faults: &Path) -> Result<Vec<PathBuf>> {
    let mut cases: Vec<PathBuf> = fs::read_dir(faults)?
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.join("expect.toml").is_file())
        .collect();
    cases.sort();
    Ok(cases)
}

#[test]
fn every_recorded_failure_is_named() -> Result<()> {
    let Some((faults, base)) = faults("cases")? else {
        return Ok(());
    };
    let only = std::env::var("VESTIBULE_FAULT").unwrap_or_default();
    let cases = cases(&faults)?;
    let mut wrong = Vec::new();
    let (mut total, mut disk_right, mut all_right) = (0, 0, 0);
    let mut times: BTreeMap<Duration, String> = BTreeMap::new();
    println!(
        "{:<46} {:<28} {:<28} all evidence",
        "case", "expected", "disk alone"
    );
    for dir in cases {
        let expect = expect(&dir).with_context(|| dir.display().to_string())?;
        if !only.is_empty() && !only.split(',').any(|o| expect.id.starts_with(o)) {
            continue;
        }
        let mutated = base.mutate(&dir, expect.packing)?;
        let start = Instant::now();
        let disk = diagnose(&static_evidence(&expect, &mutated)?);
        times.insert(start.elapsed(), expect.id.clone());
        let all = diagnose(&with_run(static_evidence(&expect, &mutated)?, &dir));
        if !only.is_empty() {
            println!("{}", serde_json::to_string_pretty(&all)?);
        }
        let (disk_ok, all_ok) = (agrees(&expect, &disk), agrees(&expect, &all));
        let noted = expect
            .note
            .as_ref()
            .is_none_or(|n| all.notes.iter().any(|w| w.note.id() == n));
        total += 1;
        disk_right += usize::from(disk_ok);
        all_right += usize::from(all_ok && noted);
        let mark = |ok| if ok { "✓" } else { "✗" };
        let wanted = expect.cause.clone().unwrap_or_else(|| "healthy".into());
        println!(
            "{:<46} {wanted:<28} {} {:<26} {} {}{}",
            expect.id,
            mark(disk_ok),
            short(&disk),
            mark(all_ok),
            short(&all),
            if noted { "" } else { "  (note missing)" }
        );
        let number = expect.id.get(..3).unwrap_or_default();
        let harmless =
            matches!(expect.kind.as_str(), "trap" | "control") && expect.verdict == "healthy";
        if !all_ok || !noted || (!disk_ok && (harmless || !NOT_ON_DISK.contains(&number))) {
            wrong.push(format!(
                "{} disk={} all={} noted={noted}",
                expect.id,
                short(&disk),
                short(&all)
            ));
        }
    }
    println!("{total} cases: {disk_right} from the disk alone, {all_right} with all evidence");
    if let Some((slowest, id)) = times.last_key_value() {
        println!("slowest diagnosis of a tree: {slowest:?} ({id})");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The journal as a guest's journald leaves it; where nothing makes one here, as it was exported.
fn journal_file(case: &Path, work: &Path) -> Option<Vec<u8>> {
    const REMOTE: &str = "/lib/systemd/systemd-journal-remote";
    let exported = gunzip(&case.join("journal.export.gz"))?;
    let (export, native) = (work.join("x.export"), work.join("x.journal"));
    fs::write(&export, &exported).ok()?;
    let made = Command::new(REMOTE)
        .arg(format!("--output={}", native.display()))
        .arg(&export)
        .output();
    let made = made.is_ok_and(|made| made.status.success());
    Some(if made {
        fs::read(&native).ok()?
    } else {
        exported
    })
}

/// The same from an ext4 image, with blocks and inodes instead of the host's files, and from a journal's own file.
#[test]
fn an_image_says_what_its_tree_says() -> Result<()> {
    let Some((faults, base)) = faults("packed")? else {
        return Ok(());
    };
    let step = match std::env::var("VESTIBULE_FAULTS_PACKED") {
        Ok(all) if all == "1" => 1,
        _ => 11,
    };
    let mut wrong = Vec::new();
    for case in cases(&faults)?.iter().step_by(step) {
        let expect = expect(case)?;
        let packing = match expect.packing {
            Packing::None => Packing::Image,
            Packing::Image | Packing::Filled => expect.packing,
        };
        let mutated = base.mutate(case, packing)?;
        let mut evidence = static_evidence(&expect, &mutated)?;
        if let Some(console) = gunzip(&case.join("console.log.gz")) {
            evidence = evidence.serial(console);
        }
        if let Some(journal) = journal_file(case, mutated.work()) {
            evidence = evidence.journal(&journal, "journal");
        }
        let verdict = diagnose(&evidence);
        println!("{:<46} {}", expect.id, short(&verdict));
        if !agrees(&expect, &verdict) {
            wrong.push(format!("{}: {}", expect.id, short(&verdict)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
