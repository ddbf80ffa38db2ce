//! `vestibule backup` and `vestibule restore`: database and vault in one file, and back.
use crate::{home::Home, output::Output};
use camino::Utf8PathBuf;
use std::process::ExitCode;
use vestibule_api::time::Timestamp;
use vestibule_controller::{BackupManifest, BackupOptions, Config, KeyPlace, RestoreOptions};

#[derive(Debug, clap::Args)]
pub(crate) struct BackupArgs {
    /// File to write, or a directory for `vestibule-<time>.tar`.
    #[arg(value_name = "FILE|DIR")]
    to: Utf8PathBuf,
    /// Put the vault's own master key in, too: whoever has the file then has every credential.
    #[arg(long)]
    with_key: bool,
    /// Configuration [default: $VESTIBULE_HOME/vestibule.toml where it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<Utf8PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// The backup.
    from: Utf8PathBuf,
    /// The vault's master key (`vault/master.key` of the home that was saved); it becomes the restored vault's own.
    #[arg(long, value_name = "FILE")]
    key: Option<Utf8PathBuf>,
    /// Configuration that says where the master key is, and which database there is [default: the one in the backup].
    #[arg(long, value_name = "FILE")]
    config: Option<Utf8PathBuf>,
    /// Leave the PostgreSQL database as it is: it was not lost, or another host's restore has filled it.
    #[arg(long)]
    keep_database: bool,
}

pub(crate) async fn backup(home: &Home, args: BackupArgs, out: Output) -> anyhow::Result<ExitCode> {
    let config = Config::load(args.config.as_deref(), home.path())?;
    let to = if args.to.is_dir() {
        let now = Timestamp::now().to_second().replace([':', '-'], "");
        args.to.join(format!("vestibule-{now}.tar"))
    } else {
        args.to
    };
    let options = BackupOptions {
        to,
        with_key: args.with_key,
    };
    let manifest = vestibule_controller::backup(&config, &options).await?;
    out.print(&manifest, |manifest| {
        format!(
            "{}\nmaster key   {}\nto           {}",
            shared(manifest),
            master_key(manifest.master_key),
            options.to
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn restore(
    home: &Home,
    args: RestoreArgs,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let options = RestoreOptions {
        from: args.from,
        home: home.path().to_owned(),
        key: args.key,
        config: args.config,
        keep_database: args.keep_database,
    };
    let manifest = vestibule_controller::restore(&options).await?;
    out.print(&manifest, |manifest| {
        format!(
            "{}\ninto         {}\n→ `vestibule serve` goes on from here; sign-ins of then that were under way end as failed",
            shared(manifest),
            options.home
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn shared(manifest: &BackupManifest) -> String {
    format!(
        "saved        {}\ncredentials  {}, every one checked\naudit log    {} lines, head {}",
        manifest.created_at.to_second(),
        manifest.credentials,
        manifest.audit_lines,
        manifest.audit_head,
    )
}

fn master_key(place: KeyPlace) -> String {
    match place {
        KeyPlace::WithBackup => "in it: whoever has the file has every credential".to_owned(),
        KeyPlace::Home | KeyPlace::Systemd | KeyPlace::EnvironmentFile => {
            format!("not in it: {}; keep a copy of it elsewhere", place.words())
        }
    }
}
