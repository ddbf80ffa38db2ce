//! Puts the controller together, serves, and takes it down in order.
use crate::{
    auth::{self, Access, TokenError},
    clock::Clock,
    config::{Config, cluster::is_peer},
    core::{Core, Shared, off_runtime, stopped},
    file::{FileError, failed},
    http,
    images::Images,
    lease::{self, Lease, LeaseError},
    listen::{self, Certificates, Listener, Peer, TlsError},
    live::Live,
    metrics::Metrics,
    notices,
    oidc::{Oidc, OidcSetupError},
    packs::{Packs, PacksError},
    peers::{Key, KeyError, Peers},
    people::limits::Limits,
    reconcile::{self, Statuses, Stock},
    scheduler::{self, EngineError, Scheduler},
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
        "refuse to listen on {0} without TLS: set `tls.certificate` and `tls.key`, or listen on loopback behind a reverse proxy \
         that has TLS"
    )]
    NoTls(SocketAddr),
    #[error(
        "refuse to listen on {0} while nobody can sign in: listen on loopback first, and make a user with `vestibule user add` \
         or a token with `vestibule token new`"
    )]
    Nobody(SocketAddr),
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    File(#[from] FileError),
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
    #[error("act for this host")]
    Lease(#[from] LeaseError),
    #[error("set up the cluster")]
    Cluster(#[from] KeyError),
    #[error("read the provider packs")]
    Packs(#[from] PacksError),
    #[error("set up `[scheduler]`")]
    Scheduler(#[from] EngineError),
    #[error("set up `[oidc]`")]
    Oidc(#[from] OidcSetupError),
    #[error("serve HTTP")]
    Serve(#[source] io::Error),
    #[error("start off the runtime")]
    Join(#[from] tokio::task::JoinError),
}

/// What is served, once it is.
#[derive(Clone)]
pub struct Serving {
    pub address: SocketAddr,
    /// Where the command line connects, without TLS; the same as `address` where that has none.
    pub local: SocketAddr,
    /// `https://id.example.com`: where links to the dashboard lead.
    pub base: String,
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
    let scheduler = scheduler::of(&config)?;
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
    let public = !config.listen.ip().is_loopback();
    if public && config.tls.is_none() {
        return Err(ServeError::NoTls(config.listen));
    }
    make_dirs(&config.home)?;
    let _lock = lock(&config.home)?;
    let store = Store::open(&config.database, &config.home, config.deadlines()).await?;
    if public && !store.has_people().await? {
        return Err(ServeError::Nobody(config.listen));
    }
    let (stop, stopping) = watch::channel(false);
    let (listener, addresses) = listen(&config, &stopping).await?;
    let home = config.home.clone();
    let core = assemble(config, scheduler, store, addresses, stopping.clone()).await?;
    let announced = announce(&home, addresses.local)?;
    let address = addresses.main;
    tracing::info!(%address, home = %home, "serving");
    let lease = tokio::spawn(lease::keep(core.clone()));
    let notices = tokio::spawn(notices::listen(core.clone()));
    let reconcilers = tokio::spawn(reconcile::run(core.clone()));
    ready(Serving {
        address,
        local: addresses.local,
        base: core.base.clone(),
        link: http::new_code(&core).link,
    });

    let router = http::router(core.clone()).into_make_service_with_connect_info::<Peer>();
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
    drop(lease.await);
    drop(notices.await);
    core.store.close().await;
    drop(std::fs::remove_file(announced));
    tracing::info!("stopped; VMs that run are taken over by the next start");
    result.map_err(ServeError::Serve)
}

/// Where is listened.
#[derive(Clone, Copy)]
struct Addresses {
    main: SocketAddr,
    /// On loopback, without TLS.
    local: SocketAddr,
}

async fn listen(
    config: &Config,
    stopping: &watch::Receiver<bool>,
) -> Result<(Listener, Addresses), ServeError> {
    let failed = |address| move |err| ServeError::Listen { address, err };
    let tls = match config.tls.clone() {
        Some(tls) => {
            let load = move || Certificates::load(&tls.certificate, &tls.key);
            let certificates = Arc::new(off_runtime(load).await??);
            tokio::spawn(Arc::clone(&certificates).watch(stopping.clone()));
            Some(listen::acceptor(certificates)?)
        }
        None => None,
    };
    let main = TcpListener::bind(config.listen).await;
    let main = main.map_err(failed(config.listen))?;
    let address = main.local_addr().map_err(failed(config.listen))?;
    let (plain, local) = if tls.is_some() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let plain = TcpListener::bind(any).await.map_err(failed(any))?;
        let local = plain.local_addr().map_err(failed(any))?;
        (Some(plain), local)
    } else {
        (None, address)
    };
    let listener = Listener::new(main, tls, plain).map_err(failed(address))?;
    let main = address;
    Ok((listener, Addresses { main, local }))
}

async fn assemble(
    config: Config,
    scheduler: Arc<dyn Scheduler>,
    store: Store,
    addresses: Addresses,
    stopping: watch::Receiver<bool>,
) -> Result<Shared, ServeError> {
    let home = config.home.clone();
    let cluster = config.cluster();
    let clock = Clock::default();
    let lease = Lease::take(
        &store,
        clock.clone(),
        &home,
        cluster.name.clone().unwrap_or_else(host_name),
        peer_address(&config, addresses),
        cluster.lease(),
    )
    .await?;
    let key = config.vault_key();
    let changes = config.providers.clone();
    let Addresses { main, local } = addresses;
    let base = config.base(main);
    let (oidc, link) = (config.oidc.clone(), base.clone());
    let (token, vault, packs, peers, oidc) = off_runtime(move || {
        let token = auth::token(&home)?;
        let vault = Vault::open(&home.join("vault"), &key)?;
        let packs = Packs::load(&home, &changes)?;
        let peer_key = cluster.key_file.as_deref().map(Key::read).transpose()?;
        let peers = Peers::new(peer_key, Peers::tls(cluster.ca.as_deref())?);
        let oidc = oidc.map(|oidc| Oidc::new(oidc, &link)).transpose()?;
        Ok::<_, ServeError>((token, vault, packs, peers, oidc))
    })
    .await??;
    Ok(Arc::new(Core {
        clock,
        access: Access::new(token, main, local, &config.hosts(), config.is_secure()),
        oidc,
        base,
        policy: http::policy(&config.frame_ancestors),
        limits: Limits::new(config.limits.starts_per_minute),
        images: Images::new(config.home.clone()),
        config,
        metrics: Metrics::new(store.pace.commits()),
        store,
        lease,
        peers,
        vault: Arc::new(vault),
        packs,
        scheduler,
        live: Live::default(),
        statuses: Statuses::default(),
        stock: Stock::default(),
        places: tokio::sync::Mutex::default(),
        started_at: Timestamp::now(),
        stopping,
    }))
}

/// Where other controllers reach this one: what the configuration says, else the port on loopback.
fn peer_address(config: &Config, addresses: Addresses) -> Option<String> {
    let own = format!("http://{}", addresses.main);
    let cluster = config.cluster.as_ref()?;
    let own = Some(own).filter(|own| config.tls.is_none() && is_peer(own));
    cluster.address.clone().or(own)
}

fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

fn make_dirs(home: &Utf8Path) -> Result<(), ServeError> {
    for dir in ["", "vms", "evidence"] {
        let path = home.join(dir);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(failed("create directory", &path))?;
    }
    Ok(())
}

/// Why this process is not the one that uses a home directory.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another controller uses the home directory `{0}`")]
    InUse(Utf8PathBuf),
    #[error(transparent)]
    File(#[from] FileError),
}

/// One controller for one home directory, as long as the file is open.
pub(crate) fn lock(home: &Utf8Path) -> Result<File, LockError> {
    let path = home.join("controller.lock");
    let file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(failed("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LockError::InUse(home.to_owned())),
        Err(TryLockError::Error(err)) => Err(failed("lock", &path)(err).into()),
    }
}

/// Writes the address where the command line finds it.
fn announce(home: &Utf8Path, address: SocketAddr) -> Result<Utf8PathBuf, ServeError> {
    let path = home.join("address");
    let staged = home.join("address.new");
    std::fs::write(&staged, format!("{address}\n"))
        .and_then(|()| std::fs::rename(&staged, &path))
        .map_err(failed("write", &path))?;
    Ok(path)
}
