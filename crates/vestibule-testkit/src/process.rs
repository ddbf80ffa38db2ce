//! Child processes of a test: started with their output in a file, told once where they listen, ended with the test.
use crate::wait;
use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use serde::de::DeserializeOwned;
use std::{process::Stdio, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

/// How long a process may take to end after SIGTERM.
const END: Duration = Duration::from_secs(30);

/// The workspace's root, found from where this crate was compiled.
pub fn workspace() -> Utf8PathBuf {
    let here = Utf8Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// A running child. It is killed when dropped; [`Process::end`] ends it well.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts `command`, its standard error appended to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, mut command: Command, log: &Utf8Path) -> Result<Self> {
        if let Some(dir) = log.parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("make `{dir}`"))?;
        }
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open `{log}`"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
        })
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// The first line of its standard output, as JSON.
    ///
    /// # Errors
    /// When it ends without one, or the time is over.
    pub async fn first_line<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<T> {
        let stdout = self
            .child
            .stdout
            .take()
            .context("its output was taken before")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(limit, lines.next_line())
            .await
            .with_context(|| format!("wait for the first line of {}", self.name))??;
        let line = line.with_context(|| format!("{} ended without a word", self.name))?;
        serde_json::from_str(&line).with_context(|| format!("understand what {} says", self.name))
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it does not end in time; it is killed then.
    pub async fn end(mut self) -> Result<std::process::ExitStatus> {
        signal(self.child.id(), rustix::process::Signal::TERM);
        match tokio::time::timeout(END, self.child.wait()).await {
            Ok(status) => Ok(status?),
            Err(_) => {
                self.child.kill().await.ok();
                bail!("{} did not end within {END:?} of SIGTERM", self.name)
            }
        }
    }

    /// Kills it without warning, as a crash would, and waits for the end.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub async fn crash(mut self) -> Result<()> {
        self.child
            .kill()
            .await
            .with_context(|| format!("kill {}", self.name))
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When the time is over.
    pub async fn death(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        let ended = tokio::time::timeout(limit, self.child.wait()).await;
        let ended = ended.with_context(|| format!("{} does not end", self.name))?;
        ended.with_context(|| format!("wait for {}", self.name))
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// Sends a signal to a process, if there is one; whether there was.
pub fn signal(pid: Option<u32>, signal: rustix::process::Signal) -> bool {
    let pid = pid
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::kill_process(pid, signal).is_ok())
}

/// Waits until `path` has content, and gives it.
///
/// # Errors
/// When the time is over.
pub async fn content(path: &Utf8Path, limit: Duration) -> Result<String> {
    wait::until(&format!("content in `{path}`"), limit, || {
        let read = match std::fs::read_to_string(path) {
            Ok(text) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
            Ok(_) => Err("empty".to_owned()),
            Err(err) => Err(err.to_string()),
        };
        std::future::ready(read)
    })
    .await
}
