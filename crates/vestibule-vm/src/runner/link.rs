//! The runner's end of the one stream: dials the guest, authenticates, runs the multiplexer, checks the agent, reads its
//! events, and hands the guest's own streams to the egress proxy. When the stream ends it dials again, for as long as
//! the VM lives: an agent that was restarted opens its port anew.
use super::{
    findings,
    shared::{Input, Shared},
};
use crate::driver::Machine;
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::BodyExt;
use hyper::{Method, Response, body};
use std::{sync::Arc, time::Duration};
use tokio_util::{
    codec::{FramedRead, LinesCodec},
    io::StreamReader,
};
use vestibule_api::{
    agent::{AgentEventLine, ClockReply, ClockRequest, Health},
    client::{self, CallError, json_request},
    error::Chain,
    mux::{HandshakeError, Incoming, Mux, MuxError, Side, StreamKey, host_handshake, start},
    stream::Open,
    time::Timestamp,
};

/// Between two attempts: at first hardly anything, since a restored Firecracker may accept and close its first connections
/// (Firecracker fact 11); then longer, so that a port that closes at once does not keep a processor busy.
const REDIAL_FIRST: Duration = Duration::from_millis(10);
const REDIAL: Duration = Duration::from_millis(250);
/// From a connection to an authenticated one. A guest that boots says nothing for longer than this, and is dialled again; one that
/// listens shakes hands in milliseconds. It is for connections that were accepted and stay silent (Firecracker fact 11).
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for the first of a copy, then twice as long each time: it listens already. Seen twice in some 700 copies under QEMU: what
/// the host had said reached the guest when the host hung up, 30 s later, and not before.
const COPY_TIMEOUT: Duration = Duration::from_secs(4);
/// The agent answers `GET /health` without work; a guest under load may take its time all the same.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(60);
/// The guest's clock is looked at so often: what a guest's counter is off by is some ms a minute.
const CLOCK_EVERY: Duration = Duration::from_secs(20);
const CLOCK_TIMEOUT: Duration = Duration::from_secs(30);
const CLOCK_READINGS: u32 = 5;
/// A reading that may be off by no more than this is good enough, and so is a clock.
const CLOCK_GOOD_MICROS: i64 = 5_000;
/// Where somebody waits for the guest to go on, this is: another reading costs its whole way there and back, and what is left is seen
/// to at the next look.
const CLOCK_ENOUGH_MICROS: i64 = 25_000;
/// A line of the agent's events is at most so long: as it is passed on, with what this end writes around it, it is shorter than
/// the 256 KiB that the controller reads.
const EVENT_LIMIT: usize = 64 << 10;

/// See the module.
pub(super) struct Link {
    shared: Arc<Shared>,
    machine: Arc<dyn Machine>,
    key: StreamKey,
    agent_build: String,
    /// How long the next handshake may take.
    patience: Duration,
    /// The last event of the agent's that was passed on: when, and its number.
    last: Option<(Timestamp, u64)>,
    /// Whether the guest has had the host's time from an agent before this one.
    on_time: bool,
}

impl Link {
    pub(super) fn new(
        shared: Arc<Shared>,
        machine: Arc<dyn Machine>,
        key: StreamKey,
        agent_build: String,
    ) -> Self {
        let patience = match shared.spec.restore {
            Some(_) => COPY_TIMEOUT,
            None => HANDSHAKE_TIMEOUT,
        };
        Self {
            shared,
            machine,
            key,
            agent_build,
            patience,
            last: None,
            on_time: false,
        }
    }

    /// Keeps the stream up until the VM is over.
    pub(super) async fn run(mut self) {
        let over = self.shared.over.clone();
        let work = async {
            let mut held = self.shared.held.subscribe();
            let mut redial = REDIAL_FIRST;
            loop {
                // While the VM is being saved nobody is on the stream.
                let _ = held.wait_for(|held| !held).await;
                let words = match self.connect().await {
                    Ok((mux, incoming)) => self.serve(&mux, incoming).await,
                    Err(words) => words,
                };
                self.shared.mux.send_replace(None);
                self.tell(Input::StreamDown(words)).await;
                tokio::time::sleep(redial).await;
                redial = (redial * 2).min(REDIAL);
            }
        };
        tokio::select! {
            () = over.cancelled() => {}
            () = work => {}
        }
    }

    async fn tell(&self, input: Input) {
        // The state driver is gone when the VM is; `over` ends this task then.
        let _ = self.shared.inputs.send(input).await;
    }

    /// Dials and waits for the guest's hello.
    async fn connect(&mut self) -> Result<(Mux, Incoming), String> {
        let mut io = self
            .machine
            .dial()
            .await
            .map_err(|err| Chain(&err).to_string())?;
        let shaken = host_handshake(&mut io, &self.key);
        let patience = self.patience;
        match tokio::time::timeout(patience, shaken).await {
            Ok(Ok(())) => Ok(start(io, Side::Host)),
            Ok(Err(err)) => {
                if let HandshakeError::Version(_) = err {
                    let finding = Box::new(findings::another_handshake(&err));
                    self.tell(Input::AgentRefused(finding)).await;
                }
                Err(Chain(&err).to_string())
            }
            Err(_) => {
                self.patience = (patience * 2).min(HANDSHAKE_TIMEOUT);
                Err(format!("the guest said nothing for {patience:?}"))
            }
        }
    }

    /// Works with one connection until it ends; returns why.
    async fn serve(&mut self, mux: &Mux, incoming: Incoming) -> String {
        let mut held = self.shared.held.subscribe();
        self.tell(Input::StreamUp).await;
        let accepting = self
            .shared
            .tasks
            .spawn(accept(Arc::clone(&self.shared), incoming));
        let words = tokio::select! {
            why = mux.ended() => Chain(&why).to_string(),
            _ = held.wait_for(|held| *held) => String::from("the VM is being saved"),
            why = self.converse(mux) => why,
        };
        accepting.abort();
        mux.close().await;
        words
    }

    /// Checks the agent, then passes its events on; returns why it stopped.
    async fn converse(&mut self, mux: &Mux) -> String {
        let health = match within(HEALTH_TIMEOUT, "GET /health", health(mux)).await {
            Ok(health) => health,
            Err(words) => return words,
        };
        if let Some(finding) = findings::agent_mismatch(&health, &self.agent_build) {
            self.tell(Input::AgentRefused(Box::new(finding))).await;
            return std::future::pending().await;
        }
        if self.on_time {
            self.shared.mux.send_replace(Some(mux.clone()));
        }
        self.tell(Input::AgentUp(Box::new(health))).await;
        // Not beside the first question, whose answer it would hold up in a guest with one processor.
        if let Err(words) = within(CLOCK_TIMEOUT, "POST /clock", set_clock(mux)).await {
            return words;
        }
        // Nobody else speaks with the first agent before: what the guest does from now on, it does at the right time.
        self.on_time = true;
        self.shared.mux.send_replace(Some(mux.clone()));
        self.tell(Input::Identity).await;
        // A copy takes this question for the sign to become another machine with all that is in it.
        let events = async {
            loop {
                let ended = self.read_events(mux).await;
                tracing::debug!(why = ended, "the agent's events ended");
                tokio::time::sleep(REDIAL).await;
            }
        };
        tokio::select! {
            () = events => String::new(),
            () = keep_clock(mux) => String::new(),
        }
    }

    /// Reads `GET /events` from the beginning and passes on what is new. An agent that was restarted counts from 1
    /// again, so what is new is told by time first.
    async fn read_events(&mut self, mux: &Mux) -> String {
        let reply = match open(mux, "/events?after=0").await {
            Ok(reply) if reply.status().is_success() => reply.into_body(),
            Ok(reply) => return format!("`GET /events` answered {}", reply.status()),
            Err(err) => return Chain(&err).to_string(),
        };
        let reader = StreamReader::new(
            reply
                .into_data_stream()
                .map(|r| r.map_err(std::io::Error::other)),
        );
        let mut lines = FramedRead::new(reader, LinesCodec::new_with_max_length(EVENT_LIMIT));
        while let Some(line) = lines.next().await {
            let line = match line {
                Ok(line) => line,
                Err(err) => return Chain(&err).to_string(),
            };
            match serde_json::from_str::<AgentEventLine>(&line) {
                Ok(event) => self.pass_on(event).await,
                Err(err) => {
                    tracing::warn!(error = %err, "the agent said something that this host does not know");
                }
            }
        }
        String::from("end of file")
    }

    async fn pass_on(&mut self, line: AgentEventLine) {
        let stamp = (line.at, line.seq);
        if self.last.is_none_or(|last| stamp > last) {
            self.last = Some(stamp);
            self.tell(Input::Agent(Box::new(line))).await;
        }
    }
}

/// What a call to the agent gives, or in words why it gave nothing.
pub(super) async fn within<T>(
    limit: Duration,
    what: &str,
    call: impl Future<Output = Result<T, AgentCallError>>,
) -> Result<T, String> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map_err(|err| Chain(&err).to_string()),
        Err(_) => Err(format!("`{what}` was not answered within {limit:?}")),
    }
}

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentCallError {
    #[error(transparent)]
    Stream(#[from] MuxError),
    #[error(transparent)]
    Call(#[from] CallError),
}

/// `GET path` of the agent's, as soon as the head of its reply is there.
async fn open(mux: &Mux, path: &str) -> Result<Response<body::Incoming>, AgentCallError> {
    let request = json_request(Method::GET, path, None::<&()>)?;
    Ok(client::send(mux.open(Open::Http).await?, request).await?)
}

/// `GET path` of the agent's, whole.
pub(super) async fn get(mux: &Mux, path: &str) -> Result<Bytes, AgentCallError> {
    Ok(client::body(path, open(mux, path).await?).await?)
}

async fn health(mux: &Mux) -> Result<Health, AgentCallError> {
    let bytes = get(mux, "/health").await?;
    serde_json::from_slice(&bytes).map_err(|err| {
        let what = String::from("GET /health");
        CallError::Decode { what, err }.into()
    })
}

/// `POST path` of the agent's without a body, to its end.
pub(super) async fn post(mux: &Mux, path: &str) -> Result<Bytes, AgentCallError> {
    call(mux, path, None::<&()>).await
}

async fn call<B: serde::Serialize>(
    mux: &Mux,
    path: &str,
    body: Option<&B>,
) -> Result<Bytes, AgentCallError> {
    let request = json_request(Method::POST, path, body)?;
    let reply = client::send(mux.open(Open::Http).await?, request).await?;
    Ok(client::body(path, reply).await?)
}

/// How far the guest's clock is behind the host's, and how far off that may be; in µs.
#[derive(Clone, Copy, Debug)]
struct Offset {
    behind: i64,
    error: i64,
    /// [`ClockReply::adjusted`] of the reading.
    adjusted: u64,
}

impl Offset {
    /// Of a guest that said `guest` between two moments of the host's. It may say anything.
    fn of(asked: i64, answered: i64, guest: ClockReply) -> Self {
        Self {
            behind: i64::midpoint(asked, answered).saturating_sub(guest.now_micros),
            adjusted: guest.adjusted,
            // The guest read its clock at some moment between the two; the host's may have been set back meanwhile.
            error: answered.saturating_sub(asked).max(0) / 2,
        }
    }

    /// Whether the guest's clock is to be set.
    fn is_off(self) -> bool {
        self.behind.unsigned_abs() > self.error.max(CLOCK_GOOD_MICROS).unsigned_abs()
    }
}

/// Reads the guest's clock, after it was set as asked for.
async fn clock(mux: &Mux, request: ClockRequest) -> Result<Offset, AgentCallError> {
    let asked = Timestamp::now().as_micros();
    let bytes = call(mux, "/clock", Some(&request)).await?;
    let answered = Timestamp::now().as_micros();
    let reply: ClockReply = serde_json::from_slice(&bytes).map_err(|err| {
        let what = String::from("POST /clock");
        CallError::Decode { what, err }
    })?;
    Ok(Offset::of(asked, answered, reply))
}

/// The best of some readings, the last of which may be off by so much. A guest that is `told` has the time with the question: a copy,
/// whose clock is its snapshot's, is right with the first answer, but for the way of the question.
async fn measure(mux: &Mux, enough_micros: i64, told: bool) -> Result<Offset, AgentCallError> {
    let look = ClockRequest {
        at_least_micros: None,
        adjust_micros: 0,
        adjusted: 0,
    };
    let first = ClockRequest {
        at_least_micros: told.then(|| Timestamp::now().as_micros()),
        ..look
    };
    let mut best = clock(mux, first).await?;
    for _ in 1..CLOCK_READINGS {
        if best.error <= enough_micros {
            break;
        }
        let read = clock(mux, look).await?;
        // What was read before somebody set it is of no use.
        if read.error < best.error || read.adjusted != best.adjusted {
            best = read;
        }
    }
    Ok(best)
}

/// Gives a guest that somebody waits for the host's time.
pub(super) async fn set_clock(mux: &Mux) -> Result<(), AgentCallError> {
    adjust_clock(mux, CLOCK_ENOUGH_MICROS, true).await
}

/// The guest is told by how much it is off, not what time it is: how long the telling takes does not matter; it may stay off by
/// `enough_micros`. See [`measure`].
async fn adjust_clock(mux: &Mux, enough_micros: i64, told: bool) -> Result<(), AgentCallError> {
    let off = measure(mux, enough_micros, told).await?;
    tracing::debug!(
        behind_micros = off.behind,
        error_micros = off.error,
        "the guest's clock"
    );
    if off.is_off() {
        let adjust = ClockRequest {
            at_least_micros: None,
            adjust_micros: off.behind,
            adjusted: off.adjusted,
        };
        clock(mux, adjust).await?;
    }
    Ok(())
}

/// Keeps the guest's clock where the host's is. Never ends by itself.
async fn keep_clock(mux: &Mux) {
    loop {
        tokio::time::sleep(CLOCK_EVERY).await;
        // A VM that is paused meanwhile answers late, and is set when it is resumed.
        if let Err(err) = adjust_clock(mux, CLOCK_GOOD_MICROS, false).await {
            tracing::debug!(error = %Chain(&err), "the guest's clock was not read");
        }
    }
}

/// Takes the guest's streams until the connection ends.
async fn accept(shared: Arc<Shared>, mut incoming: Incoming) {
    while let Some(opened) = incoming.accept().await {
        match opened {
            Ok((Open::Proxy, stream)) => {
                let (egress, over) = (Arc::clone(&shared.egress), shared.over.clone());
                shared.tasks.spawn(async move {
                    tokio::select! {
                        () = over.cancelled() => {}
                        () = egress.serve(stream) => {}
                    }
                });
            }
            Ok((open @ (Open::Http | Open::Rfb), _)) => {
                tracing::warn!(
                    ?open,
                    "the guest asked for a service that the host does not offer"
                );
            }
            Err(err) => {
                tracing::warn!(error = %Chain(&err), "the guest opened a stream and it was dropped");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_say_any_time() {
        let now = 1_800_000_000_000_000;
        let of = |answered, now_micros| {
            let reply = ClockReply {
                now_micros,
                adjusted: 0,
            };
            Offset::of(now, answered, reply)
        };
        let off = |guest| of(now + 8_000, guest);
        assert_eq!((off(now + 4_000).behind, off(now).error), (0, 4_000));
        assert!(!off(now).is_off() && off(now - 6_000).is_off());
        for guest in [i64::MIN, i64::MIN + 1, -1, 0, i64::MAX] {
            assert!(off(guest).is_off(), "{guest}");
        }
        assert_eq!(off(i64::MIN).behind, i64::MAX);
        assert_eq!(of(now - 8_000, now).error, 0);
    }
}
