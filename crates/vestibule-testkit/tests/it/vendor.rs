//! The fake vendor against an OAuth client of the test's own, over TLS with the test's CA: what it accepts, and above all
//! what it must refuse. The unmodified tools are tried in `vm::vendors`.
use anyhow::{Context, Result, ensure};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, StatusCode, header};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::{Url, form_urlencoded};
use vestibule_api::client;
use vestibule_testkit::{
    ca::TestCa,
    vendor::{Misbehave, Vendor},
};

const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const REDIRECT: &str = "http://127.0.0.1:1455/auth/callback";

struct Browser {
    vendor: Vendor,
    tls: TlsConnector,
    _dir: camino_tempfile::Utf8TempDir,
}

struct Page {
    status: StatusCode,
    location: Option<Url>,
    text: String,
}

impl Browser {
    async fn start() -> Result<Self> {
        let dir = camino_tempfile::tempdir()?;
        let ca = TestCa::in_dir(dir.path())?;
        let mut roots = rustls::RootCertStore::empty();
        let pem = rustls::pki_types::pem::PemObject::from_pem_slice(ca.pem().as_bytes())?;
        roots.add(pem)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            vendor: Vendor::start(&ca).await?,
            tls: TlsConnector::from(Arc::new(config)),
            _dir: dir,
        })
    }

    async fn send(
        &self,
        method: Method,
        host: &str,
        path: &str,
        form: &[(&str, &str)],
    ) -> Result<Page> {
        let tcp = TcpStream::connect(self.vendor.https()).await?;
        let name = rustls::pki_types::ServerName::try_from(host.to_owned())?;
        let stream = self.tls.connect(name, tcp).await.context("TLS")?;
        let body = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(form)
            .finish();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Full::new(Bytes::from(body)))?;
        let reply = client::send(stream, request).await?;
        let (status, headers) = (reply.status(), reply.headers().clone());
        let bytes = http_body_util::BodyExt::collect(reply.into_body())
            .await?
            .to_bytes();
        Ok(Page {
            status,
            location: headers
                .get(header::LOCATION)
                .and_then(|v| Url::parse(v.to_str().ok()?).ok()),
            text: String::from_utf8_lossy(&bytes).into_owned(),
        })
    }

    /// Asks for authorization, presses a button, and gives the redirect's query.
    async fn authorize(&self, decision: &str) -> Result<Vec<(String, String)>> {
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(VERIFIER));
        let query = form_urlencoded::Serializer::new(String::new())
            .extend_pairs([
                ("client_id", "app"),
                ("redirect_uri", REDIRECT),
                ("state", "S"),
                ("scope", "openid"),
            ])
            .append_pair("code_challenge", &challenge)
            .finish();
        let page = self
            .send(
                Method::GET,
                "auth.openai.com",
                &format!("/oauth/authorize?{query}"),
                &[],
            )
            .await?;
        ensure!(
            page.status == StatusCode::OK && page.text.contains("autofocus"),
            "{}",
            page.text
        );
        let id = page
            .text
            .split("name=id value=\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .context("the page has a form")?;
        let fields = [("id", id), ("decision", decision)];
        let done = self
            .send(Method::POST, "auth.openai.com", "/__consent", &fields)
            .await?;
        let to = done.location.context("it redirects")?;
        ensure!(to.as_str().starts_with(REDIRECT));
        Ok(to.query_pairs().into_owned().collect())
    }

    async fn redeem(
        &self,
        code: &str,
        verifier: &str,
        redirect: &str,
    ) -> Result<(StatusCode, Value)> {
        let form = [
            ("grant_type", "authorization_code"),
            ("client_id", "app"),
            ("code", code),
            ("code_verifier", verifier),
            ("redirect_uri", redirect),
        ];
        let page = self
            .send(Method::POST, "auth.openai.com", "/oauth/token", &form)
            .await?;
        Ok((page.status, serde_json::from_str(&page.text)?))
    }
}

fn get<'a>(query: &'a [(String, String)], name: &str) -> Option<&'a str> {
    query
        .iter()
        .find(|(k, _)| k == name)
        .map(|(_, v)| v.as_str())
}

#[tokio::test]
async fn a_code_is_good_once_and_only_with_its_verifier_and_redirect() -> Result<()> {
    let browser = Browser::start().await?;
    let granted = browser.authorize("allow").await?;
    assert_eq!(get(&granted, "state"), Some("S"));
    let code = get(&granted, "code").context("a code")?;
    let (status, tokens) = browser.redeem(code, VERIFIER, REDIRECT).await?;
    assert_eq!(status, StatusCode::OK);
    let issued = browser.vendor.issued();
    assert_eq!((issued.len(), issued[0].pkce), (1, true));
    assert_eq!(tokens["refresh_token"], issued[0].refresh_token.as_str());
    let (status, error) = browser.redeem(code, VERIFIER, REDIRECT).await?;
    assert_eq!(
        (status, &error["error"]),
        (StatusCode::BAD_REQUEST, &"invalid_grant".into())
    );

    for (verifier, redirect) in [
        ("wrong", REDIRECT),
        (VERIFIER, "http://127.0.0.1:9/other"),
        ("", REDIRECT),
    ] {
        let granted = browser.authorize("allow").await?;
        let code = get(&granted, "code").context("a code")?;
        assert_eq!(
            browser.redeem(code, verifier, redirect).await?.0,
            StatusCode::BAD_REQUEST
        );
    }
    assert_eq!(browser.vendor.issued().len(), 1);
    Ok(())
}

#[tokio::test]
async fn every_misbehaviour_does_what_it_says() -> Result<()> {
    let browser = Browser::start().await?;
    let denied = browser.authorize("deny").await?;
    assert_eq!(
        (get(&denied, "error"), get(&denied, "code")),
        (Some("access_denied"), None)
    );

    browser.vendor.misbehave(Misbehave::Denied);
    assert_eq!(
        get(&browser.authorize("allow").await?, "error"),
        Some("access_denied")
    );
    browser.vendor.misbehave(Misbehave::WrongState);
    assert_ne!(get(&browser.authorize("allow").await?, "state"), Some("S"));

    for (how, says) in [
        (Misbehave::VerifierRefused, "code_verifier"),
        (Misbehave::CodeExpired, "expired"),
        (Misbehave::TokenFails, "broken"),
    ] {
        browser.vendor.misbehave(how);
        let granted = browser.authorize("allow").await?;
        let (status, error) = browser
            .redeem(get(&granted, "code").context("a code")?, VERIFIER, REDIRECT)
            .await?;
        assert!(!status.is_success(), "{how:?}");
        let description = error["error_description"].as_str().unwrap_or_default();
        assert!(description.contains(says), "{how:?}: {description}");
    }

    browser.vendor.misbehave(Misbehave::SlowToken { ms: 700 });
    let granted = browser.authorize("allow").await?;
    let begin = std::time::Instant::now();
    let (status, _) = browser
        .redeem(get(&granted, "code").context("a code")?, VERIFIER, REDIRECT)
        .await?;
    assert!(status.is_success() && begin.elapsed().as_millis() >= 700);
    Ok(())
}
