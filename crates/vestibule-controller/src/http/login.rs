//! How a dashboard gets its cookie: a one-time code, asked for with the token, exchanged once.
use super::error::{ApiError, Body};
use crate::{auth::LOGIN_LIFE, core::Shared, live};
use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{AppendHeaders, IntoResponse},
};
use vestibule_api::{
    control::{LoginCodeReply, LoginCodeRequest},
    error::{ErrorBody, ErrorCode},
    time::Timestamp,
};

/// A one-time code for a dashboard. Only the token gets one, not another dashboard's cookie.
#[utoipa::path(post, path = "/api/login-codes", tag = "system", operation_id = "loginCode",
    responses((status = 201, body = LoginCodeReply), (status = 403, body = ErrorBody)))]
pub(super) async fn code(
    State(core): State<Shared>,
    headers: HeaderMap,
) -> Result<(StatusCode, Json<LoginCodeReply>), ApiError> {
    if !core.access.has_token(&headers) {
        return Err(ApiError::new(
            ErrorCode::Forbidden,
            "a dashboard can't make codes for others",
            "run `vestibule link` where the token is",
        ));
    }
    Ok((StatusCode::CREATED, Json(new_code(&core))))
}

pub(crate) fn new_code(core: &Shared) -> LoginCodeReply {
    let (code, expires_at) = core.live.login_code(Timestamp::now());
    let link = format!("http://{}/#/login/{code}", core.address);
    LoginCodeReply {
        code,
        link,
        expires_at,
    }
}

/// Exchanges a one-time code for the dashboard's cookie.
#[utoipa::path(post, path = "/api/login", tag = "system", operation_id = "login", request_body = LoginCodeRequest,
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
    let (cookie, hash) = live::random_token();
    core.store
        .add_login(&hash.hex(), now.plus(LOGIN_LIFE), now)
        .await?;
    Ok((
        StatusCode::NO_CONTENT,
        AppendHeaders([(header::SET_COOKIE, core.access.set_cookie(Some(&cookie)))]),
    ))
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
