//! `vestibule serve` and `vestibule link`.
use crate::{
    api::Controller,
    home::Home,
    output::{self, Output},
};
use anyhow::Context as _;
use camino::{Utf8Path, Utf8PathBuf};
use hyper::Method;
use sd_notify::NotifyState;
use std::{
    io::Write as _,
    net::SocketAddr,
    os::unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    process::{Command, ExitCode, Stdio},
};
use vestibule_api::control::LoginCodeReply;

#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// Configuration [default: $VESTIBULE_HOME/vestibule.toml where it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<Utf8PathBuf>,
    /// Address to listen on; other than loopback only with TLS and a user or token [default: the configuration's,
    /// 127.0.0.1:4000].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Open the dashboard in the browser of this desktop; without a desktop, only the link is printed.
    #[arg(long)]
    open: bool,
}

/// Log lines go to standard error: for people on a terminal, as JSON elsewhere. `RUST_LOG` filters.
pub(crate) fn init_logging() {
    use std::io::IsTerminal as _;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        builder.init();
    } else {
        builder.json().init();
    }
}

pub(crate) async fn serve(home: Home, args: ServeArgs) -> anyhow::Result<ExitCode> {
    init_logging();
    let mut config = vestibule_controller::Config::load(args.config.as_deref(), home.path())?;
    if let Some(listen) = args.listen {
        config.listen = listen;
    }
    config.vm.driver = vestibule_vm::doctor::resolve(config.vm.driver);
    tracing::info!(driver = %config.vm.driver, "what VMs run under");
    config.vm.not_jailed = vestibule_vm::doctor::not_jailed(config.vm.driver);
    if let Some((why, fix)) = &config.vm.not_jailed {
        tracing::warn!(why, fix, "VMs are kept apart by less than a jail");
    }
    let page = home.path().join("open.html");
    let shutdown = async {
        ended().await;
        tell_systemd(&[NotifyState::Stopping]);
    };
    let watchdog = tokio::spawn(feed_watchdog());
    let served = vestibule_controller::serve(config, shutdown, |serving| {
        let status = format!("serving on {}", serving.base);
        tell_systemd(&[NotifyState::Ready, NotifyState::Status(&status)]);
        output::note(&format!("vestibule: {status}"));
        output::line(&format!(
            "open the dashboard (works once, 10 minutes): {}",
            serving.link
        ));
        if args.open && has_desktop() {
            open(&page, &serving.link);
        }
    })
    .await;
    watchdog.abort();
    std::fs::remove_file(&page).ok();
    served?;
    Ok(ExitCode::SUCCESS)
}

/// sd_notify(3). Not under systemd, nothing happens.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd does not hear us");
    }
}

/// Feeds systemd's watchdog, where there is one, from the threads that serve requests: a controller that hangs starves it.
async fn feed_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut tick = tokio::time::interval(limit / 3);
    loop {
        tick.tick().await;
        tell_systemd(&[NotifyState::Watchdog]);
    }
}

/// Whether a browser can be shown to whoever runs this.
fn has_desktop() -> bool {
    ["DISPLAY", "WAYLAND_DISPLAY"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// Opens the dashboard. The link is a secret, and every user of the host can read the arguments of a process: the browser
/// gets a page that only this user can read, and that leads there.
fn open(page: &Utf8Path, link: &str) {
    let shown = write_page(page, link).and_then(|()| {
        Command::new("xdg-open")
            .arg(page)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // What ends this program (Ctrl-C) does not end the person's browser.
            .process_group(0)
            .spawn()
    });
    match shown {
        Ok(mut child) => drop(std::thread::spawn(move || child.wait())),
        Err(error) => output::note(&format!("vestibule: no browser was opened: {error}")),
    }
}

fn write_page(page: &Utf8Path, link: &str) -> std::io::Result<()> {
    match std::fs::remove_file(page) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(page)?;
    writeln!(
        file,
        "<!doctype html><meta charset=\"utf-8\"><meta name=\"referrer\" content=\"no-referrer\">\
         <meta http-equiv=\"refresh\" content=\"0; url={link}\"><title>Vestibule</title>"
    )
}

/// Resolves on SIGTERM or SIGINT.
async fn ended() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
}

pub(crate) async fn link(home: &Home, out: Output) -> anyhow::Result<ExitCode> {
    let controller = Controller::of(home)?;
    let reply: LoginCodeReply = controller
        .call(Method::POST, "/api/login-codes", None::<&()>)
        .await
        .context("ask the controller for a one-time link")?;
    out.print(&reply, |reply| reply.link.clone())?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_page_with_the_link_is_for_its_owner_alone() {
        let home = camino_tempfile::tempdir().unwrap();
        let page = home.path().join("open.html");
        // One that a killed controller left gives way, whatever its mode.
        std::fs::write(&page, "old").unwrap();
        write_page(&page, "http://127.0.0.1:4000/#/login/abc").unwrap();
        let text = std::fs::read_to_string(&page).unwrap();
        assert!(
            text.contains("url=http://127.0.0.1:4000/#/login/abc\""),
            "{text}"
        );
        let mode = std::fs::metadata(&page).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
