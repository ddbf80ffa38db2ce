//! Build chores that cargo has no command for. `cargo xtask --help` lists them.
#![expect(clippy::print_stdout, reason = "a command-line tool's output")]
mod agent;
mod elf;
mod tidy;

use anyhow::Context as _;
use camino::Utf8PathBuf;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about = "Build chores of the workspace", disable_version_flag = true)]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Build the static agent that goes into every image, to `target/agent/vestibule-agent`.
    Agent,
    /// Check what no compiler checks: which crate uses which, file lengths, names of registries.
    Tidy,
}

fn main() -> anyhow::Result<()> {
    let root = workspace()?;
    match Args::parse().chore {
        Chore::Agent => agent::build(&root),
        Chore::Tidy => tidy::check(&root),
    }
}

/// The workspace's root: the parent of this package.
fn workspace() -> anyhow::Result<Utf8PathBuf> {
    let here = Utf8PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .map(Utf8PathBuf::from)
        .context("xtask has no parent directory")
}
