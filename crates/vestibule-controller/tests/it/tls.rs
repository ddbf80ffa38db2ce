//! TLS: the certificate that is shown, its renewal, views over it, and what is not served without it.
use crate::{
    lifecycle::signing_in,
    support::{api::Api, home::Home, people::PASSWORD, wait_for},
};
use camino::Utf8Path;
use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::{Method, StatusCode, header};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use serde_json::json;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::session::Right;
use vestibule_controller::{Config, ServeError, serve_with};

pub(crate) const NAME: &str = "vestibule.test";

/// Writes a new certificate of its own for [`NAME`]; its DER bytes.
pub(crate) fn certificate(dir: &Utf8Path) -> Vec<u8> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]).unwrap();
    let der = made.cert.der().to_vec();
    let write = |name: &str, text: String| {
        use std::os::unix::fs::OpenOptionsExt as _;
        let staged = dir.join(format!("{name}.new"));
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&staged)
            .unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        std::fs::rename(staged, dir.join(name)).unwrap();
    };
    write("key.pem", made.signing_key.serialize_pem());
    write("cert.pem", made.cert.pem());
    der
}

pub(crate) fn config(home: &Home) -> String {
    let dir = home.path();
    format!("[tls]\ncertificate = '{dir}/cert.pem'\nkey = '{dir}/key.pem'\n[pool]\nbrowser = 0\n")
}

pub(crate) async fn connect(
    address: SocketAddr,
    root: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(root.to_vec().into()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(NAME).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
}

fn client(root: &[u8], address: SocketAddr) -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([reqwest::Certificate::from_der(root).unwrap()])
        .resolve(NAME, address)
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_come_by_tls_and_a_renewed_certificate_is_shown() {
    let mut home = Home::new();
    let first = certificate(home.path());
    home.configure(&format!("allowed_hosts = ['{NAME}']\n{}", config(&home)));
    let controller = home.serve().await;
    let serving = &controller.serving;
    assert!(
        serving
            .link
            .starts_with(&format!("https://{}/", serving.address)),
        "{}",
        serving.base
    );
    // The command line comes without, on loopback.
    let api = Api::new(serving.local, &controller.api.token);
    assert_ne!(serving.local, serving.address);
    let announced = std::fs::read_to_string(home.path().join("address")).unwrap();
    assert_eq!(announced.trim(), serving.local.to_string());
    let user = json!({ "name": "ada", "role": "signer", "password": PASSWORD });
    assert_eq!(
        api.post("/api/users", &user).await.status(),
        StatusCode::CREATED
    );

    let base = format!("https://{NAME}:{}", serving.address.port());
    let https = client(&first, serving.address);
    let login = https
        .post(format!("{base}/api/login/password"))
        .header(header::HOST, NAME)
        .header(header::ORIGIN, format!("https://{NAME}"))
        .json(&json!({ "name": "ada", "password": PASSWORD }))
        .send()
        .await
        .unwrap();
    assert_eq!(login.status(), StatusCode::NO_CONTENT);
    let cookie = login.headers()[header::SET_COOKIE].to_str().unwrap();
    assert!(
        cookie.starts_with("__Host-vestibule-") && cookie.contains("; Secure"),
        "{cookie}"
    );
    // Plain HTTP on the port of TLS is no request.
    let plain = Api::new(serving.address, &controller.api.token);
    assert!(plain.bare(Method::GET, "/health").send().await.is_err());

    let second = certificate(home.path());
    wait_for("the new certificate", || async {
        connect(serving.address, &second).await.ok().map(drop)
    })
    .await;
    assert!(
        connect(serving.address, &first).await.is_err(),
        "the old one is gone"
    );
    // One that is broken does not take the place of one that works.
    std::fs::write(home.path().join("cert.pem"), "nonsense").unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(connect(serving.address, &second).await.is_ok());
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_screen_is_seen_over_tls() {
    let mut home = Home::new();
    let root = certificate(home.path());
    home.configure(&config(&home));
    let controller = home.serve().await;
    let serving = controller.serving.clone();
    let api = Api::new(serving.local, &controller.api.token);
    let (id, runner) = signing_in(&home, &api).await;
    let ticket = api.ticket(id, Right::View).await;
    let stream = connect(serving.address, &root).await.unwrap();
    let url = format!(
        "ws://{}/api/auth/session/{id}/view?ticket={ticket}",
        serving.address
    );
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    match socket.next().await.unwrap().unwrap() {
        Message::Binary(bytes) => assert_eq!(&bytes[..], b"RFB 003.008\n"),
        other => panic!("{other:?}"),
    }
    let said = [
        b"RFB 003.008\n\x01\x01".as_slice(),
        &[4, 1, 0, 0, 0, 0, 0, 0x41],
        &[3, 0, 0, 0, 0, 0, 4, 0, 3, 0],
    ];
    socket
        .send(Message::Binary(said.concat().into()))
        .await
        .unwrap();
    let expected = [said[0], said[2]].concat();
    wait_for("the guest to hear it", || async {
        let heard = runner.rfb.lock().unwrap().clone();
        (heard.len() >= expected.len()).then_some(())
    })
    .await;
    assert_eq!(*runner.rfb.lock().unwrap(), expected, "no key");
    socket.close(None).await.unwrap();
    controller.stop().await;
}

/// Why a controller with this configuration does not serve.
async fn refusal(home: &Home, text: &str) -> ServeError {
    let path = home.path().join("public.toml");
    std::fs::write(&path, text).unwrap();
    let config = Config::load(Some(&path), home.path()).unwrap();
    let runners = Arc::clone(&home.runners);
    let served = serve_with(config, runners, async {}, |serving| {
        panic!("it serves on {}", serving.address);
    });
    served.await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_public_address_needs_tls_and_somebody_who_can_sign_in() {
    let mut home = Home::new();
    certificate(home.path());
    let public = "listen = '0.0.0.0:0'\n";
    let refused = refusal(&home, public).await;
    assert!(matches!(refused, ServeError::NoTls(_)), "{refused}");
    let with_tls = format!("{public}{}", config(&home));
    let refused = refusal(&home, &with_tls).await;
    assert!(matches!(refused, ServeError::Nobody(_)), "{refused}");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(home.path().join("key.pem"), open).unwrap();
    let refused = refusal(&home, &config(&home)).await;
    assert!(
        matches!(refused, ServeError::Tls(_)),
        "a key that everybody reads: {refused}"
    );
    certificate(home.path());

    home.configure("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    controller.api.service("platform", "operator", None).await;
    controller.stop().await;
    let path = home.path().join("public.toml");
    std::fs::write(&path, format!("database = '{}'\n{with_tls}", home.database)).unwrap();
    let config = Config::load(Some(&path), home.path()).unwrap();
    let (told, served) = tokio::sync::oneshot::channel();
    let runners = Arc::clone(&home.runners);
    serve_with(config, runners, async {}, |serving| {
        told.send(serving.address).unwrap();
    })
    .await
    .unwrap();
    assert!(served.await.unwrap().ip().is_unspecified());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_pages_that_are_named_show_the_dashboard_in_a_frame() {
    let home = Home::with(
        "frame_ancestors = ['https://app.example.com', 'https://other.example']\n[pool]\nbrowser = 0\n",
    );
    let controller = home.serve().await;
    for path in ["/", "/health"] {
        let reply = controller.api.get(path).await;
        let policy = reply.headers()["content-security-policy"]
            .to_str()
            .unwrap()
            .to_owned();
        assert!(
            policy.ends_with("frame-ancestors https://app.example.com https://other.example"),
            "{policy}"
        );
        assert!(!reply.headers().contains_key("x-frame-options"));
    }
    controller.stop().await;
}
