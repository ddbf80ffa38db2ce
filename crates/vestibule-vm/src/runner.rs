//! The runner: one process that owns one VM, from its specification to its disposal receipt.
//!
//! | part | what it does |
//! |---|---|
//! | [`life`] | the state driver: alone changes the state |
//! | [`shared`] | what is published, and the queue of requests |
//! | [`prepare`] | what is done before there is a specification |
//! | [`start`] | from the specification to a running VMM |
//! | [`link`] | the stream to the agent |
//! | [`api`], [`relay`] | HTTP on `runner.sock` |
//! | [`save`] | from a VM that is up to a snapshot |
//! | [`findings`] | what the runner can say about a failure |
//! | [`finish`] | evidence, end, receipt |
mod api;
mod findings;
mod finish;
mod life;
mod link;
mod prepare;
mod relay;
mod save;
mod shared;
mod start;

pub use prepare::{Prepared, prepare};

use crate::{
    egress::{Egress, PolicyError},
    events::EventLog,
    log::BoundedLog,
};
use camino::{Utf8Path, Utf8PathBuf};
use life::Life;
use shared::{Input, Shared};
use std::{fs::DirBuilder, io, os::unix::fs::DirBuilderExt, sync::Arc, time::Duration};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use vestibule_api::machine::{Exit, StopRequest, VmSpec};

/// The runner's socket in the VM's directory.
pub const SOCKET: &str = "runner.sock";
/// The VMM's own messages are few; so much is kept of their beginning and of their end.
const VMM_LOG_KEEP: u64 = 64 << 10;
/// Clients that follow events may take so long to read the last ones.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a runner did not even begin: there was no VM, and there is no evidence.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("make the VM's directory `{path}`")]
    Directory {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("listen on `{path}`")]
    Listen {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("create the log `{path}`")]
    Log {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("understand the egress policy of the specification")]
    Policy(#[source] PolicyError),
    #[error("watch for signals")]
    Signals(#[source] io::Error),
}

/// Runs one VM to its end. Returns when nothing of it is left but the evidence. Needs a multi-threaded tokio runtime.
///
/// # Errors
/// Before there is a VM; a VM that fails is not an error here, its finding is in the events and the evidence.
pub async fn run(spec: VmSpec, prepared: Prepared) -> Result<Exit, RunError> {
    let directory = Utf8PathBuf::from(&spec.vm_dir);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)
        .map_err(|err| RunError::Directory {
            path: directory.clone(),
            err,
        })?;
    let result = run_in(&directory, spec, prepared).await;
    if result.is_err() {
        // There was no VM; the error is what matters, and nothing should be left beside it.
        let _ = std::fs::remove_dir_all(&directory);
    }
    result
}

async fn run_in(directory: &Utf8Path, spec: VmSpec, prepared: Prepared) -> Result<Exit, RunError> {
    let log = |name: &str, keep| {
        let path = directory.join(name);
        BoundedLog::create(&path, keep).map_err(|err| RunError::Log { path, err })
    };
    let console = log("serial.log", spec.console_keep_bytes)?;
    let vmm_log = log("vmm.log", VMM_LOG_KEEP)?;
    let events = Arc::new(EventLog::default());
    let egress = Egress::new(&spec.egress, Arc::clone(&events)).map_err(RunError::Policy)?;
    name_processes(directory, None);
    let listener = listen(&directory.join(SOCKET))?;
    let (shared, inbox) = Shared::new(spec, console, vmm_log, egress, events);
    let signals = signals(&shared)?;
    let quiet = CancellationToken::new();
    let (served, over) = (Arc::clone(&shared), quiet.clone());
    // Whoever connects meanwhile waits in the socket's queue, and the VM for nobody.
    let server = tokio::spawn(async move {
        axum::serve(listener, api::router(&served))
            .with_graceful_shutdown(over.cancelled_owned())
            .await
    });
    tracing::debug!("the runner listens");
    let exit = Life::new(shared, inbox).live(prepared).await;
    quiet.cancel();
    // Whoever does not read the last events by then does not get them.
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, server).await;
    signals.abort();
    Ok(exit)
}

/// Leaves the names of the VM's processes to whoever comes after a runner that is killed. One that can't does its work all the
/// same: the receipt will say less.
fn name_processes(directory: &Utf8Path, vmm: Option<u32>) {
    if let Err(err) = crate::processes::leave_mark(directory, vmm) {
        tracing::warn!(error = %err, "who owns the VM is not written down");
    }
}

fn listen(path: &Utf8Path) -> Result<UnixListener, RunError> {
    let listen = || {
        let listener = crate::socket::listen(path)?;
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    };
    listen().map_err(|err| RunError::Listen {
        path: path.to_owned(),
        err,
    })
}

/// SIGTERM and SIGINT end the VM as `POST /stop` does.
fn signals(shared: &Arc<Shared>) -> Result<tokio::task::JoinHandle<()>, RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    let inputs = shared.inputs.clone();
    Ok(tokio::spawn(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        let request = StopRequest {
            reason: format!("the runner got {name}"),
        };
        // A runner that is ending already needs no second request.
        let _ = inputs
            .send(Input::Stop {
                request,
                reply: None,
            })
            .await;
    }))
}
