//! The terminal: a WebSocket to the agent, through the runner, and the viewer's, message for message.
use super::{Close, MESSAGE_LIMIT, PING, SLOW};
use crate::{
    core::{Shared, stopped},
    live::Revocation,
};
use axum::extract::ws::{Message, WebSocket};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::UnixStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, client::IntoClientRequest as _, protocol::WebSocketConfig},
};
use vestibule_api::{
    ids::MachineId,
    session::{CloseCode, Right},
};

/// Relays until one side ends; why.
pub(crate) async fn run(
    core: &Shared,
    machine: MachineId,
    right: Right,
    revocation: &mut Revocation,
    viewer: &mut WebSocket,
) -> Close {
    let mut agent = match dial(core, machine, right).await {
        Ok(agent) => agent,
        Err(close) => return close,
    };
    let mut stop = std::pin::pin!(stopped(core.stopping.clone()));
    let mut ping = tokio::time::interval(PING);
    loop {
        let step = tokio::select! {
            message = agent.next() => from_agent(message, viewer).await,
            message = viewer.recv() => from_viewer(message, right, &mut agent).await,
            _ = ping.tick() => send(viewer, Message::Ping(bytes::Bytes::new())).await,
            () = revocation.revoked() => Err(Close::revoked()),
            () = &mut stop => Err(Close::new(CloseCode::GoingAway, "the controller stops")),
        };
        if let Err(close) = step {
            return close;
        }
    }
}

async fn dial(
    core: &Shared,
    machine: MachineId,
    right: Right,
) -> Result<WebSocketStream<UnixStream>, Close> {
    let right = match right {
        Right::Control => "control",
        Right::View => "view",
    };
    let refused = |_| {
        Close::new(
            CloseCode::NobodyListens,
            "the agent did not open the terminal",
        )
    };
    let stream = core
        .runner(machine)
        .dial()
        .await
        .map_err(|err| Close::of(&err))?;
    let request = format!("ws://vestibule/agent/terminal?right={right}")
        .into_client_request()
        .map_err(refused)?;
    let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_LIMIT));
    let (socket, _) = tokio_tungstenite::client_async_with_config(request, stream, Some(config))
        .await
        .map_err(refused)?;
    Ok(socket)
}

async fn send(viewer: &mut WebSocket, message: Message) -> Result<(), Close> {
    match tokio::time::timeout(SLOW, viewer.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Close::new(CloseCode::Protocol, "the viewer is gone")),
        Err(_) => Err(Close::new(
            CloseCode::TooSlow,
            "the viewer took nothing for 30 seconds",
        )),
    }
}

async fn from_agent(
    message: Option<Result<tungstenite::Message, tungstenite::Error>>,
    viewer: &mut WebSocket,
) -> Result<(), Close> {
    match message {
        Some(Ok(tungstenite::Message::Binary(bytes))) => send(viewer, Message::Binary(bytes)).await,
        Some(Ok(tungstenite::Message::Text(text))) => {
            send(viewer, Message::Text(text.as_str().into())).await
        }
        Some(Ok(
            tungstenite::Message::Ping(_)
            | tungstenite::Message::Pong(_)
            | tungstenite::Message::Frame(_),
        )) => Ok(()),
        Some(Ok(tungstenite::Message::Close(_)) | Err(_)) | None => {
            Err(Close::new(CloseCode::MachineGone, "the terminal has ended"))
        }
    }
}

async fn from_viewer(
    message: Option<Result<Message, axum::Error>>,
    right: Right,
    agent: &mut WebSocketStream<UnixStream>,
) -> Result<(), Close> {
    let message = match message {
        Some(Ok(Message::Binary(bytes))) => tungstenite::Message::Binary(bytes),
        Some(Ok(Message::Text(text))) => tungstenite::Message::Text(text.as_str().into()),
        Some(Ok(Message::Ping(_) | Message::Pong(_))) => return Ok(()),
        Some(Ok(Message::Close(_))) => {
            return Err(Close::new(
                CloseCode::SessionEnded,
                "the viewer closed the terminal",
            ));
        }
        Some(Err(_)) | None => return Err(Close::new(CloseCode::Protocol, "the viewer is gone")),
    };
    // The agent is told the right as well; nothing of a viewer without control reaches it in the first place.
    if right == Right::View {
        return Ok(());
    }
    let gone = |_| Close::new(CloseCode::MachineGone, "the terminal has ended");
    agent.send(message).await.map_err(gone)
}
