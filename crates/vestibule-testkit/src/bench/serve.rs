//! A controller whose VMs are ours: it starts this program where it would start a runner, and the image that it starts
//! them from is a manifest and nothing else. Everything between that and the viewer is the real thing.
use crate::{
    api::Api,
    process::{self, Process},
    runner::store_image,
    stage,
};
use anyhow::{Context, Result};
use camino::Utf8Path;
use camino_tempfile::Utf8TempDir;
use std::time::Duration;
use tokio::process::Command;

/// How long the controller may take until it listens.
const LISTEN: Duration = Duration::from_secs(30);
/// The alias of the image.
const IMAGE: &str = "pour";
const FEATURES: [&str; 6] = [
    "agent",
    "display",
    "browser",
    "terminal",
    "tool:codex",
    "tool:gh",
];

/// A running controller with its home, which is removed with it.
#[derive(Debug)]
pub struct Controller {
    _home: Utf8TempDir,
    process: Process,
    api: Api,
}

impl Controller {
    /// Starts `vestibule serve`, its runner being this program with `words`, with these lines of `[limits]`.
    ///
    /// # Errors
    /// When the program is not built or does not come up; with its log.
    pub async fn start(words: &[&str], limits: &str) -> Result<Self> {
        let home = camino_tempfile::Builder::new()
            .prefix("vb-")
            .tempdir()
            .context("make a home")?;
        store_image(home.path(), IMAGE, &FEATURES).context("make an image")?;
        let own = std::env::current_exe().context("find the path of this program")?;
        let mut runner = vec![own.to_string_lossy().into_owned()];
        runner.extend(words.iter().map(|word| (*word).to_owned()));
        let config = home.path().join("vestibule.toml");
        let text = format!(
            "listen = \"127.0.0.1:0\"\nimage = \"{IMAGE}\"\nrunner = {runner:?}\n[limits]\n{limits}"
        );
        std::fs::write(&config, text).context("write the configuration")?;
        let mut command = Command::new(stage::binary()?);
        command.args([
            "--home",
            home.path().as_str(),
            "serve",
            "--config",
            config.as_str(),
        ]);
        // As an operator runs it: what is logged for developers costs time.
        command.env_remove("RUST_LOG");
        let log = home.path().join("serve.log");
        let process = Process::start("vestibule serve", command, &log)?;
        match listening(home.path()).await {
            Ok(api) => Ok(Self {
                _home: home,
                process,
                api,
            }),
            Err(err) => {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                Err(err.context(format!("vestibule serve said: {said}")))
            }
        }
    }

    /// Its API, with the operator's token.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Its process id.
    ///
    /// # Errors
    /// When it has ended.
    pub fn pid(&self) -> Result<u32> {
        self.process.pid().context("the controller has ended")
    }

    /// Ends the controller.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn end(self) -> Result<()> {
        self.process.end().await.map(drop)
    }
}

async fn listening(home: &Utf8Path) -> Result<Api> {
    let address = process::content(&home.join("address"), LISTEN).await?;
    let token = process::content(&home.join("token"), LISTEN).await?;
    let address = address
        .parse()
        .with_context(|| format!("understand the address `{address}`"))?;
    Api::new(address, &token)
}
