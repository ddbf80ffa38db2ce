//! Where everything lives: `$VESTIBULE_HOME` and the paths below it that several roles need.
use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};

/// The one option that every role has.
#[derive(Debug, clap::Args)]
pub(crate) struct HomeArgs {
    /// Directory of images, VMs, evidence, database and vault [default: ~/.local/share/vestibule].
    #[arg(long, global = true, env = "VESTIBULE_HOME", value_name = "DIR")]
    home: Option<Utf8PathBuf>,
}

/// The directory, made absolute. Nothing is created yet.
#[derive(Clone, Debug)]
pub(crate) struct Home(Utf8PathBuf);

impl HomeArgs {
    pub(crate) fn resolve(self) -> anyhow::Result<Home> {
        let dir = match self.home {
            Some(dir) => dir,
            None => default_home()?,
        };
        let dir = camino::absolute_utf8(&dir).with_context(|| format!("make `{dir}` absolute"))?;
        Ok(Home(dir))
    }
}

fn default_home() -> anyhow::Result<Utf8PathBuf> {
    let user = std::env::var("HOME").context("neither --home, VESTIBULE_HOME nor HOME is set")?;
    Ok(Utf8PathBuf::from(user).join(".local/share/vestibule"))
}

impl Home {
    /// An absolute directory.
    pub(crate) fn at(dir: &Utf8Path) -> Self {
        Self(dir.to_owned())
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        &self.0
    }

    pub(crate) fn vms(&self) -> Utf8PathBuf {
        self.0.join("vms")
    }

    pub(crate) fn evidence(&self) -> Utf8PathBuf {
        self.0.join("evidence")
    }
}
