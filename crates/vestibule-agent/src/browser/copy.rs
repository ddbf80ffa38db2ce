//! A browser that was copied with its VM: what in it may stay as it is, what ends, and what becomes another one's.
//!
//! Chromium is many processes. The renderers hold the generators that pages draw from (V8 seeds `Math.random` once per
//! isolate, also in the spare process that is kept for the next page), the network service holds connections, TLS
//! sessions, the DNS cache and cookies that are not on disk yet: these end, and the browser starts new ones from its
//! zygote, which draws from the kernel. The browser's own process stays, and so do zygotes, GPU process and storage service.
//! What these draw comes from the kernel at each call (`base::RandBytes`), or from `BoringSSL`: a generator per thread, seeded
//! from the kernel, that draws again only after 4,096 calls or when it sees that its memory was copied by a fork. Fresh
//! bytes at each call it has on Intel's processors alone, whose RDRAND it deems fast (crypto/fipsmodule/rand/rand.cc.inc).
//! So we do to these processes what a fork does ([`memory::wipe_as_a_fork`]; crypto/rand/fork_detect.cc). The browser's own
//! process also holds the installation's ids; see [`super::ids`].
use super::memory;
use crate::guest::Guest;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, symlink},
    path::{Path, PathBuf},
};

/// Arguments by which the processes are known that hold what a copy must not have.
const OF_THE_PAGES: &[u8] = b"--type=renderer";
const OF_THE_NETWORK: &[u8] = b"--utility-sub-type=network.mojom.NetworkService";
/// `hostname-pid`, as a link's target: Chromium takes a lock of another host for another machine's.
const LOCK: &str = "SingletonLock";

/// Ends the processes that show pages: what is on the screen then is the browser's own note that the page is gone.
pub(crate) fn end_pages(guest: &Guest) {
    for process in the_persons(guest) {
        if process.has(&[OF_THE_PAGES]) {
            process.end();
        }
    }
}

/// Ends every process that holds randomness of pages, a connection or anything that was looked up. The others seed their
/// generators anew before they draw again: all of the person's, for a program that watches for a fork wants to know of a copy.
///
/// # Errors
/// When one could not be told.
pub(crate) fn end_or_reseed(guest: &Guest) -> io::Result<()> {
    for process in the_persons(guest) {
        if process.has(&[OF_THE_PAGES, OF_THE_NETWORK]) {
            process.end();
            continue;
        }
        match memory::wipe_as_a_fork(process.pid) {
            // One that has ended meanwhile has no program any more (proc(5), `exe`).
            Err(err) if fs::read_link(process.directory.join("exe")).is_ok() => return Err(err),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(())
}

struct Process {
    pid: Pid,
    /// Where the kernel tells of it (proc(5)).
    directory: PathBuf,
}

impl Process {
    fn has(&self, any: &[&[u8]]) -> bool {
        // A child of the zygote writes its arguments over the zygote's, with spaces between them.
        let arguments = fs::read(self.directory.join("cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|b| matches!(b, 0 | b' '));
        arguments.any(|argument| any.contains(&argument))
    }

    fn end(&self) {
        // It may have ended meanwhile.
        let _ = kill_process(self.pid, Signal::KILL);
    }
}

fn the_persons(guest: &Guest) -> impl Iterator<Item = Process> {
    let uid = guest.person.as_ref().map(|person| person.uid);
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(move |entry| {
        let pid = entry.file_name().to_str().and_then(|n| n.parse().ok());
        let pid = pid.and_then(Pid::from_raw)?;
        let theirs = entry.metadata().is_ok_and(|meta| Some(meta.uid()) == uid);
        theirs.then(|| Process {
            pid,
            directory: entry.path(),
        })
    })
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
