//! Runners without VMs by the thousand, all in one process. The controller starts a program for each, as it always does; that
//! program ([`join`]) hands its specification and its standard error, the lock by which the controller knows that the runner
//! lives, to the crowd, and ends.
use super::{Pace, Runner};
use crate::bench::relay::{
    pour,
    stream::{Pattern, Ring, Screen},
};
use anyhow::{Context, Result};
use axum::{
    extract::{Request, State},
    response::Response,
    routing::get,
};
use camino::Utf8Path;
use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{
    io::AsyncReadExt as _,
    net::{UnixListener, unix::SocketAddr},
    task::JoinHandle,
};
use vestibule_api::{
    descriptor,
    ids::SessionId,
    machine::{RunnerEventKind, VmSpec},
};

/// A specification is smaller than this.
const SPEC_LIMIT: u64 = 4 << 20;

/// The runners of this process.
#[derive(Debug)]
pub struct Crowd {
    runners: Arc<Runners>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Runners {
    pace: Pace,
    ring: Arc<Ring>,
    of: Mutex<HashMap<SessionId, Arc<Runner>>>,
}

impl Runners {
    fn of(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Runner>>> {
        self.of.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Crowd {
    /// Takes runners in on the Unix socket `path`; their person signs in when [`Crowd::sign_in`] says so.
    ///
    /// # Errors
    /// When the socket can't be had.
    pub fn listen(path: &Utf8Path, pace: Pace) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| format!("listen on `{path}`"))?;
        let runners = Arc::new(Runners {
            pace,
            ring: Arc::new(Ring::new(Pattern::Quiet)),
            of: Mutex::default(),
        });
        let joined = Arc::clone(&runners);
        let accepting = tokio::spawn(async move {
            loop {
                let accepted: std::io::Result<(_, SocketAddr)> = listener.accept().await;
                let Ok((stream, _)) = accepted else { return };
                let runners = Arc::clone(&joined);
                tokio::spawn(async move {
                    if let Err(err) = live(&runners, stream).await {
                        tracing::error!(error = %format!("{err:#}"), "a runner of the crowd");
                    }
                });
            }
        });
        Ok(Self { runners, accepting })
    }

    /// How many live.
    pub fn len(&self) -> usize {
        self.runners.of().len()
    }

    /// Whether none lives.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The specification of one that lives.
    pub fn any_spec(&self) -> Option<VmSpec> {
        self.runners.of().values().next().map(|r| r.spec.clone())
    }

    /// The runner of this session says something.
    ///
    /// # Errors
    /// When there is none.
    pub fn say(&self, session: SessionId, event: RunnerEventKind) -> Result<()> {
        self.runner(session)?.say(event);
        Ok(())
    }

    /// Ends the runner of this session, as a request to stop does.
    ///
    /// # Errors
    /// When there is none, or its evidence can't be written.
    pub fn end(&self, session: SessionId) -> Result<()> {
        self.runner(session)?.stop().map(drop)
    }

    /// The person of this session finishes to sign in.
    ///
    /// # Errors
    /// When it has no runner.
    pub fn sign_in(&self, session: SessionId) -> Result<()> {
        self.runner(session)?.captured();
        Ok(())
    }

    fn runner(&self, session: SessionId) -> Result<Arc<Runner>> {
        let runner = self.runners.of().get(&session).cloned();
        runner.with_context(|| format!("no runner has session {session}"))
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One runner, from the word of its program to its end.
async fn live(runners: &Runners, mut stream: tokio::net::UnixStream) -> Result<()> {
    let held = receive(&stream).await.context("take its lock over")?;
    let mut text = Vec::new();
    (&mut stream)
        .take(SPEC_LIMIT)
        .read_to_end(&mut text)
        .await
        .context("read its specification")?;
    let spec: VmSpec = serde_json::from_slice(&text).context("understand its specification")?;
    let session = spec.session_id;
    let (runner, listener) = Runner::new(spec, runners.pace)?;
    if let Some(session) = session {
        runners.of().insert(session, Arc::clone(&runner));
    }
    let screen = Arc::clone(&runners.ring);
    let view = get(
        async |State((runner, ring)): State<(Arc<Runner>, Arc<Ring>)>, request: Request| {
            show(&runner, ring, request)
        },
    )
    .with_state((Arc::clone(&runner), screen));
    runner
        .serve(listener, |router| router.route("/view", view))
        .await?;
    if let Some(session) = session {
        runners.of().remove(&session);
    }
    // From here on it does not live any more.
    drop(held);
    Ok(())
}

fn show(runner: &Arc<Runner>, ring: Arc<Ring>, request: Request) -> Response {
    let shows = Arc::clone(runner);
    let shown = move || shows.say(RunnerEventKind::FirstFrame);
    pour::take_over(Screen::new(ring), runner.stopped(), shown, request)
}

async fn receive(stream: &tokio::net::UnixStream) -> Result<OwnedFd> {
    let receive = || descriptor::receive(stream);
    let fd = stream
        .async_io(tokio::io::Interest::READABLE, receive)
        .await?;
    fd.context("no open file came with it")
}

/// What the controller starts as a runner: hands itself to the crowd at `path`.
///
/// # Errors
/// When nobody listens there, or standard input can't be read.
pub fn join(path: &Utf8Path) -> Result<()> {
    let mut spec = Vec::new();
    std::io::stdin()
        .take(SPEC_LIMIT)
        .read_to_end(&mut spec)
        .context("read the specification")?;
    let mut stream =
        UnixStream::connect(path).with_context(|| format!("join the crowd at `{path}`"))?;
    descriptor::send(&stream, b'r', std::io::stderr().as_fd())
        .context("hand standard error over")?;
    stream
        .write_all(&spec)
        .context("hand the specification over")
}
