//! Landlock (landlock(7)): what of the file system a process can still open, and that it reaches no TCP port, no abstract
//! socket and no process outside. A ruleset is made before the fork; the child only enters it.
use camino::{Utf8Path, Utf8PathBuf};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, Scope,
};
use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
};

/// The newest interface that is asked for; a kernel with an older one does what it can.
const NEWEST: ABI = ABI::V6;

/// What may still be opened, itself and everything below. A path that is not there is left out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Allowed {
    pub(crate) read: Vec<Utf8PathBuf>,
    /// To run, or to load as a library.
    pub(crate) execute: Vec<Utf8PathBuf>,
    pub(crate) write: Vec<Utf8PathBuf>,
}

impl Allowed {
    /// Whether a file, or a directory on the way to it, is not root's.
    pub(crate) fn has_foreign(&self) -> bool {
        let foreign = |path: &Utf8Path| std::fs::metadata(path).is_ok_and(|meta| meta.uid() != 0);
        let mut files = self.read.iter().chain(&self.write);
        files.any(|path| path.ancestors().any(foreign))
    }
}

/// Version of the running kernel's Landlock; none: it has none, or it is turned off.
///
/// # Errors
/// When the kernel was not let say it: a filter of system calls (a container's, or a unit's) refuses the call, and nothing is
/// known of what there is.
pub(crate) fn abi() -> io::Result<Option<u32>> {
    #[expect(
        unsafe_code,
        reason = "the crate tells what was enforced, not what there is, and takes a refusal for an old kernel"
    )]
    // SAFETY: landlock_create_ruleset(2) with a null attribute and this flag reads nothing and returns a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            1_u32,
        )
    };
    match u32::try_from(version) {
        Ok(version) => Ok(Some(version)),
        Err(_) => none_or_refused(&io::Error::last_os_error()),
    }
}

/// What an error of the call means (landlock_create_ruleset(2)).
fn none_or_refused(err: &io::Error) -> io::Result<Option<u32>> {
    match err.raw_os_error() {
        Some(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(None),
        Some(_) | None => Err(io::Error::new(
            err.kind(),
            format!("a filter of system calls refuses Landlock's: {err}"),
        )),
    }
}

/// What a Landlock of this version lets a process do that the newest would not, and from which Linux on it does not.
pub(crate) fn lacks(version: u32) -> Vec<&'static str> {
    [
        (3, "cutting files short (Linux 6.2)"),
        (4, "TCP (Linux 6.7)"),
        (5, "ioctl on devices (Linux 6.10)"),
        (6, "signals and abstract sockets (Linux 6.12)"),
    ]
    .into_iter()
    .filter(|(since, _)| version < *since)
    .map(|(_, what)| what)
    .collect()
}

/// A ruleset to enter, and the version that it is of; none where the kernel has no Landlock.
///
/// # Errors
/// When the kernel refuses it.
pub(crate) fn ruleset(allowed: &Allowed) -> io::Result<Option<(OwnedFd, u32)>> {
    let Some(version) = abi()? else {
        return Ok(None);
    };
    let all = AccessFs::from_all(NEWEST);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = all & !AccessFs::Execute;
    let make = || {
        let mut created = Ruleset::default()
            .handle_access(all)?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        let rules = [
            (&allowed.read, read),
            (&allowed.execute, read | AccessFs::Execute),
            (&allowed.write, write),
        ];
        for (paths, access) in rules {
            for path in paths {
                let Ok(fd) = PathFd::new(path) else {
                    continue;
                };
                let access = if path.is_dir() {
                    access
                } else {
                    of_file(access)
                };
                created = created.add_rule(PathBeneath::new(fd.as_fd(), access))?;
            }
        }
        Ok::<Option<OwnedFd>, landlock::RulesetError>(created.into())
    };
    let made = make().map_err(io::Error::other)?;
    // There is one, so the kernel gave one; the crate takes any refusal for "none".
    let ruleset = made.ok_or_else(|| io::Error::other("the kernel refuses a Landlock ruleset"))?;
    Ok(Some((ruleset, version)))
}

fn of_file(access: BitFlags<AccessFs>) -> BitFlags<AccessFs> {
    access & AccessFs::from_file(NEWEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_not_an_old_kernel() {
        for none in [libc::ENOSYS, libc::EOPNOTSUPP] {
            let found = none_or_refused(&io::Error::from_raw_os_error(none));
            assert_eq!(found.unwrap(), None);
        }
        // systemd's filter of Debian 12's, and that of a container.
        for refused in [libc::EPERM, libc::EACCES] {
            let err = none_or_refused(&io::Error::from_raw_os_error(refused)).unwrap_err();
            assert!(err.to_string().contains("filter of system calls"), "{err}");
        }
    }

    #[test]
    fn what_a_version_lacks_is_known() {
        // Debian 12 has version 2: files, and nothing else.
        assert_eq!(lacks(2).len(), 4, "{:?}", lacks(2));
        assert_eq!(lacks(4).len(), 2, "{:?}", lacks(4));
        assert_eq!(lacks(6), [""; 0]);
    }
}
