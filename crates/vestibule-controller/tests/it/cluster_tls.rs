//! Two controllers that reach each other by TLS, with certificates of an authority of their own.
use crate::{
    cluster::{both_answer, session_path, view_works},
    lifecycle::{FILE, SECRET, nothing_left, signing_in},
    support::{
        api::Api,
        home::{Controller, Home},
    },
    tls::{NAME, connect},
};
use futures_util::StreamExt as _;
use reqwest::StatusCode;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::session::{Right, SessionState};
use vestibule_testkit::{ca::TestCa, postgres};

/// The first byte of a TLS record with a handshake (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;

/// The address at which a host is reached by the others. Who answers there is the test's to say.
struct Way {
    address: SocketAddr,
    to: watch::Sender<Option<SocketAddr>>,
    /// Connections that came, and those of them that began with a handshake.
    came: Arc<[AtomicUsize; 2]>,
    task: JoinHandle<()>,
}

impl Way {
    async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (to, target) = watch::channel(None);
        let came = Arc::<[AtomicUsize; 2]>::default();
        let counted = Arc::clone(&came);
        let task = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, counted) = (*target.borrow(), Arc::clone(&counted));
                tokio::spawn(async move {
                    let mut first = [0];
                    near.peek(&mut first).await.unwrap();
                    counted[0].fetch_add(1, Ordering::Relaxed);
                    counted[1].fetch_add(usize::from(first == [HANDSHAKE]), Ordering::Relaxed);
                    let mut far = TcpStream::connect(target.unwrap()).await.unwrap();
                    drop(copy_bidirectional(&mut near, &mut far).await);
                });
            }
        });
        Self {
            address,
            to,
            came,
            task,
        }
    }

    fn leads_to(&self, address: SocketAddr) {
        self.to.send_replace(Some(address));
    }

    fn came(&self) -> [usize; 2] {
        [0, 1].map(|which| self.came[which].load(Ordering::Relaxed))
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A controller by TLS, and its home.
async fn host(database: &str, name: &str, ca: &TestCa, way: &Way) -> (Home, Controller, Api) {
    let mut home = Home::on(database, "");
    let dir = home.path();
    ca.write_server(&[NAME, "127.0.0.1"], dir).unwrap();
    let key = dir.join("cluster.key");
    std::fs::write(&key, "k".repeat(40)).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let config = format!(
        "[pool]\nbrowser = 0\n[tls]\ncertificate = '{dir}/cert.pem'\nkey = '{dir}/key.pem'\n\
         [cluster]\nname = '{name}'\naddress = 'https://{}'\nkey_file = '{key}'\nca = '{}'\n",
        way.address,
        ca.path(),
    );
    home.configure(&config);
    if name != "a" {
        // Every session is placed on the first, because the others have no place.
        home.remove_alias();
    }
    let controller = home.serve().await;
    way.leads_to(controller.serving.address);
    let api = Api::new(controller.serving.local, &controller.api.token);
    (home, controller, api)
}

/// Somebody with a certificate of this authority, who is spoken to once. Whether the handshake failed.
async fn impostor(ca: &TestCa) -> (SocketAddr, JoinHandle<bool>) {
    let acceptor = TlsAcceptor::from(ca.server(&[NAME, "127.0.0.1"]).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let refused = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        acceptor.accept(tcp).await.is_err()
    });
    (address, refused)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn controllers_relay_by_tls_and_to_nobody_else() {
    let authorities = camino_tempfile::tempdir().unwrap();
    let authority = |name: &str| TestCa::in_dir(&authorities.path().join(name)).unwrap();
    let (ours, another) = (authority("ours"), authority("another"));
    let database = postgres::cluster().database();
    let (way_a, way_b) = (Way::open().await, Way::open().await);
    let (home_a, a, api_a) = host(&database, "a", &ours, &way_a).await;
    let (_home_b, b, api_b) = host(&database, "b", &ours, &way_b).await;
    let (id, runner) = signing_in(&home_a, &api_a).await;

    // Requests, events and views by the controller that has nothing of it.
    view_works(&api_b, id, &runner).await;
    both_answer(&api_a, &api_b, id, &runner).await;
    let ticket = api_b.ticket(id, Right::View).await;
    let root = CertificateDer::from_pem_slice(ours.pem().as_bytes()).unwrap();
    let stream = connect(b.serving.address, &root).await.unwrap();
    let url = format!("ws://{}{}", b.serving.address, session_path(id, "/view"));
    let (mut view, _) = tokio_tungstenite::client_async(format!("{url}?ticket={ticket}"), stream)
        .await
        .unwrap();
    match view.next().await.unwrap().unwrap() {
        Message::Binary(bytes) => assert_eq!(&bytes[..], b"RFB 003.008\n"),
        other => panic!("{other:?}"),
    }
    view.close(None).await.unwrap();
    let [came, by_tls] = way_a.came();
    assert!(came > 0 && came == by_tls, "{by_tls} of {came} by TLS");

    // Whoever has the host's address, and no certificate of theirs.
    let (address, refused) = impostor(&another).await;
    way_a.leads_to(address);
    let wanted = json!({ "right": "view" });
    let reply = api_b.post(&session_path(id, "/tickets"), &wanted).await;
    assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE);
    let body: Value = reply.json().await.unwrap();
    let text = |key: &str| body["error"][key].as_str().unwrap().to_owned();
    let message = text("message");
    let clear = message.contains("host `a`") && message.contains("its certificate is not trusted");
    assert!(clear && text("fix").contains("cluster.ca"), "{body}");
    assert!(refused.await.unwrap(), "it was told nothing");

    way_a.leads_to(a.serving.address);
    view_works(&api_b, id, &runner).await;
    runner.capture(FILE, SECRET);
    api_b.until(id, SessionState::Completed).await;
    nothing_left(&home_a).await;
    a.stop().await;
    b.stop().await;
}
