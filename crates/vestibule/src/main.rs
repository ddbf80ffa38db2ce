//! `vestibule`: the host binary. Each role is one file and holds no logic of its own: it reads arguments, calls a room,
//! and prints what came of it.
mod api;
mod audit;
mod backup;
mod credential;
mod diagnose;
mod doctor;
mod home;
mod host;
mod image;
mod output;
mod people;
mod provider;
mod serve;
mod session;
mod vm;

use anyhow::Context as _;
use camino::Utf8PathBuf;
use clap::{CommandFactory, Parser, Subcommand};
use std::{process::ExitCode, time::Duration};

/// Sign in with a provider's own tool in a disposable VM, and keep what the sign-in produced.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    home: home::HomeArgs,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve API, events, viewer and dashboard.
    Serve(serve::ServeArgs),
    /// Print a one-time link to the dashboard of the running controller.
    Link,
    /// Own one VM; its specification is JSON on standard input. Started by the controller, or by an engine for it.
    #[command(hide = true)]
    RunVm(vm::RunVmArgs),
    /// Build, verify, publish and remove golden images.
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Run VMs and look into them.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Start sign-ins and follow them.
    #[command(subcommand)]
    Session(session::SessionCommand),
    /// List, fetch and remove sealed credentials.
    #[command(subcommand)]
    Credential(credential::CredentialCommand),
    /// Check and list the vault's audit log.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Save database, vault and configuration into one file, also while the controller runs.
    Backup(backup::BackupArgs),
    /// Put a backup into an empty home, after every credential in it was checked.
    Restore(backup::RestoreArgs),
    /// Make, list and remove users of the dashboard.
    #[command(subcommand)]
    User(people::UserCommand),
    /// Make, list and revoke service tokens of the API.
    #[command(subcommand)]
    Token(people::TokenCommand),
    /// Make, list and remove organisations.
    #[command(subcommand)]
    Org(people::OrgCommand),
    /// List the hosts that share the database, and remove one that never comes back.
    #[command(subcommand)]
    Host(host::HostCommand),
    /// Look at provider packs and check them.
    #[command(subcommand)]
    Provider(provider::ProviderCommand),
    /// Say what is wrong with an image or a VM, from its evidence.
    Diagnose(diagnose::DiagnoseArgs),
    /// Say what this host can run, and what to install.
    Doctor,
    /// Print a completion script for a shell.
    Completion {
        /// The shell to complete for.
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff), or write it and one of each command into a directory.
    Man {
        /// The directory; made where it does not exist.
        dir: Option<Utf8PathBuf>,
    },
}

/// A runner that waits for its VM has threads for it (`vestibule_vm::prepare`), for as long as it may wait.
const IDLE_THREAD: Duration = Duration::from_secs(24 * 60 * 60);

/// sysexits.h EX_USAGE: arguments that are not understood. Not clap's 2, which means *unknown* where a verdict is asked for.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody may be reading; the status says it all the same.
            error.print().ok();
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let out = output::Output { json: cli.json };
    match run(cli, out) {
        Ok(code) => code,
        Err(error) => {
            output::print_error(out, &error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli, out: output::Output) -> anyhow::Result<ExitCode> {
    // Every role may come by a credential, or by what a person typed.
    vestibule_vm::core_dump::forbid().context("forbid core dumps")?;
    let home = cli.home.resolve()?;
    match cli.command {
        Command::Serve(args) => runtime()?.block_on(serve::serve(home, args)),
        Command::Link => runtime()?.block_on(serve::link(&home, out)),
        Command::RunVm(args) => runtime_with(IDLE_THREAD)?.block_on(vm::run_vm(args)),
        Command::Image(command) => image::run(&home, command, out),
        Command::Vm(command) => runtime()?.block_on(vm::run(&home, command, out)),
        Command::Session(command) => runtime()?.block_on(session::run(&home, command, out)),
        Command::Credential(command) => runtime()?.block_on(credential::run(&home, command, out)),
        Command::Audit(command) => audit::run(&home, command, out),
        Command::Backup(args) => runtime()?.block_on(backup::backup(&home, args, out)),
        Command::Restore(args) => runtime()?.block_on(backup::restore(&home, args, out)),
        Command::User(command) => runtime()?.block_on(people::user(&home, command, out)),
        Command::Token(command) => runtime()?.block_on(people::token(&home, command, out)),
        Command::Org(command) => runtime()?.block_on(people::org(&home, command, out)),
        Command::Host(command) => runtime()?.block_on(host::run(&home, command, out)),
        Command::Provider(command) => provider::run(&home, command, out),
        Command::Diagnose(args) => diagnose::run(&args, out),
        Command::Doctor => doctor::run(&home, out),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "vestibule", &mut script);
            output::raw(&script);
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { dir: None } => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            output::raw(&page);
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { dir: Some(dir) } => {
            std::fs::create_dir_all(&dir)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), &dir))
                .with_context(|| format!("write manual pages into `{dir}`"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    runtime_with(Duration::from_secs(10))
}

/// With threads for what blocks that end when they have had nothing to do for `idle`.
fn runtime_with(idle: Duration) -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_keep_alive(idle)
        .enable_all()
        .build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
