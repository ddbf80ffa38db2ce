//! HTTP/1.1 on one connection of the guest's: tunnels, plain requests, and requests for which the proxy speaks TLS.
//!
//! Both sides are parsed by hyper and written anew, so nothing ambiguous passes. Each request on a connection that is
//! kept alive is judged for itself: following a redirect is the client's doing and is judged like any other request.
use super::{
    Egress,
    dial::{self, Counted, Outside},
    page,
    policy::{Policy, Refusal},
    target::{self, Form, Target},
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode, Uri,
    body::Incoming,
    ext::ReasonPhrase,
    header::{self, HeaderName, HeaderValue},
    service::service_fn,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use vestibule_api::egress::EgressReason;

/// A client may take so long to send the head of a request, and keep a connection open without one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);
/// The head of a request.
const HEAD_LIMIT: usize = 64 << 10;
/// A server may think for so long before it answers.
const REPLY_TIMEOUT: Duration = Duration::from_secs(300);

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// A tunnel that was agreed on: the client's side after its upgrade, and the outside.
type Agreed = Arc<Mutex<Option<(OnUpgrade, Counted)>>>;

/// Serves one connection until it ends. `admitted` is false where the VM has too many already: the client is told so.
pub(super) async fn serve<S>(egress: Arc<Egress>, stream: S, admitted: bool)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let agreed = Agreed::default();
    let service = service_fn(|request| {
        let (egress, agreed) = (Arc::clone(&egress), Arc::clone(&agreed));
        async move { Ok::<_, Infallible>(answer(&egress, &agreed, request, admitted).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_LIMIT)
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(err) = served {
        tracing::debug!(error = %err, "a connection of the guest's ended");
    }
    let tunnel = agreed.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((client, outside)) = tunnel {
        relay(client, outside).await;
    }
}

async fn relay(client: OnUpgrade, mut outside: Counted) {
    let Ok(client) = client.await else { return };
    let (mut client, activity) = (TokioIo::new(client), outside.activity());
    tokio::select! {
        // Either side may end a tunnel at any time, also by a reset; there is nobody to tell.
        _ = copy_bidirectional(&mut client, &mut outside) => {}
        () = activity.idle() => {}
    }
}

async fn answer(
    egress: &Egress,
    agreed: &Agreed,
    request: Request<Incoming>,
    admitted: bool,
) -> Response<Body> {
    let Some((form, target)) = target::read(request.method(), request.uri()) else {
        let why = "this is a proxy: it takes CONNECT, http:// and https:// requests";
        return refuse(egress, None, &Refusal::new(EgressReason::BadRequest, why));
    };
    if !admitted {
        let why = "this virtual machine has too many connections open";
        return refuse(
            egress,
            Some(&target),
            &Refusal::new(EgressReason::TooMany, why),
        );
    }
    let policy = egress.policy();
    let answered = match form {
        Form::Tunnel => connect(egress, agreed, &policy, &target, request).await,
        Form::Http => plain(egress, &policy, &target, request).await,
        Form::Https => tls(egress, &policy, &target, request).await,
    };
    answered.unwrap_or_else(|refusal| refuse(egress, Some(&target), &refusal))
}

fn refuse(egress: &Egress, target: Option<&Target>, refusal: &Refusal) -> Response<Body> {
    let host = target.map(|target| target.host.to_string());
    let host = host.unwrap_or_else(|| String::from("(none)"));
    let port = target.map_or(0, |target| target.port);
    egress.refused(&host, port, refusal.reason, Instant::now());
    let body = Full::new(Bytes::from(page::html(&host, refusal)));
    let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = page::status(refusal);
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/html; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    let phrase = ReasonPhrase::from_static(page::phrase(refusal.reason).as_bytes());
    response.extensions_mut().insert(phrase);
    response
}

async fn connect(
    egress: &Egress,
    agreed: &Agreed,
    policy: &Policy,
    target: &Target,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let outside = dial::tunnel(policy, target, &egress.counters).await?;
    let upgrade = hyper::upgrade::on(request);
    *agreed.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, outside));
    Ok(Response::new(Body::default()))
}

async fn plain(
    egress: &Egress,
    policy: &Policy,
    target: &Target,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    match dial::plain(policy, target, &egress.counters).await? {
        Outside::Direct(stream) => {
            let activity = stream.activity();
            exchange(stream, origin_form(target, request)?, async move {
                activity.idle().await;
            })
            .await
        }
        Outside::Forwarder(stream) => {
            let activity = stream.activity();
            exchange(stream, absolute_form(target, request)?, async move {
                activity.idle().await;
            })
            .await
        }
    }
}

async fn tls(
    egress: &Egress,
    policy: &Policy,
    target: &Target,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    let stream = dial::tls(policy, target, &egress.counters).await?;
    exchange(
        stream,
        origin_form(target, request)?,
        tokio::time::sleep(dial::IDLE_TIMEOUT),
    )
    .await
}

/// Sends one request and returns the reply as its head comes; the body follows as the client reads it.
async fn exchange<S>(
    stream: S,
    request: Request<Incoming>,
    idle: impl Future<Output = ()> + Send + 'static,
) -> Result<Response<Body>, Refusal>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let failed = |err: hyper::Error| Refusal::new(EgressReason::Unreachable, err.to_string());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        tokio::select! {
            // What goes wrong shows in the reply.
            _ = connection => {}
            () = idle => {}
        }
    });
    let reply = match tokio::time::timeout(REPLY_TIMEOUT, sender.send_request(request)).await {
        Ok(reply) => reply.map_err(failed)?,
        Err(_) => {
            let why = format!("no answer within {} s", REPLY_TIMEOUT.as_secs());
            return Err(Refusal::late(EgressReason::Unreachable, why));
        }
    };
    let (mut head, body) = reply.into_parts();
    strip_hop_by_hop(&mut head.headers);
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        // No upgrade was passed on, so none can be agreed.
        return Err(Refusal::new(
            EgressReason::Unreachable,
            "the server upgraded the connection unasked",
        ));
    }
    Ok(Response::from_parts(head, body.boxed_unsync()))
}

/// The request as the target itself takes it. `Host` is made from the request target (RFC 9112 section 3.2.2).
fn origin_form(target: &Target, request: Request<Incoming>) -> Result<Request<Incoming>, Refusal> {
    let path = request
        .uri()
        .path_and_query()
        .map_or("/", |path| path.as_str());
    let uri = path.parse().map_err(bad)?;
    rewritten(target, request, uri)
}

/// The request as another proxy takes it.
fn absolute_form(
    target: &Target,
    request: Request<Incoming>,
) -> Result<Request<Incoming>, Refusal> {
    let path = request
        .uri()
        .path_and_query()
        .map_or("/", |path| path.as_str());
    let uri = format!("http://{target}{path}").parse().map_err(bad)?;
    rewritten(target, request, uri)
}

fn bad(err: impl std::fmt::Display) -> Refusal {
    Refusal::new(EgressReason::BadRequest, err.to_string())
}

fn rewritten(
    target: &Target,
    mut request: Request<Incoming>,
    uri: Uri,
) -> Result<Request<Incoming>, Refusal> {
    let default = match request.uri().scheme_str() {
        Some("https") => 443,
        _ => 80,
    };
    let authority = target.to_string();
    let host = authority
        .strip_suffix(&format!(":{default}"))
        .unwrap_or(&authority);
    let host = HeaderValue::from_str(host).map_err(bad)?;
    *request.uri_mut() = uri;
    strip_hop_by_hop(request.headers_mut());
    request.headers_mut().insert(header::HOST, host);
    Ok(request)
}

/// Headers that concern one hop only (RFC 9110 section 7.6.1), those that `Connection` names among them.
fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    const HOP: [&str; 9] = [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    for name in named {
        headers.remove(name);
    }
    for name in HOP {
        headers.remove(name);
    }
}
