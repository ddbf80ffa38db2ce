//! Runners that speak the runner's API on their Unix socket, without a VM behind it: real HTTP servers, each of which a
//! test can lead through a VM's life, or kill.
use axum::{
    Json, Router,
    body::Body,
    extract::{
        Query, Request, State,
        ws::{Message, WebSocket, WebSocketUpgrade},
    },
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hyper_util::{rt::TokioIo, server::conn::auto::upgrade::downcast};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::watch,
    task::AbortHandle,
};
use vestibule_api::{
    agent::{
        AgentEvent, CapturedCredential, CapturedFile, CredentialReply, CredentialRequest,
        LoginEvent, LoginRequest,
    },
    cause::Cause,
    finding::{Finding, Quote},
    machine::{
        Claim, Disposal, Disposer, Exit, MachineState, Phase, RunnerEvent, RunnerEventKind, VmSpec,
    },
    time::Timestamp,
    view,
};

/// A runner and what was said to it.
#[derive(Debug)]
pub(crate) struct Runner {
    pub(crate) spec: VmSpec,
    events: watch::Sender<Vec<RunnerEvent>>,
    generation: Mutex<u64>,
    pub(crate) logins: Mutex<Vec<LoginRequest>>,
    pub(crate) claims: Mutex<Vec<Claim>>,
    credential: Mutex<Option<(String, Vec<u8>)>>,
    /// Whose the credential is that is handed over, whatever was said when it was captured.
    pub(crate) account: Mutex<Option<String>>,
    pub(crate) stops: Mutex<Vec<String>>,
    /// A runner from before connections were handed over.
    pub(crate) old: AtomicBool,
    /// Bytes that viewers sent to the guest.
    pub(crate) rfb: Mutex<Vec<u8>>,
    /// Text and bytes that viewers sent to the terminal.
    pub(crate) terminal: Mutex<Vec<String>>,
    server: Mutex<Option<AbortHandle>>,
    /// Open views end with the runner.
    gone: watch::Sender<bool>,
    /// What `POST /agent/login` answers.
    pub(crate) login_status: Mutex<StatusCode>,
    /// Whether `POST /stop` hangs.
    pub(crate) deaf: Mutex<bool>,
    /// What the next claims come to.
    pub(crate) claim_fate: Mutex<ClaimFate>,
    pub(crate) pauses: Mutex<u32>,
    /// Its driver pauses no VM.
    pub(crate) stays_up: AtomicBool,
}

/// What a claim comes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ClaimFate {
    #[default]
    Granted,
    /// Carried out, but the reply is lost; once.
    ReplyLost,
    /// The runner dies before it does anything.
    Dies,
    /// The VM is ending.
    Refused,
    /// Nothing happens until it is another one.
    Hangs,
}

impl Runner {
    pub(super) fn start(spec: VmSpec) -> Arc<Self> {
        std::fs::create_dir_all(&spec.vm_dir).unwrap();
        let socket =
            std::os::unix::net::UnixListener::bind(format!("{}/runner.sock", spec.vm_dir)).unwrap();
        socket.set_nonblocking(true).unwrap();
        let runner = Arc::new(Self {
            spec,
            events: watch::channel(Vec::new()).0,
            generation: Mutex::new(0),
            logins: Mutex::default(),
            claims: Mutex::default(),
            credential: Mutex::default(),
            account: Mutex::new(Some("ada@example.org".to_owned())),
            stops: Mutex::default(),
            old: AtomicBool::new(false),
            rfb: Mutex::default(),
            terminal: Mutex::default(),
            server: Mutex::default(),
            gone: watch::channel(false).0,
            login_status: Mutex::new(StatusCode::ACCEPTED),
            deaf: Mutex::new(false),
            claim_fate: Mutex::default(),
            pauses: Mutex::default(),
            stays_up: AtomicBool::new(false),
        });
        runner.state(MachineState::Creating);
        runner.state(MachineState::Booting);
        let served = Arc::clone(&runner);
        let task = tokio::runtime::Handle::current().spawn(async move {
            let listener = UnixListener::from_std(socket).unwrap();
            axum::serve(listener, router(served)).await.unwrap();
        });
        *runner.server.lock().unwrap() = Some(task.abort_handle());
        runner
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.server.lock().unwrap().is_some()
    }

    pub(crate) fn say(&self, event: RunnerEventKind) {
        self.events.send_modify(|events| {
            let seq = events.len() as u64 + 1;
            events.push(RunnerEvent {
                seq,
                at: Timestamp::now(),
                event,
            });
        });
    }

    pub(crate) fn state(&self, state: MachineState) {
        let mut generation = self.generation.lock().unwrap();
        *generation += 1;
        self.say(RunnerEventKind::State {
            state,
            generation: *generation,
        });
    }

    /// Agent and screen are ready.
    pub(crate) fn up(&self) {
        self.say(RunnerEventKind::Phase {
            phase: Phase::Painted,
        });
        self.say(RunnerEventKind::Phase {
            phase: Phase::Ready,
        });
        self.state(MachineState::Up);
    }

    pub(crate) fn login(&self, event: LoginEvent) {
        self.say(RunnerEventKind::Agent {
            event: AgentEvent::Login { event },
        });
    }

    /// The tool wrote its file.
    pub(crate) fn capture(&self, path: &str, bytes: &[u8]) {
        *self.credential.lock().unwrap() = Some((path.to_owned(), bytes.to_vec()));
        self.login(LoginEvent::Captured {
            account: Some("ada@example.org".to_owned()),
            expires_at: None,
        });
    }

    /// As a runner whose snapshot can't be restored: it says so, and ends.
    pub(crate) fn refuse(self: &Arc<Self>, cause: Cause) {
        let quote = Quote {
            source: "vmm".to_owned(),
            line: None,
            text: "image: the snapshot has aa, here it is bb".to_owned(),
        };
        self.fail(Finding::new(cause, quote, "it does not fit", "boot"));
        self.end();
        // Before anybody follows it.
        self.die();
    }

    /// The newest state.
    pub(crate) fn now(&self) -> MachineState {
        let events = self.events.borrow();
        let states = events.iter().rev().find_map(|event| match &event.event {
            RunnerEventKind::State { state, .. } => Some(*state),
            _ => None,
        });
        states.unwrap()
    }

    pub(crate) fn fail(&self, finding: Finding) {
        self.say(RunnerEventKind::Failed { finding });
    }

    /// As if it had been killed: no word, the socket file stays, open connections break.
    pub(crate) fn die(&self) {
        if let Some(server) = self.server.lock().unwrap().take() {
            server.abort();
        }
        self.gone.send_replace(true);
    }

    /// Writes the evidence, ends, and leaves nothing behind.
    fn end(&self) {
        self.state(MachineState::Stopping);
        let lines: String = self
            .events
            .borrow()
            .iter()
            .map(|event| serde_json::to_string(event).unwrap() + "\n")
            // A user code is for no disk.
            .filter(|line| !line.contains("user-code"))
            .collect();
        std::fs::write(format!("{}/events.ndjson", self.spec.evidence_dir), lines).unwrap();
        self.state(MachineState::Gone);
        self.say(RunnerEventKind::Ended {
            exit: Exit {
                asked: true,
                ..Exit::default()
            },
        });
        let file = |name: &str, text: &str| {
            std::fs::write(format!("{}/{name}", self.spec.evidence_dir), text)
        };
        file(
            "serial.log",
            "[    0.000000] Linux version 6.1\nlast line\n",
        )
        .unwrap();
        file(
            "report.json",
            "{\"kernel\":\"6.1\",\"systemState\":\"running\"}",
        )
        .unwrap();
        file("exit.json", &json!({ "asked": true }).to_string()).unwrap();
        std::fs::remove_dir_all(&self.spec.vm_dir).unwrap();
    }
}

fn router(runner: Arc<Runner>) -> Router {
    Router::new()
        .route("/machine", get(machine))
        .route("/events", get(events))
        .route(
            "/console",
            get(async || "[    0.000000] Linux version 6.1\n"),
        )
        .route("/claim", post(claim))
        .route("/pause", post(pause))
        .route("/stop", post(stop))
        .route("/view", get(open_view))
        .route("/agent/login", post(login))
        .route("/agent/login/credential", post(credential))
        .route("/agent/terminal", get(terminal))
        .route(
            "/agent/report",
            get(async || Json(json!({ "kernel": "6.1-live" }))),
        )
        .with_state(runner)
}

async fn machine(State(runner): State<Arc<Runner>>) -> Json<Value> {
    Json(view_of(&runner))
}

fn view_of(runner: &Runner) -> Value {
    let spec = &runner.spec;
    let claimed = runner.claims.lock().unwrap().first().map(|c| c.session_id);
    json!({
        "machineId": spec.machine_id, "sessionId": spec.session_id.or(claimed), "state": runner.now(), "generation": 1,
        "imageDigest": spec.image_digest, "driver": "qemu/tcg", "memoryMib": spec.memory_mib, "vcpus": spec.vcpus,
        "runnerPid": 1, "startedAt": Timestamp::now(), "viewers": 0,
        "egress": { "connections": 0, "refused": 0, "bytesOut": 0, "bytesIn": 0 },
    })
}

/// As the runner does: what was claimed is not paused, and some drivers pause nothing.
async fn pause(State(runner): State<Arc<Runner>>) -> Response {
    let claims = runner.claims.lock().unwrap();
    if !claims.is_empty() || !matches!(runner.now(), MachineState::Up | MachineState::Paused) {
        return StatusCode::CONFLICT.into_response();
    }
    *runner.pauses.lock().unwrap() += 1;
    if runner.stays_up.load(Ordering::Relaxed) {
        return StatusCode::NOT_IMPLEMENTED.into_response();
    }
    if runner.now() == MachineState::Up {
        runner.state(MachineState::Paused);
    }
    drop(claims);
    Json(view_of(&runner)).into_response()
}

async fn events(
    State(runner): State<Arc<Runner>>,
    Query(query): Query<HashMap<String, usize>>,
) -> Response {
    let after = query.get("after").copied().unwrap_or(0);
    let feed = Feed {
        events: runner.events.subscribe(),
        gone: runner.gone.subscribe(),
        sent: after,
        over: false,
    };
    Response::new(Body::from_stream(futures_util::stream::unfold(
        feed,
        |mut feed| async move {
            let lines = feed.next().await?;
            Some((lines, feed))
        },
    )))
}

struct Feed {
    events: watch::Receiver<Vec<RunnerEvent>>,
    gone: watch::Receiver<bool>,
    sent: usize,
    over: bool,
}

impl Feed {
    /// The lines that are new; an error when the runner is killed.
    async fn next(&mut self) -> Option<std::io::Result<String>> {
        if self.over {
            return None;
        }
        let sent = self.sent;
        let new = tokio::select! {
            seen = self.events.wait_for(|events| events.len() > sent) => Some(seen.unwrap()[sent..].to_vec()),
            _ = self.gone.wait_for(|gone| *gone) => None,
        };
        let Some(new) = new else {
            self.over = true;
            return Some(Err(std::io::Error::other("killed")));
        };
        self.sent += new.len();
        self.over = new
            .iter()
            .any(|event| matches!(event.event, RunnerEventKind::Ended { .. }));
        Some(Ok(new
            .iter()
            .map(|event| serde_json::to_string(event).unwrap() + "\n")
            .collect()))
    }
}

async fn stop(State(runner): State<Arc<Runner>>, Json(request): Json<Value>) -> Json<Disposal> {
    if *runner.deaf.lock().unwrap() {
        std::future::pending::<()>().await;
    }
    runner
        .stops
        .lock()
        .unwrap()
        .push(request["reason"].as_str().unwrap_or_default().to_owned());
    runner.end();
    let ending = Arc::clone(&runner);
    tokio::spawn(async move {
        // The reply first, as a runner that exits after its last answer.
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        ending.die();
    });
    Json(Disposal {
        machine_id: runner.spec.machine_id,
        at: Timestamp::now(),
        items: Vec::new(),
        complete: true,
        by: Disposer::Runner,
    })
}

async fn claim(State(runner): State<Arc<Runner>>, Json(claim): Json<Claim>) -> Response {
    let fate = *runner.claim_fate.lock().unwrap();
    match fate {
        ClaimFate::Dies => {
            runner.die();
            return StatusCode::BAD_GATEWAY.into_response();
        }
        ClaimFate::Refused => return StatusCode::CONFLICT.into_response(),
        ClaimFate::Hangs => {
            while *runner.claim_fate.lock().unwrap() == ClaimFate::Hangs {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        ClaimFate::Granted | ClaimFate::ReplyLost => {}
    }
    {
        let mut claims = runner.claims.lock().unwrap();
        let owner = runner
            .spec
            .session_id
            .or_else(|| claims.first().map(|c| c.session_id));
        if owner.is_some_and(|owner| owner != claim.session_id) {
            return StatusCode::CONFLICT.into_response();
        }
        if claim.egress.hosts.iter().any(|host| host == "refused.test") {
            return (StatusCode::BAD_REQUEST, "`refused.test` is refused").into_response();
        }
        claims.push(claim);
    }
    if runner.now() == MachineState::Paused {
        runner.say(RunnerEventKind::Phase {
            phase: Phase::Resumed,
        });
        runner.state(MachineState::Up);
    }
    if fate == ClaimFate::ReplyLost {
        *runner.claim_fate.lock().unwrap() = ClaimFate::Granted;
        return StatusCode::BAD_GATEWAY.into_response();
    }
    Json(view_of(&runner)).into_response()
}

async fn login(State(runner): State<Arc<Runner>>, Json(request): Json<LoginRequest>) -> Response {
    let owner = request.session_id;
    assert!(
        runner
            .claims
            .lock()
            .unwrap()
            .iter()
            .any(|c| c.session_id == owner),
        "a VM is claimed before a tool starts in it"
    );
    let status = *runner.login_status.lock().unwrap();
    if status == StatusCode::ACCEPTED {
        let (provider, flow, session_id) = (
            request.pack.provider.id.clone(),
            request.flow.clone(),
            request.session_id,
        );
        runner.logins.lock().unwrap().push(request);
        runner.login(LoginEvent::Started {
            provider,
            flow,
            session_id,
        });
    }
    (
        status,
        Json(json!({ "message": "no", "cause": "tool-failed" })),
    )
        .into_response()
}

async fn credential(
    State(runner): State<Arc<Runner>>,
    Json(request): Json<CredentialRequest>,
) -> Response {
    let file = runner.credential.lock().unwrap().clone();
    let Some((path, bytes)) = file else {
        return StatusCode::CONFLICT.into_response();
    };
    let file = CapturedFile {
        rule: "file".to_owned(),
        path,
        mode: 0o600,
        content: BASE64.encode(bytes),
    };
    let captured = CapturedCredential {
        files: vec![file],
        account: runner.account.lock().unwrap().clone(),
        expires_at: None,
    };
    let sealed = request
        .seal_to
        .seal(&serde_json::to_vec(&captured).unwrap())
        .unwrap();
    Json(CredentialReply { sealed }).into_response()
}

/// An RFB server's first word, then everything that is said to it is kept; `POUR` in the bytes is answered with 32 MiB.
async fn open_view(State(runner): State<Arc<Runner>>, mut request: Request) -> Response {
    let asked = request.headers()[header::UPGRADE].to_str().unwrap();
    // A viewer with TLS can't be handed over.
    let plain = asked == format!("{}, {}", view::FRAMES, view::RAW);
    assert!(plain || asked == view::RAW, "{asked}");
    let frames = plain && !runner.old.load(Ordering::Relaxed);
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let upgraded = upgrade.await.unwrap();
        if frames {
            let parts = downcast::<TokioIo<UnixStream>>(upgraded).unwrap();
            let (guest, far) = tokio::io::duplex(64 << 10);
            let mut gone = runner.gone.subscribe();
            let runner_too = Arc::clone(&runner);
            tokio::spawn(screen(runner, guest));
            let over = async move { drop(gone.wait_for(|gone| *gone).await) };
            let shown = || runner_too.say(RunnerEventKind::FirstFrame);
            drop(view::take_over(parts.io.into_inner(), far, over, shown).await);
        } else {
            screen(runner, TokioIo::new(upgraded)).await;
        }
    });
    let protocol = if frames { view::FRAMES } else { view::RAW };
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, protocol)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn screen(runner: Arc<Runner>, mut io: impl AsyncRead + AsyncWrite + Unpin) {
    io.write_all(b"RFB 003.008\n").await.unwrap();
    let mut gone = runner.gone.subscribe();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = tokio::select! {
            read = io.read(&mut buffer) => read.unwrap_or(0),
            _ = gone.wait_for(|gone| *gone) => 0,
        };
        if count == 0 {
            return;
        }
        runner.rfb.lock().unwrap().extend(&buffer[..count]);
        if buffer[..count].windows(4).any(|window| window == b"POUR") {
            let block = vec![0x5a; 1 << 20];
            for _ in 0..32 {
                if io.write_all(&block).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn terminal(
    State(runner): State<Arc<Runner>>,
    Query(query): Query<HashMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Response {
    upgrade.on_upgrade(async move |mut socket: WebSocket| {
        let hello = format!("right={}", query["right"]);
        socket
            .send(Message::Binary(hello.into_bytes().into()))
            .await
            .unwrap();
        let mut gone = runner.gone.subscribe();
        loop {
            let message = tokio::select! {
                message = socket.recv() => message,
                _ = gone.wait_for(|gone| *gone) => None,
            };
            let Some(Ok(message)) = message else {
                return;
            };
            match message {
                Message::Binary(bytes) => {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    runner.terminal.lock().unwrap().push(text);
                    socket.send(Message::Binary(bytes)).await.unwrap();
                }
                Message::Text(text) => runner.terminal.lock().unwrap().push(text.to_string()),
                Message::Ping(_) | Message::Pong(_) | Message::Close(_) => {}
            }
        }
    })
}
