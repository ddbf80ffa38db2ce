//! `vestibule audit`: the vault's audit log, read from its files. Needs no controller and changes nothing.
use crate::{
    home::Home,
    output::{self, Output},
};
use anyhow::{Context as _, ensure};
use camino::Utf8PathBuf;
use serde::Serialize;
use std::process::ExitCode;
use vestibule_api::{error::Chain, ids::CredentialId, time::Timestamp};
use vestibule_controller::Config;
use vestibule_vault::{AuditLine, AuditSummary, Vault};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum AuditCommand {
    /// Check every line from the first, and every record against the lines; name the first line that does not follow.
    Verify {
        #[command(flatten)]
        vault: VaultArgs,
        /// Demand that the log still holds the line with this MAC: the `head` that an earlier check printed.
        #[arg(long, value_name = "MAC")]
        head: Option<String>,
    },
    /// List what was stored, released and removed, oldest first.
    List {
        #[command(flatten)]
        vault: VaultArgs,
        /// Only of this credential.
        #[arg(long)]
        credential: Option<CredentialId>,
        /// Only the newest N lines.
        #[arg(long, value_name = "N")]
        last: Option<usize>,
    },
}

/// Which vault, and where its key is.
#[derive(Debug, clap::Args)]
pub(crate) struct VaultArgs {
    /// Directory of the vault [default: $VESTIBULE_HOME/vault].
    #[arg(long, value_name = "DIR")]
    vault: Option<Utf8PathBuf>,
    /// Configuration that says where the master key is [default: $VESTIBULE_HOME/vestibule.toml where it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<Utf8PathBuf>,
}

impl VaultArgs {
    fn read(&self, home: &Home, each: &mut dyn FnMut(&AuditLine, &str)) -> anyhow::Result<Vault> {
        let config = Config::load(self.config.as_deref(), home.path())?;
        let dir = self
            .vault
            .clone()
            .unwrap_or_else(|| home.path().join("vault"));
        Vault::read(&dir, &config.vault_key(), each).with_context(|| format!("check `{dir}`"))
    }
}

pub(crate) fn run(home: &Home, command: AuditCommand, out: Output) -> anyhow::Result<ExitCode> {
    match command {
        AuditCommand::Verify { vault, head } => verify(home, &vault, head.as_deref(), out),
        AuditCommand::List {
            vault,
            credential,
            last,
        } => list(home, &vault, credential, last, out),
    }
}

/// What a check found. The log itself follows from its first line, or there would be an error instead.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    #[serde(flatten)]
    summary: AuditSummary,
    first_at: Option<Timestamp>,
    last_at: Option<Timestamp>,
    credentials: usize,
    /// Records that the log does not vouch for, or that can't be read, and why.
    damaged: Vec<Damaged>,
    /// Records that the log says are there.
    missing: Vec<CredentialId>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Damaged {
    credential: CredentialId,
    why: String,
}

fn verify(
    home: &Home,
    args: &VaultArgs,
    head: Option<&str>,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let (mut first_at, mut last_at) = (None, None);
    let mut found = head.is_none();
    let vault = args.read(home, &mut |line, mac| {
        found |= head == Some(mac);
        first_at.get_or_insert(line.at);
        last_at = Some(line.at);
    })?;
    ensure!(
        found,
        "no line of the audit log has the MAC that `--head` names: lines at its end were cut off, or it is another log; \
         compare with a backup"
    );
    let listing = vault.list()?;
    let damaged = |(credential, err): (CredentialId, vestibule_vault::ReadError)| Damaged {
        credential,
        why: Chain(&err).to_string(),
    };
    let report = Report {
        summary: vault.audit_check()?,
        first_at,
        last_at,
        credentials: listing.credentials.len(),
        damaged: listing.damaged.into_iter().map(damaged).collect(),
        missing: vault.missing(),
    };
    out.print(&report, show)?;
    let sound = report.damaged.is_empty() && report.missing.is_empty();
    if !sound {
        output::note("vestibule: the audit log is unbroken, but records are not as it says");
    }
    Ok(ExitCode::from(u8::from(!sound)))
}

fn show(report: &Report) -> String {
    let at = |at: Option<Timestamp>| at.map(Timestamp::to_second).unwrap_or_default();
    let summary = &report.summary;
    let mut text = format!(
        "lines        {}, unbroken, {} to {}\nreleased     {}\ncredentials  {}\nhead         {}",
        summary.lines,
        at(report.first_at),
        at(report.last_at),
        summary.released,
        report.credentials,
        summary.head,
    );
    if summary.torn {
        text.push_str("\ntorn         half a line at the end: it was never synced, and nothing happened on its account");
    }
    for damaged in &report.damaged {
        text.push_str(&format!(
            "\ndamaged      {}: {}",
            damaged.credential, damaged.why
        ));
    }
    for id in &report.missing {
        text.push_str(&format!("\nmissing      {id}"));
    }
    text
}

fn list(
    home: &Home,
    args: &VaultArgs,
    credential: Option<CredentialId>,
    last: Option<usize>,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let mut lines = Vec::new();
    let read = args.read(home, &mut |line, _| {
        if credential.is_none() || line.credential == credential {
            lines.push(line.clone());
        }
    });
    let lines = lines.split_off(lines.len().saturating_sub(last.unwrap_or(lines.len())));
    out.print(&lines, |lines| {
        let row = |line: &AuditLine| {
            vec![
                line.seq.to_string(),
                line.at.to_second(),
                line.action.id().to_owned(),
                line.credential.map(|id| id.to_string()).unwrap_or_default(),
                line.actor.clone(),
                line.purpose.clone(),
            ]
        };
        output::table(
            &["LINE", "AT", "ACTION", "CREDENTIAL", "ACTOR", "PURPOSE"],
            &lines.iter().map(row).collect::<Vec<_>>(),
        )
    })?;
    // Lines before the first bad one are shown; that there is one is still an error.
    read.map(|_| ExitCode::SUCCESS)
}
