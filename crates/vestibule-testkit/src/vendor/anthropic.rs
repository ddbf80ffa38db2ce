//! Anthropic as `claude auth login` needs it: authorize, token, profile and roles.
use super::{
    Shared,
    exchange::{authorize, before_token, redeem},
    openai::EMAIL,
    pages,
    reply::{Call, html, json, not_found, oauth_error, ok},
};
use axum::{
    http::{Method, StatusCode},
    response::Response,
};
use serde_json::json;

const ACCOUNT: &str = "aaaaaaaa-1111-4222-8333-444444444444";
const ORGANISATION: &str = "bbbbbbbb-1111-4222-8333-444444444444";

pub(super) async fn answer(shared: &Shared, call: &Call) -> Response {
    match (&call.method, call.path.as_str()) {
        (&Method::GET, "/cai/oauth/authorize" | "/oauth/authorize") => {
            authorize(shared, call, "Anthropic")
        }
        (&Method::POST, "/v1/oauth/token") => tokens(shared, call).await,
        (&Method::GET, "/api/oauth/profile") => signed_in(shared, call, &profile()),
        (&Method::GET, "/api/oauth/claude_cli/roles") => signed_in(
            shared,
            call,
            &json!({ "organization_role": "admin", "workspace_role": null, "organization_name": "Test" }),
        ),
        (&Method::GET, "/oauth/code/success") => html(pages::message("Signed in to Claude Code")),
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
    match redeem(shared, call, "sk-ant-oat01-") {
        Ok((grant, issued)) => ok(&json!({
            "token_type": "Bearer",
            "access_token": issued.access_token,
            "refresh_token": issued.refresh_token,
            "expires_in": 28800,
            "refresh_token_expires_in": 2_592_000,
            "scope": grant.scope,
            "organization": { "uuid": ORGANISATION, "name": "Test" },
            "account": { "uuid": ACCOUNT, "email_address": EMAIL },
        })),
        Err(refusal) => refusal.answer(),
    }
}

fn signed_in(shared: &Shared, call: &Call, value: &serde_json::Value) -> Response {
    let known = call.bearer.as_ref().is_some_and(|token| {
        let grants = shared.grants();
        grants
            .issued
            .iter()
            .any(|issued| issued.access_token == *token)
    });
    if known {
        ok(value)
    } else {
        json(
            StatusCode::UNAUTHORIZED,
            &json!({ "error": { "type": "authentication_error" } }),
        )
    }
}

fn profile() -> serde_json::Value {
    json!({
        "account": {
            "uuid": ACCOUNT, "email": EMAIL, "full_name": "Alice", "display_name": "Alice",
            "has_claude_max": true, "has_claude_pro": false, "created_at": "2026-01-01T00:00:00Z",
        },
        "organization": {
            "uuid": ORGANISATION, "name": "Test", "organization_type": "claude_max",
            "billing_type": "stripe_subscription", "rate_limit_tier": "default_claude_max_5x",
            "has_extra_usage_enabled": false, "subscription_status": "active",
        },
    })
}
