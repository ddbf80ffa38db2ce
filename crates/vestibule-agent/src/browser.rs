//! Opens a page in the browser that already runs, as a second start of Chromium would: through the socket of its
//! process singleton. No debugging port (identity providers refuse browsers that have one), no second process.
//!
//! The protocol (chrome/browser/process_singleton_posix.cc): connect to `<profile>/SingletonSocket`, send
//! `START\0<working directory>\0<argv[0]>\0<argv[1]>…`, at most 32 KiB, and close the sending half; the browser answers
//! `ACK`, or `SHUTDOWN` when it is ending.
pub(crate) mod copy;
pub(crate) mod ids;
mod memory;

use crate::{guest::Guest, process::Program, tool};
use std::{fs, io, path::PathBuf, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};
use url::Url;

/// Chromium's `kMaxMessageLength`.
const MESSAGE_LIMIT: usize = 32 * 1024;
/// A browser that two emulations carry, busy with its first pages, was seen to need more than a minute.
const PATIENCE: Duration = Duration::from_secs(180);

/// Why a page was not opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BrowserError {
    #[error("hand the page to the browser: the URL is longer than it takes")]
    TooLong,
    #[error("hand the page to the browser on `{}`", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("hand the page to the browser: it answered `{0}`")]
    Answer(String),
    #[error("hand the page to the browser: no answer within {PATIENCE:?}")]
    Silent,
    #[error("start the browser `{}`", path.display())]
    Start {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("start the browser: the image has none")]
    None,
}

/// Lets pages of `origins`, and no others, fetch from the guest's loopback until the next sign-in (Chromium's Local Network
/// Access otherwise blocks them; a redirect there needs no permission).
///
/// # Errors
/// When the policy can't be written.
pub(crate) fn allow_loopback(guest: &Guest, origins: &[String]) -> io::Result<()> {
    let path = guest.browser_policies.join("vestibule-login.json");
    if origins.is_empty() {
        return match fs::remove_file(&path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
            Ok(()) | Err(_) => Ok(()),
        };
    }
    fs::create_dir_all(&guest.browser_policies)?;
    let policy = serde_json::json!({ "LoopbackNetworkAllowedForUrls": origins });
    fs::write(&path, policy.to_string())
}

/// Shows `url`, which has passed the pack's allow-list.
///
/// # Errors
/// When neither the running browser takes it nor a new one can be started.
pub(crate) async fn open(guest: &Guest, url: &Url) -> Result<(), BrowserError> {
    match hand_over(guest, &[url.as_str()]).await {
        Ok(()) => Ok(()),
        Err(err @ BrowserError::Socket { .. }) if !guest.browser.exists() => {
            tracing::warn!(error = %vestibule_api::error::Chain(&err), "no browser runs, and none is installed");
            Err(BrowserError::None)
        }
        // Not running (yet, or any more): what a person's double click would do.
        Err(BrowserError::Socket { .. } | BrowserError::Answer(_)) => start(guest, url),
        Err(err) => Err(err),
    }
}

/// Shows `url` in a window of its own that shares nothing with the profile and leaves nothing in it.
///
/// # Errors
/// When no browser runs, or it does not take the page.
pub(crate) async fn open_off_the_record(guest: &Guest, url: &Url) -> Result<(), BrowserError> {
    hand_over(guest, &["--incognito", url.as_str()]).await
}

async fn hand_over(guest: &Guest, arguments: &[&str]) -> Result<(), BrowserError> {
    let exchange = exchange(guest, arguments);
    let answered = tokio::time::timeout(PATIENCE, exchange).await;
    answered.map_err(|_| BrowserError::Silent)?
}

async fn exchange(guest: &Guest, arguments: &[&str]) -> Result<(), BrowserError> {
    let socket = guest.browser_profile.join("SingletonSocket");
    let mut message = b"START\0/\0".to_vec();
    message.extend_from_slice(guest.browser.to_string_lossy().as_bytes());
    for argument in arguments {
        message.push(0);
        message.extend_from_slice(argument.as_bytes());
    }
    if message.len() > MESSAGE_LIMIT {
        return Err(BrowserError::TooLong);
    }
    let exchange = async {
        let mut stream = UnixStream::connect(&socket).await?;
        stream.write_all(&message).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.take(64).read_to_end(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = exchange.await.map_err(|err| BrowserError::Socket {
        path: socket.clone(),
        err,
    })?;
    match answer.as_slice() {
        b"ACK" => Ok(()),
        other => Err(BrowserError::Answer(
            String::from_utf8_lossy(other).into_owned(),
        )),
    }
}

fn start(guest: &Guest, url: &Url) -> Result<(), BrowserError> {
    let program = Program {
        argv: vec![
            guest.browser.to_string_lossy().into_owned(),
            url.as_str().to_owned(),
        ],
        env: tool::base_environment(guest),
        directory: guest.home.clone(),
        user: guest.person.clone(),
    };
    let failed = |err| BrowserError::Start {
        path: guest.browser.clone(),
        err,
    };
    let mut command = program.piped_command().ok_or(BrowserError::None)?;
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(false);
    let mut child = command.spawn().map_err(failed)?;
    // Reaped whenever it ends; its status says nothing that the screen does not.
    tokio::spawn(async move { child.wait().await });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_allowed_for_one_sign_in() {
        let dir = camino_tempfile::tempdir().unwrap();
        let guest = Guest::for_tests(dir.path().as_std_path());
        let policy = dir.path().join("policies/vestibule-login.json");
        allow_loopback(&guest, &[]).unwrap();
        assert!(!policy.exists());
        allow_loopback(&guest, &["https://fly.io".to_owned()]).unwrap();
        assert_eq!(
            fs::read_to_string(&policy).unwrap(),
            r#"{"LoopbackNetworkAllowedForUrls":["https://fly.io"]}"#
        );
        allow_loopback(&guest, &[]).unwrap();
        assert!(!policy.exists());
    }
}
