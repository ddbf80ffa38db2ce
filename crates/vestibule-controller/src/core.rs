//! What every part of the controller shares.
use crate::{
    auth::Access,
    clock::Clock,
    config::Config,
    images::Images,
    lease::Lease,
    live::Live,
    metrics::Metrics,
    oidc::Oidc,
    packs::Packs,
    peers::Peers,
    people::limits::Limits,
    reconcile::{Statuses, Stock},
    scheduler::Scheduler,
    store::Store,
};
use camino::Utf8PathBuf;
use std::sync::Arc;
use tokio::task::JoinError;
use vestibule_api::{client::Runner, ids::MachineId, time::Timestamp};
use vestibule_vault::Vault;

/// Shared by handlers and reconcilers; cheap to clone.
pub(crate) type Shared = Arc<Core>;

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) clock: Clock,
    pub(crate) config: Config,
    pub(crate) store: Store,
    /// By which this controller acts for its host.
    pub(crate) lease: Lease,
    pub(crate) peers: Peers,
    pub(crate) vault: Arc<Vault>,
    pub(crate) packs: Packs,
    pub(crate) images: Images,
    pub(crate) scheduler: Arc<dyn Scheduler>,
    pub(crate) access: Access,
    /// The identity provider at which people sign in to the dashboard.
    pub(crate) oidc: Option<Oidc>,
    /// Where links to the dashboard lead.
    pub(crate) base: String,
    /// The content security policy of every page.
    pub(crate) policy: String,
    pub(crate) limits: Limits,
    pub(crate) live: Live,
    pub(crate) statuses: Statuses,
    pub(crate) stock: Stock,
    /// Held by whoever counts places and takes one.
    pub(crate) places: tokio::sync::Mutex<()>,
    /// When this controller started.
    pub(crate) started_at: Timestamp,
    pub(crate) metrics: Metrics,
    /// Becomes true when the controller stops: what serves for long ends then.
    pub(crate) stopping: tokio::sync::watch::Receiver<bool>,
}

impl Core {
    /// The runner's own directory of a VM.
    pub(crate) fn vm_dir(&self, id: MachineId) -> Utf8PathBuf {
        self.config.home.join("vms").join(id.to_string())
    }

    /// Where a VM's evidence bundle is.
    pub(crate) fn evidence_dir(&self, id: MachineId) -> Utf8PathBuf {
        self.config.home.join("evidence").join(id.to_string())
    }

    /// The runner of a VM, whether it lives or not.
    pub(crate) fn runner(&self, id: MachineId) -> Runner {
        Runner::at(self.vm_dir(id).join("runner.sock"))
    }

    /// Whether a runner answers, or its process (or one that it left) still lives.
    pub(crate) async fn runner_alive(&self, id: MachineId) -> bool {
        let scheduler = Arc::clone(&self.scheduler);
        // Where it can't be asked, nobody is declared dead.
        let alive = off_runtime(move || scheduler.alive(id))
            .await
            .unwrap_or(true);
        alive || self.runner(id).dial().await.is_ok()
    }

    /// The time, for rows.
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Whether the controller is about to stop.
    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }
}

/// Runs blocking work (files, the vault) off the runtime's threads.
///
/// # Errors
/// When the work panicked or the runtime stops.
pub(crate) async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    tokio::task::spawn_blocking(work).await
}

/// Resolves when the controller is about to stop.
pub(crate) async fn stopped(mut stopping: tokio::sync::watch::Receiver<bool>) {
    // An error means that the sender is gone: that is the end as well.
    drop(stopping.wait_for(|stop| *stop).await);
}
