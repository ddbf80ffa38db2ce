//! The state driver: the one task that changes the VM's state. Everything that happens reaches it as an [`Input`], an
//! exit or a deadline; it answers with a change of the published view and an event.
//!
//! ```text
//! Creating ──launched──▶ Booting ──agent ready──▶ Up ──┐
//!     └───────────────────────┴───────────────────────┴──asked, failed or exited──▶ Stopping ──▶ Gone
//! ```
use super::{
    findings::{self, Progress},
    finish, link,
    shared::{ClaimError, Input, Shared},
    start::{self, NotStarted, Started},
};
use crate::{
    driver::{Capabilities, Machine},
    image::Image,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};
use vestibule_api::{
    agent::{AgentEvent, Health, HealthStatus},
    finding::Finding,
    machine::{Claim, Disposal, Exit, MachineState, MachineView, Phase, RunnerEventKind},
    time::Timestamp,
};

/// An agent that restarts (systemd does that) is back within this.
const STREAM_GRACE: Duration = Duration::from_secs(60);

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
    /// Callers of `POST /stop`, answered when nothing is left.
    pub stops: Vec<oneshot::Sender<Disposal>>,
    pub image: Option<Image>,
    /// The one that the VM's way out was opened by.
    pub claim: Option<Claim>,
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
            stops: Vec::new(),
            image: None,
            claim: None,
            progress: Progress::default(),
            lost: None,
        }
    }

    /// Lives one VM's life, from *creating* to *gone*.
    pub(super) async fn live(mut self) -> Exit {
        self.publish(RunnerEventKind::State {
            state: MachineState::Creating,
            generation: 1,
        });
        let end = match self.create().await {
            Ok(machine) => self.watch(&machine).await,
            Err(end) => end,
        };
        finish::finish(self, end).await
    }

    async fn create(&mut self) -> Result<Arc<dyn Machine>, End> {
        let shared = Arc::clone(&self.shared);
        let starting = start::start(&shared);
        tokio::pin!(starting);
        let started = loop {
            tokio::select! {
                started = &mut starting => break started,
                Some(input) = self.inbox.recv() => {
                    if let Some(end) = self.take(input) {
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
        } = started;
        self.shared.update(|view| {
            view.driver.clone_from(&capabilities.driver);
            view.vmm_pid = Some(machine.pid());
        });
        let link = link::Link::new(
            Arc::clone(&self.shared),
            Arc::clone(&machine),
            key,
            image.manifest.agent_build.clone(),
        );
        self.shared.tasks.spawn(link.run());
        self.shared.tasks.spawn(tick(Arc::clone(&self.shared)));
        self.command_line = machine.command_line().to_vec();
        self.image = Some(image);
        self.machine = Some(Arc::clone(&machine));
        self.capabilities = Some(capabilities);
        self.phase(Phase::VmmStarted);
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
                exit = &mut exited => {
                    self.shared.logs_ended().await;
                    let finding = Box::new(findings::vmm_gone(&exit, &self.shared));
                    return End::Failed { finding, exit };
                }
                Ok(_) = console.wait_for(|p| p.total > 0), if silent => {
                    self.progress.kernel_output = true;
                    self.phase(Phase::KernelOutput);
                }
                Some(input) = self.inbox.recv() => {
                    if let Some(end) = self.take(input) {
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

    fn take(&mut self, input: Input) -> Option<End> {
        match input {
            Input::Claim { claim, reply } => {
                // Who asked may have gone away; the claim holds all the same.
                let _ = reply.send(self.claim(*claim));
            }
            Input::Stop { request, reply } => {
                self.stops.extend(reply);
                return Some(End::Asked(request.reason));
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
                if self.state() == MachineState::Up && self.lost.is_none() {
                    self.lost = Some((Instant::now(), words.clone()));
                }
                self.progress.stream = Some(words);
            }
            Input::AgentRefused(finding) => return Some(End::failed(*finding)),
        }
        None
    }

    /// The same session may claim again: a controller that was killed does not know whether it did.
    fn claim(&mut self, claim: Claim) -> Result<MachineView, ClaimError> {
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
        Ok(self.shared.view())
    }

    fn agent_up(&mut self, health: Health) {
        self.lost = None;
        self.progress.agent_up = true;
        self.progress.waiting_for.clone_from(&health.waiting_for);
        self.progress.agent_ready |= health.status == HealthStatus::Ready;
        self.shared.update(|view| view.health = Some(health));
        self.phase(Phase::AgentUp);
        self.ready_if_all_is();
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

    /// *Ready* is an agent of the right build that says so and, where the image has a screen, a painted frame.
    fn ready_if_all_is(&mut self) {
        let display = self.image.as_ref().is_some_and(Image::has_display);
        let ready = self.progress.agent_up
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
