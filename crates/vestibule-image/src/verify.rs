//! The boot gate: an image proves itself by starting, under the runner that people get, over HTTP like everyone.
//!
//! Green means: the disk shows nothing that could not start, the runner said *ready*, every required unit is active and none failed, the browser is painted where the
//! image has one, and the agent that answered is the one that the manifest names. The report stays beside the image,
//! and only a green one lets an alias point there.
use crate::{
    lint::{LintError, lint},
    progress::{Event, Phase as Step, Progress},
    store::{Store, StoreError},
};
use camino::Utf8PathBuf;
use http_body_util::BodyExt as _;
use serde::{Deserialize, Serialize};
use std::{
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt as _, process::Command};
use vestibule_api::{
    agent::{DisplayReport, MemoryReport, Report, UnitReport},
    client::{self, CallError, Runner},
    error::Chain,
    finding::Finding,
    ids::{ImageDigest, MachineId},
    image::Manifest,
    machine::{
        DriverChoice, MachineState, MachineView, Phase, RunnerEvent, RunnerEventKind, StopRequest,
        VmSpec,
    },
    time::Timestamp,
};

/// The runner makes its socket within this time, or never.
const SOCKET: Duration = Duration::from_secs(20);
/// After *stop* the runner writes evidence and ends within this time.
const STOP: Duration = Duration::from_secs(60);
/// Bytes of serial console kept from beginning and end.
const CONSOLE: u64 = 4 << 20;
/// One event is a shorter line.
const LINE: usize = 1 << 20;

/// How to verify.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// The program whose role `run-vm` is the runner.
    pub runner: Utf8PathBuf,
    /// From the runner's start to *ready*.
    pub deadline: Duration,
}

/// Why there is no report. That an image is not as it should be is a report, not an error.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Lint(#[from] LintError),
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

/// `verification.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verification {
    pub digest: ImageDigest,
    /// Whether everything that the manifest promises was seen.
    pub green: bool,
    pub at: Timestamp,
    pub machine_id: MachineId,
    /// `qemu/tcg` and the like.
    pub driver: String,
    pub memory_mib: u32,
    pub vcpus: u32,
    /// When each milestone was reached.
    pub timings: Vec<Timing>,
    pub units: Vec<UnitReport>,
    pub display: Option<DisplayReport>,
    pub memory: MemoryReport,
    /// SHA-256 of the agent that answered.
    pub agent_build: Option<String>,
    /// What was not as it should be, in words.
    pub problems: Vec<String>,
    pub finding: Option<Finding>,
    /// Where the evidence of this boot is.
    pub evidence: Utf8PathBuf,
}

/// One milestone.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Timing {
    pub phase: Phase,
    /// Since the runner's start.
    pub after_ms: u64,
}

impl std::fmt::Display for Verification {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.green { "green" } else { "not green" };
        write!(f, "{}: {verdict} on {}", self.digest.short(), self.driver)?;
        for timing in &self.timings {
            write!(
                f,
                "\n  {:<14?} {:>7.1} s",
                timing.phase,
                Duration::from_millis(timing.after_ms).as_secs_f64()
            )?;
        }
        for problem in &self.problems {
            write!(f, "\n  problem: {problem}")?;
        }
        if let Some(finding) = &self.finding {
            write!(f, "\n  {}: {}", finding.why, finding.fix)?;
        }
        write!(f, "\n  evidence: {}", self.evidence)
    }
}

/// Boots `digest`, looks at what came up, ends the VM, and attaches the report to the image.
///
/// # Errors
/// [`VerifyError`] when nothing could be tried.
pub fn verify(
    store: &Store,
    digest: &ImageDigest,
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<Verification, VerifyError> {
    let manifest = store.manifest(digest)?;
    let _hold = store.hold(digest)?;
    let started = begin(progress, Step::Lint);
    let verdict = lint(store, digest)?;
    end(progress, Step::Lint, started);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|err| VerifyError::Start {
        runner: options.runner.clone(),
        err,
    })?;
    let mut report = runtime.block_on(boot(store, digest, &manifest, options, progress))?;
    if let Some(finding) = verdict.finding {
        // It may have started by luck: the disk says that it need not.
        report.green = false;
        report.problems.push(format!("lint: {}", finding.why));
        report.finding.get_or_insert(finding);
    }
    store.attach(&report)?;
    Ok(report)
}

/// What was seen of one boot.
#[derive(Default)]
struct Seen {
    view: Option<MachineView>,
    report: Option<Report>,
    timings: Vec<Timing>,
    finding: Option<Finding>,
    problems: Vec<String>,
}

async fn boot(
    store: &Store,
    digest: &ImageDigest,
    manifest: &Manifest,
    options: &VerifyOptions,
    progress: &dyn Progress,
) -> Result<Verification, VerifyError> {
    let spec = spec(store, digest, manifest, options.deadline)?;
    let (vm_dir, evidence) = (
        Utf8PathBuf::from(&spec.vm_dir),
        Utf8PathBuf::from(&spec.evidence_dir),
    );
    let started = begin(progress, Step::Boot);
    let log_path = store
        .home()
        .join("vms")
        .join(format!("{}.verify.log", spec.machine_id));
    let mut child = spawn(options, &spec, &log_path).await?;
    let runner = Runner::at(vm_dir.join("runner.sock"));
    let mut seen = Seen::default();
    if let Err(problem) = up(&runner, &mut child).await {
        let said = std::fs::read_to_string(&log_path).unwrap_or_default();
        let last = said.lines().last().unwrap_or("nothing");
        seen.problems
            .push(format!("{problem}; the runner's last words: {last}"));
    } else {
        end(progress, Step::Boot, started);
        let started = begin(progress, Step::Ready);
        let limit = options.deadline + STOP;
        match tokio::time::timeout(limit, watch(&runner, &mut seen, progress)).await {
            Ok(Ok(())) => {}
            Ok(Err(err)) => seen
                .problems
                .push(format!("follow the runner's events: {}", Chain(&err))),
            Err(_) => seen.problems.push(format!(
                "the runner said neither *ready* nor *failed* within {} s",
                limit.as_secs()
            )),
        }
        end(progress, Step::Ready, started);
        let started = begin(progress, Step::Report);
        ask(&runner, &mut seen).await;
        stop(&runner, &mut seen).await;
        end(progress, Step::Report, started);
    }
    finish(&mut child, &mut seen).await;
    let _ = std::fs::remove_file(&log_path);
    seen.judge(manifest);
    Ok(seen.into_report(digest, &spec, evidence))
}

fn begin(progress: &dyn Progress, phase: Step) -> Instant {
    let index = Step::VERIFY
        .iter()
        .position(|one| *one == phase)
        .map_or(0, |index| index + 1);
    progress.event(&Event::PhaseStarted {
        phase,
        index,
        total: Step::VERIFY.len(),
    });
    Instant::now()
}

fn end(progress: &dyn Progress, phase: Step, started: Instant) {
    progress.event(&Event::PhaseDone {
        phase,
        cached: false,
        took: started.elapsed(),
    });
}

fn spec(
    store: &Store,
    digest: &ImageDigest,
    manifest: &Manifest,
    deadline: Duration,
) -> Result<VmSpec, VerifyError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let machine_id = MachineId::generate();
    let directory = |name: &str| store.home().join(name).join(machine_id.to_string());
    let (vm_dir, evidence_dir) = (directory("vms"), directory("evidence"));
    for path in [&vm_dir, &evidence_dir] {
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path);
        made.map_err(|err| VerifyError::Prepare {
            path: path.clone(),
            err,
        })?;
    }
    Ok(VmSpec {
        machine_id,
        session_id: None,
        image_digest: digest.clone(),
        image_dir: store.dir(digest).into_string(),
        driver: DriverChoice::Auto,
        memory_mib: manifest.default_memory_mib,
        vcpus: manifest.default_vcpus,
        vm_dir: vm_dir.into_string(),
        evidence_dir: evidence_dir.into_string(),
        // Nothing leaves: an image needs nobody to start.
        egress: vestibule_api::egress::EgressPolicy::default(),
        boot_deadline_s: u32::try_from(deadline.as_secs()).unwrap_or(u32::MAX),
        console_keep_bytes: CONSOLE,
        idle_deadline_s: None,
        restore: None,
        save_to: None,
    })
}

/// Starts the runner and gives it the specification. It ends with us, should we be killed.
async fn spawn(
    options: &VerifyOptions,
    spec: &VmSpec,
    log: &Utf8PathBuf,
) -> Result<tokio::process::Child, VerifyError> {
    let start = |err| VerifyError::Start {
        runner: options.runner.clone(),
        err,
    };
    let text = serde_json::to_vec(spec).map_err(VerifyError::Describe)?;
    let log = std::fs::File::create(log).map_err(|err| VerifyError::Prepare {
        path: log.clone(),
        err,
    })?;
    let mut command = Command::new(&options.runner);
    command
        .arg("run-vm")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A runner that is gone already says why in its log; its end is seen soon enough.
        let _ = stdin.write_all(&text).await;
    }
    Ok(child)
}

/// Waits until the runner answers on its socket.
async fn up(runner: &Runner, child: &mut tokio::process::Child) -> Result<(), String> {
    let deadline = Instant::now() + SOCKET;
    loop {
        if runner.get::<MachineView>("/machine").await.is_ok() {
            return Ok(());
        }
        if let Ok(Some(status)) = child.try_wait() {
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

/// Follows the runner's events to *ready* or to the end.
async fn watch(runner: &Runner, seen: &mut Seen, progress: &dyn Progress) -> Result<(), CallError> {
    let request = client::json_request(hyper::Method::GET, "/events?after=0", None::<&()>)?;
    let mut body = runner.open(request).await?.into_body();
    let (mut pending, mut first) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|err| CallError::Http {
            what: "GET /events".to_owned(),
            err,
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        pending.extend_from_slice(&data);
        while let Some(at) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=at).collect();
            let event: RunnerEvent =
                serde_json::from_slice(&line).map_err(|err| CallError::Decode {
                    what: "GET /events".to_owned(),
                    err,
                })?;
            let first = *first.get_or_insert(event.at);
            if seen.take(&event, first, progress) {
                return Ok(());
            }
        }
        if pending.len() > LINE {
            seen.problems
                .push("the runner sent an event of more than 1 MiB".to_owned());
            return Ok(());
        }
    }
    Ok(())
}

async fn ask(runner: &Runner, seen: &mut Seen) {
    match runner.get("/machine").await {
        Ok(view) => seen.view = Some(view),
        Err(err) => seen
            .problems
            .push(format!("ask the runner about the VM: {}", Chain(&err))),
    }
    if seen.reached(Phase::AgentUp) {
        match runner.get("/agent/report").await {
            Ok(report) => seen.report = Some(report),
            Err(err) => seen
                .problems
                .push(format!("ask the agent for its report: {}", Chain(&err))),
        }
    }
}

async fn stop(runner: &Runner, seen: &mut Seen) {
    let request = StopRequest {
        reason: "verification".to_owned(),
    };
    let stopped = runner.call::<_, serde_json::Value>(hyper::Method::POST, "/stop", Some(&request));
    match tokio::time::timeout(STOP, stopped).await {
        Ok(Ok(_)) => {}
        // It ended the VM by itself, which the events said.
        Ok(Err(CallError::Connect { .. })) => {}
        Ok(Err(err)) => seen.problems.push(format!("stop the VM: {}", Chain(&err))),
        Err(_) => seen
            .problems
            .push(format!("the VM did not stop within {} s", STOP.as_secs())),
    }
}

async fn finish(child: &mut tokio::process::Child, seen: &mut Seen) {
    if tokio::time::timeout(STOP, child.wait()).await.is_err() {
        seen.problems
            .push("the runner did not end after the VM had".to_owned());
        let _ = child.kill().await;
    }
}

impl Seen {
    /// Notes an event; whether it is the one that decides.
    fn take(&mut self, event: &RunnerEvent, first: Timestamp, progress: &dyn Progress) -> bool {
        match &event.event {
            RunnerEventKind::Phase { phase } => {
                progress.event(&Event::Detail(format!("{phase:?}")));
                self.timings.push(Timing {
                    phase: *phase,
                    after_ms: event.at.micros_since(first) / 1000,
                });
                *phase == Phase::Ready
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
            | RunnerEventKind::Viewers { .. } => false,
        }
    }

    fn reached(&self, phase: Phase) -> bool {
        self.timings.iter().any(|timing| timing.phase == phase)
    }

    /// Holds what was seen against what the manifest promises.
    fn judge(&mut self, manifest: &Manifest) {
        if !self.reached(Phase::Ready) {
            self.problems.push("the VM did not become ready".to_owned());
        }
        let build = self
            .view
            .as_ref()
            .and_then(|view| view.health.as_ref())
            .map(|health| health.build.as_str());
        if let Some(build) = build.filter(|build| *build != manifest.agent_build) {
            self.problems.push(format!(
                "agent {build} answered, the manifest says {}",
                manifest.agent_build
            ));
        }
        let Some(report) = &self.report else {
            self.problems.push("the agent gave no report".to_owned());
            return;
        };
        let mut problems = Vec::new();
        for name in &manifest.required_units {
            match report.units.iter().find(|unit| unit.name == *name) {
                Some(unit) if unit.active == "active" => {}
                Some(unit) => problems.push(format!(
                    "required unit `{name}` is {} ({})",
                    unit.active, unit.sub
                )),
                None => problems.push(format!("required unit `{name}` is not there")),
            }
        }
        for unit in report.units.iter().filter(|unit| unit.active == "failed") {
            problems.push(format!("unit `{}` failed ({})", unit.name, unit.result));
        }
        if manifest.features.iter().any(|feature| feature == "browser") {
            match &report.display {
                Some(display) if display.painted && display.browser_window => {}
                Some(_) => problems.push("the browser's window is not painted".to_owned()),
                None => problems.push("there is no display".to_owned()),
            }
        }
        self.problems.extend(problems);
    }

    fn into_report(
        self,
        digest: &ImageDigest,
        spec: &VmSpec,
        evidence: Utf8PathBuf,
    ) -> Verification {
        let report = self.report.unwrap_or_default();
        let health = self.view.as_ref().and_then(|view| view.health.as_ref());
        Verification {
            digest: digest.clone(),
            green: self.problems.is_empty() && self.finding.is_none(),
            at: Timestamp::now(),
            machine_id: spec.machine_id,
            driver: self
                .view
                .as_ref()
                .map_or_else(|| "none".to_owned(), |view| view.driver.clone()),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            timings: self.timings,
            units: report.units,
            display: report.display,
            memory: report.memory,
            agent_build: health.map(|health| health.build.clone()),
            problems: self.problems,
            finding: self.finding,
            evidence,
        }
    }
}
