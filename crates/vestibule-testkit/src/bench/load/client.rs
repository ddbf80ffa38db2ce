//! The people of the load: each follows the events of one session and watches its screen, as a browser's tab does.
use crate::api::{Api, Socket};
use anyhow::{Context, Result, ensure};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};
use tokio::task::JoinHandle;
use vestibule_api::{
    agent::{AgentEvent, LoginEvent},
    client::SessionEvents,
    ids::SessionId,
    machine::RunnerEventKind,
    session::{Right, SessionEvent, SessionEventKind, SessionState},
};

/// What the people saw, all together.
#[derive(Debug)]
pub(super) struct Seen {
    begun: Instant,
    /// From an event's birth in the runner to its arrival, ms.
    latencies: Mutex<Vec<f64>>,
    /// Frames of screens.
    pub(super) frames: AtomicU64,
    /// Screens that are watched now.
    pub(super) watching: AtomicUsize,
}

impl Seen {
    /// Nothing yet.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            begun: Instant::now(),
            latencies: Mutex::default(),
            frames: AtomicU64::new(0),
            watching: AtomicUsize::new(0),
        })
    }

    /// An event that says when it was born.
    pub(super) fn stamp(&self) -> RunnerEventKind {
        let event = LoginEvent::UrlCaptured {
            host: "idp.test".to_owned(),
            path: format!("/{}", self.begun.elapsed().as_micros()),
            source: vestibule_api::agent::UrlSource::Shim,
        };
        RunnerEventKind::Agent {
            event: AgentEvent::Login { event },
        }
    }

    /// The latencies since the last call, ms.
    pub(super) fn take_latencies(&self) -> Vec<f64> {
        std::mem::take(
            &mut *self
                .latencies
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    fn event(&self, event: &SessionEvent) {
        let SessionEventKind::UrlOpened { path, .. } = &event.event else {
            return;
        };
        let Some(born) = path
            .strip_prefix('/')
            .and_then(|micros| micros.parse::<f64>().ok())
        else {
            return;
        };
        let latency = self.begun.elapsed().as_secs_f64() * 1e3 - born / 1e3;
        self.latencies
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(latency);
    }
}

/// A session with somebody at it.
#[derive(Debug)]
pub(super) struct Person {
    pub(super) id: SessionId,
    events: JoinHandle<Result<SessionState>>,
    view: JoinHandle<Result<()>>,
}

impl Person {
    /// Follows the session, waits until its tool runs, and opens its screen.
    ///
    /// # Errors
    /// When the events break off, the session ends before, or the screen is refused.
    pub(super) async fn arrive(api: &Api, id: SessionId, seen: &Arc<Seen>) -> Result<Self> {
        let mut stream = api.stream(id, 0).await?.context("it has ended already")?;
        until(&mut stream, SessionState::Ready).await?;
        let socket = api.open(id, "view", Right::Control).await?;
        let (told, counted) = (Arc::clone(seen), Arc::clone(seen));
        seen.watching.fetch_add(1, Ordering::Relaxed);
        let view = tokio::spawn(async move {
            let watched = watch(socket, &counted).await;
            counted.watching.fetch_sub(1, Ordering::Relaxed);
            watched
        });
        until(&mut stream, SessionState::AwaitingUser).await?;
        let events = tokio::spawn(async move {
            while let Some(event) = stream.next().await? {
                told.event(&event);
                if let SessionEventKind::State { state } = event.event
                    && state.is_terminal()
                {
                    return Ok(state);
                }
            }
            anyhow::bail!("its events broke off")
        });
        Ok(Self { id, events, view })
    }

    /// Waits for the end of session and screen; how the session ended.
    ///
    /// # Errors
    /// When its events or its screen broke off before.
    pub(super) async fn leave(self) -> Result<SessionState> {
        let state = self.events.await??;
        self.view.await??;
        Ok(state)
    }
}

/// Reads events until the session is in this state.
async fn until(stream: &mut SessionEvents, wanted: SessionState) -> Result<()> {
    loop {
        let event = stream.next().await?.context("its events broke off")?;
        let SessionEventKind::State { state } = event.event else {
            continue;
        };
        ensure!(!state.is_terminal(), "it ended as {}", state.id());
        if state == wanted {
            return Ok(());
        }
    }
}

/// Shakes hands (RFC 6143 section 7.1) and counts frames until the screen is closed.
async fn watch(mut socket: Socket, seen: &Seen) -> Result<()> {
    let mut had = 0;
    // What the server has said by then, and what is answered.
    for (length, answer) in [(12, &b"RFB 003.008\n"[..]), (14, &[1]), (18, &[1])] {
        while had < length {
            let Some(bytes) = socket.receive().await? else {
                anyhow::bail!("the screen closed amid its handshake")
            };
            had += bytes.len();
        }
        socket.send(answer).await?;
    }
    while socket.receive().await?.is_some() {
        seen.frames.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
