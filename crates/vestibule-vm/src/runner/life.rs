//! The state driver: the one task that changes the VM's state. Everything that happens reaches it as an [`Input`], an
//! exit or a deadline; it answers with a change of the published view and an event.
//!
//! ```text
//! Creating ──launched──▶ Booting ──agent ready──▶ Up ──┐
//!     │              │                     │ ▲
//!     │              │               pause ▼ │ resume
//!     │              │                    Paused
//!     └───────────────────────┴───────────────────────┴──asked, failed or exited──▶ Stopping ──▶ Gone
//! ```
use super::{
    findings::{self, Progress},
    finish, link,
    prepare::Prepared,
    save::{self, Unfinished},
    shared::{Answer, ClaimError, Input, Refused, Shared},
    start::{self, NotStarted, Started},
};
use crate::{
    driver::{Capabilities, Machine, MachineError},
    image::Image,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};
use vestibule_api::{
    agent::{AgentEvent, Health, HealthStatus},
    error::Chain,
    finding::Finding,
    machine::{Claim, Disposal, Exit, MachineState, MachineView, Phase, RunnerEventKind, Saved},
    time::Timestamp,
};

/// An agent that restarts (systemd does that) is back within this.
const STREAM_GRACE: Duration = Duration::from_secs(60);

/// A resumed guest answers at once, or soon on a host with too much to do. One that does not is nobody's.
const RESUME_CLOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// How often refusals that were held back are looked at.
const EGRESS_TICK: Duration = Duration::from_secs(5);

/// Why a VM's life ends.
pub(super) enum End {
    Asked(String),
    Failed { finding: Box<Finding>, exit: Exit },
}

impl End {
    fn failed(finding: Finding) -> Self {
        Self::Failed {
            finding: Box::new(finding),
            exit: Exit::default(),
        }
    }
}

impl From<NotStarted> for End {
    fn from(not: NotStarted) -> Self {
        Self::Failed {
            finding: Box::new(not.finding),
            exit: not.exit,
        }
    }
}

/// See the module.
pub(super) struct Life {
    pub shared: Arc<Shared>,
    pub inbox: mpsc::Receiver<Input>,
    pub machine: Option<Arc<dyn Machine>>,
    pub capabilities: Option<Capabilities>,
    /// The VMM's command line, also of one that died at once.
    pub command_line: Vec<String>,
    /// The guest kernel's; none of one that never ran.
    pub kernel_cmdline: Option<String>,
    /// Callers of `POST /stop`, answered when nothing is left.
    pub stops: Vec<oneshot::Sender<Disposal>>,
    pub image: Option<Image>,
    /// The one that the VM's way out was opened by.
    pub claim: Option<Claim>,
    /// The directory that a save fills.
    pub unfinished: Option<Unfinished>,
    snapshot: Option<std::fs::File>,
    /// Who asked for a save that is under way.
    saving: Option<Answer<Saved>>,
    identity: bool,
    progress: Progress,
    /// Since when the stream of a VM that was up is gone.
    lost: Option<(Instant, String)>,
}

impl Life {
    pub(super) fn new(shared: Arc<Shared>, inbox: mpsc::Receiver<Input>) -> Self {
        Self {
            shared,
            inbox,
            machine: None,
            capabilities: None,
            command_line: Vec::new(),
            kernel_cmdline: None,
            stops: Vec::new(),
            unfinished: None,
            snapshot: None,
            saving: None,
            identity: false,
            image: None,
            claim: None,
            progress: Progress::default(),
            lost: None,
        }
    }

    /// Lives one VM's life, from *creating* to *gone*.
    pub(super) async fn live(mut self, prepared: Prepared) -> Exit {
        self.publish(RunnerEventKind::State {
            state: MachineState::Creating,
            generation: 1,
        });
        let end = match self.create(prepared).await {
            Ok(machine) => self.watch(&machine).await,
            Err(end) => end,
        };
        finish::finish(self, end).await
    }

    async fn create(&mut self, prepared: Prepared) -> Result<Arc<dyn Machine>, End> {
        let shared = Arc::clone(&self.shared);
        let starting = start::start(&shared, prepared);
        tokio::pin!(starting);
        let started = loop {
            tokio::select! {
                started = &mut starting => break started,
                Some(input) = self.inbox.recv() => {
                    if let Some(end) = self.take(input).await {
                        return Err(end);
                    }
                }
            }
        };
        let started = started.map_err(|not| {
            self.command_line.clone_from(&not.command_line);
            End::from(not)
        })?;
        let Started {
            image,
            machine,
            capabilities,
            key,
            unfinished,
            snapshot,
        } = started;
        self.shared.update(|view| {
            view.driver.clone_from(&capabilities.driver);
            view.vmm_pid = Some(machine.pid());
        });
        self.command_line = machine.command_line().to_vec();
        self.kernel_cmdline = Some(machine.kernel_cmdline().to_owned());
        self.unfinished = unfinished;
        self.snapshot = snapshot;
        let agent_build = image.manifest.agent_build.clone();
        self.image = Some(image);
        self.machine = Some(Arc::clone(&machine));
        self.capabilities = Some(capabilities);
        self.phase(Phase::VmmStarted);
        if self.snapshot.is_some() {
            self.phase(Phase::Restored);
            machine
                .resume()
                .await
                .map_err(|err| End::failed(findings::host(&err)))?;
            self.phase(Phase::Resumed);
        }
        // A VMM ends with its runner, marked or not, so the guest need not wait for the mark.
        super::name_processes(
            self.shared.spec.vm_dir.as_str().into(),
            Some(machine.group()),
        );
        let link = link::Link::new(
            Arc::clone(&self.shared),
            Arc::clone(&machine),
            key,
            agent_build,
        );
        self.shared.tasks.spawn(link.run());
        self.shared.tasks.spawn(tick(Arc::clone(&self.shared)));
        self.enter(MachineState::Booting);
        Ok(machine)
    }

    async fn watch(&mut self, machine: &Arc<dyn Machine>) -> End {
        let exited = machine.wait();
        tokio::pin!(exited);
        let mut console = self.shared.console.progress();
        loop {
            let silent = !self.progress.kernel_output;
            let deadline = self.next_deadline();
            tokio::select! {
                // A save ends the VMM, and tells what came of it.
                exit = &mut exited, if self.saving.is_none() => {
                    self.shared.logs_ended().await;
                    let finding = Box::new(findings::vmm_gone(&exit, &self.shared));
                    return End::Failed { finding, exit };
                }
                Ok(_) = console.wait_for(|p| p.total > 0), if silent => {
                    self.progress.kernel_output = true;
                    self.phase(Phase::KernelOutput);
                }
                Some(input) = self.inbox.recv() => {
                    if let Some(end) = self.take(input).await {
                        return end;
                    }
                }
                () = sleep_until(deadline) => {
                    if let Some(end) = self.on_deadline() {
                        return end;
                    }
                }
            }
        }
    }

    async fn take(&mut self, input: Input) -> Option<End> {
        match input {
            Input::Claim { claim, reply } => {
                // Who asked may have gone away; the claim holds all the same.
                let _ = reply.send(self.claim(*claim).await);
            }
            Input::Stop { request, reply } => {
                self.stops.extend(reply);
                return Some(End::Asked(request.reason));
            }
            Input::Pause(reply) => drop(reply.send(self.pause().await)),
            Input::Resume(reply) => drop(reply.send(self.resume().await)),
            Input::Snapshot(reply) => self.save(reply),
            Input::SaveEnded(result) => return Some(self.save_ended(*result)),
            Input::Identity => {
                if !std::mem::replace(&mut self.identity, true) && self.snapshot.is_some() {
                    self.phase(Phase::Identity);
                }
                self.ready_if_all_is();
            }
            Input::StreamUp => {
                self.progress.stream_up = true;
                self.phase(Phase::StreamUp);
            }
            Input::AgentUp(health) => self.agent_up(*health),
            Input::Agent(line) => {
                self.agent_says(&line.event);
                self.publish(RunnerEventKind::Agent { event: line.event });
                self.ready_if_all_is();
            }
            Input::StreamDown(words) => {
                tracing::debug!(why = words, "there is no stream to the agent");
                let expected = self.saving.is_some();
                if self.state() == MachineState::Up && self.lost.is_none() && !expected {
                    self.lost = Some((Instant::now(), words.clone()));
                }
                self.progress.stream = Some(words);
            }
            Input::AgentRefused(finding) => return Some(End::failed(*finding)),
        }
        None
    }

    /// The same session may claim again: a controller that was killed does not know whether it did.
    async fn claim(&mut self, claim: Claim) -> Result<MachineView, ClaimError> {
        if self.saving.is_some() {
            return Err(ClaimError::Saving);
        }
        let owner = self.shared.view().session_id;
        if owner.is_some_and(|owner| owner != claim.session_id) {
            return Err(ClaimError::Taken);
        }
        self.shared
            .egress
            .set_policy(&claim.egress)
            .map_err(|err| ClaimError::Policy(err.to_string()))?;
        self.shared
            .update(|view| view.session_id = Some(claim.session_id));
        self.claim = Some(claim);
        if self.state() == MachineState::Paused {
            match self.resume().await {
                Ok(_) => {}
                Err(Refused::Conflict(words) | Refused::Unable(words)) => {
                    return Err(ClaimError::Stopped(words));
                }
                Err(Refused::Failed(finding)) => return Err(ClaimError::Stopped(finding.why)),
            }
        }
        Ok(self.shared.view())
    }

    /// The VM's machine, where its state is one of those that can be paused and resumed.
    fn pausable(&self, what: &str) -> Result<Arc<dyn Machine>, Refused> {
        let state = self.state();
        match (&self.machine, state) {
            (Some(machine), MachineState::Up | MachineState::Paused) if self.saving.is_none() => {
                Ok(Arc::clone(machine))
            }
            (Some(_), MachineState::Up | MachineState::Paused) => {
                Err(Refused::conflict("the VM is being saved"))
            }
            (_, _) => Err(Refused::Conflict(format!(
                "only a VM that is up can be {what}; this one is {state:?}"
            ))),
        }
    }

    /// A VM that is somebody's is not paused: whoever keeps VMs in stock may ask late.
    async fn pause(&mut self) -> Result<MachineView, Refused> {
        let machine = self.pausable("paused")?;
        if self.claim.is_some() {
            return Err(Refused::conflict("the VM was claimed by a session"));
        }
        if self.state() == MachineState::Up {
            // The way that a resume takes is gone once: an emulator then has it translated when somebody waits for it.
            self.set_clock().await?;
            machine.pause().await.map_err(|err| match err {
                MachineError::Unsafe { .. } => Refused::Unable(err.to_string()),
                MachineError::Control { .. } | MachineError::Dial(_) | MachineError::Save(_) => {
                    Refused::Failed(Box::new(findings::host(&err)))
                }
            })?;
            self.enter(MachineState::Paused);
        }
        Ok(self.shared.view())
    }

    /// The guest's clock stood still while it was paused; it is right again before anybody is told, or the VM stays paused.
    async fn resume(&mut self) -> Result<MachineView, Refused> {
        let machine = self.pausable("resumed")?;
        if self.state() == MachineState::Paused {
            let resumed = machine.resume().await;
            resumed.map_err(|err| Refused::Failed(Box::new(findings::host(&err))))?;
            self.phase(Phase::Resumed);
            if let Err(refused) = self.set_clock().await {
                // It is paused, as before: whoever asks again gets this answer again, or a VM that answers.
                let paused = machine.pause().await;
                paused.map_err(|err| Refused::Failed(Box::new(findings::host(&err))))?;
                return Err(refused);
            }
            self.enter(MachineState::Up);
        }
        Ok(self.shared.view())
    }

    /// Gives the guest the host's time, by a stream that may have to come up again first, or says why it has not got it.
    async fn set_clock(&self) -> Result<(), Refused> {
        let mut stream = self.shared.mux.subscribe();
        let set = async {
            let mux = match stream.wait_for(Option::is_some).await {
                Ok(mux) => mux.clone(),
                Err(_) => None,
            };
            let mux = mux.ok_or_else(|| String::from("the stream has ended"))?;
            let set = link::set_clock(&mux).await;
            set.map_err(|err| Chain(&err).to_string())
        };
        let set = tokio::time::timeout(RESUME_CLOCK_TIMEOUT, set).await;
        set.unwrap_or_else(|_| Err(format!("no answer within {RESUME_CLOCK_TIMEOUT:?}")))
            .map_err(|words| Refused::Failed(Box::new(findings::silent(&words, &self.shared))))
    }

    /// Begins to save, or says why not.
    fn save(&mut self, reply: Answer<Saved>) {
        let refuse = |words: &str, reply: Answer<Saved>| {
            // Who asked may have gone away.
            let _ = reply.send(Err(Refused::conflict(words)));
        };
        let (Some(unfinished), Some(machine)) = (&self.unfinished, &self.machine) else {
            return refuse(
                "the VM was not made to be saved: `saveTo` says where to",
                reply,
            );
        };
        if self.saving.is_some() {
            return refuse("the VM is being saved already", reply);
        }
        if self.shared.view().session_id.is_some() {
            return refuse(
                "the VM belongs to a session; what is saved is nobody's",
                reply,
            );
        }
        if self.state() != MachineState::Up {
            return refuse("only a VM that is up can be saved", reply);
        }
        let (shared, machine) = (Arc::clone(&self.shared), Arc::clone(machine));
        let directory = unfinished.path().to_owned();
        self.saving = Some(reply);
        tokio::spawn(async move {
            let inputs = shared.inputs.clone();
            let over = shared.over.clone();
            let saved = tokio::select! {
                saved = save::save(shared, machine, directory) => saved,
                () = over.cancelled() => return,
            };
            // Nobody listens when the VM was ended meanwhile.
            let _ = inputs.send(Input::SaveEnded(Box::new(saved))).await;
        });
    }

    fn save_ended(&mut self, result: Result<Saved, Box<Finding>>) -> End {
        let (answer, end) = match result {
            Ok(saved) => {
                if let Some(unfinished) = &mut self.unfinished {
                    unfinished.keep();
                }
                let end = End::Asked(format!("saved as the snapshot {}", saved.id));
                (Ok(saved), end)
            }
            Err(finding) => {
                let end = End::failed((*finding).clone());
                (Err(Refused::Failed(finding)), end)
            }
        };
        if let Some(reply) = self.saving.take() {
            // Who asked may have gone away; the snapshot is there all the same.
            let _ = reply.send(answer);
        }
        end
    }

    fn agent_up(&mut self, health: Health) {
        self.lost = None;
        self.progress.agent_up = true;
        self.progress.waiting_for.clone_from(&health.waiting_for);
        self.progress.agent_ready |= health.status == HealthStatus::Ready;
        self.shared.update(|view| view.health = Some(health));
        self.phase(Phase::AgentUp);
    }

    fn agent_says(&mut self, event: &AgentEvent) {
        match event {
            AgentEvent::Starting { waiting_for } => {
                self.progress.waiting_for.clone_from(waiting_for);
            }
            AgentEvent::Painted { .. } => {
                if !std::mem::replace(&mut self.progress.painted, true) {
                    self.phase(Phase::Painted);
                }
            }
            AgentEvent::Ready { health } => {
                self.progress.agent_ready = true;
                self.shared
                    .update(|view| view.health = Some(health.clone()));
            }
            AgentEvent::Unit { unit } => self.progress.unit = Some(unit.clone()),
            AgentEvent::Login { .. } | AgentEvent::BrowserRestarted => {}
        }
    }

    /// *Ready* is an agent of the right build that says so, in a guest that is itself and has the host's time, and, where the image has a
    /// screen, a painted frame.
    fn ready_if_all_is(&mut self) {
        let display = self.image.as_ref().is_some_and(Image::has_display);
        let ready = self.progress.agent_up
            && self.identity
            && self.progress.agent_ready
            && (self.progress.painted || !display);
        if ready && self.state() == MachineState::Booting {
            self.shared
                .update(|view| view.ready_at = Some(Timestamp::now()));
            self.phase(Phase::Ready);
            self.enter(MachineState::Up);
        }
    }

    /// When to look at the deadlines again.
    fn next_deadline(&self) -> Option<Instant> {
        let boot = (self.state() == MachineState::Booting).then(|| self.boot_deadline());
        let grace = self.lost.as_ref().map(|(since, _)| *since + STREAM_GRACE);
        let idle = self.idle_deadline();
        [boot, grace, idle].into_iter().flatten().min()
    }

    fn boot_deadline(&self) -> Instant {
        self.shared.started + Duration::from_secs(self.shared.spec.boot_deadline_s.into())
    }

    fn idle_deadline(&self) -> Option<Instant> {
        let allowed = Duration::from_secs(self.shared.spec.idle_deadline_s?.into());
        let since = self.shared.activity.idle_since();
        Some(since.unwrap_or_else(Instant::now) + allowed)
    }

    fn on_deadline(&self) -> Option<End> {
        let now = Instant::now();
        if self.state() == MachineState::Booting && now >= self.boot_deadline() {
            return Some(End::failed(findings::deadline(
                &self.progress,
                &self.shared,
            )));
        }
        if let Some((since, words)) = &self.lost
            && now >= *since + STREAM_GRACE
        {
            return Some(End::failed(findings::stream_lost(words, &self.shared)));
        }
        let idle = self.idle_deadline().is_some_and(|deadline| now >= deadline);
        idle.then(|| {
            End::Asked(String::from(
                "idle: nobody asked for the VM before its idle deadline",
            ))
        })
    }

    fn state(&self) -> MachineState {
        self.shared.view().state
    }

    pub(super) fn enter(&self, state: MachineState) {
        self.shared.update(|view| {
            view.state = state;
            view.generation += 1;
        });
        let generation = self.shared.view().generation;
        tracing::info!(machine.id = %self.shared.spec.machine_id, ?state, generation, "the VM's state");
        self.publish(RunnerEventKind::State { state, generation });
    }

    fn phase(&self, phase: Phase) {
        let elapsed_ms =
            u64::try_from(self.shared.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(machine.id = %self.shared.spec.machine_id, ?phase, elapsed_ms, "a milestone");
        self.publish(RunnerEventKind::Phase { phase });
    }

    pub(super) fn publish(&self, event: RunnerEventKind) {
        self.shared.events.publish(event);
    }
}

/// Lets refusals that were held back become events.
async fn tick(shared: Arc<Shared>) {
    let mut interval = tokio::time::interval(EGRESS_TICK);
    loop {
        tokio::select! {
            () = shared.over.cancelled() => return,
            _ = interval.tick() => shared.egress.tick(),
        }
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
