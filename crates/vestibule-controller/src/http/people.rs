//! Users, service tokens and organisations: for admins.
use super::{
    Caller,
    error::{ApiError, Body, Path},
    sessions,
};
use crate::{
    core::Shared,
    live,
    people::{Organisation, password},
    store::{NewToken, Removed},
};
use axum::{Json, extract::State, http::StatusCode};
use std::time::Duration;
use vestibule_api::{
    error::{ErrorBody, ErrorCode},
    ids::{LoginName, OrganisationId, OrganisationName, TokenId, UserId},
    people::{
        NewOrganisationRequest, NewTokenReply, NewTokenRequest, NewUserRequest, OrganisationView,
        Password, PasswordRequest, Role, TokenView, UserView,
    },
    time::Timestamp,
};

/// Seconds that a token may live.
const TOKEN_LIFE_S: std::ops::RangeInclusive<u64> = 60..=315_360_000;
/// A quota of more is none.
const MAX_LIVE: u32 = 1_000_000;

/// Users by name.
#[utoipa::path(get, path = "/api/users", tag = "people", operation_id = "users", responses((status = 200, body = [UserView])))]
pub(super) async fn users(State(core): State<Shared>) -> Result<Json<Vec<UserView>>, ApiError> {
    Ok(Json(core.store.users().await?))
}

/// Makes a user.
#[utoipa::path(post, path = "/api/users", tag = "people", operation_id = "addUser", request_body = NewUserRequest,
    responses(
        (status = 201, body = UserView),
        (status = 400, body = ErrorBody, description = "a name, role, organisation or password that can't be"),
        (status = 409, body = ErrorBody, description = "there is a user of that name"),
    ))]
pub(super) async fn add_user(
    State(core): State<Shared>,
    Body(request): Body<NewUserRequest>,
) -> Result<(StatusCode, Json<UserView>), ApiError> {
    let organisation = belongs_to(&core, request.role, request.organisation.as_ref()).await?;
    if let Some(password) = &request.password {
        fit(password)?;
    } else if core.oidc.is_none() {
        return Err(invalid(
            "password: missing, and there is no identity provider where they could sign in",
            "send a password, or set `[oidc]` in the configuration",
        ));
    }
    let view = UserView {
        user_id: UserId::generate(),
        name: request.name,
        role: request.role,
        organisation: request.organisation,
        created_at: Timestamp::now(),
        last_login_at: None,
    };
    let hash = match request.password {
        Some(password) => hash(password).await?,
        None => String::new(),
    };
    if !core
        .store
        .add_user(&view, organisation.as_ref(), &hash)
        .await?
    {
        return Err(taken(&format!("a user `{}`", view.name)));
    }
    tracing::info!(user = %view.name, role = %view.role, "a user was made");
    Ok((StatusCode::CREATED, Json(view)))
}

/// Removes a user: their dashboards are signed out, their views closed, their sessions cancelled. Credentials stay.
#[utoipa::path(delete, path = "/api/users/{name}", tag = "people", operation_id = "removeUser",
    params(("name" = LoginName, Path)),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub(super) async fn remove_user(
    State(core): State<Shared>,
    Path(name): Path<LoginName>,
) -> Result<StatusCode, ApiError> {
    let user = user(&core, &name).await?;
    if core.store.remove_user(user).await? != Removed::Yes {
        return Err(ApiError::not_found(format!("user {name}")));
    }
    core.live.revoke_principal(&user.to_string());
    for session in core.store.live_sessions_of(&user.to_string()).await? {
        sessions::end_session(&core, session).await?;
    }
    tracing::info!(user = %name, "a user was removed");
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a user another password. Their dashboards are signed out.
#[utoipa::path(put, path = "/api/users/{name}/password", tag = "people", operation_id = "setPassword",
    params(("name" = LoginName, Path)), request_body = PasswordRequest,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn set_password(
    State(core): State<Shared>,
    Path(name): Path<LoginName>,
    Body(request): Body<PasswordRequest>,
) -> Result<StatusCode, ApiError> {
    let user = user(&core, &name).await?;
    fit(&request.password)?;
    let hash = hash(request.password).await?;
    core.store.set_password(user, &hash, None).await?;
    core.live.revoke_principal(&user.to_string());
    tracing::info!(user = %name, "a user's password was changed");
    Ok(StatusCode::NO_CONTENT)
}

/// Service tokens by name, without the tokens themselves.
#[utoipa::path(get, path = "/api/tokens", tag = "people", operation_id = "tokens", responses((status = 200, body = [TokenView])))]
pub(super) async fn tokens(State(core): State<Shared>) -> Result<Json<Vec<TokenView>>, ApiError> {
    Ok(Json(core.store.tokens().await?))
}

/// Makes a service token. The reply is the only place where it is shown.
#[utoipa::path(post, path = "/api/tokens", tag = "people", operation_id = "addToken", request_body = NewTokenRequest,
    responses(
        (status = 201, body = NewTokenReply),
        (status = 400, body = ErrorBody, description = "a name, role, organisation or lifetime that can't be"),
        (status = 409, body = ErrorBody, description = "there is a token of that name"),
    ))]
pub(super) async fn add_token(
    State(core): State<Shared>,
    caller: Caller,
    Body(request): Body<NewTokenRequest>,
) -> Result<(StatusCode, Json<NewTokenReply>), ApiError> {
    let organisation = belongs_to(&core, request.role, request.organisation.as_ref()).await?;
    if let Some(life) = request.expires_in_s
        && !TOKEN_LIFE_S.contains(&life)
    {
        return Err(invalid(
            "expiresInS: out of range",
            "send 60 to 315360000 seconds, or leave it out",
        ));
    }
    let now = Timestamp::now();
    let details = TokenView {
        token_id: TokenId::generate(),
        name: request.name,
        role: request.role,
        organisation: request.organisation,
        created_by: caller.principal.actor(),
        created_at: now,
        expires_at: request
            .expires_in_s
            .map(|life| now.plus(Duration::from_secs(life))),
        last_used_at: None,
    };
    let (token, hash) = live::random_token();
    let new = NewToken {
        view: &details,
        organisation: organisation.as_ref(),
        hash: &hash.hex(),
    };
    if !core.store.add_token(&new).await? {
        return Err(taken(&format!("a token `{}`", details.name)));
    }
    tracing::info!(token = %details.name, role = %details.role, "a service token was made");
    Ok((StatusCode::CREATED, Json(NewTokenReply { token, details })))
}

/// Revokes a service token: the next request with it is refused, and what it opened is closed. Its sessions go on.
#[utoipa::path(delete, path = "/api/tokens/{id}", tag = "people", operation_id = "revokeToken",
    params(("id" = TokenId, Path)),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub(super) async fn revoke_token(
    State(core): State<Shared>,
    Path(id): Path<TokenId>,
) -> Result<StatusCode, ApiError> {
    if core.store.remove_token(id).await? != Removed::Yes {
        return Err(ApiError::not_found(format!("token {id}")));
    }
    core.live.revoke_principal(&id.to_string());
    tracing::info!(token.id = %id, "a service token was revoked");
    Ok(StatusCode::NO_CONTENT)
}

/// Organisations by name, each with its live sessions.
#[utoipa::path(get, path = "/api/organisations", tag = "people", operation_id = "organisations",
    responses((status = 200, body = [OrganisationView])))]
pub(super) async fn organisations(
    State(core): State<Shared>,
) -> Result<Json<Vec<OrganisationView>>, ApiError> {
    Ok(Json(core.store.organisations().await?))
}

/// Makes an organisation.
#[utoipa::path(post, path = "/api/organisations", tag = "people", operation_id = "addOrganisation",
    request_body = NewOrganisationRequest,
    responses(
        (status = 201, body = OrganisationView),
        (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "there is an organisation of that name"),
    ))]
pub(super) async fn add_organisation(
    State(core): State<Shared>,
    Body(request): Body<NewOrganisationRequest>,
) -> Result<(StatusCode, Json<OrganisationView>), ApiError> {
    if request.max_live.is_some_and(|most| most > MAX_LIVE) {
        return Err(invalid(
            "maxLive: too many",
            "send at most 1000000, or leave it out",
        ));
    }
    let now = Timestamp::now();
    let organisation = Organisation {
        id: OrganisationId::generate(),
        name: request.name,
    };
    let store = &core.store;
    if !store
        .add_organisation(&organisation, request.max_live, now)
        .await?
    {
        return Err(taken(&format!("an organisation `{}`", organisation.name)));
    }
    tracing::info!(organisation = %organisation.name, "an organisation was made");
    let view = OrganisationView {
        name: organisation.name,
        max_live: request.max_live,
        created_at: now,
        live: 0,
    };
    Ok((StatusCode::CREATED, Json(view)))
}

/// Removes an organisation to which nothing belongs any more.
#[utoipa::path(delete, path = "/api/organisations/{name}", tag = "people", operation_id = "removeOrganisation",
    params(("name" = OrganisationName, Path)),
    responses(
        (status = 204),
        (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "users, tokens, sessions or credentials belong to it"),
    ))]
pub(super) async fn remove_organisation(
    State(core): State<Shared>,
    Path(name): Path<OrganisationName>,
) -> Result<StatusCode, ApiError> {
    match core.store.remove_organisation(&name).await? {
        Removed::Yes => {
            tracing::info!(organisation = %name, "an organisation was removed");
            Ok(StatusCode::NO_CONTENT)
        }
        Removed::Missing => Err(ApiError::not_found(format!("organisation {name}"))),
        Removed::InUse => Err(ApiError::new(
            ErrorCode::Conflict,
            format!(
                "the organisation `{name}` still has users, tokens, live sessions or credentials"
            ),
            "remove those first",
        )),
    }
}

/// The id behind a user's name.
async fn user(core: &Shared, name: &LoginName) -> Result<UserId, ApiError> {
    let user = core.store.user(name.as_str()).await?;
    user.map(|user| user.id)
        .ok_or_else(|| ApiError::not_found(format!("user {name}")))
}

/// The organisation that is named for somebody of this role.
async fn belongs_to(
    core: &Shared,
    role: Role,
    name: Option<&OrganisationName>,
) -> Result<Option<Organisation>, ApiError> {
    let Some(name) = name else { return Ok(None) };
    if role == Role::Admin {
        return Err(invalid(
            "organisation: an admin is of the whole installation",
            "leave `organisation` out, or choose another role",
        ));
    }
    match core.store.organisation(name).await? {
        Some(organisation) => Ok(Some(organisation)),
        None => Err(invalid(
            &format!("organisation: there is no organisation `{name}`"),
            "make it with POST /api/organisations, or `vestibule org add`",
        )),
    }
}

/// A new password is long enough.
pub(super) fn fit(password: &Password) -> Result<(), ApiError> {
    match password.unfit() {
        None => Ok(()),
        Some(why) => Err(invalid(
            &format!("password: {why}"),
            "choose 12 to 1024 characters, of any kind",
        )),
    }
}

async fn hash(password: Password) -> Result<String, ApiError> {
    let hash = password::hash(password).await;
    hash.map_err(|err| ApiError::internal(&err))
}

fn invalid(message: &str, fix: &str) -> ApiError {
    ApiError::new(ErrorCode::InvalidRequest, message, fix)
}

fn taken(what: &str) -> ApiError {
    ApiError::new(
        ErrorCode::Conflict,
        format!("there is {what} already"),
        "choose another name",
    )
}
