//! What a child does to itself between fork and exec. All of it is prepared before: between the two nothing is allocated,
//! and only system calls are made.
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{
        CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities, set_no_new_privs,
        unshare_unsafe,
    },
};
use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

/// An exit code from here on, up to the highest signal, is a signal's (see [`Confinement::init`]).
pub(crate) const SIGNALLED: i32 = 128;
/// Firecracker's own exit codes begin at 148 (its docs/api_requests/…; `FcExitCode`); no signal that ends a VMM is as high.
pub(crate) const LAST_SIGNAL: i32 = 19;

/// clone(2); libc's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// See the module. The default is nothing.
#[derive(Debug, Default)]
pub struct Confinement {
    /// The directory of the group to be in.
    pub cgroup: Option<OwnedFd>,
    /// Namespaces of its own: mounts, network, System V IPC, host name; and of processes, which whoever forks must have asked for.
    pub namespaces: bool,
    /// Where what is started changes its user, the kernel forgets that it is to die with its runner (prctl(2),
    /// `PR_SET_PDEATHSIG`). So the child stays as the first process of its pid namespace, without whom there is no other, and a
    /// child of its own goes on.
    pub init: bool,
    /// The only capabilities that are left of root's; none: as they are.
    pub keep: Option<CapabilitySet>,
    pub landlock: Option<OwnedFd>,
}

impl Confinement {
    /// Enters it, in the child.
    pub(crate) fn enter(&self) -> io::Result<()> {
        if let Some(group) = &self.cgroup
            && !self.init
        {
            join(group)?;
        }
        if self.namespaces {
            unshare(UnshareFlags::empty())?;
        }
        if self.init {
            init(self.cgroup.as_ref())?;
        }
        if let Some(keep) = self.keep {
            let sets = CapabilitySets {
                effective: keep,
                permitted: keep,
                inheritable: CapabilitySet::empty(),
            };
            set_capabilities(None, sets)?;
        }
        if self.keep.is_some() || self.landlock.is_some() {
            // With it, root gets nothing by execve(2) that it has not already (prctl(2), PR_SET_NO_NEW_PRIVS).
            set_no_new_privs(true)?;
        }
        if let Some(ruleset) = &self.landlock {
            restrict(ruleset)?;
        }
        Ok(())
    }
}

/// Moves this process into a group. The kernel lets all that runs on other processors go by first: 14 to 28 ms were seen, and a
/// process that begins in its group has no such wait.
fn join(group: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let procs = rustix::fs::openat(group, c"cgroup.procs", flags, Mode::empty())?;
    rustix::io::write(&procs, b"0")?;
    Ok(())
}

/// Forks as fork(2) does; the child begins in `group` (`CLONE_INTO_CGROUP`, clone(2), Linux 5.7). Where the kernel or a seccomp
/// filter of a container's does not know that, both are in it. Returns 0 in the child.
fn fork_into(group: Option<&OwnedFd>) -> io::Result<libc::c_long> {
    let signal = u64::from(libc::SIGCHLD.unsigned_abs());
    if let Some(group) = group {
        // SAFETY: numbers alone, for which 0 is a value that says nothing.
        #[expect(unsafe_code, reason = "libc's structure has no other way to be made")]
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = CLONE_INTO_CGROUP;
        args.exit_signal = signal;
        args.cgroup = u64::from(group.as_raw_fd().unsigned_abs());
        // SAFETY: without a stack and without shared memory clone3(2) is fork(2); neither of both processes has had another
        // thread, and the new one goes on to execute a program.
        #[expect(unsafe_code, reason = "fork(3) would run handlers of the C library's")]
        let child = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
        if child >= 0 {
            return Ok(child);
        }
        join(group)?;
    }
    // SAFETY: without flags clone(2) is fork(2); the rest as above.
    #[expect(unsafe_code, reason = "fork(3) would run handlers of the C library's")]
    let child = unsafe { libc::syscall(libc::SYS_clone, signal, 0, 0, 0, 0) };
    if child >= 0 {
        Ok(child)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Namespaces of its own for this thread, as [`Confinement::namespaces`] says and `more`, with mounts that nobody else sees.
fn unshare(more: UnshareFlags) -> io::Result<()> {
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: a child between fork and exec has one thread, and shares no table of descriptors or file systems with anybody; the
    // thread of a probe names no file afterwards and starts nothing.
    #[expect(unsafe_code, reason = "unshare(2) may break what threads share")]
    unsafe { unshare_unsafe(flags | more) }?;
    let flags = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    Ok(mount_change(c"/", flags)?)
}

/// Whether a VMM can be given namespaces here, and mounts in them from outside: tried by a thread that ends with them. Root in a container may
/// have the name alone, without CAP_SYS_ADMIN, or be kept from mounting by the host's security module.
///
/// # Errors
/// What the kernel says to it.
pub(crate) fn try_namespaces() -> io::Result<()> {
    let attempt = || {
        let tree = super::mounts::cloned("/".into())?;
        unshare(UnshareFlags::NEWPID)?;
        let own = rustix::fs::open(
            c"/proc/thread-self/ns/mnt",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        super::mounts::enter(&own)?;
        super::mounts::attach(&tree, "/".into())?;
        Ok(mount(
            c"tmpfs",
            c"/",
            c"tmpfs",
            MountFlags::empty(),
            c"size=4k",
        )?)
    };
    let thread = std::thread::Builder::new().name(String::from("namespace probe"));
    let ended = thread.spawn(attempt)?.join();
    ended.unwrap_or_else(|_| Err(io::Error::other("the probe of namespaces panicked")))
}

/// landlock_restrict_self(2).
fn restrict(ruleset: &OwnedFd) -> io::Result<()> {
    // SAFETY: the call takes a descriptor, which is open, and a number.
    #[expect(unsafe_code, reason = "no safe wrapper allocates nothing")]
    let done =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Forks; returns in the new process alone, which is in `group`. The old one holds nothing open, waits, and ends as the new one
/// did: a signal as [`SIGNALLED`] and its number, since no signal of its own namespace ends a first process.
fn init(group: Option<&OwnedFd>) -> io::Result<()> {
    let child = fork_into(group)?;
    if child == 0 {
        return Ok(());
    }
    // SAFETY: this process does nothing from here on but wait: it uses no descriptor any more, and never returns.
    #[expect(unsafe_code, reason = "close_range, waitpid and _exit")]
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"vestibule-init".as_ptr());
        libc::close_range(0, libc::c_uint::MAX, 0);
        loop {
            let mut status = 0;
            let ended = libc::waitpid(-1, &raw mut status, libc::__WALL);
            if ended == -1
                && io::Error::last_os_error().raw_os_error() == Some(Errno::INTR.raw_os_error())
            {
                continue;
            }
            if ended != -1 && libc::c_long::from(ended) != child {
                continue;
            }
            let code = if libc::WIFSIGNALED(status) {
                SIGNALLED + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            libc::_exit(code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_of_namespaces_leaves_this_process_where_it_is() {
        let own = || std::fs::read_link("/proc/self/ns/mnt").unwrap();
        let (before, begun) = (own(), std::time::Instant::now());
        let tried = try_namespaces();
        println!("{tried:?} in {:?}", begun.elapsed());
        assert_eq!(own(), before);
        assert!(std::path::Path::new("/proc/self").exists());
        if !rustix::process::geteuid().is_root() {
            assert!(tried.is_err());
        }
    }

    /// Root in an ordinary container, where nothing is asked of the kernel that it refuses.
    #[test]
    fn without_the_capability_there_are_none() {
        std::thread::spawn(|| {
            // A thread's own.
            let none = CapabilitySets {
                effective: CapabilitySet::empty(),
                permitted: CapabilitySet::empty(),
                inheritable: CapabilitySet::empty(),
            };
            set_capabilities(None, none).unwrap();
            let err = try_namespaces().unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::PermissionDenied, "{err}");
        })
        .join()
        .unwrap();
    }
}
