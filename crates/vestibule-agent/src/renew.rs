//! After a restore: a copy of a VM becomes a VM of its own.
//!
//! The agent of a snapshot waits for a host. When one comes, the config drive is read again; another machine id or
//! generation in it means that this is a copy. Before the host's hello is answered, clock, kernel generator, machine-id,
//! host name and boot id are this VM's own ([`renew`]), and the browser's processes that drew from the old ones are gone
//! or draw from the new one. Afterwards, when the host has its answers and has set the clock to the millisecond, the rest
//! gets its own ([`Agent::wake`]): journal, X authority, the browser's ids. Last the start page is loaded again, by a
//! renderer of this VM; until it is painted this VM is not ready.
//! The agent itself was started anew before the save and has drawn nothing since: the generator of `rand` seeds itself at
//! its first use.
use crate::{
    agent::{Agent, uptime_ms},
    browser,
    desktop::{act, authority},
    guest::Guest,
    init::{InitError, identity},
    prepare::{self, PrepareError},
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
/// Units of the desktop: they stay up, and what in them must not be copied is dealt with here and in `prepare`.
const DESKTOP: [&str; 4] = [
    BROWSER_UNIT,
    "vestibule-terminal.service",
    "vestibule-wm.service",
    "vncserver@1.service",
];
const BROWSER_UNIT: &str = "vestibule-browser.service";
const JOURNAL_UNIT: &str = "systemd-journald.service";
const JOURNALS: &str = "/run/log/journal";
/// The journal's daemon has begun anew within this.
const JOURNAL_WAIT: Duration = Duration::from_secs(60);
const JOURNAL_LOOK: Duration = Duration::from_millis(100);
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The host follows the events as soon as it has set the clock; where it does not, the drive's time has to do.
const HOST_WAIT: Duration = Duration::from_secs(10);
/// The start page is loaded and painted within this, or the key is pressed again; so often.
const PAINT_WAIT: Duration = Duration::from_secs(30);
const RELOADS: u32 = 3;

/// Why a copy could not become a VM of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewError {
    #[error(transparent)]
    Identity(#[from] InitError),
    #[error("{0}")]
    Kernel(&'static str, #[source] Errno),
    #[error("reseed the generators of the processes that stay")]
    Generators(#[source] io::Error),
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
pub(crate) fn renew(drive: &ConfigDrive, guest: &Guest) -> Result<bool, RenewError> {
    let run = guest.run.as_path();
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
        browser::copy::end_or_reseed(guest).map_err(RenewError::Generators)?;
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
    /// Makes what is running another VM's, and starts what was stopped before the save.
    pub(crate) async fn wake(self: Arc<Self>, hostname: String) {
        // With one processor, what begins here holds up every answer that the host waits for.
        let mut followed = self.followed.subscribe();
        if tokio::time::timeout(HOST_WAIT, followed.wait_for(|is| *is))
            .await
            .is_err()
        {
            warn!("the host does not follow the events; the desktop goes on all the same");
        }
        if let Err(err) = self.start_units().await {
            warn!(error = %Chain(&err), "what was stopped was not started");
        }
        if self.guest.image.has("browser") {
            self.wake_desktop(hostname).await;
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

    /// A browser that can't be made this VM's own ends and starts with an empty profile: dearer, and always possible.
    async fn wake_desktop(&self, hostname: String) {
        let guest = self.guest.clone();
        let cookie = tokio::task::spawn_blocking(move || authority::renew(&guest.xauthority));
        if let Err(err) = cookie.await.map_err(io::Error::other).flatten() {
            // Nothing is painted, so this VM is never ready.
            return warn!(error = %err, "the screen can be opened with the key of another VM's");
        }
        let guest = self.guest.clone();
        let renewed = tokio::task::spawn_blocking(move || {
            browser::copy::relock(&guest, &hostname)?;
            let ids = browser::ids::renew(&guest.browser_profile).map_err(io::Error::other)?;
            Ok::<_, io::Error>(ids)
        });
        match renewed.await.map_err(io::Error::other).flatten() {
            Ok(ids) => info!(ids, "the browser is this VM's own"),
            Err(err) => {
                warn!(error = %Chain(&err), "the browser starts anew");
                return self.restart_browser().await;
            }
        }
        for _ in 0..RELOADS {
            let guest = self.guest.clone();
            let reloaded = tokio::task::spawn_blocking(move || act::reload(&guest)).await;
            if let Err(err) = reloaded
                .map_err(io::Error::other)
                .and_then(|done| done.map_err(io::Error::other))
            {
                warn!(error = %Chain(&err), "the start page was not loaded again");
            }
            let mut display = self.display.subscribe();
            let painted =
                display.wait_for(|display| display.as_ref().is_some_and(|now| now.painted));
            if tokio::time::timeout(PAINT_WAIT, painted).await.is_ok() {
                return;
            }
        }
        warn!("the start page is not painted; the browser starts anew");
        self.restart_browser().await;
    }

    async fn restart_browser(&self) {
        if let Err(err) = self.try_restart_browser().await {
            warn!(error = %Chain(&err), "the browser was not started anew");
        }
    }

    async fn try_restart_browser(&self) -> Result<(), PrepareError> {
        let mut systemd = Systemd::connect().await?;
        systemd.stop(BROWSER_UNIT).await?;
        prepare::stopped(&mut systemd, &[BROWSER_UNIT.to_owned()]).await?;
        // Without a browser this VM is never ready, which is better than with one that has another VM's ids.
        take_away(&self.guest.browser_profile).map_err(PrepareError::Profile)?;
        Ok(systemd.start(BROWSER_UNIT).await?)
    }

    async fn start_units(&self) -> Result<(), BusError> {
        let mut systemd = Systemd::connect().await?;
        systemd.restart(JOURNAL_UNIT).await?;
        for unit in self.other_units() {
            systemd.start(unit).await?;
        }
        Ok(())
    }

    /// The image's required units but the agent's own and the desktop's. Nobody knows what randomness they hold.
    pub(crate) fn other_units(&self) -> impl Iterator<Item = &str> {
        let all = self.guest.image.required_units.iter();
        all.map(String::as_str)
            .filter(|unit| *unit != OWN_UNIT && !DESKTOP.contains(unit))
    }
}

/// Removes a profile. Under another name it is nobody's any more, however much of it is left.
fn take_away(profile: &Path) -> io::Result<()> {
    let away = profile.with_extension("old");
    if fs::rename(profile, &away).is_ok() {
        if let Err(err) = fs::remove_dir_all(&away) {
            warn!(error = %err, "the browser's old profile is still there");
        }
        return Ok(());
    }
    match fs::remove_dir_all(profile) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        Ok(()) | Err(_) => Ok(()),
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
    fn a_profile_is_away_or_it_is_an_error() {
        let dir = camino_tempfile::tempdir().unwrap();
        let profile = dir.path().as_std_path().join("chromium");
        take_away(&profile).unwrap();
        for blocked in [false, true] {
            fs::create_dir_all(profile.join("Default")).unwrap();
            if blocked {
                // The other name is taken by what cannot be replaced.
                fs::create_dir_all(dir.path().join("chromium.old/full")).unwrap();
            }
            take_away(&profile).unwrap();
            assert!(!profile.exists(), "{blocked}");
        }
        // Nothing there can be renamed or removed, whoever asks.
        assert!(take_away(Path::new("/proc/self/task")).is_err());
    }

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
        let guest = Guest::for_tests(dir.path().as_std_path());
        let run = guest.run.as_path();
        fs::create_dir_all(run).unwrap();
        let mut drive = ConfigDrive {
            machine_id: MachineId::generate(),
            generation: 1,
            stream_key: String::new(),
            now_micros: 0,
            entropy: String::new(),
            hostname: "vm-1".into(),
        };
        // The first drive is the boot's: nothing of the kernel's is touched.
        assert!(!renew(&drive, &guest).unwrap());
        assert!(!renew(&drive, &guest).unwrap());
        let life = Life::read(run).unwrap();
        assert!(life.is_of(&drive) && life.began_ms == 0);
        drive.generation = 2;
        assert!(!life.is_of(&drive));
    }
}
