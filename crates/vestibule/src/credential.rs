//! `vestibule credential`: sealed credentials, by way of the controller, which writes the audit line.
use crate::{
    api::Controller,
    home::Home,
    output::{self, Output},
};
use anyhow::{Context as _, bail};
use base64::Engine as _;
use camino::{Utf8Component, Utf8Path, Utf8PathBuf};
use hyper::Method;
use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _, process::ExitCode};
use vestibule_api::{
    control::{ContentFile, ContentReply, ContentRequest},
    ids::CredentialId,
    session::CredentialView,
};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum CredentialCommand {
    /// List credentials; never their content.
    List,
    /// Show one credential's metadata.
    Show { credential: CredentialId },
    /// Write the exact bytes that the tool wrote, mode 0600.
    Get {
        credential: CredentialId,
        /// Directory that stands for the home directory; files go to their places below it.
        #[arg(long, value_name = "DIR", conflicts_with_all = ["output", "stdout"])]
        into: Option<Utf8PathBuf>,
        /// File to write, for a credential of one file.
        #[arg(short, long, value_name = "FILE", conflicts_with = "stdout")]
        output: Option<Utf8PathBuf>,
        /// Write to standard output, for a credential of one file.
        #[arg(long)]
        stdout: bool,
        /// Replace files that exist.
        #[arg(long)]
        force: bool,
        /// For what, in the audit log.
        #[arg(long, default_value = "vestibule credential get")]
        purpose: String,
    },
    /// Remove a credential from the vault. The provider may still accept copies: revoke it there.
    Rm { credential: CredentialId },
}

pub(crate) async fn run(
    home: &Home,
    command: CredentialCommand,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let controller = Controller::of(home)?;
    match command {
        CredentialCommand::List => {
            let list: Vec<CredentialView> = controller.get("/api/credentials").await?;
            out.print(&list, |list| {
                let row = |c: &CredentialView| {
                    vec![
                        c.credential_id.to_string(),
                        c.provider.to_string(),
                        c.account.clone().unwrap_or_default(),
                        c.created_at.to_string(),
                        c.expires_at.map(|at| at.to_string()).unwrap_or_default(),
                    ]
                };
                output::table(
                    &["CREDENTIAL", "PROVIDER", "ACCOUNT", "SEALED", "EXPIRES"],
                    &list.iter().map(row).collect::<Vec<_>>(),
                )
            })?;
        }
        CredentialCommand::Show { credential } => {
            let view: CredentialView = controller
                .get(&format!("/api/credentials/{credential}"))
                .await?;
            out.print(&view, show)?;
        }
        CredentialCommand::Get {
            credential,
            into,
            output,
            stdout,
            force,
            purpose,
        } => {
            let path = format!("/api/credentials/{credential}/content");
            let request = ContentRequest { purpose };
            let content: ContentReply =
                controller.call(Method::POST, &path, Some(&request)).await?;
            hand_over(
                &content.files,
                into.as_deref(),
                output.as_deref(),
                stdout,
                force,
            )?;
        }
        CredentialCommand::Rm { credential } => {
            let path = format!("/api/credentials/{credential}");
            let _: serde_json::Value = controller.call(Method::DELETE, &path, None::<&()>).await?;
            output::note(&format!("removed {credential}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(view: &CredentialView) -> String {
    let mut text = format!(
        "credential  {}\nprovider    {}\nuser        {}\nsession     {}\nsealed      {}",
        view.credential_id, view.provider, view.user_id, view.session_id, view.created_at
    );
    if let Some(account) = &view.account {
        text.push_str(&format!("\naccount     {account}"));
    }
    if let Some(at) = view.expires_at {
        text.push_str(&format!("\nexpires     {at}"));
    }
    for file in &view.files {
        text.push_str(&format!(
            "\nfile        ~/{} ({})",
            file.path,
            output::bytes(file.bytes)
        ));
    }
    text
}

fn hand_over(
    files: &[ContentFile],
    into: Option<&Utf8Path>,
    output: Option<&Utf8Path>,
    stdout: bool,
    force: bool,
) -> anyhow::Result<()> {
    match (into, output, stdout) {
        (Some(dir), None, false) => {
            for file in files {
                let target = below(dir, &file.path)?;
                if let Some(parent) = target.parent() {
                    std::fs::create_dir_all(parent)
                        .with_context(|| format!("create `{parent}`"))?;
                }
                write_private(&target, &decode(file)?, force)?;
                output::note(&format!("wrote {target}"));
            }
            Ok(())
        }
        (None, Some(path), false) => {
            write_private(path, &decode(only(files)?)?, force)?;
            output::note(&format!("wrote {path}"));
            Ok(())
        }
        (None, None, true) => std::io::stdout()
            .lock()
            .write_all(&decode(only(files)?)?)
            .context("write to standard output"),
        _ => bail!("say where to: --into DIR, --output FILE, or --stdout"),
    }
}

fn only(files: &[ContentFile]) -> anyhow::Result<&ContentFile> {
    match files {
        [file] => Ok(file),
        _ => bail!("this credential has {} files; use --into DIR", files.len()),
    }
}

fn decode(file: &ContentFile) -> anyhow::Result<Vec<u8>> {
    base64::engine::general_purpose::STANDARD
        .decode(&file.content)
        .with_context(|| format!("decode the content of `{}`", file.path))
}

/// `dir/path`, refused where `path` would leave `dir`.
fn below(dir: &Utf8Path, path: &str) -> anyhow::Result<Utf8PathBuf> {
    let relative = Utf8Path::new(path);
    if relative
        .components()
        .all(|part| matches!(part, Utf8Component::Normal(_)))
    {
        Ok(dir.join(relative))
    } else {
        bail!("the credential's path `{path}` leaves the directory; nothing was written")
    }
}

/// Writes a file that only its owner can read, from its first byte on.
fn write_private(path: &Utf8Path, bytes: &[u8], force: bool) -> anyhow::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).mode(0o600);
    if force {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("replace `{path}`"));
            }
            _ => {}
        }
    }
    let mut file = options
        .create_new(true)
        .open(path)
        .with_context(|| format!("create `{path}` (use --force to replace a file)"))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .with_context(|| format!("write `{path}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below() {
        let dir = Utf8Path::new("/home/x");
        assert_eq!(
            below(dir, ".codex/auth.json").unwrap(),
            "/home/x/.codex/auth.json"
        );
        for bad in ["../x", "/etc/passwd", "a/../../b"] {
            assert!(below(dir, bad).is_err(), "{bad}");
        }
    }
}
