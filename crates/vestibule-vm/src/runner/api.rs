//! The runner's HTTP API on its Unix socket, as the table in `vestibule_api::machine` says. Handlers read what is
//! published or put a request into the queue; none changes the VM's state.
use super::{
    relay,
    shared::{Answer, Busy, ClaimError, Input, Refused, Shared},
};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Query, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use futures_util::{StreamExt, stream};
use hyper::body as http_body;
use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};
use tokio::sync::oneshot;
use vestibule_api::{
    error::{ErrorBody, ErrorCode, ErrorDetail},
    machine::{Claim, StopRequest},
};

/// A claim carries certificates at most.
const BODY_LIMIT: usize = 1 << 20;
/// What one piece of the console holds.
const CONSOLE_CHUNK: usize = 64 << 10;

/// All routes.
pub(super) fn router(shared: &Arc<Shared>) -> Router {
    Router::new()
        .route("/machine", get(machine))
        .route("/events", get(events))
        .route("/console", get(console))
        .route(
            "/claim",
            post(claim).layer(DefaultBodyLimit::max(BODY_LIMIT)),
        )
        .route("/pause", post(pause))
        .route("/resume", post(resume))
        .route("/snapshot", post(snapshot))
        .route("/stop", post(stop).layer(DefaultBodyLimit::max(BODY_LIMIT)))
        .route("/view", get(relay::view))
        .route("/agent/{*path}", any(relay::agent))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(Arc::clone(shared), count))
        .with_state(Arc::clone(shared))
}

/// An idle VM is one that nobody asks for: a request is open until its reply has been sent.
async fn count(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let busy = shared.activity.begin();
    next.run(request)
        .await
        .map(|body| Body::new(Counted { body, _busy: busy }))
}

/// A body that counts as an open request until it is dropped.
struct Counted {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// An error as every HTTP API of Vestibule's answers it.
pub(super) fn error(
    status: StatusCode,
    code: ErrorCode,
    message: impl Into<String>,
    fix: &str,
) -> Response {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let retry = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(1);
    let error = ErrorDetail {
        code,
        message: message.into(),
        fix: fix.to_owned(),
        finding: None,
        retry_after_s: retry,
        request_id: format!("runner-{}-{number}", std::process::id()),
    };
    (status, Json(ErrorBody { error })).into_response()
}

async fn no_route() -> Response {
    error(
        StatusCode::NOT_FOUND,
        ErrorCode::NotFound,
        "the runner has no such route",
        "the routes stand in vestibule_api::machine",
    )
}

async fn no_method() -> Response {
    error(
        StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::MethodNotAllowed,
        "the route has another method",
        "the routes stand in vestibule_api::machine",
    )
}

fn invalid(message: impl Into<String>) -> Response {
    let fix = "correct the request; the message names what is wrong";
    error(
        StatusCode::BAD_REQUEST,
        ErrorCode::InvalidRequest,
        message,
        fix,
    )
}

fn ending() -> Response {
    error(
        StatusCode::CONFLICT,
        ErrorCode::Conflict,
        "the VM is ending",
        "read its evidence; start another one",
    )
}

async fn machine(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.view()).into_response()
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    #[serde(default)]
    after: u64,
}

async fn events(
    State(shared): State<Arc<Shared>>,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let Ok(Query(query)) = query else {
        return invalid("`after` is a number");
    };
    let lines = shared.events.follow(query.after).map(Ok::<_, Infallible>);
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (kind, Body::from_stream(lines)).into_response()
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct ConsoleQuery {
    /// Bytes from the end; none: everything that is kept.
    tail: Option<u64>,
    #[serde(default)]
    follow: bool,
}

async fn console(
    State(shared): State<Arc<Shared>>,
    query: Result<Query<ConsoleQuery>, axum::extract::rejection::QueryRejection>,
) -> Response {
    let Ok(Query(query)) = query else {
        return invalid("`tail` is a number of bytes, `follow` is `true` or `false`");
    };
    let log = Arc::clone(&shared.console);
    let from = query.tail.map_or(0, |bytes| log.tail_offset(bytes));
    let news = log.progress();
    let follow = query.follow;
    let pieces = stream::try_unfold((log, news, from), move |(log, mut news, at)| async move {
        loop {
            let ended = news.borrow_and_update().ended;
            let (start, bytes) = log.read(at, CONSOLE_CHUNK)?;
            if !bytes.is_empty() {
                let next = start + bytes.len() as u64;
                let notice = match start - at {
                    0 => Vec::new(),
                    dropped => crate::log::dropped_line(dropped).into_bytes(),
                };
                return Ok::<_, std::io::Error>(Some((
                    [notice, bytes].concat(),
                    (log, news, next),
                )));
            }
            if ended || !follow || news.changed().await.is_err() {
                return Ok(None);
            }
        }
    });
    let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    (kind, Body::from_stream(pieces)).into_response()
}

async fn claim(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    let claim: Claim = match serde_json::from_slice(&body) {
        Ok(claim) => claim,
        Err(err) => return invalid(format!("the body is not a claim: {err}")),
    };
    let (reply, answer) = oneshot::channel();
    let input = Input::Claim {
        claim: Box::new(claim),
        reply,
    };
    if shared.inputs.send(input).await.is_err() {
        return ending();
    }
    match answer.await {
        Ok(Ok(view)) => Json(view).into_response(),
        Ok(Err(ClaimError::Taken)) => error(
            StatusCode::CONFLICT,
            ErrorCode::Conflict,
            ClaimError::Taken.to_string(),
            "claim another VM",
        ),
        Ok(Err(ClaimError::Policy(why))) => invalid(why),
        Ok(Err(err @ (ClaimError::Saving | ClaimError::Stopped(_)))) => conflict(err.to_string()),
        Ok(Err(ClaimError::Ending)) | Err(_) => ending(),
    }
}

fn conflict(message: impl Into<String>) -> Response {
    let fix = "read the VM's state and events";
    error(StatusCode::CONFLICT, ErrorCode::Conflict, message, fix)
}

async fn pause(State(shared): State<Arc<Shared>>) -> Response {
    ask(&shared, Input::Pause).await
}

async fn resume(State(shared): State<Arc<Shared>>) -> Response {
    ask(&shared, Input::Resume).await
}

async fn snapshot(State(shared): State<Arc<Shared>>) -> Response {
    ask(&shared, Input::Snapshot).await
}

/// Puts a request without a body into the queue and waits for its answer.
async fn ask<T: serde::Serialize>(
    shared: &Shared,
    input: impl FnOnce(Answer<T>) -> Input,
) -> Response {
    let (reply, answer) = oneshot::channel();
    if shared.inputs.send(input(reply)).await.is_err() {
        return ending();
    }
    match answer.await {
        Ok(Ok(done)) => Json(done).into_response(),
        Ok(Err(Refused::Conflict(words))) => conflict(words),
        Ok(Err(Refused::Unable(words))) => error(
            StatusCode::NOT_IMPLEMENTED,
            ErrorCode::MachineUnavailable,
            words,
            "do without it, or use another driver",
        ),
        Ok(Err(Refused::Failed(finding))) => {
            let mut response = ErrorDetail {
                code: ErrorCode::MachineUnavailable,
                message: finding.why.clone(),
                fix: finding.fix.clone(),
                finding: None,
                retry_after_s: None,
                request_id: format!("runner-{}", std::process::id()),
            };
            response.finding = Some(*finding);
            let body = ErrorBody { error: response };
            (StatusCode::INTERNAL_SERVER_ERROR, Json(body)).into_response()
        }
        Err(_) => ending(),
    }
}

async fn stop(State(shared): State<Arc<Shared>>, body: Bytes) -> Response {
    let request = if body.is_empty() {
        Ok(StopRequest::default())
    } else {
        serde_json::from_slice(&body)
    };
    let request = match request {
        Ok(request) => request,
        Err(err) => return invalid(format!("the body is not a stop request: {err}")),
    };
    let (reply, answer) = oneshot::channel();
    let input = Input::Stop {
        request,
        reply: Some(reply),
    };
    if shared.inputs.send(input).await.is_err() {
        return ending();
    }
    match answer.await {
        Ok(disposal) => Json(disposal).into_response(),
        Err(_) => ending(),
    }
}
