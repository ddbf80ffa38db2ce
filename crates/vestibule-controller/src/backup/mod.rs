//! Backups: database, vault and configuration in one tar file, taken while the controller runs, and put back into an empty
//! home. The database is a file of SQLite's in it, whichever it was, and becomes whichever the configuration names.
//!
//! The database is copied first and the vault after it, each as it is at one moment. What the database says was sealed is
//! therefore in the vault's copy; a credential that was sealed in between belongs to a session that the database still
//! shows on its way, which finds it there after a restore. The master key is not in the file unless it is asked for: who
//! has both has every credential.
mod create;
mod restore;
mod rows;

pub use create::{BackupError, BackupOptions, backup};
pub use restore::{RestoreError, RestoreOptions, restore};

use crate::store::StoreError;
use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use sqlx::{Connection as _, Row as _};
use std::{
    collections::{BTreeMap, HashSet},
    io::{self, Read},
};
use vestibule_api::{ids::CredentialId, time::Timestamp};
use vestibule_vault::{AuditSummary, KeySource, Vault};

/// The layout that this program writes and reads.
const SCHEMA: u32 = 1;
/// First in the file.
const MANIFEST: &str = "backup.json";
const DATABASE: &str = "vestibule.db";
const HOST: &str = "host-id";
const CONFIG: &str = "vestibule.toml";
const AUDIT_LOG: &str = "vault/audit.log";
const MASTER_KEY: &str = "vault/master.key";

/// What is in a backup.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackupManifest {
    schema: u32,
    /// Version of the program that wrote it.
    pub version: String,
    pub created_at: Timestamp,
    /// Whether the database is in it. It always is; older backups are without where it was PostgreSQL.
    pub database: bool,
    /// Where the master key was; `with-backup`: it is in the file.
    pub master_key: KeyPlace,
    pub audit_lines: u64,
    /// MAC of the audit log's newest line.
    pub audit_head: String,
    pub credentials: usize,
    /// Every other file, by its path below the home directory.
    pub files: BTreeMap<String, BackupFile>,
}

/// One file of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackupFile {
    pub bytes: u64,
    pub sha256: String,
}

/// Where a vault's master key is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyPlace {
    /// `vault/master.key` of the home that was saved.
    Home,
    /// A systemd credential.
    Systemd,
    /// The configuration's `vault.environment_file`.
    EnvironmentFile,
    /// In this backup.
    WithBackup,
}

impl KeyPlace {
    fn of(source: &KeySource, with_key: bool) -> Self {
        match source {
            KeySource::Own if with_key => Self::WithBackup,
            KeySource::Own => Self::Home,
            KeySource::Systemd(_) => Self::Systemd,
            KeySource::EnvironmentFile(_) => Self::EnvironmentFile,
        }
    }

    /// Where it is, in words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Home => "vault/master.key of the home directory",
            Self::Systemd => "the systemd credential `vestibule-vault-key`",
            Self::EnvironmentFile => "the environment file of `[vault]`",
            Self::WithBackup => "in the backup",
        }
    }
}

/// A completed session whose credential the vault never heard of: database and vault are not of one home.
#[derive(Debug, thiserror::Error)]
#[error(
    "database and vault do not belong together: a completed session has credential {0}, of which the audit log says nothing"
)]
pub struct Mismatch(CredentialId);

/// Whether a database file is whole, and what it says was sealed on the host whose `host-id` is beside it is known to the vault.
async fn check_database(path: &Utf8Path, vault: &Vault) -> Result<Option<Mismatch>, StoreError> {
    let mut connection = connect(path).await?;
    let query = |what| move |err| StoreError::Query { what, err };
    let said: String = sqlx::query("PRAGMA integrity_check")
        .fetch_one(&mut connection)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(query("check the database's file"))?;
    if said != "ok" {
        let err = sqlx::Error::Protocol(said);
        return Err(query("find the database's file whole")(err));
    }
    let elsewhere = elsewhere(path, &mut connection).await?;
    let rows = sqlx::query("SELECT credential_id FROM session WHERE state = 'completed'")
        .fetch_all(&mut connection)
        .await
        .map_err(query("list what was sealed"))?;
    for row in rows {
        let id: String = row.try_get(0).map_err(query("read what was sealed"))?;
        if elsewhere.contains(&id) {
            continue;
        }
        let id: CredentialId = id.parse().map_err(|err| StoreError::Column {
            column: "credential_id",
            err: Box::new(err),
        })?;
        if !vault.knows(id) {
            return Ok(Some(Mismatch(id)));
        }
    }
    connection
        .close()
        .await
        .map_err(query("close the database"))?;
    Ok(None)
}

/// Credentials that are in other hosts' vaults.
async fn elsewhere(
    path: &Utf8Path,
    connection: &mut sqlx::AnyConnection,
) -> Result<HashSet<String>, StoreError> {
    let host = path
        .parent()
        .map(|dir| std::fs::read_to_string(dir.join(HOST)));
    // Without one, the backup is of before there were hosts.
    let Some(Ok(host)) = host else {
        return Ok(HashSet::new());
    };
    let query = |err| StoreError::Query {
        what: "list what was sealed elsewhere",
        err,
    };
    let rows = sqlx::query("SELECT credential_id FROM credential_host WHERE host_id <> $1")
        .bind(host.trim().to_owned())
        .fetch_all(connection)
        .await
        .map_err(query)?;
    rows.iter()
        .map(|row| row.try_get(0))
        .collect::<Result<_, _>>()
        .map_err(query)
}

async fn connect(path: &Utf8Path) -> Result<sqlx::AnyConnection, StoreError> {
    sqlx::any::install_default_drivers();
    sqlx::AnyConnection::connect(&format!("sqlite://{path}"))
        .await
        .map_err(|err| StoreError::Open {
            what: path.to_string(),
            err: err.into(),
        })
}

/// Copies `from` into `to` and gives its length and digest.
fn digest_of(mut from: impl Read, mut to: impl io::Write) -> io::Result<BackupFile> {
    let (mut hash, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; 64 << 10]);
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        to.write_all(&buffer[..count])?;
        bytes += u64::try_from(count).unwrap_or(u64::MAX);
    }
    let sha256 = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok(BackupFile { bytes, sha256 })
}

fn head_of(summary: &AuditSummary) -> (u64, String) {
    (summary.lines, summary.head.clone())
}
