//! Puts the controller together, serves, and takes it down in order.
use crate::{
    auth::{self, Access, TokenError},
    clock::Clock,
    config::Config,
    core::{Core, Shared, off_runtime, stopped},
    http,
    images::Images,
    live::Live,
    metrics::Metrics,
    packs::{Packs, PacksError},
    reconcile::{self, Statuses, Stock},
    scheduler::{Local, Scheduler},
    store::{Store, StoreError},
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::{DirBuilder, File, TryLockError},
    future::Future,
    io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch};
use vestibule_api::time::Timestamp;
use vestibule_vault::{OpenError, Vault};

/// Requests under way when the controller stops have so long to end.
const GRACE: Duration = Duration::from_secs(5);

/// Why the controller does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(
        "refuse to listen on {0}: only loopback is served; put a reverse proxy with TLS and authentication before it"
    )]
    NotLoopback(SocketAddr),
    #[error("{operation} `{path}`")]
    File {
        operation: &'static str,
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        err: io::Error,
    },
    #[error("get the API token")]
    Token(#[from] TokenError),
    #[error("open the vault")]
    Vault(#[from] OpenError),
    #[error("open the database")]
    Store(#[from] StoreError),
    #[error("read the provider packs")]
    Packs(#[from] PacksError),
    #[error("serve HTTP")]
    Serve(#[source] io::Error),
    #[error("start off the runtime")]
    Join(#[from] tokio::task::JoinError),
}

/// What is served, once it is.
#[derive(Clone)]
pub struct Serving {
    pub address: SocketAddr,
    /// Opens the dashboard once, within ten minutes. A secret.
    pub link: String,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// Serves until `shutdown` resolves; `ready` is called once requests are answered. VMs outlive it: the next controller on
/// the same home directory takes them over.
///
/// # Errors
/// When it can't start, or the listener breaks.
pub async fn serve(
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
    ready: impl FnOnce(Serving),
) -> Result<(), ServeError> {
    let scheduler = Arc::new(Local::new(config.home.clone(), config.runner.clone()));
    serve_with(config, scheduler, shutdown, ready).await
}

/// [`serve`] with runners started by `scheduler`.
///
/// # Errors
/// As [`serve`].
pub async fn serve_with(
    config: Config,
    scheduler: Arc<dyn Scheduler>,
    shutdown: impl Future<Output = ()> + Send,
    ready: impl FnOnce(Serving),
) -> Result<(), ServeError> {
    if !config.listen.ip().is_loopback() {
        return Err(ServeError::NotLoopback(config.listen));
    }
    make_dirs(&config.home)?;
    let _lock = lock(&config.home)?;
    let listen_err = |err| ServeError::Listen {
        address: config.listen,
        err,
    };
    let listener = TcpListener::bind(config.listen).await.map_err(listen_err)?;
    let address = listener.local_addr().map_err(listen_err)?;
    let (stop, stopping) = watch::channel(false);
    let home = config.home.clone();
    let core = assemble(config, scheduler, address, stopping.clone()).await?;
    let announced = announce(&home, address)?;
    tracing::info!(%address, home = %home, "serving");
    let reconcilers = tokio::spawn(reconcile::run(core.clone()));
    ready(Serving {
        address,
        link: http::new_code(&core).link,
    });

    let router = http::router(core.clone());
    let server = axum::serve(listener, router).with_graceful_shutdown(stopped(stopping));
    let mut server = std::pin::pin!(server.into_future());
    let result = tokio::select! {
        result = &mut server => result,
        () = shutdown => {
            stop.send_replace(true);
            // Those that do not end by then are cut off.
            tokio::time::timeout(GRACE, &mut server).await.unwrap_or(Ok(()))
        }
    };
    stop.send_replace(true);
    drop(reconcilers.await);
    core.store.close().await;
    drop(std::fs::remove_file(announced));
    tracing::info!("stopped; VMs that run are taken over by the next start");
    result.map_err(ServeError::Serve)
}

async fn assemble(
    config: Config,
    scheduler: Arc<dyn Scheduler>,
    address: SocketAddr,
    stopping: watch::Receiver<bool>,
) -> Result<Shared, ServeError> {
    let home = config.home.clone();
    let key = config.vault_key();
    let changes = config.providers.clone();
    let (token, vault, packs) = off_runtime(move || {
        let token = auth::token(&home)?;
        let vault = Vault::open(&home.join("vault"), &key)?;
        let packs = Packs::load(&home, &changes)?;
        Ok::<_, ServeError>((token, vault, packs))
    })
    .await??;
    let store = Store::open(&config.database, &config.home, config.deadlines()).await?;
    Ok(Arc::new(Core {
        clock: Clock::default(),
        access: Access::new(token, address, &config.allowed_hosts),
        images: Images::new(config.home.clone()),
        config,
        store,
        vault: Arc::new(vault),
        packs,
        scheduler,
        address,
        live: Live::default(),
        statuses: Statuses::default(),
        stock: Stock::default(),
        places: tokio::sync::Mutex::default(),
        started_at: Timestamp::now(),
        metrics: Metrics::default(),
        stopping,
    }))
}

fn make_dirs(home: &Utf8Path) -> Result<(), ServeError> {
    for dir in ["", "vms", "evidence"] {
        let path = home.join(dir);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|err| ServeError::File {
                operation: "create directory",
                path,
                err,
            })?;
    }
    Ok(())
}

/// Why this process is not the one that uses a home directory.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another controller uses the home directory `{0}`")]
    InUse(Utf8PathBuf),
    #[error("{operation} `{path}`")]
    File {
        operation: &'static str,
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
}

/// One controller for one home directory, as long as the file is open.
pub(crate) fn lock(home: &Utf8Path) -> Result<File, LockError> {
    let path = home.join("controller.lock");
    let failed = |operation| {
        let path = path.clone();
        move |err| LockError::File {
            operation,
            path,
            err,
        }
    };
    let file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(failed("open"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LockError::InUse(home.to_owned())),
        Err(TryLockError::Error(err)) => Err(failed("lock")(err)),
    }
}

/// Writes the address where the command line finds it.
fn announce(home: &Utf8Path, address: SocketAddr) -> Result<Utf8PathBuf, ServeError> {
    let path = home.join("address");
    let staged = home.join("address.new");
    std::fs::write(&staged, format!("{address}\n"))
        .and_then(|()| std::fs::rename(&staged, &path))
        .map_err(|err| ServeError::File {
            operation: "write",
            path: path.clone(),
            err,
        })?;
    Ok(path)
}
