//! Landlock (landlock(7)): what of the file system a process can still open, and that it reaches no TCP port, no abstract
//! socket and no process outside. A ruleset is made before the fork; the child only enters it.
use camino::Utf8PathBuf;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, Scope,
};
use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
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

/// Version of the running kernel's Landlock; none: it has none, or it is turned off.
pub(crate) fn abi() -> Option<u32> {
    #[expect(
        unsafe_code,
        reason = "the crate tells what was enforced, not what there is"
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
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// A ruleset to enter; none where the kernel has no Landlock.
///
/// # Errors
/// When the kernel refuses it.
pub(crate) fn ruleset(allowed: &Allowed) -> io::Result<Option<OwnedFd>> {
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
        Ok::<_, landlock::RulesetError>(created.into())
    };
    make().map_err(io::Error::other)
}

fn of_file(access: BitFlags<AccessFs>) -> BitFlags<AccessFs> {
    access & AccessFs::from_file(NEWEST)
}
