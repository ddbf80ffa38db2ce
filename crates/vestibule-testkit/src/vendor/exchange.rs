//! The parts of OAuth 2.0 that all vendors share: the authorization request, the person's decision, the redemption of a
//! code, and the device code, each with the misbehaviour that the test asked for.
use super::{
    Misbehave, Shared,
    grants::{Device, Issued, Pending, Refusal, token, user_code},
    pages,
    reply::{Call, OauthError, html, json, oauth_error, redirect},
};
use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use std::time::Duration;
use url::Url;

/// `GET` of an authorization endpoint: the consent page.
pub(super) fn authorize(shared: &Shared, call: &Call, vendor: &str) -> Response {
    let text = |name: &str| call.param(name).to_owned();
    let pending = Pending {
        client_id: text("client_id"),
        redirect_uri: text("redirect_uri"),
        state: text("state"),
        scope: text("scope"),
        challenge: call.query.get("code_challenge").cloned(),
        device: None,
    };
    if Url::parse(&pending.redirect_uri).is_err() || pending.client_id.is_empty() {
        return (
            StatusCode::BAD_REQUEST,
            html(pages::message("No client or redirect")),
        )
            .into_response();
    }
    consent(shared, vendor, pending)
}

fn consent(shared: &Shared, vendor: &str, pending: Pending) -> Response {
    if shared.is_unattended() {
        return conclude(shared, pending, true);
    }
    let id = token("");
    let page = pages::consent(vendor, &id, &pending.scope);
    shared.grants().pending.insert(id, pending);
    html(page)
}

/// The person pressed a button.
pub(super) fn decided(shared: &Shared, call: &Call) -> Response {
    let pending = shared.grants().pending.remove(call.field("id"));
    let Some(pending) = pending else {
        return (
            StatusCode::BAD_REQUEST,
            html(pages::message("This page is too old")),
        )
            .into_response();
    };
    conclude(shared, pending, call.field("decision") == "allow")
}

/// The end of an authorization, by the person or without one.
fn conclude(shared: &Shared, pending: Pending, allow: bool) -> Response {
    let how = shared.misbehave();
    let allowed = allow && how != Misbehave::Denied;
    let mut grants = shared.grants();
    if let Some(code) = pending.device {
        let state = if allowed {
            Device::Approved
        } else {
            Device::Denied
        };
        grants.devices.insert(code, state);
        let said = if allowed {
            "You are signed in"
        } else {
            "You denied it"
        };
        return html(pages::message(said));
    }
    let Ok(mut to) = Url::parse(&pending.redirect_uri) else {
        return oauth_error("invalid_request", "redirect_uri");
    };
    let state = if how == Misbehave::WrongState {
        token("not-the-state-")
    } else {
        pending.state.clone()
    };
    {
        let mut query = to.query_pairs_mut();
        if allowed {
            let code = token("code-");
            query.append_pair("code", &code);
            grants.codes.insert(code, pending);
        } else {
            query.append_pair("error", "access_denied");
            query.append_pair("error_description", "The resource owner denied the request");
        }
        query.append_pair("state", &state);
    }
    redirect(to.as_str())
}

/// Waits or fails before a token endpoint does anything, where the test wants that.
pub(super) async fn before_token(shared: &Shared) -> Option<Response> {
    match shared.misbehave() {
        Misbehave::SlowToken { ms } => {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            None
        }
        Misbehave::TokenFails => {
            let body = serde_json::json!({ "error": "server_error", "error_description": "the token endpoint is broken" });
            Some(json(StatusCode::INTERNAL_SERVER_ERROR, &body))
        }
        Misbehave::Not
        | Misbehave::WrongState
        | Misbehave::VerifierRefused
        | Misbehave::Denied
        | Misbehave::CodeExpired => None,
    }
}

/// Redeems the code of the call for tokens that begin with `prefix`; else the refusal that the vendor would send.
pub(super) fn redeem(
    shared: &Shared,
    call: &Call,
    prefix: &str,
) -> Result<(Pending, Issued), OauthError> {
    match shared.misbehave() {
        Misbehave::CodeExpired => {
            return Err(OauthError("invalid_grant", "authorization code expired"));
        }
        Misbehave::VerifierRefused => {
            return Err(OauthError("invalid_grant", "code_verifier does not match"));
        }
        Misbehave::Not
        | Misbehave::WrongState
        | Misbehave::Denied
        | Misbehave::SlowToken { .. }
        | Misbehave::TokenFails => {}
    }
    let mut grants = shared.grants();
    let grant = grants.redeem(call).map_err(|refusal| match refusal {
        Refusal::UnknownCode => OauthError("invalid_grant", "authorization code unknown or used"),
        Refusal::OtherClient => OauthError("invalid_client", "the code belongs to another client"),
        Refusal::OtherRedirect => OauthError("invalid_grant", "redirect_uri mismatch"),
        Refusal::Verifier => OauthError("invalid_grant", "code_verifier does not match"),
    })?;
    let issued = Issued {
        host: call.host.clone(),
        access_token: token(&format!("{prefix}access-")),
        refresh_token: token(&format!("{prefix}refresh-")),
        pkce: grant.challenge.is_some(),
    };
    grants.issued.push(issued.clone());
    Ok((grant, issued))
}

/// A new device code and its user code (RFC 8628 section 3.2).
pub(super) fn new_device(shared: &Shared) -> (String, String) {
    let (device, user) = (token("device-"), user_code());
    let waiting = Device::Waiting {
        user_code: user.clone(),
    };
    shared.grants().devices.insert(device.clone(), waiting);
    (device, user)
}

/// The page where the person types the code; with a right one, the consent page.
pub(super) fn device_page(shared: &Shared, call: &Call, vendor: &str) -> Response {
    if shared.is_unattended() {
        let mut grants = shared.grants();
        for state in grants.devices.values_mut() {
            if matches!(state, Device::Waiting { .. }) {
                *state = Device::Approved;
            }
        }
        return html(pages::message("You are signed in"));
    }
    let typed = call.param("user_code").trim().to_ascii_uppercase();
    if typed.is_empty() {
        return html(pages::device(
            vendor,
            &call.path,
            "Type the code that the tool shows",
        ));
    }
    let known = shared
        .grants()
        .devices
        .iter()
        .find_map(|(device, state)| match state {
            Device::Waiting { user_code } if plain(user_code) == plain(&typed) => {
                Some(device.clone())
            }
            Device::Waiting { .. } | Device::Approved | Device::Denied => None,
        });
    let Some(device) = known else {
        return html(pages::device(vendor, &call.path, "That code is not known"));
    };
    let pending = Pending {
        client_id: String::new(),
        redirect_uri: String::new(),
        state: String::new(),
        scope: String::new(),
        challenge: None,
        device: Some(device),
    };
    consent(shared, vendor, pending)
}

fn plain(code: &str) -> String {
    code.chars().filter(char::is_ascii_alphanumeric).collect()
}

/// The state of a device code; `None` for one that was never given out or is used up.
pub(super) fn poll_device(shared: &Shared, device: &str) -> Option<Device> {
    if shared.misbehave() == Misbehave::CodeExpired {
        return None;
    }
    let mut grants = shared.grants();
    let state = grants.devices.get(device).cloned()?;
    if state == Device::Approved {
        grants.devices.remove(device);
    }
    Some(state)
}
