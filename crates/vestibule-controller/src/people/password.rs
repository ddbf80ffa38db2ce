//! Passwords: Argon2id (RFC 9106) with the parameters that OWASP names (19 MiB, 2 passes, 1 lane), off the runtime's threads,
//! few at a time.
use crate::core::off_runtime;
use argon2::{
    Argon2,
    password_hash::{PasswordHash, PasswordHasher as _, PasswordVerifier as _, SaltString},
};
use std::sync::LazyLock;
use tokio::sync::Semaphore;
use vestibule_api::people::Password;

/// Hashes at a time: each takes 19 MiB and a processor.
static PLACES: Semaphore = Semaphore::const_new(2);

/// What a name that nobody has is checked against, so that the time says nothing about names.
static NOBODY: LazyLock<String> = LazyLock::new(|| {
    let mut salt = [0u8; 16];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut salt);
    compute("", &salt).unwrap_or_default()
});

/// Why a password was not hashed or checked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PasswordError {
    #[error("hash a password: {0}")]
    Hash(String),
    #[error("hash a password off the runtime")]
    Join(#[from] tokio::task::JoinError),
}

/// The hash, in PHC's string format.
pub(crate) async fn hash(password: Password) -> Result<String, PasswordError> {
    let _place = PLACES.acquire().await;
    off_runtime(move || {
        let mut salt = [0u8; 16];
        rand::RngCore::fill_bytes(&mut rand::rng(), &mut salt);
        compute(password.expose(), &salt)
    })
    .await?
}

fn compute(password: &str, salt: &[u8]) -> Result<String, PasswordError> {
    let failed = |err: argon2::password_hash::Error| PasswordError::Hash(err.to_string());
    let salt = SaltString::encode_b64(salt).map_err(failed)?;
    let hash = Argon2::default().hash_password(password.as_bytes(), &salt);
    Ok(hash.map_err(failed)?.to_string())
}

/// Whether `password` is the one that `hash` is of. Takes as long where there is no hash.
pub(crate) async fn verify(
    password: Password,
    hash: Option<String>,
) -> Result<bool, PasswordError> {
    let _place = PLACES.acquire().await;
    let right = off_runtime(move || {
        // Longer ones were never taken; they are not hashed either.
        let fits = password.expose().len() <= Password::MAX_BYTES;
        let known = hash.is_some();
        let hash = hash.as_deref().unwrap_or(&NOBODY);
        let parsed = PasswordHash::new(hash);
        let typed = if fits {
            password.expose().as_bytes()
        } else {
            b""
        };
        let same =
            parsed.is_ok_and(|parsed| Argon2::default().verify_password(typed, &parsed).is_ok());
        same && known && fits
    });
    Ok(right.await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_password_is_the_password() {
        let password = |text: &str| Password::new(text.to_owned());
        let first = hash(password("correct horse battery")).await.unwrap();
        let second = hash(password("correct horse battery")).await.unwrap();
        assert!(
            first.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{first}"
        );
        assert_ne!(first, second, "each has a salt of its own");
        for (typed, right) in [
            ("correct horse battery", true),
            ("correct horse", false),
            ("", false),
        ] {
            let same = verify(password(typed), Some(first.clone())).await.unwrap();
            assert_eq!(same, right, "{typed}");
        }
        for hash in [None, Some(String::new()), Some("nonsense".to_owned())] {
            assert!(!verify(password(""), hash).await.unwrap());
        }
    }
}
