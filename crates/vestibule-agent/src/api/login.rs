//! `/login…` and the redirect of the agent's own OAuth client.
use super::{Refusal, Shared};
use crate::{login::LoginError, oidc};
use axum::{
    Json,
    extract::{RawQuery, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use vestibule_api::{
    agent::{CredentialReply, CredentialRequest, LoginRequest, OpenUrl},
    cause::Cause,
    error::Chain,
};

impl From<LoginError> for Refusal {
    fn from(err: LoginError) -> Self {
        let text = Chain(&err).to_string();
        match err {
            LoginError::Begun | LoginError::OtherSession(_) | LoginError::None => {
                Self::new(StatusCode::CONFLICT, text)
            }
            LoginError::NoFlow(_) | LoginError::Url(_) | LoginError::Seal(_) => {
                Self::new(StatusCode::BAD_REQUEST, text)
            }
            LoginError::Incomplete(_) | LoginError::Pattern(_) => {
                Self::new(StatusCode::BAD_REQUEST, text).because(Cause::PackIncompatible)
            }
            LoginError::NoCredential => Self::new(StatusCode::NOT_FOUND, text),
            LoginError::Start(_) => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, text).because(Cause::ToolFailed)
            }
            LoginError::Home(_)
            | LoginError::Policy(_)
            | LoginError::Watch(_)
            | LoginError::Encode(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, text),
        }
    }
}

pub(super) async fn begin(
    State(agent): Shared,
    Json(request): Json<LoginRequest>,
) -> Result<StatusCode, Refusal> {
    agent.login.begin(&agent, request)?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn cancel(State(agent): Shared) -> Result<StatusCode, Refusal> {
    agent.login.cancel().await?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn credential(
    State(agent): Shared,
    Json(request): Json<CredentialRequest>,
) -> Result<Json<CredentialReply>, Refusal> {
    Ok(Json(CredentialReply {
        sealed: agent.login.sealed(&request.seal_to)?,
    }))
}

pub(super) async fn reopen(
    State(agent): Shared,
    Json(request): Json<OpenUrl>,
) -> Result<StatusCode, Refusal> {
    agent.login.reopen(request.url).await?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn transcript(State(agent): Shared) -> Result<String, Refusal> {
    agent
        .login
        .transcript()
        .ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "no tool has run in a terminal yet"))
}

/// The redirect. Its query holds the code: it goes to the client and nowhere else, and the page must not be kept.
pub(super) async fn callback(State(agent): Shared, RawQuery(query): RawQuery) -> Response {
    let (status, page) = match agent.login.callback(query.unwrap_or_default()).await {
        Ok(page) => (StatusCode::OK, page),
        Err(_) => (StatusCode::NOT_FOUND, oidc::stray()),
    };
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/html; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (
            header::REFERRER_POLICY,
            HeaderValue::from_static("no-referrer"),
        ),
        (
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'"),
        ),
    ];
    (status, headers, page).into_response()
}
