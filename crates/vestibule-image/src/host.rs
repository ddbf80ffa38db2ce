//! Commands of the host that a build runs: arguments as a list, output into the build log, an end with their builder.
use crate::progress::{Event, Progress};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    collections::VecDeque,
    io::{BufRead as _, BufReader, Read, Write},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
};

/// An error quotes so many of the last lines, and so many of the first that speak of an error: npm prints a page of
/// usage after its reason.
const TAIL: usize = 8;
const NOTABLE: usize = 8;
/// Longer lines are cut; a command's line is not bounded by anyone.
const LINE: usize = 4096;

/// Why a command did not do what it was for.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("start `{program}`: is the package that has it installed?")]
    Start {
        program: String,
        #[source]
        err: std::io::Error,
    },
    #[error("`{program}` ended with {status}:\n  {}", said.join("\n  "))]
    Failed {
        program: String,
        status: ExitStatus,
        said: Vec<String>,
    },
    #[error("talk to `{program}`")]
    Talk {
        program: String,
        #[source]
        err: std::io::Error,
    },
    #[error("write the build log `{path}`")]
    Log {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
}

/// Runs commands for one build.
pub(crate) struct Host<'a> {
    log: Mutex<std::fs::File>,
    progress: &'a dyn Progress,
}

impl<'a> Host<'a> {
    /// Begins the log at `log`.
    pub(crate) fn new(log: &Utf8Path, progress: &'a dyn Progress) -> Result<Self, HostError> {
        let file = std::fs::File::create(log).map_err(|err| HostError::Log {
            path: log.to_owned(),
            err,
        })?;
        Ok(Self {
            log: Mutex::new(file),
            progress,
        })
    }

    pub(crate) fn progress(&self) -> &'a dyn Progress {
        self.progress
    }

    /// One line for the log, and for whoever watches.
    pub(crate) fn say(&self, line: &str) {
        self.progress.event(&Event::Detail(line.to_owned()));
        self.note(line);
    }

    /// One line for the log only. A log that cannot be written does not stop a build.
    fn note(&self, line: &str) {
        if let Ok(mut log) = self.log.lock() {
            let _ = writeln!(log, "{line}");
        }
    }

    /// Runs `command` to its end; what it prints goes to the log.
    pub(crate) fn run(&self, command: &mut Command) -> Result<(), HostError> {
        self.run_accepting(command, &[0])
    }

    /// Runs `command`, which ends well with any of `codes`.
    pub(crate) fn run_accepting(
        &self,
        command: &mut Command,
        codes: &[i32],
    ) -> Result<(), HostError> {
        let child = self.spawn(command, Stdio::null(), Stdio::piped())?;
        self.finish(child, &name(command), codes, |_| Ok(()))
    }

    /// Runs `command` and feeds its standard input with what `feed` writes.
    pub(crate) fn feed(
        &self,
        command: &mut Command,
        feed: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<(), HostError> {
        let child = self.spawn(command, Stdio::piped(), Stdio::piped())?;
        self.finish(child, &name(command), &[0], |child| {
            match child.stdin.take() {
                Some(mut stdin) => feed(&mut stdin),
                None => Ok(()),
            }
        })
    }

    /// Runs `command` and returns what it printed on standard output, at most `limit` bytes.
    pub(crate) fn output(&self, command: &mut Command, limit: u64) -> Result<Vec<u8>, HostError> {
        let mut bytes = Vec::new();
        let mut child = self.spawn(command, Stdio::null(), Stdio::piped())?;
        let stdout = child.stdout.take();
        self.finish(child, &name(command), &[0], |_| match stdout {
            Some(stdout) => stdout.take(limit).read_to_end(&mut bytes).map(drop),
            None => Ok(()),
        })?;
        Ok(bytes)
    }

    fn spawn(
        &self,
        command: &mut Command,
        stdin: Stdio,
        stdout: Stdio,
    ) -> Result<Child, HostError> {
        self.note(&format!("+ {command:?}"));
        command.stdin(stdin).stdout(stdout).stderr(Stdio::piped());
        #[expect(
            unsafe_code,
            reason = "only code between fork and exec can ask for a signal at the parent's death"
        )]
        // SAFETY: prctl(2) is one system call; nothing here allocates or takes a lock.
        unsafe {
            command.pre_exec(|| {
                let signal = Some(rustix::process::Signal::TERM);
                rustix::process::set_parent_process_death_signal(signal).map_err(Into::into)
            });
        }
        command.spawn().map_err(|err| HostError::Start {
            program: name(command),
            err,
        })
    }

    /// Reads what the child prints while `talk` runs, and waits for it.
    fn finish(
        &self,
        mut child: Child,
        program: &str,
        codes: &[i32],
        talk: impl FnOnce(&mut Child) -> std::io::Result<()>,
    ) -> Result<(), HostError> {
        let said = Mutex::new(Said::default());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (talked, status) = std::thread::scope(|scope| {
            for stream in [
                stdout.map(|it| Box::new(it) as Box<dyn Read + Send>),
                stderr.map(|it| Box::new(it) as _),
            ] {
                scope.spawn(|| stream.map(|stream| self.drain(stream, &said)));
            }
            let talked = talk(&mut child);
            drop(child.stdin.take());
            (talked, child.wait())
        });
        let err = |err| HostError::Talk {
            program: program.to_owned(),
            err,
        };
        let status = status.map_err(err)?;
        if !status.code().is_some_and(|code| codes.contains(&code)) {
            let said = said.into_inner().unwrap_or_default().lines();
            return Err(HostError::Failed {
                program: program.to_owned(),
                status,
                said,
            });
        }
        talked.map_err(err)
    }

    fn drain(&self, stream: Box<dyn Read + Send>, said: &Mutex<Said>) {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while let Ok(1..) = stream
            .by_ref()
            .take(LINE as u64)
            .read_until(b'\n', &mut line)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if text.is_empty() {
                continue;
            }
            self.say(&text);
            if let Ok(mut said) = said.lock() {
                said.take(text);
            }
        }
    }
}

/// The lines of a command that its failure is told by.
#[derive(Default)]
struct Said {
    notable: Vec<String>,
    tail: VecDeque<String>,
}

impl Said {
    fn take(&mut self, line: String) {
        let notable = line.starts_with("E:") || line.contains("error");
        if notable && self.notable.len() < NOTABLE {
            self.notable.push(line);
            return;
        }
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }

    fn lines(self) -> Vec<String> {
        self.notable.into_iter().chain(self.tail).collect()
    }
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn a_failure_quotes_what_the_command_said_last() {
        let directory = camino_tempfile::tempdir().unwrap();
        let host = Host::new(&directory.path().join("log"), &Silent).unwrap();
        let failed = host
            .run(Command::new("sh").args(["-c", "echo first; echo broken >&2; exit 3"]))
            .unwrap_err();
        assert!(failed.to_string().contains("broken"), "{failed}");
        let log = std::fs::read_to_string(directory.path().join("log")).unwrap();
        assert!(log.contains("first") && log.contains("exit 3"), "{log}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let directory = camino_tempfile::tempdir().unwrap();
        let host = Host::new(&directory.path().join("log"), &Silent).unwrap();
        let failed = host.run(&mut Command::new("no-such-program")).unwrap_err();
        assert!(failed.to_string().contains("no-such-program"), "{failed}");
    }

    #[test]
    fn input_and_output_pass() {
        let directory = camino_tempfile::tempdir().unwrap();
        let host = Host::new(&directory.path().join("log"), &Silent).unwrap();
        assert_eq!(
            host.output(Command::new("printf").arg("a b"), 100).unwrap(),
            b"a b"
        );
        assert_eq!(
            host.output(Command::new("printf").arg("abc"), 2).unwrap(),
            b"ab"
        );
        host.feed(&mut Command::new("cat"), |out| out.write_all(b"hello\n"))
            .unwrap();
        assert!(
            std::fs::read_to_string(directory.path().join("log"))
                .unwrap()
                .contains("hello")
        );
    }
}
