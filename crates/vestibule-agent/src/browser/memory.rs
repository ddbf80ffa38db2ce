//! The memory of a process that was copied with its VM, as its owner's superior sees it (proc(5): `mem`, `maps`, `smaps`,
//! `pagemap`).
use memchr::memmem;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader},
    ops::Range,
    os::unix::fs::FileExt as _,
    thread,
    time::{Duration, Instant},
};

const PAGE: u64 = 4096;
/// Memory is read in such pieces.
const PIECE: u64 = 1 << 20;
/// A thread stops when it next leaves the kernel, which an emulated disk can keep it in.
const STOP_WAIT: Duration = Duration::from_secs(30);
const STOP_LOOK: Duration = Duration::from_millis(1);

/// A process none of whose threads runs, until the value is dropped.
pub(super) struct Stopped(Pid);

impl Stopped {
    /// Stops the process, and waits until the last of its threads stands still.
    ///
    /// # Errors
    /// When it has ended, or goes on running.
    pub(super) fn new(process: Pid) -> io::Result<Self> {
        kill_process(process, Signal::STOP)?;
        let stopped = Self(process);
        let deadline = Instant::now() + STOP_WAIT;
        while !stopped.stands_still()? {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // Of a stop the kernel tells a process's parent alone, which we are not.
            thread::sleep(STOP_LOOK);
        }
        Ok(stopped)
    }

    fn stands_still(&self) -> io::Result<bool> {
        for thread in fs::read_dir(directory(self.0) + "/task")? {
            // A thread that has ended meanwhile has no state, or that of one that has.
            let stat = fs::read_to_string(thread?.path().join("stat")).unwrap_or_default();
            let state = stat
                .rsplit(") ")
                .next()
                .and_then(|rest| rest.chars().next());
            if !matches!(state, None | Some('T' | 'Z' | 'X')) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have been killed.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

fn directory(process: Pid) -> String {
    format!("/proc/{}", process.as_raw_pid())
}

/// Zeroes what the kernel zeroes in the child of a fork (madvise(2), `MADV_WIPEONFORK`). Libraries have a page of that kind in
/// order to see that their memory was copied. It is not looked at together with anything else, so the process may run.
/// Says how many areas there were.
///
/// # Errors
/// When the process has ended, or its memory cannot be written.
pub(super) fn wipe_as_a_fork(process: Pid) -> io::Result<usize> {
    let directory = directory(process);
    let mem = File::options()
        .write(true)
        .open(format!("{directory}/mem"))?;
    let (mut area, mut wiped) = (0..0, 0);
    for line in BufReader::new(File::open(format!("{directory}/smaps"))?).lines() {
        let line = line?;
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_whitespace().any(|flag| flag == "wf") {
                for page in area.clone().step_by(4096) {
                    mem.write_all_at(&[0; 4096], page)?;
                }
                wiped += 1;
            }
        } else if let Some(next) = range(&line) {
            area = next;
        }
    }
    Ok(wiped)
}

/// Replaces each first of a pair by its second, of the same length, wherever in the process's memory it is. Says how many of
/// the pairs were found at all.
///
/// # Errors
/// When the process has ended, or its memory cannot be read or written.
pub(super) fn replace(process: &Stopped, pairs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<usize> {
    Memory::of(process)?.replace(pairs)
}

/// The memory that is a process's own: private, writable and there. Its layout is that of now, so the process has to stand still.
struct Memory {
    mem: File,
    pagemap: File,
    areas: Vec<Range<u64>>,
}

impl Memory {
    fn of(process: &Stopped) -> io::Result<Self> {
        let directory = directory(process.0);
        let areas = fs::read_to_string(format!("{directory}/maps"))?
            .lines()
            .filter_map(writable_area)
            .collect();
        Ok(Self {
            mem: File::options()
                .read(true)
                .write(true)
                .open(format!("{directory}/mem"))?,
            pagemap: File::open(format!("{directory}/pagemap"))?,
            areas,
        })
    }

    fn replace(&self, pairs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<usize> {
        let mut found = vec![false; pairs.len()];
        for run in self.runs() {
            let run = run?;
            let mut at = run.start;
            while at < run.end {
                let piece = usize::try_from((run.end - at).min(PIECE)).unwrap_or_default();
                let mut bytes = vec![0; piece];
                self.mem.read_exact_at(&mut bytes, at)?;
                self.replace_in(&bytes, at, pairs, &mut found)?;
                at += piece as u64;
                if at < run.end {
                    // An id may lie across the border of two pieces.
                    at -= PAGE;
                }
            }
        }
        Ok(found.into_iter().filter(|found| *found).count())
    }

    fn replace_in(
        &self,
        bytes: &[u8],
        base: u64,
        pairs: &[(Vec<u8>, Vec<u8>)],
        found: &mut [bool],
    ) -> io::Result<()> {
        for ((old, new), found) in pairs.iter().zip(found) {
            for at in memmem::find_iter(bytes, old) {
                self.mem.write_all_at(new, base + at as u64)?;
                *found = true;
            }
        }
        Ok(())
    }

    /// Stretches of pages that are there and the process's own.
    fn runs(&self) -> impl Iterator<Item = io::Result<Range<u64>>> {
        self.areas.iter().flat_map(|area| {
            let pages = usize::try_from((area.end - area.start) / PAGE).unwrap_or_default();
            match self.present(area.start, pages) {
                Ok(runs) => runs.into_iter().map(Ok).collect::<Vec<_>>(),
                Err(err) => vec![Err(err)],
            }
        })
    }

    fn present(&self, from: u64, pages: usize) -> io::Result<Vec<Range<u64>>> {
        const ENTRY: usize = 8;
        /// Entries that are read at a time.
        const BATCH: usize = 8192;
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut entries = vec![0; ENTRY * BATCH];
        for batch in (0..pages).step_by(BATCH) {
            let count = BATCH.min(pages - batch);
            let entries = &mut entries[..count * ENTRY];
            let first = from / PAGE + batch as u64;
            self.pagemap.read_exact_at(entries, first * ENTRY as u64)?;
            for (index, entry) in entries.chunks_exact(ENTRY).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                // Bit 63: present; bit 61: a file's, or shared (admin-guide/mm/pagemap.rst).
                if entry >> 63 != 1 || (entry >> 61) & 1 == 1 {
                    continue;
                }
                let page = from + (batch + index) as u64 * PAGE;
                match runs.last_mut() {
                    Some(run) if run.end == page => run.end += PAGE,
                    _ => runs.push(page..page + PAGE),
                }
            }
        }
        Ok(runs)
    }
}

/// A line of `maps` that is readable, writable and private (proc(5)).
fn writable_area(line: &str) -> Option<Range<u64>> {
    let mode = line.split_whitespace().nth(1)?;
    let own = mode.starts_with("rw") && mode.ends_with('p');
    own.then(|| range(line))?
}

/// The addresses that a line of `maps` begins with, or an area's first line of `smaps`.
fn range(line: &str) -> Option<Range<u64>> {
    let (from, to) = line.split_whitespace().next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some(address(from)?..address(to)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
    use std::process::{Child, Command};

    const SIZE: usize = 2 * 4096;

    #[test]
    #[expect(
        unsafe_code,
        reason = "only mmap(2) makes an area that can be told apart"
    )]
    fn what_a_fork_wipes_is_wiped_and_nothing_else() {
        let area = || {
            let flags = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new area, which nothing else points into.
            unsafe { mmap_anonymous(std::ptr::null_mut(), SIZE, flags, MapFlags::PRIVATE) }.unwrap()
        };
        let (wiped, kept) = (area(), area());
        // SAFETY: both areas are ours, of that size, and unmapped at the end of this block.
        unsafe {
            madvise(wiped, SIZE, Advice::LinuxWipeOnFork).unwrap();
            for area in [wiped, kept] {
                area.cast::<u8>().write_bytes(1, SIZE);
            }
            assert!(wipe_as_a_fork(rustix::process::getpid()).unwrap() >= 1);
            let all = |area: *mut std::ffi::c_void, byte: u8| {
                (0..SIZE).all(|at| area.cast::<u8>().add(at).read_volatile() == byte)
            };
            assert!(all(wiped, 0) && all(kept, 1));
            for area in [wiped, kept] {
                munmap(area, SIZE).unwrap();
            }
        }
    }

    fn states(child: &Child) -> Vec<char> {
        let threads = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        let state = |stat: String| stat.rsplit(") ").next().unwrap().chars().next().unwrap();
        threads
            .map(|thread| state(fs::read_to_string(thread.unwrap().path().join("stat")).unwrap()))
            .collect()
    }

    #[test]
    fn a_process_stands_still_and_goes_on_whatever_happens() {
        let mut child = Command::new("/bin/sh")
            .args(["-c", "while :; do :; done"])
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        let fails = || {
            let _stopped = Stopped::new(pid)?;
            assert_eq!(states(&child), ['T']);
            Err::<(), _>(io::Error::other("an error"))
        };
        fails().unwrap_err();
        assert_ne!(states(&child), ['T']);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Stopped::new(pid).is_err());
    }
}
