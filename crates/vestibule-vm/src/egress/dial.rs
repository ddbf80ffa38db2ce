//! Connections to the outside: TCP to a checked address, through the user's own proxy where there is one, TLS where the
//! proxy itself speaks it; counted, and watched for idleness.
use super::{
    Counters, address,
    policy::{Policy, Refusal},
    target::{HostName, Target},
};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use vestibule_api::{egress::EgressReason, error::Chain};

/// One address has so long to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The user's proxy, or a TLS handshake, has so long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(20);
/// A connection over which nothing goes for so long is closed.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Any byte stream.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// How the outside is reached.
pub(super) enum Outside {
    /// A connection to the target itself.
    Direct(Counted),
    /// A connection to the user's proxy, which takes absolute-form requests for the target.
    Forwarder(Counted),
}

/// Connects to `target` at one of the checked addresses, for bytes that the target itself will read.
pub(super) async fn tunnel(
    policy: &Policy,
    target: &Target,
    counters: &Arc<Counters>,
) -> Result<Counted, Refusal> {
    let addresses = policy.resolve(target).await?;
    let Some(proxy) = &policy.upstream else {
        let stream = connect(&addresses).await?;
        return Ok(Counted::new(Box::new(stream), counters));
    };
    let (stream, local) = upstream(proxy).await?;
    through(stream, named(target, &addresses, local), counters).await
}

/// Connects for one plain HTTP request.
pub(super) async fn plain(
    policy: &Policy,
    target: &Target,
    counters: &Arc<Counters>,
) -> Result<Outside, Refusal> {
    let Some(proxy) = &policy.upstream else {
        return tunnel(policy, target, counters).await.map(Outside::Direct);
    };
    let addresses = policy.resolve(target).await?;
    let (stream, local) = upstream(proxy).await?;
    if local {
        // It would resolve the name itself; by tunnel it can be asked for the checked address.
        let through = through(stream, named(target, &addresses, local), counters);
        return through.await.map(Outside::Direct);
    }
    Ok(Outside::Forwarder(Counted::new(Box::new(stream), counters)))
}

/// What the user's proxy is asked for: the name, as commercial proxies want it, unless the proxy is inside the host's own
/// network. There a name that answers differently the second time would lead to where the guest may not go.
fn named(target: &Target, addresses: &[SocketAddr], local: bool) -> String {
    match addresses.first() {
        Some(address) if local => address.to_string(),
        Some(_) | None => target.to_string(),
    }
}

async fn through(
    stream: TcpStream,
    named: String,
    counters: &Arc<Counters>,
) -> Result<Counted, Refusal> {
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, ask(stream, named)).await {
        Ok(stream) => Ok(Counted::new(stream?, counters)),
        Err(_) => {
            let why = "the user's proxy did not answer in time";
            Err(Refusal::late(EgressReason::Unreachable, why))
        }
    }
}

/// As [`tunnel`], with TLS on it; the name in the certificate must be the target's.
pub(super) async fn tls(
    policy: &Policy,
    target: &Target,
    counters: &Arc<Counters>,
) -> Result<impl Io + use<>, Refusal> {
    let stream = tunnel(policy, target, counters).await?;
    let name = match &target.host {
        HostName::Domain(name) => ServerName::try_from(name.clone())
            .map_err(|_| Refusal::new(EgressReason::Tls, "no certificate can have this name"))?,
        HostName::Address(address) => ServerName::IpAddress((*address).into()),
    };
    let connector = tokio_rustls::TlsConnector::from(Arc::clone(&policy.tls));
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, connector.connect(name, stream)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(err)) => Err(Refusal::new(EgressReason::Tls, Chain(&err).to_string())),
        Err(_) => Err(Refusal::late(
            EgressReason::Tls,
            "the TLS handshake took too long",
        )),
    }
}

/// Tries the addresses in the resolver's order (RFC 6724).
async fn connect(addresses: &[SocketAddr]) -> Result<TcpStream, Refusal> {
    let mut last = Refusal::new(EgressReason::Unreachable, "there is no address");
    for address in addresses {
        match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                // A connection that only batches its bytes is still a connection.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(err)) => last = Refusal::new(EgressReason::Unreachable, err.to_string()),
            Err(_) => {
                let why = format!("no answer within {} s", CONNECT_TIMEOUT.as_secs());
                last = Refusal::late(EgressReason::Unreachable, why);
            }
        }
    }
    Err(last)
}

/// Connects to the user's proxy; also says whether it is inside the host's own network, where it could be talked into
/// what the guest may not do itself.
async fn upstream(proxy: &Target) -> Result<(TcpStream, bool), Refusal> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the egress proxy is where names are resolved"
    )]
    let found = tokio::net::lookup_host((proxy.host.to_string(), proxy.port)).await;
    let found: Vec<_> = found
        .map_err(|err| {
            Refusal::new(
                EgressReason::Unreachable,
                format!("the user's proxy: {err}"),
            )
        })?
        .collect();
    let stream = connect(&found).await.map_err(|refusal| Refusal {
        why: format!("the user's proxy: {}", refusal.why),
        ..refusal
    })?;
    let local = stream
        .peer_addr()
        .is_ok_and(|address| address::refuse(address.ip()).is_some());
    Ok((stream, local))
}

/// `CONNECT` through the user's proxy (RFC 9110 section 9.3.6).
async fn ask(stream: TcpStream, target: String) -> Result<Box<dyn Io>, Refusal> {
    let failed = |what: String| {
        Refusal::new(
            EgressReason::Unreachable,
            format!("the user's proxy {what}"),
        )
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|err| failed(err.to_string()))?;
    tokio::spawn(connection.with_upgrades());
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri(target.clone())
        .header(hyper::header::HOST, target)
        .body(Empty::<Bytes>::new())
        .map_err(|err| failed(err.to_string()))?;
    let reply = sender
        .send_request(request)
        .await
        .map_err(|err| failed(err.to_string()))?;
    if reply.status() != StatusCode::OK {
        return Err(failed(format!("answered {}", reply.status())));
    }
    let upgraded = hyper::upgrade::on(reply)
        .await
        .map_err(|err| failed(err.to_string()))?;
    Ok(Box::new(TokioIo::new(upgraded)))
}

/// A connection to the outside whose bytes are counted.
pub(super) struct Counted {
    inner: Box<dyn Io>,
    counters: Arc<Counters>,
    activity: Arc<Activity>,
}

/// When bytes last went over a connection.
pub(super) struct Activity {
    started: Instant,
    /// Milliseconds after `started`.
    last: AtomicU64,
}

impl Activity {
    fn mark(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Ends when nothing has gone over the connection for [`IDLE_TIMEOUT`].
    pub(super) async fn idle(&self) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let deadline = self.started + last + IDLE_TIMEOUT;
            if Instant::now() >= deadline {
                return;
            }
            tokio::time::sleep_until(deadline.into()).await;
        }
    }
}

impl Counted {
    fn new(inner: Box<dyn Io>, counters: &Arc<Counters>) -> Self {
        let activity = Activity {
            started: Instant::now(),
            last: AtomicU64::new(0),
        };
        Self {
            inner,
            counters: Arc::clone(counters),
            activity: Arc::new(activity),
        }
    }

    pub(super) fn activity(&self) -> Arc<Activity> {
        Arc::clone(&self.activity)
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let read = (buf.filled().len() - before) as u64;
        if read > 0 {
            self.counters.bytes_in.fetch_add(read, Ordering::Relaxed);
            self.activity.mark();
        }
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(written)) = polled {
            self.counters
                .bytes_out
                .fetch_add(written as u64, Ordering::Relaxed);
            self.activity.mark();
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
