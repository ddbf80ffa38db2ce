//! GitHub as `gh auth login` needs it: the device flow, the loopback web flow, and who the token belongs to.
use super::{
    Misbehave, Shared,
    exchange::{authorize, before_token, device_page, new_device, poll_device, redeem},
    grants::{Device, Issued, token},
    reply::{Call, not_found, ok},
};
use axum::{
    http::{HeaderValue, Method},
    response::Response,
};
use serde_json::json;

/// What `gh` 2.23 asks for.
const SCOPES: &str = "gist, read:org, repo, workflow";

pub(super) async fn answer(shared: &Shared, call: &Call) -> Response {
    match (&call.method, call.path.as_str()) {
        (&Method::POST, "/login/device/code") => {
            let (device, user) = new_device(shared);
            ok(&json!({
                "device_code": device, "user_code": user, "verification_uri": "https://github.com/login/device",
                "expires_in": 900, "interval": 1,
            }))
        }
        (&Method::GET, "/login/device") => device_page(shared, call, "GitHub"),
        (&Method::GET, "/login/oauth/authorize") => authorize(shared, call, "GitHub"),
        (&Method::POST, "/login/oauth/access_token") => tokens(shared, call).await,
        (&Method::POST, "/graphql" | "/api/graphql") => {
            ok(&json!({ "data": { "viewer": { "login": "alice" } } }))
        }
        (&Method::GET, "/" | "/api/v3/") => scopes(),
        (&Method::GET, "/user" | "/api/v3/user") => ok(&json!({ "login": "alice", "id": 1 })),
        _ => not_found(call),
    }
}

/// `gh` reads the scopes of its token from this header.
fn scopes() -> Response {
    let mut response = ok(&json!({}));
    let headers = response.headers_mut();
    headers.insert("x-oauth-scopes", HeaderValue::from_static(SCOPES));
    response
}

/// GitHub answers 200 with an `error` field where RFC 6749 has a status.
async fn tokens(shared: &Shared, call: &Call) -> Response {
    if let Some(instead) = before_token(shared).await {
        return instead;
    }
    let error = |code: &str, description: &str| {
        ok(&json!({ "error": code, "error_description": description }))
    };
    let device = call.field("device_code");
    if device.is_empty() {
        return match redeem(shared, call, "gho_") {
            Ok((_, issued)) => granted(&issued),
            Err(_) => error(
                "bad_verification_code",
                "The code passed is incorrect or expired.",
            ),
        };
    }
    match poll_device(shared, device) {
        Some(Device::Approved) if shared.misbehave() == Misbehave::VerifierRefused => error(
            "incorrect_device_code",
            "The device_code provided is not valid.",
        ),
        Some(Device::Approved) => {
            let issued = Issued {
                host: call.host.clone(),
                access_token: token("gho_"),
                refresh_token: String::new(),
                pkce: false,
            };
            shared.grants().issued.push(issued.clone());
            granted(&issued)
        }
        Some(Device::Waiting { .. }) => error(
            "authorization_pending",
            "The authorization request is still pending.",
        ),
        Some(Device::Denied) => error("access_denied", "The authorization request was denied."),
        None => error("expired_token", "The device_code has expired."),
    }
}

fn granted(issued: &Issued) -> Response {
    ok(
        &json!({ "access_token": issued.access_token, "token_type": "bearer", "scope": "gist,read:org,repo,workflow" }),
    )
}
