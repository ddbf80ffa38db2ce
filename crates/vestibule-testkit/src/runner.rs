//! A runner without a VM, as a process: it speaks the runner's API on its socket, its guest comes up, its person signs in by
//! themselves. For what is about controller and host alone; what it hands over is [`secret`].
//!
//! `runner = [".../vestibule-testkit", "runner"]` in a controller's configuration starts these; thousands are a [`crowd`].
pub mod crowd;

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::Utf8Path;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, HashMap},
    future::IntoFuture as _,
    io::Read as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use vestibule_api::{
    agent::{
        AgentEvent, CapturedCredential, CapturedFile, CredentialReply, CredentialRequest,
        LoginEvent, LoginRequest,
    },
    ids::{ImageDigest, MachineId, SessionId},
    image::Manifest,
    machine::{
        Claim, Disposal, DisposedItem, Disposer, Exit, MachineState, Phase, RunnerEvent,
        RunnerEventKind, StopRequest, VmSpec,
    },
    snapshot::{
        Binding, MANIFEST_FILE, MEMORY_FILE, SNAPSHOT_SCHEMA, STATE_FILE, SavedFile,
        SnapshotManifest,
    },
    time::Timestamp,
};

/// The reply that it has stopped goes out within this.
const LAST_REPLY: Duration = Duration::from_secs(1);

/// How long its parts take.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// From the start to *up*.
    pub boot: Duration,
    /// From the tool's start to a complete credential; none: the person never signs in.
    pub sign_in: Option<Duration>,
    /// Until the agent hands the credential over.
    pub hand_over: Duration,
}

/// What the tool of this VM writes.
pub fn secret(machine: MachineId) -> String {
    format!("sk-of-{machine}")
}

/// Puts an image of which nothing boots into the store in `home`, under this alias: what sessions with these runners are of.
///
/// # Errors
/// When it can't be written.
pub fn store_image(home: &Utf8Path, alias: &str, features: &[&str]) -> Result<ImageDigest> {
    let manifest = Manifest {
        schema: 1,
        recipe: alias.to_owned(),
        recipe_digest: "0".repeat(64),
        artifacts: BTreeMap::new(),
        kernel_release: String::new(),
        cmdline: String::new(),
        drivers: Vec::new(),
        min_memory_mib: 1,
        default_memory_mib: 1,
        default_vcpus: 1,
        required_units: Vec::new(),
        features: features.iter().map(|name| (*name).to_owned()).collect(),
        agent_build: "0".repeat(64),
        packages: Vec::new(),
        tools: Vec::new(),
        files: BTreeMap::<String, String>::new(),
    };
    let bytes = serde_json::to_vec(&manifest)?;
    let digest = digest_of(&bytes);
    let dir = home.join("images").join(&digest);
    std::fs::create_dir_all(&dir)?;
    for name in ["aliases", "snapshots"] {
        std::fs::create_dir_all(home.join(name))?;
    }
    std::fs::write(dir.join("manifest.json"), bytes)?;
    let build = json!({
        "builtAt": Timestamp::now(), "tookMs": 0, "program": "vestibule-testkit", "phases": [],
    });
    std::fs::write(dir.join("build.json"), build.to_string())?;
    let alias = home.join("aliases").join(alias);
    std::os::unix::fs::symlink(format!("../images/{digest}"), alias)?;
    Ok(digest.parse()?)
}

/// Puts a snapshot of such an image beside it, of which nothing can be restored: a pool is kept where there is one.
///
/// # Errors
/// When it can't be written.
pub fn store_snapshot(home: &Utf8Path, image: &ImageDigest) -> Result<()> {
    let file = SavedFile {
        bytes: 1,
        allocated_bytes: 1,
        sha256: "0".repeat(64),
    };
    let manifest = SnapshotManifest {
        schema: SNAPSHOT_SCHEMA,
        binding: Binding {
            image_digest: image.clone(),
            agent_build: "0".repeat(64),
            driver: "qemu/tcg".to_owned(),
            vmm_version: String::new(),
            machine: String::new(),
            cpu: String::new(),
            cpu_features: Vec::new(),
            memory_mib: 1,
            vcpus: 1,
            runner: String::new(),
            arguments: "0".repeat(64),
            cmdline: String::new(),
            tsc_khz: 1,
        },
        taken_at: Timestamp::now(),
        memory: file.clone(),
        state: file,
    };
    let manifest = serde_json::to_vec(&manifest)?;
    let dir = home.join("snapshots").join(digest_of(&manifest));
    std::fs::create_dir_all(&dir)?;
    for (name, content) in [
        (MEMORY_FILE, &b"m"[..]),
        (STATE_FILE, b"s"),
        (MANIFEST_FILE, &manifest),
    ] {
        std::fs::write(dir.join(name), content)?;
    }
    Ok(())
}

fn digest_of(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Debug)]
struct Runner {
    spec: VmSpec,
    pace: Pace,
    events: watch::Sender<Vec<RunnerEvent>>,
    now: Mutex<Now>,
    over: watch::Sender<bool>,
}

#[derive(Debug)]
struct Now {
    state: MachineState,
    generation: u64,
    owner: Option<SessionId>,
    login: bool,
}

/// Runs one, with the specification on standard input, until it is stopped or gets SIGTERM.
///
/// # Errors
/// When the specification is none, or its socket can't be made.
pub async fn run(pace: Pace) -> Result<()> {
    let mut text = Vec::new();
    std::io::stdin()
        .read_to_end(&mut text)
        .context("read the specification")?;
    let spec: VmSpec = serde_json::from_slice(&text).context("understand the specification")?;
    let (runner, listener) = Runner::new(spec, pace)?;
    let mut term = signal(SignalKind::terminate())?;
    tokio::select! {
        served = runner.serve(listener, |router| router) => served,
        _ = term.recv() => runner.end().map(drop),
    }
}

impl Runner {
    /// One that listens and is not served yet.
    fn new(spec: VmSpec, pace: Pace) -> Result<(Arc<Self>, UnixListener)> {
        std::fs::create_dir_all(&spec.vm_dir)?;
        let listener = UnixListener::bind(format!("{}/runner.sock", spec.vm_dir))
            .context("listen on runner.sock")?;
        let runner = Arc::new(Self {
            now: Mutex::new(Now {
                state: MachineState::Creating,
                generation: 0,
                owner: spec.session_id,
                login: false,
            }),
            spec,
            pace,
            events: watch::channel(Vec::new()).0,
            over: watch::channel(false).0,
        });
        Ok((runner, listener))
    }

    /// Lives until it is stopped, and has said so.
    async fn serve(
        self: &Arc<Self>,
        listener: UnixListener,
        with: impl FnOnce(Router) -> Router,
    ) -> Result<()> {
        self.state(MachineState::Creating);
        let boots = Arc::clone(self);
        tokio::spawn(async move {
            boots.state(MachineState::Booting);
            tokio::time::sleep(boots.pace.boot).await;
            boots.say(RunnerEventKind::Phase {
                phase: Phase::Ready,
            });
            boots.state(MachineState::Up);
        });
        let server = axum::serve(listener, with(router(Arc::clone(self))))
            .with_graceful_shutdown(self.stopped());
        tokio::select! {
            served = server.into_future() => served.context("serve runner.sock"),
            // Whoever keeps a connection open does not keep the runner alive.
            () = async {
                self.stopped().await;
                tokio::time::sleep(LAST_REPLY).await;
            } => Ok(()),
        }
    }

    /// Resolves when it has been stopped.
    fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut over = self.over.subscribe();
        async move {
            // An error means that the runner is gone: that is the end as well.
            drop(over.wait_for(|over| *over).await);
        }
    }

    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, event: RunnerEventKind) {
        self.events.send_modify(|events| {
            let seq = u64::try_from(events.len()).unwrap_or(0) + 1;
            let at = Timestamp::now();
            events.push(RunnerEvent { seq, at, event });
        });
    }

    fn state(&self, state: MachineState) {
        let generation = {
            let mut now = self.now();
            now.state = state;
            now.generation += 1;
            now.generation
        };
        self.say(RunnerEventKind::State { state, generation });
    }

    fn login(&self, event: LoginEvent) {
        self.say(RunnerEventKind::Agent {
            event: AgentEvent::Login { event },
        });
    }

    /// The person has signed in.
    fn captured(&self) {
        self.login(LoginEvent::Captured {
            account: Some("ada@example.org".to_owned()),
            expires_at: None,
        });
    }

    /// As a request to stop does.
    fn stop(&self) -> Result<Disposal> {
        let ended = self.end();
        self.over.send_replace(true);
        ended
    }

    /// Writes the evidence and leaves nothing else.
    fn end(&self) -> Result<Disposal> {
        self.state(MachineState::Stopping);
        let mut lines = String::new();
        for event in self.events.borrow().iter() {
            lines.push_str(&serde_json::to_string(event)?);
            lines.push('\n');
        }
        let evidence = Utf8Path::new(&self.spec.evidence_dir);
        std::fs::write(evidence.join("events.ndjson"), lines)?;
        std::fs::write(evidence.join("serial.log"), "Linux version 6.1\n")?;
        self.state(MachineState::Gone);
        let exit = Exit {
            asked: true,
            ..Exit::default()
        };
        self.say(RunnerEventKind::Ended { exit });
        // As the runner does: whoever is killed in between is followed by somebody who knows what there was.
        self.receipt()?;
        std::fs::remove_dir_all(&self.spec.vm_dir)?;
        self.receipt()
    }

    /// Writes the receipt as things are.
    fn receipt(&self) -> Result<Disposal> {
        let gone = !Utf8Path::new(&self.spec.vm_dir).exists();
        let directory = DisposedItem {
            kind: "directory".to_owned(),
            name: self.spec.vm_dir.clone(),
            gone,
        };
        let disposal = Disposal {
            machine_id: self.spec.machine_id,
            at: Timestamp::now(),
            items: vec![directory],
            complete: gone,
            by: Disposer::Runner,
        };
        let evidence = Utf8Path::new(&self.spec.evidence_dir);
        let partial = evidence.join(".disposal.json.partial");
        std::fs::write(&partial, serde_json::to_vec(&disposal)?)?;
        std::fs::rename(&partial, evidence.join("disposal.json"))?;
        Ok(disposal)
    }

    fn view(&self) -> Value {
        let (spec, now) = (&self.spec, self.now());
        json!({
            "machineId": spec.machine_id, "sessionId": now.owner, "state": now.state, "generation": now.generation,
            "imageDigest": spec.image_digest, "driver": "none", "memoryMib": spec.memory_mib, "vcpus": spec.vcpus,
            "runnerPid": std::process::id(), "startedAt": Timestamp::now(), "viewers": 0,
            "egress": { "connections": 0, "refused": 0, "bytesOut": 0, "bytesIn": 0 },
        })
    }
}

fn router(runner: Arc<Runner>) -> Router {
    Router::new()
        .route(
            "/machine",
            get(async |State(runner): State<Arc<Runner>>| Json(runner.view())),
        )
        .route("/events", get(events))
        .route("/claim", post(claim))
        .route("/pause", post(pause))
        .route("/stop", post(stop))
        .route("/agent/login", post(login))
        .route("/agent/login/credential", post(credential))
        .with_state(runner)
}

async fn events(
    State(runner): State<Arc<Runner>>,
    Query(query): Query<HashMap<String, usize>>,
) -> Response {
    let sent = query.get("after").copied().unwrap_or(0);
    let feed = (runner.events.subscribe(), sent, false);
    Response::new(Body::from_stream(futures_util::stream::unfold(
        feed,
        |(mut events, sent, over)| async move {
            if over {
                return None;
            }
            let new = {
                let seen = events.wait_for(|events| events.len() > sent).await.ok()?;
                seen.get(sent..)?.to_vec()
            };
            let over = matches!(
                new.last().map(|event| &event.event),
                Some(RunnerEventKind::Ended { .. })
            );
            let lines: Result<Vec<String>, _> = new.iter().map(serde_json::to_string).collect();
            let lines = lines.map(|lines| lines.join("\n") + "\n");
            Some((lines, (events, sent + new.len(), over)))
        },
    )))
}

async fn claim(State(runner): State<Arc<Runner>>, Json(claim): Json<Claim>) -> Response {
    {
        let mut now = runner.now();
        if now.owner.is_some_and(|owner| owner != claim.session_id) {
            return StatusCode::CONFLICT.into_response();
        }
        now.owner = Some(claim.session_id);
    }
    if runner.now().state == MachineState::Paused {
        runner.state(MachineState::Up);
    }
    Json(runner.view()).into_response()
}

async fn pause(State(runner): State<Arc<Runner>>) -> Response {
    {
        let now = runner.now();
        if now.owner.is_some() || now.state != MachineState::Up {
            return StatusCode::CONFLICT.into_response();
        }
    }
    runner.state(MachineState::Paused);
    Json(runner.view()).into_response()
}

async fn login(State(runner): State<Arc<Runner>>, Json(request): Json<LoginRequest>) -> Response {
    if std::mem::replace(&mut runner.now().login, true) {
        return StatusCode::CONFLICT.into_response();
    }
    runner.login(LoginEvent::Started {
        provider: request.pack.provider.id.clone(),
        flow: request.flow.clone(),
        session_id: request.session_id,
    });
    if let Some(sign_in) = runner.pace.sign_in {
        tokio::spawn(async move {
            tokio::time::sleep(sign_in).await;
            runner.captured();
        });
    }
    StatusCode::ACCEPTED.into_response()
}

async fn credential(
    State(runner): State<Arc<Runner>>,
    Json(request): Json<CredentialRequest>,
) -> Response {
    tokio::time::sleep(runner.pace.hand_over).await;
    let file = CapturedFile {
        rule: "file".to_owned(),
        path: ".tool/auth.json".to_owned(),
        mode: 0o600,
        content: BASE64.encode(secret(runner.spec.machine_id)),
    };
    let captured = CapturedCredential {
        files: vec![file],
        account: Some("ada@example.org".to_owned()),
        expires_at: None,
    };
    let sealed = serde_json::to_vec(&captured)
        .ok()
        .and_then(|plain| request.seal_to.seal(&plain).ok());
    match sealed {
        Some(sealed) => Json(CredentialReply { sealed }).into_response(),
        None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn stop(State(runner): State<Arc<Runner>>, Json(_): Json<StopRequest>) -> Response {
    match runner.stop() {
        Ok(disposal) => Json(disposal).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
