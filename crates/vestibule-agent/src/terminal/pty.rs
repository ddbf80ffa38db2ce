//! A program on a PTY of its own, and the pump between it, the emulator and everybody who watches.
use super::{Emulator, Size, shown::Shown};
use crate::process::{Cgroup, Child, Program, ProgramError};
use bytes::Bytes;
use pty_process::OwnedWritePty;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    sync::{broadcast, mpsc, watch},
};

/// One read from the PTY.
const READ: usize = 16 * 1024;
/// A watcher may fall behind by so many reads; then it gets a snapshot instead of what it missed.
const BEHIND: usize = 256;
/// Typed but not yet taken by the tool. Beyond it, who types waits.
const UNREAD: usize = 64 * 1024;

/// What a watcher may do to a terminal.
enum Input {
    Bytes(Bytes),
    Resize(Size),
}

/// A running (or ended) terminal. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct TerminalHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    emulator: Mutex<Emulator>,
    output: broadcast::Sender<Bytes>,
    input: mpsc::Sender<Input>,
    /// Raised with each read; closed when the last process has let go of the PTY.
    activity: watch::Receiver<u64>,
    /// Whether the size is the pack's and watchers cannot change it.
    fixed: bool,
}

/// A program that was started on a terminal.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) terminal: TerminalHandle,
    pub(crate) child: Child,
}

/// Starts `program` on a new PTY of `size`, as leader of a session of its own. `fixed`: watchers cannot resize it.
///
/// # Errors
/// When there is no PTY, or the program cannot be started.
pub(crate) fn spawn(
    program: &Program,
    size: Size,
    fixed: bool,
    cgroup: Option<Cgroup>,
) -> Result<Started, ProgramError> {
    let (pty, pts) = pty_process::open().map_err(ProgramError::Pty)?;
    pty.resize(window(size)).map_err(ProgramError::Pty)?;
    let child = Child::new(
        program
            .pty_command(cgroup.as_ref())?
            .spawn(pts)
            .map_err(|err| program.failed(err))?,
        cgroup,
    );
    let (reader, writer) = pty.into_split();
    let (terminal, pump) = Pump::new(writer, size, fixed);
    tokio::spawn(pump.run(reader));
    Ok(Started { terminal, child })
}

fn window(size: Size) -> pty_process::Size {
    pty_process::Size::new(size.rows(), size.cols())
}

impl TerminalHandle {
    /// What the screen shows now, as bytes, and every byte from then on.
    pub(crate) fn attach(&self) -> (Vec<u8>, broadcast::Receiver<Bytes>) {
        // The pump broadcasts under the same lock, so nothing falls between the two.
        let emulator = self.emulator();
        (emulator.snapshot(), self.0.output.subscribe())
    }

    /// Types `bytes`. Waits while the tool does not read.
    pub(crate) async fn send(&self, bytes: Bytes) {
        // A pump that has ended has nobody to type to.
        let _ = self.0.input.send(Input::Bytes(bytes)).await;
    }

    /// Gives the terminal another size, unless the pack has fixed it.
    pub(crate) async fn resize(&self, size: Size) {
        if !self.0.fixed {
            let _ = self.0.input.send(Input::Resize(size)).await;
        }
    }

    /// Changes with every read; an error from it means that the terminal has ended.
    pub(crate) fn activity(&self) -> watch::Receiver<u64> {
        self.0.activity.clone()
    }

    /// Looks at the screen. Not to be held across an await.
    pub(crate) fn emulator(&self) -> MutexGuard<'_, Emulator> {
        self.0
            .emulator
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

struct Pump {
    shared: Arc<Shared>,
    writer: OwnedWritePty,
    typed: mpsc::Receiver<Input>,
    raised: watch::Sender<u64>,
    unread: VecDeque<u8>,
    shown: Shown,
}

impl Pump {
    fn new(writer: OwnedWritePty, size: Size, fixed: bool) -> (TerminalHandle, Self) {
        let (input, typed) = mpsc::channel(16);
        let (raised, activity) = watch::channel(0);
        let shared = Arc::new(Shared {
            emulator: Mutex::new(Emulator::new(size)),
            output: broadcast::Sender::new(BEHIND),
            input,
            activity,
            fixed,
        });
        let pump = Self {
            shared: Arc::clone(&shared),
            writer,
            typed,
            raised,
            unread: VecDeque::new(),
            shown: Shown::default(),
        };
        (TerminalHandle(shared), pump)
    }

    async fn run(mut self, mut reader: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; READ];
        let mut closed = false;
        loop {
            let overdue = self.emulator().overdue_at();
            let pending = !self.unread.is_empty();
            tokio::select! {
                read = reader.read(&mut buffer) => match read {
                    Ok(read @ 1..) => {
                        self.receive(&buffer[..read]);
                        closed = false;
                    }
                    // EIO: the last process has closed its end. The kernel looks for input first and at the other end
                    // after it (n_tty_read()), so what was written in between comes with the next read.
                    Ok(0) | Err(_) if !closed => closed = true,
                    Ok(0) | Err(_) => break,
                },
                written = self.writer.write(self.unread.as_slices().0), if pending => match written {
                    Ok(written) => drop(self.unread.drain(..written)),
                    // Nobody is there to read it; what they wrote before they went is still to come.
                    Err(_) => self.unread.clear(),
                },
                typed = self.typed.recv(), if self.unread.len() < UNREAD => match typed {
                    Some(Input::Bytes(bytes)) => self.unread.extend(bytes),
                    Some(Input::Resize(size)) => self.resize(size),
                    None => break,
                },
                () = until(overdue), if overdue.is_some() => {
                    let answers = self.emulator().flush();
                    self.unread.extend(answers);
                    self.raise();
                }
            }
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let shown = self.shown.take(bytes);
        let answers = {
            let mut emulator = self.emulator();
            let answers = emulator.feed(bytes);
            if !shown.is_empty() {
                // No watcher is no error.
                let _ = self.shared.output.send(shown.into());
            }
            answers
        };
        if self.unread.len() < UNREAD {
            self.unread.extend(answers);
        }
        self.raise();
    }

    fn resize(&mut self, size: Size) {
        self.emulator().resize(size);
        // The kernel tells the tool with SIGWINCH; it fails only where the PTY is gone.
        let _ = self.writer.resize(window(size));
    }

    fn raise(&self) {
        self.raised.send_modify(|count| *count += 1);
    }

    fn emulator(&self) -> MutexGuard<'_, Emulator> {
        self.shared
            .emulator
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

async fn until(when: Option<Instant>) {
    if let Some(when) = when {
        tokio::time::sleep_until(when.into()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::tests::{python, shell};
    use std::{
        io,
        pin::Pin,
        task::{Context, Poll},
        time::Duration,
    };
    use tokio::io::ReadBuf;

    /// What a kernel answers to one read after the other; then EIO.
    struct Answers(VecDeque<Option<&'static [u8]>>);

    impl AsyncRead for Answers {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            match self.0.pop_front().flatten() {
                Some(bytes) => buf.put_slice(bytes),
                None => return Poll::Ready(Err(rustix::io::Errno::IO.into())),
            }
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn what_the_kernel_gives_after_it_said_closed_is_not_lost() {
        let (pty, pts) = pty_process::open().unwrap();
        let (_, writer) = pty.into_split();
        let (terminal, mut pump) = Pump::new(writer, Size::clamped(80, 24), false);
        // An answer that nobody takes any more is no end either.
        drop(pts);
        pump.unread.extend(b"\x1b[1;1R");
        let answers = [
            Some(&b"one "[..]),
            None,
            Some(b"two "),
            Some(b"three"),
            None,
        ];
        pump.run(Answers(answers.into())).await;
        assert_eq!(terminal.emulator().transcript(), "one two three\n");
    }

    async fn finish(started: Started) -> (String, Option<i32>) {
        let Started {
            terminal,
            mut child,
        } = started;
        let mut activity = terminal.activity();
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            while activity.changed().await.is_ok() {}
            child.exited().await
        });
        let status = waited.await.expect("the program ends");
        let text = terminal.emulator().transcript();
        (text, status.code())
    }

    fn start(program: &Program, cols: u16) -> Started {
        spawn(program, Size::clamped(cols, 24), false, None).unwrap()
    }

    #[tokio::test]
    async fn a_tool_that_asks_for_the_cursor_gets_its_answer() {
        // Reads the answer byte by byte from a raw terminal, as gh's survey library does, and asks with a split write.
        let asks = python(
            "import os,termios,tty,time\n\
             tty.setraw(0)\n\
             os.write(1,b'abc\\x1b[');time.sleep(.05);os.write(1,b'6n')\n\
             got=b''\n\
             while not got.endswith(b'R'): got+=os.read(0,1)\n\
             os.write(1,b'\\x1b[c')\n\
             da=b''\n\
             while not da.endswith(b'c'): da+=os.read(0,1)\n\
             os.write(1,('\\r\\n%r %r\\r\\n'%(got,da)).encode())",
        );
        let started = start(&asks, 80);
        let (_, mut watcher) = started.terminal.attach();
        let (text, code) = finish(started).await;
        assert_eq!(text, "abc\nb'\\x1b[1;4R' b'\\x1b[?6c'\n");
        assert_eq!(code, Some(0));
        // A watcher is a terminal as well, and would answer a second time.
        let mut seen = Vec::new();
        while let Ok(bytes) = watcher.try_recv() {
            seen.extend(bytes);
        }
        let seen = String::from_utf8(seen).unwrap();
        assert!(seen.starts_with("abc\r\nb'"), "{seen:?}");
    }

    #[tokio::test]
    async fn the_tool_has_a_terminal_of_its_own() {
        let (text, _) = finish(start(
            &shell(
                "tty; stty size; ps -o pid=,pgid=,sid= -p $$ | awk '{print ($1==$2 && $2==$3)}'",
            ),
            1000,
        ))
        .await;
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("/dev/pts/"), "{text}");
        assert_eq!(lines[1..], ["24 1000", "1"]);
    }

    #[tokio::test]
    async fn typing_resizing_and_watching_work_together() {
        let started = start(&shell("read line; echo got $line; stty size"), 80);
        let (_, mut watcher) = started.terminal.attach();
        started.terminal.resize(Size::clamped(100, 30)).await;
        started.terminal.send(Bytes::from_static(b"word\r")).await;
        let (text, code) = finish(started).await;
        assert_eq!((text.as_str(), code), ("word\ngot word\n30 100\n", Some(0)));
        let mut seen = Vec::new();
        while let Ok(bytes) = watcher.try_recv() {
            seen.extend(bytes);
        }
        assert!(String::from_utf8(seen).unwrap().contains("got word"));
    }

    #[tokio::test]
    async fn a_tool_that_floods_and_never_reads_stops_nobody() {
        let started = start(
            &python(
                "import os\nfor _ in range(300): os.write(1,b'\\x1b[6n'*1000)\nos.write(1,b'done')",
            ),
            80,
        );
        let (text, code) = finish(started).await;
        // The terminal echoes the answers that nobody reads, so there is more than this.
        assert!(text.contains("done"), "{text}");
        assert_eq!(code, Some(0));
    }

    #[tokio::test]
    async fn a_pack_that_fixes_the_size_keeps_it() {
        let started = spawn(
            &shell("read x; stty size"),
            Size::clamped(1000, 24),
            true,
            None,
        )
        .unwrap();
        started.terminal.resize(Size::clamped(80, 24)).await;
        started.terminal.send(Bytes::from_static(b"\r")).await;
        assert!(finish(started).await.0.ends_with("24 1000\n"));
    }
}
