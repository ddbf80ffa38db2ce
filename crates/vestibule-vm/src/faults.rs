//! A handler of page faults: a restored VM's memory comes from its snapshot's file page by page, as the guest asks for it
//! (userfaultfd(2); Firecracker's docs/snapshotting/handling-page-faults-on-snapshot-resume.md).
//!
//! It is a thread of the runner's. The VMM connects to its socket when it loads the snapshot, and says where its memory is and by
//! which descriptor its faults are read. From then on the thread serves, and while nobody asks it copies what the snapshot's first
//! copy needed at once ([`working_set`]). Pages that the guest gave back are zeros afterwards. The file is read, never mapped: one
//! that became shorter is an error here, and no SIGBUS of the runner's.
//!
//! A guest whose handler is gone would hang for ever (Firecracker fact 18), so that whoever starts one is told how it ended.
mod uffd;
pub(crate) mod working_set;

use camino::Utf8PathBuf;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};
use serde::Deserialize;
use std::{
    collections::VecDeque,
    fs::File,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    ops::Range,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            fs::FileExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    time::{Duration, Instant},
};
use uffd::{Event, Filled, Uffd};

/// The only size of a page that is served: memory in huge pages is not asked for.
const PAGE: usize = 4096;
/// Who asked for one page will ask for the next ones: so many are copied, of all that were asked for, when nobody waits.
const NEIGHBOURS: u64 = 7;
/// Ranges that may wait to be copied ahead.
const AHEAD_LIMIT: usize = 4096;
/// So much is copied ahead before somebody who waits is looked after.
const AHEAD: usize = 64 * PAGE;
/// Of the first copy, what it asks for within so long of its first fault is what others get ahead.
const RECORDING: Duration = Duration::from_secs(10);
/// The VMM's words are some hundred bytes.
const WORDS: usize = 64 << 10;
/// Longer than any load takes to say where its memory is.
const CONNECT: Duration = Duration::from_secs(60);

/// Why a handler ended before its VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FaultError {
    #[error("hear from the VMM where its memory is")]
    Hear(#[source] io::Error),
    #[error("understand where the VMM's memory is: {0}")]
    Words(String),
    #[error("read events of the VMM's memory")]
    Events(#[source] io::Error),
    #[error("read page {page} of the snapshot's memory")]
    Read {
        page: u64,
        #[source]
        err: io::Error,
    },
    #[error("give the VMM page {page}")]
    Fill {
        page: u64,
        #[source]
        err: io::Error,
    },
    #[error("serve a fault at {0:#x}, where the VMM said to have no memory")]
    Elsewhere(u64),
    #[error("go on: it panicked")]
    Panicked,
}

/// What a handler did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Served {
    /// Pages that somebody waited for.
    pub(crate) faults: u64,
    /// Pages that were there before anybody asked.
    pub(crate) ahead: u64,
    /// Pages of both that were zeros, and take no memory of the host's.
    pub(crate) zeros: u64,
}

/// What is served.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) memory: File,
    /// The snapshot's, where the working set is kept.
    pub(crate) directory: Utf8PathBuf,
}

/// A running handler; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Handler {
    _stop: OwnedFd,
}

/// Starts a thread that serves whoever connects first. `ended` is told once how it ended.
///
/// # Errors
/// When there is no thread or pipe to be had.
pub(crate) fn start(
    listener: UnixListener,
    source: Source,
    ended: impl FnOnce(Result<Served, FaultError>) + Send + 'static,
) -> io::Result<Handler> {
    let (stopped, stop) = io::pipe()?;
    let stopped = OwnedFd::from(stopped);
    std::thread::Builder::new()
        .name(String::from("page faults"))
        .stack_size(256 << 10)
        .spawn(move || {
            let run = || {
                Serving::hear(&listener, source, stopped)?
                    .map_or_else(|| Ok(Served::default()), Serving::run)
            };
            let run = std::panic::AssertUnwindSafe(run);
            ended(std::panic::catch_unwind(run).unwrap_or(Err(FaultError::Panicked)));
        })?;
    Ok(Handler { _stop: stop.into() })
}

/// A piece of the guest's memory, in the VMM's words.
#[derive(Clone, Debug, Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    /// In the memory's file.
    offset: u64,
    page_size: Option<u64>,
}

impl Region {
    fn addresses(&self) -> Range<u64> {
        self.base_host_virt_addr..self.base_host_virt_addr.saturating_add(self.size)
    }

    fn pages(&self) -> Range<u64> {
        self.offset / PAGE as u64..(self.offset + self.size) / PAGE as u64
    }
}

struct Serving {
    uffd: Uffd,
    regions: Vec<Region>,
    source: Source,
    stopped: OwnedFd,
    /// One bit for each page of the file: whether the guest has given it back since.
    removed: Vec<u64>,
    /// What is to be copied ahead, first things first.
    ahead: VecDeque<Range<u64>>,
    /// Pages asked for, and until when that is recorded.
    recorded: Option<(Vec<u64>, Option<Instant>)>,
    /// Addresses whose page could not be made yet.
    waiting: Vec<u64>,
    served: Served,
}

impl Serving {
    /// Waits for the VMM; none: nobody wants it any more.
    fn hear(
        listener: &UnixListener,
        source: Source,
        stopped: OwnedFd,
    ) -> Result<Option<Self>, FaultError> {
        let ready = wait(&[listener.as_fd(), stopped.as_fd()], Some(CONNECT));
        let ready = ready.map_err(FaultError::Hear)?;
        if ready[1] {
            return Ok(None);
        }
        if !ready[0] {
            return Err(FaultError::Hear(io::ErrorKind::TimedOut.into()));
        }
        let accepted = listener.accept().and_then(|(stream, _)| receive(&stream));
        let (words, fd) = accepted.map_err(FaultError::Hear)?;
        let regions: Vec<Region> =
            serde_json::from_slice(&words).map_err(|err| FaultError::Words(err.to_string()))?;
        let length = source.memory.metadata().map_err(FaultError::Hear)?.len();
        for region in &regions {
            let whole = |number: u64| number.is_multiple_of(PAGE as u64);
            let fits = region.offset.checked_add(region.size);
            if region.page_size.is_some_and(|size| size != PAGE as u64)
                || ![region.base_host_virt_addr, region.size, region.offset]
                    .into_iter()
                    .all(whole)
                || fits.is_none_or(|end| end > length)
            {
                let words = format!("{region:?} of {length} bytes in pages of {PAGE}");
                return Err(FaultError::Words(words));
            }
        }
        let pages = length / PAGE as u64;
        let ahead = VecDeque::from(working_set::read(&source.directory, pages));
        let words = usize::try_from(pages.div_ceil(64))
            .map_err(|err| FaultError::Words(err.to_string()))?;
        Ok(Some(Self {
            uffd: Uffd::new(fd).map_err(FaultError::Hear)?,
            regions,
            source,
            stopped,
            removed: vec![0; words],
            recorded: ahead.is_empty().then(|| (Vec::new(), None)),
            ahead,
            waiting: Vec::new(),
            served: Served::default(),
        }))
    }

    fn run(mut self) -> Result<Served, FaultError> {
        loop {
            let limit = if !self.ahead.is_empty() || !self.waiting.is_empty() {
                Some(Duration::ZERO)
            } else {
                let until = self.recorded.as_ref().and_then(|(_, until)| *until);
                until.map(|until| until.saturating_duration_since(Instant::now()))
            };
            let ready = wait(&[self.uffd.as_fd(), self.stopped.as_fd()], limit);
            let ready = ready.map_err(FaultError::Events)?;
            if ready[1] {
                return Ok(self.served);
            }
            self.keep_record();
            let mut filled = Filled::Done;
            while let Some(event) = self.uffd.next().map_err(FaultError::Events)? {
                match event {
                    Event::Fault(address) => self.waiting.push(address),
                    Event::Removed(addresses) => self.remove(&addresses),
                    Event::Other => {}
                }
            }
            for address in std::mem::take(&mut self.waiting) {
                filled = self.fault(address)?;
                match filled {
                    Filled::Done => {}
                    Filled::Later => self.waiting.push(address),
                    Filled::Gone => return Ok(self.served),
                }
            }
            if filled == Filled::Done && self.copy_ahead()? == Filled::Gone {
                return Ok(self.served);
            }
        }
    }

    fn remove(&mut self, addresses: &Range<u64>) {
        for region in &self.regions {
            let own = region.addresses();
            let (start, end) = (addresses.start.max(own.start), addresses.end.min(own.end));
            let mut at = start;
            while at < end {
                let page = (at - own.start + region.offset) / PAGE as u64;
                set(&mut self.removed, page);
                at += PAGE as u64;
            }
        }
    }

    fn fault(&mut self, address: u64) -> Result<Filled, FaultError> {
        let region = self
            .regions
            .iter()
            .find(|one| one.addresses().contains(&address));
        let region = region.ok_or(FaultError::Elsewhere(address))?;
        let at = address & !(PAGE as u64 - 1);
        let page = (at - region.base_host_virt_addr + region.offset) / PAGE as u64;
        let neighbours = page + 1..(page + 1 + NEIGHBOURS).min(region.pages().end);
        let mut bytes = [0; PAGE];
        let filled = self.fill(page, at, &mut bytes)?;
        if filled == Filled::Done {
            self.served.faults += 1;
            if let Some((pages, until)) = &mut self.recorded {
                until.get_or_insert_with(|| Instant::now() + RECORDING);
                pages.extend(page..neighbours.end);
            }
            if self.ahead.len() < AHEAD_LIMIT {
                self.put_back(neighbours);
            }
        }
        Ok(filled)
    }

    /// Makes the pages from `page` on, which are at the address `at`; `bytes` has room for as many as there are to be.
    fn fill(&mut self, page: u64, at: u64, bytes: &mut [u8]) -> Result<Filled, FaultError> {
        let failed = |err| FaultError::Fill { page, err };
        let read = |err| FaultError::Read { page, err };
        if get(&self.removed, page) {
            bytes.fill(0);
        } else {
            let offset = page * PAGE as u64;
            self.source
                .memory
                .read_exact_at(bytes, offset)
                .map_err(read)?;
        }
        if bytes.iter().all(|byte| *byte == 0) {
            for step in (0..bytes.len()).step_by(PAGE) {
                let filled = self.uffd.zero(at + step as u64, PAGE).map_err(failed)?;
                if filled != Filled::Done {
                    return Ok(filled);
                }
                self.served.zeros += 1;
            }
            return Ok(Filled::Done);
        }
        self.uffd.copy(at, bytes, PAGE).map_err(failed)
    }

    /// One step of what is copied ahead.
    fn copy_ahead(&mut self) -> Result<Filled, FaultError> {
        let Some(next) = self.ahead.pop_front() else {
            return Ok(Filled::Done);
        };
        let region = self
            .regions
            .iter()
            .find(|one| one.pages().contains(&next.start));
        let Some(region) = region.filter(|_| !get(&self.removed, next.start)) else {
            // No memory of this VM's, or not what is in the file any more.
            self.put_back(next.start + 1..next.end);
            return Ok(Filled::Done);
        };
        let most = next.start + (AHEAD / PAGE) as u64;
        let mut end = next.end.min(most).min(region.pages().end);
        if let Some(removed) = (next.start..end).find(|page| get(&self.removed, *page)) {
            end = removed;
        }
        let at = region.base_host_virt_addr + (next.start * PAGE as u64 - region.offset);
        let count = usize::try_from(end - next.start).unwrap_or(1);
        let mut bytes = vec![0; count * PAGE];
        let filled = self.fill(next.start, at, &mut bytes)?;
        if filled == Filled::Done {
            self.served.ahead += count as u64;
            self.put_back(end..next.end);
        } else {
            self.put_back(next);
        }
        Ok(filled)
    }

    fn put_back(&mut self, rest: Range<u64>) {
        if !rest.is_empty() {
            self.ahead.push_front(rest);
        }
    }

    /// What was asked for in the first seconds is kept for the next copy.
    fn keep_record(&mut self) {
        let over = |(_, until): &mut (_, Option<Instant>)| {
            until.is_some_and(|until| Instant::now() >= until)
        };
        if let Some((pages, _)) = self.recorded.take_if(over)
            && let Err(err) = working_set::write(&self.source.directory, pages)
        {
            tracing::debug!(error = %err, "the working set is not kept");
        }
    }
}

/// Waits until one of them can be read, or has ended; which.
fn wait(fds: &[std::os::fd::BorrowedFd<'_>; 2], limit: Option<Duration>) -> io::Result<[bool; 2]> {
    let mut fds = fds.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
    let limit = limit.map(Timespec::try_from).transpose();
    let limit = limit.map_err(io::Error::other)?;
    match poll(&mut fds, limit.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(fds.each_ref().map(|fd| !fd.revents().is_empty())),
        Err(err) => Err(err.into()),
    }
}

/// The VMM's words, and the descriptor that comes with them.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, OwnedFd)> {
    stream.set_read_timeout(Some(CONNECT))?;
    let mut words = vec![0; WORDS];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut words)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    words.truncate(received.bytes);
    let fd = control.drain().find_map(|message| {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            fds.next()
        } else {
            None
        }
    });
    let fd = fd.ok_or_else(|| io::Error::other("it came without a descriptor"))?;
    Ok((words, fd))
}

fn place(page: u64) -> (usize, u64) {
    (
        usize::try_from(page / 64).unwrap_or(usize::MAX),
        1 << (page % 64),
    )
}

fn get(bits: &[u64], page: u64) -> bool {
    let (word, bit) = place(page);
    bits.get(word).is_some_and(|word| word & bit != 0)
}

fn set(bits: &mut [u64], page: u64) {
    let (word, bit) = place(page);
    if let Some(word) = bits.get_mut(word) {
        *word |= bit;
    }
}

#[cfg(test)]
mod tests;
