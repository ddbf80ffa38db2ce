//! Starts the real identity provider of `tests/idp` (npm `oidc-provider`) and reads what it issued.
use crate::process::{Process, workspace};
use anyhow::{Context, Result, ensure};
use http_body_util::Full;
use serde::Deserialize;
use std::{net::SocketAddr, time::Duration};
use tokio::{net::TcpStream, process::Command};
use url::Url;
use vestibule_api::client;

/// The name under which guests reach it; the test's egress policy maps it to the host.
pub const HOST: &str = "idp.test";
/// The one account.
pub const LOGIN: &str = "alice";
/// Its client for the pack `oidc`.
pub const CLIENT: &str = "vestibule";

/// A running identity provider; it ends when dropped.
#[derive(Debug)]
pub struct Idp {
    listening: Listening,
    _process: Process,
}

#[derive(Debug, Deserialize)]
struct Listening {
    issuer: Url,
    address: SocketAddr,
    control: Url,
    password: String,
}

/// One answer of the token endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct TokenResponse {
    pub client: String,
    pub access_token: String,
    #[serde(default)]
    pub refresh_token: Option<String>,
    #[serde(default)]
    pub id_token: Option<String>,
}

/// One request that it saw.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SeenRequest {
    pub method: String,
    pub path: String,
    pub status: u16,
}

impl Idp {
    /// Starts it on a free loopback port. `npm ci` must have run in `tests/idp`.
    ///
    /// # Errors
    /// When node or the packages are missing, or it does not come up.
    pub async fn start() -> Result<Self> {
        let dir = workspace().join("tests/idp");
        ensure!(
            dir.join("node_modules/oidc-provider").exists(),
            "`npm ci` has not run in `{dir}`"
        );
        let mut command = Command::new("node");
        command.current_dir(&dir).args(["idp.mjs", "--host", HOST]);
        let log = workspace().join("target/test-logs/idp.log");
        let mut process = Process::start("the identity provider", command, &log)?;
        let listening = process.first_line(Duration::from_secs(30)).await?;
        Ok(Self {
            listening,
            _process: process,
        })
    }

    /// What guests are told: `http://idp.test:PORT`.
    pub fn issuer(&self) -> &Url {
        &self.listening.issuer
    }

    /// Where it listens on this host.
    pub fn address(&self) -> SocketAddr {
        self.listening.address
    }

    /// Where a test reads what it issued and saw, and slows it down (`tests/idp/idp.mjs`).
    pub fn control_url(&self) -> &Url {
        &self.listening.control
    }

    /// The account's password, another one each time.
    pub fn password(&self) -> &str {
        &self.listening.password
    }

    /// Everything it issued, oldest first.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn issued(&self) -> Result<Vec<TokenResponse>> {
        self.control("/issued").await
    }

    /// Every request so far, oldest first.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn seen(&self) -> Result<Vec<SeenRequest>> {
        self.control("/seen").await
    }

    async fn control<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T> {
        let port = self
            .listening
            .control
            .port()
            .context("the control URL has a port")?;
        let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        let request: hyper::Request<Full<bytes::Bytes>> =
            client::json_request(hyper::Method::GET, path, None::<&()>)?;
        let reply = client::send(tcp, request).await?;
        Ok(serde_json::from_slice(&client::body(path, reply).await?)?)
    }
}
