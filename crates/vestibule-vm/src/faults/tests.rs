//! On plain memory of this process, watched by a real userfaultfd.
#![expect(unsafe_code, reason = "memory whose pages are made by somebody else")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of pages are small"
)]
use super::*;
use camino_tempfile::Utf8TempDir;
use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_REGISTER, UFFD_FEATURE_EVENT_REMOVE, UFFDIO, UFFDIO_REGISTER_MODE_MISSING,
    uffdio_api, uffdio_range, uffdio_register,
};
use rustix::{
    ioctl::{Updater, ioctl, opcode},
    mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous, munmap},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use std::{io::IoSlice, sync::mpsc};

const PAGES: usize = 300;
const LIMIT: Duration = Duration::from_secs(20);

/// Memory that is watched; its pages are somebody else's to make.
struct Watched {
    at: usize,
    fd: OwnedFd,
}

impl Watched {
    /// None, with a printed reason, where the kernel gives no userfaultfd.
    fn new() -> Option<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: what is watched with it is this test's own mapping.
        let fd = match unsafe { rustix::mm::userfaultfd(flags) } {
            Ok(fd) => fd,
            Err(err) => {
                println!("skipped: userfaultfd(2): {err}");
                return None;
            }
        };
        let mut api = uffdio_api {
            api: 0xaa,
            features: UFFD_FEATURE_EVENT_REMOVE.into(),
            ioctls: 0,
        };
        const API: rustix::ioctl::Opcode =
            opcode::read_write::<uffdio_api>(UFFDIO as u8, _UFFDIO_API as u8);
        const REGISTER: rustix::ioctl::Opcode =
            opcode::read_write::<uffdio_register>(UFFDIO as u8, _UFFDIO_REGISTER as u8);
        // SAFETY: number and structure are UFFDIO_API's.
        unsafe { ioctl(&fd, Updater::<API, _>::new(&mut api)) }.unwrap();
        let (read_write, private) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping, wherever the kernel puts it.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), PAGES * PAGE, read_write, private) };
        let at = at.unwrap() as usize;
        let mut register = uffdio_register {
            range: uffdio_range {
                start: at as u64,
                len: (PAGES * PAGE) as u64,
            },
            mode: UFFDIO_REGISTER_MODE_MISSING.into(),
            ioctls: 0,
        };
        // SAFETY: number and structure are UFFDIO_REGISTER's; the range is the mapping above.
        unsafe { ioctl(&fd, Updater::<REGISTER, _>::new(&mut register)) }.unwrap();
        Some(Self { at, fd })
    }

    fn words(&self) -> String {
        format!(
            r#"[{{"base_host_virt_addr":{},"size":{},"offset":0,"page_size":4096,"page_size_kib":4096}}]"#,
            self.at,
            PAGES * PAGE
        )
    }

    /// What a VMM says when it loads a snapshot.
    fn tell(&self, socket: &Utf8PathBuf, words: &str) {
        let stream = UnixStream::connect(socket).unwrap();
        let fds = [self.fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = [IoSlice::new(words.as_bytes())];
        sendmsg(&stream, &bytes, &mut control, SendFlags::empty()).unwrap();
    }

    /// The first byte of a page, from a thread that may wait for it for ever.
    fn first_byte(&self, page: usize) -> Option<u8> {
        let (tell, told) = mpsc::channel();
        let at = self.at + page * PAGE;
        std::thread::spawn(move || {
            // SAFETY: an address of the mapping, which is given back after the last such thread has ended or never.
            let byte = unsafe { (at as *const u8).read_volatile() };
            tell.send(byte)
        });
        told.recv_timeout(LIMIT).ok()
    }

    fn give_back(&self, pages: Range<usize>) {
        let at = (self.at + pages.start * PAGE) as *mut _;
        // SAFETY: pages of the mapping, that nobody has a reference to.
        unsafe { madvise(at, pages.len() * PAGE, Advice::LinuxDontNeed) }.unwrap();
    }

    fn unmap(self) {
        // SAFETY: every thread that read it has ended.
        unsafe { munmap(self.at as *mut _, PAGES * PAGE) }.unwrap();
    }
}

struct Place {
    home: Utf8TempDir,
}

impl Place {
    /// Each page of the file begins with its number; every third is a hole.
    fn new() -> Self {
        let home = camino_tempfile::tempdir().unwrap();
        let file = File::create(home.path().join("memory")).unwrap();
        file.set_len((PAGES * PAGE) as u64).unwrap();
        for page in (0..PAGES).filter(|page| !page.is_multiple_of(3)) {
            file.write_all_at(&[expected(page)], (page * PAGE) as u64)
                .unwrap();
        }
        Self { home }
    }

    fn start(
        &self,
        name: &str,
    ) -> (
        Utf8PathBuf,
        Handler,
        mpsc::Receiver<Result<Served, FaultError>>,
    ) {
        let socket = self.home.path().join(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let source = Source {
            memory: File::open(self.home.path().join("memory")).unwrap(),
            directory: self.home.path().to_owned(),
        };
        let (tell, told) = mpsc::channel();
        let handler = start(listener, source, move |result| tell.send(result).unwrap()).unwrap();
        (socket, handler, told)
    }
}

fn expected(page: usize) -> u8 {
    if page.is_multiple_of(3) {
        0
    } else {
        page as u8 | 1
    }
}

#[test]
fn pages_are_the_files_and_what_is_given_back_is_zero() {
    let Some(watched) = Watched::new() else {
        return;
    };
    let place = Place::new();
    let (socket, handler, ended) = place.start("one");
    watched.tell(&socket, &watched.words());
    let asked = [7, 9, 100, 101, 102, PAGES - 1];
    for page in asked {
        assert_eq!(watched.first_byte(page), Some(expected(page)), "{page}");
    }
    watched.give_back(100..102);
    assert_eq!(watched.first_byte(100), Some(0));
    assert_eq!(watched.first_byte(101), Some(0));
    assert_eq!(watched.first_byte(7), Some(expected(7)));
    drop(handler);
    let served = ended.recv_timeout(LIMIT).unwrap().unwrap();
    // What was not asked for first may have come with its neighbours.
    assert!((4..=8).contains(&served.faults), "{served:?}");
    watched.unmap();
}

#[test]
fn a_working_set_is_there_before_anybody_asks() {
    let Some(watched) = Watched::new() else {
        return;
    };
    let place = Place::new();
    let pages: Vec<u64> = (100..290).chain([1, 3]).collect();
    working_set::write(place.home.path(), pages.clone()).unwrap();
    let (socket, handler, ended) = place.start("one");
    watched.tell(&socket, &watched.words());
    // While all of it comes, this one is asked for.
    assert_eq!(watched.first_byte(299), Some(expected(299)));
    let begun = Instant::now();
    let there = |page: usize| {
        let mut state = [0u8; 1];
        // SAFETY: mincore(2) writes one byte for the one page that it is asked for.
        let asked = unsafe {
            libc::mincore(
                (watched.at + page * PAGE) as *mut _,
                PAGE,
                state.as_mut_ptr(),
            )
        };
        asked == 0 && state[0] & 1 == 1
    };
    while !there(289) && begun.elapsed() < LIMIT {
        std::thread::yield_now();
    }
    for page in pages {
        let page = usize::try_from(page).unwrap();
        assert_eq!(watched.first_byte(page), Some(expected(page)), "{page}");
    }
    drop(handler);
    let served = ended.recv_timeout(LIMIT).unwrap().unwrap();
    assert_eq!((served.faults, served.ahead), (1, 192));
    watched.unmap();
}

#[test]
fn a_file_that_became_shorter_and_words_that_are_none_end_it() {
    let Some(watched) = Watched::new() else {
        return;
    };
    let place = Place::new();
    let memory = File::options()
        .write(true)
        .open(place.home.path().join("memory"))
        .unwrap();
    for (name, words) in [
        ("nothing", String::from("[{]")),
        ("huge", watched.words().replace(":4096,", ":2097152,")),
        (
            "long",
            watched.words().replace("\"offset\":0", "\"offset\":4096"),
        ),
        (
            "far",
            watched
                .words()
                .replace("\"offset\":0", "\"offset\":18446744073709547520"),
        ),
    ] {
        let (socket, _handler, ended) = place.start(name);
        watched.tell(&socket, &words);
        let err = ended.recv_timeout(LIMIT).unwrap().unwrap_err();
        assert!(matches!(err, FaultError::Words(_)), "{name}: {err}");
    }
    let (socket, _handler, ended) = place.start("short");
    watched.tell(&socket, &watched.words());
    assert_eq!(watched.first_byte(1), Some(expected(1)));
    memory.set_len(PAGE as u64 * 10).unwrap();
    let at = watched.at + 20 * PAGE;
    // It waits for ever: nobody makes the page any more.
    std::thread::spawn(move || {
        // SAFETY: an address of the mapping, which stays for as long as the process.
        unsafe { (at as *const u8).read_volatile() }
    });
    let err = ended.recv_timeout(LIMIT).unwrap().unwrap_err();
    assert!(matches!(err, FaultError::Read { page: 20, .. }), "{err}");
}
