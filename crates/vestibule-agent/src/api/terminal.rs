//! `/terminal` (the sign-in's) and `/shell` (an engineer's) as WebSockets: binary frames are terminal bytes, text frames
//! [`TerminalControl`].
use super::{Refusal, Shared, engineers_only};
use crate::{
    guest::Guest,
    process::Program,
    terminal::{self, Size, View},
};
use axum::{
    extract::{
        Query, State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    http::{HeaderMap, StatusCode},
    response::Response,
};
use serde::Deserialize;
use std::time::Duration;
use vestibule_api::{agent::TerminalControl, error::Chain};

/// A frame of more bytes than this closes the socket; a paste comes in many.
const FRAME_LIMIT: usize = 64 * 1024;
/// A shell that ignores its hang-up is killed after so long.
const GRACE: Duration = Duration::from_secs(2);
/// WebSocket close codes of ours: RFC 6455 leaves 4000 to 4999 to applications.
const TERMINAL_ENDED: u16 = 4000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Right {
    Control,
    View,
}

#[derive(Debug, Deserialize)]
pub(super) struct Wanted {
    right: Right,
}

pub(super) async fn login(
    State(agent): Shared,
    Query(Wanted { right }): Query<Wanted>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let view = View::following(agent.login.terminal.subscribe());
    upgrade
        .max_message_size(FRAME_LIMIT)
        .on_upgrade(move |socket| relay(socket, view, right))
}

#[derive(Debug, Deserialize)]
pub(super) struct ShellSize {
    cols: u16,
    rows: u16,
}

pub(super) async fn shell(
    State(agent): Shared,
    headers: HeaderMap,
    Query(size): Query<ShellSize>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Refusal> {
    engineers_only(&agent, &headers)?;
    let started = terminal::spawn(
        &root_shell(&agent.guest),
        Size::clamped(size.cols, size.rows),
        false,
        None,
    )
    .map_err(|err| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, Chain(&err).to_string()))?;
    Ok(upgrade
        .max_message_size(FRAME_LIMIT)
        .on_upgrade(move |socket| async move {
            let mut child = started.child;
            relay(socket, View::of(started.terminal), Right::Control).await;
            child.end(GRACE).await;
        }))
}

fn root_shell(guest: &Guest) -> Program {
    let home = if guest.person.is_some() {
        "/root".into()
    } else {
        guest.home.clone()
    };
    let env = [
        ("HOME", home.to_string_lossy().into_owned()),
        (
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        ),
        ("TERM", "xterm-256color".to_owned()),
        ("LANG", "C.UTF-8".to_owned()),
        ("DISPLAY", guest.display.clone()),
        (
            "XAUTHORITY",
            guest.xauthority.to_string_lossy().into_owned(),
        ),
    ];
    Program {
        argv: vec!["/bin/bash".to_owned(), "--login".to_owned()],
        env: env
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        directory: home,
        user: None,
    }
}

async fn relay(mut socket: WebSocket, mut view: View, right: Right) {
    loop {
        tokio::select! {
            bytes = view.next() => {
                let Some(bytes) = bytes else { break };
                if socket.send(Message::Binary(bytes)).await.is_err() {
                    return;
                }
            }
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(bytes))) if right == Right::Control => view.send(bytes).await,
                Some(Ok(Message::Text(text))) if right == Right::Control => {
                    if let Ok(control) = serde_json::from_str::<TerminalControl>(&text) {
                        view.control(control).await;
                    }
                }
                // What a mere viewer types is dropped; pings are answered by the library.
                Some(Ok(Message::Binary(_) | Message::Text(_) | Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return,
            },
        }
    }
    let close = CloseFrame {
        code: TERMINAL_ENDED,
        reason: "the program in this terminal has ended".into(),
    };
    // A client that is gone needs no reason.
    let _ = socket.send(Message::Close(Some(close))).await;
}
