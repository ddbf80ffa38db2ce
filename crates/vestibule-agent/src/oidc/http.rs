//! HTTP requests of the agent's own, through the egress proxy on the host: in absolute form (RFC 9112 section 3.2.2), over
//! one stream each. For an `https` URL the proxy speaks TLS with the server.
use crate::agent::Agent;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONNECTION, HOST, HeaderValue, InvalidHeaderValue};
use oauth2::{HttpRequest, HttpResponse};
use std::sync::Arc;
use vestibule_api::{
    client::{self, CallError},
    mux::MuxError,
    stream::Open,
};

/// A reply of more bytes is refused.
const REPLY_LIMIT: usize = 1 << 20;

/// Why a request had no reply. The URL is not in it: it may carry a code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("there is no stream to the host")]
    NoLink,
    #[error("open a stream to the egress proxy")]
    Open(#[source] MuxError),
    #[error("the URL has no host")]
    NoHost,
    #[error("the URL's host is not one for a header")]
    Host(#[source] InvalidHeaderValue),
    #[error("send the request through the egress proxy")]
    Send(#[source] CallError),
    #[error("read the reply")]
    Read(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Sends `request`, whose URI is absolute, and reads the reply whole.
pub(crate) async fn send(
    agent: Arc<Agent>,
    mut request: HttpRequest,
) -> Result<HttpResponse, HttpError> {
    let authority = request
        .uri()
        .authority()
        .map(|authority| authority.as_str().to_owned())
        .ok_or(HttpError::NoHost)?;
    let headers = request.headers_mut();
    headers.insert(
        HOST,
        HeaderValue::from_str(&authority).map_err(HttpError::Host)?,
    );
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    let link = agent.link.borrow().clone().ok_or(HttpError::NoLink)?;
    let stream = link.open(Open::Proxy).await.map_err(HttpError::Open)?;
    let reply = client::send(stream, request.map(|body| Full::new(Bytes::from(body))))
        .await
        .map_err(HttpError::Send)?;
    let (head, body) = reply.into_parts();
    let body = Limited::new(body, REPLY_LIMIT)
        .collect()
        .await
        .map_err(HttpError::Read)?
        .to_bytes();
    Ok(HttpResponse::from_parts(head, body.to_vec()))
}
