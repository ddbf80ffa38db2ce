//! HTTP/1.1 over any byte stream: the runner's Unix socket, a multiplexed stream to the agent.
use crate::session::SessionEvent;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming};
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};

/// A reply's body of more bytes than this is refused.
pub const BODY_LIMIT: usize = 16 << 20;
/// One event is shorter.
const EVENT_LIMIT: usize = 1 << 20;

/// Why a call did not give the reply that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("connect to `{}`", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("call `{what}`")]
    Http {
        what: String,
        #[source]
        err: hyper::Error,
    },
    #[error("build the request `{what}`")]
    Request {
        what: String,
        #[source]
        err: hyper::http::Error,
    },
    #[error("read the reply of `{what}`")]
    Body {
        what: String,
        #[source]
        err: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("understand the reply of `{what}`")]
    Decode {
        what: String,
        #[source]
        err: serde_json::Error,
    },
    #[error("`{what}` answered {status}: {text}")]
    Status {
        what: String,
        status: StatusCode,
        text: String,
    },
}

impl CallError {
    /// The status that the peer answered with, if it answered.
    pub fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } => Some(*status),
            Self::Connect { .. }
            | Self::Http { .. }
            | Self::Request { .. }
            | Self::Body { .. }
            | Self::Decode { .. } => None,
        }
    }
}

/// Sends one request over `io` and returns the reply as soon as its head is there. The connection is driven by a task
/// that ends with it; upgrades work.
///
/// # Errors
/// When the peer does not speak HTTP or goes away.
pub async fn send<S>(io: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, CallError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let what = format!("{} {}", request.method(), request.uri().path());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io))
        .await
        .map_err(|err| CallError::Http {
            what: what.clone(),
            err,
        })?;
    tokio::spawn(connection.with_upgrades());
    sender
        .send_request(request)
        .await
        .map_err(|err| CallError::Http { what, err })
}

/// A JSON request to `path`, without a body where `body` is `None`.
///
/// # Errors
/// When the path is not one.
pub fn json_request<B: serde::Serialize>(
    method: Method,
    path: &str,
    body: Option<&B>,
) -> Result<Request<Full<Bytes>>, CallError> {
    let what = format!("{method} {path}");
    let bytes = match body {
        Some(value) => serde_json::to_vec(value).map_err(|err| CallError::Decode {
            what: what.clone(),
            err,
        })?,
        None => Vec::new(),
    };
    Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "vestibule")
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(bytes)))
        .map_err(|err| CallError::Request { what, err })
}

/// The whole body of a successful reply, at most [`BODY_LIMIT`] bytes.
///
/// # Errors
/// [`CallError::Status`] for any status outside 2xx, with the beginning of the body as text.
pub async fn body(what: &str, reply: Response<Incoming>) -> Result<Bytes, CallError> {
    let (status, bytes) = whole(what, reply, BODY_LIMIT).await?;
    if status.is_success() {
        return Ok(bytes);
    }
    let text = String::from_utf8_lossy(&bytes).chars().take(600).collect();
    Err(CallError::Status {
        what: what.to_owned(),
        status,
        text,
    })
}

/// Status and whole body of a reply, at most `limit` bytes.
///
/// # Errors
/// When the body is longer, or the peer goes away.
pub async fn whole(
    what: &str,
    reply: Response<Incoming>,
    limit: usize,
) -> Result<(StatusCode, Bytes), CallError> {
    let status = reply.status();
    let collected = Limited::new(reply.into_body(), limit).collect().await;
    let collected = collected.map_err(|err| CallError::Body {
        what: what.to_owned(),
        err,
    })?;
    Ok((status, collected.to_bytes()))
}

/// A session's events as the controller sends them: server-sent events (HTML Living Standard section 9.2.6), each with its
/// `seq` as the id by which a stream resumes.
#[derive(Debug)]
pub struct SessionEvents {
    body: Incoming,
    buffer: Vec<u8>,
}

impl SessionEvents {
    const WHAT: &str = "the event stream";

    /// Those in this reply.
    pub fn of(reply: Response<Incoming>) -> Self {
        Self {
            body: reply.into_body(),
            buffer: Vec::new(),
        }
    }

    /// The next event; none where the stream ends. May be dropped at any time: nothing is lost.
    ///
    /// # Errors
    /// When the stream breaks off, or says what no event is.
    pub async fn next(&mut self) -> Result<Option<SessionEvent>, CallError> {
        loop {
            while let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(event) = event_of(&String::from_utf8_lossy(&block))? {
                    return Ok(Some(event));
                }
            }
            if self.buffer.len() > EVENT_LIMIT {
                return Err(not_an_event(format!(
                    "an event of more than {EVENT_LIMIT} bytes"
                )));
            }
            let Some(frame) = self.body.frame().await else {
                return Ok(None);
            };
            let frame = frame.map_err(|err| CallError::Http {
                what: Self::WHAT.to_owned(),
                err,
            })?;
            if let Some(data) = frame.data_ref() {
                self.buffer.extend_from_slice(data);
            }
        }
    }
}

fn not_an_event(why: String) -> CallError {
    CallError::Body {
        what: SessionEvents::WHAT.to_owned(),
        err: why.into(),
    }
}

/// The event of a block; `None` for a comment.
fn event_of(block: &str) -> Result<Option<SessionEvent>, CallError> {
    let field = |name: &str| {
        let mut lines = block.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map(str::trim_start)
    };
    let Some(data) = field("data") else {
        return Ok(None);
    };
    let event: SessionEvent = serde_json::from_str(data).map_err(|err| CallError::Decode {
        what: SessionEvents::WHAT.to_owned(),
        err,
    })?;
    let id = field("id").unwrap_or_default();
    if id != event.seq.to_string() {
        return Err(not_an_event(format!(
            "event {} has the id `{id}`",
            event.seq
        )));
    }
    Ok(Some(event))
}

/// A runner, by its socket. Every call opens a connection of its own.
#[derive(Clone, Debug)]
pub struct Runner {
    socket: PathBuf,
}

impl Runner {
    /// The runner that listens on `socket`. Nothing is opened yet.
    pub fn at(socket: impl AsRef<Path>) -> Self {
        Self {
            socket: socket.as_ref().to_owned(),
        }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Opens a connection to the runner.
    ///
    /// # Errors
    /// [`CallError::Connect`]: `ENOENT` and `ECONNREFUSED` mean that the runner is gone.
    pub async fn dial(&self) -> Result<UnixStream, CallError> {
        UnixStream::connect(&self.socket)
            .await
            .map_err(|err| CallError::Connect {
                path: self.socket.clone(),
                err,
            })
    }

    /// Sends a request and returns the reply's head, for streams and upgrades.
    ///
    /// # Errors
    /// As [`send`].
    pub async fn open(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, CallError> {
        send(self.dial().await?, request).await
    }

    /// A JSON call: sends `body`, reads JSON.
    ///
    /// # Errors
    /// As [`send`], [`body`], and [`CallError::Decode`].
    pub async fn call<B: serde::Serialize, R: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        request: Option<&B>,
    ) -> Result<R, CallError> {
        let what = format!("{method} {path}");
        let reply = self.open(json_request(method, path, request)?).await?;
        let bytes = body(&what, reply).await?;
        let bytes = if bytes.is_empty() {
            Bytes::from_static(b"null")
        } else {
            bytes
        };
        serde_json::from_slice(&bytes).map_err(|err| CallError::Decode { what, err })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// As [`Runner::call`].
    pub async fn get<R: serde::de::DeserializeOwned>(&self, path: &str) -> Result<R, CallError> {
        self.call(Method::GET, path, None::<&()>).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_needs_its_id_and_a_comment_is_none() {
        let data = r#"{"seq":3,"at":"2026-11-23T09:00:00Z","event":{"type":"browser-restarted"}}"#;
        let event = event_of(&format!(
            "id: 3\nevent: browser-restarted\ndata: {data}\n\n"
        ));
        assert_eq!(event.unwrap().unwrap().seq, 3);
        assert!(event_of(&format!("id: 4\ndata: {data}\n\n")).is_err());
        assert!(event_of("id: 4\ndata: nonsense\n\n").is_err());
        assert!(event_of(": heartbeat\n\n").unwrap().is_none());
    }
}
