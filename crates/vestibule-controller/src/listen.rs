//! Where connections come from: plain TCP, or TLS with certificates that are read again when their files change.
use crate::core::{off_runtime, stopped};
use axum::serve::IncomingStream;
use camino::{Utf8Path, Utf8PathBuf};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use std::{
    io,
    net::SocketAddr,
    os::unix::fs::MetadataExt as _,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use vestibule_api::error::Chain;

/// A handshake takes no longer.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time; further connections wait in the kernel.
const HANDSHAKES: usize = 256;
/// The certificate's files are looked at so often.
const LOOK: Duration = Duration::from_secs(1);
/// After an error of `accept` (no descriptor is left), it is tried again so much later.
const AGAIN: Duration = Duration::from_millis(200);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("read `{path}`")]
    Read {
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error(
        "the private key `{path}` may be read by everybody (mode {mode:o}): make it 0600 or 0640"
    )]
    Open { path: Utf8PathBuf, mode: u32 },
    #[error("understand `{path}` as PEM: {what}")]
    Pem { path: Utf8PathBuf, what: String },
    #[error("use the certificate `{certificate}` with the key `{key}`")]
    Pair {
        certificate: Utf8PathBuf,
        key: Utf8PathBuf,
        #[source]
        err: rustls::Error,
    },
    #[error("set up TLS")]
    Setup(#[source] rustls::Error),
}

/// The files of a certificate, and what was last read from them.
#[derive(Debug)]
pub(crate) struct Certificates {
    certificate: Utf8PathBuf,
    key: Utf8PathBuf,
    current: RwLock<Arc<CertifiedKey>>,
}

/// What tells that a file is another one, or has changed.
type Stamp = (u64, u64, u64, i64, i64);

impl Certificates {
    /// Reads both files.
    ///
    /// # Errors
    /// When one can't be read, or they don't belong together.
    pub(crate) fn load(certificate: &Utf8Path, key: &Utf8Path) -> Result<Self, TlsError> {
        Ok(Self {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            current: RwLock::new(Arc::new(read(certificate, key)?)),
        })
    }

    fn stamps(&self) -> [Option<Stamp>; 2] {
        [&self.certificate, &self.key].map(|path| {
            let meta = std::fs::metadata(path).ok()?;
            let changed = (meta.mtime(), meta.mtime_nsec());
            Some((meta.dev(), meta.ino(), meta.len(), changed.0, changed.1))
        })
    }

    fn reload(&self) -> Result<(), TlsError> {
        let fresh = Arc::new(read(&self.certificate, &self.key)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Reads the files again whenever one of them changes, until the controller stops. What can't be used is said once, and
    /// the certificate until then stays.
    pub(crate) async fn watch(self: Arc<Self>, stopping: watch::Receiver<bool>) {
        let mut seen = self.stamps();
        let mut look = tokio::time::interval(LOOK);
        let mut stop = std::pin::pin!(stopped(stopping));
        loop {
            tokio::select! {
                _ = look.tick() => {}
                () = &mut stop => return,
            }
            let own = Arc::clone(&self);
            let before = seen;
            let looked = off_runtime(move || {
                let now = own.stamps();
                (now, (now != before).then(|| own.reload()))
            });
            let Ok((now, reloaded)) = looked.await else {
                return;
            };
            seen = now;
            match reloaded {
                Some(Ok(())) => {
                    tracing::info!(certificate = %self.certificate, "the certificate was read again");
                }
                Some(Err(err)) => {
                    tracing::error!(error = %Chain(&err), "the new certificate can't be used; the old one stays");
                }
                None => {}
            }
        }
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(&current))
    }
}

fn read(certificate: &Utf8Path, key: &Utf8Path) -> Result<CertifiedKey, TlsError> {
    let bytes = |path: &Utf8Path| {
        std::fs::read(path).map_err(|err| TlsError::Read {
            path: path.to_owned(),
            err,
        })
    };
    let not_pem = |path: &Utf8Path, what: String| TlsError::Pem {
        path: path.to_owned(),
        what,
    };
    let chain = CertificateDer::pem_slice_iter(&bytes(certificate)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|err| not_pem(certificate, err.to_string()))?;
    if chain.is_empty() {
        return Err(not_pem(certificate, "no certificate is in it".to_owned()));
    }
    let mode = std::fs::metadata(key)
        .map_err(|err| TlsError::Read {
            path: key.to_owned(),
            err,
        })?
        .mode();
    if mode & 0o007 != 0 {
        return Err(TlsError::Open {
            path: key.to_owned(),
            mode: mode & 0o777,
        });
    }
    let private =
        PrivateKeyDer::from_pem_slice(&bytes(key)?).map_err(|err| not_pem(key, err.to_string()))?;
    CertifiedKey::from_der(chain, private, &aws_lc_rs::default_provider()).map_err(|err| {
        TlsError::Pair {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            err,
        }
    })
}

/// What accepts TLS with these certificates.
///
/// # Errors
/// When the TLS library refuses its own defaults.
pub(crate) fn acceptor(certificates: Arc<Certificates>) -> Result<TlsAcceptor, TlsError> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// One connection.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

macro_rules! either {
    ($self:expr, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Plain($stream) => $call,
            Stream::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// Who is on the other end. Behind a reverse proxy: the proxy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) SocketAddr);

impl axum::extract::connect_info::Connected<IncomingStream<'_, Listener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// Every socket that is listened on.
#[derive(Debug)]
pub(crate) struct Listener {
    accepted: mpsc::Receiver<(Stream, SocketAddr)>,
    address: SocketAddr,
    /// End with the listener.
    _tasks: JoinSet<()>,
}

impl Listener {
    /// Accepts on `main`, with TLS where there is an acceptor, and on `local` without.
    pub(crate) fn new(
        main: TcpListener,
        tls: Option<TlsAcceptor>,
        local: Option<TcpListener>,
    ) -> io::Result<Self> {
        let address = main.local_addr()?;
        let (send, accepted) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(main, tls, send.clone()));
        if let Some(local) = local {
            tasks.spawn(accept(local, None, send));
        }
        Ok(Self {
            accepted,
            address,
            _tasks: tasks,
        })
    }
}

impl axum::serve::Listener for Listener {
    type Io = Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stream, SocketAddr) {
        match self.accepted.recv().await {
            Some(connection) => connection,
            // The tasks end with this only.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    send: mpsc::Sender<(Stream, SocketAddr)>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(err) => {
                tracing::warn!(error = %err, "a connection could not be accepted");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        let Some(tls) = tls.clone() else {
            if send.send((Stream::Plain(tcp), peer)).await.is_err() {
                return;
            }
            continue;
        };
        let (send, place) = (send.clone(), Arc::clone(&places).acquire_owned().await);
        handshakes.spawn(async move {
            let _place = place;
            match tokio::time::timeout(HANDSHAKE, tls.accept(tcp)).await {
                Ok(Ok(stream)) => drop(send.send((Stream::Tls(Box::new(stream)), peer)).await),
                Ok(Err(err)) => tracing::debug!(%peer, error = %err, "a TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
            }
        });
    }
}
