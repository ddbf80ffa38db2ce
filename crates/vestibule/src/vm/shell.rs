//! `vestibule vm shell`: this terminal, in raw mode, on a PTY in the guest.
use anyhow::Context as _;
use futures_util::{SinkExt as _, StreamExt as _};
use rustix::termios;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::{agent::TerminalControl, client::Runner};

pub(super) async fn shell(runner: &Runner) -> anyhow::Result<()> {
    let (cols, rows) = size();
    let url = format!("ws://vestibule/agent/shell?cols={cols}&rows={rows}");
    let (socket, _) = tokio_tungstenite::client_async(url, runner.dial().await?)
        .await
        .context("open a shell in the VM (one that belongs to a session has none)")?;
    let _raw = RawTerminal::enter()?;
    let (mut to_guest, mut from_guest) = socket.split();
    let mut resized =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::window_change())?;
    let (mut stdin, mut stdout) = (tokio::io::stdin(), tokio::io::stdout());
    let mut typed = [0; 4096];
    loop {
        tokio::select! {
            count = stdin.read(&mut typed) => match count? {
                0 => break,
                count => to_guest.send(Message::binary(typed[..count].to_vec())).await?,
            },
            Some(()) = resized.recv() => {
                let (cols, rows) = size();
                let control = serde_json::to_string(&TerminalControl::Resize { cols, rows })?;
                to_guest.send(Message::text(control)).await?;
            }
            message = from_guest.next() => match message.transpose()? {
                Some(Message::Binary(bytes)) => {
                    stdout.write_all(&bytes).await?;
                    stdout.flush().await?;
                }
                Some(Message::Close(_)) | None => break,
                Some(_) => {}
            },
        }
    }
    Ok(())
}

fn size() -> (u16, u16) {
    termios::tcgetwinsize(rustix::stdio::stdout())
        .map_or((80, 24), |size| (size.ws_col, size.ws_row))
}

/// Puts the terminal back as it was, on every way out.
struct RawTerminal(Option<termios::Termios>);

impl RawTerminal {
    fn enter() -> anyhow::Result<Self> {
        let stdin = rustix::stdio::stdin();
        if !termios::isatty(stdin) {
            return Ok(Self(None));
        }
        let before = termios::tcgetattr(stdin).context("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin, termios::OptionalActions::Now, &raw)
            .context("put the terminal in raw mode")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            termios::tcsetattr(
                rustix::stdio::stdin(),
                termios::OptionalActions::Now,
                before,
            )
            .ok();
        }
    }
}
