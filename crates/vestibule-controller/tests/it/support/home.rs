//! A home directory with an image, and controllers that come and go on it.
use super::{
    api::Api,
    runner::{Runner, Runners},
    wait_for,
};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::{sync::Arc, time::Duration};
use tokio::{sync::oneshot, task::JoinHandle};
use vestibule_api::ids::MachineId;
use vestibule_controller::{Config, ServeError, Serving, serve_with};

/// One controller that serves.
pub(crate) struct Controller {
    pub(crate) api: Api,
    pub(crate) serving: Serving,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Controller {
    /// As SIGTERM does.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        tokio::time::timeout(Duration::from_secs(20), &mut self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    /// As SIGKILL does, as far as one process can show it: every task ends at its next await.
    pub(crate) async fn kill(self) {
        self.task.abort();
        drop(self.task.await);
    }
}

/// A home directory, and the runners started from it.
pub(crate) struct Home {
    dir: Utf8TempDir,
    pub(crate) runners: Arc<Runners>,
    config: String,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self::with("")
    }

    /// With further configuration.
    pub(crate) fn with(config: &str) -> Self {
        let dir = camino_tempfile::tempdir().unwrap();
        let home = Self {
            dir,
            runners: Arc::default(),
            config: config.to_owned(),
        };
        home.make_image();
        home
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        self.dir.path()
    }

    /// An image as the store holds one, without anything that boots.
    fn make_image(&self) {
        let tool = |id: &str| json!({ "provider": id, "package": id, "version": "1", "path": format!("/usr/bin/{id}") });
        let tools = ["codex", "gh", "wrangler", "gemini"].map(tool);
        let manifest = json!({
            "schema": 1, "recipe": "browser", "recipeDigest": "0".repeat(64), "artifacts": {}, "kernelRelease": "6.1",
            "cmdline": "quiet", "drivers": [], "minMemoryMib": 512, "defaultMemoryMib": 2048, "defaultVcpus": 2,
            "requiredUnits": [], "features": ["agent", "browser"], "agentBuild": "0".repeat(64), "packages": [],
            "tools": tools, "files": {},
        });
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let digest: String = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let dir = self.path().join("images").join(&digest);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::create_dir_all(self.path().join("aliases")).unwrap();
        std::fs::write(dir.join("manifest.json"), bytes).unwrap();
        self.point_alias(&digest);
    }

    pub(crate) fn point_alias(&self, digest: &str) {
        let alias = self.path().join("aliases/browser");
        drop(std::fs::remove_file(&alias));
        std::os::unix::fs::symlink(format!("../images/{digest}"), alias).unwrap();
    }

    pub(crate) fn remove_alias(&self) {
        std::fs::remove_file(self.path().join("aliases/browser")).unwrap();
    }

    /// A controller on this home.
    pub(crate) async fn serve(&self) -> Controller {
        let config = self.path().join("test.toml");
        std::fs::write(&config, format!("listen = '127.0.0.1:0'\n{}", self.config)).unwrap();
        let config = Config::load(Some(&config), self.path()).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, serving) = oneshot::channel();
        let runners = Arc::clone(&self.runners);
        let task = tokio::spawn(async move {
            let shutdown = async move { drop(stopped.await) };
            serve_with(config, runners, shutdown, |serving| {
                drop(ready.send(serving));
            })
            .await
        });
        let Ok(serving) = serving.await else {
            panic!("the controller does not serve: {:?}", task.await);
        };
        let token = std::fs::read_to_string(self.path().join("token")).unwrap();
        let api = Api::new(serving.address, token.trim());
        Controller {
            api,
            serving,
            stop: Some(stop),
            task,
        }
    }

    /// The runner of a VM, once it is started.
    pub(crate) async fn runner(&self, id: MachineId) -> Arc<Runner> {
        wait_for("the runner", || async { self.runners.get(id) }).await
    }

    /// What is left of VMs: directories, sockets, living runners.
    pub(crate) fn residue(&self) -> Vec<Utf8PathBuf> {
        let entries = self.path().join("vms").read_dir_utf8().unwrap();
        let mut left: Vec<_> = entries
            .map(|entry| entry.unwrap().path().to_owned())
            .collect();
        left.extend((0..self.runners.count_alive()).map(|_| Utf8PathBuf::from("a living runner")));
        left
    }

    pub(crate) fn evidence(&self, id: MachineId) -> Utf8PathBuf {
        self.path().join("evidence").join(id.to_string())
    }
}
