//! What the vendor remembers: authorizations that wait for a decision, codes, device codes, and what it issued.
use super::reply::Call;
use axum::http::StatusCode;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rand::Rng;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// One request, without anything secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    pub method: String,
    pub host: String,
    pub path: String,
    pub status: u16,
}

/// One set of tokens, as the vendor gave it out. They open nothing: tests compare them with what was captured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Issued {
    /// Host of the token endpoint.
    pub host: String,
    pub access_token: String,
    pub refresh_token: String,
    /// Whether the code was bound to a PKCE challenge that the verifier met.
    pub pkce: bool,
}

/// An authorization request that waits for the person.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) client_id: String,
    pub(crate) redirect_uri: String,
    pub(crate) state: String,
    pub(crate) scope: String,
    pub(crate) challenge: Option<String>,
    /// The device code that is approved by it, in a device flow.
    pub(crate) device: Option<String>,
}

/// A device code's state (RFC 8628 section 3.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Device {
    Waiting { user_code: String },
    Approved,
    Denied,
}

#[derive(Debug, Default)]
pub(crate) struct Grants {
    pub(crate) pending: BTreeMap<String, Pending>,
    pub(crate) codes: BTreeMap<String, Pending>,
    pub(crate) devices: BTreeMap<String, Device>,
    pub(crate) issued: Vec<Issued>,
    pub(crate) seen: Vec<Seen>,
}

/// Why a code is not redeemed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    UnknownCode,
    OtherClient,
    OtherRedirect,
    Verifier,
}

impl Grants {
    /// Redeems a code, once.
    pub(crate) fn redeem(&mut self, call: &Call) -> Result<Pending, Refusal> {
        let grant = self
            .codes
            .remove(call.field("code"))
            .ok_or(Refusal::UnknownCode)?;
        if grant.client_id != call.field("client_id") {
            return Err(Refusal::OtherClient);
        }
        if grant.redirect_uri != call.field("redirect_uri") {
            return Err(Refusal::OtherRedirect);
        }
        match &grant.challenge {
            Some(challenge) if *challenge != s256(call.field("code_verifier")) => {
                Err(Refusal::Verifier)
            }
            Some(_) | None => Ok(grant),
        }
    }

    pub(crate) fn note(&mut self, call: &Call, status: StatusCode) {
        self.seen.push(Seen {
            method: call.method.to_string(),
            host: call.host.clone(),
            path: call.path.clone(),
            status: status.as_u16(),
        });
    }
}

/// The `S256` transformation of RFC 7636 section 4.2.
pub(crate) fn s256(verifier: &str) -> String {
    URL_SAFE_NO_PAD.encode(Sha256::digest(verifier.as_bytes()))
}

/// A random token with a readable beginning.
pub(crate) fn token(prefix: &str) -> String {
    let bytes: [u8; 24] = rand::rng().random();
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(bytes))
}

/// A code that a person reads and types: `WDJB-MJHT`, without look-alikes (RFC 8628 section 6.1).
pub(crate) fn user_code() -> String {
    const LETTERS: &[u8] = b"BCDFGHJKLMNPQRSTVWXZ";
    let mut rng = rand::rng();
    let mut four = || -> String {
        (0..4)
            .map(|_| char::from(LETTERS[rng.random_range(0..LETTERS.len())]))
            .collect()
    };
    format!("{}-{}", four(), four())
}

/// A JWT that nobody checks: unsigned in all but form.
pub(crate) fn jwt(claims: &serde_json::Value) -> String {
    let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = serde_json::json!({ "alg": "RS256", "typ": "JWT", "kid": "testkit" });
    format!("{}.{}.{}", part(&header), part(claims), token(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s256_is_the_one_of_rfc_7636_appendix_b() {
        assert_eq!(
            s256("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
            "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
        );
    }
}
