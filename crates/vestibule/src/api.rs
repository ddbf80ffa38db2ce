//! The controller's HTTP API, as the command line calls it: loopback, bearer token from `$VESTIBULE_HOME/token`.
use crate::home::Home;
use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, body::Incoming};
use serde::{Serialize, de::DeserializeOwned};
use vestibule_api::{
    client::{self, SessionEvents},
    error::ErrorBody,
    ids::SessionId,
};

/// A WebSocket of the controller's.
pub(crate) type WebSocket = tokio_tungstenite::WebSocketStream<tokio::net::TcpStream>;

/// A controller on this host.
#[derive(Clone, Debug)]
pub(crate) struct Controller {
    address: String,
    token: String,
}

impl Controller {
    /// Finds the controller that serves `home`: its address and token stand in files there.
    pub(crate) fn of(home: &Home) -> anyhow::Result<Self> {
        let read = |name: &str| {
            let path = home.path().join(name);
            std::fs::read_to_string(&path)
                .map(|text| text.trim().to_owned())
                .with_context(|| {
                    format!(
                        "read `{path}`; is a controller running? Start one with `vestibule serve`"
                    )
                })
        };
        Ok(Self {
            address: read("address")?,
            token: read("token")?,
        })
    }

    /// `http://127.0.0.1:4000`.
    pub(crate) fn base(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sends a request and returns the reply's head; a failing status becomes an error with message and fix.
    pub(crate) async fn open<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> anyhow::Result<Response<Incoming>> {
        let stream = self.connect().await?;
        let mut request: Request<Full<Bytes>> = client::json_request(method, path, body)?;
        let headers = request.headers_mut();
        headers.insert(hyper::header::HOST, self.address.parse()?);
        headers.insert(
            hyper::header::AUTHORIZATION,
            format!("Bearer {}", self.token).parse()?,
        );
        let reply = client::send(stream, request).await?;
        if reply.status().is_success() {
            Ok(reply)
        } else {
            Err(refusal(path, reply).await)
        }
    }

    async fn connect(&self) -> anyhow::Result<tokio::net::TcpStream> {
        tokio::net::TcpStream::connect(&self.address)
            .await
            .with_context(|| {
                format!(
                    "connect to the controller at {}; start it with `vestibule serve`",
                    self.address
                )
            })
    }

    /// Opens a WebSocket; the ticket in `path` is what opens it.
    pub(crate) async fn websocket(&self, path: &str) -> anyhow::Result<WebSocket> {
        let stream = self.connect().await?;
        // Small messages are not kept back for more to come.
        stream.set_nodelay(true).context("set TCP_NODELAY")?;
        let url = format!("ws://{}{path}", self.address);
        let (socket, _) = tokio_tungstenite::client_async(url, stream)
            .await
            // The path holds the ticket.
            .context("open the WebSocket")?;
        Ok(socket)
    }

    /// A JSON call.
    pub(crate) async fn call<B: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> anyhow::Result<R> {
        let reply = self.open(method, path, body).await?;
        let bytes = client::body(path, reply).await?;
        let bytes = if bytes.is_empty() {
            Bytes::from_static(b"null")
        } else {
            bytes
        };
        serde_json::from_slice(&bytes).with_context(|| format!("understand the reply of {path}"))
    }

    /// A session's events, from its first on.
    pub(crate) async fn events(&self, session: SessionId) -> anyhow::Result<SessionEvents> {
        let path = format!("/api/auth/session/{session}/events");
        let reply = self.open(Method::GET, &path, None::<&()>).await?;
        Ok(SessionEvents::of(reply))
    }

    /// `GET path` as JSON.
    pub(crate) async fn get<R: DeserializeOwned>(&self, path: &str) -> anyhow::Result<R> {
        self.call(Method::GET, path, None::<&()>).await
    }
}

/// The server's own message and fix, where it sent them.
async fn refusal(path: &str, reply: Response<Incoming>) -> anyhow::Error {
    let status = reply.status();
    let error = match client::body(path, reply).await {
        Err(client::CallError::Status { text, .. }) => text,
        Err(other) => return other.into(),
        Ok(_) => String::new(),
    };
    match serde_json::from_str::<ErrorBody>(&error) {
        Ok(body) => anyhow::anyhow!(
            "{}\n  fix: {} (request {})",
            body.error.message,
            body.error.fix,
            body.error.request_id
        ),
        Err(_) => anyhow::anyhow!("{path} answered {status}: {error}"),
    }
}
