//! A uid of a VM's own: one of a range, locked for as long as the VM lives, by all runners of a host.
use std::{
    fs::{DirBuilder, File, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};
use vestibule_api::machine::JailSpec;

/// Only root has uids to give away, so the place is the host's.
const LOCKS: &str = "/run/vestibule/uids";

/// A uid that nobody else uses while this lives.
#[derive(Debug)]
pub(super) struct UidLock {
    uid: u32,
    /// Locked exclusively (flock(2)); the kernel lets go of it with the process.
    _lock: File,
}

/// Why there is no uid for a VM.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    #[error("lock a uid in `{LOCKS}`")]
    Lock(#[source] io::Error),
    #[error(
        "all {count} uids from {first} on are in use by VMs; `[vm.jail]` `uids` gives them more"
    )]
    Exhausted { first: u32, count: u32 },
}

impl UidLock {
    /// Takes the first one that is free, and that `suits`, which is asked of free ones.
    ///
    /// # Errors
    /// When none is, or the directory of locks cannot be written to.
    pub(super) fn take(spec: JailSpec, suits: impl FnMut(u32) -> bool) -> Result<Self, UidError> {
        Self::take_in(Path::new(LOCKS), spec, suits)
    }

    fn take_in(
        directory: &Path,
        spec: JailSpec,
        mut suits: impl FnMut(u32) -> bool,
    ) -> Result<Self, UidError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(UidError::Lock)?;
        for uid in spec.first_uid..spec.first_uid.saturating_add(spec.uids) {
            let lock = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(directory.join(uid.to_string()))
                .map_err(UidError::Lock)?;
            match lock.try_lock() {
                Ok(()) if suits(uid) => return Ok(Self { uid, _lock: lock }),
                Ok(()) | Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(err)) => return Err(UidError::Lock(err)),
            }
        }
        Err(UidError::Exhausted {
            first: spec.first_uid,
            count: spec.uids,
        })
    }

    /// The number, which is the gid as well.
    pub(super) fn uid(&self) -> u32 {
        self.uid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_never_have_the_same() {
        let home = camino_tempfile::tempdir().unwrap();
        let at = home.path().join("uids");
        let spec = JailSpec {
            first_uid: 700_000,
            uids: 2,
        };
        let take = || UidLock::take_in(at.as_std_path(), spec, |_| true);
        let (one, two) = (take().unwrap(), take().unwrap());
        assert_eq!((one.uid(), two.uid()), (700_000, 700_001));
        let err = take().unwrap_err();
        assert!(err.to_string().contains("all 2 uids from 700000"), "{err}");
        drop((one, two));
        assert_eq!(take().unwrap().uid(), 700_000);
        let other = UidLock::take_in(at.as_std_path(), spec, |uid| uid != 700_000);
        assert_eq!(other.unwrap().uid(), 700_001, "the first does not suit");
    }
}
