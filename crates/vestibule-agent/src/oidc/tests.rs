//! The client against an issuer that is a real server and checks what it is sent, through a real multiplexer and a proxy.
use crate::{agent::Agent, api, guest::Guest};
use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::net::{TcpListener, TcpStream};
use url::Url;
use vestibule_api::{
    agent::{AgentEvent, CapturedCredential, LoginEvent, LoginRequest},
    cause::Cause,
    client,
    finding::Finding,
    ids::SessionId,
    mux::{self, Side},
    secret::Opener,
    stream::Open,
};

/// How the issuer misbehaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    None,
    /// The code is not known any more.
    Expired,
    /// Answers as if the verifier were wrong, because the challenge that it noted is another one.
    OtherChallenge,
    Silent,
    ServerError,
    NotJson,
    WrongNonce,
    WrongAudience,
    ExpiredIdToken,
    NoIdToken,
    /// Its metadata names another issuer.
    OtherIssuer,
    /// Its metadata sends the person to another host.
    OtherPage,
    /// Its metadata sends the code to another host.
    OtherToken,
    /// Its metadata sends the code to another port of its host.
    OtherPort,
}

#[derive(Debug)]
struct Issuer {
    base: String,
    fault: Fault,
    /// Parameters of the authorization request.
    asked: Mutex<BTreeMap<String, String>>,
}

impl Issuer {
    async fn start(fault: Fault) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let issuer = Arc::new(Self {
            base,
            fault,
            asked: Mutex::default(),
        });
        let routes = Router::new()
            .route("/.well-known/openid-configuration", get(metadata))
            .route("/token", post(token))
            .with_state(Arc::clone(&issuer));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        issuer
    }

    fn id_token(&self, nonce: &str) -> String {
        let past_or_future = if self.fault == Fault::ExpiredIdToken {
            1_000_000_000
        } else {
            4_000_000_000_i64
        };
        let claims = json!({
            "iss": self.base, "sub": "alice", "email": "alice@example.test", "exp": past_or_future,
            "aud": if self.fault == Fault::WrongAudience { "somebody-else" } else { "vestibule" },
            "nonce": if self.fault == Fault::WrongNonce { "another" } else { nonce },
        });
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
    }
}

async fn metadata(State(issuer): State<Arc<Issuer>>) -> Json<Value> {
    let name = if issuer.fault == Fault::OtherIssuer {
        "https://evil.test"
    } else {
        &issuer.base
    };
    let base = issuer.base.as_str();
    let or = |fault, other| if issuer.fault == fault { other } else { base };
    let page = or(Fault::OtherPage, "http://evil.test");
    let token = match issuer.fault == Fault::OtherPort {
        true => "http://127.0.0.1:9",
        false => or(Fault::OtherToken, "http://evil.test"),
    };
    Json(
        json!({"issuer": name, "authorization_endpoint": format!("{page}/authorize"), "token_endpoint": format!("{token}/token")}),
    )
}

async fn token(State(issuer): State<Arc<Issuer>>, body: String) -> (StatusCode, Json<Value>) {
    let form: BTreeMap<String, String> = url::form_urlencoded::parse(body.as_bytes())
        .into_owned()
        .collect();
    let asked = issuer.asked.lock().unwrap().clone();
    let refuse = |code: &str, text: &str| {
        (
            StatusCode::BAD_REQUEST,
            Json(json!({"error": code, "error_description": text})),
        )
    };
    for (name, value) in [
        ("grant_type", "authorization_code"),
        ("code", "CODE-1"),
        ("redirect_uri", super::REDIRECT),
        ("client_id", "vestibule"),
    ] {
        if form.get(name).map(String::as_str) != Some(value) {
            return refuse("invalid_request", name);
        }
    }
    let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(form["code_verifier"].as_bytes()));
    let noted = if issuer.fault == Fault::OtherChallenge {
        "x"
    } else {
        asked["code_challenge"].as_str()
    };
    if challenge != noted {
        return refuse("invalid_grant", "PKCE verification failed");
    }
    match issuer.fault {
        Fault::Expired => return refuse("invalid_grant", "grant request is invalid"),
        Fault::ServerError => {
            return (
                StatusCode::BAD_GATEWAY,
                Json(json!({"error": "server_error"})),
            );
        }
        Fault::NotJson => return (StatusCode::OK, Json(json!("hello"))),
        Fault::Silent => std::future::pending().await,
        Fault::None
        | Fault::OtherChallenge
        | Fault::WrongNonce
        | Fault::WrongAudience
        | Fault::ExpiredIdToken
        | Fault::NoIdToken
        | Fault::OtherIssuer
        | Fault::OtherPage
        | Fault::OtherToken
        | Fault::OtherPort => {}
    }
    let mut reply = json!({"access_token": "FAKE-access", "token_type": "Bearer", "expires_in": 3600, "refresh_token": "FAKE-refresh", "scope": "openid email", "tenant": "t1"});
    if issuer.fault != Fault::NoIdToken {
        reply["id_token"] = json!(issuer.id_token(&asked["nonce"]));
    }
    (StatusCode::OK, Json(reply))
}

/// The host's end: a forward proxy for absolute-form requests.
fn serve_host(link: tokio::io::DuplexStream) -> mux::Mux {
    let (host, mut incoming) = mux::start(link, Side::Host);
    tokio::spawn(async move {
        while let Some(Ok((Open::Proxy, stream))) = incoming.accept().await {
            let forward = service_fn(|request: Request<Incoming>| async move {
                assert!(request.uri().scheme().is_some(), "absolute form");
                let origin = TcpStream::connect(request.uri().authority().unwrap().as_str())
                    .await
                    .unwrap();
                let (mut head, body) = request.into_parts();
                head.uri = head.uri.path_and_query().unwrap().clone().into();
                let body = Full::new(body.collect().await.unwrap().to_bytes());
                let reply = client::send(origin, Request::from_parts(head, body))
                    .await
                    .unwrap();
                Ok::<_, Infallible>(reply)
            });
            let io = hyper_util::rt::TokioIo::new(stream);
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, forward));
        }
    });
    host
}

struct Room {
    dir: camino_tempfile::Utf8TempDir,
    agent: Arc<Agent>,
    issuer: Arc<Issuer>,
    callback: String,
    _host: mux::Mux,
    _guest: mux::Incoming,
}

async fn room(fault: Fault) -> Room {
    let dir = camino_tempfile::tempdir().unwrap();
    for name in ["home", "run", "bin"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let browser = dir.path().join("bin/browser");
    fs::write(
        &browser,
        format!(
            "#!/bin/sh\necho \"$1\" > {0}/opened.new\nmv {0}/opened.new {0}/opened\n",
            dir.path()
        ),
    )
    .unwrap();
    fs::set_permissions(&browser, fs::Permissions::from_mode(0o755)).unwrap();
    let agent = Agent::new(Guest::for_tests(dir.path().as_std_path()), String::new());
    let (near, far) = tokio::io::duplex(64 * 1024);
    let host = serve_host(far);
    let (guest, incoming) = mux::start(near, Side::Guest);
    agent.link.send_replace(Some(guest));
    let loopback = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let callback = loopback.local_addr().unwrap().to_string();
    tokio::spawn(api::serve_loopback(loopback, Arc::clone(&agent)));
    Room {
        dir,
        agent,
        issuer: Issuer::start(fault).await,
        callback,
        _host: host,
        _guest: incoming,
    }
}

impl Room {
    fn begin(&self, allow_http: bool) {
        self.begin_with(allow_http, "idp.test");
    }

    /// The issuer's host itself is not on the list.
    fn begin_with(&self, allow_http: bool, host: &str) {
        let pack = json!({
            "schema": 1,
            "provider": {"id": "oidc", "name": "OIDC", "vendor": "Test", "homepage": "https://example.test"},
            "terms": {"url": "https://example.test", "note": "none", "handoff": "organisation"},
            "flow": [{"id": "main", "title": "Main", "kind": "oidc", "timeout_s": 60,
                "url": {"sources": ["shim"], "hosts": [host], "allow_http": allow_http},
                "oidc": {"issuer": self.issuer.base, "client_id": "vestibule", "scopes": ["openid", "email"]}}],
            "credential": [{"id": "token", "path": ".config/vestibule/oidc.json", "format": "json", "required": ["/access_token"],
                "account": "jwt:/id_token#/email", "expires_at": {"pointer": "/expires_at", "unit": "s"}}],
        });
        let request = LoginRequest {
            session_id: SessionId::generate(),
            pack: serde_json::from_value(pack).unwrap(),
            flow: "main".into(),
            deadline_s: 30,
        };
        self.agent.login.begin(&self.agent, request).unwrap();
    }

    /// The page that the browser was told to show, as its parameters; noted by the issuer as if a person had gone there.
    async fn page(&self) -> BTreeMap<String, String> {
        let opened = self.dir.path().join("opened");
        let wait = async {
            loop {
                if let Ok(text) = fs::read_to_string(&opened) {
                    return text;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let text = tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .expect("the browser is opened");
        let url = Url::parse(text.trim()).unwrap();
        assert_eq!(url.path(), "/authorize");
        let parameters: BTreeMap<_, _> = url.query_pairs().into_owned().collect();
        *self.issuer.asked.lock().unwrap() = parameters.clone();
        parameters
    }

    /// The browser comes back with `query`; returns what the person sees.
    async fn come_back(&self, query: &str) -> (StatusCode, String) {
        let stream = TcpStream::connect(&self.callback).await.unwrap();
        let request = Request::get(format!("/auth/callback?{query}"))
            .header("host", "127.0.0.1:8080")
            .body(Full::new(Bytes::new()))
            .unwrap();
        let reply: Response<Incoming> = client::send(stream, request).await.unwrap();
        let status = reply.status();
        assert_eq!(reply.headers()["cache-control"], "no-store");
        (
            status,
            String::from_utf8(
                reply
                    .into_body()
                    .collect()
                    .await
                    .unwrap()
                    .to_bytes()
                    .to_vec(),
            )
            .unwrap(),
        )
    }

    async fn events(&self) -> Vec<LoginEvent> {
        let mut all = Vec::new();
        let mut lines = Box::pin(Arc::clone(&self.agent.events).follow(0));
        let follow = async {
            while let Some(batch) = lines.next().await {
                for line in batch {
                    let AgentEvent::Login { event } = line.event else {
                        continue;
                    };
                    let last = matches!(
                        event,
                        LoginEvent::Captured { .. } | LoginEvent::Failed { .. }
                    );
                    all.push(event);
                    if last {
                        return;
                    }
                }
            }
        };
        assert!(
            tokio::time::timeout(Duration::from_secs(20), follow)
                .await
                .is_ok(),
            "no end after {all:?}"
        );
        all
    }

    async fn cause(&self) -> Cause {
        self.finding().await.cause
    }

    async fn finding(&self) -> Finding {
        match self.events().await.pop() {
            Some(LoginEvent::Failed { finding }) => {
                let text = serde_json::to_string(&finding).unwrap();
                assert!(
                    !text.contains("CODE-1") && !text.contains("FAKE-"),
                    "{text}"
                );
                finding
            }
            other => panic!("it ended with {other:?}"),
        }
    }
}

#[tokio::test]
async fn from_discovery_to_the_sealed_token_response() {
    let room = room(Fault::None).await;
    room.begin(true);
    let page = room.page().await;
    assert_eq!(
        (
            page["response_type"].as_str(),
            page["code_challenge_method"].as_str(),
            page["scope"].as_str()
        ),
        ("code", "S256", "openid email")
    );
    assert_eq!(
        (page["client_id"].as_str(), page["redirect_uri"].as_str()),
        ("vestibule", super::REDIRECT)
    );
    // A stray visit does not end the sign-in.
    assert!(
        room.come_back("")
            .await
            .1
            .contains("Waiting for the sign-in")
    );
    let (status, shown) = room
        .come_back(&format!("code=CODE-1&state={}", page["state"]))
        .await;
    assert!(
        status.is_success() && shown.contains("You are signed in"),
        "{shown}"
    );
    let steps: Vec<_> = room
        .events()
        .await
        .iter()
        .map(|event| serde_json::to_value(event).unwrap())
        .collect();
    let names: Vec<_> = steps
        .iter()
        .map(|step| step["step"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "started",
            "url-captured",
            "browser-opened",
            "callback-reached",
            "captured"
        ]
    );
    assert_eq!(
        (&steps[1]["source"], &steps[4]["account"]),
        (&json!("oauth"), &json!("alice@example.test"))
    );
    let opener = Opener::generate();
    let opened = opener
        .open(&room.agent.login.sealed(&opener.key()).unwrap())
        .unwrap();
    let credential: CapturedCredential = serde_json::from_slice(opened.expose()).unwrap();
    let file = fs::read(room.dir.path().join("home/.config/vestibule/oidc.json")).unwrap();
    assert!(
        base64::engine::general_purpose::STANDARD
            .decode(&credential.files[0].content)
            .unwrap()
            == file
    );
    let file: Value = serde_json::from_slice(&file).unwrap();
    for (name, value) in [
        ("access_token", "FAKE-access"),
        ("refresh_token", "FAKE-refresh"),
        ("issuer", &room.issuer.base),
        ("client_id", "vestibule"),
        ("tenant", "t1"),
    ] {
        assert_eq!(file[name], value, "{name}");
    }
    assert!(file["expires_at"].is_i64() && file["id_token"].is_string());
    // The sign-in is over: the same redirect again is nobody's.
    assert_eq!(room.come_back("code=CODE-1").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn each_fault_of_the_issuer_is_its_own_cause() {
    let cases = [
        (Fault::Expired, Cause::CodeExpired),
        (Fault::OtherChallenge, Cause::VerifierRefused),
        (Fault::Silent, Cause::TokenEndpointFailed),
        (Fault::ServerError, Cause::TokenEndpointFailed),
        (Fault::NotJson, Cause::TokenEndpointFailed),
        (Fault::WrongNonce, Cause::CredentialInvalid),
        (Fault::WrongAudience, Cause::CredentialInvalid),
        (Fault::ExpiredIdToken, Cause::CredentialInvalid),
        (Fault::NoIdToken, Cause::CredentialInvalid),
    ];
    for (fault, cause) in cases {
        let room = room(fault).await;
        room.begin(true);
        let page = room.page().await;
        let (_, shown) = room
            .come_back(&format!("code=CODE-1&state={}", page["state"]))
            .await;
        assert!(
            shown.contains("The sign-in did not work"),
            "{fault:?}: {shown}"
        );
        assert_eq!(room.cause().await, cause, "{fault:?}");
        assert!(
            !room
                .dir
                .path()
                .join("home/.config/vestibule/oidc.json")
                .exists()
        );
    }
}

#[tokio::test]
async fn what_the_redirect_says_is_checked() {
    for (query, cause) in [
        ("error=access_denied&state=STATE", Cause::ConsentDenied),
        ("error=server_error&state=STATE", Cause::TokenEndpointFailed),
        ("code=CODE-1&state=other", Cause::StateMismatch),
        ("code=CODE-1", Cause::StateMismatch),
        ("error=access_denied&state=other", Cause::StateMismatch),
        (
            "code=CODE-1&state=STATE&iss=https%3A%2F%2Fevil.test",
            Cause::StateMismatch,
        ),
    ] {
        let room = room(Fault::None).await;
        room.begin(true);
        let page = room.page().await;
        room.come_back(&query.replace("STATE", &page["state"]))
            .await;
        assert_eq!(room.cause().await, cause, "{query}");
    }
}

#[tokio::test]
async fn an_issuer_that_cannot_be_trusted_or_reached_is_not_used() {
    let other = room(Fault::OtherIssuer).await;
    other.begin(true);
    assert_eq!(other.cause().await, Cause::PackIncompatible);
    let plain = room(Fault::None).await;
    plain.begin(false);
    assert_eq!(plain.cause().await, Cause::PackIncompatible);
    let cut_off = room(Fault::None).await;
    cut_off.agent.link.send_replace(None);
    cut_off.begin(true);
    assert_eq!(cut_off.cause().await, Cause::EgressUnreachable);
    assert!(!cut_off.dir.path().join("opened").exists());
}

#[tokio::test]
async fn the_discovery_document_does_not_say_which_hosts_are_trusted() {
    for (fault, host) in [
        (Fault::OtherPage, "evil.test"),
        (Fault::OtherToken, "evil.test"),
        (Fault::OtherPort, "127.0.0.1:9"),
    ] {
        let room = room(fault).await;
        room.begin(true);
        let finding = room.finding().await;
        assert_eq!(finding.cause, Cause::PackIncompatible, "{fault:?}");
        let said = &finding.evidence[0].text;
        assert!(said.contains(&format!("`{host}`")), "{said}");
        assert!(!room.dir.path().join("opened").exists());
    }
    // Unless the operator names it.
    let room = room(Fault::OtherToken).await;
    room.begin_with(true, "evil.test");
    room.page().await;
}
