//! Cloudflare as `wrangler login` needs it: authorize and token.
use super::{
    Shared,
    exchange::{authorize, before_token, redeem},
    reply::{Call, not_found, oauth_error, ok},
};
use axum::{http::Method, response::Response};
use serde_json::json;

pub(super) async fn answer(shared: &Shared, call: &Call) -> Response {
    match (&call.method, call.path.as_str()) {
        (&Method::GET, "/oauth2/auth") => authorize(shared, call, "Cloudflare"),
        (&Method::POST, "/oauth2/token") => tokens(shared, call).await,
        _ => not_found(call),
    }
}

async fn tokens(shared: &Shared, call: &Call) -> Response {
    if let Some(instead) = before_token(shared).await {
        return instead;
    }
    if call.field("grant_type") != "authorization_code" {
        return oauth_error("unsupported_grant_type", call.field("grant_type"));
    }
    match redeem(shared, call, "cloudflare-") {
        Ok((grant, issued)) => ok(&json!({
            "access_token": issued.access_token,
            "refresh_token": issued.refresh_token,
            "expires_in": 3600,
            "scope": grant.scope,
            "token_type": "bearer",
        })),
        Err(refusal) => refusal.answer(),
    }
}
