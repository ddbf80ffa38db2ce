//! After a restore: a copy of a VM becomes a VM of its own.
//!
//! The agent of a snapshot waits for a host. When one comes, the config drive is read again; another machine id or
//! generation in it means that this is a copy. Before the host's hello is answered, clock, kernel generator, machine-id,
//! host name and boot id are this VM's own ([`renew`]); afterwards, when the host has set the clock to the millisecond,
//! journal and desktop start ([`Agent::wake`]). No process that holds randomness of its own is older than that, except
//! this one, which was started anew before the save and has drawn nothing since: the generator of `rand` seeds itself at
//! its first use.
use crate::{
    agent::{Agent, uptime_ms},
    init::{InitError, identity},
    systemd::{BusError, Systemd},
};
use rustix::{io::Errno, mount::mount_bind, system::sethostname};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tracing::{info, warn};
use vestibule_api::{error::Chain, ids::MachineId, stream::ConfigDrive};

/// The agent's own unit: never stopped, never started.
pub(crate) const OWN_UNIT: &str = "vm-browser-agent.service";
const JOURNAL_UNIT: &str = "systemd-journald.service";
const JOURNALS: &str = "/run/log/journal";
/// The journal's daemon has begun anew within this.
const JOURNAL_WAIT: Duration = Duration::from_secs(60);
const JOURNAL_LOOK: Duration = Duration::from_millis(100);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The host sets the clock first thing; where it does not, the drive's time has to do.
const CLOCK_WAIT: Duration = Duration::from_secs(10);

/// Why a copy could not become a VM of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewError {
    #[error(transparent)]
    Identity(#[from] InitError),
    #[error("{0}")]
    Kernel(&'static str, #[source] Errno),
    #[error("write `{0}`")]
    Write(&'static str, #[source] io::Error),
}

/// Whose life the guest leads: in the agent's runtime directory, so that an agent that was restarted knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Life {
    machine_id: MachineId,
    generation: u64,
    /// The kernel's uptime when this life began.
    began_ms: u64,
}

impl Life {
    fn file(run: &Path) -> PathBuf {
        run.join("life.json")
    }

    /// The life that was led so far, if it is known.
    pub(crate) fn read(run: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(Self::file(run)).ok()?).ok()
    }

    fn write(&self, run: &Path) -> Result<(), RenewError> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        fs::write(Self::file(run), bytes).map_err(|err| RenewError::Write("life.json", err))
    }

    /// Whether `drive` is this life's.
    fn is_of(&self, drive: &ConfigDrive) -> bool {
        (self.machine_id, self.generation) == (drive.machine_id, drive.generation)
    }

    /// Milliseconds since this life began.
    pub(crate) fn age_ms(&self) -> u64 {
        uptime_ms().saturating_sub(self.began_ms)
    }
}

/// Makes the guest the VM that `drive` describes, unless it is already. Says whether it was another one. Blocks shortly.
///
/// # Errors
/// When the kernel refuses; the guest must not go on then.
pub(crate) fn renew(drive: &ConfigDrive, run: &Path) -> Result<bool, RenewError> {
    let before = Life::read(run);
    if before.is_some_and(|life| life.is_of(drive)) {
        return Ok(false);
    }
    let mut life = Life {
        machine_id: drive.machine_id,
        generation: drive.generation,
        began_ms: 0,
    };
    // PID 1 of the initramfs gave the first life its identity before systemd started.
    let copy = before.is_some();
    if copy {
        life.began_ms = uptime_ms();
        identity::apply(drive, Path::new("/"))?;
        identity::reseed().map_err(InitError::Entropy)?;
        sethostname(drive.hostname.as_bytes())
            .map_err(|err| RenewError::Kernel("set the host name", err))?;
        new_boot_id(run)?;
    }
    life.write(run)?;
    Ok(copy)
}

/// The kernel's boot id cannot be set; like in a container, a file lies over it.
fn new_boot_id(run: &Path) -> Result<(), RenewError> {
    let file = run.join("boot_id");
    fs::write(&file, format!("{}\n", uuid::Uuid::new_v4()))
        .map_err(|err| RenewError::Write("boot_id", err))?;
    mount_bind(&file, BOOT_ID).map_err(|err| RenewError::Kernel("cover the boot id", err))
}

impl Agent {
    /// Starts what was stopped before the save.
    pub(crate) async fn wake(self: Arc<Self>) {
        let mut clock = self.clock_set.subscribe();
        if tokio::time::timeout(CLOCK_WAIT, clock.wait_for(|set| *set))
            .await
            .is_err()
        {
            warn!("the host has not set the clock; the desktop starts all the same");
        }
        match self.start_units().await {
            Ok(()) => info!("the desktop starts"),
            Err(err) => warn!(error = %Chain(&err), "the desktop was not started"),
        }
        // What the journal says of the copied VM belongs to nobody. Its old daemon writes until it ends, so it is removed when
        // the new one has begun its own.
        let deadline = tokio::time::Instant::now() + JOURNAL_WAIT;
        while tokio::time::Instant::now() < deadline {
            match old_journals(Path::new(JOURNALS), Path::new("/etc/machine-id")) {
                Ok(Some(old)) => {
                    for directory in old {
                        if let Err(err) = fs::remove_dir_all(&directory) {
                            warn!(error = %err, "the old journal is still there");
                        }
                    }
                    return;
                }
                Ok(None) => {}
                Err(err) => return warn!(error = %err, "no journal is found"),
            }
            tokio::time::sleep(JOURNAL_LOOK).await;
        }
    }

    async fn start_units(&self) -> Result<(), BusError> {
        let mut systemd = Systemd::connect().await?;
        systemd.restart(JOURNAL_UNIT).await?;
        for unit in self.units() {
            systemd.start(unit).await?;
        }
        Ok(())
    }

    /// The image's required units but the agent's own.
    pub(crate) fn units(&self) -> impl Iterator<Item = &str> {
        let all = self.guest.image.required_units.iter();
        all.map(String::as_str).filter(|unit| *unit != OWN_UNIT)
    }
}

/// The journals in `directory` of other machines than that of the file `machine_id`; none while this one has not begun.
fn old_journals(directory: &Path, machine_id: &Path) -> io::Result<Option<Vec<PathBuf>>> {
    let own = fs::read_to_string(machine_id)?;
    let all: Vec<_> = fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<_>>()?;
    let (own, old): (Vec<_>, Vec<_>) = all.into_iter().partition(|path| path.ends_with(own.trim()));
    Ok((!own.is_empty()).then_some(old))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_journals_are_those_beside_the_new_one() {
        let dir = camino_tempfile::tempdir().unwrap();
        let path = dir.path().as_std_path();
        let (id, journals) = (path.join("machine-id"), path.join("journal"));
        fs::write(&id, "new\n").unwrap();
        fs::create_dir_all(journals.join("old")).unwrap();
        assert_eq!(old_journals(&journals, &id).unwrap(), None);
        fs::create_dir_all(journals.join("new")).unwrap();
        let old = old_journals(&journals, &id).unwrap().unwrap();
        assert_eq!(old, [journals.join("old")]);
    }

    #[test]
    fn a_life_is_known_again_and_a_boots_is_not_renewed() {
        let dir = camino_tempfile::tempdir().unwrap();
        let run = dir.path().as_std_path();
        let mut drive = ConfigDrive {
            machine_id: MachineId::generate(),
            generation: 1,
            stream_key: String::new(),
            now_micros: 0,
            entropy: String::new(),
            hostname: "vm-1".into(),
        };
        // The first drive is the boot's: nothing of the kernel's is touched.
        assert!(!renew(&drive, run).unwrap());
        assert!(!renew(&drive, run).unwrap());
        let life = Life::read(run).unwrap();
        assert!(life.is_of(&drive) && life.began_ms == 0);
        drive.generation = 2;
        assert!(!life.is_of(&drive));
    }
}
