//! The agent's HTTP API (routes: [`vestibule_api::agent`]), over the stream for the host and on guest loopback.
mod events;
mod exec;
mod host;
mod login;
mod reply;
mod terminal;

use crate::{agent::Agent, report};
use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tracing::warn;
use vestibule_api::agent::{Health, Report};

pub(crate) use reply::Refusal;

type Shared = State<Arc<Agent>>;

/// A client that has connected has so long to send its request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// A body of more bytes is refused; the largest is a provider pack.
const BODY_LIMIT: usize = 1 << 20;
/// Set by the runner on each request to a VM that belongs to a session.
const SESSION_HEADER: &str = "x-vestibule-session";
/// Connections on guest loopback at once; anybody in the guest may open one.
const LOOPBACK_LIMIT: usize = 64;

/// Every route; for the host alone.
pub(crate) fn for_host(agent: &Arc<Agent>) -> Router {
    common()
        .route("/events", get(events::follow))
        .route("/login", post(login::begin))
        .route("/login/cancel", post(login::cancel))
        .route("/login/credential", post(login::credential))
        .route("/login/url", post(login::reopen))
        .route("/login/transcript", get(login::transcript))
        .route("/terminal", get(terminal::login))
        .route("/shell", get(terminal::shell))
        .route("/exec", post(exec::run))
        .route("/clock", post(host::clock))
        .route("/prepare-snapshot", post(host::prepare_snapshot))
        .method_not_allowed_fallback(reply::no_such_method)
        .fallback(reply::no_such_route)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(Arc::clone(agent))
}

/// What any program in the guest may ask.
pub(crate) fn for_guest(agent: &Arc<Agent>) -> Router {
    common()
        .route("/auth/callback", get(login::callback))
        .method_not_allowed_fallback(reply::no_such_method)
        .fallback(reply::no_such_route)
        .with_state(Arc::clone(agent))
}

fn common() -> Router<Arc<Agent>> {
    Router::new()
        .route("/health", get(health))
        .route("/report", get(full_report))
}

/// Refuses what only an engineer may do, in a VM that has become somebody's. The runner says whose with each request.
fn engineers_only(agent: &Agent, headers: &HeaderMap) -> Result<(), Refusal> {
    let claimed = headers
        .get(SESSION_HEADER)
        .and_then(|id| id.to_str().ok())
        .and_then(|id| id.parse().ok());
    if let Some(session) = claimed {
        agent.session.get_or_init(|| session);
    }
    match agent.session.get() {
        None => Ok(()),
        Some(session) => Err(Refusal::new(
            StatusCode::FORBIDDEN,
            format!(
                "this VM belongs to the session {session}; commands and shells are for VMs without one"
            ),
        )),
    }
}

async fn health(State(agent): Shared) -> Json<Health> {
    Json(agent.health())
}

async fn full_report(State(agent): Shared) -> Json<Report> {
    Json(report::collect(&agent).await)
}

/// Serves one connection to its end, upgrades included.
pub(crate) async fn serve_connection<S>(io: S, router: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // An error here is a peer that went away or does not speak HTTP; its own end shows it.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(router))
        .with_upgrades()
        .await;
}

/// Serves guest loopback for as long as the agent runs.
pub(crate) async fn serve_loopback(listener: TcpListener, agent: Arc<Agent>) {
    let router = for_guest(&agent);
    let slots = Arc::new(tokio::sync::Semaphore::new(LOOPBACK_LIMIT));
    while let Ok(slot) = Arc::clone(&slots).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    serve_connection(stream, router).await;
                    drop(slot);
                });
            }
            Err(err) => {
                warn!(error = %err, "accept a connection on loopback");
                // EMFILE and its like pass only when something else closes a descriptor.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
