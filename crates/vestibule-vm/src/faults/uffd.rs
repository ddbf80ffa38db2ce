//! userfaultfd(2): what a page fault is read from and answered by. The well-kept crate for it needs libclang where it is built, for
//! five numbers and two structures that `linux-raw-sys` has.
use linux_raw_sys::general::{
    _UFFDIO_COPY, _UFFDIO_WAKE, _UFFDIO_ZEROPAGE, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFDIO,
    uffd_msg, uffdio_copy, uffdio_range, uffdio_zeropage,
};
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    ioctl::{Opcode, Updater, ioctl, opcode},
};
use std::{
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

#[expect(clippy::cast_possible_truncation, reason = "numbers below 256")]
const fn numbers(number: u32) -> (u8, u8) {
    (UFFDIO as u8, number as u8)
}

const COPY: Opcode =
    opcode::read_write::<uffdio_copy>(numbers(_UFFDIO_COPY).0, numbers(_UFFDIO_COPY).1);
const ZERO: Opcode =
    opcode::read_write::<uffdio_zeropage>(numbers(_UFFDIO_ZEROPAGE).0, numbers(_UFFDIO_ZEROPAGE).1);
const WAKE: Opcode = opcode::read::<uffdio_range>(numbers(_UFFDIO_WAKE).0, numbers(_UFFDIO_WAKE).1);

/// What the kernel says of the memory that it watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Somebody waits for the page that this address is in.
    Fault(u64),
    /// These addresses were given back: what they held is gone.
    Removed(Range<u64>),
    /// Nothing that concerns what pages hold.
    Other,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// There is a page now, this one or another.
    Done,
    /// An event has to be read before.
    Later,
    /// The process is gone.
    Gone,
}

/// Another process' userfaultfd.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// The next event; none: there is none now.
    pub(super) fn next(&self) -> io::Result<Option<Event>> {
        let mut message = [0; size_of::<uffd_msg>()];
        match rustix::io::read(&self.0, &mut message) {
            Ok(read) if read == message.len() => {}
            Ok(read) => {
                return Err(io::Error::other(format!("an event of {read} bytes")));
            }
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(err) => return Err(err.into()),
        }
        // Of `struct uffd_msg`: the event's number, and from the eighth byte on what it is about.
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&message[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        Ok(Some(match u32::from(message[0]) {
            UFFD_EVENT_PAGEFAULT => Event::Fault(word(16)),
            UFFD_EVENT_REMOVE => Event::Removed(word(8)..word(16)),
            _ => Event::Other,
        }))
    }

    /// Makes pages of `bytes`, which are whole ones, from the address `to` on. Where one is there already it stays.
    pub(super) fn copy(&self, to: u64, bytes: &[u8], page: usize) -> io::Result<Filled> {
        let mut done = 0;
        while done < bytes.len() {
            let mut copy = uffdio_copy {
                dst: to + done as u64,
                src: bytes[done..].as_ptr() as u64,
                len: (bytes.len() - done) as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: number and structure are UFFDIO_COPY's, which reads `bytes` and writes into another process' memory.
            #[expect(unsafe_code, reason = "an ioctl")]
            let asked = unsafe { ioctl(&self.0, Updater::<COPY, _>::new(&mut copy)) };
            let (step, ended) = after(asked, copy.copy, bytes.len() - done, page)?;
            done += step;
            match ended {
                Some(Filled::Done) => self.wake(to + done as u64 - page as u64, page as u64)?,
                Some(ended) => return Ok(ended),
                None => {}
            }
        }
        Ok(Filled::Done)
    }

    /// Makes a page of zeros at the address `at`.
    pub(super) fn zero(&self, at: u64, page: usize) -> io::Result<Filled> {
        let range = uffdio_range {
            start: at,
            len: page as u64,
        };
        let mut zero = uffdio_zeropage {
            range,
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: number and structure are UFFDIO_ZEROPAGE's, which concerns another process' memory.
        #[expect(unsafe_code, reason = "an ioctl")]
        let asked = unsafe { ioctl(&self.0, Updater::<ZERO, _>::new(&mut zero)) };
        match after(asked, zero.zeropage, page, page)?.1 {
            Some(Filled::Done) => self.wake(at, page as u64)?,
            Some(ended) => return Ok(ended),
            None => {}
        }
        Ok(Filled::Done)
    }

    /// Whoever waited for a page that is there already goes on.
    fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = uffdio_range { start, len };
        // SAFETY: number and structure are UFFDIO_WAKE's.
        #[expect(unsafe_code, reason = "an ioctl")]
        match unsafe { ioctl(&self.0, Updater::<WAKE, _>::new(&mut range)) } {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }
}

/// How many bytes are done, and what stands in the way of the others (ioctl_userfaultfd(2)): a page that is there, which counts as
/// done; an event that was not read yet; the end of the process.
fn after(
    asked: rustix::io::Result<()>,
    bytes: i64,
    all: usize,
    page: usize,
) -> io::Result<(usize, Option<Filled>)> {
    match asked {
        Ok(()) => Ok((all, None)),
        Err(Errno::EXIST) => Ok((page, Some(Filled::Done))),
        Err(Errno::AGAIN) => match usize::try_from(bytes) {
            Ok(done) if done > 0 => Ok((done, None)),
            Ok(_) | Err(_) => Ok((0, Some(Filled::Later))),
        },
        Err(Errno::SRCH) => Ok((0, Some(Filled::Gone))),
        Err(err) => Err(err.into()),
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
