//! Writes a backup.
use super::{
    AUDIT_LOG, BackupManifest, CONFIG, DATABASE, HOST, KeyPlace, MANIFEST, MASTER_KEY, Mismatch,
    SCHEMA, check_database, connect, digest_of, rows,
};
use crate::{
    config::Config,
    core::off_runtime,
    file::{FileError, failed},
    store::StoreError,
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
};
use vestibule_api::time::Timestamp;
use vestibule_vault::{CopyError, KeySource, OpenError, Vault};

/// What goes into a backup, and where it is written.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// The file; nothing may be there.
    pub to: Utf8PathBuf,
    /// The master key too, where it is the vault's own file.
    pub with_key: bool,
}

/// Why there is no backup. Nothing stands under its name then.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("there is no database `{0}`: nothing was ever served from this home")]
    NoDatabase(Utf8PathBuf),
    #[error("the master key is {} and can't be added to a backup; save it there", .0.words())]
    KeyElsewhere(KeyPlace),
    #[error("copy the database")]
    Store(#[from] StoreError),
    #[error("open the vault")]
    Vault(#[from] OpenError),
    #[error("save the vault")]
    Copy(#[from] CopyError),
    #[error("check the backup")]
    Mismatch(#[from] Mismatch),
    #[error("write the manifest")]
    Manifest(#[source] serde_json::Error),
    #[error("do it off the runtime")]
    Join(#[from] tokio::task::JoinError),
}

/// Saves database, vault, configuration and packs of a home into one tar file, mode 0600. A controller may run meanwhile.
/// Of a PostgreSQL database the rows are in it; where hosts share one, those of all, and the vault of this one.
///
/// # Errors
/// When something can't be read, is not as it should be, or the file can't be written.
pub async fn backup(
    config: &Config,
    options: &BackupOptions,
) -> Result<BackupManifest, BackupError> {
    let source = config.vault_key();
    if options.with_key && source != KeySource::Own {
        return Err(BackupError::KeyElsewhere(KeyPlace::of(&source, false)));
    }
    let parent = directory_of(&options.to);
    let stage = camino_tempfile::Builder::new()
        .prefix(".vestibule-backup-")
        .tempdir_in(parent)
        .map_err(failed("make a directory in", parent))?;
    if config.database == "sqlite" {
        copy_database(&config.home, stage.path()).await?;
    } else {
        rows::save(&config.database, &stage.path().join(DATABASE)).await?;
    }
    let (home, dir, with_key) = (
        config.home.clone(),
        stage.path().to_owned(),
        options.with_key,
    );
    let (vault, manifest) = off_runtime(move || {
        let vault = Vault::read(&home.join("vault"), &source, &mut |_, _| {})?;
        let summary = vault.copy(&dir.join("vault"))?;
        // A backup that would not open later is none.
        if let Some((_, err)) = vault.check_records()?.pop() {
            return Err(CopyError::Record(err).into());
        }
        copy_settings(&home, &dir, with_key)?;
        let (audit_lines, audit_head) = super::head_of(&summary);
        let manifest = BackupManifest {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            created_at: Timestamp::now(),
            database: true,
            master_key: KeyPlace::of(&source, with_key),
            audit_lines,
            audit_head,
            credentials: vault.list()?.credentials.len(),
            files: BTreeMap::new(),
        };
        Ok::<_, BackupError>((vault, manifest))
    })
    .await??;
    let checked = check_database(&stage.path().join(DATABASE), &vault).await?;
    checked.map_or(Ok(()), Err)?;
    let to = options.to.clone();
    off_runtime(move || pack(stage.path(), manifest, &to)).await?
}

async fn copy_database(home: &Utf8Path, to: &Utf8Path) -> Result<(), BackupError> {
    let path = home.join(DATABASE);
    if !path.exists() {
        return Err(BackupError::NoDatabase(path));
    }
    let mut connection = connect(&path).await?;
    let query = |what| move |err| StoreError::Query { what, err };
    sqlx::query("PRAGMA busy_timeout = 10000")
        .execute(&mut connection)
        .await
        .map_err(query("wait for the database"))?;
    sqlx::query("VACUUM INTO $1")
        .bind(to.join(DATABASE).into_string())
        .execute(&mut connection)
        .await
        .map_err(query("copy the database"))?;
    Ok(())
}

/// Configuration, packs, which host it is, and the key where it is asked for.
fn copy_settings(home: &Utf8Path, to: &Utf8Path, with_key: bool) -> Result<(), BackupError> {
    let mut names = vec![CONFIG.to_owned(), HOST.to_owned()];
    if with_key {
        names.push(MASTER_KEY.to_owned());
    }
    if let Ok(entries) = home.join("providers").read_dir_utf8() {
        let packs = entries.flatten().map(|entry| entry.file_name().to_owned());
        let packs: Vec<_> = packs.filter(|name| name.ends_with(".toml")).collect();
        if !packs.is_empty() {
            let dir = to.join("providers");
            std::fs::create_dir(&dir).map_err(failed("create directory", &dir))?;
        }
        names.extend(packs.into_iter().map(|name| format!("providers/{name}")));
    }
    for name in names {
        let from = home.join(&name);
        match std::fs::read(&from).and_then(|bytes| std::fs::write(to.join(&name), bytes)) {
            Err(err)
                if err.kind() == io::ErrorKind::NotFound
                    && [CONFIG, HOST].contains(&name.as_str()) => {}
            copied => copied.map_err(failed("copy", &from))?,
        }
    }
    Ok(())
}

/// Everything below `stage` into `to`, the manifest first; whole or not at all.
fn pack(
    stage: &Utf8Path,
    mut manifest: BackupManifest,
    to: &Utf8Path,
) -> Result<BackupManifest, BackupError> {
    let mut names = Vec::new();
    files_below(stage, "", &mut names).map_err(failed("list", stage))?;
    names.sort();
    for name in &names {
        let path = stage.join(name);
        let file = File::open(&path).and_then(|file| digest_of(file, io::sink()));
        let file = file.map_err(failed("read", &path))?;
        manifest.files.insert(name.clone(), file);
    }
    debug_assert!(manifest.files.contains_key(AUDIT_LOG), "a vault has a log");
    let header = serde_json::to_vec_pretty(&manifest).map_err(BackupError::Manifest)?;
    let mut staged = camino_tempfile::NamedUtf8TempFile::new_in(stage)
        .map_err(failed("create a file in", stage))?;
    let write = |file: &mut File| {
        let mut tar = tar::Builder::new(&mut *file);
        append(&mut tar, MANIFEST, header.len(), &header[..])?;
        for (name, known) in &manifest.files {
            let from = File::open(stage.join(name))?;
            let len = usize::try_from(known.bytes).map_err(io::Error::other)?;
            append(&mut tar, name, len, from)?;
        }
        tar.into_inner()?.flush()?;
        file.sync_all()
    };
    write(staged.as_file_mut()).map_err(failed("write", to))?;
    // Never over a file that is there: an older backup may be all that somebody has.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(failed("create", to))?;
    let named = staged.persist(to).map_err(|err| err.error);
    if let Err(err) = named {
        drop(std::fs::remove_file(to));
        return Err(failed("rename to", to)(err).into());
    }
    let parent = directory_of(to);
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("sync directory", parent))?;
    Ok(manifest)
}

/// Where a file is or will be.
fn directory_of(path: &Utf8Path) -> &Utf8Path {
    let parent = path.parent().filter(|dir| !dir.as_str().is_empty());
    parent.unwrap_or_else(|| Utf8Path::new("."))
}

fn append(
    tar: &mut tar::Builder<impl io::Write>,
    name: &str,
    len: usize,
    from: impl io::Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(u64::try_from(len).map_err(io::Error::other)?);
    header.set_mode(0o600);
    header.set_entry_type(tar::EntryType::Regular);
    tar.append_data(&mut header, name, from)
}

fn files_below(dir: &Utf8Path, under: &str, names: &mut Vec<String>) -> io::Result<()> {
    for entry in dir.read_dir_utf8()? {
        let entry = entry?;
        let name = format!("{under}{}", entry.file_name());
        if entry.file_type()?.is_dir() {
            files_below(entry.path(), &format!("{name}/"), names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}
