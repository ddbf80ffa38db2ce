//! The role `attach`: the sign-in's terminal inside the xterm on the desktop; and the agent's side of its socket.
//!
//! Agent → xterm: terminal bytes as they are. Xterm → agent: frames of one byte kind, two bytes length (big endian), and so
//! many bytes: kind 0 is typed text, kind 1 a [`TerminalControl`] as JSON.
use crate::{agent::Agent, shim, terminal::View};
use bytes::Bytes;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::{io, path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    signal::unix::{SignalKind, signal},
};
use tracing::warn;
use vestibule_api::agent::TerminalControl;

/// The agent's socket in its runtime directory.
pub(crate) const SOCKET: &str = "terminal.sock";
const TYPED: u8 = 0;
const CONTROL: u8 = 1;
/// Between two attempts to reach an agent that is not there (it is being restarted).
const PAUSE: Duration = Duration::from_secs(1);

/// Why the xterm shows nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    #[error("use the terminal")]
    Terminal(#[source] io::Error),
}

/// Runs in the xterm until it is closed.
pub(crate) fn main(socket: &Path) -> Result<(), AttachError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AttachError::Runtime)?;
    let raw = Raw::enter().map_err(AttachError::Terminal)?;
    let result = runtime.block_on(relay_forever(socket));
    drop(raw);
    // The task that reads the keyboard is inside a blocking read, which nothing ends but the xterm.
    runtime.shutdown_background();
    result.map_err(AttachError::Terminal)
}

/// Raw mode, until dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

async fn relay_forever(socket: &Path) -> io::Result<()> {
    let mut keyboard = tokio::io::stdin();
    let mut screen = tokio::io::stdout();
    let mut resized = signal(SignalKind::window_change())?;
    loop {
        if let Ok(stream) = UnixStream::connect(socket).await {
            let (mut shown, mut typed) = stream.into_split();
            send_size(&mut typed).await?;
            let (mut bytes, mut keys) = (vec![0; 16 * 1024], vec![0; 1024]);
            loop {
                tokio::select! {
                    read = shown.read(&mut bytes) => match read {
                        Ok(0) | Err(_) => break,
                        Ok(read) => {
                            screen.write_all(&bytes[..read]).await?;
                            screen.flush().await?;
                        }
                    },
                    read = keyboard.read(&mut keys) => match read? {
                        0 => return Ok(()),
                        read => if send(&mut typed, TYPED, &keys[..read]).await.is_err() { break },
                    },
                    _ = resized.recv() => if send_size(&mut typed).await.is_err() { break },
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn send_size(to: &mut OwnedWriteHalf) -> io::Result<()> {
    let size = tcgetwinsize(io::stdin())?;
    let control = TerminalControl::Resize {
        cols: size.ws_col,
        rows: size.ws_row,
    };
    send(to, CONTROL, &serde_json::to_vec(&control)?).await
}

async fn send(to: &mut OwnedWriteHalf, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u16::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut frame = vec![kind];
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame).await
}

/// Serves xterms for as long as the agent runs. There is one, on the desktop; a few more do no harm.
pub(crate) async fn serve(agent: Arc<Agent>, listener: UnixListener) {
    let slots = Arc::new(tokio::sync::Semaphore::new(8));
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let view = View::following(agent.login.terminal.subscribe());
                tokio::spawn(async move {
                    // An error is an xterm that went away.
                    let _ = show(view, stream).await;
                    drop(slot);
                });
            }
            Err(err) => {
                warn!(error = %err, "accept an xterm");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn show(mut view: View, stream: UnixStream) -> io::Result<()> {
    let (frames, mut screen) = stream.into_split();
    let (sender, mut received) = tokio::sync::mpsc::channel(16);
    let reader = async {
        let mut frames = tokio::io::BufReader::new(frames);
        loop {
            let frame = read_frame(&mut frames).await?;
            if sender.send(frame).await.is_err() {
                return Ok::<(), io::Error>(());
            }
        }
    };
    tokio::pin!(reader);
    loop {
        tokio::select! {
            ended = &mut reader => return ended,
            bytes = view.next() => match bytes {
                Some(bytes) => screen.write_all(&bytes).await?,
                None => return Ok(()),
            },
            Some(frame) = received.recv() => match frame {
                Frame::Typed(bytes) => view.send(bytes).await,
                Frame::Control(control) => view.control(control).await,
            },
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Frame {
    Typed(Bytes),
    Control(TerminalControl),
}

async fn read_frame(from: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<Frame> {
    let kind = from.read_u8().await?;
    let mut payload = vec![0; from.read_u16().await?.into()];
    from.read_exact(&mut payload).await?;
    match kind {
        TYPED => Ok(Frame::Typed(payload.into())),
        CONTROL => Ok(Frame::Control(serde_json::from_slice(&payload)?)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Makes the socket that the xterm connects to.
///
/// # Errors
/// When the directory is not there or not ours.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    shim::listen(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_are_what_they_say_or_refused() {
        let control = br#"{"type":"resize","cols":80,"rows":24}"#;
        let mut bytes = vec![
            0,
            0,
            2,
            b'h',
            b'i',
            1,
            0,
            u8::try_from(control.len()).unwrap(),
        ];
        bytes.extend_from_slice(control);
        bytes.extend_from_slice(&[7, 0, 0]);
        let mut from = bytes.as_slice();
        assert_eq!(
            read_frame(&mut from).await.unwrap(),
            Frame::Typed(Bytes::from_static(b"hi"))
        );
        assert_eq!(
            read_frame(&mut from).await.unwrap(),
            Frame::Control(TerminalControl::Resize { cols: 80, rows: 24 })
        );
        assert!(read_frame(&mut from).await.is_err());
        assert!(read_frame(&mut from).await.is_err());
    }
}
