//! What the parts of a runner share: the published view, events, logs, the stream, and the queue of requests. Only
//! [`super::life`] changes the state; everyone else reads it, or asks.
use crate::{driver::Spawned, egress::Egress, events::EventLog, jail::Jail, log::BoundedLog};
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use vestibule_api::{
    agent::{AgentEventLine, Health},
    finding::Finding,
    machine::{
        Claim, Disposal, EgressCounters, MachineState, MachineView, RunnerEventKind, Saved,
        StopRequest, VmSpec,
    },
    mux::Mux,
    time::Timestamp,
};

/// Requests and news that wait for the state driver.
pub(super) const QUEUE: usize = 64;

/// The pipes of a process that has ended are empty after this.
const LOG_PATIENCE: Duration = Duration::from_millis(500);

/// What the state driver is told or asked.
#[derive(Debug)]
pub(super) enum Input {
    Claim {
        claim: Box<Claim>,
        reply: oneshot::Sender<Result<MachineView, ClaimError>>,
    },
    Stop {
        request: StopRequest,
        reply: Option<oneshot::Sender<Disposal>>,
    },
    /// Guest and host have authenticated each other.
    StreamUp,
    /// The agent answered with the right build and API. It may not have the host's time yet.
    AgentUp(Box<Health>),
    Agent(Box<AgentEventLine>),
    /// Stop the CPUs, or let them run again.
    Pause(Answer<MachineView>),
    Resume(Answer<MachineView>),
    Snapshot(Answer<Saved>),
    /// The save has ended; with it the VMM, if it went well.
    SaveEnded(Box<Result<Saved, Box<Finding>>>),
    /// The guest is itself and has the host's time.
    Identity,
    /// The stream ended, or did not come up; in words.
    StreamDown(String),
    /// The agent is not one that this host can work with.
    AgentRefused(Box<Finding>),
}

/// Where the answer to a request goes.
pub(super) type Answer<T> = oneshot::Sender<Result<T, Refused>>;

/// Why a request was not carried out.
#[derive(Debug)]
pub(super) enum Refused {
    /// The VM is not in a state for it; in words.
    Conflict(String),
    /// The driver never does it; in words.
    Unable(String),
    Failed(Box<Finding>),
}

impl Refused {
    pub(super) fn conflict(words: impl Into<String>) -> Self {
        Self::Conflict(words.into())
    }
}

/// Why a VM was not given to a session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ClaimError {
    #[error("the VM belongs to another session already")]
    Taken,
    #[error("the VM is ending")]
    Ending,
    #[error("the VM is being saved")]
    Saving,
    #[error("the VM could not be resumed: {0}")]
    Stopped(String),
    #[error("{0}")]
    Policy(String),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    pub spec: VmSpec,
    pub started: Instant,
    pub events: Arc<EventLog>,
    pub console: Arc<BoundedLog>,
    pub vmm_log: Arc<BoundedLog>,
    pub egress: Arc<Egress>,
    /// The stream, while it is up and its agent is accepted.
    pub mux: watch::Sender<Option<Mux>>,
    /// Whether the stream is to be let go and not dialled again: the VM is being saved.
    pub held: watch::Sender<bool>,
    pub inputs: mpsc::Sender<Input>,
    pub activity: Activity,
    /// What the VM has of the host for itself, once it is made, also where no VM comes of it.
    pub jail: OnceLock<Arc<Jail>>,
    /// The VMM's process, once there is one, the same.
    pub spawned: Spawned,
    /// Cancelled when the VM has ended: every task of the runner's ends then.
    pub over: CancellationToken,
    pub tasks: TaskTracker,
    view: watch::Sender<MachineView>,
    viewers: AtomicU32,
    /// Whether somebody has seen the screen.
    seen: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        spec: VmSpec,
        console: Arc<BoundedLog>,
        vmm_log: Arc<BoundedLog>,
        egress: Arc<Egress>,
        events: Arc<EventLog>,
    ) -> (Arc<Self>, mpsc::Receiver<Input>) {
        let (inputs, inbox) = mpsc::channel(QUEUE);
        let view = MachineView {
            machine_id: spec.machine_id,
            session_id: spec.session_id,
            state: MachineState::Creating,
            generation: 1,
            image_digest: spec.image_digest.clone(),
            snapshot_id: spec.restore.as_ref().map(|restore| restore.id.clone()),
            driver: String::from("not chosen yet"),
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            runner_pid: std::process::id(),
            vmm_pid: None,
            started_at: Timestamp::now(),
            ready_at: None,
            health: None,
            viewers: 0,
            egress: EgressCounters::default(),
            failure: None,
        };
        let shared = Self {
            spec,
            started: Instant::now(),
            events,
            console,
            vmm_log,
            egress,
            mux: watch::Sender::new(None),
            held: watch::Sender::new(false),
            inputs,
            activity: Activity::default(),
            jail: OnceLock::new(),
            spawned: Spawned::default(),
            over: CancellationToken::new(),
            tasks: TaskTracker::new(),
            view: watch::Sender::new(view),
            viewers: AtomicU32::new(0),
            seen: AtomicBool::new(false),
        };
        (Arc::new(shared), inbox)
    }

    /// The view with the counters as they are now.
    pub(super) fn view(&self) -> MachineView {
        let mut view = self.view.borrow().clone();
        view.viewers = self.viewers.load(Ordering::Relaxed);
        view.egress = self.egress.counters();
        view
    }

    /// Waits until the VMM's last words are in the logs, for a moment at most.
    pub(super) async fn logs_ended(&self) {
        let (mut console, mut vmm) = (self.console.progress(), self.vmm_log.progress());
        let both = async {
            let _ = console.wait_for(|p| p.ended).await;
            let _ = vmm.wait_for(|p| p.ended).await;
        };
        // A VMM that never started has no pipes, and its logs do not end.
        let _ = tokio::time::timeout(LOG_PATIENCE, both).await;
    }

    /// For the state driver only.
    pub(super) fn update(&self, change: impl FnOnce(&mut MachineView)) {
        self.view.send_modify(change);
    }

    /// Counts a view stream until the guard is dropped.
    pub(super) fn viewer(self: &Arc<Self>) -> Viewer {
        self.viewers_changed(self.viewers.fetch_add(1, Ordering::Relaxed) + 1);
        Viewer(Arc::clone(self))
    }

    /// A frame of the screen went to a viewer; the first one is an event.
    pub(super) fn frame_shown(&self) {
        if !self.seen.swap(true, Ordering::Relaxed) {
            self.events.publish(RunnerEventKind::FirstFrame);
        }
    }

    fn viewers_changed(&self, count: u32) {
        self.events.publish(RunnerEventKind::Viewers { count });
    }
}

/// One open view stream.
#[derive(Debug)]
pub(super) struct Viewer(Arc<Shared>);

impl Drop for Viewer {
    fn drop(&mut self) {
        let before = self.0.viewers.fetch_sub(1, Ordering::Relaxed);
        self.0.viewers_changed(before.saturating_sub(1));
    }
}

/// How many requests are open, and since when there is none: an idle VM is one that nobody asks for.
#[derive(Debug)]
pub(super) struct Activity(watch::Sender<(u32, Instant)>);

impl Default for Activity {
    fn default() -> Self {
        Self(watch::Sender::new((0, Instant::now())))
    }
}

impl Activity {
    /// Marks one request as open until the guard is dropped.
    pub(super) fn begin(self: &Activity) -> Busy {
        self.0.send_modify(|(open, _)| *open += 1);
        Busy(self.0.clone())
    }

    /// Since when nobody asked; none while somebody does.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let (open, since) = *self.0.borrow();
        (open == 0).then_some(since)
    }
}

/// An open request.
#[derive(Debug)]
pub(super) struct Busy(watch::Sender<(u32, Instant)>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.send_modify(|(open, since)| {
            *open -= 1;
            *since = Instant::now();
        });
    }
}
