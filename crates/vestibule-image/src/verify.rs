//! The boot gate: an image proves itself by starting, under the runner that people get, over HTTP like everyone.
//!
//! Green means: the disk shows nothing that could not start, the runner said *ready*, every required unit is active and none failed, the browser is painted where the
//! image has one, and the agent that answered is the one that the manifest names. The report stays beside the image,
//! and only a green one lets an alias point there.
use crate::{
    boot::{self, BootError, BootOptions, Seen, Timing, Vm},
    lint::{LintError, lint},
    progress::{Phase as Step, Progress, Steps},
    store::{Store, StoreError},
};
use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vestibule_api::{
    agent::{DisplayReport, MemoryReport, Report, UnitReport},
    error::Chain,
    finding::{Finding, Verdict},
    ids::{ImageDigest, MachineId, ProviderId},
    image::Manifest,
    machine::{MachineView, Phase, VmSpec},
    session::SessionState,
    time::Timestamp,
};

/// Why there is no report. That an image is not as it should be is a report, not an error.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Lint(#[from] LintError),
    #[error(transparent)]
    Boot(#[from] BootError),
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
    /// A complete sign-in with each pack that the image claims; empty where none was tried.
    #[serde(default)]
    pub sign_ins: Vec<SignIn>,
}

/// How a sign-in at a test identity provider ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SignIn {
    pub provider: ProviderId,
    pub state: SessionState,
    /// From the request to the end.
    pub took_ms: u64,
    pub finding: Option<Finding>,
}

impl SignIn {
    /// Whether the credential was sealed.
    pub fn completed(&self) -> bool {
        self.state == SessionState::Completed
    }

    /// Why it was not completed, on one line.
    fn shortcoming(&self) -> Option<String> {
        let why = self
            .finding
            .as_ref()
            .map_or_else(|| self.state.id().to_owned(), cause_and_why);
        (!self.completed()).then(|| format!("sign-in with `{}`: {why}", self.provider))
    }
}

impl std::fmt::Display for SignIn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:<14} {:>7.1} s  {}",
            self.provider.as_str(),
            Duration::from_millis(self.took_ms).as_secs_f64(),
            self.state.id()
        )
    }
}

impl Verification {
    /// Adds sign-ins: one that was not completed is a problem like any other.
    pub fn add_sign_ins(&mut self, sign_ins: Vec<SignIn>) {
        let failed = sign_ins.iter().filter_map(SignIn::shortcoming);
        self.problems.extend(failed);
        self.green &= sign_ins.iter().all(SignIn::completed);
        self.sign_ins = sign_ins;
    }

    /// What was not as it should be, the cause first, on one line.
    pub fn shortcomings(&self) -> String {
        let finding = self.finding.as_ref();
        let cause = finding.map(cause_and_why);
        let problems: Vec<_> = cause.into_iter().chain(self.problems.clone()).collect();
        problems.join("; ")
    }
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
        for sign_in in &self.sign_ins {
            write!(f, "\n  {sign_in}")?;
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
pub async fn verify(
    store: &Store,
    digest: &ImageDigest,
    options: &BootOptions,
    progress: &dyn Progress,
) -> Result<Verification, VerifyError> {
    let manifest = store.manifest(digest)?;
    let _hold = store.hold(digest)?;
    let steps = Steps {
        progress,
        phases: &Step::VERIFY,
    };
    let size = (manifest.default_memory_mib, manifest.default_vcpus);
    let mut gate = Gate::open(store, digest, manifest, steps)?;
    let spec = boot::spec(store, digest, size, options)?;
    let log_path = store
        .home()
        .join("vms")
        .join(format!("{}.verify.log", spec.machine_id));
    let log = std::fs::File::create(&log_path).map_err(|err| BootError::Prepare {
        path: log_path.clone(),
        err,
    })?;
    let mut vm = Vm::start(options, &spec, log, &log_path).await?;
    if vm.up(Phase::Ready, steps).await {
        gate.ask(&mut vm, steps).await;
        vm.stop("verification").await;
    }
    let seen = vm.ended().await;
    let _ = std::fs::remove_file(&log_path);
    let report = gate.report(&seen, &spec);
    store.attach(&report)?;
    Ok(report)
}

/// What an image must show: its disk before it boots, and then one VM of it, which its caller boots and ends.
pub(crate) struct Gate {
    manifest: Manifest,
    digest: ImageDigest,
    lint: Verdict,
    view: Option<MachineView>,
    report: Option<Report>,
}

impl Gate {
    /// Reads the disk.
    pub(crate) fn open(
        store: &Store,
        digest: &ImageDigest,
        manifest: Manifest,
        steps: Steps<'_>,
    ) -> Result<Self, LintError> {
        let linting = steps.begin(Step::Lint);
        let lint = lint(store, digest)?;
        linting.done(false);
        Ok(Self {
            manifest,
            digest: digest.clone(),
            lint,
            view: None,
            report: None,
        })
    }

    /// Asks runner and agent of a VM that is up.
    pub(crate) async fn ask(&mut self, vm: &mut Vm<'_>, steps: Steps<'_>) {
        let asking = steps.begin(Step::Report);
        match vm.runner.get("/machine").await {
            Ok(view) => self.view = Some(view),
            Err(err) => vm
                .seen
                .problems
                .push(format!("ask the runner about the VM: {}", Chain(&err))),
        }
        if vm.seen.reached(Phase::AgentUp) {
            match vm.runner.get("/agent/report").await {
                Ok(report) => self.report = Some(report),
                Err(err) => vm
                    .seen
                    .problems
                    .push(format!("ask the agent for its report: {}", Chain(&err))),
            }
        }
        asking.done(false);
    }

    /// What was seen so far, held against what the manifest promises.
    pub(crate) fn report(&self, seen: &Seen, spec: &VmSpec) -> Verification {
        let mut problems = seen.problems.clone();
        problems.extend(self.shortcomings(seen));
        let mut finding = seen.finding.clone();
        if let Some(found) = &self.lint.finding {
            // It may have started by luck: the disk says that it need not.
            problems.push(format!("lint: {}", found.why));
            finding.get_or_insert_with(|| found.clone());
        }
        let report = self.report.clone().unwrap_or_default();
        let health = self.view.as_ref().and_then(|view| view.health.as_ref());
        Verification {
            digest: self.digest.clone(),
            green: problems.is_empty() && finding.is_none(),
            at: Timestamp::now(),
            machine_id: spec.machine_id,
            driver: self
                .view
                .as_ref()
                .map_or_else(|| "none".to_owned(), |view| view.driver.clone()),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            timings: seen.timings.clone(),
            units: report.units,
            display: report.display,
            memory: report.memory,
            agent_build: health.map(|health| health.build.clone()),
            problems,
            finding,
            evidence: spec.evidence_dir.clone().into(),
            sign_ins: Vec::new(),
        }
    }

    fn shortcomings(&self, seen: &Seen) -> Vec<String> {
        let mut problems = Vec::new();
        if !seen.reached(Phase::Ready) {
            problems.push("the VM did not become ready".to_owned());
        }
        let build = self
            .view
            .as_ref()
            .and_then(|view| view.health.as_ref())
            .map(|health| health.build.as_str());
        if let Some(build) = build.filter(|build| *build != self.manifest.agent_build) {
            problems.push(format!(
                "agent {build} answered, the manifest says {}",
                self.manifest.agent_build
            ));
        }
        match &self.report {
            Some(report) => problems.extend(shortcomings(report, &self.manifest)),
            None => problems.push("the agent gave no report".to_owned()),
        }
        problems
    }
}

fn cause_and_why(finding: &Finding) -> String {
    format!("{}: {}", finding.cause, finding.why)
}

/// What of the manifest's promises the agent's report does not show.
fn shortcomings(report: &Report, manifest: &Manifest) -> Vec<String> {
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
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Verification {
        let json = serde_json::json!({
            "digest": "a".repeat(64), "green": true, "at": "2026-11-26T00:00:00Z", "driver": "qemu/tcg",
            "machineId": MachineId::generate(), "memoryMib": 2048, "vcpus": 2, "timings": [], "units": [],
            "display": null, "memory": {}, "agentBuild": null, "problems": [], "finding": null, "evidence": "/e",
        });
        // One that was written before there were sign-ins has none.
        serde_json::from_value(json).unwrap()
    }

    fn sign_in(state: SessionState) -> SignIn {
        SignIn {
            provider: "codex".parse().unwrap(),
            state,
            took_ms: 12_300,
            finding: None,
        }
    }

    #[test]
    fn one_sign_in_that_does_not_complete_makes_the_image_not_green() {
        let mut all = report();
        all.add_sign_ins(vec![sign_in(SessionState::Completed)]);
        assert!(all.green && all.problems.is_empty());
        let mut one = report();
        one.add_sign_ins(vec![
            sign_in(SessionState::Completed),
            sign_in(SessionState::Failed),
        ]);
        assert!(!one.green);
        assert_eq!(one.problems, ["sign-in with `codex`: failed"]);
        assert!(one.to_string().contains("12.3 s  failed"), "{one}");
        // Green is what the boot showed, too.
        let mut red = report();
        red.green = false;
        red.add_sign_ins(vec![sign_in(SessionState::Completed)]);
        assert!(!red.green);
    }
}
