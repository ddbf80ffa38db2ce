//! The WebSockets of a session: screen and terminal. Whatever is wrong is said with a close code and a reason.
use super::error::{ApiError, Path, Query};
use crate::{
    core::Shared,
    live::{Pane, Viewer},
    relay::{self, Close},
};
use axum::{
    extract::{
        State, WebSocketUpgrade,
        ws::{WebSocket, rejection::WebSocketUpgradeRejection},
    },
    response::Response,
};
use serde::Deserialize;
use vestibule_api::{
    error::{ErrorBody, ErrorCode},
    ids::{MachineId, SessionId},
    machine::MachineState,
    session::{CloseCode, Right},
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
        (status = 101, description = "WebSocket; closed with a code of 4001 to 4009 and a reason"),
        (status = 400, body = ErrorBody, description = "not a WebSocket upgrade"),
    ))]
pub(super) async fn view(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
    Query(query): Query<TicketQuery>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = accept(upgrade)?.protocols(["binary"]);
    Ok(upgrade.on_upgrade(move |socket| serve(core, id, query.ticket, Pane::Screen, socket)))
}

/// The session's terminal: binary frames are its bytes, text frames `TerminalControl`.
#[utoipa::path(get, path = "/api/auth/session/{id}/terminal", tag = "sign-in", operation_id = "terminal",
    params(("id" = SessionId, Path), TicketQuery),
    responses(
        (status = 101, description = "WebSocket; closed with a code of 4001 to 4009 and a reason"),
        (status = 400, body = ErrorBody, description = "not a WebSocket upgrade"),
    ))]
pub(super) async fn terminal(
    State(core): State<Shared>,
    Path(id): Path<SessionId>,
    Query(query): Query<TicketQuery>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = accept(upgrade)?;
    Ok(upgrade.on_upgrade(move |socket| serve(core, id, query.ticket, Pane::Terminal, socket)))
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

async fn serve(core: Shared, id: SessionId, ticket: String, pane: Pane, mut socket: WebSocket) {
    let close = match admit(&core, id, &ticket, pane).await {
        Ok((machine, right, _viewer)) => match pane {
            Pane::Screen => relay::view::run(&core, machine, right, &mut socket).await,
            Pane::Terminal => relay::terminal::run(&core, machine, right, &mut socket).await,
        },
        Err(close) => close,
    };
    let close = explain(&core, id, close).await;
    tracing::debug!(session.id = %id, ?pane, code = close.code as u16, reason = close.reason, "a view ended");
    relay::close(&mut socket, &close).await;
}

/// Uses the ticket up and counts the viewer.
async fn admit(
    core: &Shared,
    id: SessionId,
    ticket: &str,
    pane: Pane,
) -> Result<(MachineId, Right, Viewer), Close> {
    let Some(right) = core.live.take_ticket(ticket, id, Timestamp::now()) else {
        return Err(Close::new(
            CloseCode::BadTicket,
            "the ticket is missing, used, expired or for another session",
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
        Some(machine) if matches!(machine.state, MachineState::Up | MachineState::Paused) => {
            let viewer = core.live.viewer(id, pane, core.config.limits.viewers);
            let full = Close::new(
                CloseCode::TooManyViewers,
                "as many people watch this session as may",
            );
            viewer.map(|viewer| (machine.id, right, viewer)).ok_or(full)
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
async fn explain(core: &Shared, id: SessionId, close: Close) -> Close {
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
