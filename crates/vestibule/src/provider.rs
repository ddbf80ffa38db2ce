//! `vestibule provider`: the packs that this binary carries and those of `$VESTIBULE_HOME/providers`.
use crate::{
    home::Home,
    output::{self, Output},
};
use anyhow::Context as _;
use camino::Utf8PathBuf;
use std::process::ExitCode;
use vestibule_api::{ids::ProviderId, pack::ProviderPack};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum ProviderCommand {
    /// List provider packs.
    List,
    /// Show one pack: flows, allowed hosts, credential files, terms.
    Show { provider: ProviderId },
    /// Check pack files; prints every error with file and key.
    Check {
        #[arg(required = true)]
        files: Vec<Utf8PathBuf>,
    },
}

pub(crate) fn run(home: &Home, command: ProviderCommand, out: Output) -> anyhow::Result<ExitCode> {
    match command {
        ProviderCommand::List => {
            let packs = vestibule_controller::packs(home.path())?;
            out.print(&packs, |packs| {
                let row = |p: &ProviderPack| {
                    let flows: Vec<&str> = p.flow.iter().map(|f| f.id.as_str()).collect();
                    vec![
                        p.provider.id.to_string(),
                        p.provider.name.clone(),
                        flows.join(", "),
                    ]
                };
                output::table(
                    &["PROVIDER", "NAME", "FLOWS"],
                    &packs.iter().map(row).collect::<Vec<_>>(),
                )
            })?;
        }
        ProviderCommand::Show { provider } => {
            let packs = vestibule_controller::packs(home.path())?;
            let pack = packs
                .iter()
                .find(|p| p.provider.id == provider)
                .with_context(|| {
                    format!("there is no pack `{provider}`; `vestibule provider list` shows them")
                })?;
            out.print(pack, show)?;
        }
        ProviderCommand::Check { files } => return check(&files, out),
    }
    Ok(ExitCode::SUCCESS)
}

fn show(pack: &ProviderPack) -> String {
    let mut text = format!(
        "{}  {} by {}\n{}\nterms  {}\n       {}",
        pack.provider.id,
        pack.provider.name,
        pack.provider.vendor,
        pack.provider.homepage,
        pack.terms.note,
        pack.terms.url
    );
    for flow in &pack.flow {
        let hosts = flow
            .url
            .as_ref()
            .map(|u| u.hosts.join(", "))
            .unwrap_or_default();
        text.push_str(&format!(
            "\nflow   {}: {}\n       runs {}\n       opens {hosts}",
            flow.id,
            flow.title,
            flow.argv.join(" ")
        ));
    }
    for rule in &pack.credential {
        text.push_str(&format!(
            "\nkeeps  ~/{} ({})",
            rule.path,
            rule.required.join(", ")
        ));
    }
    text
}

fn check(files: &[Utf8PathBuf], out: Output) -> anyhow::Result<ExitCode> {
    let mut bad = 0_u32;
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| format!("read `{file}`"))?;
        match ProviderPack::parse(file.as_str(), &text) {
            Ok(pack) => out.print(&pack, |pack| format!("{file}: ok ({})", pack.provider.id))?,
            Err(errors) => {
                bad += 1;
                output::note(&errors.to_string());
            }
        }
    }
    Ok(if bad == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
