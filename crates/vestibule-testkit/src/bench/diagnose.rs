//! A browser image judged from its disk alone, beside what an engineer would do by hand: mount it, `systemd-analyze verify`,
//! `journalctl`. And a VM of that image that failed, explained from its evidence and its disk. All with a warm page cache.
//! Needs root and a loop device for what is done by hand.
use super::{Report, report::Required, stats::median, usage};
use crate::stage;
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::json;
use std::{
    collections::BTreeSet,
    fmt::Write as _,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::process::Command;

const IMAGE: &str = "browser";
const TURNS: usize = 10;
/// Of what takes seconds.
const FEW: usize = 3;
/// Kinds of units that are verified.
const KINDS: [&str; 6] = [
    ".service", ".socket", ".target", ".timer", ".mount", ".path",
];
/// `consoleKeepBytes`, as the controller sets it.
const CONSOLE_BYTES: usize = 4 << 20;
/// Between two looks at a process's peak.
const LOOK: Duration = Duration::from_millis(1);

/// Runs the bench with the image `browser`.
///
/// # Errors
/// When it is not built, cannot be mounted, or is not healthy.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("diagnose");
    let image = stage::image_home()
        .join("aliases")
        .join(IMAGE)
        .canonicalize_utf8()
        .with_context(|| format!("no image `{IMAGE}`: `script/test images browser` builds it"))?;
    let root = image.join("root.ext4");
    let home = camino_tempfile::tempdir()?;
    let required = required_units(&image)?;
    let every = every_unit(&root, home.path()).await?;
    let (mut ours, mut by_hand, mut peaks) = (Vec::new(), Vec::new(), Vec::new());
    let (mut explained, mut all_ours, mut all_by_hand) = (Vec::new(), Vec::new(), Vec::new());
    let evidence = failed_vm(&image, home.path())?;
    // The first turn warms the page cache.
    for turn in 0..=TURNS {
        let (took, peak) = diagnose(&root, &[]).await?;
        let hand = mount_and_verify(&root, home.path(), &required).await?;
        let (all, all_peak) = diagnose(&root, &every).await?;
        let all_hand = if turn <= FEW {
            Some(mount_and_verify(&root, home.path(), &every).await?)
        } else {
            None
        };
        let why = explain(&evidence, &root).await?;
        if turn > 0 {
            explained.push(why);
            ours.push(took);
            by_hand.push(hand);
            all_ours.push(all);
            all_by_hand.extend(all_hand);
            peaks.push(peak.max(all_peak));
        }
    }
    report.median("vestibule diagnose --disk", "ms", &ours);
    report.require(Required::AtMost(300.0));
    report.median(
        "mount, systemd-analyze --root verify, journalctl -D, umount",
        "ms",
        &by_hand,
    );
    report.figure(
        "by hand ÷ vestibule",
        "x",
        median(&by_hand) / median(&ours),
        &[],
    );
    report.require(Required::AtLeast(20.0));
    let what = format!("of all {} units of the image:", every.len());
    report.median(
        format!("{what} vestibule diagnose --disk --unit …"),
        "ms",
        &all_ours,
    );
    report.require(Required::AtMost(300.0));
    report.median(format!("{what} the same by hand"), "ms", &all_by_hand);
    report.figure(
        format!("{what} by hand ÷ vestibule"),
        "x",
        median(&all_by_hand) / median(&all_ours),
        &[],
    );
    report.require(Required::AtLeast(20.0));
    report.median(
        "a failed VM, from the end of its evidence to the verdict",
        "ms",
        &explained,
    );
    report.require(Required::AtMost(2000.0));
    report.median("vestibule diagnose: peak memory", "MiB", &peaks);
    report.require(Required::AtMost(100.0));
    report.note(format!(
        "the failed VM: {} MiB of console, which is what a runner keeps, its last lines a crash of the agent; the image's disk",
        CONSOLE_BYTES >> 20
    ));
    report.note(format!(
        "image `{IMAGE}`, {TURNS} turns (by hand for all units {FEW}); the {} required units of its manifest, then all units that are files of it and no templates; the program's own start included in both",
        required.len()
    ));
    Ok(report)
}

/// Milliseconds, and the highest resident size that was seen, in MiB.
async fn diagnose(root: &Utf8Path, units: &[String]) -> Result<(f64, f64)> {
    let begun = Instant::now();
    let mut child = Command::new(stage::binary()?)
        .args(["diagnose", "--json", "--disk", root.as_str()])
        .args(units.iter().flat_map(|unit| ["--unit", unit.as_str()]))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("start vestibule")?;
    let mut peak: f64 = 0.0;
    let status = loop {
        if let Some(bytes) = child.id().and_then(|pid| usage::peak_bytes(pid).ok()) {
            peak = peak.max(bytes / f64::from(1 << 20));
        }
        if let Ok(status) = tokio::time::timeout(LOOK, child.wait()).await {
            break status?;
        }
    };
    // Not each of an image's units has to start: some are masked or wait for somebody to ask. So of all, either is an answer.
    let answered = status.success() || (status.code() == Some(1) && !units.is_empty());
    ensure!(answered, "the image is not healthy: {status}");
    Ok((begun.elapsed().as_secs_f64() * 1e3, peak))
}

/// The evidence that a runner leaves of a VM of `image` whose agent crashed after a long life, as large as it gets.
fn failed_vm(image: &Utf8Path, home: &Utf8Path) -> Result<Utf8PathBuf> {
    let directory = home.join("evidence");
    std::fs::create_dir_all(&directory)?;
    let manifest = std::fs::read(image.join("manifest.json"))?;
    let manifest: vestibule_api::image::BriefManifest = serde_json::from_slice(&manifest)?;
    let machine = json!({
        "spec": {"imageDigest": image.file_name(), "imageDir": image},
        "requiredUnits": manifest.required_units,
        "kernelCmdline": "console=ttyS0 root=/dev/vda ro",
    });
    std::fs::write(directory.join("machine.json"), machine.to_string())?;
    std::fs::write(
        directory.join("exit.json"),
        r#"{"code":0,"signal":null,"asked":true}"#,
    )?;
    let end = "[ 4000.000001] systemd[1]: vm-browser-agent.service: Main process exited, code=dumped, status=11/SEGV\n\
               [ 4000.000002] systemd[1]: vm-browser-agent.service: Failed with result 'core-dump'.\n\
               [FAILED] Failed to start vm-browser-agent.service - Browser VM agent.\n";
    let mut console = String::with_capacity(CONSOLE_BYTES);
    let mut number = 0_u32;
    while console.len() + end.len() + 160 < CONSOLE_BYTES {
        let _ = writeln!(
            console,
            "[ {:4}.{number:06}] systemd[1]: Started unit-{number}.service - What a long life prints, line {number}.",
            number / 20
        );
        number += 1;
    }
    console.push_str(end);
    std::fs::write(directory.join("serial.log"), console)?;
    Ok(directory)
}

/// Milliseconds until the verdict on a failed VM is printed; it has to be the right one.
async fn explain(evidence: &Utf8Path, root: &Utf8Path) -> Result<f64> {
    let begun = Instant::now();
    let output = Command::new(stage::binary()?)
        .args([
            "diagnose",
            "--json",
            "--evidence",
            evidence.as_str(),
            "--disk",
            root.as_str(),
        ])
        .kill_on_drop(true)
        .output()
        .await
        .context("start vestibule")?;
    let took = begun.elapsed().as_secs_f64() * 1e3;
    let verdict: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        verdict["cause"] == "crashed" && verdict["unit"] == "vm-browser-agent.service",
        "another verdict than the crash: {verdict}"
    );
    Ok(took)
}

/// What somebody verifies who knows which units matter, and `vestibule diagnose` by itself.
fn required_units(image: &Utf8Path) -> Result<Vec<String>> {
    let manifest = std::fs::read(image.join("manifest.json"))?;
    let manifest: vestibule_api::image::BriefManifest = serde_json::from_slice(&manifest)?;
    Ok(manifest.required_units)
}

/// What somebody verifies who does not know where to look: each unit that is a file of the image.
async fn every_unit(root: &Utf8Path, home: &Utf8Path) -> Result<Vec<String>> {
    let at = mount(root, home).await?;
    let names = || -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for directory in ["usr/lib/systemd/system", "etc/systemd/system"] {
            for entry in at.join(directory).read_dir_utf8()? {
                let name = entry?.file_name().to_owned();
                if KINDS.iter().any(|kind| name.ends_with(kind)) && !name.contains("@.") {
                    names.insert(name);
                }
            }
        }
        Ok(names)
    };
    let names = names();
    run_quietly("umount", &[at.as_str()], true).await?;
    Ok(names?.into_iter().collect())
}

async fn mount(root: &Utf8Path, home: &Utf8Path) -> Result<Utf8PathBuf> {
    let at = home.join("mounted");
    std::fs::create_dir_all(&at)?;
    let words = ["-o", "ro,loop", root.as_str(), at.as_str()];
    run_quietly("mount", &words, true).await?;
    Ok(at)
}

async fn mount_and_verify(root: &Utf8Path, home: &Utf8Path, units: &[String]) -> Result<f64> {
    let begun = Instant::now();
    let at = mount(root, home).await?;
    let mut verify = vec!["verify".to_owned(), format!("--root={at}")];
    verify.extend_from_slice(units);
    let verify: Vec<&str> = verify.iter().map(String::as_str).collect();
    // Its status says whether it has found something; either is an answer.
    let verified = run_quietly("systemd-analyze", &verify, false).await;
    let journal = at.join("var/log/journal");
    let read = journal_of(&journal).await;
    run_quietly("umount", &[at.as_str()], true).await?;
    verified?;
    read?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

async fn journal_of(directory: &Utf8Path) -> Result<()> {
    let arguments = ["-D", directory.as_str(), "--no-pager", "-n", "1000"];
    // An image that never ran has none, and journalctl says so.
    run_quietly("journalctl", &arguments, false).await
}

async fn run_quietly(program: &str, arguments: &[&str], must: bool) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("start {program}"))?;
    if must && !output.status.success() {
        bail!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
