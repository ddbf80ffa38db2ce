//! `vestibule image`: golden images, in the store below `$VESTIBULE_HOME`.
mod progress;

use crate::{
    home::Home,
    output::{self, Output},
};
use anyhow::Context as _;
use camino::Utf8PathBuf;
use progress::Bars;
use std::{process::ExitCode, time::Duration};
use vestibule_api::{ids::AliasName, image::ImageView};
use vestibule_image::{BuildOptions, Store, VerifyOptions};

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
    /// Read an image as the diagnosis reads any disk, and say what could not start.
    Lint { image: String },
    /// Boot an image and demand what its manifest promises.
    Verify {
        image: String,
        /// Seconds until it must be ready.
        #[arg(long, default_value_t = 600)]
        deadline: u64,
    },
    /// Point an alias to a verified image.
    Publish { alias: AliasName, image: String },
    /// Point an alias back to the image before.
    Rollback { alias: AliasName },
    /// What an alias has pointed to.
    History { alias: AliasName },
    /// Remove an image that no alias and no VM uses.
    Rm { image: String },
    /// Remove images that no alias points to or would be rolled back to, and that no VM uses; and layers and packages of
    /// the cache that no build used for 30 days.
    Gc {
        /// Also images that were built less than a day ago.
        #[arg(long)]
        all: bool,
    },
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
            let bars = Bars::new(out);
            let built = vestibule_image::build(&store, &options, &bars)?;
            bars.finish();
            out.print(&built, |built| built.digest.to_string())?;
        }
        ImageCommand::List => out.print(&store.list()?, |images| list(images))?,
        ImageCommand::Inspect { image } => {
            let image = store.inspect(&store.resolve(&image)?)?;
            output::line(&serde_json::to_string_pretty(&image)?);
        }
        ImageCommand::Lint { image } => {
            return crate::diagnose::print(
                &vestibule_image::lint(&store, &store.resolve(&image)?)?,
                out,
            );
        }
        ImageCommand::Verify { image, deadline } => {
            let runner = Utf8PathBuf::try_from(std::env::current_exe()?)
                .context("the path of this program is UTF-8")?;
            let bars = Bars::new(out);
            let options = VerifyOptions {
                runner,
                deadline: Duration::from_secs(deadline),
            };
            let report = vestibule_image::verify(&store, &store.resolve(&image)?, &options, &bars)?;
            bars.finish();
            out.print(&report, ToString::to_string)?;
            return Ok(if report.green {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            });
        }
        ImageCommand::Publish { alias, image } => {
            let digest = store.resolve(&image)?;
            store.publish(&digest, &alias)?;
            output::note(&format!("{alias} is {} now", digest.short()));
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
        ImageCommand::Rm { image } => {
            let digest = store.resolve(&image)?;
            let removed = store.rm(&digest)?;
            output::note(&format!(
                "removed {} and {} snapshots of it",
                digest.short(),
                removed.snapshots.len()
            ));
        }
        ImageCommand::Gc { all } => {
            let gone = store.gc(all)?;
            out.print(&gone, ToString::to_string)?;
        }
    }
    Ok(ExitCode::SUCCESS)
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
