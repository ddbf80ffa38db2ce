//! How the fake vendor misbehaves, one way at a time.
use super::{
    Shared,
    reply::{Call, json, not_found, ok},
};
use axum::{
    http::{Method, StatusCode},
    response::Response,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::sync::PoisonError;

/// A way in which a sign-in goes wrong at the vendor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "how")]
pub enum Misbehave {
    /// Everything works.
    #[default]
    Not,
    /// The redirect carries another `state` than the tool sent (RFC 6749 section 10.12).
    WrongState,
    /// The token endpoint refuses every PKCE verifier (RFC 7636 section 4.6).
    VerifierRefused,
    /// Whatever button the person presses, consent is denied (RFC 6749 section 4.1.2.1).
    Denied,
    /// Every code is expired by the time it is redeemed.
    CodeExpired,
    /// The token endpoint answers only after so many milliseconds.
    SlowToken { ms: u64 },
    /// The token endpoint answers 500.
    TokenFails,
}

/// `GET /__testkit/log` and `POST /__testkit/misbehave`, for scripts that run the server as a process.
pub(super) fn control(shared: &Shared, call: &Call) -> Response {
    match (&call.method, call.path.as_str()) {
        (&Method::GET, "/__testkit/log") => {
            let grants = shared.grants();
            ok(&json!({ "seen": grants.seen, "issued": grants.issued }))
        }
        (&Method::POST, "/__testkit/misbehave") => {
            let ms = call.field("ms").parse().unwrap_or(0);
            match serde_json::from_value(json!({ "how": call.field("how"), "ms": ms })) {
                Ok(how) => {
                    let mut knob = shared
                        .misbehave
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    *knob = how;
                    ok(&json!({ "set": how }))
                }
                Err(err) => json(
                    StatusCode::BAD_REQUEST,
                    &json!({ "error": err.to_string() }),
                ),
            }
        }
        _ => not_found(call),
    }
}
