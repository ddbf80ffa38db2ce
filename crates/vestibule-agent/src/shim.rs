//! The URL shims: what a tool starts when it wants a page opened (`$BROWSER`, `xdg-open` and their like), and the socket
//! on which the agent hears of it.
//!
//! One line of JSON there, one line back: `{"url":"…"}` → `{"ok":true}` or `{"ok":false,"why":"…"}`. The shim is a
//! process of its own for an instant only: it exits when it has the answer, because tools wait for it, and some end it
//! (reference/providers.md §0.2).
use crate::agent::Agent;
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream as StdStream},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, oneshot},
};
use tracing::warn;

/// Names that the binary is linked under in the shims' directory.
pub(crate) const NAMES: [&str; 5] = [
    "xdg-open",
    "sensible-browser",
    "x-www-browser",
    "www-browser",
    "open-url",
];
/// The agent's socket in its runtime directory.
pub(crate) const SOCKET: &str = "shim.sock";
/// A line of more bytes is refused.
const LINE_LIMIT: u64 = 32 * 1024;
/// Either side waits so long for the other.
const PATIENCE: Duration = Duration::from_secs(30);
/// Shims that wait at once.
const WAITING: usize = 16;

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    url: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// A page that a tool wants opened. Its URL carries state and challenge: not to be logged.
pub(crate) struct OpenRequest {
    pub(crate) url: String,
    /// Whether it was allowed, and if not, why.
    pub(crate) answer: oneshot::Sender<Result<(), String>>,
}

impl std::fmt::Debug for OpenRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OpenRequest([secret])")
    }
}

/// Where the agent listens. The variable is for images that are laid out otherwise, and for tests; whoever can set it for
/// a tool could as well give the tool another shim.
pub(crate) fn socket() -> PathBuf {
    std::env::var_os("VESTIBULE_SHIM")
        .map_or_else(|| Path::new(crate::RUN).join(SOCKET), PathBuf::from)
}

/// The shim itself: hands the first URL among `args` to the agent.
pub(crate) fn main(args: impl Iterator<Item = OsString>, socket: &Path) -> ExitCode {
    // Options of xdg-open and of browsers mean nothing here.
    let url = args
        .filter_map(|arg| arg.into_string().ok())
        .find(|arg| !arg.starts_with('-'));
    let Some(url) = url else {
        crate::say("open: no URL given");
        return ExitCode::from(2);
    };
    match ask(socket, url) {
        Ok(Answer { ok: true, .. }) => ExitCode::SUCCESS,
        Ok(Answer { why, .. }) => {
            crate::say(&format!("open: refused: {}", why.unwrap_or_default()));
            ExitCode::from(3)
        }
        Err(err) => {
            crate::say(&format!(
                "open: ask the agent on `{}`: {err}",
                socket.display()
            ));
            ExitCode::from(4)
        }
    }
}

fn ask(socket: &Path, url: String) -> io::Result<Answer> {
    let mut stream = StdStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(&Ask { url })?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream)
        .take(LINE_LIMIT)
        .read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// Makes the socket that the person's programs may connect to.
///
/// # Errors
/// When the directory is not there or not ours.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Answers shims for as long as the agent runs.
pub(crate) async fn serve(agent: Arc<Agent>, listener: UnixListener) {
    let slots = Arc::new(Semaphore::new(WAITING));
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    // An error is a shim that went away.
                    let _ = tokio::time::timeout(PATIENCE, answer(&agent, stream)).await;
                    drop(slot);
                });
            }
            Err(err) => {
                warn!(error = %err, "accept a URL shim");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(agent: &Agent, stream: UnixStream) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    tokio::io::BufReader::new(reader.take(LINE_LIMIT))
        .read_line(&mut line)
        .await?;
    let result = match serde_json::from_str::<Ask>(&line) {
        Ok(ask) => agent.login.open_url(ask.url).await,
        Err(_) => Err("the request is not one line of JSON".to_owned()),
    };
    let answer = Answer {
        ok: result.is_ok(),
        why: result.err(),
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    writer.write_all(&line).await
}
