//! A browser that was copied with its VM: what in it may stay as it is, what ends, and what becomes another one's.
//!
//! Chromium is many processes. The renderers hold the generators that pages draw from (V8 seeds `Math.random` once per
//! isolate, also in the spare process that is kept for the next page), the network service holds connections, TLS
//! sessions, the DNS cache and cookies that are not on disk yet: these end, and the browser starts new ones from its
//! zygote, which draws from the kernel. The browser's own process stays. What it draws comes from the kernel at each call or
//! from `BoringSSL`, which mixes fresh bytes in at each call "to protect, as best we can, against forks & VM clones"
//! (crypto/fipsmodule/rand/rand.cc.inc). It also holds the installation's ids; see [`super::ids`].
use crate::guest::Guest;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, symlink},
    path::Path,
};

/// Arguments by which the processes are known that hold what a copy must not have.
const OF_THE_PAGES: &[u8] = b"--type=renderer";
const OF_THE_NETWORK: &[u8] = b"--utility-sub-type=network.mojom.NetworkService";
/// `hostname-pid`, as a link's target: Chromium takes a lock of another host for another machine's.
const LOCK: &str = "SingletonLock";

/// Ends the processes that show pages: what is on the screen then is the browser's own note that the page is gone.
pub(crate) fn end_pages(guest: &Guest) {
    end(guest, |argument| argument == OF_THE_PAGES);
}

/// Ends every process that holds randomness of pages, a connection or anything that was looked up.
pub(crate) fn end_pages_and_network(guest: &Guest) {
    end(guest, |argument| {
        argument == OF_THE_PAGES || argument == OF_THE_NETWORK
    });
}

fn end(guest: &Guest, is_meant: impl Fn(&[u8]) -> bool) {
    let uid = guest.person.as_ref().map(|person| person.uid);
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_str().and_then(|n| n.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else {
            continue;
        };
        let theirs = process.metadata().is_ok_and(|meta| Some(meta.uid()) == uid);
        // A child of the zygote writes its arguments over the zygote's, with spaces between them.
        let meant = || {
            let arguments = fs::read(process.path().join("cmdline")).unwrap_or_default();
            arguments.split(|b| matches!(b, 0 | b' ')).any(&is_meant)
        };
        if theirs && meant() {
            // It may have ended meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The process that holds the profile.
///
/// # Errors
/// When no browser has locked it.
pub(super) fn process(profile: &Path) -> io::Result<Pid> {
    let target = fs::read_link(profile.join(LOCK))?;
    let pid = target.to_str().and_then(|text| text.rsplit_once('-'));
    pid.and_then(|(_, pid)| Pid::from_raw(pid.parse().ok()?))
        .ok_or_else(|| io::Error::other(format!("`{}` names no process", target.display())))
}

/// The profile is locked by the same process on a host of another name.
///
/// # Errors
/// When no browser has locked it, or the lock cannot be replaced.
pub(crate) fn relock(guest: &Guest, hostname: &str) -> io::Result<()> {
    let profile = &guest.browser_profile;
    let (lock, new) = (profile.join(LOCK), profile.join(".SingletonLock.new"));
    let target = format!("{hostname}-{}", process(profile)?.as_raw_pid());
    let _ = fs::remove_file(&new);
    symlink(target, &new)?;
    if let Some(person) = &guest.person {
        std::os::unix::fs::lchown(&new, Some(person.uid), Some(person.gid))?;
    }
    fs::rename(new, lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_follows_the_host_name() {
        let dir = camino_tempfile::tempdir().unwrap();
        let guest = Guest::for_tests(dir.path().as_std_path());
        fs::create_dir_all(&guest.browser_profile).unwrap();
        assert!(relock(&guest, "vm-2").is_err());
        symlink("vm-1-a-115", guest.browser_profile.join(LOCK)).unwrap();
        relock(&guest, "vm-2-b").unwrap();
        assert_eq!(
            fs::read_link(guest.browser_profile.join(LOCK)).unwrap(),
            Path::new("vm-2-b-115")
        );
        assert_eq!(process(&guest.browser_profile).unwrap().as_raw_pid(), 115);
    }
}
