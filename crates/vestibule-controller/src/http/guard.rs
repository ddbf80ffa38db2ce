//! What stands before every handler: request id, own names only, authentication, and the headers of every reply.
use super::error::{ApiError, REQUEST_ID};
use crate::{core::Shared, live::Hash};
use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use std::time::Instant;
use vestibule_api::{error::ErrorCode, time::Timestamp};

/// Nothing inline, nothing remote. `data:` is noVNC's cursor and JPEG rectangles; xterm.js colours spans by attribute.
const CSP: &str = "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; \
                   font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; \
                   frame-ancestors 'none'";
const PERMISSIONS: &str = "clipboard-read=(self), clipboard-write=(self), fullscreen=(self), camera=(), microphone=(), \
                           geolocation=(), display-capture=()";

pub(crate) async fn guard(State(core): State<Shared>, request: Request, next: Next) -> Response {
    let id = uuid::Uuid::now_v7().to_string();
    let begun = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = REQUEST_ID
        .scope(id.clone(), async {
            let needed = check(&core, &request);
            match settle(&core, needed).await {
                Ok(()) => next.run(request).await,
                Err(err) => err.into_response(),
            }
        })
        .await;
    let status = response.status().as_u16();
    core.metrics.request(status);
    // The path without its query: a ticket stands there.
    let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::debug!(request.id = id, %method, path, status, took_ms, "request");
    headers(&mut response, &id);
    response
}

/// What has still to be shown before the request is served.
enum Needed {
    Nothing,
    /// A dashboard that is signed in has this cookie.
    Login(Option<Hash>),
}

fn check(core: &Shared, request: &Request) -> Result<Needed, ApiError> {
    let headers = request.headers();
    if !core.access.is_own_host(headers) {
        return Err(ApiError::new(
            ErrorCode::Forbidden,
            "the Host header is not a name of this server",
            "use http://localhost with the port, or add the name to `allowed_hosts` in the configuration",
        ));
    }
    if !core.access.is_own_origin(request.method(), headers) {
        return Err(ApiError::new(
            ErrorCode::Forbidden,
            "the request comes from a page of another origin",
            "use the dashboard of this server, or send the token instead of a cookie",
        ));
    }
    if is_open(request) || core.access.has_token(headers) {
        return Ok(Needed::Nothing);
    }
    Ok(Needed::Login(core.access.cookie_hash(headers)))
}

async fn settle(core: &Shared, needed: Result<Needed, ApiError>) -> Result<(), ApiError> {
    match needed? {
        Needed::Nothing => return Ok(()),
        Needed::Login(Some(hash)) if core.store.is_login(&hash.hex(), Timestamp::now()).await? => {
            return Ok(());
        }
        Needed::Login(_) => {}
    }
    Err(ApiError::new(
        ErrorCode::Unauthenticated,
        "the request carries no token that is known",
        "open the link that `vestibule link` prints, or send `Authorization: Bearer` with the content of $VESTIBULE_HOME/token",
    ))
}

/// What needs no token: the dashboard's files, liveness, the exchange of a one-time code, and a WebSocket, which has a
/// ticket and is told by a close code what is wrong with it (a browser can't read the body of a refused upgrade).
fn is_open(request: &Request) -> bool {
    let path = request.uri().path();
    let reading = matches!(*request.method(), Method::GET | Method::HEAD);
    let private = path == "/api"
        || path.starts_with("/api/")
        || matches!(path, "/metrics" | "/ready" | "/docs");
    let socket = request.headers().contains_key(header::UPGRADE)
        && path.starts_with("/api/auth/session/")
        && (path.ends_with("/view") || path.ends_with("/terminal"));
    (reading && (!private || socket)) || (path == "/api/login" && *request.method() == Method::POST)
}

fn headers(response: &mut Response, id: &str) {
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(HeaderName::from_static("x-request-id"), id);
    }
    let fixed = [
        (header::CONTENT_SECURITY_POLICY, CSP),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (HeaderName::from_static("permissions-policy"), PERMISSIONS),
        (header::CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in fixed {
        // A handler that says otherwise knows why.
        headers
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
}
