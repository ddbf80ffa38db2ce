//! The agent as the OAuth client, for providers that have no tool: authorization code with PKCE (RFC 6749 section 4.1,
//! RFC 7636) at an issuer found by OpenID Connect Discovery 1.0, with the redirect to guest loopback (RFC 8252).
//!
//! ```text
//! discovery ─▶ Page(authorization URL) ─▶ … person … ─▶ /auth/callback ─▶ token endpoint ─▶ id_token ─▶ file
//! ```
//! The agent has neither TLS nor a resolver: every request goes in absolute form to the egress proxy on the host, which
//! does both. The token response becomes a file in the person's home directory; from there on it is captured as any
//! tool's would be.
mod exchange;
mod http;
mod page;
#[cfg(test)]
mod tests;

pub(crate) use page::stray;

use crate::{agent::Agent, home::Home, login::observed};
use exchange::{Exchange, OidcError, Pending};
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot};
use url::Url;
use vestibule_api::{
    error::Chain,
    finding::Finding,
    pack::{Oidc, UrlRule},
};

/// Where the browser is sent back to; registered with the issuer.
pub(crate) const REDIRECT: &str = "http://127.0.0.1:8080/auth/callback";
/// Discovery, and the exchange of the code, may each take so long.
const STEP_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 30 });

/// What the client has to say.
#[derive(Debug)]
pub(crate) enum OwnEvent {
    /// The page to show to the person.
    Page(Url),
    CallbackReached,
    Failed(Box<Finding>),
}

struct Callback {
    query: String,
    answer: oneshot::Sender<String>,
}

/// A running client. It ends with its events, or when this is dropped.
#[derive(Debug)]
pub(crate) struct OwnClient {
    callbacks: mpsc::Sender<Callback>,
    events: mpsc::Receiver<OwnEvent>,
}

impl std::fmt::Debug for Callback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Callback([secret])")
    }
}

impl OwnClient {
    /// The next event; none when the client has done its work.
    pub(crate) async fn next(&mut self) -> Option<OwnEvent> {
        self.events.recv().await
    }

    /// The browser came back with `query`; `answer` gets the page for the person.
    pub(crate) async fn callback(&self, query: String, answer: oneshot::Sender<String>) {
        // A client that has ended drops the answer; the person then sees that no sign-in is under way.
        let _ = self.callbacks.send(Callback { query, answer }).await;
    }
}

/// Begins at the issuer of `oidc`, whose endpoints may be on its own host and those of `rule`. The credential goes to
/// `path` in `home`.
pub(crate) fn start(
    agent: Arc<Agent>,
    oidc: Oidc,
    rule: Option<&UrlRule>,
    path: String,
    home: Home,
) -> OwnClient {
    let allow_http = rule.is_some_and(|rule| rule.allow_http);
    let hosts = rule.map(|rule| rule.hosts.clone()).unwrap_or_default();
    let (callbacks, inbox) = mpsc::channel(4);
    let (events, received) = mpsc::channel(4);
    tokio::spawn(async move {
        let client = Client {
            exchange: Exchange::new(agent, oidc, allow_http, hosts),
            path,
            home,
        };
        tokio::select! {
            () = client.run(inbox, &events) => {}
            () = events.closed() => {}
        }
    });
    OwnClient {
        callbacks,
        events: received,
    }
}

struct Client {
    exchange: Exchange,
    path: String,
    home: Home,
}

impl Client {
    async fn run(self, mut inbox: mpsc::Receiver<Callback>, events: &mpsc::Sender<OwnEvent>) {
        let pending = match bounded("discovery", self.exchange.begin()).await {
            Ok(pending) => pending,
            Err(err) => return fail(events, &err).await,
        };
        // Sends fail only when nobody listens any more; then the task is ended from outside.
        let _ = events.send(OwnEvent::Page(pending.page.clone())).await;
        // A stray request to the callback (a reload, a probe without parameters) does not end the sign-in.
        let callback = loop {
            let Some(callback) = inbox.recv().await else {
                return;
            };
            if exchange::is_answer(&callback.query) {
                break callback;
            }
            let _ = callback.answer.send(page::waiting());
        };
        let _ = events.send(OwnEvent::CallbackReached).await;
        match self.finish(pending, &callback.query).await {
            Ok(()) => drop(callback.answer.send(page::done())),
            Err(err) => {
                let _ = callback.answer.send(page::failed(&err));
                fail(events, &err).await;
            }
        }
    }

    async fn finish(&self, pending: Pending, query: &str) -> Result<(), OidcError> {
        let credential = bounded("token endpoint", self.exchange.redeem(pending, query)).await?;
        self.home
            .write(&self.path, &credential)
            .map_err(OidcError::Write)
    }
}

async fn bounded<T>(
    what: &'static str,
    work: impl Future<Output = Result<T, OidcError>>,
) -> Result<T, OidcError> {
    tokio::time::timeout(STEP_LIMIT, work)
        .await
        .unwrap_or(Err(OidcError::Silent {
            what,
            seconds: STEP_LIMIT.as_secs(),
        }))
}

async fn fail(events: &mpsc::Sender<OwnEvent>, err: &OidcError) {
    let finding = observed(err.cause(), "oauth", &Chain(err).to_string());
    let _ = events.send(OwnEvent::Failed(Box::new(finding))).await;
}
