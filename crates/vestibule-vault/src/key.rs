//! The master key: where it comes from, and the keys derived from it.
use crate::file::{self, FileError};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::{Utf8Path, Utf8PathBuf};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use std::{fmt, os::unix::fs::MetadataExt as _};
use zeroize::{Zeroize as _, Zeroizing};

/// Name of the systemd credential (`LoadCredentialEncrypted=vestibule-vault-key:…`, systemd.exec(5)).
const SYSTEMD_CREDENTIAL: &str = "vestibule-vault-key";
/// The variable in an environment file.
const VARIABLE: &str = "VESTIBULE_VAULT_KEY";
/// A key file is smaller than this.
const FILE_LIMIT: u64 = 64 << 10;

/// Where the master key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A file of the vault's own, made at the first start.
    Own,
    /// A file that systemd passes to the service; it is never made here.
    Systemd(Utf8PathBuf),
    /// An environment file (systemd.exec(5), `EnvironmentFile=`) with a line `VESTIBULE_VAULT_KEY=<base64>`.
    EnvironmentFile(Utf8PathBuf),
}

impl KeySource {
    /// Chooses the source: an environment file where one is configured, else systemd's credential where
    /// `$CREDENTIALS_DIRECTORY` (passed in) holds one, else the vault's own file.
    pub fn choose(
        environment_file: Option<Utf8PathBuf>,
        credentials_directory: Option<&Utf8Path>,
    ) -> Self {
        if let Some(path) = environment_file {
            return Self::EnvironmentFile(path);
        }
        match credentials_directory.map(|dir| dir.join(SYSTEMD_CREDENTIAL)) {
            Some(path) if path.exists() => Self::Systemd(path),
            Some(_) | None => Self::Own,
        }
    }
}

/// Why there is no master key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("read the master key")]
    Read(#[source] FileError),
    #[error("make the master key")]
    Make(#[source] FileError),
    #[error("the master key `{path}` is not there, but the vault was used with one: restore it")]
    Missing { path: Utf8PathBuf },
    #[error("the master key `{path}` may be read by others (mode {mode:o}): make it 0600")]
    Open { path: Utf8PathBuf, mode: u32 },
    #[error("`{path}` has no master key of 32 bytes in base64")]
    NotAKey { path: Utf8PathBuf },
}

/// The key that wraps every data key. Zeroed when dropped.
pub(crate) struct MasterKey(Zeroizing<[u8; 32]>);

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey([secret])")
    }
}

impl MasterKey {
    /// Reads the key, or makes the vault's own where the vault is new (`used` is false).
    pub(crate) fn load(source: &KeySource, own: &Utf8Path, used: bool) -> Result<Self, KeyError> {
        match source {
            KeySource::Own if own.exists() => {
                check_mode(own)?;
                Self::parse(own, |text| Some(text))
            }
            KeySource::Own if used => Err(KeyError::Missing {
                path: own.to_owned(),
            }),
            KeySource::Own => Self::make(own),
            // systemd mounts credentials readable by the service's user only, in modes of its own choosing.
            KeySource::Systemd(path) => Self::parse(path, |text| Some(text)),
            KeySource::EnvironmentFile(path) => {
                check_mode(path)?;
                Self::parse(path, variable)
            }
        }
    }

    fn make(path: &Utf8Path) -> Result<Self, KeyError> {
        let mut bytes = Zeroizing::new([0u8; 32]);
        rand::RngCore::fill_bytes(&mut rand::rng(), bytes.as_mut());
        let text = Zeroizing::new(format!("{}\n", BASE64.encode(bytes.as_ref())));
        let staged = file::stage(path, text.as_bytes()).map_err(KeyError::Make)?;
        file::commit(&staged, path).map_err(KeyError::Make)?;
        Ok(Self(bytes))
    }

    fn parse(path: &Utf8Path, pick: fn(&str) -> Option<&str>) -> Result<Self, KeyError> {
        let not_a_key = || KeyError::NotAKey {
            path: path.to_owned(),
        };
        let bytes = Zeroizing::new(file::read(path, FILE_LIMIT).map_err(KeyError::Read)?);
        let text = std::str::from_utf8(&bytes).map_err(|_| not_a_key())?;
        let text = pick(text).ok_or_else(not_a_key)?.trim();
        let decoded = Zeroizing::new(BASE64.decode(text).map_err(|_| not_a_key())?);
        let mut key = <[u8; 32]>::try_from(decoded.as_slice()).map_err(|_| not_a_key())?;
        let master = Self(Zeroizing::new(key));
        key.zeroize();
        Ok(master)
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// A key for one purpose that tells nothing about this one: HMAC-SHA256 of the purpose.
    pub(crate) fn derive(&self, purpose: &[u8]) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(hmac(self.bytes(), &[purpose]))
    }
}

/// HMAC-SHA256 (RFC 2104) of the parts, one after the other.
pub(crate) fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    // Zeros up to the hash's block are what RFC 2104 makes of a shorter key; a whole block can't be refused.
    let block = Zeroizing::new(std::array::from_fn::<u8, 64, _>(|i| {
        key.get(i).copied().unwrap_or(0)
    }));
    let mut mac = Hmac::<Sha256>::new((&*block).into());
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn check_mode(path: &Utf8Path) -> Result<(), KeyError> {
    let meta = std::fs::metadata(path)
        .map_err(|err| KeyError::Read(FileError::new("look at", path, err)))?;
    match meta.mode() & 0o077 {
        0 => Ok(()),
        _ => Err(KeyError::Open {
            path: path.to_owned(),
            mode: meta.mode() & 0o7777,
        }),
    }
}

/// The value of [`VARIABLE`] in the text of an environment file; its last assignment counts, quotes are taken off.
fn variable(text: &str) -> Option<&str> {
    text.lines()
        .filter_map(|line| line.trim().split_once('='))
        .filter(|(name, _)| name.trim() == VARIABLE)
        .map(|(_, value)| value.trim().trim_matches(|c| c == '"' || c == '\''))
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn write(path: &Utf8Path, text: &str, mode: u32) {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn made_once_and_kept() {
        let dir = camino_tempfile::tempdir().unwrap();
        let own = dir.path().join("master.key");
        let first = MasterKey::load(&KeySource::Own, &own, false).unwrap();
        let second = MasterKey::load(&KeySource::Own, &own, true).unwrap();
        assert_eq!(first.bytes(), second.bytes());
        assert_eq!(std::fs::metadata(&own).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(format!("{first:?}"), "MasterKey([secret])");
    }

    #[test]
    fn a_lost_key_is_not_replaced_by_a_new_one() {
        let dir = camino_tempfile::tempdir().unwrap();
        let own = dir.path().join("master.key");
        let err = MasterKey::load(&KeySource::Own, &own, true).unwrap_err();
        assert!(matches!(err, KeyError::Missing { .. }));
        assert!(!own.exists());
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = camino_tempfile::tempdir().unwrap();
        let own = dir.path().join("master.key");
        write(&own, &BASE64.encode([7; 32]), 0o640);
        let err = MasterKey::load(&KeySource::Own, &own, true).unwrap_err();
        assert!(matches!(err, KeyError::Open { mode: 0o640, .. }));
    }

    #[test]
    fn environment_file_and_systemd_credential() {
        let dir = camino_tempfile::tempdir().unwrap();
        let own = dir.path().join("master.key");
        let env = dir.path().join("vault.env");
        let key = BASE64.encode([9; 32]);
        write(
            &env,
            &format!("# key\nOTHER=x\n{VARIABLE}=\"{key}\"\n"),
            0o600,
        );
        let source = KeySource::choose(Some(env.clone()), None);
        assert_eq!(
            MasterKey::load(&source, &own, true).unwrap().bytes(),
            &[9; 32]
        );
        write(&dir.path().join(SYSTEMD_CREDENTIAL), &key, 0o440);
        let source = KeySource::choose(None, Some(dir.path()));
        assert_eq!(
            MasterKey::load(&source, &own, true).unwrap().bytes(),
            &[9; 32]
        );
        write(&env, "VESTIBULE_VAULT_KEY=short\n", 0o600);
        let source = KeySource::EnvironmentFile(env);
        let err = MasterKey::load(&source, &own, true).unwrap_err();
        assert!(matches!(err, KeyError::NotAKey { .. }));
        assert!(!own.exists(), "no key of its own was made");
    }
}
