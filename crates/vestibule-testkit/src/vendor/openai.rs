//! OpenAI as `codex login` needs it: authorize, token, the exchange for an API key, and the device flow.
use super::{
    Shared,
    exchange::{authorize, before_token, device_page, new_device, poll_device, redeem},
    grants::{Device, Pending, jwt, s256, token},
    pages,
    reply::{Call, html, json, not_found, oauth_error, ok},
};
use axum::{
    http::{Method, StatusCode},
    response::Response,
};
use serde_json::json;

/// Seconds since the epoch at which every token expires: far enough for a test.
pub(super) const EXP: i64 = 4_102_444_800;
pub(super) const EMAIL: &str = "alice@example.test";

pub(super) async fn answer(shared: &Shared, call: &Call) -> Response {
    match (&call.method, call.path.as_str()) {
        (&Method::GET, "/oauth/authorize") => authorize(shared, call, "OpenAI"),
        (&Method::POST, "/oauth/token") => tokens(shared, call).await,
        (&Method::POST, "/api/accounts/deviceauth/usercode") => {
            let (device, user) = new_device(shared);
            ok(
                &json!({ "device_auth_id": device, "user_code": user, "interval": "1", "expires_in": 900 }),
            )
        }
        (&Method::POST, "/api/accounts/deviceauth/token") => device(shared, call),
        (&Method::GET, "/codex/device") => device_page(shared, call, "OpenAI"),
        (&Method::GET, "/success") => html(pages::message("Signed in to Codex")),
        _ => not_found(call),
    }
}

async fn tokens(shared: &Shared, call: &Call) -> Response {
    if let Some(instead) = before_token(shared).await {
        return instead;
    }
    match call.field("grant_type") {
        "authorization_code" => match redeem(shared, call, "openai-") {
            Ok((_, issued)) => ok(&json!({
                "id_token": id_token(),
                "access_token": jwt(&json!({ "exp": EXP, "jti": issued.access_token, "scp": ["openid"],
                    "https://api.openai.com/auth": account() })),
                "refresh_token": issued.refresh_token,
                "token_type": "Bearer",
                "expires_in": 3600,
            })),
            Err(refusal) => refusal.answer(),
        },
        "urn:ietf:params:oauth:grant-type:token-exchange" => {
            ok(&json!({ "access_token": token("sk-test-"), "token_type": "Bearer" }))
        }
        other => oauth_error("unsupported_grant_type", other),
    }
}

fn id_token() -> String {
    jwt(&json!({
        "iss": "https://auth.openai.com", "sub": "user-alice", "aud": ["app_EMoamEEZ73f0CkXaXp7hrann"],
        "email": EMAIL, "email_verified": true, "exp": EXP,
        "https://api.openai.com/auth": account(),
    }))
}

fn account() -> serde_json::Value {
    json!({
        "chatgpt_account_id": "11111111-2222-4333-8444-555555555555", "chatgpt_user_id": "user-alice",
        "chatgpt_plan_type": "pro", "organization_id": "org-test", "project_id": "proj_test",
        "completed_platform_onboarding": true, "is_org_owner": true, "user_id": "user-alice",
    })
}

/// While the person has not decided, 403; then a code whose verifier the server itself chose.
fn device(shared: &Shared, call: &Call) -> Response {
    match poll_device(shared, call.field("device_auth_id")) {
        Some(Device::Approved) => {
            let (code, verifier) = (token("code-"), token(""));
            let grant = Pending {
                client_id: "app_EMoamEEZ73f0CkXaXp7hrann".into(),
                redirect_uri: "https://auth.openai.com/deviceauth/callback".into(),
                state: String::new(),
                scope: String::new(),
                challenge: Some(s256(&verifier)),
                device: None,
            };
            shared.grants().codes.insert(code.clone(), grant);
            ok(
                &json!({ "authorization_code": code, "code_challenge": s256(&verifier), "code_verifier": verifier }),
            )
        }
        Some(Device::Waiting { .. }) => json(
            StatusCode::FORBIDDEN,
            &json!({ "error": "authorization_pending" }),
        ),
        Some(Device::Denied) => json(
            StatusCode::BAD_REQUEST,
            &json!({ "error": "access_denied" }),
        ),
        None => json(
            StatusCode::BAD_REQUEST,
            &json!({ "error": "expired_token" }),
        ),
    }
}
