//! A client of the QEMU Machine Protocol (QEMU's docs/interop/qmp-spec.rst): JSON lines on a socket.
//!
//! One task owns the socket; replies find their command by id, events go to everyone who subscribed.
use futures_util::{SinkExt, StreamExt};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot},
};
use tokio_util::codec::{Framed, LinesCodec};

/// A line longer than this ends the connection.
const LINE_LIMIT: usize = 1 << 20;
/// Commands that may wait for their reply.
const QUEUE: usize = 16;
/// Events that a slow subscriber may be behind.
const EVENTS: usize = 64;

/// Why a command has no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU closed its control socket")]
    Closed,
    #[error("QEMU's greeting is not one: {0}")]
    Greeting(String),
    /// A migration, which is how QEMU saves and loads, did not complete.
    #[error("QEMU's migration ended as `{status}`: {desc}")]
    Migration { status: String, desc: String },
    #[error("QEMU refused `{command}`: {class}: {desc}")]
    Refused {
        command: String,
        class: String,
        desc: String,
    },
}

/// Something that QEMU said unasked.
#[derive(Clone, Debug, Deserialize)]
pub struct QmpEvent {
    pub event: String,
    #[serde(default)]
    pub data: Value,
}

#[derive(Deserialize)]
struct Line {
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

struct Command {
    name: String,
    arguments: Value,
    /// Travels with the command (unix(7), SCM_RIGHTS).
    descriptor: Option<OwnedFd>,
    reply: oneshot::Sender<Result<Value, QmpError>>,
}

/// The control connection of one QEMU.
#[derive(Debug)]
pub struct Qmp {
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<QmpEvent>,
}

type Lines = Framed<UnixStream, LinesCodec>;

impl Qmp {
    /// Waits for the greeting and leaves negotiation mode; returns QEMU's version as `major.minor.micro`. Has no
    /// timeout of its own: a QEMU that ends closes the socket.
    ///
    /// # Errors
    /// When QEMU ends first, or what it says is not a greeting.
    pub async fn connect(
        socket: UnixStream,
    ) -> Result<(Self, String, broadcast::Receiver<QmpEvent>), QmpError> {
        let mut lines = Framed::new(socket, LinesCodec::new_with_max_length(LINE_LIMIT));
        let greeting = lines
            .next()
            .await
            .and_then(Result::ok)
            .ok_or(QmpError::Closed)?;
        let version = serde_json::from_str(&greeting)
            .ok()
            .and_then(|greeting| version_of(&greeting))
            .ok_or_else(|| QmpError::Greeting(greeting.chars().take(200).collect()))?;
        let (commands, inbox) = mpsc::channel(QUEUE);
        let (events, subscribed) = broadcast::channel(EVENTS);
        tokio::spawn(drive(lines, inbox, events.clone()));
        let qmp = Self { commands, events };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok((qmp, version, subscribed))
    }

    /// Runs one command and returns what QEMU returned.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with QEMU's own words, or [`QmpError::Closed`].
    pub async fn execute(&self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        self.send(name, arguments, None).await
    }

    /// Gives QEMU a descriptor under the name `fdname`, for a command that follows.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn give(&self, fdname: &str, descriptor: OwnedFd) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": fdname });
        self.send("getfd", arguments, Some(descriptor))
            .await
            .map(drop)
    }

    async fn send(
        &self,
        name: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let (reply, answer) = oneshot::channel();
        let command = Command {
            name: name.to_owned(),
            arguments,
            descriptor,
            reply,
        };
        self.commands
            .send(command)
            .await
            .map_err(|_| QmpError::Closed)?;
        answer.await.map_err(|_| QmpError::Closed)?
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<QmpEvent> {
        self.events.subscribe()
    }
}

/// The version in a greeting, as `major.minor.micro`.
pub(super) fn version_of(greeting: &Value) -> Option<String> {
    version_in(greeting.get("QMP")?.get("version")?)
}

/// The version in what `query-version` returns.
pub(super) fn version_in(version: &Value) -> Option<String> {
    let qemu = version.get("qemu")?;
    let part = |name| qemu.get(name).and_then(Value::as_u64);
    Some(format!(
        "{}.{}.{}",
        part("major")?,
        part("minor")?,
        part("micro")?
    ))
}

type Pending = HashMap<u64, (String, oneshot::Sender<Result<Value, QmpError>>)>;

async fn drive(
    mut lines: Lines,
    mut commands: mpsc::Receiver<Command>,
    events: broadcast::Sender<QmpEvent>,
) {
    let mut pending = Pending::new();
    let mut next_id = 1;
    loop {
        tokio::select! {
            line = lines.next() => match line {
                Some(Ok(line)) => take(&line, &mut pending, &events),
                Some(Err(_)) | None => return,
            },
            command = commands.recv() => {
                let Some(Command { name, arguments, descriptor, reply }) = command else { return };
                let line = json!({ "execute": name, "arguments": arguments, "id": next_id }).to_string();
                pending.insert(next_id, (name, reply));
                next_id += 1;
                let sent = match descriptor {
                    None => lines.send(line).await.is_ok(),
                    // Every earlier line has been flushed.
                    Some(descriptor) => send_with(lines.get_ref(), line, &descriptor).await.is_ok(),
                };
                if !sent {
                    return;
                }
            }
        }
    }
}

/// Sends one line and a descriptor with it.
async fn send_with(socket: &UnixStream, line: String, descriptor: &OwnedFd) -> io::Result<()> {
    let line = format!("{line}\n");
    let sent = socket
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut rights = SendAncillaryBuffer::new(&mut space);
            let descriptors = [descriptor.as_fd()];
            rights.push(SendAncillaryMessage::ScmRights(&descriptors));
            let bytes = [IoSlice::new(line.as_bytes())];
            Ok(sendmsg(socket, &bytes, &mut rights, SendFlags::NOSIGNAL)?)
        })
        .await?;
    // A line is far shorter than the socket's buffer, which nobody else fills.
    if sent == line.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// One line from QEMU. What is neither reply nor event is ignored, as the protocol asks of clients.
fn take(line: &str, pending: &mut Pending, events: &broadcast::Sender<QmpEvent>) {
    let Ok(line) = serde_json::from_str::<Line>(line) else {
        return;
    };
    if let Some(event) = line.event {
        // Nobody may be listening.
        let _ = events.send(QmpEvent {
            event,
            data: line.data,
        });
        return;
    }
    let Some((command, reply)) = line.id.and_then(|id| pending.remove(&id)) else {
        return;
    };
    let result = match line.error {
        Some(Refusal { class, desc }) => Err(QmpError::Refused {
            command,
            class,
            desc,
        }),
        None => Ok(line.returned.unwrap_or(Value::Null)),
    };
    let _ = reply.send(result);
}
