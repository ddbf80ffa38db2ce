//! Fake vendors: the sign-in servers of OpenAI, Anthropic, Google, GitHub and Cloudflare, shaped to what their unmodified tools
//! accept (measured: `reference/providers.md` section 2). One server plays all of them, told apart by the `Host` header;
//! a test maps the vendors' names to it.
//!
//! Grants are real: codes are random, good once, bound to redirect URI and PKCE challenge (RFC 7636). What a person
//! would see is a page with a large *Allow* and a *Deny*, which mouse and keyboard can reach.
mod anthropic;
mod cloudflare;
mod exchange;
mod github;
mod google;
mod grants;
mod knobs;
mod openai;
mod pages;
mod reply;

pub use grants::{Issued, Seen};
pub use knobs::Misbehave;
pub use pages::{ALLOW_RGB, DENY_RGB, FIELD_RGB, PAGE_RGB};

use crate::ca::TestCa;
use anyhow::{Context, Result};
use axum::{Router, body::Body, extract::State, http::Request, response::Response};
use grants::Grants;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use reply::Call;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::JoinSet,
};

/// Every name that the server has a certificate for and answers to.
pub const HOSTS: [&str; 13] = [
    "auth.openai.com",
    "chatgpt.com",
    "claude.com",
    "claude.ai",
    "platform.claude.com",
    "api.anthropic.com",
    "accounts.google.com",
    "oauth2.googleapis.com",
    "www.googleapis.com",
    "cloudcode-pa.googleapis.com",
    "github.com",
    "api.github.com",
    "dash.cloudflare.com",
];

/// What all connections share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    grants: Mutex<Grants>,
    misbehave: Mutex<Misbehave>,
    /// Consent is given without a page: nobody is there to press *Allow*.
    unattended: AtomicBool,
}

impl Shared {
    fn grants(&self) -> MutexGuard<'_, Grants> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_unattended(&self) -> bool {
        self.unattended.load(Ordering::Relaxed)
    }

    fn misbehave(&self) -> Misbehave {
        *self
            .misbehave
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server; it ends when dropped.
#[derive(Debug)]
pub struct Vendor {
    shared: Arc<Shared>,
    https: SocketAddr,
    http: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Vendor {
    /// Starts the server on two free ports of 127.0.0.1.
    ///
    /// # Errors
    /// When no port or certificate can be had.
    pub async fn start(ca: &TestCa) -> Result<Self> {
        Self::start_on(ca, "127.0.0.1:0", "127.0.0.1:0").await
    }

    /// Starts the server on these addresses: TLS, then plain.
    ///
    /// # Errors
    /// As [`Vendor::start`].
    pub async fn start_on(ca: &TestCa, https: &str, http: &str) -> Result<Self> {
        let tls = tokio_rustls::TlsAcceptor::from(ca.server(&HOSTS)?);
        let bind = async |address: &str| {
            TcpListener::bind(address.to_owned())
                .await
                .with_context(|| format!("listen on `{address}`"))
        };
        let (secure, plain) = (bind(https).await?, bind(http).await?);
        let (https, http) = (secure.local_addr()?, plain.local_addr()?);
        let shared = Arc::new(Shared::default());
        let app = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&shared));
        let mut tasks = JoinSet::new();
        let secure_app = app.clone();
        tasks.spawn(async move {
            while let Ok((tcp, _)) = secure.accept().await {
                let (tls, app) = (tls.clone(), secure_app.clone());
                tokio::spawn(async move {
                    match tls.accept(tcp).await {
                        Ok(stream) => serve(stream, app).await,
                        Err(err) => tracing::debug!(%err, "TLS handshake"),
                    }
                });
            }
        });
        tasks.spawn(async move {
            while let Ok((tcp, _)) = plain.accept().await {
                tokio::spawn(serve(tcp, app.clone()));
            }
        });
        Ok(Self {
            shared,
            https,
            http,
            _tasks: tasks,
        })
    }

    /// Where it speaks TLS.
    pub fn https(&self) -> SocketAddr {
        self.https
    }

    /// Where it speaks plain HTTP.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// From now on consent is given without a page, and a device's code counts as typed where its page is opened.
    pub fn grant_unattended(&self) {
        self.shared.unattended.store(true, Ordering::Relaxed);
    }

    /// Changes how it behaves from the next request on.
    pub fn misbehave(&self, how: Misbehave) {
        *self
            .shared
            .misbehave
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = how;
    }

    /// Everything issued so far, oldest first.
    pub fn issued(&self) -> Vec<Issued> {
        self.shared.grants().issued.clone()
    }

    /// Every request so far, oldest first, without query and body.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.grants().seen.clone()
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, app: Router) {
    let service = TowerToHyperService::new(app);
    let served = Builder::new(TokioExecutor::new())
        .http1_only()
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(err) = served {
        tracing::debug!(err, "connection");
    }
}

/// Finds the vendor that the request means.
async fn answer(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response {
    let call = match Call::read(request).await {
        Ok(call) => call,
        Err(refusal) => return refusal,
    };
    let response = match call.host.as_str() {
        _ if call.path == pages::CONSENT_PATH => exchange::decided(&shared, &call),
        _ if call.path.starts_with("/__testkit/") => knobs::control(&shared, &call),
        "auth.openai.com" | "chatgpt.com" => openai::answer(&shared, &call).await,
        "claude.com" | "claude.ai" | "platform.claude.com" | "api.anthropic.com" => {
            anthropic::answer(&shared, &call).await
        }
        host if host.ends_with("google.com") || host.ends_with("googleapis.com") => {
            google::answer(&shared, &call).await
        }
        "dash.cloudflare.com" => cloudflare::answer(&shared, &call).await,
        "github.com" | "api.github.com" => github::answer(&shared, &call).await,
        _ => reply::not_found(&call),
    };
    shared.grants().note(&call, response.status());
    response
}
