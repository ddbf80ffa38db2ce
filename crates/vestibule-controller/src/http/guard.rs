//! What stands before every handler: request id, own names only, who asks and whether they may, and the headers of every
//! reply.
use super::error::{ApiError, REQUEST_ID};
use crate::{
    auth::Access,
    core::Shared,
    peers::{self, Relayed},
    people::Principal,
    rights::{self, Gate, Object, Reach, Rule},
    store::Scope,
};
use axum::{
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use std::{str::FromStr, time::Instant};
use vestibule_api::{
    error::ErrorCode,
    ids::{CredentialId, InvalidId, MachineId, SessionId},
    time::Timestamp,
};

/// Nothing inline, nothing remote. `data:` is noVNC's cursor and JPEG rectangles; xterm.js colours spans by attribute.
const CSP: &str = "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; \
                   font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; \
                   frame-ancestors ";
const PERMISSIONS: &str = "clipboard-read=(self), clipboard-write=(self), fullscreen=(self), camera=(), microphone=(), \
                           geolocation=(), display-capture=()";

pub(crate) async fn guard(State(core): State<Shared>, request: Request, next: Next) -> Response {
    let id = uuid::Uuid::now_v7().to_string();
    let begun = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = REQUEST_ID
        .scope(id.clone(), async {
            let (mut parts, body) = request.into_parts();
            match admit(&core, &parts).await {
                Ok(admitted) => {
                    if let Some(caller) = admitted.caller.clone() {
                        parts.extensions.insert(caller);
                    }
                    let request = Request::from_parts(parts, body);
                    answer(&core, &admitted, request, next).await
                }
                Err(err) => err.into_response(),
            }
        })
        .await;
    let status = response.status().as_u16();
    core.metrics.request(status);
    // The path without its query: a ticket stands there.
    let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::debug!(request.id = id, %method, path, status, took_ms, "request");
    headers(&core, &mut response, &id);
    response
}

/// Who asks, and how far the right goes by which they may. Handlers that list or make something ask it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) principal: Principal,
    pub(crate) reach: Reach,
    /// Whether another controller asks for them.
    pub(crate) relayed: bool,
    /// [`Live::revocations`](crate::live::Live::revocations) before it was looked up who asks.
    pub(crate) revocations: u64,
}

impl Caller {
    /// Which objects a list shows.
    pub(crate) fn scope(&self) -> Result<Scope, ApiError> {
        self.reach
            .scope(&self.principal)
            .ok_or_else(|| forbidden(&self.principal))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let caller = parts.extensions.get::<Self>();
        caller.cloned().ok_or_else(unauthenticated)
    }
}

/// A request that may be served.
struct Admitted {
    /// None: it needs nobody.
    caller: Option<Caller>,
    rule: Option<&'static Rule>,
    relayed: bool,
}

/// Answers here, or by the controller of the host that has what is asked for.
async fn answer(core: &Shared, admitted: &Admitted, request: Request, next: Next) -> Response {
    let id = request
        .extensions()
        .get::<MatchedPath>()
        .map(|matched| id_of(matched.as_str(), request.uri().path()).to_owned());
    let id = id.unwrap_or_default();
    let host = match peers::elsewhere(core, admitted.rule, &id, admitted.relayed).await {
        Ok(host) => host,
        Err(err) => return err.into_response(),
    };
    let (Some(host), Some(rule)) = (host, admitted.rule) else {
        return next.run(request).await;
    };
    match peers::relay(core, &host, rule, admitted.caller.as_ref(), request).await {
        Ok(response) => response,
        Err((_, Some(request))) => next.run(request).await,
        Err((err, None)) => err.into_response(),
    }
}

async fn admit(core: &Shared, request: &Parts) -> Result<Admitted, ApiError> {
    let headers = &request.headers;
    let own = core.store.host();
    let relayed = core
        .peers
        .relayed(own, &request.method, &request.uri, headers)?;
    let rule = request.extensions.get::<MatchedPath>();
    let rule = rule.and_then(|path| rights::find(request.method.as_str(), path.as_str()));
    let caller = admit_caller(core, request, relayed.as_ref()).await?;
    Ok(Admitted {
        caller,
        rule,
        relayed: relayed.is_some(),
    })
}

/// Lets a request through that may be served. None: it needs nobody.
async fn admit_caller(
    core: &Shared,
    request: &Parts,
    relayed: Option<&Relayed>,
) -> Result<Option<Caller>, ApiError> {
    let headers = &request.headers;
    let revocations = core.live.revocations();
    if !core.access.is_own_host(headers) {
        return Err(ApiError::new(
            ErrorCode::Forbidden,
            "the Host header is not a name of this server",
            "use http://localhost with the port, or add the name to `allowed_hosts` in the configuration",
        ));
    }
    if !core.access.is_own_origin(&request.method, headers) {
        return Err(ApiError::new(
            ErrorCode::Forbidden,
            "the request comes from a page of another origin",
            "use the dashboard of this server, or send the token instead of a cookie",
        ));
    }
    let matched = request.extensions.get::<MatchedPath>();
    let Some(matched) = matched.map(MatchedPath::as_str) else {
        return if is_public_file(request) {
            Ok(None)
        } else {
            // Whether there is such a route is for those who are known.
            let principal = authenticate(core, headers, relayed).await?;
            Ok(Some(Caller {
                principal,
                reach: Reach::None,
                relayed: relayed.is_some(),
                revocations,
            }))
        };
    };
    let rule = rights::find(request.method.as_str(), matched);
    let granted = match rule.map(|rule| &rule.gate) {
        Some(Gate::Open) => return Ok(None),
        Some(Gate::Ticket(_)) if headers.contains_key(header::UPGRADE) => return Ok(None),
        Some(Gate::HomeToken | Gate::Ticket(_) | Gate::Roles(_)) | None => {
            authenticate(core, headers, relayed).await?
        }
    };
    let (principal, Some(rule)) = (granted, rule) else {
        return Err(super::no_method(&request.method));
    };
    let reach = match &rule.gate {
        Gate::Open => Reach::Yes,
        Gate::HomeToken if core.access.has_token(headers) => Reach::Yes,
        Gate::HomeToken => Reach::None,
        Gate::Ticket(granted) | Gate::Roles(granted) => rights::reach(granted, principal.role),
    }
    .of(&principal);
    if reach == Reach::None {
        return Err(forbidden(&principal));
    }
    let caller = Caller {
        principal,
        reach,
        relayed: relayed.is_some(),
        revocations,
    };
    within_reach(core, &caller, rule.object, matched, request.uri.path()).await?;
    Ok(Some(caller))
}

/// Who carries the token or cookie, or whom another controller asks for.
async fn authenticate(
    core: &Shared,
    headers: &HeaderMap,
    relayed: Option<&Relayed>,
) -> Result<Principal, ApiError> {
    if let Some(relayed) = relayed {
        return relayed.principal.clone().ok_or_else(unauthenticated);
    }
    let now = Timestamp::now();
    if core.access.has_token(headers) {
        return Ok(Principal::local());
    }
    let found = if let Some(hash) = Access::bearer(headers) {
        core.store.principal_of_token(&hash.hex(), now).await?
    } else if let Some(hash) = core.access.cookie_hash(headers) {
        core.store.principal_of_login(&hash.hex(), now).await?
    } else {
        None
    };
    found.ok_or_else(unauthenticated)
}

fn unauthenticated() -> ApiError {
    ApiError::new(
        ErrorCode::Unauthenticated,
        "the request carries no token that is known",
        "sign in, open the link that `vestibule link` prints, or send `Authorization: Bearer` with a token",
    )
}

fn forbidden(principal: &Principal) -> ApiError {
    ApiError::new(
        ErrorCode::Forbidden,
        format!("the role `{}` may not do this", principal.role),
        "ask the admin of this installation",
    )
}

/// An object that is not within reach is not there: the reply is that of an id that nobody ever gave.
async fn within_reach(
    core: &Shared,
    caller: &Caller,
    object: Object,
    template: &str,
    path: &str,
) -> Result<(), ApiError> {
    if object == Object::None || matches!(caller.reach, Reach::All | Reach::Yes) {
        return Ok(());
    }
    let id = id_of(template, path);
    let (owner, what) = match object {
        Object::None => return Ok(()),
        Object::Session => {
            let id = parse::<SessionId>(id)?;
            (core.store.session_owner(id).await?, format!("session {id}"))
        }
        Object::Machine => {
            let id = parse::<MachineId>(id)?;
            (core.store.machine_owner(id).await?, format!("VM {id}"))
        }
        Object::Credential => {
            let id = parse::<CredentialId>(id)?;
            let owner = core.store.credential_owner(id).await?;
            (Some(owner), format!("credential {id}"))
        }
    };
    match owner {
        Some(owner) if caller.reach.has(&caller.principal, &owner) => Ok(()),
        Some(_) | None => Err(ApiError::not_found(what)),
    }
}

/// What stands in a path where its template has the object's id.
fn id_of<'a>(template: &str, path: &'a str) -> &'a str {
    template
        .split('/')
        .zip(path.split('/'))
        .find_map(|(name, value)| name.starts_with('{').then_some(value))
        .unwrap_or_default()
}

/// Of the path as it was sent: an id with escapes in it is none.
fn parse<T: FromStr<Err = InvalidId>>(id: &str) -> Result<T, ApiError> {
    id.parse().map_err(|err: InvalidId| {
        ApiError::new(
            ErrorCode::InvalidRequest,
            err.to_string(),
            "correct the id in the path",
        )
    })
}

/// The dashboard's own files need nobody.
fn is_public_file(request: &Parts) -> bool {
    let path = request.uri.path();
    let reading = matches!(request.method, Method::GET | Method::HEAD);
    reading && path != "/api" && !path.starts_with("/api/")
}

/// The content security policy, with whose pages may show this server's in a frame; nobody's where none is named.
pub(crate) fn policy(frame_ancestors: &[String]) -> String {
    let ancestors = match frame_ancestors {
        [] => "'none'".to_owned(),
        allowed => allowed.join(" "),
    };
    format!("{CSP}{ancestors}")
}

fn headers(core: &Shared, response: &mut Response, id: &str) {
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::from_str(&core.policy) {
        headers
            .entry(header::CONTENT_SECURITY_POLICY)
            .or_insert(policy);
    }
    if core.config.frame_ancestors.is_empty() {
        // For browsers that do not know the policy's `frame-ancestors`; it can name nobody.
        headers
            .entry(header::X_FRAME_OPTIONS)
            .or_insert(HeaderValue::from_static("DENY"));
    }
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(HeaderName::from_static("x-request-id"), id);
    }
    let fixed = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
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
