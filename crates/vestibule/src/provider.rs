//! `vestibule provider`: the packs that this binary carries and those of `$VESTIBULE_HOME/providers`.
use crate::{
    home::Home,
    output::{self, Output},
};
use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use std::process::ExitCode;
use vestibule_api::{
    ids::ProviderId,
    image::Manifest,
    pack::{Handoff, ProviderPack},
};
use vestibule_controller::PackCheck;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum ProviderCommand {
    /// List provider packs.
    List,
    /// Show one pack: terms and hand-off, tool, flows, allowed hosts, credential files.
    Show { provider: ProviderId },
    /// Check packs with what the configuration changes of them; prints every error with file and key.
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CheckArgs {
    /// Ids of packs, or files, which are checked alone [default: every pack, built-in or in $VESTIBULE_HOME/providers].
    #[arg(value_name = "ID|FILE")]
    packs: Vec<String>,
    /// Compare packs with the tools of this image, too.
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Configuration [default: $VESTIBULE_HOME/vestibule.toml where it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<Utf8PathBuf>,
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
        ProviderCommand::Check(args) => return check(home, &args, out),
    }
    Ok(ExitCode::SUCCESS)
}

fn show(pack: &ProviderPack) -> String {
    let mut text = format!(
        "{}  {} by {}\n{}\nterms  {}\n       {}\n       hand-off: {}",
        pack.provider.id,
        pack.provider.name,
        pack.provider.vendor,
        pack.provider.homepage,
        pack.terms.note,
        pack.terms.url,
        match pack.terms.handoff {
            Handoff::SamePerson => "same-person (to the same person's own machines and tools only)",
            Handoff::Organisation => "organisation (to what the person's organisation runs)",
        }
    );
    if let Some(install) = &pack.install {
        text.push_str(&format!(
            "\ntool   {} {}, at {}",
            install.package, install.version, install.bin
        ));
    }
    for flow in &pack.flow {
        let hosts = flow
            .url
            .as_ref()
            .map(|u| u.hosts.join(", "))
            .unwrap_or_default();
        let runs = if flow.argv.is_empty() {
            "no program: the agent is the client".to_owned()
        } else {
            flow.argv.join(" ")
        };
        text.push_str(&format!(
            "\nflow   {}: {}\n       runs {runs}\n       opens {hosts}",
            flow.id, flow.title,
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

fn check(home: &Home, args: &CheckArgs, out: Output) -> anyhow::Result<ExitCode> {
    // No id has a dot or a slash in it.
    let (files, ids): (Vec<&String>, Vec<&String>) = args
        .packs
        .iter()
        .partition(|name| name.contains(['.', '/']));
    let mut checks = Vec::new();
    for file in files {
        checks.push(check_file(Utf8Path::new(file))?);
    }
    if args.packs.is_empty() || !ids.is_empty() {
        let config = vestibule_controller::Config::load(args.config.as_deref(), home.path())?;
        let manifest = args.image.as_deref().map(|image| manifest(home, image));
        let all = vestibule_controller::check_packs(&config, manifest.transpose()?.as_ref())?;
        for id in &ids {
            let found = all.iter().find(|check| check.provider == **id);
            checks.push(found.cloned().with_context(|| {
                format!("there is no pack `{id}`; `vestibule provider list` shows them")
            })?);
        }
        if ids.is_empty() {
            checks.extend(all);
        }
    }
    // Whoever asks about one pack wants to use it; of all of them, some may wait for the operator.
    let bad = |check: &PackCheck| {
        !check.problems.is_empty() || (!ids.is_empty() && !check.missing.is_empty())
    };
    let status = if checks.iter().any(bad) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    };
    if out.json {
        out.print(&checks, |_| String::new())?;
    } else {
        checks.iter().for_each(print_check);
    }
    Ok(status)
}

fn print_check(check: &PackCheck) {
    let PackCheck {
        provider,
        file,
        problems,
        missing,
    } = check;
    let subject = if file == "built-in" { provider } else { file };
    for problem in problems {
        output::note(&format!("{subject}: {problem}"));
    }
    if !missing.is_empty() {
        output::line(&format!(
            "{subject}: not configured: [providers.{provider}.parameters] gives no value to {}",
            missing.join(", ")
        ));
    } else if problems.is_empty() {
        let from = if file == "built-in" { file } else { provider };
        output::line(&format!("{subject}: ok ({from})"));
    }
}

/// A file by itself: what the configuration makes of it depends on where it will stand.
fn check_file(file: &Utf8Path) -> anyhow::Result<PackCheck> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read `{file}`"))?;
    let (provider, problems) = match ProviderPack::parse(file.as_str(), &text) {
        Ok(pack) => (pack.provider.id.to_string(), Vec::new()),
        Err(errors) => {
            let problems = errors.problems.iter().map(ToString::to_string).collect();
            (file.file_stem().unwrap_or_default().to_owned(), problems)
        }
    };
    Ok(PackCheck {
        provider,
        file: file.to_string(),
        problems,
        missing: Vec::new(),
    })
}

fn manifest(home: &Home, image: &str) -> anyhow::Result<Manifest> {
    let store = vestibule_image::Store::open(home.path())?;
    Ok(store.manifest(&store.resolve(image)?)?)
}
