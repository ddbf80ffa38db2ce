//! How a dashboard gets its cookie at an identity provider. Both ends are navigations of a browser, so what goes wrong leads
//! back to the dashboard, whose words say what to do; the log has the rest.
use super::{
    error::{ApiError, REQUEST_ID},
    login::{self, Peer},
};
use crate::{
    core::Shared,
    oidc::{Oidc, OidcError},
    store::{Known, Newcomers},
};
use axum::{
    Json,
    extract::{RawQuery, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use vestibule_api::{
    error::{Chain, ErrorBody, ErrorCode},
    ids::UserId,
    people::{LoginMethods, OidcMethod, SignInProblem},
    time::Timestamp,
};

/// How somebody can sign in to the dashboard here.
#[utoipa::path(get, path = "/api/login/methods", tag = "system", operation_id = "loginMethods", security(()),
    responses((status = 200, body = LoginMethods)))]
pub(super) async fn methods(State(core): State<Shared>) -> Json<LoginMethods> {
    let oidc = core.oidc.as_ref().map(|oidc| OidcMethod {
        name: oidc.config.name.clone(),
    });
    Json(LoginMethods { oidc })
}

/// Sends the browser to the identity provider's page.
#[utoipa::path(get, path = "/api/login/oidc", tag = "system", operation_id = "oidcLogin", security(()),
    responses(
        (status = 303, description = "to the provider's page, or back to the dashboard with `?signIn=` and a reason"),
        (status = 404, body = ErrorBody, description = "no identity provider is configured"),
        (status = 429, body = ErrorBody, description = "too many attempts"),
    ))]
pub(super) async fn begin(State(core): State<Shared>, peer: Peer) -> Result<Response, ApiError> {
    let oidc = configured(&core)?;
    login::page(&core, peer)?;
    Ok(match oidc.begin().await {
        Ok(begun) => {
            let cookie = core.access.set_attempt(Some(&begun.cookie));
            to(begun.page.as_str(), &[cookie])
        }
        Err(err) => back(&core, problem(&err), &Chain(&err).to_string()),
    })
}

/// The provider's redirect.
#[utoipa::path(get, path = "/api/login/oidc/callback", tag = "system", operation_id = "oidcCallback", security(()),
    responses(
        (status = 303, description = "to the dashboard: with its cookie, or with `?signIn=` and a reason"),
        (status = 404, body = ErrorBody, description = "no identity provider is configured"),
        (status = 429, body = ErrorBody, description = "too many attempts"),
    ))]
pub(super) async fn callback(
    State(core): State<Shared>,
    peer: Peer,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let oidc = configured(&core)?;
    login::page(&core, peer)?;
    let cookie = core.access.attempt(&headers).unwrap_or_default();
    let identity = match oidc
        .finish(cookie, query.as_deref().unwrap_or_default())
        .await
    {
        Ok(identity) => identity,
        Err(err) => return Ok(back(&core, problem(&err), &Chain(&err).to_string())),
    };
    let newcomers = newcomers(&core, oidc).await?;
    let now = Timestamp::now();
    let known = core
        .store
        .identify(&identity, newcomers.as_ref(), now)
        .await?;
    let name = &identity.name;
    match known {
        Known::As(user) => {
            core.store.note_login(user, now).await?;
            tracing::info!(user = %name, "a user signed in at the identity provider");
            enter(&core, user, now).await
        }
        Known::Unknown => {
            let words = format!("there is no user `{name}`, and nobody is made one by coming");
            Ok(back(&core, SignInProblem::Unknown, &words))
        }
        Known::SomebodyElse => {
            let words = format!("the user `{name}` has a password, or another identity there");
            Ok(back(&core, SignInProblem::Taken, &words))
        }
    }
}

/// To the dashboard, whose own requests carry the cookie: this one comes from another site.
async fn enter(core: &Shared, user: UserId, now: Timestamp) -> Result<Response, ApiError> {
    let cookie = login::cookie(core, Some(user), now).await?;
    Ok(to("/", &[cookie, core.access.set_attempt(None)]))
}

fn configured(core: &Shared) -> Result<&Oidc, ApiError> {
    core.oidc.as_ref().ok_or_else(|| {
        ApiError::new(
            ErrorCode::NotFound,
            "no identity provider is configured",
            "sign in by name and password, or set `[oidc]` in the configuration",
        )
    })
}

async fn newcomers(core: &Shared, oidc: &Oidc) -> Result<Option<Newcomers>, ApiError> {
    let Some(role) = oidc.config.role else {
        return Ok(None);
    };
    let organisation = match &oidc.config.organisation {
        None => None,
        Some(name) => match core.store.organisation(name).await? {
            Some(found) => Some(found),
            None => {
                return Err(ApiError::new(
                    ErrorCode::Internal,
                    format!("`oidc.organisation`: there is no organisation `{name}`"),
                    format!("an admin makes it with `vestibule org add {name}`"),
                ));
            }
        },
    };
    Ok(Some(Newcomers { role, organisation }))
}

fn problem(err: &OidcError) -> SignInProblem {
    match err {
        OidcError::State => SignInProblem::Expired,
        OidcError::Refused(said) if said == "access_denied" => SignInProblem::Denied,
        OidcError::Name(_) | OidcError::Unverified => SignInProblem::Name,
        OidcError::RedirectIssuer
        | OidcError::Refused(_)
        | OidcError::Ask { .. }
        | OidcError::OtherIssuer(_)
        | OidcError::Endpoint(_)
        | OidcError::Token(_)
        | OidcError::IdToken(_)
        | OidcError::Jwt(_) => SignInProblem::Provider,
    }
}

fn back(core: &Shared, problem: SignInProblem, words: &str) -> Response {
    tracing::warn!(
        reason = problem.id(),
        error = words,
        "a sign-in at the identity provider failed"
    );
    let request = REQUEST_ID.try_with(Clone::clone).unwrap_or_default();
    let location = format!("/?signIn={}&request={request}#/login", problem.id());
    to(&location, &[core.access.set_attempt(None)])
}

fn to(location: &str, cookies: &[String]) -> Response {
    let mut response = (StatusCode::SEE_OTHER, [(header::LOCATION, location)]).into_response();
    let cookies = cookies.iter().filter_map(|cookie| cookie.parse().ok());
    for cookie in cookies {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}
