//! The agent's HTTP API (routes: [`vestibule_api::agent`]), over the stream for the host and on guest loopback.
mod events;
mod reply;

use crate::agent::Agent;
use axum::{Json, Router, extract::State, routing::get};
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
use vestibule_api::agent::Health;

pub(crate) use reply::Refusal;

type Shared = State<Arc<Agent>>;

/// A client that has connected has so long to send its request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// Connections on guest loopback at once; anybody in the guest may open one.
const LOOPBACK_LIMIT: usize = 64;

/// Every route; for the host alone.
pub(crate) fn for_host(agent: &Arc<Agent>) -> Router {
    common()
        .route("/events", get(events::follow))
        .fallback(reply::no_such_route)
        .with_state(Arc::clone(agent))
}

/// What any program in the guest may ask.
fn for_guest(agent: &Arc<Agent>) -> Router {
    common()
        .fallback(reply::no_such_route)
        .with_state(Arc::clone(agent))
}

fn common() -> Router<Arc<Agent>> {
    Router::new()
        .route("/health", get(health))
        .method_not_allowed_fallback(reply::no_such_method)
}

async fn health(State(agent): Shared) -> Json<Health> {
    Json(agent.health())
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
