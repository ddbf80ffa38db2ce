//! The vault: sealed records in a directory, each vouched for by the audit log.
use crate::{
    audit::{Action, Audit, AuditError, AuditLine, AuditSummary, hex},
    file::{self, FileError},
    key::{KeyError, KeySource, MasterKey},
    record::{self, CONTENT_LIMIT, Content, CredentialMeta, NewCredential, RecordError},
};
use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest as _, Sha256};
use std::{
    fs::File,
    str::FromStr as _,
    sync::{Mutex, MutexGuard, PoisonError},
};
use vestibule_api::{crash, ids::CredentialId, time::Timestamp};

/// A record's file is never larger: base64 of the content, and a header of bounded parts.
const RECORD_LIMIT: u64 = (CONTENT_LIMIT as u64) * 2;

/// Who does something with a credential and for what: stands in the audit log. Not a secret.
#[derive(Clone, Debug)]
pub struct Access {
    /// `cli:root`, `api:token`, `session:<id>`.
    pub actor: String,
    pub purpose: String,
}

/// What [`Vault::list`] found.
#[derive(Debug, Default)]
pub struct Listing {
    /// Oldest first.
    pub credentials: Vec<CredentialMeta>,
    /// Records that are not what the audit log says, or can't be read.
    pub damaged: Vec<(CredentialId, ReadError)>,
}

/// Why a vault can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("prepare the vault")]
    File(#[from] FileError),
    #[error("get the vault's master key")]
    Key(#[from] KeyError),
    #[error("verify the vault's audit log")]
    Audit(#[from] AuditError),
    #[error("there is no vault in `{0}`")]
    None(Utf8PathBuf),
}

/// Why a credential was not sealed. Nothing of it is in the vault then.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    #[error("credential {0} is in the vault, from another session")]
    Taken(CredentialId),
    #[error("seal credential {id}")]
    Record {
        id: CredentialId,
        #[source]
        err: RecordError,
    },
    #[error("store credential {id}")]
    File {
        id: CredentialId,
        #[source]
        err: FileError,
    },
    #[error("write down that credential {id} is stored")]
    Audit {
        id: CredentialId,
        #[source]
        err: AuditError,
    },
}

/// Why a credential was not read. Nothing of it left the vault then.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("there is no credential {0}")]
    NotFound(CredentialId),
    #[error("the record of credential {0} is not the one that was stored last")]
    NotCurrent(CredentialId),
    #[error("read credential {id}")]
    File {
        id: CredentialId,
        #[source]
        err: FileError,
    },
    #[error("open credential {id}")]
    Record {
        id: CredentialId,
        #[source]
        err: RecordError,
    },
    #[error("write down that credential {id} leaves")]
    Audit {
        id: CredentialId,
        #[source]
        err: AuditError,
    },
}

/// Why a credential was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error("there is no credential {0}")]
    NotFound(CredentialId),
    #[error("write down that credential {id} is removed")]
    Audit {
        id: CredentialId,
        #[source]
        err: AuditError,
    },
    #[error("remove credential {id}")]
    File {
        id: CredentialId,
        #[source]
        err: FileError,
    },
}

/// Why a vault was not copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("copy the vault")]
    File(#[from] FileError),
    #[error("verify the vault's audit log")]
    Audit(#[from] AuditError),
    #[error("copy a record of the vault")]
    Record(#[from] ReadError),
}

/// An open vault. Several processes may have the same one open.
#[derive(Debug)]
pub struct Vault {
    dir: Utf8PathBuf,
    master: MasterKey,
    audit: Mutex<Audit>,
}

/// The audit log with the vault's lock: held for the length of one operation.
struct Locked<'a> {
    audit: MutexGuard<'a, Audit>,
    _file: File,
}

impl Vault {
    /// Opens the vault in `dir`, and makes it where it is not there.
    ///
    /// # Errors
    /// When the directory can't be used, the master key is missing or not this vault's, or the audit log was changed.
    pub fn open(dir: &Utf8Path, source: &KeySource) -> Result<Self, OpenError> {
        file::make_dir(&dir.join("records"))?;
        let _lock = lock(dir)?;
        let log = dir.join("audit.log");
        let used = std::fs::metadata(&log).is_ok_and(|meta| meta.len() > 0);
        let master = MasterKey::load(source, &dir.join("master.key"), used)?;
        let mut audit = Audit::new(log, master.derive(b"vestibule audit 1"));
        audit.catch_up()?;
        if audit.summary().lines == 0 {
            audit.append(Action::Created, None, None, "vault", "first start")?;
            file::sync_parent(audit.path())?;
        }
        let (dir, audit) = (dir.to_owned(), Mutex::new(audit));
        let vault = Self { dir, master, audit };
        vault.recover()?;
        Ok(vault)
    }

    /// Opens a vault that is there for looking at it: nothing is made, written, or carried on. `each` gets every line of
    /// the audit log that follows from those before it, with its MAC, until one does not.
    ///
    /// # Errors
    /// As [`Vault::open`]; [`AuditError::Broken`] names the first line that does not follow.
    pub fn read(
        dir: &Utf8Path,
        source: &KeySource,
        each: &mut dyn FnMut(&AuditLine, &str),
    ) -> Result<Self, OpenError> {
        let log = dir.join("audit.log");
        if !log.exists() {
            return Err(OpenError::None(dir.to_owned()));
        }
        let master = MasterKey::load(source, &dir.join("master.key"), true)?;
        let mut audit = Audit::new(log, master.derive(b"vestibule audit 1"));
        audit.read_each(each)?;
        let (dir, audit) = (dir.to_owned(), Mutex::new(audit));
        Ok(Self { dir, master, audit })
    }

    /// Carries on what a process that was killed had written down and not done: a record whose line is there gets its
    /// name, one that the newest line removes is removed, and other staged files go. The caller holds the vault's lock.
    fn recover(&self) -> Result<(), FileError> {
        let audit = self.audit();
        let dir = self.dir.join("records");
        let list_err = |err| FileError::new("list", &dir, err);
        for entry in dir.read_dir_utf8().map_err(list_err)? {
            let entry = entry.map_err(list_err)?;
            let name = entry.file_name().strip_suffix(".new");
            let Some(id) = name.and_then(|name| CredentialId::from_str(name).ok()) else {
                continue;
            };
            let staged = file::read(entry.path(), RECORD_LIMIT)?;
            if audit.current(id) == Some(digest(&staged).as_str()) {
                file::commit(entry.path(), &self.path(id))?;
            } else {
                file::discard(entry.path());
            }
        }
        if let Some((Action::Removed, id)) = audit.newest() {
            let path = self.path(id);
            match std::fs::remove_file(&path) {
                Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                    return Err(FileError::new("remove", &path, err));
                }
                Ok(()) | Err(_) => file::sync_parent(&path)?,
            }
        }
        Ok(())
    }

    /// Seals a credential. A second call with the id and session of a credential that is there changes nothing: a caller
    /// that was interrupted may call again.
    ///
    /// # Errors
    /// [`PutError`]; the credential is then not in the vault.
    pub fn put(&self, new: &NewCredential, access: &Access) -> Result<CredentialMeta, PutError> {
        let id = new.credential_id;
        let record_err = |err| PutError::Record { id, err };
        let file_err = |err| PutError::File { id, err };
        let audit_err = |err| PutError::Audit { id, err };
        let mut locked = self.lock().map_err(file_err)?;
        locked.audit.catch_up().map_err(audit_err)?;
        if let Ok((_, there)) = self.current(&locked.audit, id) {
            if there.session_id == new.session_id {
                return Ok(there);
            }
            return Err(PutError::Taken(id));
        }
        let meta = CredentialMeta::of(new, 1, Timestamp::now()).map_err(record_err)?;
        let bytes = record::encode(&self.master, &meta, &new.files).map_err(record_err)?;
        let path = self.path(id);
        let staged = file::stage(&path, &bytes).map_err(file_err)?;
        let digest = Some(digest(&bytes));
        crash::point("vault:staged");
        let (actor, purpose) = (&access.actor, &access.purpose);
        locked
            .audit
            .append(Action::Stored, Some(id), digest, actor, purpose)
            .map_err(audit_err)
            .inspect(|()| crash::point("vault:written-down"))
            .and_then(|()| file::commit(&staged, &path).map_err(file_err))
            .inspect_err(|_| file::discard(&staged))?;
        Ok(meta)
    }

    /// Every credential's metadata.
    ///
    /// # Errors
    /// When the directory or the audit log can't be read; a damaged record is no error but in the listing.
    pub fn list(&self) -> Result<Listing, OpenError> {
        let mut audit = self.audit();
        audit.catch_up()?;
        let dir = self.dir.join("records");
        let entries = dir
            .read_dir_utf8()
            .map_err(|err| FileError::new("list", &dir, err))?;
        let mut listing = Listing::default();
        for entry in entries.flatten() {
            let Ok(id) = CredentialId::from_str(entry.file_name()) else {
                continue;
            };
            match self.current(&audit, id) {
                Ok((_, meta)) => listing.credentials.push(meta),
                Err(err) => listing.damaged.push((id, err)),
            }
        }
        listing
            .credentials
            .sort_by_key(|meta| (meta.created_at, meta.credential_id));
        Ok(listing)
    }

    /// One credential's metadata.
    ///
    /// # Errors
    /// As [`ReadError`] says.
    pub fn show(&self, id: CredentialId) -> Result<CredentialMeta, ReadError> {
        let mut audit = self.audit();
        audit
            .catch_up()
            .map_err(|err| ReadError::Audit { id, err })?;
        self.current(&audit, id).map(|(_, meta)| meta)
    }

    /// The credential's content: exactly the bytes that were sealed. Before it returns, a line of the audit log that says
    /// so is on disk.
    ///
    /// # Errors
    /// As [`ReadError`] says; the content does then not leave the vault.
    pub fn get(&self, id: CredentialId, access: &Access) -> Result<Content, ReadError> {
        let audit_err = |err| ReadError::Audit { id, err };
        let mut locked = self.lock().map_err(|err| ReadError::File { id, err })?;
        locked.audit.catch_up().map_err(audit_err)?;
        let (bytes, _) = self.current(&locked.audit, id)?;
        let content = record::decode(&self.master, id, &bytes)
            .map_err(|err| ReadError::Record { id, err })?;
        let (actor, purpose) = (&access.actor, &access.purpose);
        locked
            .audit
            .append(Action::Released, Some(id), None, actor, purpose)
            .map_err(audit_err)?;
        Ok(content)
    }

    /// Removes a credential. What the disk keeps of it is ciphertext whose data key is gone with it.
    ///
    /// # Errors
    /// As [`RemoveError`] says.
    pub fn remove(&self, id: CredentialId, access: &Access) -> Result<(), RemoveError> {
        let file_err = |err| RemoveError::File { id, err };
        let mut locked = self.lock().map_err(file_err)?;
        let path = self.path(id);
        if !path.exists() {
            return Err(RemoveError::NotFound(id));
        }
        let (actor, purpose) = (&access.actor, &access.purpose);
        locked
            .audit
            .append(Action::Removed, Some(id), None, actor, purpose)
            .map_err(|err| RemoveError::Audit { id, err })?;
        crash::point("vault:removed");
        std::fs::remove_file(&path)
            .map_err(|err| file_err(FileError::new("remove", &path, err)))?;
        file::sync_parent(&path).map_err(file_err)
    }

    /// Verifies the whole audit log, from its first line.
    ///
    /// # Errors
    /// [`AuditError`] names the first line that does not follow.
    pub fn audit_check(&self) -> Result<AuditSummary, AuditError> {
        let path = self.audit().path().to_owned();
        let mut fresh = Audit::new(path, self.master.derive(b"vestibule audit 1"));
        fresh.catch_up()?;
        Ok(fresh.summary())
    }

    /// Writes audit log and records into `to`, a directory that is made, as they are at one moment: nothing enters or
    /// leaves the vault meanwhile. The master key is not among them.
    ///
    /// # Errors
    /// When something can't be read or written, or a record is not the one that was stored last.
    pub fn copy(&self, to: &Utf8Path) -> Result<AuditSummary, CopyError> {
        file::make_dir(&to.join("records"))?;
        let mut locked = self.lock()?;
        locked.audit.catch_up()?;
        locked.audit.copy(&to.join("audit.log"))?;
        for id in locked.audit.stored() {
            let (bytes, _) = self.current(&locked.audit, id)?;
            let path = to.join("records").join(id.to_string());
            file::commit(&file::stage(&path, &bytes)?, &path)?;
        }
        Ok(locked.audit.summary())
    }

    /// Opens every record with the master key, lets go of what is in it, and gives those that do not open. Nothing
    /// leaves, and no line is written.
    ///
    /// # Errors
    /// As [`Vault::list`].
    pub fn check_records(&self) -> Result<Vec<(CredentialId, ReadError)>, OpenError> {
        let Listing {
            credentials,
            mut damaged,
        } = self.list()?;
        let audit = self.audit();
        for id in credentials.iter().map(|meta| meta.credential_id) {
            let opened = self.current(&audit, id).and_then(|(bytes, _)| {
                record::decode(&self.master, id, &bytes)
                    .map_err(|err| ReadError::Record { id, err })
            });
            damaged.extend(opened.err().map(|err| (id, err)));
        }
        Ok(damaged)
    }

    /// Whether the audit log has a line about this credential.
    pub fn knows(&self, id: CredentialId) -> bool {
        self.audit().knows(id)
    }

    /// Records that the audit log says are there, and that are not.
    pub fn missing(&self) -> Vec<CredentialId> {
        let audit = self.audit();
        let mut missing: Vec<_> = audit
            .stored()
            .filter(|id| !self.path(*id).exists())
            .collect();
        missing.sort();
        missing
    }

    /// The record of `id` and its header, when the audit log says that it is the one stored last.
    fn current(
        &self,
        audit: &Audit,
        id: CredentialId,
    ) -> Result<(Vec<u8>, CredentialMeta), ReadError> {
        let bytes = file::read(&self.path(id), RECORD_LIMIT).map_err(|err| {
            if err.is_not_found() {
                ReadError::NotFound(id)
            } else {
                ReadError::File { id, err }
            }
        })?;
        if audit.current(id) != Some(digest(&bytes).as_str()) {
            return Err(ReadError::NotCurrent(id));
        }
        let meta = record::header(id, &bytes).map_err(|err| ReadError::Record { id, err })?;
        Ok((bytes, meta))
    }

    fn path(&self, id: CredentialId) -> Utf8PathBuf {
        self.dir.join("records").join(id.to_string())
    }

    fn audit(&self) -> MutexGuard<'_, Audit> {
        // A panic elsewhere can't leave the log half taken: its fields change together, after the file.
        self.audit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> Result<Locked<'_>, FileError> {
        let audit = self.audit();
        Ok(Locked {
            audit,
            _file: lock(&self.dir)?,
        })
    }
}

/// Waits for the vault's lock; it is given back when the file is closed.
fn lock(dir: &Utf8Path) -> Result<File, FileError> {
    let path = dir.join("lock");
    let file = file::open_append(&path)?;
    file.lock()
        .map_err(|err| FileError::new("lock", &path, err))?;
    Ok(file)
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}
