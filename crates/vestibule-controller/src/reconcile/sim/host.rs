//! The simulated host: runners that speak the runner's API on their sockets, live by the simulation's dice, and die.
use crate::scheduler::{HostMemory, LaunchError, Scheduler};
use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::Utf8PathBuf;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::{net::UnixListener, task::AbortHandle};
use vestibule_api::{
    agent::{
        AgentEvent, CapturedCredential, CapturedFile, CredentialReply, CredentialRequest,
        LoginEvent, LoginRequest,
    },
    cause::Cause,
    finding::{Finding, Quote},
    ids::{MachineId, SessionId},
    machine::{
        Claim, Disposal, Disposer, Exit, MachineState, Phase, RunnerEvent, RunnerEventKind, VmSpec,
    },
    time::Timestamp,
};

/// One runner and its VM.
#[derive(Debug)]
pub(super) struct Runner {
    pub(super) spec: VmSpec,
    host: Arc<Dice>,
    pub(super) vm: Mutex<Vm>,
    server: Mutex<Option<AbortHandle>>,
}

/// What a runner knows, and what was done to it.
#[derive(Debug, Default)]
pub(super) struct Vm {
    pub(super) events: Vec<RunnerEvent>,
    generation: u64,
    state: Option<MachineState>,
    pub(super) claimed: Vec<SessionId>,
    /// Times that the tool was started in it.
    pub(super) logins: u32,
    /// What the tool wrote.
    pub(super) secret: Option<Vec<u8>>,
    /// Whose the agent said that it is.
    pub(super) account: Option<String>,
    /// Whose it is when it is fetched: somebody may have signed in anew.
    pub(super) hands_over: Option<String>,
    /// The sign-in failed in it.
    pub(super) gave_up: bool,
}

/// The simulation's chance, for what the host does to requests.
#[derive(Debug)]
pub(super) struct Dice {
    /// None once faults are over.
    rng: Mutex<Option<StdRng>>,
    /// Rates of faults are parts of this: in a calm world more sign-ins come to their late steps.
    of: u32,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    /// Carried out, and nobody hears of it.
    ReplyLost,
    /// Not carried out.
    Lost,
    /// The runner dies before it does it.
    DiesBefore,
    /// The runner dies after it has done it.
    DiesAfter,
}

impl Dice {
    pub(super) fn new(seed: u64, calm: bool) -> Arc<Self> {
        Arc::new(Self {
            rng: Mutex::new(Some(StdRng::seed_from_u64(seed))),
            of: if calm { 1000 } else { 100 },
        })
    }

    /// No faults any more.
    pub(super) fn rest(&self) {
        *self.rng.lock().unwrap() = None;
    }

    /// True in so many of a hundred cases; in a calm world in fewer.
    fn hits(&self, percent: u32) -> bool {
        let mut rng = self.rng.lock().unwrap();
        rng.as_mut()
            .is_some_and(|rng| rng.random_range(0..self.of) < percent)
    }

    fn fate(&self) -> Fate {
        let mut rng = self.rng.lock().unwrap();
        match rng
            .as_mut()
            .map_or(self.of, |rng| rng.random_range(0..self.of))
        {
            0..7 => Fate::ReplyLost,
            7..12 => Fate::Lost,
            12..14 => Fate::DiesBefore,
            14..16 => Fate::DiesAfter,
            _ => Fate::Done,
        }
    }
}

/// Every runner that was ever started.
#[derive(Debug)]
pub(super) struct Host {
    dice: Arc<Dice>,
    runners: Mutex<BTreeMap<MachineId, Arc<Runner>>>,
    /// Machines whose runner was started again after somebody had its VM. One that died before the controller could write
    /// down that it was started is started again, and nobody was in it.
    pub(super) twice: Mutex<Vec<MachineId>>,
}

impl Host {
    pub(super) fn new(dice: Arc<Dice>) -> Arc<Self> {
        Arc::new(Self {
            dice,
            runners: Mutex::default(),
            twice: Mutex::default(),
        })
    }

    pub(super) fn all(&self) -> Vec<Arc<Runner>> {
        self.runners.lock().unwrap().values().cloned().collect()
    }

    pub(super) fn get(&self, id: MachineId) -> Option<Arc<Runner>> {
        self.runners.lock().unwrap().get(&id).cloned()
    }
}

impl Scheduler for Host {
    fn launch(&self, spec: &VmSpec) -> Result<(), LaunchError> {
        let file = |path: &str, err| LaunchError::File {
            operation: "create directory",
            path: Utf8PathBuf::from(path),
            err,
        };
        for dir in [&spec.vm_dir, &spec.evidence_dir] {
            std::fs::create_dir_all(dir).map_err(|err| file(dir, err))?;
        }
        if self.alive(spec.machine_id) {
            return Ok(());
        }
        if self.dice.hits(3) {
            return Err(LaunchError::Spawn {
                program: "simulated".to_owned(),
                err: std::io::ErrorKind::PermissionDenied.into(),
            });
        }
        let runner = Runner::start(spec.clone(), Arc::clone(&self.dice));
        if spec.restore.is_some() && self.dice.hits(15) {
            runner.refuse();
        }
        let before = self.runners.lock().unwrap().insert(spec.machine_id, runner);
        if before.is_some_and(|before| !before.vm().claimed.is_empty()) {
            self.twice.lock().unwrap().push(spec.machine_id);
        }
        Ok(())
    }

    fn alive(&self, id: MachineId) -> bool {
        self.get(id).is_some_and(|runner| runner.is_alive())
    }

    fn kill(&self, id: MachineId) {
        if let Some(runner) = self.get(id) {
            runner.die();
        }
    }

    fn memory(&self) -> Option<HostMemory> {
        None
    }
}

impl Runner {
    fn start(spec: VmSpec, host: Arc<Dice>) -> Arc<Self> {
        let path = format!("{}/runner.sock", spec.vm_dir);
        drop(std::fs::remove_file(&path));
        let socket = std::os::unix::net::UnixListener::bind(path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let runner = Arc::new(Self {
            spec,
            host,
            vm: Mutex::default(),
            server: Mutex::default(),
        });
        runner.state(MachineState::Creating);
        let served = Arc::clone(&runner);
        let task = tokio::runtime::Handle::current().spawn(async move {
            let listener = UnixListener::from_std(socket).unwrap();
            axum::serve(listener, router(served)).await.unwrap();
        });
        *runner.server.lock().unwrap() = Some(task.abort_handle());
        runner
    }

    pub(super) fn is_alive(&self) -> bool {
        self.server.lock().unwrap().is_some()
    }

    /// Whether it lived until the controller ended it.
    pub(super) fn was_asked_to_stop(&self) -> bool {
        let vm = self.vm();
        let last = vm.events.last().map(|event| &event.event);
        matches!(last, Some(RunnerEventKind::Ended { exit }) if exit.asked)
    }

    fn vm(&self) -> MutexGuard<'_, Vm> {
        self.vm.lock().unwrap()
    }

    /// As SIGKILL: no word. The socket's file goes too, so that nobody is still let in by what the kernel had queued.
    pub(super) fn die(&self) {
        if let Some(server) = self.server.lock().unwrap().take() {
            server.abort();
            drop(std::fs::remove_file(format!(
                "{}/runner.sock",
                self.spec.vm_dir
            )));
        }
    }

    fn say(&self, event: RunnerEventKind) {
        let mut vm = self.vm();
        let seq = vm.events.len() as u64 + 1;
        let at = Timestamp::now();
        vm.events.push(RunnerEvent { seq, at, event });
    }

    fn state(&self, state: MachineState) {
        let generation = {
            let mut vm = self.vm();
            vm.generation += 1;
            vm.state = Some(state);
            vm.generation
        };
        self.say(RunnerEventKind::State { state, generation });
    }

    fn login(&self, event: LoginEvent) {
        self.say(RunnerEventKind::Agent {
            event: AgentEvent::Login { event },
        });
    }

    /// Where the VM's life is, and whether somebody signs in in it.
    fn stage(&self) -> (Option<MachineState>, bool) {
        let vm = self.vm();
        let undecided = vm.secret.is_none() && !vm.gave_up;
        (vm.state, vm.logins > 0 && undecided)
    }

    /// Whether the VM's life goes on by itself, or by the person in it.
    pub(super) fn goes_somewhere(&self) -> bool {
        let (state, signing_in) = self.stage();
        match state {
            Some(MachineState::Creating | MachineState::Booting) => true,
            Some(MachineState::Up) => signing_in,
            Some(
                MachineState::Paused
                | MachineState::Stopping
                | MachineState::Gone
                | MachineState::Lost,
            )
            | None => false,
        }
    }

    /// The VM's life goes on by one step, as far as it does.
    pub(super) fn goes_on(&self, rng: &mut StdRng) {
        let (state, signing_in) = self.stage();
        match state {
            Some(MachineState::Creating) => self.state(MachineState::Booting),
            Some(MachineState::Booting) => {
                self.say(RunnerEventKind::Phase {
                    phase: Phase::Ready,
                });
                self.state(MachineState::Up);
            }
            Some(MachineState::Up) if signing_in => match rng.random_range(0..10) {
                0..6 => {
                    let secret = format!("sk-{:032x}", rng.random::<u128>());
                    let account = rng.random_bool(0.9).then(|| "ada@example.org".to_owned());
                    let hands_over = match rng.random_range(0..20) {
                        0 => None,
                        1..5 => Some("eve@example.org".to_owned()),
                        _ => account.clone(),
                    };
                    {
                        let mut vm = self.vm();
                        vm.secret = Some(secret.into_bytes());
                        (vm.account, vm.hands_over) = (account.clone(), hands_over);
                    }
                    self.login(LoginEvent::Captured {
                        account,
                        expires_at: None,
                    });
                }
                6 => {
                    self.vm().gave_up = true;
                    let finding = finding(Cause::ToolFailed, "the tool gave up");
                    self.login(LoginEvent::Failed { finding });
                }
                _ => self.login(LoginEvent::CallbackReached),
            },
            _ => {}
        }
    }

    /// A snapshot that can't be restored: the runner says so and ends, faster than anybody follows it.
    fn refuse(&self) {
        let finding = finding(Cause::SnapshotRefused, "another image");
        self.say(RunnerEventKind::Failed { finding });
        self.end(false);
        self.die();
    }

    /// The VM ended by itself.
    pub(super) fn breaks(&self) {
        let finding = finding(Cause::KernelPanic, "Kernel panic - not syncing");
        self.say(RunnerEventKind::Failed { finding });
        self.end(false);
        self.die();
    }

    /// Writes the evidence and leaves nothing else.
    fn end(&self, asked: bool) -> Disposal {
        self.state(MachineState::Stopping);
        let lines: String = self
            .vm()
            .events
            .iter()
            .map(|event| serde_json::to_string(event).unwrap() + "\n")
            .collect();
        std::fs::write(format!("{}/events.ndjson", self.spec.evidence_dir), lines).unwrap();
        self.state(MachineState::Gone);
        let exit = Exit {
            asked,
            ..Exit::default()
        };
        self.say(RunnerEventKind::Ended { exit });
        drop(std::fs::remove_dir_all(&self.spec.vm_dir));
        let disposal = Disposal {
            machine_id: self.spec.machine_id,
            at: Timestamp::now(),
            items: Vec::new(),
            complete: true,
            by: Disposer::Runner,
        };
        let path = format!("{}/disposal.json", self.spec.evidence_dir);
        std::fs::write(path, serde_json::to_vec(&disposal).unwrap()).unwrap();
        disposal
    }

    fn view(&self) -> Value {
        let (spec, vm) = (&self.spec, self.vm());
        let first = vm.claimed.first().copied();
        let owner = spec.session_id.or(first);
        json!({
            "machineId": spec.machine_id, "sessionId": owner, "state": vm.state,
            "generation": vm.generation, "imageDigest": spec.image_digest, "driver": "simulated",
            "memoryMib": spec.memory_mib, "vcpus": spec.vcpus, "runnerPid": 1, "startedAt": Timestamp::now(), "viewers": 0,
            "egress": { "connections": 0, "refused": 0, "bytesOut": 0, "bytesIn": 0 },
        })
    }

    /// What becomes of a request that `act` carries out.
    fn answer(&self, act: impl FnOnce() -> Response) -> Response {
        let lost = || StatusCode::BAD_GATEWAY.into_response();
        match self.host.fate() {
            Fate::Done => act(),
            Fate::ReplyLost => {
                drop(act());
                lost()
            }
            Fate::Lost => lost(),
            Fate::DiesBefore => {
                self.die();
                lost()
            }
            Fate::DiesAfter => {
                drop(act());
                self.die();
                lost()
            }
        }
    }
}

fn finding(cause: Cause, text: &str) -> Finding {
    let quote = Quote {
        source: "vmm".to_owned(),
        line: None,
        text: text.to_owned(),
    };
    Finding::new(cause, quote, "it says so", "try again")
}

fn router(runner: Arc<Runner>) -> Router {
    Router::new()
        .route("/machine", get(machine))
        .route("/claim", post(claim))
        .route("/pause", post(pause))
        .route("/stop", post(stop))
        .route("/agent/login", post(login))
        .route("/agent/login/credential", post(credential))
        .with_state(runner)
}

async fn machine(State(runner): State<Arc<Runner>>) -> Json<Value> {
    Json(runner.view())
}

async fn claim(State(runner): State<Arc<Runner>>, Json(claim): Json<Claim>) -> Response {
    runner.answer(|| {
        let first = runner.vm().claimed.first().copied();
        let owner = runner.spec.session_id.or(first);
        if owner.is_some_and(|owner| owner != claim.session_id) {
            return StatusCode::CONFLICT.into_response();
        }
        runner.vm().claimed.push(claim.session_id);
        if runner.vm().state == Some(MachineState::Paused) {
            runner.state(MachineState::Up);
        }
        Json(runner.view()).into_response()
    })
}

async fn pause(State(runner): State<Arc<Runner>>) -> Response {
    let state = runner.vm().state;
    if !runner.vm().claimed.is_empty()
        || !matches!(state, Some(MachineState::Up | MachineState::Paused))
    {
        return StatusCode::CONFLICT.into_response();
    }
    if state == Some(MachineState::Up) {
        runner.state(MachineState::Paused);
    }
    Json(runner.view()).into_response()
}

async fn stop(State(runner): State<Arc<Runner>>) -> Response {
    let end = || {
        let disposal = runner.end(true);
        runner.die();
        Json(disposal).into_response()
    };
    runner.answer(end)
}

async fn login(State(runner): State<Arc<Runner>>, Json(request): Json<LoginRequest>) -> Response {
    runner.answer(|| {
        assert!(
            runner.vm().claimed.contains(&request.session_id),
            "a VM is claimed before a tool starts in it"
        );
        if runner.vm().logins > 0 {
            // As the agent does: one login in a VM's life.
            return StatusCode::CONFLICT.into_response();
        }
        runner.vm().logins += 1;
        runner.login(LoginEvent::Started {
            provider: request.pack.provider.id.clone(),
            flow: request.flow.clone(),
            session_id: request.session_id,
        });
        StatusCode::ACCEPTED.into_response()
    })
}

async fn credential(
    State(runner): State<Arc<Runner>>,
    Json(request): Json<CredentialRequest>,
) -> Response {
    runner.answer(|| {
        let Some(secret) = runner.vm().secret.clone() else {
            return StatusCode::CONFLICT.into_response();
        };
        let file = CapturedFile {
            rule: "file".to_owned(),
            path: ".codex/auth.json".to_owned(),
            mode: 0o600,
            content: BASE64.encode(secret),
        };
        let captured = CapturedCredential {
            files: vec![file],
            account: runner.vm().hands_over.clone(),
            expires_at: None,
        };
        let plain = serde_json::to_vec(&captured).unwrap();
        let sealed = request.seal_to.seal(&plain).unwrap();
        Json(CredentialReply { sealed }).into_response()
    })
}
