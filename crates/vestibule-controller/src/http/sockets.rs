//! The WebSockets of a session: screen and terminal. Whatever is wrong is said with a close code and a reason.
use super::error::{ApiError, Path, Query};
use crate::{
    core::Shared,
    listen::Stream,
    live::{Revocation, Viewer},
    relay::{self, Close},
    state,
};
use axum::{
    extract::{
        FromRequestParts, State, WebSocketUpgrade, ws::rejection::WebSocketUpgradeRejection,
    },
    http::{StatusCode, header, request::Parts},
    response::{IntoResponse as _, Response},
};
use hyper::upgrade::OnUpgrade;
use hyper_util::{rt::TokioIo, server::conn::auto::upgrade::downcast};
use serde::Deserialize;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use vestibule_api::{
    error::{Chain, ErrorBody, ErrorCode},
    ids::{MachineId, SessionId},
    machine::MachineState,
    session::{CloseCode, Pane, SessionEventKind, ViewerView},
    time::Timestamp,
};

/// The ticket of a WebSocket.
#[derive(Deserialize, utoipa::IntoParams)]
pub(super) struct TicketQuery {
    /// From `POST …/tickets`.
    #[serde(default)]
    ticket: String,
}

/// The session's screen: RFB (RFC 6143) in binary frames.
#[utoipa::path(get, path = "/api/auth/session/{id}/view", tag = "sign-in", operation_id = "view",
    params(("id" = SessionId, Path), TicketQuery),
    responses(
        (status = 101, description = "WebSocket; closed with a code of 4001 to 4010 and a reason"),
        (status = 400, body = ErrorBody, description = "not a WebSocket upgrade"),
    ))]
pub(super) async fn view(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
    Query(query): Query<TicketQuery>,
    upgrade: Connection,
) -> Response {
    tokio::spawn(async move {
        let Some(mut socket) = open(upgrade.on).await else {
            return;
        };
        let close = attend(
            &core,
            id,
            &query.ticket,
            Pane::Screen,
            async |viewer: &mut Admitted| {
                relay::view::run(
                    &core,
                    viewer.machine,
                    viewer.view.right,
                    &mut viewer.revocation,
                    &mut socket,
                )
                .await
            },
        )
        .await;
        relay::socket::close(&mut socket, &close).await;
    });
    upgrade.response
}

/// The session's terminal: binary frames are its bytes, text frames `TerminalControl`.
#[utoipa::path(get, path = "/api/auth/session/{id}/terminal", tag = "sign-in", operation_id = "terminal",
    params(("id" = SessionId, Path), TicketQuery),
    responses(
        (status = 101, description = "WebSocket; closed with a code of 4001 to 4010 and a reason"),
        (status = 400, body = ErrorBody, description = "not a WebSocket upgrade"),
    ))]
pub(super) async fn terminal(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
    Query(query): Query<TicketQuery>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = accept(upgrade)?;
    Ok(upgrade.on_upgrade(async move |mut socket| {
        let close = attend(
            &core,
            id,
            &query.ticket,
            Pane::Terminal,
            async |viewer: &mut Admitted| {
                relay::terminal::run(
                    &core,
                    viewer.machine,
                    viewer.view.right,
                    &mut viewer.revocation,
                    &mut socket,
                )
                .await
            },
        )
        .await;
        relay::close(&mut socket, &close).await;
    }))
}

/// An upgrade to a WebSocket in binary frames that leaves us the connection itself.
pub(super) struct Connection {
    on: OnUpgrade,
    /// `101`, as RFC 6455 section 4.2.2 has it.
    response: Response,
}

impl<S: Send + Sync> FromRequestParts<S> for Connection {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let on = parts.extensions.get::<OnUpgrade>().cloned();
        let checked = WebSocketUpgrade::from_request_parts(parts, state).await;
        let checked = accept(checked)?.protocols(["binary"]);
        let key = parts.headers.get(header::SEC_WEBSOCKET_KEY);
        let (Some(on), Some(key)) = (on, key) else {
            return Err(ApiError::new(
                ErrorCode::InvalidRequest,
                "the connection can't be upgraded",
                "open this address as a WebSocket, over HTTP/1.1",
            ));
        };
        let headers = [
            (header::CONNECTION, "upgrade"),
            (header::UPGRADE, "websocket"),
        ];
        let accept = [(
            header::SEC_WEBSOCKET_ACCEPT,
            derive_accept_key(key.as_bytes()),
        )];
        let mut response = (StatusCode::SWITCHING_PROTOCOLS, headers, accept).into_response();
        if let Some(protocol) = checked.selected_protocol() {
            let headers = response.headers_mut();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, protocol.clone());
        }
        Ok(Self { on, response })
    }
}

/// The connection, out of hyper's hands. None: the viewer is gone.
async fn open(on: OnUpgrade) -> Option<relay::socket::Socket> {
    let parts = downcast::<TokioIo<Stream>>(on.await.ok()?)
        .inspect_err(|_| tracing::error!("a viewer's connection is none of ours"))
        .ok()?;
    relay::socket::open(parts.io.into_inner(), parts.read_buf)
        .await
        .ok()
}

fn accept(
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<WebSocketUpgrade, ApiError> {
    let upgrade = upgrade.map_err(|err| {
        ApiError::new(
            ErrorCode::InvalidRequest,
            err.body_text(),
            "open this address as a WebSocket",
        )
    })?;
    Ok(upgrade
        .max_message_size(relay::MESSAGE_LIMIT)
        .max_frame_size(relay::MESSAGE_LIMIT))
}

/// A viewer's visit: it is let in, served, and its leaving written down. Why it ended.
async fn attend(
    core: &Shared,
    id: SessionId,
    ticket: &str,
    pane: Pane,
    serve: impl AsyncFnOnce(&mut Admitted) -> Close,
) -> Close {
    let close = match admit(core, id, ticket, pane).await {
        Ok(mut admitted) => {
            let close = serve(&mut admitted).await;
            admitted.leave(core, id).await;
            close
        }
        Err(close) => close,
    };
    explain(core, id, pane, close).await
}

/// A viewer that was let in.
struct Admitted {
    machine: MachineId,
    view: ViewerView,
    revocation: Revocation,
    /// Counts the viewer as long as it is here.
    viewer: Viewer,
    /// Writes down that it came.
    joined: JoinHandle<()>,
}

impl Admitted {
    /// Writes down that the viewer is gone, after it was written down that it came.
    async fn leave(self, core: &Shared, id: SessionId) {
        drop(self.viewer);
        drop(self.joined.await);
        let ViewerView {
            who, right, pane, ..
        } = self.view;
        note(core, id, SessionEventKind::ViewerLeft { who, right, pane }).await;
    }
}

/// Who watches is shown to the owner; a view does not fail for it.
async fn note(core: &Shared, id: SessionId, event: SessionEventKind) {
    if let Err(err) = core.store.add_events(id, &[event], Timestamp::now()).await {
        tracing::warn!(session.id = %id, error = %Chain(&err), "who watches could not be written down");
    }
}

/// Uses the ticket up and counts the viewer.
async fn admit(core: &Shared, id: SessionId, ticket: &str, pane: Pane) -> Result<Admitted, Close> {
    let now = Timestamp::now();
    let Some((ticket, revocation)) = core.live.take_ticket(ticket, id, now) else {
        return Err(Close::new(
            CloseCode::BadTicket,
            "the ticket is missing, used, expired, revoked or for another session",
        ));
    };
    let internal = |_| {
        Close::new(
            CloseCode::GoingAway,
            "the controller can't read its database",
        )
    };
    let row = core.store.session(id).await.map_err(internal)?;
    let Some(row) = row.filter(|row| !row.state.is_terminal()) else {
        return Err(Close::new(CloseCode::SessionEnded, "the session has ended"));
    };
    let machine = match row.machine_id {
        Some(id) => core.store.machine(id).await.map_err(internal)?,
        None => None,
    };
    match machine {
        Some(machine) if state::has_screen(row.state, machine.state) => {
            let view = ViewerView {
                who: ticket.who,
                right: ticket.right,
                pane,
                since: now,
            };
            let limit = core.config.limits.viewers;
            let Some(viewer) = core.live.viewer(id, view.clone(), limit) else {
                return Err(Close::new(
                    CloseCode::TooManyViewers,
                    "as many people watch this session as may",
                ));
            };
            let joined = SessionEventKind::ViewerJoined {
                who: view.who.clone(),
                right: view.right,
                pane,
            };
            let noting = core.clone();
            // The first frame does not wait for it.
            let joined = tokio::spawn(async move { note(&noting, id, joined).await });
            Ok(Admitted {
                machine: machine.id,
                view,
                revocation,
                viewer,
                joined,
            })
        }
        Some(machine)
            if matches!(
                machine.state,
                MachineState::Gone | MachineState::Lost | MachineState::Stopping
            ) =>
        {
            Err(Close::new(
                CloseCode::MachineGone,
                "the session's VM is gone",
            ))
        }
        Some(_) | None => Err(Close::new(
            CloseCode::NotReady,
            "the session's VM is not ready yet",
        )),
    }
}

/// A view that broke because the session ended says that.
async fn explain(core: &Shared, id: SessionId, pane: Pane, close: Close) -> Close {
    let close = reason(core, id, close).await;
    tracing::debug!(session.id = %id, ?pane, code = close.code as u16, reason = close.reason, "a view ended");
    close
}

async fn reason(core: &Shared, id: SessionId, close: Close) -> Close {
    if core.is_stopping() {
        return Close::new(CloseCode::GoingAway, "the controller stops");
    }
    if !matches!(
        close.code,
        CloseCode::MachineGone | CloseCode::NobodyListens
    ) {
        return close;
    }
    match core.store.session(id).await {
        Ok(Some(row)) if row.state.is_terminal() => Close::new(
            CloseCode::SessionEnded,
            format!("the session has ended: {}", row.state.id()),
        ),
        Ok(_) | Err(_) => close,
    }
}
