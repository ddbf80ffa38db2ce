//! A client of the controller's API, as a program of an operator's would be: JSON, server-sent events, tickets, and the
//! WebSockets that tickets open.
mod socket;

pub use socket::{Closed, Socket};

use crate::{rfb::Rfb, wait};
use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{AUTHORIZATION, HeaderValue},
};
use serde::{Serialize, de::DeserializeOwned};
use std::{net::SocketAddr, time::Duration};
use tokio::net::TcpStream;
use vestibule_api::{
    client::{self, CallError, SessionEvents},
    ids::{ProviderId, SessionId},
    session::{
        Right, SessionEvent, SessionView, StartReply, StartRequest, TicketReply, TicketRequest,
    },
};

/// The API of one controller.
#[derive(Clone, Debug)]
pub struct Api {
    address: SocketAddr,
    token: HeaderValue,
}

impl Api {
    /// The controller at `address`, with the operator's token.
    ///
    /// # Errors
    /// When the token cannot stand in a header.
    pub fn new(address: SocketAddr, token: &str) -> Result<Self> {
        let mut token = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .context("put the token in a header")?;
        token.set_sensitive(true);
        Ok(Self { address, token })
    }

    /// Where the controller listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let host = HeaderValue::from_str(&self.address.to_string())?;
        request.headers_mut().insert(hyper::header::HOST, host);
        request
            .headers_mut()
            .insert(AUTHORIZATION, self.token.clone());
        let tcp = TcpStream::connect(self.address)
            .await
            .context("connect to the controller")?;
        Ok(client::send(tcp, request).await?)
    }

    /// A JSON call.
    ///
    /// # Errors
    /// [`CallError::Status`] among them, for every refusal.
    pub async fn call<B: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<R> {
        let what = format!("{method} {path}");
        let reply = self.send(client::json_request(method, path, body)?).await?;
        let mut bytes = client::body(&what, reply).await?;
        if bytes.is_empty() {
            bytes = Bytes::from_static(b"null");
        }
        serde_json::from_slice(&bytes).with_context(|| format!("understand the reply of `{what}`"))
    }

    /// `GET` of JSON.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub async fn get<R: DeserializeOwned>(&self, path: &str) -> Result<R> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// Starts a sign-in.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub async fn start(&self, provider: &str, flow: Option<&str>) -> Result<SessionId> {
        self.request(provider, flow, None).await
    }

    /// Starts a sign-in whose VM may begin from a snapshot, or has to boot.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub async fn start_warm(&self, provider: &str, warm: bool) -> Result<SessionId> {
        self.request(provider, None, Some(warm)).await
    }

    async fn request(
        &self,
        provider: &str,
        flow: Option<&str>,
        warm: Option<bool>,
    ) -> Result<SessionId> {
        let request = StartRequest {
            provider: provider.parse::<ProviderId>()?,
            user_id: None,
            owner: None,
            flow: flow.map(str::to_owned),
            image: None,
            warm,
        };
        let reply: StartReply = self
            .call(Method::POST, "/api/auth/start", Some(&request))
            .await?;
        Ok(reply.session_id)
    }

    /// The session as it is now.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub async fn session(&self, id: SessionId) -> Result<SessionView> {
        self.get(&format!("/api/auth/session/{id}")).await
    }

    /// Cancels a session.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub async fn cancel(&self, id: SessionId) -> Result<SessionView> {
        self.call(
            Method::POST,
            &format!("/api/auth/session/{id}/cancel"),
            None::<&()>,
        )
        .await
    }

    /// Waits until `done` says so of the session, or the session has ended.
    ///
    /// # Errors
    /// When the time is over, or the session ended without `done`; with what failed.
    pub async fn wait_session(
        &self,
        id: SessionId,
        what: &str,
        limit: Duration,
        done: impl Fn(&SessionView) -> bool,
    ) -> Result<SessionView> {
        let last = wait::until(what, limit, || async {
            let view = self.session(id).await.map_err(|err| format!("{err:#}"))?;
            if done(&view) || view.state.is_terminal() {
                return Ok(view);
            }
            Err(format!(
                "state {}, machine {:?}",
                view.state.id(),
                view.machine_state
            ))
        })
        .await?;
        if done(&last) {
            return Ok(last);
        }
        Err(anyhow!(
            "waited for {what}; the session ended as {}: {:?}",
            last.state.id(),
            last.failure
        ))
    }

    /// The session's events from the one after `after`, as they come; none: it has ended and there are no more.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub async fn stream(&self, id: SessionId, after: u64) -> Result<Option<SessionEvents>> {
        let mut request = client::json_request(
            Method::GET,
            &format!("/api/auth/session/{id}/events"),
            None::<&()>,
        )?;
        let headers = request.headers_mut();
        headers.insert(
            hyper::header::ACCEPT,
            HeaderValue::from_static("text/event-stream"),
        );
        headers.insert("last-event-id", HeaderValue::from_str(&after.to_string())?);
        let reply = self.send(request).await?;
        if reply.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        if reply.status().is_success() {
            return Ok(Some(SessionEvents::of(reply)));
        }
        let said = client::body("GET events", reply).await?;
        Err(anyhow!("its events: {}", String::from_utf8_lossy(&said)))
    }

    /// Every event of the session from the one after `after`, until the stream ends or `enough`.
    ///
    /// # Errors
    /// When the stream breaks or is none, or the time is over.
    pub async fn events(
        &self,
        id: SessionId,
        after: u64,
        limit: Duration,
        mut enough: impl FnMut(&SessionEvent) -> bool,
    ) -> Result<Vec<SessionEvent>> {
        let Some(mut stream) = self.stream(id, after).await? else {
            return Ok(Vec::new());
        };
        let read = async {
            let mut events = Vec::new();
            while let Some(event) = stream.next().await? {
                let last = enough(&event);
                events.push(event);
                if last {
                    break;
                }
            }
            Ok(events)
        };
        tokio::time::timeout(wait::patient(limit), read)
            .await
            .context("wait for events")?
    }

    /// A ticket for one WebSocket of the session.
    ///
    /// # Errors
    /// As [`Api::call`].
    pub async fn ticket(&self, id: SessionId, right: Right) -> Result<TicketReply> {
        let path = format!("/api/auth/session/{id}/tickets");
        self.call(
            Method::POST,
            &path,
            Some(&TicketRequest { right, who: None }),
        )
        .await
    }

    /// Opens `view` or `terminal` of the session with a fresh ticket.
    ///
    /// # Errors
    /// When the handshake fails. A refusal by close code is an end of the [`Socket`].
    pub async fn open(&self, id: SessionId, which: &str, right: Right) -> Result<Socket> {
        let ticket = self.ticket(id, right).await?.ticket;
        self.open_with(id, which, &ticket).await
    }

    /// Opens a WebSocket with this ticket, whatever it is worth.
    ///
    /// # Errors
    /// As [`Api::open`].
    pub async fn open_with(&self, id: SessionId, which: &str, ticket: &str) -> Result<Socket> {
        let url = format!(
            "ws://{}/api/auth/session/{id}/{which}?ticket={ticket}",
            self.address
        );
        Socket::open(self.address, &url).await
    }

    /// The session's screen.
    ///
    /// # Errors
    /// When the view is refused or is no RFB.
    pub async fn view(&self, id: SessionId, right: Right) -> Result<(Rfb, Closed)> {
        let (io, closed) = self.open(id, "view", right).await?.into_stream();
        match Rfb::connect(io).await {
            Ok(rfb) => Ok((rfb, closed)),
            Err(err) => Err(err.context(format!("the view ended with {:?}", closed.now()))),
        }
    }
}

/// The status with which a call was refused, if that is why it failed.
pub fn refused(err: &anyhow::Error) -> Option<StatusCode> {
    err.downcast_ref::<CallError>().and_then(CallError::status)
}
