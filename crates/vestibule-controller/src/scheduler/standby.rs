//! One runner that is started before there is a VM for it: what the start of a program takes, a tenth of a second on an emulated
//! processor, is no part of a sign-in's way then ([`vestibule_api::standby`]).
use std::{
    fs::File,
    os::{fd::AsFd as _, unix::net::UnixStream},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use vestibule_api::standby;

/// After a VM's launch, so long until the next runner is started: the processor is the VM's first.
const AFTER: Duration = Duration::from_secs(2);

/// See the module. Ends with the controller, whatever ends that: it reads the end of its standard input.
#[derive(Debug, Default)]
pub(super) struct Standby(Arc<Mutex<Option<UnixStream>>>);

impl Standby {
    /// Whether there was one to give a VM to, with the lock that it lives by.
    pub(super) fn give(&self, stderr: &File, spec: &File) -> bool {
        let Some(runner) = lock(&self.0).take() else {
            return false;
        };
        match standby::give(&runner, stderr.as_fd(), spec.as_fd()) {
            Ok(()) => true,
            Err(err) => {
                tracing::warn!(error = %err, "the runner that stood by is gone");
                false
            }
        }
    }

    /// Has one started, later, where there is none.
    pub(super) fn refill(&self) {
        let place = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            tokio::time::sleep(AFTER).await;
            let Some(place) = place.upgrade() else { return };
            let mut place = lock(&place);
            if place.is_none() {
                match start() {
                    Ok(runner) => *place = Some(runner),
                    // The next VM's runner is started for it, and says what is wrong.
                    Err(err) => tracing::warn!(error = %err, "no runner stands by"),
                }
            }
        });
    }
}

fn lock(place: &Mutex<Option<UnixStream>>) -> MutexGuard<'_, Option<UnixStream>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start() -> std::io::Result<UnixStream> {
    let (controller, runner) = UnixStream::pair()?;
    let mut process = super::own_runner();
    process.arg("--standby");
    let stdin = std::os::fd::OwnedFd::from(runner);
    super::start(process, stdin.into(), Stdio::null())?;
    Ok(controller)
}
