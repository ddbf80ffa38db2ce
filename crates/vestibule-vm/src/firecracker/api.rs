//! A client of Firecracker's API: HTTP/1.1 on a Unix socket, one request at a time.
//!
//! What the API answers is not what the guest does: `InstanceStart` is answered with 204, and the state is *Running*, where
//! not one instruction of the guest's will ever be right (Firecracker fact 3). Readiness comes over the stream.
use super::{request::Request, version::Version};
use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use hyper::{Method, StatusCode};
use serde::{Deserialize, de::DeserializeOwned};
use std::{io, time::Duration};
use vestibule_api::client::{self, CallError, json_request};

/// An answer's body is shorter: the longest is a sentence.
const BODY_LIMIT: usize = 64 << 10;
/// Characters of Firecracker's words that are kept.
const FAULT_LIMIT: usize = 600;
const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("connect to Firecracker's API at `{socket}`")]
    Connect {
        socket: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error(transparent)]
    Call(#[from] CallError),
    /// In Firecracker's own words.
    #[error("Firecracker refused `{what}` with {status}: {fault}")]
    Refused {
        what: String,
        status: StatusCode,
        fault: String,
    },
    #[error("understand the answer to `{what}`: {why}")]
    Answer { what: String, why: String },
    #[error("Firecracker did not answer `{what}` within {limit:?}")]
    Silent { what: String, limit: Duration },
}

/// The API of one Firecracker.
#[derive(Clone, Debug)]
pub struct Api {
    socket: Utf8PathBuf,
}

#[derive(Deserialize)]
struct VersionAnswer {
    firecracker_version: String,
}

/// The body of every refusal.
#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

impl Api {
    pub fn new(socket: Utf8PathBuf) -> Self {
        Self { socket }
    }

    pub fn socket(&self) -> &Utf8Path {
        &self.socket
    }

    /// Which Firecracker answers. Asked before anything else: requests are built for a version (Firecracker fact 4).
    ///
    /// # Errors
    /// When nobody listens yet, or the answer is none.
    pub async fn version(&self) -> Result<Version, ApiError> {
        let what = "GET /version";
        let bytes = within(what, VERSION_LIMIT, async {
            let request = json_request(Method::GET, "/version", None::<&()>)?;
            self.exchange(what, request).await
        })
        .await?;
        let answer: VersionAnswer = decode(what, &bytes)?;
        answer
            .firecracker_version
            .parse()
            .map_err(|err: super::version::NotAVersion| ApiError::Answer {
                what: what.to_owned(),
                why: err.to_string(),
            })
    }

    /// Sends one request and waits until Firecracker has done it.
    ///
    /// # Errors
    /// [`ApiError::Refused`] with Firecracker's words; [`ApiError::Silent`] after [`Request::limit`].
    pub async fn send(&self, request: &Request) -> Result<(), ApiError> {
        let (method, path) = (request.method(), request.path());
        let what = format!("{method} {path}");
        within(&what, request.limit(), async {
            let body = request.body().map_err(|err| CallError::Decode {
                what: what.clone(),
                err,
            })?;
            let request = json_request(method, &path, Some(&body))?;
            self.exchange(&what, request).await.map(drop)
        })
        .await
    }

    /// One request on a connection of its own: what an earlier answer left behind cannot be taken for this one's.
    async fn exchange(
        &self,
        what: &str,
        request: hyper::Request<http_body_util::Full<Bytes>>,
    ) -> Result<Bytes, ApiError> {
        let io = crate::socket::connect(&self.socket)
            .await
            .map_err(|err| ApiError::Connect {
                socket: self.socket.clone(),
                err,
            })?;
        let reply = client::send(io, request).await?;
        let (status, bytes) = client::whole(what, reply, BODY_LIMIT).await?;
        if status.is_success() {
            return Ok(bytes);
        }
        Err(ApiError::Refused {
            what: what.to_owned(),
            status,
            fault: fault(&bytes),
        })
    }
}

/// The words of a refusal, as a person would read them; the body itself where it is not what it should be.
fn fault(bytes: &[u8]) -> String {
    let words = serde_json::from_slice::<Fault>(bytes).map_or_else(
        |_| String::from_utf8_lossy(bytes).into_owned(),
        |fault| fault.fault_message,
    );
    let printable = words.chars().filter(|c| !c.is_control() || *c == '\n');
    let line: String = printable.map(|c| if c == '\n' { ' ' } else { c }).collect();
    line.trim().chars().take(FAULT_LIMIT).collect()
}

fn decode<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|err| ApiError::Answer {
        what: what.to_owned(),
        why: err.to_string(),
    })
}

async fn within<T>(
    what: &str,
    limit: Duration,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(ApiError::Silent {
            what: what.to_owned(),
            limit,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_refusal_are_kept_and_bounded() {
        let said = br#"{"fault_message":"The kernel file cannot be opened:\nNo such file\u0007"}"#;
        assert_eq!(
            fault(said),
            "The kernel file cannot be opened: No such file"
        );
        assert_eq!(fault(b"nonsense"), "nonsense");
        let long = format!(r#"{{"fault_message":"{}"}}"#, "x".repeat(5000));
        assert_eq!(fault(long.as_bytes()).len(), FAULT_LIMIT);
    }

    #[tokio::test]
    async fn a_socket_where_nobody_listens_is_named() {
        let dir = camino_tempfile::tempdir().unwrap();
        let api = Api::new(dir.path().join("api.sock"));
        let err = api.version().await.unwrap_err();
        assert!(err.to_string().contains("api.sock"), "{err}");
        assert!(matches!(err, ApiError::Connect { .. }));
    }
}
