//! `vestibule serve` and `vestibule link`.
use crate::{
    api::Controller,
    home::Home,
    output::{self, Output},
};
use anyhow::Context as _;
use camino::Utf8PathBuf;
use hyper::Method;
use std::{net::SocketAddr, process::ExitCode};
use vestibule_api::control::LoginCodeReply;

#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// Configuration [default: $VESTIBULE_HOME/vestibule.toml where it exists].
    #[arg(long, value_name = "FILE")]
    config: Option<Utf8PathBuf>,
    /// Address to listen on; loopback only [default: the configuration's, 127.0.0.1:4000].
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
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
    vestibule_controller::serve(config, ended(), |serving| {
        output::note(&format!("vestibule: serving on http://{}", serving.address));
        output::line(&format!(
            "open the dashboard (works once, 10 minutes): {}",
            serving.link
        ));
    })
    .await?;
    Ok(ExitCode::SUCCESS)
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
