//! The role `agent`: one thread, one runtime, and the state that its tasks share.
use crate::{
    api, attach, clock::Clock, desktop, events::EventLog, guest::Guest, link, login::Logins,
    notify, proxy, readiness::Readiness, renew::Life, shim, watchdog,
};
use sha2::{Digest as _, Sha256};
use std::{
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tracing::info;
use vestibule_api::{
    agent::{AGENT_API, AGENT_PORT, DisplayReport, Health, PROXY_PORT},
    ids::SessionId,
    mux::Mux,
};

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    #[error("read the agent's own program")]
    OwnProgram(#[source] io::Error),
    #[error("listen on 127.0.0.1:{port}")]
    Listen {
        port: u16,
        #[source]
        err: io::Error,
    },
    #[error("listen on `{}`", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("find the user `{0}` in /etc/passwd")]
    User(&'static str),
}

/// What the agent's tasks share.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) guest: Guest,
    pub(crate) events: Arc<EventLog>,
    pub(crate) readiness: Readiness,
    /// The stream to the host, while there is one.
    pub(crate) link: watch::Sender<Option<Mux>>,
    pub(crate) login: Logins,
    /// The screen, as it was last looked at.
    pub(crate) display: watch::Sender<Option<DisplayReport>>,
    /// The session that this VM belongs to; once set it stays.
    pub(crate) session: OnceLock<SessionId>,
    pub(crate) clock: Clock,
    /// Whether the host follows the events. By then it has set the clock and has its answers.
    pub(crate) followed: watch::Sender<bool>,
    /// Whether the guest is ready to be saved; then the agent begins anew when the stream ends.
    pub(crate) prepared: watch::Sender<bool>,
    build: String,
}

impl Agent {
    /// The state of an agent that has done nothing yet. `build` is the SHA-256 of the program, in hex.
    pub(crate) fn new(guest: Guest, build: String) -> Arc<Self> {
        Arc::new(Self {
            readiness: Readiness::new(&guest.image),
            guest,
            events: Arc::new(EventLog::new()),
            link: watch::Sender::new(None),
            login: Logins::new(),
            display: watch::Sender::new(None),
            session: OnceLock::new(),
            clock: Clock::default(),
            followed: watch::Sender::new(false),
            prepared: watch::Sender::new(false),
            build,
        })
    }

    /// What `GET /health` says.
    pub(crate) fn health(&self) -> Health {
        let (status, waiting_for) = self.readiness.now();
        Health {
            status,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            build: self.build.clone(),
            api: AGENT_API,
            capabilities: self.guest.capabilities(),
            uptime_ms: Life::read(&self.guest.run).map_or_else(uptime_ms, |life| life.age_ms()),
            waiting_for,
        }
    }
}

/// Runs until systemd ends it.
pub(crate) fn main() -> Result<(), AgentError> {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .without_time()
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AgentError::Runtime)?;
    runtime.block_on(run())
}

async fn run() -> Result<(), AgentError> {
    let build = own_digest().map_err(AgentError::OwnProgram)?;
    let agent = Agent::new(Guest::of_this_system()?, build);
    let run = &agent.guest.run;
    let socket = |name: &str, made: io::Result<UnixListener>| {
        made.map_err(|err| AgentError::Socket {
            path: run.join(name),
            err,
        })
    };
    let shims = socket(shim::SOCKET, shim::listen(&run.join(shim::SOCKET)))?;
    let xterms = socket(attach::SOCKET, attach::listen(&run.join(attach::SOCKET)))?;
    tokio::spawn(shim::serve(Arc::clone(&agent), shims));
    tokio::spawn(attach::serve(Arc::clone(&agent), xterms));
    tokio::spawn(proxy::serve(Arc::clone(&agent), listen(PROXY_PORT).await?));
    tokio::spawn(api::serve_loopback(
        listen(AGENT_PORT).await?,
        Arc::clone(&agent),
    ));
    notify::notify("READY=1\nSTATUS=serving");
    info!(agent.version = env!("CARGO_PKG_VERSION"), "serving");
    watchdog::watch();
    tokio::spawn(Arc::clone(&agent).watch_readiness());
    tokio::spawn(Arc::clone(&agent).watch_units());
    desktop::start(&agent);
    link::keep(agent).await;
    Ok(())
}

async fn listen(port: u16) -> Result<TcpListener, AgentError> {
    // The loopback interface is systemd's to raise (PID 1 does it first thing), so the address is there.
    TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, port))
        .await
        .map_err(|err| AgentError::Listen { port, err })
}

fn own_digest() -> io::Result<String> {
    let bytes = std::fs::read("/proc/self/exe")?;
    Ok(Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Milliseconds since boot, suspend included.
pub(crate) fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec * 1000 + now.tv_nsec / 1_000_000).unwrap_or(0)
}
