//! Secrets. A [`Secret`] cannot be serialised or printed; on the wire there is only [`Sealed`].
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

/// A value that must not be shown: no `Serialize`, `Debug` prints a placeholder, zeroed when dropped.
pub struct Secret<T: Zeroize>(Zeroizing<T>);

impl<T: Zeroize> Secret<T> {
    /// Takes ownership of a value that must not be shown from now on.
    pub fn new(value: T) -> Self {
        Self(Zeroizing::new(value))
    }

    /// The value itself. Every call is a place to review: what it returns must not reach a log, an error or a file.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T: Zeroize + Clone> Clone for Secret<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Zeroize> std::fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

/// The public half of a recipient's X25519 key, in base64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct SealKey(String);

/// Bytes that only the holder of one private key can read (an anonymous "sealed box": X25519 and XSalsa20-Poly1305,
/// as in libsodium's `crypto_box_seal`), in base64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
pub struct Sealed(String);

/// Why sealing or opening did not work. Says nothing about the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("the recipient's key is not 32 bytes in base64")]
    BadKey,
    #[error("the sealed bytes are not base64")]
    BadEncoding,
    #[error("the sealed bytes are not for this key, or were changed")]
    NotForThisKey,
}

/// The private half: opens what was sealed to [`Opener::key`]. Lives in memory only.
pub struct Opener(crypto_box::SecretKey);

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opener([secret])")
    }
}

impl Opener {
    /// A fresh key pair from the operating system's generator.
    #[must_use]
    pub fn generate() -> Self {
        let mut bytes = [0u8; 32];
        rand::RngCore::fill_bytes(&mut rand::rng(), &mut bytes);
        let key = crypto_box::SecretKey::from(bytes);
        bytes.zeroize();
        Self(key)
    }

    /// The public half, to hand to whoever seals.
    #[must_use]
    pub fn key(&self) -> SealKey {
        SealKey(BASE64.encode(self.0.public_key().as_bytes()))
    }

    /// Opens what was sealed to this key.
    ///
    /// # Errors
    /// When the text is not base64, or the bytes were not sealed to this key or were changed on the way.
    pub fn open(&self, sealed: &Sealed) -> Result<Secret<Vec<u8>>, SealError> {
        let bytes = BASE64
            .decode(&sealed.0)
            .map_err(|_| SealError::BadEncoding)?;
        self.0
            .unseal(&bytes)
            .map(Secret::new)
            .map_err(|_| SealError::NotForThisKey)
    }
}

impl SealKey {
    /// Seals `plain` so that only the holder of the private half can read it.
    ///
    /// # Errors
    /// [`SealError::BadKey`] when this is not a key.
    pub fn seal(&self, plain: &[u8]) -> Result<Sealed, SealError> {
        let bytes: [u8; 32] = BASE64
            .decode(&self.0)
            .ok()
            .and_then(|b| b.try_into().ok())
            .ok_or(SealError::BadKey)?;
        let sealed = crypto_box::PublicKey::from(bytes)
            .seal(&mut crypto_box::aead::OsRng, plain)
            .map_err(|_| SealError::BadKey)?;
        Ok(Sealed(BASE64.encode(sealed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_key_opens() {
        let (alice, mallory) = (Opener::generate(), Opener::generate());
        let sealed = alice.key().seal(b"token").unwrap();
        assert_eq!(alice.open(&sealed).unwrap().expose(), b"token");
        assert_eq!(mallory.open(&sealed).unwrap_err(), SealError::NotForThisKey);
        assert_eq!(
            format!("{:?}", Secret::new(String::from("token"))),
            "[secret]"
        );
    }
}
