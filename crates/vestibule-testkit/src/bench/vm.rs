//! One VM without a controller, as `vestibule vm run` starts it, and what its evidence says afterwards.
use crate::stage;
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use tokio::process::Command;
use vestibule_api::machine::{MachineView, RunnerEvent};

/// A VM that is ready.
#[derive(Debug)]
pub struct Vm {
    pub view: MachineView,
}

impl Vm {
    /// Whether the store that the tests use has an image with this alias.
    pub fn is_built(image: &str) -> bool {
        stage::image_home().join("aliases").join(image).exists()
    }

    /// Boots the image and returns when the VM is ready.
    ///
    /// # Errors
    /// When it does not become ready; with what `vestibule vm run` said.
    pub async fn start(image: &str) -> Result<Self> {
        let said = vestibule(
            &stage::image_home(),
            &["--json", "vm", "run", image, "--deadline", "600"],
        )
        .await?;
        let view = serde_json::from_slice(&said).context("understand the VM's view")?;
        Ok(Self { view })
    }

    /// Ends the VM and gives its runner's events, which are part of the evidence.
    ///
    /// # Errors
    /// When it does not end, or left no evidence.
    pub async fn stop(self) -> Result<Vec<RunnerEvent>> {
        let id = self.view.machine_id.to_string();
        vestibule(&stage::image_home(), &["vm", "stop", &id]).await?;
        let path: Utf8PathBuf = stage::image_home()
            .join("evidence")
            .join(&id)
            .join("events.ndjson");
        let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("understand `{path}`")))
            .collect()
    }
}

/// Runs `vestibule` with these words on `home` and gives its standard output.
///
/// # Errors
/// When it fails; with what it said.
pub(super) async fn vestibule(home: &Utf8Path, words: &[&str]) -> Result<Vec<u8>> {
    let output = Command::new(stage::binary()?)
        .args(["--home", home.as_str()])
        .args(words)
        .kill_on_drop(true)
        .output()
        .await
        .context("start vestibule")?;
    ensure!(
        output.status.success(),
        "`vestibule {}`: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}
