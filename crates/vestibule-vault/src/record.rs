//! One sealed credential as a file of four lines: format, header (JSON), wrapped data key, sealed content (base64 both).
//!
//! The header is in clear so that a credential can be listed without a secret being opened; its exact bytes are the
//! associated data of both seals. The content is the files' bytes one after the other, cut by the header's lengths.
use crate::{
    key::MasterKey,
    seal::{self, Refused},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};
use vestibule_api::{
    ids::{CredentialId, ProviderId, SessionId},
    secret::Secret,
    time::Timestamp,
};
use zeroize::Zeroizing;

const FORMAT: &str = "vestibule-credential 1";
const WRAP_LABEL: &[u8] = b"vestibule data key 1\0";
const CONTENT_LABEL: &[u8] = b"vestibule content 1\0";
/// All files of one credential together have at most so many bytes.
pub(crate) const CONTENT_LIMIT: usize = 4 << 20;
/// A credential has at most so many files.
const FILES_LIMIT: usize = 32;
const PATH_LIMIT: usize = 512;

/// What is known of a credential without opening it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CredentialMeta {
    /// Raised when the credential is sealed anew under the same id.
    pub version: u32,
    pub credential_id: CredentialId,
    pub provider: ProviderId,
    pub user_id: String,
    pub session_id: SessionId,
    pub account: Option<String>,
    pub created_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    pub files: Vec<FileMeta>,
}

/// What is known of one of its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FileMeta {
    /// Relative to the home directory.
    pub path: String,
    pub mode: u32,
    pub bytes: usize,
}

/// A credential to be sealed.
#[derive(Debug)]
pub struct NewCredential {
    pub credential_id: CredentialId,
    pub provider: ProviderId,
    pub user_id: String,
    pub session_id: SessionId,
    pub account: Option<String>,
    pub expires_at: Option<Timestamp>,
    pub files: Vec<ContentFile>,
}

/// An opened credential: exactly the bytes that the tool wrote.
#[derive(Debug)]
pub struct Content {
    pub files: Vec<ContentFile>,
}

/// One file of it.
#[derive(Debug)]
pub struct ContentFile {
    /// Relative to the home directory.
    pub path: String,
    /// Permission bits that the tool gave it.
    pub mode: u32,
    pub bytes: Secret<Vec<u8>>,
}

/// Why bytes are not the record they should be.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("`{path}` is not a path below the home directory")]
    BadPath { path: String },
    #[error(
        "the credential has no file, more than {FILES_LIMIT}, or more than {CONTENT_LIMIT} bytes"
    )]
    BadSize,
    #[error("seal the credential")]
    Seal,
    #[error("the record is not in the format `{FORMAT}`")]
    Format,
    #[error("the record's header can't be read")]
    Header(#[source] serde_json::Error),
    #[error("the record stands under the name of another")]
    Misnamed,
    #[error("the record was changed, or the master key is not the one it was sealed with")]
    Refused,
}

impl From<Refused> for RecordError {
    fn from(Refused: Refused) -> Self {
        Self::Refused
    }
}

impl CredentialMeta {
    /// The header of `new` as it will stand in the record.
    pub(crate) fn of(
        new: &NewCredential,
        version: u32,
        now: Timestamp,
    ) -> Result<Self, RecordError> {
        let total: usize = new.files.iter().map(|f| f.bytes.expose().len()).sum();
        if new.files.is_empty() || new.files.len() > FILES_LIMIT || total > CONTENT_LIMIT {
            return Err(RecordError::BadSize);
        }
        for file in &new.files {
            check_path(&file.path)?;
        }
        Ok(Self {
            version,
            credential_id: new.credential_id,
            provider: new.provider.clone(),
            user_id: new.user_id.clone(),
            session_id: new.session_id,
            account: new.account.clone(),
            created_at: now,
            expires_at: new.expires_at,
            files: new.files.iter().map(FileMeta::of).collect(),
        })
    }
}

impl FileMeta {
    fn of(file: &ContentFile) -> Self {
        Self {
            path: file.path.clone(),
            mode: file.mode & 0o777,
            bytes: file.bytes.expose().len(),
        }
    }
}

/// Whoever writes the files out joins these paths to a directory: none may lead out of it.
fn check_path(path: &str) -> Result<(), RecordError> {
    let plain = |part: &str| !matches!(part, "" | "." | "..");
    if path.len() <= PATH_LIMIT && !path.chars().any(char::is_control) && path.split('/').all(plain)
    {
        return Ok(());
    }
    Err(RecordError::BadPath {
        path: path.chars().filter(|c| !c.is_control()).take(96).collect(),
    })
}

fn labelled(label: &[u8], header: &[u8]) -> Vec<u8> {
    [label, header].concat()
}

/// Seals `files` under `meta`; the bytes of the record's file.
pub(crate) fn encode(
    master: &MasterKey,
    meta: &CredentialMeta,
    files: &[ContentFile],
) -> Result<Vec<u8>, RecordError> {
    let header = serde_json::to_string(meta).map_err(RecordError::Header)?;
    let mut data_key = Zeroizing::new([0u8; 32]);
    rand::RngCore::fill_bytes(&mut rand::rng(), data_key.as_mut());
    let mut plain = Zeroizing::new(Vec::with_capacity(meta.files.iter().map(|f| f.bytes).sum()));
    for file in files {
        plain.extend_from_slice(file.bytes.expose());
    }
    let wrap_aad = labelled(WRAP_LABEL, header.as_bytes());
    let wrapped =
        seal::seal(master.bytes(), &wrap_aad, data_key.as_ref()).map_err(|_| RecordError::Seal)?;
    let content_aad = labelled(CONTENT_LABEL, header.as_bytes());
    let sealed = seal::seal(&data_key, &content_aad, &plain).map_err(|_| RecordError::Seal)?;
    let lines = [
        FORMAT,
        &header,
        &BASE64.encode(wrapped),
        &BASE64.encode(sealed),
        "",
    ];
    Ok(lines.join("\n").into_bytes())
}

/// A record's parts, nothing verified yet but the form.
struct Parts<'a> {
    header: &'a str,
    wrapped: Vec<u8>,
    sealed: Vec<u8>,
}

fn split(bytes: &[u8]) -> Result<Parts<'_>, RecordError> {
    let text = std::str::from_utf8(bytes).map_err(|_| RecordError::Format)?;
    let mut lines = text.split('\n');
    let mut line = || lines.next().ok_or(RecordError::Format);
    if line()? != FORMAT {
        return Err(RecordError::Format);
    }
    let header = line()?;
    let wrapped = BASE64.decode(line()?).map_err(|_| RecordError::Format)?;
    let sealed = BASE64.decode(line()?).map_err(|_| RecordError::Format)?;
    if line()?.is_empty() && lines.next().is_none() {
        return Ok(Parts {
            header,
            wrapped,
            sealed,
        });
    }
    Err(RecordError::Format)
}

/// The header of the record that should be `id`. Whether it is authentic is for the audit log or [`decode`] to say.
pub(crate) fn header(id: CredentialId, bytes: &[u8]) -> Result<CredentialMeta, RecordError> {
    let meta: CredentialMeta =
        serde_json::from_str(split(bytes)?.header).map_err(RecordError::Header)?;
    if meta.credential_id != id {
        return Err(RecordError::Misnamed);
    }
    Ok(meta)
}

/// Opens the record that should be `id`.
pub(crate) fn decode(
    master: &MasterKey,
    id: CredentialId,
    bytes: &[u8],
) -> Result<Content, RecordError> {
    let meta = header(id, bytes)?;
    let parts = split(bytes)?;
    let wrap_aad = labelled(WRAP_LABEL, parts.header.as_bytes());
    let data_key = seal::open(master.bytes(), &wrap_aad, &parts.wrapped)?;
    let data_key = <&[u8; 32]>::try_from(data_key.as_slice()).map_err(|_| RecordError::Refused)?;
    let content_aad = labelled(CONTENT_LABEL, parts.header.as_bytes());
    let plain = seal::open(data_key, &content_aad, &parts.sealed)?;
    let mut rest = plain.as_slice();
    let mut files = Vec::with_capacity(meta.files.len());
    for file in meta.files {
        let (bytes, after) = rest
            .split_at_checked(file.bytes)
            .ok_or(RecordError::Refused)?;
        rest = after;
        let (path, mode) = (file.path, file.mode);
        let bytes = Secret::new(bytes.to_vec());
        files.push(ContentFile { path, mode, bytes });
    }
    if rest.is_empty() {
        Ok(Content { files })
    } else {
        Err(RecordError::Refused)
    }
}

#[cfg(test)]
mod tests {
    //! What the seals refuse by themselves, without the audit log in front of them.
    use super::*;
    use crate::key::KeySource;

    fn sealed(user: &str) -> (MasterKey, CredentialMeta, Vec<u8>) {
        let dir = camino_tempfile::tempdir().unwrap();
        let master = MasterKey::load(&KeySource::Own, &dir.path().join("key"), false).unwrap();
        let new = NewCredential {
            credential_id: CredentialId::generate(),
            provider: "gh".parse().unwrap(),
            user_id: user.to_owned(),
            session_id: SessionId::generate(),
            account: None,
            expires_at: None,
            files: vec![ContentFile {
                path: "hosts.yml".to_owned(),
                mode: 0o600,
                bytes: Secret::new(b"token".to_vec()),
            }],
        };
        let meta = CredentialMeta::of(&new, 1, Timestamp::now()).unwrap();
        let bytes = encode(&master, &meta, &new.files).unwrap();
        (master, meta, bytes)
    }

    fn refused(master: &MasterKey, id: CredentialId, text: &str) -> bool {
        matches!(
            decode(master, id, text.as_bytes()),
            Err(RecordError::Refused)
        )
    }

    #[test]
    fn each_part_of_the_identity_is_bound() {
        let (master, meta, bytes) = sealed("ada");
        let text = String::from_utf8(bytes).unwrap();
        let id = meta.credential_id;
        assert_eq!(decode(&master, id, text.as_bytes()).unwrap().files.len(), 1);
        let changes = [
            (
                meta.session_id.to_string(),
                SessionId::generate().to_string(),
            ),
            ("\"gh\"".to_owned(), "\"gx\"".to_owned()),
            ("\"ada\"".to_owned(), "\"eve\"".to_owned()),
            ("\"version\":1".to_owned(), "\"version\":2".to_owned()),
            ("hosts.yml".to_owned(), "hosts.yaml".to_owned()),
        ];
        for (from, to) in changes {
            let changed = text.replacen(&from, &to, 1);
            assert_ne!(changed, text, "{from}");
            assert!(refused(&master, id, &changed), "{from} became {to}");
        }
        let other = CredentialId::generate();
        assert!(matches!(
            decode(&master, other, text.as_bytes()),
            Err(RecordError::Misnamed)
        ));
        let renamed = text.replacen(&id.to_string(), &other.to_string(), 1);
        assert!(refused(&master, other, &renamed));
    }

    #[test]
    fn parts_of_two_records_do_not_mix() {
        let (master, ada, a) = sealed("ada");
        let (other_master, eve, e) = sealed("eve");
        assert!(matches!(
            decode(&other_master, ada.credential_id, &a),
            Err(RecordError::Refused)
        ));
        let (a, e) = (String::from_utf8(a).unwrap(), String::from_utf8(e).unwrap());
        let lines = |t: &str| t.split('\n').map(str::to_owned).collect::<Vec<_>>();
        for part in 2..4 {
            let mut mixed = lines(&a);
            mixed[part] = lines(&e)[part].clone();
            assert!(
                refused(&master, ada.credential_id, &mixed.join("\n")),
                "line {part}"
            );
        }
        let mut swapped = lines(&a);
        swapped.swap(2, 3);
        assert!(refused(&master, ada.credential_id, &swapped.join("\n")));
        assert_ne!(ada.credential_id, eve.credential_id);
    }

    /// Where the form holds, it is the seals that refuse: of a record that is stored, the audit log's digest would come first.
    #[test]
    fn every_bit_is_sealed() {
        let (master, meta, bytes) = sealed("ada");
        let id = meta.credential_id;
        let parts = split(&bytes).unwrap();
        let text = std::str::from_utf8(&bytes).unwrap();
        let lines: Vec<_> = text.split('\n').map(str::to_owned).collect();
        let bits = |len| (0..len).flat_map(|at| (0..8).map(move |bit| (at, 1_u8.rotate_left(bit))));
        let mut read_well = Vec::new();
        for (at, bit) in bits(bytes.len()) {
            let mut changed = bytes.clone();
            changed[at] ^= bit;
            let place = format!("bit {bit:#x} of byte {at}");
            let err = decode(&master, id, &changed).map(drop).expect_err(&place);
            // A header that still reads well, as the same or as another, is for the seals alone to refuse.
            let other = split(&changed).is_ok_and(|changed| changed.header != parts.header);
            if other && let Ok(header) = header(id, &changed) {
                assert!(matches!(err, RecordError::Refused), "{place}: {err}");
                read_well.push(header);
            }
        }
        assert!(
            read_well.len() > 200,
            "{} headers that read well were tried",
            read_well.len()
        );
        // A UUID's letter in upper case is the same id in other bytes.
        assert!(
            read_well.contains(&meta),
            "no header that means the same was tried"
        );
        for (line, part) in [(2, &parts.wrapped), (3, &parts.sealed)] {
            for (at, bit) in bits(part.len()) {
                let mut changed = part.clone();
                changed[at] ^= bit;
                let mut lines = lines.clone();
                lines[line] = BASE64.encode(changed);
                let place = format!("line {line}, bit {bit:#x} of byte {at}");
                assert!(refused(&master, id, &lines.join("\n")), "{place}");
            }
        }
    }

    #[test]
    fn cut_and_garbled_records_are_errors_and_no_panics() {
        let (master, meta, bytes) = sealed("ada");
        for len in 0..bytes.len() {
            assert!(
                decode(&master, meta.credential_id, &bytes[..len]).is_err(),
                "cut to {len}"
            );
        }
        for junk in [
            &b"\xff\xfe"[..],
            b"vestibule-credential 1\n{}\n\n\n",
            b"vestibule-credential 1\n\n\n\n",
        ] {
            assert!(decode(&master, meta.credential_id, junk).is_err());
        }
    }
}
