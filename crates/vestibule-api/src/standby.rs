//! A runner that stands by (`run-vm --standby`): started before there is a VM for it, so that what the start of programs takes, its
//! own and the VMM's, is no part of the VM's. It waits on its standard input, one of a pair of Unix sockets, for three open files:
//!
//! | byte | file beside it (`SCM_RIGHTS`, unix(7)) |
//! |---|---|
//! | `p` | what it is to prepare for: [`Preparation`], as JSON, at its beginning |
//! | `e` | its standard error, with the lock by which a runner is known to live |
//! | `s` | its VM's specification, at its beginning |
//!
//! The first comes at once; the others when there is a VM. End of file before all: nobody needs it any more.
use crate::{
    descriptor,
    machine::{DriverChoice, JailSpec},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What is known of a VM before there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Preparation {
    /// Where the runner may make a directory for what it prepares: in the file system of the VMs' directories. Whoever starts
    /// runners removes what is left in it of one that was killed.
    pub directory: String,
    pub driver: DriverChoice,
    pub jail: JailSpec,
    /// As the specification's.
    pub cache_dir: Option<String>,
}

/// What a runner is given with its VM.
#[derive(Debug)]
pub struct Given {
    pub stderr: OwnedFd,
    pub spec: OwnedFd,
}

/// Has the runner at the other end of `socket` prepare. Blocks where `socket` does.
///
/// # Errors
/// When there is no runner any more, or no memory.
pub fn prepare(socket: impl AsFd, preparation: &Preparation) -> io::Result<()> {
    let file = descriptor::in_memory(&serde_json::to_vec(preparation)?)?;
    descriptor::send(&socket, b'p', file.as_fd())
}

/// Waits to be told what to prepare for; none: whoever would have is gone.
///
/// # Errors
/// When `socket` is none, or what comes is no [`Preparation`].
pub fn preparation(socket: impl AsFd) -> io::Result<Option<Preparation>> {
    let file = descriptor::receive(&socket)?.map(File::from);
    let text = file.map(io::read_to_string).transpose()?;
    Ok(text.map(|text| serde_json::from_str(&text)).transpose()?)
}

/// Makes the runner at the other end of `socket` the one of `spec`. Blocks where `socket` does.
///
/// # Errors
/// When there is no runner any more. It may have ended since, too: that shows by the lock.
pub fn give(socket: impl AsFd, stderr: BorrowedFd<'_>, spec: BorrowedFd<'_>) -> io::Result<()> {
    descriptor::send(&socket, b'e', stderr)?;
    descriptor::send(&socket, b's', spec)
}

/// Waits to be given both; none: whoever would have given them is gone.
///
/// # Errors
/// When `socket` is none.
pub fn take(socket: impl AsFd) -> io::Result<Option<Given>> {
    let Some(stderr) = descriptor::receive(&socket)? else {
        return Ok(None);
    };
    let spec = descriptor::receive(&socket)?;
    Ok(spec.map(|spec| Given { stderr, spec }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read as _, os::unix::net::UnixStream};

    fn file(content: &str) -> File {
        descriptor::in_memory(content.as_bytes()).unwrap()
    }

    #[test]
    fn a_runner_that_stands_by_gets_its_files_in_their_order() {
        let (controller, runner) = UnixStream::pair().unwrap();
        let waits = || {
            let preparation = preparation(&runner).unwrap();
            (preparation, take(&runner).unwrap())
        };
        let expected = Preparation {
            directory: String::from("/somewhere"),
            driver: DriverChoice::Firecracker,
            jail: JailSpec::default(),
            cache_dir: None,
        };
        let given = std::thread::scope(|scope| {
            let given = scope.spawn(waits);
            prepare(&controller, &expected).unwrap();
            give(
                &controller,
                file("stderr").as_fd(),
                file(&"spec".repeat(100_000)).as_fd(),
            )
            .unwrap();
            given.join().unwrap()
        });
        let (preparation, given) = given;
        assert_eq!(preparation, Some(expected));
        let given = given.unwrap();
        let text = |fd| io::read_to_string(File::from(fd)).unwrap();
        assert_eq!(text(given.stderr), "stderr");
        assert_eq!(text(given.spec).len(), 400_000);
    }

    #[test]
    fn one_that_nobody_needs_is_told_by_the_end() {
        let (controller, runner) = UnixStream::pair().unwrap();
        drop(controller);
        assert!(preparation(&runner).unwrap().is_none());
        assert!(take(&runner).unwrap().is_none());
        let (controller, runner) = UnixStream::pair().unwrap();
        descriptor::send(&controller, b'e', file("stderr").as_fd()).unwrap();
        drop(controller);
        assert!(take(&runner).unwrap().is_none(), "half of it is nothing");
    }

    #[test]
    fn a_runner_that_is_gone_is_an_error_for_whoever_gives() {
        let (controller, runner) = UnixStream::pair().unwrap();
        drop(runner);
        let file = file("stderr");
        let err = give(&controller, file.as_fd(), file.as_fd()).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::BrokenPipe);
        let mut byte = [0];
        assert_eq!((&controller).read(&mut byte).unwrap(), 0);
    }
}
