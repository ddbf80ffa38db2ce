//! `POST /snapshot`: from a VM that is up to a snapshot on disk, after which there is no VM.
//!
//! ```text
//! agent prepares itself ─▶ the stream is let go ─▶ the guest's port waits for its next host ─▶ CPUs stop
//!     ─▶ the VMM writes CPUs and devices, and ends ─▶ zero pages become holes, digests, manifest
//! ```
//! What a clone finds first is therefore an agent that waits for a host, and nothing that belonged to the first one.
use super::{findings, link, shared::Shared};
use crate::{driver::Machine, firecracker::request, snapshot};
use camino::{Utf8Path, Utf8PathBuf};
use std::{fs::DirBuilder, io, os::unix::fs::DirBuilderExt, sync::Arc, time::Duration};
use vestibule_api::{error::Chain, finding::Finding, machine::Saved};

/// The agent warms the browser, ends its pages and clears free memory; under emulation that takes a while.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(600);
/// An agent that has lost its host looks for the next one within this.
const REOPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// From the guest's opening of its port to its waiting there is next to nothing to do.
const SETTLE: Duration = Duration::from_millis(500);
const SAVE_TIMEOUT: Duration = Duration::from_secs(120);
const _: () = assert!(request::SAVE.as_secs() < SAVE_TIMEOUT.as_secs());

/// The directory of a snapshot that is not whole: removed unless it is kept.
#[derive(Debug)]
pub(super) struct Unfinished {
    path: Utf8PathBuf,
    keep: bool,
}

impl Unfinished {
    /// Makes the directory, for this user alone.
    pub(super) fn make(path: &str) -> io::Result<Self> {
        let path = Utf8PathBuf::from(path);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path, keep: false })
    }

    pub(super) fn path(&self) -> &Utf8Path {
        &self.path
    }

    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    pub(super) fn kept(&self) -> bool {
        self.keep
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.keep {
            // That something is left shows in the disposal receipt.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Why a VM was not saved.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    #[error("save the VM: there is no stream to the agent")]
    NoStream,
    #[error("prepare the guest for a snapshot")]
    Prepare(#[source] link::AgentCallError),
    #[error("{0} within {1:?}")]
    Timeout(&'static str, Duration),
    #[error("write the snapshot into `{path}`")]
    Write {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error(transparent)]
    Machine(#[from] crate::driver::MachineError),
    #[error("save the VM: it was not made to be saved")]
    NotMade,
}

/// Saves the VM and ends its VMM.
pub(super) async fn save(
    shared: Arc<Shared>,
    machine: Arc<dyn Machine>,
    directory: Utf8PathBuf,
) -> Result<Saved, Box<Finding>> {
    let saved = try_save(&shared, &machine, &directory).await;
    if saved.is_err() {
        shared.logs_ended().await;
    }
    saved.map_err(|err| {
        tracing::warn!(error = %Chain(&err), "the VM was not saved");
        Box::new(findings::not_saved(&err, &shared))
    })
}

async fn try_save(
    shared: &Shared,
    machine: &Arc<dyn Machine>,
    directory: &Utf8Path,
) -> Result<Saved, SaveError> {
    let binding = machine.binding().ok_or(SaveError::NotMade)?.clone();
    let write = |err| SaveError::Write {
        path: directory.to_owned(),
        err,
    };
    let mux = shared.mux.borrow().clone().ok_or(SaveError::NoStream)?;
    within(
        "the agent did not prepare the guest",
        PREPARE_TIMEOUT,
        async {
            link::post(&mux, "/prepare-snapshot")
                .await
                .map_err(SaveError::Prepare)
        },
    )
    .await?;
    let reopened = machine.reopened();
    shared.held.send_replace(true);
    within(
        "the guest did not let go of the stream",
        REOPEN_TIMEOUT,
        async {
            reopened.await;
            Ok(())
        },
    )
    .await?;
    tokio::time::sleep(SETTLE).await;
    let state = snapshot::make_state(directory).map_err(write)?;
    within("the VMM did not save", SAVE_TIMEOUT, async {
        Ok(machine.save(state).await?)
    })
    .await?;
    let target = directory.to_owned();
    let sealed = tokio::task::spawn_blocking(move || snapshot::seal(&target, binding)).await;
    match sealed {
        Ok(sealed) => sealed.map_err(write),
        Err(err) => Err(write(io::Error::other(err))),
    }
}

async fn within<T>(
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, SaveError>>,
) -> Result<T, SaveError> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or(Err(SaveError::Timeout(what, limit)))
}
