//! The cluster's key, and what is signed with it: HMAC-SHA256 over who asks what of which host, at which time, once. The key
//! itself never leaves the file, so a host that pretends to be one of the cluster learns nothing.
use crate::{file, http::ApiError, people::Principal};
use axum::http::{HeaderName, Method};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use camino::{Utf8Path, Utf8PathBuf};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::RngCore as _;
use sha2::Sha256;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};
use vestibule_api::{ids::HostId, time::Timestamp};

/// `<microseconds since 1970>.<nonce>.<HMAC>`
pub(crate) const SIGNATURE: HeaderName = HeaderName::from_static("vestibule-signature");
/// The clocks of two hosts may differ by so many microseconds, the way included.
const SKEW: i64 = 60_000_000;
/// A signature's nonce is remembered for as long as its time is good; more of them are refused.
const NONCES: usize = 1 << 17;
/// Of this layout of what is signed.
const LABEL: &str = "vestibule peer 1";

/// Why no other controller can be known.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("read `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: std::io::Error,
    },
    #[error("the cluster's key `{path}` may be read by others (mode {mode:o}): make it 0600")]
    Open { path: Utf8PathBuf, mode: u32 },
    #[error(
        "the cluster's key `{path}` has fewer than 32 characters: make one with `openssl rand -base64 33`"
    )]
    Short { path: Utf8PathBuf },
    #[error("`{path}` has no certificate that could be used: {what}")]
    Ca { path: Utf8PathBuf, what: String },
    #[error("set up TLS to other controllers")]
    Tls(#[source] rustls::Error),
}

/// What a signature covers.
pub(crate) struct Signed<'a> {
    pub(crate) to: HostId,
    pub(crate) method: &'a Method,
    /// With the query.
    pub(crate) path: &'a str,
    /// As the header has it; empty: nobody in particular.
    pub(crate) caller: &'a str,
}

/// The cluster's key.
pub(crate) struct Key {
    mac: Hmac<Sha256>,
    /// Of signatures that were good, until when they are.
    seen: Mutex<HashMap<String, i64>>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// Reads `cluster.key_file`.
    ///
    /// # Errors
    /// When it can't be read, others may read it, or it is too short.
    pub(crate) fn read(path: &Utf8Path) -> Result<Self, KeyError> {
        let failed = |err| KeyError::Read {
            path: path.to_owned(),
            err,
        };
        if let Some(mode) = file::exposed(path).map_err(failed)? {
            let path = path.to_owned();
            return Err(KeyError::Open { path, mode });
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        Self::new(text.trim()).ok_or_else(|| KeyError::Short {
            path: path.to_owned(),
        })
    }

    fn new(secret: &str) -> Option<Self> {
        let mac = Hmac::new_from_slice(secret.as_bytes()).ok()?;
        (secret.len() >= 32).then(|| Self {
            mac,
            seen: Mutex::default(),
        })
    }

    pub(crate) fn sign(&self, signed: &Signed<'_>, now: Timestamp) -> String {
        let mut nonce = [0; 16];
        rand::rng().fill_bytes(&mut nonce);
        let (time, nonce) = (now.as_micros(), BASE64.encode(nonce));
        let mac = self.over(signed, time, &nonce).finalize().into_bytes();
        format!("{time}.{nonce}.{}", BASE64.encode(mac))
    }

    /// Whether a signature is good, for the first time.
    ///
    /// # Errors
    /// Why not, in words.
    pub(crate) fn check(
        &self,
        signed: &Signed<'_>,
        signature: &str,
        now: Timestamp,
    ) -> Result<(), &'static str> {
        const MALFORMED: &str = "its signature is not understood";
        let mut parts = signature.splitn(3, '.');
        let (Some(time), Some(nonce), Some(mac)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(MALFORMED);
        };
        let time: i64 = time.parse().map_err(|_| MALFORMED)?;
        let mac = BASE64.decode(mac).map_err(|_| MALFORMED)?;
        // In a time that does not depend on where the two differ.
        let good = self.over(signed, time, nonce).verify_slice(&mac);
        good.map_err(|_| "its signature is another key's, or of another request")?;
        let now = now.as_micros();
        if now.abs_diff(time) > SKEW.unsigned_abs() {
            return Err("its time is more than a minute off");
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= NONCES {
            seen.retain(|_, until| now <= *until);
        }
        if seen.len() >= NONCES {
            return Err("too many requests came in the last minute");
        }
        let until = time.saturating_add(SKEW);
        match seen.insert(nonce.to_owned(), until) {
            Some(_) => Err("it was sent before"),
            None => Ok(()),
        }
    }

    fn over(&self, signed: &Signed<'_>, time: i64, nonce: &str) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        let Signed {
            to,
            method,
            path,
            caller,
        } = signed;
        // No part has a line's end: a method, a path, and base64 can't.
        mac.update(
            format!("{LABEL}\n{to}\n{method}\n{path}\n{caller}\n{time}\n{nonce}").as_bytes(),
        );
        mac
    }
}

/// Who asks, as the header has it.
pub(super) fn write_principal(principal: &Principal) -> Result<String, ApiError> {
    let json = serde_json::to_vec(principal).map_err(|err| ApiError::internal(&err))?;
    Ok(BASE64.encode(json))
}

pub(super) fn read_principal(text: &str) -> Option<Principal> {
    serde_json::from_slice(&BASE64.decode(text).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_good_once_for_one_request_and_a_minute() {
        let key = Key::new(&"k".repeat(32)).unwrap();
        let (to, now) = (HostId::generate(), Timestamp::now());
        let request = |method, path| Signed {
            to,
            method,
            path,
            caller: "abc",
        };
        let signed = request(&Method::GET, "/api/vms/x?y=1");
        let signature = key.sign(&signed, now);
        let other = Signed {
            to: HostId::generate(),
            ..request(&Method::GET, "/api/vms/x?y=1")
        };
        let somebody = Signed {
            caller: "abd",
            ..request(&Method::GET, "/api/vms/x?y=1")
        };
        for wrong in [
            request(&Method::DELETE, "/api/vms/x?y=1"),
            request(&Method::GET, "/api/vms/x?y=2"),
            other,
            somebody,
        ] {
            assert!(key.check(&wrong, &signature, now).is_err());
        }
        let strange = Key::new(&"l".repeat(32)).unwrap();
        assert!(strange.check(&signed, &signature, now).is_err());
        for (off, good) in [
            (61_000_000, false),
            (-61_000_000, false),
            (59_000_000, true),
        ] {
            let then = Timestamp::from_micros(now.as_micros() + off);
            assert_eq!(key.check(&signed, &signature, then).is_ok(), good, "{off}");
        }
        assert_eq!(
            key.check(&signed, &signature, now),
            Err("it was sent before")
        );
        for broken in ["", "1", "1.2", "x.y.z", "1.2.3"] {
            assert!(key.check(&signed, broken, now).is_err(), "{broken}");
        }
        assert!(Key::new("short").is_none());
    }
}
