//! A session's events as they happen (server-sent events, WHATWG HTML section 9.2).
use super::{
    Caller,
    error::{ApiError, Path},
    sessions,
};
use crate::{
    core::{Shared, stopped},
    live::Revocation,
    peers,
    people::Principal,
    store::Listener,
};
use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use futures_util::stream;
use std::{collections::VecDeque, convert::Infallible, time::Duration};
use tokio::sync::watch;
use vestibule_api::{
    error::{Chain, ErrorBody, ErrorCode},
    ids::SessionId,
    session::{SessionEvent, SessionEventKind},
};

/// A comment line at least so often, so that whoever is in between keeps the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Where controllers share the database, it is looked at so often.
const LOOK: Duration = Duration::from_secs(1);
/// Events read from the database at a time.
const PAGE: u32 = 256;

/// A frame of the stream.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "the document alone reads it")]
struct ServerSentEvent {
    /// The event's number.
    id: String,
    /// The event's type.
    event: String,
    /// A `SessionEvent` as JSON.
    data: String,
}

/// The session's events: those after `Last-Event-ID`, then as they happen, until the session's last.
#[utoipa::path(get, path = "/api/auth/session/{id}/events", tag = "sign-in", operation_id = "events",
    params(("id" = SessionId, Path), ("Last-Event-ID" = Option<u64>, Header, description = "the last event that was seen")),
    responses(
        (status = 200, content_type = "text/event-stream", body = ServerSentEvent,
            description = "one frame after the other; ends after the last state"),
        (status = 204, description = "the session has ended and everything was seen"),
        (status = 404, body = ErrorBody), (status = 410, body = ErrorBody),
    ))]
pub(super) async fn events(
    State(core): State<Shared>,
    caller: Caller,
    Path(id): Path<SessionId>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let after = match headers
        .get("last-event-id")
        .map(|value| value.to_str().unwrap_or_default())
    {
        None => 0,
        Some(text) => text
            .parse()
            .ok()
            .filter(|after| i64::try_from(*after).is_ok())
            .ok_or_else(|| {
                ApiError::new(
                    ErrorCode::InvalidRequest,
                    "Last-Event-ID: not a number",
                    "send the `id` of an event",
                )
            })?,
    };
    // Listening begins before the look at the rows: nothing falls between.
    let changes = core.store.signals.listen(id);
    let revocation = core
        .live
        .revocation(&caller.principal.id, caller.revocations);
    let row = sessions::find(&core, id).await?;
    if row.state.is_terminal() && core.store.events(id, after, 1).await?.is_empty() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let stopping = core.stopping.clone();
    let tail = Tail {
        core,
        id,
        caller: caller.principal,
        after,
        ready: VecDeque::new(),
        changes,
        stopping,
        revocation,
        done: false,
    };
    let frames = stream::unfold(tail, |mut tail| async move {
        let event = tail.next().await?;
        Some((Ok::<_, Infallible>(frame(&event)), tail))
    });
    Ok(Sse::new(frames)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response())
}

struct Tail {
    core: Shared,
    id: SessionId,
    caller: Principal,
    after: u64,
    ready: VecDeque<SessionEvent>,
    changes: Listener,
    stopping: watch::Receiver<bool>,
    revocation: Revocation,
    done: bool,
}

impl Tail {
    async fn next(&mut self) -> Option<SessionEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.after = event.seq;
                self.done =
                    matches!(event.event, SessionEventKind::State { state } if state.is_terminal());
                return Some(self.with_code(event).await);
            }
            if self.done {
                return None;
            }
            match self.core.store.events(self.id, self.after, PAGE).await {
                Ok(events) if events.is_empty() => self.changed().await?,
                Ok(events) => self.ready.extend(events),
                Err(err) => {
                    tracing::error!(session.id = %self.id, error = %Chain(&err), "a session's events can't be read");
                    return None;
                }
            }
        }
    }

    /// The code that the person compares is not in the database: the controller that follows the VM has it.
    async fn with_code(&self, mut event: SessionEvent) -> SessionEvent {
        if let SessionEventKind::UserCode { code } = &mut event.event {
            let known = match self.core.live.user_code(self.id) {
                Some(code) => Some(code),
                None => peers::user_code(&self.core, &self.caller, self.id).await,
            };
            *code = known.unwrap_or_default();
        }
        event
    }

    /// Waits for a change of this session. None: the controller stops, or who listens may do so no more.
    async fn changed(&mut self) -> Option<()> {
        tokio::select! {
            () = self.changes.changed() => Some(()),
            // What another controller changed is a notice of the database's, and seen without it as well.
            () = tokio::time::sleep(LOOK), if self.core.store.is_shared() => Some(()),
            () = stopped(self.stopping.clone()) => None,
            () = self.revocation.revoked() => None,
        }
    }
}

fn frame(event: &SessionEvent) -> sse::Event {
    let data = serde_json::to_value(event).unwrap_or_default();
    let kind = data["event"]["type"]
        .as_str()
        .unwrap_or("message")
        .to_owned();
    sse::Event::default()
        .id(event.seq.to_string())
        .event(kind)
        .data(data.to_string())
}
