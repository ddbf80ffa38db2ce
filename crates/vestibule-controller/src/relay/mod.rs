//! Relays between a viewer's WebSocket and a guest: screen ([`view`]) and [`terminal`].
pub(crate) mod filter;
pub(crate) mod socket;
pub(crate) mod terminal;
pub(crate) mod view;

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use std::time::Duration;
use vestibule_api::{client::CallError, error::Chain, session::CloseCode};

/// A message from a viewer is smaller: the largest is a clipboard.
pub(crate) const MESSAGE_LIMIT: usize = 4 << 20;
pub(crate) use vestibule_api::view::{PING, SLOW};

/// Why a view ends.
#[derive(Clone, Debug)]
pub(crate) struct Close {
    pub(crate) code: CloseCode,
    pub(crate) reason: String,
}

impl Close {
    pub(crate) fn new(code: CloseCode, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
        }
    }

    /// The owner ended the view, or whoever opened it may do so no more.
    fn revoked() -> Self {
        Self::new(CloseCode::Revoked, "the view was revoked")
    }

    /// The reason as it fits: a control frame's payload has at most 125 bytes, two of which are the code (RFC 6455
    /// section 5.5).
    fn short(&self) -> &str {
        let end = self.reason.floor_char_boundary(123);
        self.reason.get(..end).unwrap_or_default()
    }

    /// The runner could not be reached, or refused.
    fn of(err: &CallError) -> Self {
        match err {
            CallError::Connect { .. } => {
                Self::new(CloseCode::MachineGone, "the VM's runner is gone")
            }
            CallError::Status { status, .. } if status.as_u16() == 503 => {
                Self::new(CloseCode::NotReady, "there is no stream to the guest yet")
            }
            CallError::Status { .. }
            | CallError::Http { .. }
            | CallError::Request { .. }
            | CallError::Body { .. }
            | CallError::Decode { .. } => {
                tracing::warn!(error = %Chain(err), "a view could not be opened");
                Self::new(CloseCode::NobodyListens, "the runner did not open the view")
            }
        }
    }
}

/// Says good-bye to a viewer of the terminal with code and reason. One that is gone does not hear it.
pub(crate) async fn close(socket: &mut WebSocket, close: &Close) {
    let frame = CloseFrame {
        code: close.code as u16,
        reason: close.short().into(),
    };
    let farewell = async {
        if socket.send(Message::Close(Some(frame))).await.is_ok() {
            // Until the other side's close: one that is sent into unread data can be lost with a reset.
            while let Some(Ok(_)) = socket.recv().await {}
        }
    };
    drop(tokio::time::timeout(Duration::from_secs(2), farewell).await);
}
