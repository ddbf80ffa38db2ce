//! A runner that stands by (`run-vm --standby`): started before there is a VM for it, so that what a program's start takes is no
//! part of the VM's. It waits on its standard input, one of a pair of Unix sockets, for two open files:
//!
//! | byte | file beside it (`SCM_RIGHTS`, unix(7)) |
//! |---|---|
//! | `e` | its standard error, with the lock by which a runner is known to live |
//! | `s` | its VM's specification, at its beginning |
//!
//! End of file before both: nobody needs it any more.
use crate::descriptor;
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What a runner is given with its VM.
#[derive(Debug)]
pub struct Given {
    pub stderr: OwnedFd,
    pub spec: OwnedFd,
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
    use std::{fs::File, io::Read as _, os::unix::net::UnixStream};

    fn file(content: &str) -> File {
        descriptor::in_memory(content.as_bytes()).unwrap()
    }

    #[test]
    fn a_runner_that_stands_by_gets_its_files_in_their_order() {
        let (controller, runner) = UnixStream::pair().unwrap();
        let given = std::thread::spawn(move || take(&runner).unwrap());
        give(
            &controller,
            file("stderr").as_fd(),
            file(&"spec".repeat(100_000)).as_fd(),
        )
        .unwrap();
        let given = given.join().unwrap().unwrap();
        let text = |fd| io::read_to_string(File::from(fd)).unwrap();
        assert_eq!(text(given.stderr), "stderr");
        assert_eq!(text(given.spec).len(), 400_000);
    }

    #[test]
    fn one_that_nobody_needs_is_told_by_the_end() {
        let (controller, runner) = UnixStream::pair().unwrap();
        drop(controller);
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
