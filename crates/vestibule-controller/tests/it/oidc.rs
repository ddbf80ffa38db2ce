//! Signing in to the dashboard at an identity provider: what is believed, and everything that is not. The provider here signs
//! for real and can be told to lie; `vestibule-testkit` has the same with the real one.
use crate::support::{
    api::Api,
    home::{Controller, Home},
    people::PASSWORD,
};
use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode as Status},
    routing::{get, post},
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::{Client, Method, Response, StatusCode, header, redirect};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};
use url::Url;

/// What the provider does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    Nothing,
    Nonce,
    Audience,
    Party,
    Issuer,
    Expired,
    Key,
    Unsigned,
    Symmetric,
    NoToken,
    Unverified,
    /// The name is only in the userinfo.
    Userinfo,
    /// Which is about somebody else.
    OtherSubject,
    Refuses,
    Endpoints,
}

struct Provider {
    address: SocketAddr,
    key: rcgen::KeyPair,
    other: rcgen::KeyPair,
    /// Challenge and nonce of each code.
    codes: Mutex<BTreeMap<String, (String, String)>>,
    lie: Mutex<Lie>,
    who: Mutex<(String, String)>,
}

type Shared = Arc<Provider>;

impl Provider {
    async fn start() -> Shared {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let provider = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            key: rcgen::KeyPair::generate().unwrap(),
            other: rcgen::KeyPair::generate().unwrap(),
            codes: Mutex::default(),
            lie: Mutex::new(Lie::Nothing),
            who: Mutex::new(("s-1".to_owned(), "Ada@example.test".to_owned())),
        });
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(configuration))
            .route("/keys", get(keys))
            .route("/token", post(token))
            .route("/userinfo", get(userinfo))
            .with_state(Arc::clone(&provider));
        tokio::spawn(async move { axum::serve(listener, router).await });
        provider
    }

    fn issuer(&self) -> String {
        format!("http://{}", self.address)
    }

    fn lies(&self, lie: Lie) {
        *self.lie.lock().unwrap() = lie;
    }

    fn lie(&self) -> Lie {
        *self.lie.lock().unwrap()
    }

    fn is_now(&self, subject: &str, email: &str) {
        *self.who.lock().unwrap() = (subject.to_owned(), email.to_owned());
    }

    fn who(&self) -> (String, String) {
        self.who.lock().unwrap().clone()
    }

    fn id_token(&self, nonce: &str) -> String {
        let lie = self.lie();
        let (subject, email) = self.who();
        let mut claims = json!({
            "iss": self.issuer(), "aud": "dashboard", "sub": subject, "nonce": nonce, "iat": 1,
            "exp": 4_000_000_000_u64, "email": email, "email_verified": true,
        });
        match lie {
            Lie::Nonce => claims["nonce"] = json!("another"),
            Lie::Audience => claims["aud"] = json!("another"),
            Lie::Party => claims["aud"] = json!(["dashboard", "another"]),
            Lie::Issuer => claims["iss"] = json!("https://another.example"),
            Lie::Expired => claims["exp"] = json!(1_000_000_000),
            Lie::Unverified => claims["email_verified"] = json!(false),
            Lie::Userinfo | Lie::OtherSubject => {
                drop(claims.as_object_mut().unwrap().remove("email"));
            }
            Lie::Nothing
            | Lie::Key
            | Lie::Unsigned
            | Lie::Symmetric
            | Lie::NoToken
            | Lie::Refuses
            | Lie::Endpoints => {}
        }
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("k".to_owned());
        match lie {
            Lie::Unsigned => {
                let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
                return format!("{}.{}.", part(&json!({ "alg": "none" })), part(&claims));
            }
            // The public key as a shared secret: what a verifier does that trusts the header's algorithm.
            Lie::Symmetric => {
                header.alg = Algorithm::HS256;
                let secret = EncodingKey::from_secret(self.key.public_key_raw());
                return jsonwebtoken::encode(&header, &claims, &secret).unwrap();
            }
            _ => {}
        }
        let key = if lie == Lie::Key {
            &self.other
        } else {
            &self.key
        };
        let key = EncodingKey::from_ec_der(&key.serialize_der());
        jsonwebtoken::encode(&header, &claims, &key).unwrap()
    }
}

async fn configuration(State(provider): State<Shared>) -> Json<Value> {
    let issuer = provider.issuer();
    let token = if provider.lie() == Lie::Endpoints {
        "http://collector.example/token".to_owned()
    } else {
        format!("{issuer}/token")
    };
    Json(json!({
        "issuer": issuer, "authorization_endpoint": format!("{issuer}/authorize"), "token_endpoint": token,
        "jwks_uri": format!("{issuer}/keys"), "userinfo_endpoint": format!("{issuer}/userinfo"),
    }))
}

async fn keys(State(provider): State<Shared>) -> Json<Value> {
    // An uncompressed point (SEC 1, section 2.3.3): 4, x, y.
    let point = provider.key.public_key_raw();
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    Json(json!({ "keys": [{
        "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": "k", "x": part(&point[1..33]), "y": part(&point[33..]),
    }] }))
}

async fn token(
    State(provider): State<Shared>,
    headers: HeaderMap,
    body: String,
) -> (Status, Json<Value>) {
    let form: BTreeMap<String, String> = url::form_urlencoded::parse(body.as_bytes())
        .into_owned()
        .collect();
    // RFC 6749 section 2.3.1: the secret is form-encoded first.
    let shown = format!("Basic {}", STANDARD.encode("dashboard:client+secret"));
    assert_eq!(headers["authorization"], shown.as_str());
    let known = provider.codes.lock().unwrap().remove(&form["code"]);
    let Some((challenge, nonce)) = known.filter(|_| provider.lie() != Lie::Refuses) else {
        return (
            Status::BAD_REQUEST,
            Json(json!({ "error": "invalid_grant" })),
        );
    };
    assert_eq!(
        URL_SAFE_NO_PAD.encode(Sha256::digest(&form["code_verifier"])),
        challenge,
        "PKCE"
    );
    let mut reply = json!({ "access_token": "a-t", "token_type": "Bearer", "id_token": provider.id_token(&nonce) });
    if provider.lie() == Lie::NoToken {
        reply.as_object_mut().unwrap().remove("id_token");
    }
    (Status::OK, Json(reply))
}

async fn userinfo(State(provider): State<Shared>, headers: HeaderMap) -> Json<Value> {
    assert_eq!(headers["authorization"], "Bearer a-t");
    let (subject, email) = provider.who();
    let subject = if provider.lie() == Lie::OtherSubject {
        "s-9".to_owned()
    } else {
        subject
    };
    Json(json!({ "sub": subject, "email": email, "email_verified": true }))
}

/// A browser: follows nothing by itself.
struct Browser {
    http: Client,
    address: SocketAddr,
}

/// What the browser was sent to the provider with.
struct Sent {
    cookie: String,
    page: Url,
}

impl Sent {
    fn parameter(&self, name: &str) -> String {
        let mut pairs = self.page.query_pairs();
        pairs.find(|(key, _)| key == name).unwrap().1.into_owned()
    }
}

impl Browser {
    fn of(api: &Api) -> Self {
        let http = Client::builder().redirect(redirect::Policy::none());
        Self {
            http: http.build().unwrap(),
            address: api.address,
        }
    }

    async fn get(&self, path: &str, cookie: &str) -> Response {
        let request = self.http.get(format!("http://{}{path}", self.address));
        request.header(header::COOKIE, cookie).send().await.unwrap()
    }

    async fn begin(&self) -> Sent {
        let reply = self.get("/api/login/oidc", "").await;
        assert_eq!(reply.status(), StatusCode::SEE_OTHER);
        let cookie = reply.headers()[header::SET_COOKIE].to_str().unwrap();
        assert!(
            cookie.contains("HttpOnly; SameSite=Lax; Max-Age=900"),
            "{cookie}"
        );
        Sent {
            cookie: cookie.split(';').next().unwrap().to_owned(),
            page: reply.headers()[header::LOCATION]
                .to_str()
                .unwrap()
                .parse()
                .unwrap(),
        }
    }

    /// The person says yes; the redirect is followed. Where that leads, and the dashboard's cookie.
    async fn sign_in(&self, provider: &Provider) -> (String, Option<String>) {
        let sent = self.begin().await;
        let code = format!("code-{}", sent.parameter("state"));
        let asked = (sent.parameter("code_challenge"), sent.parameter("nonce"));
        provider.codes.lock().unwrap().insert(code.clone(), asked);
        let path = format!(
            "/api/login/oidc/callback?code={code}&state={}",
            sent.parameter("state")
        );
        let reply = self.get(&path, &sent.cookie).await;
        ended(&reply)
    }
}

fn ended(reply: &Response) -> (String, Option<String>) {
    assert_eq!(reply.status(), StatusCode::SEE_OTHER);
    let location = reply.headers()[header::LOCATION]
        .to_str()
        .unwrap()
        .to_owned();
    let cookies = reply.headers().get_all(header::SET_COOKIE).iter();
    let mut cookies = cookies.map(|cookie| cookie.to_str().unwrap().to_owned());
    let cookie = cookies.find(|cookie| !cookie.contains("oidc") && !cookie.contains("Max-Age=0"));
    (
        location,
        cookie.map(|cookie| cookie.split(';').next().unwrap().to_owned()),
    )
}

/// The reason in the address that the browser is sent back to.
fn reason(location: &str) -> &str {
    let rest = location
        .strip_prefix("/?signIn=")
        .unwrap_or_else(|| panic!("{location}"));
    assert!(rest.ends_with("#/login"), "{location}");
    rest.split('&').next().unwrap()
}

async fn home(provider: &Provider, more: &str) -> (Home, Controller) {
    let mut home = Home::new();
    let secret = home.path().join("client-secret");
    std::fs::write(&secret, "client secret\n").unwrap();
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    home.configure(&format!(
        "[pool]\nbrowser = 0\n[oidc]\nissuer = '{}'\nclient_id = 'dashboard'\nclient_secret_file = '{secret}'\nname = 'Example'\n{more}",
        provider.issuer()
    ));
    let controller = home.serve().await;
    (home, controller)
}

async fn me(browser: &Browser, cookie: &str) -> Value {
    browser.get("/api/me", cookie).await.json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_come_in_by_their_identity_and_stay_who_they_are() {
    let provider = Provider::start().await;
    let (_home, controller) = home(&provider, "role = 'signer'\norganisation = 'acme'\n").await;
    let api = &controller.api;
    api.organisation("acme").await;
    let browser = Browser::of(api);
    let methods: Value = browser
        .get("/api/login/methods", "")
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(methods, json!({ "oidc": { "name": "Example" } }));

    let (location, cookie) = browser.sign_in(&provider).await;
    assert_eq!(location, "/");
    let ada = me(&browser, &cookie.unwrap()).await;
    assert_eq!(
        (
            &ada["name"],
            &ada["role"],
            &ada["organisation"],
            &ada["kind"]
        ),
        (
            &json!("ada@example.test"),
            &json!("signer"),
            &json!("acme"),
            &json!("user")
        )
    );

    // Another address, the same person; and the old address now belongs to somebody else.
    provider.is_now("s-1", "ada.lovelace@example.test");
    let (_, cookie) = browser.sign_in(&provider).await;
    assert_eq!(
        me(&browser, &cookie.unwrap()).await["name"],
        "ada@example.test"
    );
    provider.is_now("s-2", "ada@example.test");
    let (location, cookie) = browser.sign_in(&provider).await;
    assert_eq!((reason(&location), cookie), ("taken", None));

    // A password opens nothing where there is none, and a user with one is nobody's to take.
    for password in ["", PASSWORD] {
        let reply = api.log_in("ada@example.test", password).await;
        assert_eq!(reply.status(), StatusCode::UNAUTHORIZED);
    }
    api.user("root@example.test", "admin", None).await;
    provider.is_now("s-3", "root@example.test");
    let (location, cookie) = browser.sign_in(&provider).await;
    assert_eq!((reason(&location), cookie), ("taken", None));

    // An admin makes somebody who then comes from there.
    let user = json!({ "name": "grace@example.test", "role": "operator" });
    let made = api.post("/api/users", &user).await;
    assert_eq!(made.status(), StatusCode::CREATED);
    provider.lies(Lie::Userinfo);
    provider.is_now("s-4", "grace@example.test");
    let (_, cookie) = browser.sign_in(&provider).await;
    let cookie = cookie.unwrap();
    assert_eq!(me(&browser, &cookie).await["role"], "operator");
    let removed = api
        .request(Method::DELETE, "/api/users/grace@example.test")
        .send()
        .await
        .unwrap();
    assert_eq!(removed.status(), StatusCode::NO_CONTENT);
    assert_eq!(
        browser.get("/api/me", &cookie).await.status(),
        StatusCode::UNAUTHORIZED
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_is_not_proven_lets_anybody_in() {
    let provider = Provider::start().await;
    let (_home, controller) = home(&provider, "role = 'signer'\n").await;
    let browser = Browser::of(&controller.api);
    for (lie, expected) in [
        (Lie::Nonce, "provider"),
        (Lie::Audience, "provider"),
        (Lie::Party, "provider"),
        (Lie::Issuer, "provider"),
        (Lie::Expired, "provider"),
        (Lie::Key, "provider"),
        (Lie::Unsigned, "provider"),
        (Lie::Symmetric, "provider"),
        (Lie::NoToken, "provider"),
        (Lie::OtherSubject, "provider"),
        (Lie::Refuses, "provider"),
        (Lie::Endpoints, "provider"),
        (Lie::Unverified, "name"),
    ] {
        provider.lies(lie);
        let (location, cookie) = browser.sign_in(&provider).await;
        assert_eq!((reason(&location), cookie), (expected, None), "{lie:?}");
    }
    let users: Value = controller.api.get("/api/users").await.json().await.unwrap();
    assert_eq!(users, json!([]), "nobody was made");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_fits_one_attempt_of_one_browser() {
    let provider = Provider::start().await;
    let (_home, controller) = home(&provider, "role = 'signer'\n").await;
    let browser = Browser::of(&controller.api);
    // The redirect of another browser's attempt, and of none.
    let (mine, other) = (browser.begin().await, browser.begin().await);
    let redirect = |sent: &Sent| {
        format!(
            "/api/login/oidc/callback?code=x&state={}",
            sent.parameter("state")
        )
    };
    for cookie in [&other.cookie, "", "vestibule-oidc=", "a=b"] {
        let (location, got) = ended(&browser.get(&redirect(&mine), cookie).await);
        assert_eq!((reason(&location), got), ("expired", None), "{cookie}");
    }
    let denied = format!("{}&error=access_denied", redirect(&mine)).replace("code=x&", "");
    let (location, _) = ended(&browser.get(&denied, &mine.cookie).await);
    assert_eq!(reason(&location), "denied");
    let mixed = format!("{}&iss=https://another.example", redirect(&mine));
    let (location, _) = ended(&browser.get(&mixed, &mine.cookie).await);
    assert_eq!(reason(&location), "provider");
    let users: Value = controller.api.get("/api/users").await.json().await.unwrap();
    assert_eq!(users, json!([]), "nobody was made");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_provider_or_a_role_nobody_comes_by_themselves() {
    let provider = Provider::start().await;
    let (_home, controller) = home(&provider, "").await;
    let (location, cookie) = Browser::of(&controller.api).sign_in(&provider).await;
    assert_eq!((reason(&location), cookie), ("unknown", None));
    controller.stop().await;

    let home = Home::new();
    let controller = home.serve().await;
    let browser = Browser::of(&controller.api);
    let methods: Value = browser
        .get("/api/login/methods", "")
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(methods["oidc"], Value::Null);
    for path in ["/api/login/oidc", "/api/login/oidc/callback?code=x&state=y"] {
        assert_eq!(browser.get(path, "").await.status(), StatusCode::NOT_FOUND);
    }
    let user = json!({ "name": "grace", "role": "operator" });
    let reply = controller.api.post("/api/users", &user).await;
    assert_eq!(
        reply.status(),
        StatusCode::BAD_REQUEST,
        "they could not sign in"
    );
    controller.stop().await;
}
