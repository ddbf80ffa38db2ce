//! How a dashboard gets its cookie: by name and password, or by a one-time code that is asked for with the home's token.
use super::error::{ApiError, Body};
use crate::{auth::LOGIN_LIFE, core::Shared, listen, live, people::password};
use axum::{
    Json,
    extract::{ConnectInfo, FromRequestParts, State},
    http::{HeaderMap, StatusCode, header, request::Parts},
    response::{AppendHeaders, IntoResponse},
};
use std::{net::IpAddr, time::Duration};
use vestibule_api::{
    control::{LoginCodeReply, LoginCodeRequest},
    error::{ErrorBody, ErrorCode},
    ids::UserId,
    people::PasswordLoginRequest,
    time::Timestamp,
};

/// The address that a request came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(IpAddr);

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        ConnectInfo::<listen::Peer>::from_request_parts(parts, state)
            .await
            .map(|ConnectInfo(peer)| Self(peer.0.ip()))
            .map_err(|err| ApiError::internal(&err))
    }
}

/// Counts an attempt at a password.
pub(super) fn attempt(core: &Shared, peer: Peer, name: &str) -> Result<(), ApiError> {
    let limited = core.limits.login(peer.0, name);
    limited.map_err(|wait| too_often("attempts to sign in", wait))
}

/// Counts a request that makes this server ask the identity provider.
pub(super) fn page(core: &Shared, peer: Peer) -> Result<(), ApiError> {
    let limited = core.limits.page(peer.0);
    limited.map_err(|wait| too_often("attempts to sign in", wait))
}

/// 429: with when to come again.
pub(super) fn too_often(what: &str, wait: Duration) -> ApiError {
    // Rounded up: a second earlier is too early.
    let seconds = wait.as_secs().saturating_add(1);
    ApiError::new(
        ErrorCode::RateLimited,
        format!("too many {what} in a short time"),
        format!("try again in {seconds} s"),
    )
    .retry_after(seconds)
}

/// A one-time code for a dashboard. Only the home's token gets one, not a dashboard's cookie.
#[utoipa::path(post, path = "/api/login-codes", tag = "system", operation_id = "loginCode",
    responses((status = 201, body = LoginCodeReply), (status = 403, body = ErrorBody)))]
pub(super) async fn code(State(core): State<Shared>) -> (StatusCode, Json<LoginCodeReply>) {
    (StatusCode::CREATED, Json(new_code(&core)))
}

pub(crate) fn new_code(core: &Shared) -> LoginCodeReply {
    let (code, expires_at) = core.live.login_code(Timestamp::now());
    let link = format!("{}/#/login/{code}", core.base);
    LoginCodeReply {
        code,
        link,
        expires_at,
    }
}

/// Exchanges a one-time code for the dashboard's cookie.
#[utoipa::path(post, path = "/api/login", tag = "system", operation_id = "login", security(()), request_body = LoginCodeRequest,
    responses((status = 204, description = "the cookie is set"), (status = 401, body = ErrorBody)))]
pub(super) async fn login(
    State(core): State<Shared>,
    Body(request): Body<LoginCodeRequest>,
) -> Result<impl IntoResponse, ApiError> {
    let now = Timestamp::now();
    if !core.live.take_login_code(&request.code, now) {
        return Err(ApiError::new(
            ErrorCode::Unauthenticated,
            "the code is not one, was used, or has expired",
            "run `vestibule link` and open the link that it prints",
        ));
    }
    sign_in(&core, None, now).await
}

/// Signs a dashboard in by name and password.
#[utoipa::path(post, path = "/api/login/password", tag = "system", operation_id = "passwordLogin", security(()),
    request_body = PasswordLoginRequest,
    responses(
        (status = 204, description = "the cookie is set"),
        (status = 401, body = ErrorBody, description = "no such user, or another password"),
        (status = 429, body = ErrorBody, description = "too many attempts"),
    ))]
pub(super) async fn by_password(
    State(core): State<Shared>,
    peer: Peer,
    Body(request): Body<PasswordLoginRequest>,
) -> Result<impl IntoResponse, ApiError> {
    attempt(&core, peer, &request.name)?;
    let user = core.store.user(&request.name).await?;
    let hash = user.as_ref().map(|user| user.password_hash.clone());
    // Whoever signs in elsewhere has none.
    let hash = hash.filter(|hash| !hash.is_empty());
    let right = password::verify(request.password, hash).await;
    let right = right.map_err(|err| ApiError::internal(&err))?;
    let Some(user) = user.filter(|_| right) else {
        tracing::warn!(peer = %peer.0, "an attempt to sign in failed");
        return Err(ApiError::new(
            ErrorCode::Unauthenticated,
            "there is no such user with this password",
            "type both again; an admin gives a new password with `vestibule user passwd`",
        ));
    };
    let now = Timestamp::now();
    core.store.note_login(user.id, now).await?;
    tracing::info!(user = user.principal.name, peer = %peer.0, "a user signed in");
    sign_in(&core, Some(user.id), now).await
}

/// Sets a dashboard's cookie: of this user, or of the local admin.
async fn sign_in(
    core: &Shared,
    user: Option<UserId>,
    now: Timestamp,
) -> Result<impl IntoResponse + use<>, ApiError> {
    let cookie = cookie(core, user, now).await?;
    Ok((
        StatusCode::NO_CONTENT,
        AppendHeaders([(header::SET_COOKIE, cookie)]),
    ))
}

/// `Set-Cookie` of a dashboard that is signed in from now on.
pub(super) async fn cookie(
    core: &Shared,
    user: Option<UserId>,
    now: Timestamp,
) -> Result<String, ApiError> {
    let (cookie, hash) = live::random_token();
    core.store
        .add_login(&hash.hex(), user, now.plus(LOGIN_LIFE), now)
        .await?;
    Ok(core.access.set_cookie(Some(&cookie)))
}

/// Signs this dashboard out.
#[utoipa::path(post, path = "/api/logout", tag = "system", operation_id = "logout",
    responses((status = 204, description = "the cookie is worth nothing any more")))]
pub(super) async fn logout(
    State(core): State<Shared>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, ApiError> {
    if let Some(hash) = core.access.cookie_hash(&headers) {
        core.store.remove_login(&hash.hex()).await?;
    }
    Ok((
        StatusCode::NO_CONTENT,
        AppendHeaders([(header::SET_COOKIE, core.access.set_cookie(None))]),
    ))
}
