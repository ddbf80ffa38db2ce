//! Who asks.
use super::{
    Caller,
    error::{ApiError, Body},
    login,
};
use crate::{core::Shared, people::password, rights};
use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use vestibule_api::{
    error::{ErrorBody, ErrorCode},
    people::{MeView, OwnPasswordRequest},
};

/// Who asks, and what their role may do.
#[utoipa::path(get, path = "/api/me", tag = "people", operation_id = "me", responses((status = 200, body = MeView)))]
pub(super) async fn me(caller: Caller) -> Json<MeView> {
    let operations = rights::operations(&caller.principal);
    let principal = caller.principal;
    Json(MeView {
        kind: principal.kind,
        name: principal.name,
        role: principal.role,
        organisation: principal.organisation.map(|of| of.name),
        operations,
    })
}

/// Changes the password of the user who asks. Their other dashboards are signed out.
#[utoipa::path(put, path = "/api/me/password", tag = "people", operation_id = "setOwnPassword",
    request_body = OwnPasswordRequest,
    responses(
        (status = 204),
        (status = 400, body = ErrorBody, description = "the new password is too short or too long"),
        (status = 403, body = ErrorBody, description = "the current password is another one"),
        (status = 409, body = ErrorBody, description = "whoever asks has no password"),
        (status = 429, body = ErrorBody, description = "too many attempts"),
    ))]
pub(super) async fn set_password(
    State(core): State<Shared>,
    caller: Caller,
    peer: login::Peer,
    headers: HeaderMap,
    Body(request): Body<OwnPasswordRequest>,
) -> Result<StatusCode, ApiError> {
    let name = &caller.principal.name;
    let user = core.store.user(name).await?;
    let Some(user) = user.filter(|user| user.principal == caller.principal) else {
        return Err(ApiError::new(
            ErrorCode::Conflict,
            format!("`{name}` is no user and has no password"),
            "sign in by name and password",
        ));
    };
    super::people::fit(&request.password)?;
    login::attempt(&core, peer, name)?;
    let right = password::verify(request.current, Some(user.password_hash)).await;
    if !right.map_err(|err| ApiError::internal(&err))? {
        return Err(ApiError::new(
            ErrorCode::Forbidden,
            "current: not the password until now",
            "type the password that you signed in with",
        ));
    }
    let hash = password::hash(request.password).await;
    let hash = hash.map_err(|err| ApiError::internal(&err))?;
    let own = core.access.cookie_hash(&headers).map(|hash| hash.hex());
    core.store
        .set_password(user.id, &hash, own.as_deref())
        .await?;
    tracing::info!(user = name, "a user changed their password");
    Ok(StatusCode::NO_CONTENT)
}
