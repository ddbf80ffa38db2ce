//! Puts a backup back into an empty home, after everything in it was checked.
use super::{
    AUDIT_LOG, BackupManifest, CONFIG, DATABASE, HOST, KeyPlace, MANIFEST, MASTER_KEY, Mismatch,
    SCHEMA, check_database, digest_of, head_of, rows,
};
use crate::{
    config::{Config, ConfigError},
    core::off_runtime,
    file::{FileError, failed},
    serve::{LockError, lock},
    store::StoreError,
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
};
use vestibule_api::ids::CredentialId;
use vestibule_vault::{KeySource, OpenError, ReadError, Vault};

/// More than any manifest has; it names every record.
const MANIFEST_LIMIT: u64 = 64 << 20;
/// What may be in the home already: it can be made again, and no backup holds it.
const KEPT: [&str; 4] = ["images", "aliases", "snapshots", "cache"];

/// What is put back, and where.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    pub from: Utf8PathBuf,
    pub home: Utf8PathBuf,
    /// The master key as a file, where the backup does not hold it; it becomes the vault's own.
    pub key: Option<Utf8PathBuf>,
    /// The configuration that says where the master key is, and which database there is; none: the one in the backup.
    pub config: Option<Utf8PathBuf>,
    /// Leave the PostgreSQL database as it is: another host's restore filled it, or it was never lost.
    pub keep_database: bool,
}

/// Why nothing was restored. The home is as it was, but for a directory `.restore-…` where the host died meanwhile.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("restore into `{0}`")]
    Lock(Utf8PathBuf, #[source] LockError),
    #[error(
        "the home directory `{home}` is not empty, it has {}: restore into another one (--home DIR)", names.join(", ")
    )]
    NotEmpty {
        home: Utf8PathBuf,
        names: Vec<String>,
    },
    #[error("`{0}` is not a backup of this program")]
    NotABackup(Utf8PathBuf),
    #[error(
        "the backup has layout {found}; this program reads {SCHEMA}: use the program that wrote it, version {version}"
    )]
    Schema { found: u32, version: String },
    #[error("the backup is damaged: `{name}` {what}")]
    Damaged { name: String, what: &'static str },
    #[error("understand the backup's manifest")]
    Manifest(#[source] serde_json::Error),
    #[error(
        "the PostgreSQL database is not empty: restore into an empty one (`database` of the configuration), or, where it was \
         not lost or another host's restore has filled it, leave it as it is with --keep-database"
    )]
    DatabaseInUse,
    #[error(
        "read the configuration that says where the master key is, and which database there is"
    )]
    Config(#[from] ConfigError),
    #[error(
        "open the vault of the backup; its master key is not in it, it was {}: give it with --key FILE, or with --config FILE \
         say where it is", .place.words()
    )]
    Vault {
        place: KeyPlace,
        #[source]
        err: OpenError,
    },
    #[error("the audit log of the backup does not end where the manifest says")]
    Head,
    #[error("{count} credentials of the backup do not open, the first is {id}")]
    Records {
        count: usize,
        id: CredentialId,
        #[source]
        err: Box<ReadError>,
    },
    #[error("check the database of the backup")]
    Store(#[from] StoreError),
    #[error("check the backup")]
    Mismatch(#[from] Mismatch),
    #[error("do it off the runtime")]
    Join(#[from] tokio::task::JoinError),
}

/// Puts a backup into an empty home. Every file's digest, the audit log from its first line, every credential and the
/// database are checked before anything gets its place.
///
/// # Errors
/// When a controller runs on the home or the home is not empty, the backup is damaged, or its master key is not there.
pub async fn restore(options: &RestoreOptions) -> Result<BackupManifest, RestoreError> {
    let options = options.clone();
    let (stage, vault, manifest, lock) = off_runtime({
        let options = options.clone();
        move || unpack(&options)
    })
    .await??;
    let mut restored = None;
    if manifest.database {
        let path = stage.path().join(DATABASE);
        let checked = check_database(&path, &vault).await?;
        checked.map_or(Ok(()), Err)?;
        let database = Config::load(options.config.as_deref(), stage.path())?.database;
        if database != "sqlite" {
            if !options.keep_database {
                let loaded = rows::load(&path, &database).await?;
                restored = Some(loaded.ok_or(RestoreError::DatabaseInUse)?);
            }
            std::fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    let manifest = off_runtime(move || {
        place(stage.path(), &options.home)?;
        drop(lock);
        Ok::<_, RestoreError>(manifest)
    })
    .await??;
    // Last, as a file is.
    if let Some(restored) = restored {
        restored.commit().await?;
    }
    Ok(manifest)
}

type Unpacked = (camino_tempfile::Utf8TempDir, Vault, BackupManifest, File);

fn unpack(options: &RestoreOptions) -> Result<Unpacked, RestoreError> {
    let home = &options.home;
    let file = File::open(&options.from).map_err(failed("open", &options.from))?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(home)
        .map_err(failed("create directory", home))?;
    let lock = lock(home).map_err(|err| RestoreError::Lock(home.clone(), err))?;
    let names = others(home).map_err(failed("list", home))?;
    if !names.is_empty() {
        return Err(RestoreError::NotEmpty {
            home: home.clone(),
            names,
        });
    }
    let stage = camino_tempfile::Builder::new()
        .prefix(".restore-")
        .tempdir_in(home)
        .map_err(failed("make a directory in", home))?;
    let manifest = extract(file, &options.from, stage.path())?;
    let vault = open_vault(options, &manifest, stage.path())?;
    Ok((stage, vault, manifest, lock))
}

/// What in the home could be somebody's.
fn others(home: &Utf8Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in home.read_dir_utf8()? {
        let name = entry?.file_name().to_owned();
        if name != "controller.lock" && !KEPT.contains(&name.as_str()) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn extract(file: File, from: &Utf8Path, stage: &Utf8Path) -> Result<BackupManifest, RestoreError> {
    let not_a_backup = |_: io::Error| RestoreError::NotABackup(from.to_owned());
    let mut tar = tar::Archive::new(file);
    let mut entries = tar.entries().map_err(not_a_backup)?;
    let first = entries
        .next()
        .ok_or_else(|| RestoreError::NotABackup(from.to_owned()))?
        .map_err(not_a_backup)?;
    if first.path_bytes() != MANIFEST.as_bytes() {
        return Err(RestoreError::NotABackup(from.to_owned()));
    }
    let mut text = Vec::new();
    first
        .take(MANIFEST_LIMIT)
        .read_to_end(&mut text)
        .map_err(failed("read", from))?;
    let manifest = understand(&text)?;
    let damaged = |name: &str, what| RestoreError::Damaged {
        name: name.to_owned(),
        what,
    };
    // A vault without a credential has a directory that no file of the backup names.
    let records = stage.join("vault/records");
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&records)
        .map_err(failed("create directory", &records))?;
    let mut left = manifest.files.clone();
    for entry in entries {
        let entry = entry.map_err(failed("read", from))?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        // Only what the manifest names is written, and only names that a backup has: nothing leads out of the home.
        let Some(known) = left.remove(&name) else {
            return Err(damaged(&name, "is not in its manifest, or there twice"));
        };
        if !is_name(&name) || entry.header().entry_type() != tar::EntryType::Regular {
            return Err(damaged(&name, "is no file that a backup has"));
        }
        let path = stage.join(&name);
        if let Some(parent) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(failed("create directory", parent))?;
        }
        let mut target = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("create", &path))?;
        let copied = digest_of(entry.take(known.bytes.saturating_add(1)), &mut target)
            .map_err(failed("write", &path))?;
        if copied != known {
            return Err(damaged(&name, "is not what was saved"));
        }
        target.sync_all().map_err(failed("sync", &path))?;
    }
    match left.keys().next() {
        Some(name) => Err(damaged(name, "is missing")),
        None => Ok(manifest),
    }
}

fn understand(text: &[u8]) -> Result<BackupManifest, RestoreError> {
    /// What every layout has.
    #[derive(serde::Deserialize)]
    struct Layout {
        schema: u32,
        version: String,
    }
    let layout: Layout = serde_json::from_slice(text).map_err(RestoreError::Manifest)?;
    if layout.schema != SCHEMA {
        return Err(RestoreError::Schema {
            found: layout.schema,
            version: layout.version.chars().take(32).collect(),
        });
    }
    serde_json::from_slice(text).map_err(RestoreError::Manifest)
}

fn is_name(name: &str) -> bool {
    if [DATABASE, CONFIG, HOST, AUDIT_LOG, MASTER_KEY].contains(&name) {
        return true;
    }
    if let Some(record) = name.strip_prefix("vault/records/") {
        return record.parse::<CredentialId>().is_ok();
    }
    let pack = name.strip_prefix("providers/");
    pack.and_then(|pack| pack.strip_suffix(".toml"))
        .is_some_and(|id| id.parse::<vestibule_api::ids::ProviderId>().is_ok())
}

/// The vault of the backup, once everything in it was opened.
fn open_vault(
    options: &RestoreOptions,
    manifest: &BackupManifest,
    stage: &Utf8Path,
) -> Result<Vault, RestoreError> {
    let dir = stage.join("vault");
    let source = match &options.key {
        Some(key) => {
            let own = stage.join(MASTER_KEY);
            let mut target = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&own)
                .map_err(failed("create", &own))?;
            let mut from = File::open(key).map_err(failed("open", key))?;
            io::copy(&mut from, &mut target).map_err(failed("copy", key))?;
            target.sync_all().map_err(failed("sync", &own))?;
            KeySource::Own
        }
        None => Config::load(options.config.as_deref(), stage)?.vault_key(),
    };
    let unopened = |err| RestoreError::Vault {
        place: manifest.master_key,
        err,
    };
    let vault = Vault::read(&dir, &source, &mut |_, _| {}).map_err(unopened)?;
    let summary = vault.audit_check().map_err(|err| unopened(err.into()))?;
    if head_of(&summary) != (manifest.audit_lines, manifest.audit_head.clone()) {
        return Err(RestoreError::Head);
    }
    let mut damaged = vault.check_records().map_err(unopened)?;
    let missing = vault.missing();
    damaged.extend(missing.into_iter().map(|id| (id, ReadError::NotFound(id))));
    let count = damaged.len();
    match damaged.pop() {
        Some((id, err)) => Err(RestoreError::Records {
            count,
            id,
            err: Box::new(err),
        }),
        None => Ok(vault),
    }
}

/// Gives everything its place, the database last: without it, nothing is served from what is half there.
fn place(stage: &Utf8Path, home: &Utf8Path) -> Result<(), RestoreError> {
    for name in [CONFIG, HOST, "providers", "vault", DATABASE] {
        let (from, to) = (stage.join(name), home.join(name));
        match std::fs::rename(&from, &to) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                return Err(failed("rename to", &to)(err).into());
            }
            Ok(()) | Err(_) => {}
        }
    }
    File::open(home)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("sync directory", home))?;
    Ok(())
}
