//! What holds of whatever an agent answers, as the host reads it: an answer, or an error in words; and an event that the host
//! understands reaches the controller as it is.
use hyper::Method;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use vestibule_api::{
    agent::{
        AgentError, AgentEventLine, CapturedCredential, ClockReply, CredentialReply, ExecReply,
        Health, Report,
    },
    client::{self, SessionEvents},
    error::Chain,
    machine::{RunnerEvent, RunnerEventKind},
    secret::Opener,
};

/// What a runner writes around an agent's event, in bytes. The event itself at most doubles: a list may stand for a table.
const ENVELOPE: usize = 512;

/// `bytes` as every reply whose type the host reads, and as a line of the agent's events.
pub(crate) fn understand(bytes: &[u8]) {
    said::<Health>(bytes);
    said::<Report>(bytes);
    said::<ClockReply>(bytes);
    said::<ExecReply>(bytes);
    said::<AgentError>(bytes);
    if let Some(reply) = said::<CredentialReply>(bytes) {
        assert!(Opener::generate().open(&reply.sealed).is_err());
    }
    // Nobody shows this one's errors: they may quote a secret.
    drop(serde_json::from_slice::<CapturedCredential>(bytes));
    if let Some(line) = said::<AgentEventLine>(bytes) {
        let passed_on = RunnerEvent {
            seq: u64::MAX,
            at: line.at,
            event: RunnerEventKind::Agent { event: line.event },
        };
        let text = serde_json::to_vec(&passed_on).expect("an event can be written");
        assert!(
            text.len() <= 2 * bytes.len() + ENVELOPE,
            "{} bytes",
            text.len()
        );
        assert_eq!(said::<RunnerEvent>(&text).as_ref(), Some(&passed_on));
    }
}

fn said<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    match serde_json::from_slice(bytes) {
        Ok(reply) => Some(reply),
        Err(err) => {
            assert!(!err.to_string().is_empty());
            None
        }
    }
}

/// `bytes` as everything that the other side of a connection says to a request.
pub(crate) async fn hear(bytes: &[u8]) {
    for wanted in [Wanted::Whole, Wanted::Events] {
        let (near, mut far) = duplex(1 << 16);
        let answer = async {
            // The head of the request; it has no body.
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(far.read_u8().await.expect("the client asks"));
            }
            // A client that has heard enough closes the connection.
            drop(far.write_all(bytes).await);
            drop(far);
        };
        let (heard, ()) = tokio::join!(ask(near, wanted), answer);
        if let Err(err) = heard {
            assert!(!Chain(&err).to_string().is_empty());
        }
    }
}

#[derive(Clone, Copy)]
enum Wanted {
    Whole,
    Events,
}

async fn ask(io: tokio::io::DuplexStream, wanted: Wanted) -> Result<(), client::CallError> {
    let request = client::json_request(Method::GET, "/health", None::<&()>)?;
    let reply = client::send(io, request).await?;
    match wanted {
        Wanted::Whole => {
            let body = client::body("GET /health", reply).await?;
            assert!(body.len() <= client::BODY_LIMIT);
            understand(&body);
        }
        Wanted::Events => {
            let mut events = SessionEvents::of(reply);
            while events.next().await?.is_some() {}
        }
    }
    Ok(())
}
