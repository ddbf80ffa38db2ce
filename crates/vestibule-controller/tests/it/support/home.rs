//! A home directory with an image, and controllers that come and go on it.
use super::{api::Api, runner::Runner, runners::Runners, wait_for};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use sqlx::{Connection as _, Executor as _};
use std::{sync::Arc, time::Duration};
use tokio::{sync::oneshot, task::JoinHandle};
use vestibule_api::{
    error::Chain,
    ids::{ImageDigest, MachineId, SnapshotId},
    snapshot::{
        Binding, MANIFEST_FILE, MEMORY_FILE, SNAPSHOT_SCHEMA, STATE_FILE, SavedFile,
        SnapshotManifest,
    },
    time::Timestamp,
};
use vestibule_controller::{Config, ServeError, Serving, serve_with};
use vestibule_testkit::postgres;

/// One controller that serves.
pub(crate) struct Controller {
    pub(crate) api: Api,
    pub(crate) serving: Serving,
    stop: Option<oneshot::Sender<()>>,
    task: Task,
}

type Task = JoinHandle<Result<(), ServeError>>;

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
    /// The configuration's `database`: SQLite, or PostgreSQL where `VESTIBULE_TEST_DATABASE=postgres` asks for it.
    pub(crate) database: String,
    config: String,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self::with("")
    }

    /// With further configuration.
    pub(crate) fn with(config: &str) -> Self {
        let database = match std::env::var("VESTIBULE_TEST_DATABASE").as_deref() {
            Ok("postgres") => postgres::cluster().database(),
            Ok("sqlite") | Err(_) => "sqlite".to_owned(),
            Ok(other) => panic!("VESTIBULE_TEST_DATABASE={other}: neither sqlite nor postgres"),
        };
        Self::on(&database, config)
    }

    /// On this database, whatever the others run on.
    pub(crate) fn on(database: &str, config: &str) -> Self {
        let dir = camino_tempfile::tempdir().unwrap();
        let home = Self {
            dir,
            runners: Arc::default(),
            database: database.to_owned(),
            config: config.to_owned(),
        };
        home.publish("6.1");
        home
    }

    /// The same home under another configuration, from the next controller on.
    pub(crate) fn configure(&mut self, config: &str) {
        config.clone_into(&mut self.config);
    }

    /// The same with a part of it replaced.
    pub(crate) fn reconfigure(&mut self, part: &str, by: &str) {
        assert!(self.config.contains(part), "{}", self.config);
        self.config = self.config.replace(part, by);
    }

    /// Whether these bytes are anywhere in the database.
    pub(crate) fn stores(&self, bytes: &[u8]) -> bool {
        let stored = if self.database == "sqlite" {
            let read = |name| std::fs::read(self.path().join(name)).unwrap_or_default();
            ["vestibule.db", "vestibule.db-wal"].map(read).concat()
        } else {
            postgres::cluster().dump(&self.database)
        };
        assert!(!stored.is_empty());
        stored.windows(bytes.len()).any(|window| window == bytes)
    }

    /// Changes rows behind the controller's back.
    pub(crate) async fn sql(&self, sql: &'static str) {
        sqlx::any::install_default_drivers();
        let url = if self.database == "sqlite" {
            format!("sqlite://{}", self.path().join("vestibule.db"))
        } else {
            self.database.clone()
        };
        let mut rows = sqlx::AnyConnection::connect(&url).await.unwrap();
        rows.execute(sql).await.unwrap();
        rows.close().await.unwrap();
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        self.dir.path()
    }

    /// Publishes an image as the store holds one, without anything that boots.
    pub(crate) fn publish(&self, kernel: &str) -> ImageDigest {
        let tool = |id: &str| json!({ "provider": id, "package": id, "version": "1", "path": format!("/usr/bin/{id}") });
        let tools = ["codex", "gh", "wrangler", "gemini"].map(tool);
        let manifest = json!({
            "schema": 1, "recipe": "browser", "recipeDigest": "0".repeat(64), "artifacts": {}, "kernelRelease": kernel,
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
        let build =
            json!({ "builtAt": Timestamp::now(), "tookMs": 1, "program": "0.1.0", "phases": [] });
        std::fs::write(dir.join("build.json"), build.to_string()).unwrap();
        self.point_alias(&digest);
        digest.parse().unwrap()
    }

    /// A snapshot of an image as the store holds one, without anything in it.
    pub(crate) fn snapshot(&self, image: &ImageDigest) -> SnapshotId {
        let file = SavedFile {
            bytes: 1,
            allocated_bytes: 1,
            sha256: "c".repeat(64),
        };
        let manifest = SnapshotManifest {
            schema: SNAPSHOT_SCHEMA,
            binding: Binding {
                image_digest: image.clone(),
                agent_build: "0".repeat(64),
                driver: "qemu/tcg".to_owned(),
                vmm_version: "7.2".to_owned(),
                machine: "pc-q35-7.2".to_owned(),
                cpu: "max".to_owned(),
                cpu_features: Vec::new(),
                memory_mib: 2048,
                vcpus: 2,
                runner: "0".to_owned(),
                arguments: "d".repeat(64),
                cmdline: "quiet".to_owned(),
                tsc_khz: 1,
            },
            taken_at: Timestamp::now(),
            memory: file.clone(),
            state: file,
        };
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let id: String = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let dir = self.path().join("snapshots").join(&id);
        std::fs::create_dir_all(&dir).unwrap();
        for (name, content) in [
            (MEMORY_FILE, &b"m"[..]),
            (STATE_FILE, b"s"),
            (MANIFEST_FILE, &bytes),
        ] {
            std::fs::write(dir.join(name), content).unwrap();
        }
        id.parse().unwrap()
    }

    pub(crate) fn remove_snapshot(&self, id: &SnapshotId) {
        // Out of sight first, as the store does.
        let snapshots = self.path().join("snapshots");
        let gone = snapshots.join(".gone");
        std::fs::rename(snapshots.join(id.as_str()), &gone).unwrap();
        std::fs::remove_dir_all(gone).unwrap();
    }

    /// In one rename, as the store does: a controller that looks meanwhile sees one image or the other.
    pub(crate) fn point_alias(&self, digest: &str) {
        let aliases = self.path().join("aliases");
        let new = aliases.join(".browser");
        std::os::unix::fs::symlink(format!("../images/{digest}"), &new).unwrap();
        std::fs::rename(new, aliases.join("browser")).unwrap();
    }

    pub(crate) fn remove_alias(&self) {
        std::fs::remove_file(self.path().join("aliases/browser")).unwrap();
    }

    /// A controller on this home.
    pub(crate) async fn serve(&self) -> Controller {
        let (stop, serving, task) = self.begin();
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

    /// Why a controller on this home does not serve.
    pub(crate) async fn refused(&self) -> String {
        let (_stop, _serving, task) = self.begin();
        let ended = tokio::time::timeout(super::PATIENCE, task).await;
        let err = ended.expect("it serves").unwrap().unwrap_err();
        Chain(&err).to_string()
    }

    /// The configuration that its controllers run with.
    pub(crate) fn config(&self) -> Config {
        let path = self.path().join("test.toml");
        let text = format!(
            "listen = '127.0.0.1:0'
database = '{}'
{}",
            self.database, self.config
        );
        std::fs::write(&path, text).unwrap();
        Config::load(Some(&path), self.path()).unwrap()
    }

    fn begin(&self) -> (oneshot::Sender<()>, oneshot::Receiver<Serving>, Task) {
        let config = self.config();
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
        (stop, serving, task)
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
