//! The egress proxy over in-memory connections, against real servers on loopback that pins make reachable.
use crate::support::soon;
use axum::{Router, extract::Request, http::header, response::IntoResponse, routing};
use http_body_util::{BodyExt, Full};
use hyper::{Response, StatusCode, body::Incoming, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use std::{net::SocketAddr, sync::Arc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::TcpListener,
};
use vestibule_api::{
    egress::{EgressMode, EgressPolicy, EgressReason, Pin},
    machine::{RunnerEvent, RunnerEventKind},
};
use vestibule_vm::{
    egress::{CONNECTION_LIMIT, Egress},
    events::EventLog,
};

struct WayOut {
    egress: Arc<Egress>,
    events: Arc<EventLog>,
}

impl WayOut {
    fn new(policy: &EgressPolicy) -> Self {
        let events = Arc::new(EventLog::default());
        let egress = Egress::new(policy, Arc::clone(&events)).unwrap();
        Self { egress, events }
    }

    /// One connection of the guest's.
    fn dial(&self) -> DuplexStream {
        let (ours, theirs) = duplex(64 << 10);
        tokio::spawn(Arc::clone(&self.egress).serve(theirs));
        ours
    }

    /// Sends raw bytes and reads the reply's head and what follows, until the proxy closes or falls silent.
    async fn raw(&self, text: &str) -> String {
        let mut stream = self.dial();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut reply = Vec::new();
        soon(stream.read_to_end(&mut reply)).await.unwrap();
        String::from_utf8_lossy(&reply).into_owned()
    }

    async fn client(&self) -> SendRequest<Full<bytes::Bytes>> {
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(self.dial()))
            .await
            .unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    fn refusals(&self) -> Vec<(String, u16, EgressReason, u64)> {
        self.egress.flush();
        let lines = self.events.lines();
        let lines = lines.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                let event = serde_json::from_slice::<RunnerEvent>(line).unwrap().event;
                let RunnerEventKind::Egress {
                    host,
                    port,
                    reason,
                    count,
                } = event
                else {
                    panic!("{event:?}")
                };
                (host, port, reason, count)
            })
            .collect()
    }
}

fn open(pins: &[(&str, Option<u16>, SocketAddr)]) -> EgressPolicy {
    let pin = |(host, port, to): &(&str, Option<u16>, SocketAddr)| Pin {
        host: (*host).into(),
        port: *port,
        to: *to,
    };
    EgressPolicy {
        mode: EgressMode::Open,
        pins: pins.iter().map(pin).collect(),
        ..Default::default()
    }
}

async fn get(client: &mut SendRequest<Full<bytes::Bytes>>, uri: &str) -> Response<Incoming> {
    let request = hyper::Request::get(uri)
        .header("host", "ignored")
        .body(Full::default())
        .unwrap();
    soon(client.send_request(request)).await.unwrap()
}

async fn text(reply: Response<Incoming>) -> String {
    let bytes = soon(reply.into_body().collect()).await.unwrap().to_bytes();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A web server that shows what it got; `/away` redirects to `location`.
async fn server(location: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let show = routing::any(|request: Request| async move {
        let mut lines = vec![format!("{} {}", request.method(), request.uri())];
        lines.extend(
            request
                .headers()
                .iter()
                .map(|(k, v)| format!("{k}: {}", v.to_str().unwrap())),
        );
        let body = request.into_body().collect().await.unwrap().to_bytes();
        lines.push(String::from_utf8_lossy(&body).into_owned());
        (
            [
                ("connection", "x-hop"),
                ("x-hop", "1"),
                ("proxy-authenticate", "Basic"),
            ],
            lines.join("\n"),
        )
    });
    let away = routing::any(move || async move {
        (StatusCode::FOUND, [(header::LOCATION, location)]).into_response()
    });
    let router = Router::new().route("/away", away).fallback_service(show);
    tokio::spawn(axum::serve(listener, router).into_future());
    address
}

/// A server that echoes, and says goodbye after its client's end of file.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.write_all(b"goodbye").await;
            });
        }
    });
    address
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_half_closes() {
    let way = WayOut::new(&open(&[("echo.test", Some(443), echo().await)]));
    let reply = way
        .raw("CONNECT Echo.Test:443 HTTP/1.1\r\nHost: echo.test:443\r\n\r\nearly bytes")
        .await;
    let (head, rest) = reply.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(rest, "early bytesgoodbye");
    let counters = way.egress.counters();
    assert_eq!(
        (counters.bytes_out, counters.bytes_in, counters.refused),
        (11, 18, 0)
    );
    assert_eq!(way.refusals(), []);
}

#[tokio::test]
async fn plain_requests_are_rewritten_and_nothing_of_one_hop_passes() {
    let address = server("").await;
    let way = WayOut::new(&open(&[("web.test", None, address)]));
    let reply = way
        .raw(
            "POST http://user:pw@web.test:8080/a?b=c HTTP/1.1\r\nHost: other.test\r\nProxy-Authorization: Basic c2VjcmV0\r\n\
             Proxy-Connection: keep-alive\r\nConnection: x-private, keep-alive\r\nX-Private: 1\r\nTE: trailers\r\n\
             Upgrade: h2c\r\nX-Kept: yes\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        )
        .await;
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{reply}");
    assert!(
        body.contains("POST /a?b=c") && body.contains("host: web.test:8080"),
        "{body}"
    );
    assert!(
        body.contains("x-kept: yes") && body.contains("hello"),
        "{body}"
    );
    for leaked in [
        "proxy-",
        "x-private",
        "te:",
        "upgrade",
        "pw",
        "c2VjcmV0",
        "other.test",
    ] {
        assert!(
            !body.to_lowercase().contains(&leaked.to_lowercase()),
            "{leaked}: {body}"
        );
    }
    assert!(
        !head.contains("x-hop") && !head.contains("proxy-authenticate"),
        "{head}"
    );
}

const MATRIX: &[(&str, EgressReason)] = &[
    ("127.0.0.1", EgressReason::Loopback),
    ("127.1", EgressReason::Loopback),
    ("0x7f.1", EgressReason::Loopback),
    ("2130706433", EgressReason::Loopback),
    ("017700000001", EgressReason::Loopback),
    ("127.0.0.1.", EgressReason::Loopback),
    ("localhost", EgressReason::Loopback),
    ("LocalHost.", EgressReason::Loopback),
    ("printer.localhost", EgressReason::Loopback),
    ("[::1]", EgressReason::Loopback),
    ("[::ffff:127.0.0.1]", EgressReason::Loopback),
    ("[::ffff:7f00:1]", EgressReason::Loopback),
    ("[64:ff9b::127.0.0.1]", EgressReason::Loopback),
    ("[2002:7f00:1::]", EgressReason::Loopback),
    ("[::127.0.0.1]", EgressReason::Loopback),
    ("0.0.0.0", EgressReason::NotGlobal),
    ("0", EgressReason::NotGlobal),
    ("[::]", EgressReason::NotGlobal),
    ("10.0.0.1", EgressReason::Private),
    ("172.16.1.1", EgressReason::Private),
    ("192.168.0.1", EgressReason::Private),
    ("100.64.0.1", EgressReason::Private),
    ("[::ffff:10.0.0.1]", EgressReason::Private),
    ("[fd00::1]", EgressReason::Private),
    ("169.254.169.254", EgressReason::LinkLocal),
    ("0xa9fea9fe", EgressReason::LinkLocal),
    ("[::ffff:169.254.169.254]", EgressReason::LinkLocal),
    ("[64:ff9b::a9fe:a9fe]", EgressReason::LinkLocal),
    ("[fe80::1]", EgressReason::LinkLocal),
    ("224.0.0.1", EgressReason::NotGlobal),
    ("[ff02::1]", EgressReason::NotGlobal),
    ("255.255.255.255", EgressReason::NotGlobal),
    ("203.0.113.9", EgressReason::NotGlobal),
];

#[tokio::test]
async fn every_forbidden_target_is_refused_in_every_form_and_said() {
    for (host, reason) in MATRIX {
        let way = WayOut::new(&open(&[]));
        for request in [
            format!("CONNECT {host}:4000 HTTP/1.1\r\nHost: {host}\r\n\r\n"),
            format!("GET http://{host}:4000/ HTTP/1.1\r\nHost: {host}\r\n\r\n"),
            format!("GET https://{host}:4000/ HTTP/1.1\r\nHost: {host}\r\n\r\n"),
            // What the Host header says changes nothing.
            format!("GET http://{host}:4000/ HTTP/1.1\r\nHost: example.com\r\n\r\n"),
        ] {
            let reply = way.raw(&request).await;
            assert!(
                reply.starts_with("HTTP/1.1 403 Refused by Vestibule: "),
                "{request}{reply}"
            );
            assert!(
                reply.contains("<h1>") && reply.contains("asked for"),
                "{reply}"
            );
        }
        let refusals = way.refusals();
        assert!(
            refusals
                .iter()
                .all(|(_, port, r, _)| *port == 4000 && r == reason),
            "{host}: {refusals:?}"
        );
        assert_eq!(
            refusals.iter().map(|r| r.3).sum::<u64>(),
            4,
            "{host}: {refusals:?}"
        );
        assert_eq!(way.egress.counters().refused, 4);
        assert_eq!(way.egress.counters().bytes_out, 0);
    }
}

#[tokio::test]
async fn a_redirect_to_a_forbidden_place_is_refused_on_the_same_connection() {
    let address = server("http://169.254.169.254/latest/meta-data").await;
    let way = WayOut::new(&open(&[("web.test", None, address)]));
    let mut client = way.client().await;
    let reply = get(&mut client, "http://web.test/away").await;
    assert_eq!(reply.status(), StatusCode::FOUND);
    let location = reply.headers()["location"].to_str().unwrap().to_owned();
    text(reply).await;
    soon(client.ready()).await.unwrap();
    let reply = get(&mut client, &location).await;
    assert_eq!(reply.status(), StatusCode::FORBIDDEN);
    assert!(text(reply).await.contains("169.254.169.254"));
    assert_eq!(
        way.refusals(),
        [("169.254.169.254".into(), 80, EgressReason::LinkLocal, 1)]
    );
    // And the connection still serves what is permitted.
    soon(client.ready()).await.unwrap();
    assert_eq!(
        get(&mut client, "http://web.test/").await.status(),
        StatusCode::OK
    );
}

#[tokio::test]
async fn closed_until_claimed() {
    let address = server("").await;
    let mut policy = open(&[("web.test", None, address)]);
    policy.mode = EgressMode::Closed;
    let way = WayOut::new(&policy);
    let reply = way
        .raw("GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\n\r\n")
        .await;
    assert!(
        reply.starts_with("HTTP/1.1 403 Refused by Vestibule: policy"),
        "{reply}"
    );
    // Counted, and no news about the session to come.
    assert_eq!(way.egress.counters().refused, 1);
    assert!(way.refusals().is_empty());
    policy.mode = EgressMode::AllowList;
    policy.hosts = vec!["web.test".into()];
    way.egress.set_policy(&policy).unwrap();
    let reply = way
        .raw("GET http://web.test/ HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n")
        .await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    let reply = way.raw("CONNECT other.test:443 HTTP/1.1\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 403 "), "{reply}");
    assert_eq!(
        way.refusals(),
        [("other.test".into(), 443, EgressReason::Policy, 1)]
    );
}

#[tokio::test]
async fn what_is_not_reached_says_how() {
    let closed = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let way = WayOut::new(&open(&[("closed.test", None, closed)]));
    let reply = way.raw("CONNECT closed.test:443 HTTP/1.1\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 502 Unreachable"), "{reply}");
    let reply = way
        .raw("GET http://no-such-name.invalid/ HTTP/1.1\r\nHost: x\r\n\r\n")
        .await;
    assert!(
        reply.starts_with("HTTP/1.1 502 Name not found") || reply.starts_with("HTTP/1.1 504 "),
        "{reply}"
    );
    assert!(reply.contains("no-such-name.invalid"), "{reply}");
    let reply = way.raw("GET /index.html HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(
        reply.starts_with("HTTP/1.1 400 Not a proxy request"),
        "{reply}"
    );
    let reasons: Vec<_> = way.refusals().into_iter().map(|r| r.2).collect();
    assert_eq!(
        reasons,
        [
            EgressReason::Unreachable,
            EgressReason::NameNotFound,
            EgressReason::BadRequest
        ]
    );
}

#[tokio::test]
async fn a_head_without_end_is_cut() {
    let way = WayOut::new(&open(&[]));
    let mut stream = way.dial();
    let flood = async {
        let mut sent = stream.write_all(b"GET http://web.test/ HTTP/1.1\r\n").await;
        while sent.is_ok() {
            sent = stream
                .write_all(format!("x-{}: y\r\n", "z".repeat(1000)).as_bytes())
                .await;
        }
    };
    soon(flood).await;
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let address = echo().await;
    let way = WayOut::new(&open(&[("echo.test", None, address)]));
    let mut tunnels = Vec::new();
    for _ in 0..CONNECTION_LIMIT {
        let mut stream = way.dial();
        stream
            .write_all(b"CONNECT echo.test:1 HTTP/1.1\r\n\r\n")
            .await
            .unwrap();
        let mut head = [0; 12];
        soon(stream.read_exact(&mut head)).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        tunnels.push(stream);
    }
    let reply = way.raw("CONNECT echo.test:1 HTTP/1.1\r\n\r\n").await;
    assert!(
        reply.starts_with("HTTP/1.1 503 Too many connections"),
        "{reply}"
    );
    tunnels.clear();
    soon(async {
        while !way
            .raw("CONNECT echo.test:1 HTTP/1.1\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 200")
        {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A certificate for `name`, and the authority that signed it, both in PEM; the server's side ready to use.
fn certificate(name: &str) -> (String, Arc<rustls::ServerConfig>) {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    let pem = authority.pem();
    let issuer = rcgen::Issuer::new(params, key);
    let leaf_key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec![name.to_owned()])
        .unwrap()
        .signed_by(&leaf_key, &issuer)
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(leaf_key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .unwrap();
    (pem, Arc::new(config))
}

async fn tls_server(config: Arc<rustls::ServerConfig>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(&config));
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut head = [0; 4096];
                let n = stream.read(&mut head).await.unwrap_or(0);
                let reply = format!("HTTP/1.1 200 OK\r\ncontent-length: {n}\r\n\r\n");
                let _ = stream.write_all(reply.as_bytes()).await;
                let _ = stream.write_all(&head[..n]).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    address
}

#[tokio::test]
async fn the_proxy_speaks_tls_and_checks_who_answers() {
    let (pem, config) = certificate("idp.test");
    let address = tls_server(config).await;
    let mut policy = open(&[("idp.test", None, address), ("other.test", None, address)]);
    let request = |host| {
        format!(
            "GET https://{host}/token?x=1 HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        )
    };
    let reply = WayOut::new(&policy).raw(&request("idp.test")).await;
    assert!(reply.starts_with("HTTP/1.1 502 TLS failed"), "{reply}");
    policy.extra_ca_pem = vec![pem];
    let way = WayOut::new(&policy);
    let reply = way.raw(&request("idp.test")).await;
    assert!(
        reply.starts_with("HTTP/1.1 200") && reply.contains("GET /token?x=1 HTTP/1.1"),
        "{reply}"
    );
    assert!(reply.contains("host: idp.test\r\n"), "{reply}");
    let reply = way.raw(&request("other.test")).await;
    assert!(reply.starts_with("HTTP/1.1 502 TLS failed"), "{reply}");
    assert_eq!(
        way.refusals(),
        [("other.test".into(), 443, EgressReason::Tls, 1)]
    );
}

/// The user's own proxy, which is another one of ours, on a port.
async fn upstream(policy: &EgressPolicy) -> (Arc<Egress>, SocketAddr) {
    let way = WayOut::new(policy);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let egress = Arc::clone(&way.egress);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(Arc::clone(&egress).serve(stream));
        }
    });
    (way.egress, address)
}

#[tokio::test]
async fn the_users_own_proxy_is_used_and_cannot_be_talked_into_more() {
    let (web, tunnel) = (server("").await, echo().await);
    // It knows addresses only: being on loopback, it must not be asked for names, which it could resolve otherwise.
    let addresses = [
        ("127.0.0.1", Some(web.port()), web),
        ("127.0.0.1", Some(tunnel.port()), tunnel),
    ];
    let (proxy, address) = upstream(&open(&addresses)).await;
    let mut policy = open(&[("web.test", None, web), ("echo.test", None, tunnel)]);
    policy.upstream = Some(format!("http://{address}"));
    let way = WayOut::new(&policy);
    let reply = way
        .raw("CONNECT echo.test:443 HTTP/1.1\r\n\r\nthrough")
        .await;
    assert!(
        reply.starts_with("HTTP/1.1 200") && reply.ends_with("throughgoodbye"),
        "{reply}"
    );
    let reply = way
        .raw("GET http://web.test/x HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n")
        .await;
    assert!(
        reply.contains("GET /x") && reply.contains("host: web.test"),
        "{reply}"
    );
    assert_eq!(
        (proxy.counters().connections, proxy.counters().refused),
        (2, 0)
    );
    let reply = way.raw("CONNECT 10.0.0.1:443 HTTP/1.1\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 403"), "{reply}");
    assert_eq!(proxy.counters().connections, 2);
}

#[tokio::test]
async fn an_upgrade_is_not_passed_on() {
    let address = server("").await;
    let way = WayOut::new(&open(&[("web.test", None, address)]));
    let mut client = way.client().await;
    let request = hyper::Request::get("http://web.test/")
        .header("upgrade", "websocket")
        .header("connection", "upgrade")
        .body(Full::default())
        .unwrap();
    let reply = soon(client.send_request(request)).await.unwrap();
    assert_eq!(reply.status(), StatusCode::OK);
    assert!(!text(reply).await.contains("websocket"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever a guest sends, the proxy answers or closes, and goes on serving.
    #[test]
    fn no_bytes_stop_it(bytes in prop::collection::vec(any::<u8>(), 0..400), start in 0usize..4) {
        let starts = ["", "CONNECT ", "GET http://", "GET https://[::"];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut closed = open(&[]);
            closed.mode = EgressMode::Closed;
            let way = WayOut::new(&closed);
            let mut stream = way.dial();
            stream.write_all(starts[start].as_bytes()).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut reply = Vec::new();
            soon(stream.read_to_end(&mut reply)).await.unwrap();
            let reply = way.raw("CONNECT a.test:1 HTTP/1.1\r\n\r\n").await;
            assert!(reply.starts_with("HTTP/1.1 403"), "{reply}");
        });
    }
}
