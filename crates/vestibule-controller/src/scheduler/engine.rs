//! Runners as jobs of a workload scheduler: it gives them their place, their limits and their end, and they outlive the
//! controller's own job. Home directories are the nodes' own, at the same path for controller and runners.
//!
//! A VM's specification lies in its directory (`spec.json`, 0600, no secret in it), and `run-vm --spec` takes the lock that a
//! local runner inherits: whoever asks whether it lives looks at the lock first, and asks the engine only where nobody has it.
use super::{HostMemory, LaunchError, Local, Scheduler, private_dir};
use crate::{
    config::{EngineKind, SchedulerConfig},
    outbound::{self, ClientError, ReplyError},
};
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::future::BoxFuture;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    time::Duration,
};
use tokio::runtime::Handle;
use vestibule_api::{error::Chain, ids::MachineId, machine::VmSpec};

/// An API that answers later than this does not answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// What runner and VMM need besides the guest's memory.
const OVERHEAD_MIB: u32 = 256;
/// The environment variable with this node's name.
const NODE: &str = "VESTIBULE_NODE";

/// Why an engine can't be used, or did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("read `{path}`")]
    File {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("understand `{path}`")]
    Json {
        path: Utf8PathBuf,
        #[source]
        err: serde_json::Error,
    },
    #[error("use the template of runners: it has no `{0}`")]
    Template(&'static str),
    #[error("find this node's name: set `scheduler.node`, or `{NODE}` in the environment")]
    Node,
    #[error("find the API: set `scheduler.address`")]
    Address,
    #[error("set up the client of the API")]
    Client(#[from] ClientError),
    #[error("{what}: no answer from the API")]
    Http {
        what: &'static str,
        #[source]
        err: ReplyError,
    },
    #[error("{what}: the API answered {status}: {text}")]
    Refused {
        what: &'static str,
        status: u16,
        text: String,
    },
}

/// What an engine knows of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// It waits for its place, or runs.
    Live,
    /// It ended, or never began; in the engine's words.
    Over(String),
    Absent,
}

/// A runner as an engine is asked for it.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) id: MachineId,
    /// For `run-vm --spec`.
    pub(super) spec: &'a Utf8Path,
    pub(super) memory_mib: u32,
}

/// A workload scheduler.
pub(super) trait Engine: std::fmt::Debug + Send + Sync {
    /// Makes the job, once: where there is one of its id already, nothing happens.
    fn submit<'a>(&'a self, job: &'a Job<'a>) -> BoxFuture<'a, Result<(), EngineError>>;

    fn status(&self, id: MachineId) -> BoxFuture<'_, Result<Status, EngineError>>;

    /// Ends the job and forgets it. Nothing happens where there is none.
    fn remove(&self, id: MachineId) -> BoxFuture<'_, Result<(), EngineError>>;
}

/// Runners as jobs of an engine, on this node.
#[derive(Debug)]
pub(super) struct Engined {
    /// Where runners lock, and whose memory is looked at.
    local: Local,
    engine: Box<dyn Engine>,
    runtime: Handle,
}

impl Engined {
    pub(super) fn new(home: Utf8PathBuf, engine: Box<dyn Engine>, runtime: Handle) -> Self {
        let local = Local::new(home, Vec::new());
        Self {
            local,
            engine,
            runtime,
        }
    }

    /// Keeps what the engine says of a runner that never came to write anything: it becomes evidence.
    fn note(&self, id: MachineId, words: &str) {
        let written = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(self.local.stderr(id))
            .and_then(|mut file| writeln!(file, "{words}"));
        // One that ran has written there itself.
        if written.is_ok() {
            tracing::warn!(machine.id = %id, words, "the runner's job ended before it ran");
        }
    }
}

impl Scheduler for Engined {
    fn launch(&self, spec: &VmSpec) -> Result<(), LaunchError> {
        for dir in [&spec.vm_dir, &spec.evidence_dir] {
            private_dir(Utf8Path::new(dir))?;
        }
        if self.local.alive(spec.machine_id) {
            return Ok(());
        }
        let path = Utf8Path::new(&spec.vm_dir).join("spec.json");
        let failed = |err| LaunchError::File {
            operation: "write",
            path: path.clone(),
            err,
        };
        let text = serde_json::to_vec(spec).map_err(|err| failed(err.into()))?;
        let staged = path.with_extension("new");
        OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&staged)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| std::fs::rename(&staged, &path))
            .map_err(failed)?;
        let job = Job {
            id: spec.machine_id,
            spec: &path,
            memory_mib: spec.memory_mib.saturating_add(OVERHEAD_MIB),
        };
        let submitted = self.runtime.block_on(self.engine.submit(&job));
        submitted.map_err(|err| LaunchError::Engine(Box::new(err)))
    }

    fn alive(&self, id: MachineId) -> bool {
        if self.local.alive(id) {
            return true;
        }
        match self.runtime.block_on(self.engine.status(id)) {
            Ok(Status::Live) => true,
            Ok(Status::Absent) => false,
            Ok(Status::Over(words)) => {
                self.note(id, &words);
                false
            }
            Err(err) => {
                // Nobody is declared dead unseen.
                tracing::warn!(machine.id = %id, error = %Chain(&err), "whether the runner lives is not known");
                true
            }
        }
    }

    fn kill(&self, id: MachineId) {
        self.local.kill(id);
        self.forget(id);
    }

    fn forget(&self, id: MachineId) {
        if let Err(err) = self.runtime.block_on(self.engine.remove(id)) {
            tracing::warn!(machine.id = %id, error = %Chain(&err), "the runner's job is not removed");
        }
    }

    fn memory(&self) -> Option<HostMemory> {
        self.local.memory()
    }
}

/// The engine of the configuration; none: runners are processes.
pub(super) fn of(config: &SchedulerConfig) -> Result<Option<Box<dyn Engine>>, EngineError> {
    Ok(match config.engine {
        EngineKind::Local => None,
        EngineKind::Nomad => Some(Box::new(super::nomad::Nomad::new(config)?)),
        EngineKind::Kubernetes => Some(Box::new(super::kubernetes::Kubernetes::new(config)?)),
    })
}

/// A runner's job, by its VM.
pub(super) fn name(id: MachineId) -> String {
    format!("vestibule-vm-{id}")
}

/// This node, as the engine knows it.
pub(super) fn node(config: &SchedulerConfig) -> Result<String, EngineError> {
    let said = config.node.clone();
    said.or_else(|| std::env::var(NODE).ok())
        .filter(|node| !node.is_empty())
        .ok_or(EngineError::Node)
}

pub(super) fn template(config: &SchedulerConfig) -> Result<Value, EngineError> {
    let path = config.template.clone().unwrap_or_default();
    let text = std::fs::read(&path).map_err(|err| EngineError::File {
        path: path.clone(),
        err,
    })?;
    serde_json::from_slice(&text).map_err(|err| EngineError::Json { path, err })
}

/// What stands at `pointer` (RFC 6901) of a template.
pub(super) fn at<'a>(
    template: &'a mut Value,
    pointer: &'static str,
) -> Result<&'a mut Value, EngineError> {
    template
        .pointer_mut(pointer)
        .ok_or(EngineError::Template(pointer))
}

/// The object at `pointer` of a template; made where its parent is there.
pub(super) fn object<'a>(
    template: &'a mut Value,
    parent: &'static str,
    name: &'static str,
) -> Result<&'a mut serde_json::Map<String, Value>, EngineError> {
    let parent = at(template, parent)?.as_object_mut();
    let parent = parent.ok_or(EngineError::Template(name))?;
    let value = parent
        .entry(name)
        .or_insert_with(|| Value::Object(serde_json::Map::new()));
    if value.is_null() {
        *value = Value::Object(serde_json::Map::new());
    }
    value.as_object_mut().ok_or(EngineError::Template(name))
}

/// A client of an engine's API.
#[derive(Debug)]
pub(super) struct Api {
    http: reqwest::Client,
    base: String,
    token: Option<Utf8PathBuf>,
    /// The header that shows the token, and what stands before it there.
    header: (&'static str, &'static str),
}

impl Api {
    pub(super) fn new(
        base: &str,
        token: Option<Utf8PathBuf>,
        ca: Option<&Utf8Path>,
        header: (&'static str, &'static str),
    ) -> Result<Self, EngineError> {
        let http = reqwest::Client::builder().timeout(PATIENCE);
        Ok(Self {
            http: outbound::client(http, ca)?,
            base: base.trim_end_matches('/').to_owned(),
            token,
            header,
        })
    }

    /// One call; none: there is no such thing.
    pub(super) async fn call(
        &self,
        what: &'static str,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Option<Value>, EngineError> {
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(file) = &self.token {
            let token = tokio::fs::read_to_string(file).await;
            let token = token.map_err(|err| EngineError::File {
                path: file.clone(),
                err,
            })?;
            let (name, before) = self.header;
            request = request.header(name, format!("{before}{}", token.trim()));
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let failed = |err| EngineError::Http { what, err };
        let reply = request.send().await.map_err(|err| failed(err.into()))?;
        let (status, body) = outbound::read(reply).await.map_err(failed)?;
        if status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !status.is_success() {
            let text = String::from_utf8_lossy(&body);
            let text = text.chars().filter(|c| !c.is_control()).take(300).collect();
            let status = status.as_u16();
            return Err(EngineError::Refused { what, status, text });
        }
        Ok(Some(serde_json::from_slice(&body).unwrap_or(Value::Null)))
    }
}

#[cfg(test)]
mod tests;
