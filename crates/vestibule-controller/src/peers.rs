//! Other controllers: a request that only another host can answer is relayed to its controller, once.
//!
//! Rights are checked where a request arrives, and again where it is answered: the relay carries who asks, signed with the
//! cluster's key ([`key`]), and the other controller asks the same table and the same rows. Nothing is relayed twice.
mod dial;
mod key;

pub use key::KeyError;
pub(crate) use key::{Key, Signed};

use crate::{
    config::cluster::is_peer,
    core::{Shared, stopped},
    http::{ApiError, Caller},
    people::Principal,
    rights::{Object, Rule},
    store::HostRow,
};
use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    response::Response,
};
use dial::{DialError, Dialled};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, client::conn::http1, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use std::{sync::Arc, time::Duration};
use vestibule_api::{
    error::{Chain, ErrorCode},
    ids::{HostId, SessionId},
    session::SessionView,
    time::Timestamp,
};

/// Another controller's connection, with its handshakes, stands within this time.
const CONNECT: Duration = Duration::from_secs(5);
/// And its reply begins within this: to end a VM takes longest.
const REPLY: Duration = Duration::from_secs(120);
/// What is read of a reply that is not passed on as it comes.
const BODY_LIMIT: usize = 16 << 20;
/// What a relayed WebSocket may still say when the controller stops.
const FAREWELL: Duration = Duration::from_secs(2);

/// Who asked, and by which controller's word. The signature covers it.
pub(crate) const CALLER: HeaderName = HeaderName::from_static("vestibule-caller");
/// Headers that belong to one connection (RFC 9110 section 7.6.1), that the relay writes itself, or that say who one is.
const NOT_RELAYED: [HeaderName; 14] = [
    header::CONNECTION,
    header::UPGRADE,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
    header::HOST,
    header::ORIGIN,
    header::COOKIE,
    header::AUTHORIZATION,
    CALLER,
    key::SIGNATURE,
];

/// How other controllers are reached and known.
#[derive(Debug)]
pub(crate) struct Peers {
    key: Option<Key>,
    tls: Arc<ClientConfig>,
}

/// A request that another controller relayed.
#[derive(Clone, Debug)]
pub(crate) struct Relayed {
    /// Who asked there; none: whoever has the ticket.
    pub(crate) principal: Option<Principal>,
}

/// Whether only the host of its object can answer an operation.
fn is_hosts(rule: &Rule) -> bool {
    match rule.object {
        Object::None => false,
        Object::Machine | Object::Credential => true,
        Object::Session => {
            let of_host = ["session", "ticket", "revokeTickets", "view", "terminal"];
            of_host.contains(&rule.operation)
        }
    }
}

/// Whether the rows alone answer it, less completely, where its host does not.
fn is_answered_by_rows(rule: &Rule) -> bool {
    ["session", "vm"].contains(&rule.operation)
}

impl Peers {
    pub(crate) fn new(key: Option<Key>, tls: ClientConfig) -> Self {
        Self {
            key,
            tls: Arc::new(tls),
        }
    }

    /// What TLS to other controllers trusts: the public authorities, and those of `ca` (PEM).
    pub(crate) fn tls(ca: Option<&camino::Utf8Path>) -> Result<ClientConfig, KeyError> {
        dial::tls(ca)
    }

    /// Whether another controller relayed a request. None: nobody says so.
    pub(crate) fn relayed(
        &self,
        own: HostId,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Option<Relayed>, ApiError> {
        let Some(signature) = headers.get(key::SIGNATURE) else {
            return Ok(None);
        };
        let refused = |why: &str| {
            tracing::warn!(
                why,
                "a request that claims to be another controller's is refused"
            );
            ApiError::new(
                ErrorCode::Forbidden,
                format!("the request is not of a controller of this cluster: {why}"),
                "use the same key in `cluster.key_file` on every host, and let their clocks agree within a minute",
            )
        };
        let key = self.key.as_ref();
        let key = key.ok_or_else(|| refused("this controller has no cluster key"))?;
        let caller = headers
            .get(CALLER)
            .map_or("", |value| value.to_str().unwrap_or_default());
        let signed = Signed {
            to: own,
            method,
            path: path_of(uri),
            caller,
        };
        let signature = signature.to_str().unwrap_or_default();
        key.check(&signed, signature, Timestamp::now())
            .map_err(refused)?;
        let principal = match caller {
            "" => None,
            text => Some(
                key::read_principal(text).ok_or_else(|| refused("who asks is not understood"))?,
            ),
        };
        Ok(Some(Relayed { principal }))
    }
}

fn path_of(uri: &Uri) -> &str {
    uri.path_and_query().map_or("/", |path| path.as_str())
}

/// The host that has to answer a request, where that is not this one.
pub(crate) async fn elsewhere(
    core: &Shared,
    rule: Option<&Rule>,
    id: &str,
    relayed: bool,
) -> Result<Option<HostRow>, ApiError> {
    let Some(rule) = rule.filter(|rule| core.store.is_shared() && is_hosts(rule)) else {
        return Ok(None);
    };
    let host = match rule.object {
        Object::Session => match id.parse() {
            Ok(id) => core.store.host_of_session(id).await?,
            Err(_) => None,
        },
        Object::Machine => match id.parse() {
            Ok(id) => core.store.host_of_machine(id).await?,
            Err(_) => None,
        },
        Object::Credential => match id.parse() {
            Ok(id) => core.store.host_of_credential(id).await?,
            Err(_) => None,
        },
        Object::None => None,
    };
    let Some(host) = host.filter(|host| *host != core.store.host()) else {
        return Ok(None);
    };
    if relayed {
        // It moved meanwhile.
        let err = ApiError::new(
            ErrorCode::Unavailable,
            "what was asked for is on another host by now",
            "try again",
        );
        return Err(err.retry_after(1));
    }
    find(core, host).await.map(Some)
}

async fn find(core: &Shared, id: HostId) -> Result<HostRow, ApiError> {
    let hosts = core.store.hosts().await?;
    hosts.into_iter().find(|host| host.id == id).ok_or_else(|| {
        ApiError::new(
            ErrorCode::Unavailable,
            format!("what was asked for is on host {id}, which was removed"),
            "nothing can be done: an admin removed the host with `vestibule host forget`",
        )
    })
}

fn unreachable(host: &HostRow, why: &str) -> ApiError {
    tracing::warn!(host = host.name, why, "a request could not be relayed");
    ApiError::new(
        ErrorCode::Unavailable,
        format!("host `{}` has what was asked for, and its controller can't be asked: {why}", host.name),
        format!(
            "start `vestibule serve` on host `{}`, or see in `vestibule host list` why it does not answer; a host that never \
             comes back is removed with `vestibule host forget {}`",
            host.name, host.name
        ),
    )
    .retry_after(5)
}

/// Relays a request, and its WebSocket where it asks for one. None: the rows are to answer, as the host does not.
pub(crate) async fn relay(
    core: &Shared,
    host: &HostRow,
    rule: &Rule,
    caller: Option<&Caller>,
    request: Request,
) -> Result<Response, (ApiError, Option<Request>)> {
    let (mut parts, body) = request.into_parts();
    // Such a request has no body.
    let rows = is_answered_by_rows(rule).then(|| Request::from_parts(parts.clone(), Body::empty()));
    let mut sender = match connect(core, host).await {
        Ok(sender) => sender,
        Err(err) => return Err((err, rows)),
    };
    let upgrade = parts.extensions.remove::<OnUpgrade>();
    let asked = parts.headers.get(header::UPGRADE).cloned();
    let upgrade = upgrade.zip(asked);
    let principal = caller.map(|caller| &caller.principal);
    let head = Head {
        method: parts.method,
        uri: parts.uri,
        headers: parts.headers,
    };
    let send = async {
        let mut forward = head.signed(core, host, principal, body)?;
        if let Some((_, protocol)) = &upgrade {
            let headers = forward.headers_mut();
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, protocol.clone());
        }
        reply(host, sender.request(forward)).await
    };
    let mut reply = match send.await {
        Ok(reply) if rows.is_some() && reply.status().is_server_error() => {
            let why = format!("it answers with status {}", reply.status());
            return Err((unreachable(host, &why), rows));
        }
        Ok(reply) => reply,
        Err(err) => return Err((err, rows)),
    };
    if reply.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some((near, _)) = upgrade
    {
        let far = hyper::upgrade::on(&mut reply);
        tokio::spawn(splice(core.clone(), near, far));
        let mut response = Response::new(Body::empty());
        *response.status_mut() = reply.status();
        *response.headers_mut() = std::mem::take(reply.headers_mut());
        return Ok(response);
    }
    let mut response = reply.map(Body::new);
    for name in [header::CONNECTION, header::TRANSFER_ENCODING] {
        response.headers_mut().remove(name);
    }
    Ok(response)
}

/// What another controller answers to a request of this one's, for whoever asks.
pub(crate) async fn get<T: DeserializeOwned>(
    core: &Shared,
    host: &HostRow,
    principal: &Principal,
    path: &str,
) -> Result<T, ApiError> {
    let mut sender = connect(core, host).await?;
    let head = Head {
        method: Method::GET,
        uri: path
            .parse()
            .map_err(|err: axum::http::uri::InvalidUri| ApiError::internal(&err))?,
        headers: HeaderMap::new(),
    };
    let forward = head.signed(core, host, Some(principal), Body::empty())?;
    let reply = reply(host, sender.request(forward)).await?;
    let status = reply.status();
    let limited = http_body_util::Limited::new(reply.into_body(), BODY_LIMIT);
    let bytes = limited.collect().await;
    let bytes = bytes
        .map_err(|err| unreachable(host, &err.to_string()))?
        .to_bytes();
    if status != StatusCode::OK {
        return Err(unreachable(
            host,
            &format!("it answers with status {status}"),
        ));
    }
    serde_json::from_slice(&bytes).map_err(|err| unreachable(host, &err.to_string()))
}

/// The code that the person of a session compares, from the controller that follows its VM.
pub(crate) async fn user_code(core: &Shared, who: &Principal, id: SessionId) -> Option<String> {
    let host = core.store.host_of_session(id).await.ok()??;
    if !core.store.is_shared() || host == core.store.host() {
        return None;
    }
    let host = find(core, host).await.ok()?;
    let view = get::<SessionView>(core, &host, who, &format!("/api/auth/session/{id}")).await;
    view.ok()?.user_code
}

type Sender = http1::SendRequest<Body>;

/// A connection to a host's controller, for one request.
async fn connect(core: &Shared, host: &HostRow) -> Result<Peer, ApiError> {
    if core.peers.key.is_none() {
        return Err(unreachable(
            host,
            "this controller has no key of the cluster (`cluster.key_file`)",
        ));
    }
    if !host.live {
        return Err(unreachable(host, "its lease ran out"));
    }
    // The row is not trusted with more than the configuration is.
    let address = host.address.as_deref().filter(|address| is_peer(address));
    let address =
        address.ok_or_else(|| unreachable(host, "it has no address (`cluster.address`)"))?;
    let connect = async {
        let io = match dial::dial(address, &core.peers.tls).await? {
            Dialled::Plain(tcp) => return hand(TokioIo::new(tcp)).await,
            Dialled::Tls(tls) => tls,
        };
        hand(TokioIo::new(*io)).await
    };
    match tokio::time::timeout(CONNECT, connect).await {
        Ok(Ok(sender)) => Ok(Peer {
            sender,
            authority: dial::authority(address),
        }),
        Ok(Err(err)) => Err(not_reached(host, &err)),
        Err(_) => Err(unreachable(host, "it did not answer in time")),
    }
}

fn not_reached(host: &HostRow, err: &DialError) -> ApiError {
    let refused = unreachable(host, &Chain(err).to_string());
    match err {
        DialError::Certificate(_) => refused.mended_by(format!(
            "name in `cluster.ca` of every host the authority that host `{}` has its certificate from; the certificate is for the \
             name in its `cluster.address`",
            host.name
        )),
        DialError::Tcp(_) | DialError::Tls(_) | DialError::Http(_) => refused,
    }
}

struct Peer {
    sender: Sender,
    authority: String,
}

impl Peer {
    fn request(
        &mut self,
        mut request: hyper::Request<Body>,
    ) -> impl Future<Output = hyper::Result<hyper::Response<Incoming>>> + use<> {
        if let Ok(host) = HeaderValue::from_str(&self.authority) {
            request.headers_mut().insert(header::HOST, host);
        }
        self.sender.send_request(request)
    }
}

async fn hand<T>(io: TokioIo<T>) -> Result<Sender, DialError>
where
    TokioIo<T>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(io).await.map_err(DialError::Http)?;
    // It ends with the request, or as the WebSocket's.
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

async fn reply(
    host: &HostRow,
    sent: impl Future<Output = hyper::Result<hyper::Response<Incoming>>>,
) -> Result<hyper::Response<Incoming>, ApiError> {
    match tokio::time::timeout(REPLY, sent).await {
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(err)) => Err(unreachable(host, &Chain(&err).to_string())),
        Err(_) => Err(unreachable(host, "it did not answer in time")),
    }
}

/// What is asked of the other controller.
struct Head {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Head {
    fn signed(
        mut self,
        core: &Shared,
        host: &HostRow,
        principal: Option<&Principal>,
        body: Body,
    ) -> Result<hyper::Request<Body>, ApiError> {
        let no_key = || {
            unreachable(
                host,
                "this controller has no key of the cluster (`cluster.key_file`)",
            )
        };
        let key = core.peers.key.as_ref().ok_or_else(no_key)?;
        for name in &NOT_RELAYED {
            self.headers.remove(name);
        }
        let caller = match principal {
            Some(principal) => key::write_principal(principal)?,
            None => String::new(),
        };
        let path = path_of(&self.uri).to_owned();
        let signed = Signed {
            to: host.id,
            method: &self.method,
            path: &path,
            caller: &caller,
        };
        let signature = key.sign(&signed, Timestamp::now());
        let mut request = hyper::Request::builder()
            .method(self.method.clone())
            .uri(&path);
        if let Some(headers) = request.headers_mut() {
            *headers = self.headers;
            for (name, value) in [(CALLER, caller), (key::SIGNATURE, signature)] {
                let value =
                    HeaderValue::from_str(&value).map_err(|err| ApiError::internal(&err))?;
                headers.insert(name, value);
            }
        }
        request.body(body).map_err(|err| ApiError::internal(&err))
    }
}

/// Carries a WebSocket's bytes in both directions until one side ends. When the controller stops, the other controller sees
/// the viewer go, and its farewell still passes.
async fn splice(core: Shared, near: OnUpgrade, far: OnUpgrade) {
    let Ok((near, far)) = tokio::try_join!(near, far) else {
        return;
    };
    let (mut near_read, mut near_write) = tokio::io::split(TokioIo::new(near));
    let (mut far_read, mut far_write) = tokio::io::split(TokioIo::new(far));
    let up = async {
        tokio::select! {
            _ = tokio::io::copy(&mut near_read, &mut far_write) => {}
            () = stopped(core.stopping.clone()) => {}
        }
        drop(tokio::io::AsyncWriteExt::shutdown(&mut far_write).await);
    };
    let down = async {
        drop(tokio::io::copy(&mut far_read, &mut near_write).await);
        drop(tokio::io::AsyncWriteExt::shutdown(&mut near_write).await);
    };
    let mut down = std::pin::pin!(down);
    tokio::select! {
        () = up => drop(tokio::time::timeout(FAREWELL, down).await),
        () = &mut down => {}
    }
}
