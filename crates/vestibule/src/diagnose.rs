//! `vestibule diagnose`: evidence in, one verdict out. Exit status 0 healthy, 1 a cause, 2 unknown, 64 and up for bad
//! usage or unreadable input (sysexits.h).
use crate::output::{self, Output};
use camino::Utf8PathBuf;
use std::process::ExitCode;
use vestibule_api::{cause::Cause, finding::{Verdict, VerdictKind}};

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
    /// A runner's evidence directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) evidence: Option<Utf8PathBuf>,
    /// A unit that must run [default: those that the image's manifest requires].
    #[arg(long, value_name = "NAME")]
    pub(crate) unit: Vec<String>,
    /// Explain a cause instead of looking for one.
    #[arg(long, value_name = "CAUSE", exclusive = true)]
    pub(crate) explain: Option<String>,
}

/// sysexits.h EX_USAGE.
const USAGE: u8 = 64;
/// sysexits.h EX_NOINPUT.
const NO_INPUT: u8 = 66;

pub(crate) fn run(args: &DiagnoseArgs, out: Output) -> anyhow::Result<ExitCode> {
    if let Some(id) = &args.explain {
        return Ok(explain(id));
    }
    let mut evidence = vestibule_diagnose::Evidence::new();
    let read = collect(&mut evidence, args);
    if let Err(error) = read {
        output::print_error(out, &error);
        return Ok(ExitCode::from(NO_INPUT));
    }
    if evidence.is_empty() {
        output::note("vestibule: nothing to look at; give at least one of --disk, --serial, --journal, --evidence");
        return Ok(ExitCode::from(USAGE));
    }
    print(&vestibule_diagnose::diagnose(&evidence), out)
}

fn collect(evidence: &mut vestibule_diagnose::Evidence, args: &DiagnoseArgs) -> anyhow::Result<()> {
    if let Some(dir) = &args.evidence {
        evidence.add_bundle(dir.as_std_path())?;
    }
    if let Some(disk) = &args.disk {
        evidence.add_disk(disk.as_std_path())?;
    }
    if let Some(serial) = &args.serial {
        evidence.add_serial(serial.as_std_path())?;
    }
    if let Some(journal) = &args.journal {
        evidence.add_journal(journal.as_std_path())?;
    }
    if let Some(cmdline) = &args.cmdline {
        evidence.set_cmdline(cmdline);
    }
    if let Some(release) = &args.kernel_modules {
        evidence.set_kernel_modules(release);
    }
    for unit in &args.unit {
        evidence.require_unit(unit);
    }
    Ok(())
}

fn explain(id: &str) -> ExitCode {
    match Cause::from_id(id) {
        Some(cause) => {
            output::line(vestibule_diagnose::explain(cause));
            ExitCode::SUCCESS
        }
        None => {
            let known: Vec<&str> = Cause::ALL.iter().map(|cause| cause.id()).collect();
            output::note(&format!("vestibule: there is no cause `{id}`; there are {}", known.join(", ")));
            ExitCode::from(USAGE)
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
    text.push_str(&format!("\nlooked at {} in {} ms", verdict.looked_at.join(", "), verdict.elapsed_ms));
    for next in &verdict.collect_next {
        text.push_str(&format!("\ncollect next: {next}"));
    }
    text
}
