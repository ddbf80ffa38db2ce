//! Byte relays between the runner's clients and the guest: the agent's HTTP API with its upgrades, and the screen.
//!
//! Nothing is buffered beyond one chunk a direction: a client that does not read stops the guest's stream, and that one
//! alone.
use super::{
    api::error,
    shared::{Shared, Viewer},
};
use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use hyper::upgrade::OnUpgrade;
use hyper_util::{rt::TokioIo, server::conn::auto::upgrade::downcast};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes},
    net::UnixStream,
};
use vestibule_api::{
    error::{Chain, ErrorCode},
    mux::MuxStream,
    stream::Open,
    view,
};

/// Copied at a time, each direction.
const CHUNK: usize = 64 << 10;
/// When the VM is over, a frame that is under way has so long to end.
const LAST_FRAME: Duration = Duration::from_secs(1);
/// Routes of the agent's that are for the runner alone.
const OURS: [&str; 2] = ["/clock", "/prepare-snapshot"];
/// A stream to the guest opens at once unless all are in use.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

fn unavailable(message: impl Into<String>) -> Response {
    error(
        StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::MachineUnavailable,
        message,
        "wait until the VM is ready, or read its events and console",
    )
}

async fn open(shared: &Shared, service: Open) -> Result<MuxStream, Response> {
    let Some(mux) = shared.mux.borrow().clone() else {
        return Err(unavailable("there is no stream to the agent now"));
    };
    match tokio::time::timeout(OPEN_TIMEOUT, mux.open(service)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(err)) => Err(unavailable(Chain(&err).to_string())),
        Err(_) => Err(unavailable("every stream to the guest is in use")),
    }
}

/// `GET /view`: after `101`, RFB byte for byte, or in frames on a connection that is handed over.
pub(super) async fn view(State(shared): State<Arc<Shared>>, mut request: Request) -> Response {
    let asked = |protocol: &&str| asks_for(request.headers(), protocol);
    let Some(protocol) = [view::FRAMES, view::RAW].into_iter().find(asked) else {
        return error(
            StatusCode::UPGRADE_REQUIRED,
            ErrorCode::InvalidRequest,
            "the screen is an upgraded connection",
            "send `Connection: upgrade` and `Upgrade: rfb` or `rfb-frames`",
        );
    };
    let stream = match open(&shared, Open::Rfb).await {
        Ok(stream) => stream,
        Err(response) => return response,
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let viewer = shared.viewer();
    if protocol == view::FRAMES {
        spawn_frames(&shared, upgrade, stream, viewer);
    } else {
        spawn_relay(&shared, upgrade, stream, Some(viewer));
    }
    switching(HeaderValue::from_static(protocol))
}

fn switching(protocol: HeaderValue) -> Response {
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, protocol),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// Whether the client asks for an upgrade to `protocol` (RFC 9110 section 7.8).
fn asks_for(headers: &HeaderMap, protocol: &str) -> bool {
    headers
        .get(header::UPGRADE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| {
            let mut names = value.split(',').map(str::trim);
            names.any(|name| name.eq_ignore_ascii_case(protocol))
        })
}

/// Copies both ways until both sides are done or the VM is over.
fn spawn_relay<S>(shared: &Arc<Shared>, client: OnUpgrade, mut guest: S, viewer: Option<Viewer>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (over, busy) = (shared.over.clone(), shared.activity.begin());
    let relay = async move {
        let _open = (viewer, busy);
        // A client that went away before the upgrade leaves nothing to relay.
        let Ok(client) = client.await else { return };
        let mut client = TokioIo::new(client);
        let copied = copy_bidirectional_with_sizes(&mut client, &mut guest, CHUNK, CHUNK).await;
        if let Err(err) = copied {
            tracing::debug!(error = %err, "a relay ended");
        }
    };
    shared.tasks.spawn(async move {
        tokio::select! {
            () = over.cancelled() => {}
            () = relay => {}
        }
    });
}

/// Writes frames on the viewer's own connection until one side ends or the VM is over.
fn spawn_frames(shared: &Arc<Shared>, client: OnUpgrade, guest: MuxStream, viewer: Viewer) {
    let (over, busy) = (shared.over.clone(), shared.activity.begin());
    let (shared_over, shown) = (over.clone(), Arc::clone(shared));
    let relay = async move {
        let _open = (viewer, busy);
        let Ok(client) = client.await else { return };
        // The socket itself: a connection is received beside its bytes.
        let Ok(parts) = downcast::<TokioIo<UnixStream>>(client) else {
            tracing::warn!("a view came over something else than the runner's socket");
            return;
        };
        let over = shared_over.cancelled_owned();
        let shown = || shown.frame_shown();
        match view::take_over(parts.io.into_inner(), guest, over, shown).await {
            Ok(end) => tracing::debug!(?end, "a view ended"),
            Err(err) => tracing::debug!(error = %err, "a view was not taken over"),
        }
    };
    shared.tasks.spawn(async move {
        let late = async {
            over.cancelled().await;
            tokio::time::sleep(LAST_FRAME).await;
        };
        tokio::select! {
            () = late => {}
            () = relay => {}
        }
    });
}

/// `* /agent/…`: the agent's own HTTP API, upgrades included.
pub(super) async fn agent(State(shared): State<Arc<Shared>>, mut request: Request) -> Response {
    let Some(uri) = agent_uri(request.uri()) else {
        return error(
            StatusCode::NOT_FOUND,
            ErrorCode::NotFound,
            "there is no such path of the agent's",
            "see vestibule_api::agent",
        );
    };
    if request.method() == Method::POST
        && uri.path() == "/exec"
        && shared.view().session_id.is_some()
    {
        return error(
            StatusCode::FORBIDDEN,
            ErrorCode::Forbidden,
            "this VM belongs to a session; nobody runs programs in it",
            "start a VM of your own: `vestibule vm run`",
        );
    }
    if OURS.contains(&uri.path()) {
        return error(
            StatusCode::FORBIDDEN,
            ErrorCode::Forbidden,
            "only the runner asks the agent for this",
            "use the runner's own routes: they stand in vestibule_api::machine",
        );
    }
    let stream = match open(&shared, Open::Http).await {
        Ok(stream) => stream,
        Err(response) => return response,
    };
    let client = request
        .headers()
        .contains_key(header::UPGRADE)
        .then(|| hyper::upgrade::on(&mut request));
    *request.uri_mut() = uri;
    strip_hop_by_hop(request.headers_mut(), client.is_some());
    request
        .headers_mut()
        .insert(header::HOST, HeaderValue::from_static("vestibule"));
    match forward(stream, request).await {
        Ok(reply) => relay_reply(&shared, client, reply),
        Err(err) => unavailable(format!("the agent did not answer: {err}")),
    }
}

fn agent_uri(uri: &Uri) -> Option<Uri> {
    let path = uri.path().strip_prefix("/agent")?;
    let query = uri
        .query()
        .map_or_else(String::new, |query| format!("?{query}"));
    format!("{path}{query}").parse().ok()
}

async fn forward(
    stream: MuxStream,
    request: Request,
) -> Result<hyper::Response<hyper::body::Incoming>, hyper::Error> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await
}

fn relay_reply(
    shared: &Arc<Shared>,
    client: Option<OnUpgrade>,
    mut reply: hyper::Response<hyper::body::Incoming>,
) -> Response {
    let upgraded = reply.status() == StatusCode::SWITCHING_PROTOCOLS;
    if upgraded && let Some(client) = client {
        let guest = hyper::upgrade::on(&mut reply);
        let shared_too = Arc::clone(shared);
        shared.tasks.spawn(async move {
            if let Ok(guest) = guest.await {
                spawn_relay(&shared_too, client, TokioIo::new(guest), None);
            }
        });
    }
    strip_hop_by_hop(reply.headers_mut(), upgraded);
    reply.map(Body::new)
}

/// Headers of one hop (RFC 9110 section 7.6.1); an upgrade is the one thing that is passed on.
fn strip_hop_by_hop(headers: &mut HeaderMap, keep_upgrade: bool) {
    for name in [header::TE, header::TRAILER, header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    if !keep_upgrade {
        headers.remove(header::CONNECTION);
        headers.remove(header::UPGRADE);
    }
}
