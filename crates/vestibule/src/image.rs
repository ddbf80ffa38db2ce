//! `vestibule image`: golden images and their snapshots, in the store below `$VESTIBULE_HOME`.
mod progress;
mod sign_in;
mod snapshot;

use crate::{
    home::Home,
    output::{self, Output},
};
use anyhow::Context as _;
use camino::Utf8PathBuf;
use progress::Bars;
use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};
use vestibule_api::{
    ids::{AliasName, ImageDigest},
    image::ImageView,
    machine::DriverChoice,
};
use vestibule_image::{BootOptions, BuildOptions, KEEP_UNPUBLISHED, Store, Verification};

/// Seconds until a VM must be ready: a browser under emulation takes one or two minutes.
const DEADLINE_S: u64 = 600;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum ImageCommand {
    /// Build an image from a recipe; prints its digest.
    Build {
        /// The recipe's directory: `images/browser`.
        recipe: Utf8PathBuf,
        /// The static agent binary, as `cargo xtask agent` makes it.
        #[arg(
            long,
            default_value = "target/agent/vestibule-agent",
            value_name = "FILE"
        )]
        agent: Utf8PathBuf,
        /// A file that the recipe asks for by name.
        #[arg(long = "input", value_name = "NAME=FILE", value_parser = parse_input)]
        inputs: Vec<(String, Utf8PathBuf)>,
        /// Ask the package mirror again instead of using cached layers.
        #[arg(long)]
        refresh: bool,
    },
    /// List images.
    List,
    /// Show an image's manifest, how it was built and how it was verified.
    Inspect { image: String },
    /// What changed from one image to another: packages, tools, units, files.
    Diff { from: String, to: String },
    /// Read an image as the diagnosis reads any disk, and say what could not start.
    Lint { image: String },
    /// Boot an image and demand what its manifest promises.
    Verify {
        image: String,
        /// Seconds until it must be ready.
        #[arg(long, default_value_t = DEADLINE_S)]
        deadline: u64,
        /// What runs its VM: `auto`, `qemu` or `firecracker`.
        #[arg(long, default_value = "auto")]
        driver: DriverChoice,
        #[command(flatten)]
        sign_in: SignInArgs,
    },
    /// Point an alias to an image, once one boot has verified it and has given it a snapshot for VMs of the default size;
    /// what the image has already is not made again.
    Publish {
        alias: AliasName,
        image: String,
        /// Take none.
        #[arg(long)]
        no_snapshot: bool,
        #[command(flatten)]
        sign_in: SignInArgs,
    },
    /// Point an alias back to the image before.
    Rollback { alias: AliasName },
    /// What an alias has pointed to.
    History { alias: AliasName },
    /// Boot an image, save the memory of the VM when it is ready, and keep it for others to begin from; prints its id.
    Snapshot(snapshot::SnapshotArgs),
    /// List snapshots.
    Snapshots,
    /// Remove a snapshot that no VM uses.
    RmSnapshot { id: String },
    /// Remove an image that no alias and no VM uses, and its snapshots.
    Rm { image: String },
    /// Remove images that no alias points to or would be rolled back to, and that no VM uses; snapshots of images that are
    /// gone, and those that a newer one replaces; and layers and packages of the cache that no build used for 30 days.
    Gc {
        /// Also images that were built less than a day ago.
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct SignInArgs {
    /// Sign in, too, with every pack that the image claims, under this configuration of a controller: it leads the packs to
    /// a test identity provider that grants by itself (`vestibule-testkit vendor --config FILE` runs one and writes it).
    #[arg(long = "sign-in", value_name = "FILE")]
    config: Option<Utf8PathBuf>,
}

fn parse_input(text: &str) -> Result<(String, Utf8PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=FILE")?;
    Ok((name.to_owned(), path.into()))
}

pub(crate) fn run(home: &Home, command: ImageCommand, out: Output) -> anyhow::Result<ExitCode> {
    let store = Store::open(home.path())?;
    match command {
        ImageCommand::Build {
            recipe,
            agent,
            inputs,
            refresh,
        } => {
            let options = BuildOptions {
                recipe,
                agent,
                inputs: inputs.into_iter().collect(),
                refresh,
            };
            let began = SystemTime::now();
            match vestibule_image::build(&store, &options, &Bars::new(out)) {
                Ok(built) => out.print(&built, |built| built.digest.to_string())?,
                Err(err) => {
                    let finding = vestibule_image::failed(&store, &options, &err, began);
                    return crate::diagnose::print_failure(&finding, &err.into(), out);
                }
            }
        }
        ImageCommand::List => out.print(&store.list()?, |images| list(images))?,
        ImageCommand::Inspect { image } => {
            let image = store.inspect(&store.resolve(&image)?)?;
            output::line(&serde_json::to_string_pretty(&image)?);
        }
        ImageCommand::Diff { from, to } => {
            let manifest = |name: &str| store.manifest(&store.resolve(name)?);
            let difference = vestibule_image::diff(&manifest(&from)?, &manifest(&to)?);
            out.print(&difference, ToString::to_string)?;
        }
        ImageCommand::Lint { image } => {
            return crate::diagnose::print(
                &vestibule_image::lint(&store, &store.resolve(&image)?)?,
                out,
            );
        }
        ImageCommand::Verify {
            image,
            deadline,
            driver,
            sign_in,
        } => {
            let options = boot_options(deadline, driver)?;
            let mut report = verify(&store, &store.resolve(&image)?, &options, out)?;
            sign_ins(&store, &mut report, &sign_in, out)?;
            out.print(&report, ToString::to_string)?;
            return Ok(if report.green {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        ImageCommand::Publish {
            alias,
            image,
            no_snapshot,
            sign_in,
        } => {
            let digest = store.resolve(&image)?;
            return publish(&store, &digest, &alias, !no_snapshot, &sign_in, out);
        }
        ImageCommand::Rollback { alias } => {
            let digest = store.rollback(&alias)?;
            output::note(&format!("{alias} is {} again", digest.short()));
        }
        ImageCommand::History { alias } => {
            let history = store.history(&alias)?;
            out.print(&history, |history| {
                history
                    .iter()
                    .map(|entry| format!("{}  {}", entry.at, entry.digest))
                    .collect::<Vec<_>>()
                    .join("\n")
            })?;
        }
        ImageCommand::Snapshot(args) => snapshot::take(&store, &args, out)?,
        ImageCommand::Snapshots => out.print(&store.snapshots()?, |all| snapshot::list(all))?,
        ImageCommand::RmSnapshot { id } => {
            let id = store.resolve_snapshot(&id)?;
            let bytes = store.rm_snapshot(&id)?;
            output::note(&format!("removed {}, {}", id.short(), output::bytes(bytes)));
        }
        ImageCommand::Rm { image } => {
            let digest = store.resolve(&image)?;
            let removed = store.rm(&digest)?;
            output::note(&format!(
                "removed {} and {} snapshots of it, {}",
                digest.short(),
                removed.snapshots.len(),
                output::bytes(removed.freed_bytes)
            ));
        }
        ImageCommand::Gc { all } => {
            let gone = store.gc(if all {
                Duration::ZERO
            } else {
                KEEP_UNPUBLISHED
            })?;
            out.print(&gone, ToString::to_string)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(
    store: &Store,
    digest: &ImageDigest,
    options: &BootOptions,
    out: Output,
) -> anyhow::Result<Verification> {
    let bars = Bars::new(out);
    let verify = vestibule_image::verify(store, digest, options, &bars);
    Ok(crate::runtime()?.block_on(verify)?)
}

/// Adds the sign-ins that are asked for to the report of an image that is green so far, unless it has them.
fn sign_ins(
    store: &Store,
    report: &mut Verification,
    args: &SignInArgs,
    out: Output,
) -> anyhow::Result<()> {
    let Some(config) = args
        .config
        .as_deref()
        .filter(|_| report.green && report.sign_ins.is_empty())
    else {
        return Ok(());
    };
    let bars = Bars::new(out);
    let ended = crate::runtime()?.block_on(sign_in::all(store, &report.digest, config, &bars))?;
    report.add_sign_ins(ended);
    Ok(store.attach(report)?)
}

/// Moves the alias when the image is verified, whether or not its VMs have a snapshot to begin from; a missing one is an
/// error all the same.
fn publish(
    store: &Store,
    digest: &ImageDigest,
    alias: &AliasName,
    with_snapshot: bool,
    sign_in: &SignInArgs,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let verified = || anyhow::Ok(store.inspect(digest)?.verification);
    let taken = match (verified()?, with_snapshot) {
        (Some(report), _) if !report.green => Ok(()), // the store says why it does not move the alias
        (_, true) => snapshot::where_none(store, digest, out),
        (None, false) => boot_options(DEADLINE_S, DriverChoice::Auto)
            .and_then(|options| verify(store, digest, &options, out))
            .map(drop),
        (Some(_), false) => Ok(()),
    };
    let taken = match taken {
        Err(err) if verified()?.is_none_or(|report| !report.green) => return Err(err),
        taken => taken,
    };
    if let Some(mut report) = verified()? {
        sign_ins(store, &mut report, sign_in, out)?;
        for line in report.sign_ins.iter().map(ToString::to_string) {
            output::note(&line);
        }
    }
    store.publish(digest, alias)?;
    output::note(&format!("{alias} is {} now", digest.short()));
    taken.with_context(|| {
        format!(
            "{alias} has no snapshot: its VMs boot; `vestibule image snapshot {alias}` tries again"
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Boots go through this program's own role `run-vm`.
fn boot_options(deadline_s: u64, driver: DriverChoice) -> anyhow::Result<BootOptions> {
    Ok(BootOptions {
        runner: Utf8PathBuf::try_from(std::env::current_exe()?)
            .context("the path of this program is UTF-8")?,
        deadline: Duration::from_secs(deadline_s),
        driver: vestibule_vm::doctor::resolve(driver),
    })
}

fn list(images: &[ImageView]) -> String {
    let row = |image: &ImageView| {
        let aliases: Vec<&str> = image.aliases.iter().map(AliasName::as_str).collect();
        vec![
            image.digest.short().to_owned(),
            image.recipe.clone(),
            aliases.join(", "),
            if image.verified { "yes" } else { "no" }.to_owned(),
            output::bytes(image.disk_bytes),
            image.built_at.to_string(),
        ]
    };
    output::table(
        &["DIGEST", "RECIPE", "ALIASES", "VERIFIED", "SIZE", "BUILT"],
        &images.iter().map(row).collect::<Vec<_>>(),
    )
}
