//! Google as `gemini` needs it until it has written its credential: authorize, token, user info, Code Assist.
use super::{
    Shared,
    exchange::{authorize, before_token, redeem},
    grants::jwt,
    openai::{EMAIL, EXP},
    pages,
    reply::{Call, html, not_found, oauth_error, ok},
};
use axum::{http::Method, response::Response};
use serde_json::json;

pub(super) async fn answer(shared: &Shared, call: &Call) -> Response {
    match (&call.method, call.path.as_str()) {
        (&Method::GET, "/o/oauth2/v2/auth" | "/o/oauth2/auth") => authorize(shared, call, "Google"),
        (&Method::POST, "/token") => tokens(shared, call).await,
        (&Method::POST, "/tokeninfo") | (&Method::GET, "/tokeninfo") => {
            ok(&json!({ "email": EMAIL, "exp": EXP.to_string(), "scope": "openid" }))
        }
        (&Method::GET, "/oauth2/v2/userinfo" | "/oauth2/v3/userinfo") => ok(
            &json!({ "id": "1", "sub": "1", "email": EMAIL, "verified_email": true, "name": "Alice" }),
        ),
        (&Method::POST, "/v1internal:loadCodeAssist") => ok(&json!({
            "currentTier": { "id": "free-tier", "name": "Test", "isDefault": true },
            "allowedTiers": [{ "id": "free-tier", "name": "Test", "isDefault": true }],
            "cloudaicompanionProject": "test-project",
        })),
        (&Method::POST, "/v1internal:onboardUser") => ok(&json!({
            "name": "operations/1", "done": true,
            "response": { "cloudaicompanionProject": { "id": "test-project", "name": "test-project" } },
        })),
        (&Method::POST, path) if path.starts_with("/v1internal:") => ok(&json!({})),
        (&Method::GET, path) if path.starts_with("/gemini-code-assist/auth/") => {
            html(pages::message("Signed in to Gemini"))
        }
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
    match redeem(shared, call, "ya29.") {
        Ok((grant, issued)) => ok(&json!({
            "access_token": issued.access_token,
            "refresh_token": issued.refresh_token,
            "expires_in": 3599,
            "scope": grant.scope,
            "token_type": "Bearer",
            "id_token": jwt(&json!({
                "iss": "https://accounts.google.com", "aud": grant.client_id, "sub": "1", "email": EMAIL, "exp": EXP,
            })),
        })),
        Err(refusal) => refusal.answer(),
    }
}
