//! One VM of the store's own: a runner is started, watched, asked and seen to its end, over HTTP like everyone's.
//!
//! What goes wrong with a VM is noted in [`Seen`], in words; errors are for what could not be tried.
use crate::{
    progress::{Event, Phase as Step, Progress, Steps},
    store::Store,
};
use camino::{Utf8Path, Utf8PathBuf};
use http_body_util::BodyExt as _;
use hyper::Method;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fs::File,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};
use vestibule_api::{
    client::{self, CallError, Runner},
    egress::EgressPolicy,
    error::Chain,
    finding::Finding,
    ids::{ImageDigest, MachineId},
    machine::{
        DriverChoice, JailSpec, MachineState, MachineView, MemoryBackend, Phase, RunnerEvent,
        RunnerEventKind, StopRequest, VmSpec,
    },
    time::Timestamp,
};

/// The runner makes its socket within this time, or never.
const SOCKET: Duration = Duration::from_secs(20);
/// After *stop* the runner writes evidence and ends within this time.
const STOP: Duration = Duration::from_secs(60);
/// A VM whose owner was killed is asked for nothing any more, and ends after so many seconds.
const IDLE_S: u32 = 60;
/// Bytes of serial console kept from beginning and end.
const CONSOLE: u64 = 4 << 20;
/// One event is a shorter line.
const LINE: usize = 1 << 20;

/// How to boot an image.
#[derive(Clone, Debug)]
pub struct BootOptions {
    /// The program whose role `run-vm` is the runner.
    pub runner: Utf8PathBuf,
    /// From the runner's start to *ready*.
    pub deadline: Duration,
    pub driver: DriverChoice,
}

/// Why there is no VM to watch.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("prepare `{path}`")]
    Prepare {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("start the runner `{runner}`")]
    Start {
        runner: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("describe the VM to the runner")]
    Describe(#[source] serde_json::Error),
}

/// One milestone.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Timing {
    pub phase: Phase,
    /// Since the runner's start.
    pub after_ms: u64,
}

/// What was seen of a VM's life.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) timings: Vec<Timing>,
    pub(crate) finding: Option<Finding>,
    pub(crate) problems: Vec<String>,
    /// When the first event happened.
    first: Option<Timestamp>,
}

/// The runner's events, as far as they have not been read.
struct Events {
    body: hyper::body::Incoming,
    pending: Vec<u8>,
}

/// A VM that belongs to nobody, with `size` MiB and CPUs, and a closed way out: an image needs nobody to start.
pub(crate) fn spec(
    store: &Store,
    digest: &ImageDigest,
    (memory_mib, vcpus): (u32, u32),
    options: &BootOptions,
) -> Result<VmSpec, BootError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let machine_id = MachineId::generate();
    let directory = |name: &str| store.home().join(name).join(machine_id.to_string());
    let (vm_dir, evidence_dir) = (directory("vms"), directory("evidence"));
    for path in [&vm_dir, &evidence_dir] {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path);
        made.map_err(|err| BootError::Prepare {
            path: path.clone(),
            err,
        })?;
    }
    Ok(VmSpec {
        machine_id,
        session_id: None,
        image_digest: digest.clone(),
        image_dir: store.dir(digest).into_string(),
        driver: options.driver,
        memory_mib,
        vcpus,
        vm_dir: vm_dir.into_string(),
        evidence_dir: evidence_dir.into_string(),
        egress: EgressPolicy::default(),
        boot_deadline_s: u32::try_from(options.deadline.as_secs()).unwrap_or(u32::MAX),
        console_keep_bytes: CONSOLE,
        idle_deadline_s: Some(IDLE_S),
        restore: None,
        save_to: None,
        jail: JailSpec::default(),
        cache_dir: Some(store.home().join("cache").into_string()),
        memory_backend: MemoryBackend::default(),
    })
}

/// A runner and its VM. Dropped before its end, both are killed.
pub(crate) struct Vm<'a> {
    pub(crate) runner: Runner,
    pub(crate) seen: Seen,
    /// Open from the runner's first answer on, so that none is missed and the VM is not idle.
    events: Option<Events>,
    child: Child,
    deadline: Duration,
    spec: &'a VmSpec,
    log: &'a Utf8Path,
}

impl<'a> Vm<'a> {
    /// Starts the runner and gives it the specification. Its words go to `stderr`, which is the file `log`.
    pub(crate) async fn start(
        options: &BootOptions,
        spec: &'a VmSpec,
        stderr: File,
        log: &'a Utf8Path,
    ) -> Result<Self, BootError> {
        let start = |err| BootError::Start {
            runner: options.runner.clone(),
            err,
        };
        let text = serde_json::to_vec(spec).map_err(BootError::Describe)?;
        let mut command = Command::new(&options.runner);
        command
            .arg("run-vm")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(start)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A runner that is gone already says why in its log; its end is seen soon enough.
            let _ = stdin.write_all(&text).await;
        }
        Ok(Self {
            runner: Runner::at(Utf8Path::new(&spec.vm_dir).join("runner.sock")),
            seen: Seen::default(),
            events: None,
            child,
            deadline: options.deadline,
            spec,
            log,
        })
    }

    /// Waits until the VM has come so far or will not. Whether there is a runner that can be asked.
    pub(crate) async fn up(&mut self, until: Phase, steps: Steps<'_>) -> bool {
        let booting = steps.begin(Step::Boot);
        if let Err(problem) = self.answers().await {
            let said = std::fs::read_to_string(self.log).unwrap_or_default();
            let last = said.lines().last().unwrap_or("nothing");
            self.seen
                .problems
                .push(format!("{problem}; the runner's last words: {last}"));
            return false;
        }
        booting.done(false);
        let waiting = steps.begin(Step::Ready);
        let limit = self.deadline + STOP;
        let watch = self.watch(Some(until), steps.progress);
        if tokio::time::timeout(limit, watch).await.is_err() {
            self.seen.problems.push(format!(
                "the runner said neither *{until:?}* nor *failed* within {} s",
                limit.as_secs()
            ));
        }
        waiting.done(false);
        true
    }

    /// Waits until the runner answers on its socket.
    async fn answers(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + SOCKET;
        loop {
            if self.runner.get::<MachineView>("/machine").await.is_ok() {
                return Ok(());
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("the runner ended with {status} before it answered"));
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "the runner did not answer within {} s",
                    SOCKET.as_secs()
                ));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks for what ends the VM, and follows the events to their end, which say why where it fails.
    pub(crate) async fn last<R: DeserializeOwned>(
        &mut self,
        path: &str,
        limit: Duration,
        progress: &dyn Progress,
    ) -> Option<R> {
        let call = self.runner.call(Method::POST, path, None::<&()>);
        let reply = match tokio::time::timeout(limit, call).await {
            Ok(Ok(reply)) => Some(reply),
            Ok(Err(err)) => {
                self.seen.problems.push(Chain(&err).to_string());
                None
            }
            Err(_) => {
                let limit = limit.as_secs();
                self.seen
                    .problems
                    .push(format!("`POST {path}` has had no end within {limit} s"));
                None
            }
        };
        let watch = self.watch(None, progress);
        if tokio::time::timeout(STOP, watch).await.is_err() {
            self.stop("it was asked for its last thing").await;
        }
        reply
    }

    /// Reads the runner's events up to a milestone, or to the end.
    async fn watch(&mut self, until: Option<Phase>, progress: &dyn Progress) {
        let events = match self.events.take() {
            Some(events) => Ok(events),
            None => Events::open(&self.runner).await,
        };
        let read = match events {
            Ok(mut events) => {
                let read = events.read(&mut self.seen, until, progress).await;
                self.events = Some(events);
                read
            }
            Err(err) => Err(err),
        };
        if let Err(err) = read {
            self.seen
                .problems
                .push(format!("follow the runner's events: {}", Chain(&err)));
        }
    }

    /// Ends the VM.
    pub(crate) async fn stop(&mut self, reason: &str) {
        let request = StopRequest {
            reason: reason.to_owned(),
        };
        let stopped =
            self.runner
                .call::<_, serde_json::Value>(Method::POST, "/stop", Some(&request));
        match tokio::time::timeout(STOP, stopped).await {
            Ok(Ok(_)) => {}
            // It ended the VM by itself, which the events said.
            Ok(Err(CallError::Connect { .. })) => {}
            Ok(Err(err)) => self
                .seen
                .problems
                .push(format!("stop the VM: {}", Chain(&err))),
            Err(_) => self
                .seen
                .problems
                .push(format!("the VM did not stop within {} s", STOP.as_secs())),
        }
    }

    /// Waits for the runner's own end, and hands out what was seen.
    pub(crate) async fn ended(mut self) -> Seen {
        let problem = match tokio::time::timeout(STOP, self.child.wait()).await {
            // Also of a VM that failed: then there is a finding.
            Ok(Ok(status)) if status.success() => None,
            Ok(Ok(status)) => Some(format!("the runner ended with {status}")),
            Ok(Err(err)) => Some(format!("wait for the runner's end: {err}")),
            Err(_) => {
                let _ = self.child.kill().await;
                Some("the runner did not end after the VM had".to_owned())
            }
        };
        if let Some(problem) = problem {
            // What else was seen follows from it.
            self.seen.problems.insert(0, problem);
        }
        if self.seen.finding.is_none() {
            // A runner that fails at once may be gone before anybody has asked it.
            self.seen.finding = recorded(Utf8Path::new(&self.spec.evidence_dir));
        }
        salvage(
            Utf8Path::new(&self.spec.vm_dir),
            Utf8Path::new(&self.spec.evidence_dir),
        );
        self.seen
    }
}

/// Why the VM failed, by the events in its evidence.
fn recorded(evidence: &Utf8Path) -> Option<Finding> {
    let events = std::fs::read_to_string(evidence.join("events.ndjson")).ok()?;
    let mut lines = events.lines();
    lines.find_map(|line| match serde_json::from_str(line).ok()? {
        RunnerEvent {
            event: RunnerEventKind::Failed { finding },
            ..
        } => Some(finding),
        _ => None,
    })
}

/// Takes away what a killed runner left of its VM, and keeps the logs. One that ended by itself left nothing.
pub(crate) fn salvage(vm_dir: &Utf8Path, evidence: &Utf8Path) {
    for name in ["serial.log", "vmm.log"] {
        let _ = std::fs::rename(vm_dir.join(name), evidence.join(name));
    }
    let _ = std::fs::remove_dir_all(vm_dir);
}

impl Events {
    async fn open(runner: &Runner) -> Result<Self, CallError> {
        let request = client::json_request(Method::GET, "/events?after=0", None::<&()>)?;
        Ok(Self {
            body: runner.open(request).await?.into_body(),
            pending: Vec::new(),
        })
    }

    async fn read(
        &mut self,
        seen: &mut Seen,
        until: Option<Phase>,
        progress: &dyn Progress,
    ) -> Result<(), CallError> {
        let what = || "GET /events".to_owned();
        loop {
            while let Some(at) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=at).collect();
                let event: RunnerEvent = serde_json::from_slice(&line)
                    .map_err(|err| CallError::Decode { what: what(), err })?;
                if seen.take(&event, until, progress) {
                    return Ok(());
                }
            }
            if self.pending.len() > LINE {
                seen.problems
                    .push("the runner sent an event of more than 1 MiB".to_owned());
                return Ok(());
            }
            let Some(frame) = self.body.frame().await else {
                return Ok(());
            };
            let frame = frame.map_err(|err| CallError::Http { what: what(), err })?;
            if let Ok(data) = frame.into_data() {
                self.pending.extend_from_slice(&data);
            }
        }
    }
}

impl Seen {
    pub(crate) fn reached(&self, phase: Phase) -> bool {
        self.timings.iter().any(|timing| timing.phase == phase)
    }

    /// Notes an event; whether it is the one that decides.
    fn take(&mut self, event: &RunnerEvent, until: Option<Phase>, progress: &dyn Progress) -> bool {
        let first = *self.first.get_or_insert(event.at);
        match &event.event {
            RunnerEventKind::Phase { phase } => {
                progress.event(&Event::Detail(format!("{phase:?}")));
                self.timings.push(Timing {
                    phase: *phase,
                    after_ms: event.at.micros_since(first) / 1000,
                });
                Some(*phase) == until
            }
            RunnerEventKind::Failed { finding } => {
                self.finding = Some(finding.clone());
                true
            }
            RunnerEventKind::State { state, .. } => {
                matches!(state, MachineState::Gone | MachineState::Lost)
            }
            RunnerEventKind::Ended { .. } => true,
            RunnerEventKind::Agent { .. }
            | RunnerEventKind::Egress { .. }
            | RunnerEventKind::Viewers { .. }
            | RunnerEventKind::FirstFrame => false,
        }
    }
}
