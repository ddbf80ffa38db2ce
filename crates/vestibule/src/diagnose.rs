//! `vestibule diagnose`: evidence in, one verdict out. Exit status 0 healthy, 1 a cause, 2 unknown, 64 and up for bad
//! usage or unreadable input (sysexits.h).
use crate::output::{self, Output};
use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use std::{io::Read as _, process::ExitCode};
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Verdict, VerdictKind},
    image::BriefManifest,
};
use vestibule_diagnose::{
    Evidence,
    disk::{dir::DirTree, source::SeekSource},
};

#[derive(Debug, clap::Args)]
pub(crate) struct DiagnoseArgs {
    /// An ext4 image, raw or inside a partition table, or a directory that holds a root tree.
    #[arg(long, value_name = "FILE")]
    pub(crate) disk: Option<Utf8PathBuf>,
    /// A serial console.
    #[arg(long, value_name = "FILE")]
    pub(crate) serial: Option<Utf8PathBuf>,
    /// A journal file or a directory of them; also the export format.
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) journal: Option<Utf8PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "STRING")]
    pub(crate) cmdline: Option<String>,
    /// The kernel's release: the name below /lib/modules.
    #[arg(long, value_name = "VERSION")]
    pub(crate) kernel_modules: Option<String>,
    /// A runner's evidence directory. The image that it names is looked at too, where it is still there and no disk is given.
    #[arg(long, value_name = "DIR")]
    pub(crate) evidence: Option<Utf8PathBuf>,
    /// A unit that must run [default: those of the image's manifest, where it stands beside the disk or the evidence names
    /// them; else the agent's where the disk has it; else the services that the default target starts from /etc].
    #[arg(long, value_name = "NAME")]
    pub(crate) unit: Vec<String>,
    /// Explain a cause instead of looking for one.
    #[arg(long, value_name = "CAUSE", exclusive = true)]
    pub(crate) explain: Option<String>,
}

/// Of a console or a journal at most so much is read; journald begins a new file at 128 MiB (journald.conf(5),
/// `SystemMaxFileSize=`).
const READ_LIMIT: u64 = 128 << 20;
/// sysexits.h EX_NOINPUT.
const NO_INPUT: u8 = 66;

pub(crate) fn run(args: &DiagnoseArgs, out: Output) -> anyhow::Result<ExitCode> {
    if let Some(id) = &args.explain {
        return Ok(explain(id));
    }
    let sources = [&args.disk, &args.serial, &args.journal, &args.evidence];
    if sources.iter().all(|source| source.is_none()) {
        output::note(
            "vestibule: nothing to look at; give at least one of --disk, --serial, --journal, --evidence",
        );
        return Ok(ExitCode::from(crate::USAGE));
    }
    match collect(args) {
        Ok(evidence) => print(&vestibule_diagnose::diagnose(&evidence), out),
        Err(error) => {
            output::print_error(out, &error);
            Ok(ExitCode::from(NO_INPUT))
        }
    }
}

fn collect(args: &DiagnoseArgs) -> anyhow::Result<Evidence> {
    let mut evidence = match &args.evidence {
        Some(dir) if args.disk.is_none() => Evidence::of_vm(dir.as_std_path())?,
        Some(dir) => Evidence::from_dir(dir.as_std_path())?,
        None => Evidence::new(),
    };
    if let Some(path) = &args.disk {
        evidence = disk(evidence, path)?;
    }
    if let Some(path) = &args.serial {
        evidence = evidence.serial(read(path)?);
    }
    if let Some(path) = &args.journal {
        for file in journal_files(path)? {
            evidence = evidence.journal(&read(&file)?, file.as_str());
        }
    }
    if let Some(cmdline) = &args.cmdline {
        evidence = evidence.cmdline(cmdline);
    }
    if let Some(release) = &args.kernel_modules {
        evidence = evidence.kernel_modules(release);
    }
    let units = match &args.disk {
        Some(disk) if args.unit.is_empty() => required_units(disk)?,
        Some(_) | None => args.unit.clone(),
    };
    Ok(units.iter().fold(evidence, Evidence::unit))
}

/// The units that the manifest beside a root image requires, as the image store keeps it; none where there is no manifest.
fn required_units(disk: &Utf8Path) -> anyhow::Result<Vec<String>> {
    let path = disk.with_file_name("manifest.json");
    if !disk.is_file() || !path.is_file() {
        return Ok(Vec::new());
    }
    let manifest: BriefManifest =
        serde_json::from_slice(&read(&path)?).with_context(|| format!("understand `{path}`"))?;
    let mut named = manifest.artifacts.keys();
    let is_its_own = named.any(|name| disk.file_name() == Some(name));
    Ok(if is_its_own {
        manifest.required_units
    } else {
        Vec::new()
    })
}

fn read(path: &Utf8Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(READ_LIMIT + 1).read_to_end(&mut bytes))
        .with_context(|| format!("read `{path}`"))?;
    anyhow::ensure!(
        bytes.len() as u64 <= READ_LIMIT,
        "`{path}` has more than {} MiB, which is no console and no journal of a VM; give its end, or the newest journal file",
        READ_LIMIT >> 20
    );
    Ok(bytes)
}

/// A directory is a root tree; a file is an image.
fn disk(evidence: Evidence, path: &Utf8Path) -> anyhow::Result<Evidence> {
    if path.is_dir() {
        return Ok(evidence.disk(DirTree::new(path.as_std_path())));
    }
    let source = std::fs::File::open(path)
        .and_then(SeekSource::file)
        .with_context(|| format!("open `{path}`"))?;
    Ok(evidence.disk_image(source))
}

/// The file itself, or every `.journal` file below the directory (`/var/log/journal/<machine-id>/`).
fn journal_files(path: &Utf8Path) -> anyhow::Result<Vec<Utf8PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in path
        .read_dir_utf8()
        .with_context(|| format!("list `{path}`"))?
    {
        let entry = entry.with_context(|| format!("list `{path}`"))?;
        if entry.file_type()?.is_dir() {
            files.extend(journal_files(entry.path())?);
        } else if entry.path().extension() == Some("journal") {
            files.push(entry.into_path());
        }
    }
    files.sort();
    Ok(files)
}

fn explain(id: &str) -> ExitCode {
    match Cause::from_id(id) {
        Some(cause) => {
            output::line(vestibule_diagnose::explain(cause));
            ExitCode::SUCCESS
        }
        None => {
            let known: Vec<&str> = Cause::ALL.iter().map(|cause| cause.id()).collect();
            output::note(&format!(
                "vestibule: there is no cause `{id}`; there are {}",
                known.join(", ")
            ));
            ExitCode::from(crate::USAGE)
        }
    }
}

/// Prints a verdict and gives its exit status.
pub(crate) fn print(verdict: &Verdict, out: Output) -> anyhow::Result<ExitCode> {
    if out.json {
        output::line(&serde_json::to_string_pretty(&flat(verdict)?)?);
    } else {
        output::line(&text(verdict));
    }
    Ok(match verdict.verdict {
        VerdictKind::Healthy => ExitCode::SUCCESS,
        VerdictKind::Cause => ExitCode::from(1),
        VerdictKind::Unknown => ExitCode::from(2),
    })
}

/// Prints why something failed, beside the error that says so: a script reads the verdict's fields, and `error` as always.
pub(crate) fn print_failure(
    finding: &Finding,
    error: &anyhow::Error,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let message = format!("{error:#}");
    output::note(&format!("vestibule: {message}"));
    if out.json {
        let mut value = serde_json::to_value(finding)?;
        if let Some(object) = value.as_object_mut() {
            object.insert(
                "verdict".to_owned(),
                serde_json::to_value(VerdictKind::Cause)?,
            );
            object.insert(
                "error".to_owned(),
                serde_json::json!({ "message": message }),
            );
        }
        output::line(&serde_json::to_string_pretty(&value)?);
    } else {
        output::note(&output::finding(&beside(finding, &message)));
    }
    Ok(ExitCode::FAILURE)
}

/// For people, who have just read `message`: of the proof, what that does not say already.
fn beside(finding: &Finding, message: &str) -> Finding {
    let mut finding = finding.clone();
    for quote in &mut finding.evidence {
        let new = |line: &&str| !line.trim().is_empty() && !message.contains(line.trim());
        quote.text = quote
            .text
            .lines()
            .filter(new)
            .collect::<Vec<_>>()
            .join("\n");
    }
    finding.evidence.retain(|quote| !quote.text.is_empty());
    finding
}

/// The verdict as one flat object: the finding's fields stand beside `verdict`, which is what scripts expect.
fn flat(verdict: &Verdict) -> anyhow::Result<serde_json::Value> {
    let mut value = serde_json::to_value(verdict)?;
    if let Some(object) = value.as_object_mut()
        && let Some(serde_json::Value::Object(finding)) = object.remove("finding")
    {
        object.extend(finding);
    }
    Ok(value)
}

fn text(verdict: &Verdict) -> String {
    let mut text = match (&verdict.verdict, &verdict.finding) {
        (VerdictKind::Healthy, _) => "healthy".to_owned(),
        (_, Some(finding)) => output::finding(finding),
        (_, None) => "unknown: the evidence names no cause".to_owned(),
    };
    for finding in &verdict.also {
        text.push_str(&format!("\n\nalso {}", output::finding(finding)));
    }
    for note in &verdict.notes {
        text.push_str(&format!("\nnote    {}: {}", note.note, note.why));
    }
    text.push_str(&format!(
        "\nlooked at {} in {} ms",
        verdict.looked_at.join(", "),
        verdict.elapsed_ms
    ));
    for next in &verdict.collect_next {
        text.push_str(&format!("\ncollect next: {next}"));
    }
    text
}
