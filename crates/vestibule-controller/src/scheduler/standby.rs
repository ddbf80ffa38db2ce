//! One runner that is started before there is a VM for it: what the start of programs takes, its own and a jailed VMM's, a fifth of a
//! second on an emulated processor, is no part of a sign-in's way then ([`vestibule_api::standby`]).
use std::{
    fs::File,
    os::{fd::AsFd as _, unix::net::UnixStream},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use vestibule_api::standby::{self, Preparation};

/// After a VM's launch, so long until the next runner is started: the processor is the VM's first.
const AFTER: Duration = Duration::from_secs(2);

/// See the module. Ends with the controller, whatever ends that: it reads the end of its standard input.
#[derive(Debug)]
pub(super) struct Standby(Arc<Place>);

#[derive(Debug)]
struct Place {
    preparation: Preparation,
    runner: Mutex<Option<UnixStream>>,
}

impl Standby {
    pub(super) fn new(preparation: Preparation) -> Self {
        let runner = Mutex::default();
        Self(Arc::new(Place {
            preparation,
            runner,
        }))
    }

    /// Whether there was one to give a VM to, with the lock that it lives by.
    pub(super) fn give(&self, stderr: &File, spec: &File) -> bool {
        let Some(runner) = self.0.runner().take() else {
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
            let mut runner = place.runner();
            if runner.is_none() {
                match start(&place.preparation) {
                    Ok(started) => *runner = Some(started),
                    // The next VM's runner is started for it, and says what is wrong.
                    Err(err) => tracing::warn!(error = %err, "no runner stands by"),
                }
            }
        });
    }
}

impl Place {
    fn runner(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.runner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start(preparation: &Preparation) -> std::io::Result<UnixStream> {
    let (controller, runner) = UnixStream::pair()?;
    let mut process = super::own_runner();
    process.arg("--standby");
    let stdin = std::os::fd::OwnedFd::from(runner);
    super::start(process, stdin.into(), Stdio::null())?;
    standby::prepare(&controller, preparation)?;
    Ok(controller)
}
