//! Two controllers, each on a host of its own, on one PostgreSQL database.
use crate::{
    lifecycle::{FILE, SECRET, nothing_left, signing_in},
    pool::{ready, stocked},
    support::{
        api::{Api, bytes, closed},
        home::{Controller, Home},
        runner::Runner,
        wait_for,
    },
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use futures_util::SinkExt as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::{
    os::unix::fs::PermissionsExt as _,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::{
    agent::LoginEvent,
    ids::SessionId,
    session::{CloseCode, Right, SessionEvent, SessionEventKind, SessionState, StartReply},
};
use vestibule_testkit::postgres;

/// Two homes on one database.
pub(crate) struct Hosts {
    database: String,
    pub(crate) a: Home,
    pub(crate) b: Home,
}

impl Hosts {
    /// With further keys of `[cluster]`, and further configuration before it.
    pub(crate) fn new(cluster: &str, config: &str) -> Self {
        let database = postgres::cluster().database();
        let home = |name: &str| {
            let mut home = Home::on(&database, "");
            let key = home.path().join("cluster.key");
            std::fs::write(&key, "k".repeat(40)).unwrap();
            std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
            home.configure(&format!(
                "{config}\n[pool]\nbrowser = 0\n[cluster]\nname = '{name}'\nkey_file = '{key}'\n{cluster}\n"
            ));
            home
        };
        let (a, b) = (home("a"), home("b"));
        Self { database, a, b }
    }

    /// The name of the database.
    fn name(&self) -> &str {
        let name = self.database.trim_start_matches("postgres:///");
        name.split('?').next().unwrap()
    }

    fn sql(&self, sql: &str) {
        postgres::cluster().psql(&self.database, sql);
    }
}

pub(crate) fn session_path(id: SessionId, rest: &str) -> String {
    format!("/api/auth/session/{id}{rest}")
}

/// Every byte that a viewer by way of `api` sends and gets.
pub(crate) async fn view_works(api: &Api, id: SessionId, runner: &Arc<Runner>) {
    runner.rfb.lock().unwrap().clear();
    let mut view = api.view(id, Right::Control).await;
    assert_eq!(bytes(&mut view).await.unwrap(), b"RFB 003.008\n");
    let said = b"RFB 003.008\n\x01\x01\x04\x01\0\0\0\0\0A".to_vec();
    view.send(Message::Binary(said.clone().into()))
        .await
        .unwrap();
    wait_for("the guest to hear it", || async {
        (*runner.rfb.lock().unwrap() == said).then_some(())
    })
    .await;
    view.close(None).await.unwrap();
    let ticket = api.ticket(id, Right::View).await;
    let mut terminal = api.socket(id, "terminal", &ticket).await;
    assert_eq!(bytes(&mut terminal).await.unwrap(), b"right=view");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_placed_on_both_and_answered_by_either() {
    let hosts = Hosts::new("", "[limits]\nvms = 1");
    let (a, b) = (hosts.a.serve().await, hosts.b.serve().await);
    // One place each: both asked for at one controller.
    let (first, second) = (a.api.start("codex").await, a.api.start("codex").await);
    let mut on = Vec::new();
    for id in [first, second] {
        let machine = a.api.machine(id).await;
        let runner = wait_for("the runner", || async {
            let runners = [&hosts.a, &hosts.b].map(|home| home.runners.get(machine));
            runners.into_iter().flatten().next()
        })
        .await;
        runner.up();
        b.api.until(id, SessionState::AwaitingUser).await;
        on.push(hosts.a.runners.get(machine).is_some());
        view_works(&a.api, id, &runner).await;
        view_works(&b.api, id, &runner).await;
        both_answer(&a.api, &b.api, id, &runner).await;
    }
    assert_eq!(
        on.iter().filter(|on_a| **on_a).count(),
        1,
        "one on each host"
    );
    let listed = b.api.json("/api/hosts").await;
    let hosts_of = listed.as_array().unwrap().iter();
    let live = hosts_of.filter(|host| host["state"] == "live" && host["machines"] == 1);
    assert_eq!(live.count(), 2, "{listed}");
    for id in [first, second] {
        let machine = a.api.machine(id).await;
        let runners = [&hosts.a, &hosts.b].map(|home| home.runners.get(machine));
        runners
            .into_iter()
            .flatten()
            .next()
            .unwrap()
            .capture(FILE, SECRET);
        let view = a.api.until(id, SessionState::Completed).await;
        let credential = view.credential_id.unwrap();
        for api in [&a.api, &b.api] {
            let path = format!("/api/credentials/{credential}/content");
            let reply = api.post(&path, &json!({ "purpose": "test" })).await;
            assert_eq!(reply.status(), StatusCode::OK);
            let body: Value = reply.json().await.unwrap();
            assert_eq!(body["files"][0]["content"], BASE64.encode(SECRET));
        }
    }
    for api in [&a.api, &b.api] {
        let list = api.json("/api/credentials").await;
        assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
    }
    nothing_left(&hosts.a).await;
    nothing_left(&hosts.b).await;
    a.stop().await;
    b.stop().await;
}

/// What only the session's host knows is answered by both.
pub(crate) async fn both_answer(a: &Api, b: &Api, id: SessionId, runner: &Arc<Runner>) {
    let before = a.events(id, 0, |events| events.len() >= 4).await.len();
    let follow = |api: &Api| {
        let api = api.clone();
        tokio::spawn(async move {
            let code = |event: &SessionEvent| match &event.event {
                SessionEventKind::UserCode { code } => Some(code.clone()),
                _ => None,
            };
            let after = u64::try_from(before).unwrap();
            let events = api.events(id, after, |events| {
                events.iter().any(|event| code(event).is_some())
            });
            events.await.iter().find_map(code).unwrap()
        })
    };
    let codes = [follow(a), follow(b)];
    runner.login(LoginEvent::UserCode {
        code: "WXYZ-9876".to_owned(),
    });
    for code in codes {
        assert_eq!(code.await.unwrap(), "WXYZ-9876", "by the events of both");
    }
    let machine = a.machine(id).await;
    for api in [a, b] {
        let view = api.session(id).await;
        assert_eq!(view.user_code.as_deref(), Some("WXYZ-9876"));
        let report = api.json(&format!("/api/vms/{machine}/report")).await;
        assert_eq!(report["kernel"], "6.1-live");
        let console = api.get(&format!("/api/vms/{machine}/console")).await;
        assert!(console.text().await.unwrap().contains("Linux version"));
        // The views of either end by the word of either.
        let mut seen = b.view(id, Right::View).await;
        assert!(bytes(&mut seen).await.is_some());
        let path = session_path(id, "/tickets");
        let reply = api.request(Method::DELETE, &path).send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::NO_CONTENT);
        assert_eq!(closed(&mut seen).await.0, CloseCode::Revoked as u16);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_comes_back_goes_on() {
    let hosts = Hosts::new("", "");
    let (a, b) = on_a(&hosts).await;
    let (id, runner) = signing_in(&hosts.a, &a.api).await;
    a.kill().await;
    let reply = b
        .api
        .post(&session_path(id, "/tickets"), &json!({ "right": "view" }))
        .await;
    assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE);
    let body: Value = reply.json().await.unwrap();
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("host `a`"), "{body}");
    assert!(
        body["error"]["fix"]
            .as_str()
            .unwrap()
            .contains("vestibule serve"),
        "{body}"
    );
    let row = b.api.session(id).await;
    assert_eq!(row.state, SessionState::AwaitingUser, "what the rows know");
    let a = hosts.a.serve().await;
    view_works(&b.api, id, &runner).await;
    runner.capture(FILE, SECRET);
    b.api.until(id, SessionState::Completed).await;
    nothing_left(&hosts.a).await;
    a.stop().await;
    b.stop().await;
}

/// Both serve, and sessions are placed on the first, because the second has no place.
pub(crate) async fn on_a(hosts: &Hosts) -> (Controller, Controller) {
    std::fs::remove_file(hosts.b.path().join("aliases/browser")).unwrap();
    (hosts.a.serve().await, hosts.b.serve().await)
}

/// Its image is on the other host alone, which is full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_another_host_takes_nothing_from_this_ones_pool() {
    let mut hosts = Hosts::new("", "[limits]\nvms = 2");
    hosts.a.reconfigure("browser = 0", "browser = 1");
    hosts.a.snapshot(&hosts.a.publish("6.1"));
    let aliases = hosts.b.path().join("aliases");
    std::fs::rename(aliases.join("browser"), aliases.join("other")).unwrap();
    let (a, b) = (hosts.a.serve().await, hosts.b.serve().await);
    let pooled = stocked(&hosts.a, &a.api, 1).await.remove(0);
    let body = json!({ "provider": "codex", "image": "other" });
    let mut ids = Vec::new();
    for _ in 0..3 {
        let reply = b.api.post("/api/auth/start", &body).await;
        assert_eq!(reply.status(), StatusCode::CREATED);
        ids.push(reply.json::<StartReply>().await.unwrap().session_id);
    }
    let told = |events: &[SessionEvent]| {
        let words = "another host: its image can't be used on `a`";
        format!("{events:?}").contains(words)
    };
    let waits = ids[2];
    a.api.events(waits, 0, told).await;
    assert_eq!(*pooled.stops.lock().unwrap(), Vec::<String>::new());
    // Nor does it keep the pool from being filled again.
    pooled.die();
    let again = wait_for("another VM in the pool", || async { ready(&hosts.a).pop() }).await;
    assert_ne!(again.spec.machine_id, pooled.spec.machine_id);
    assert_eq!(a.api.session(waits).await.state, SessionState::Placing);
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_does_not_come_back_loses_its_sessions() {
    let hosts = Hosts::new("lease_s = 3\nlost_after_s = 3", "");
    let (a, b) = on_a(&hosts).await;
    let (id, runner) = signing_in(&hosts.a, &a.api).await;
    a.kill().await;
    let view = b.api.until(id, SessionState::Failed).await;
    let finding = view.failure.unwrap().finding.unwrap();
    assert_eq!(finding.cause.id(), "host-lost");
    assert!(
        finding.retryable && finding.evidence[0].text.contains("`a`"),
        "{finding:?}"
    );
    assert!(runner.is_alive());
    let listed = b.api.json("/api/hosts").await;
    assert!(
        listed
            .as_array()
            .unwrap()
            .iter()
            .any(|host| host["state"] == "lost"),
        "{listed}"
    );
    // When it comes back, it ends what nobody has any more.
    let a = hosts.a.serve().await;
    nothing_left(&hosts.a).await;
    assert_eq!(*runner.stops.lock().unwrap(), ["session failed"]);
    let again = a.api.start("codex").await;
    a.api.machine(again).await;
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_never_comes_back_is_removed() {
    let hosts = Hosts::new("lease_s = 3\nlost_after_s = 3", "");
    let (a, b) = on_a(&hosts).await;
    let (id, _runner) = signing_in(&hosts.a, &a.api).await;
    let of_a = |listed: &Value| {
        let hosts = listed.as_array().unwrap();
        let host = hosts.iter().find(|host| host["name"] == "a");
        host.map(|host| format!("/api/hosts/{}", host["hostId"].as_str().unwrap()))
    };
    let path = of_a(&b.api.json("/api/hosts").await).unwrap();
    let forget = async || {
        let request = b.api.request(Method::DELETE, &path);
        request.send().await.unwrap().status()
    };
    assert_eq!(forget().await, StatusCode::CONFLICT, "it is live");
    a.kill().await;
    b.api.until(id, SessionState::Failed).await;
    let removed = wait_for("the removal", || async {
        Some(forget().await).filter(|status| *status != StatusCode::CONFLICT)
    });
    assert_eq!(removed.await, StatusCode::NO_CONTENT);
    assert_eq!(of_a(&b.api.json("/api/hosts").await), None);
    assert_eq!(b.api.json("/api/vms").await, json!([]));
    // Should it come back all the same, it is a host like a new one, and ends what it finds.
    let a = hosts.a.serve().await;
    nothing_left_of_strangers(&hosts.a).await;
    a.stop().await;
    b.stop().await;
}

/// As [`nothing_left`]; its runner was asked to end, whatever the rows say.
async fn nothing_left_of_strangers(home: &Home) {
    wait_for("the runner's end", || async {
        (home.runners.count_alive() == 0).then_some(())
    })
    .await;
}

/// Its lease is taken by somebody else: the controller begins nothing until it has it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_without_its_lease_does_nothing() {
    let hosts = Hosts::new("lease_s = 4", "");
    let a = hosts.a.serve().await;
    let lease = async || {
        let ready = a.api.get("/ready").await.json::<Value>().await.unwrap();
        let checks = ready["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == "lease");
        check.unwrap()["ok"].as_bool().unwrap()
    };
    wait_for("the lease", || async { lease().await.then_some(()) }).await;
    hosts.sql(
        "UPDATE host SET home = 'elsewhere', generation = generation + 1, \
         lease_until = lease_until + 3600000000",
    );
    wait_for("the loss of the lease", || async {
        (!lease().await).then_some(())
    })
    .await;
    let id = a.api.start("codex").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(a.api.session(id).await.state, SessionState::Requested);
    assert_eq!(hosts.a.runners.count_alive(), 0);
    hosts.sql("UPDATE host SET lease_until = 0");
    wait_for("the lease", || async { lease().await.then_some(()) }).await;
    a.api.machine(id).await;
    a.stop().await;
}

/// One controller alone can't reach the database: the other ends its sign-ins, and it ends their VMs when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_is_cut_off_comes_back_and_ends_what_was_given_up() {
    let mut hosts = Hosts::new("lease_s = 3\nlost_after_s = 3", "");
    let role = format!("only_{}", hosts.name());
    hosts.sql(&format!("CREATE ROLE {role} SUPERUSER LOGIN"));
    hosts.a.database = hosts
        .database
        .replace("user=postgres", &format!("user={role}"));
    let (a, b) = on_a(&hosts).await;
    let (id, runner) = signing_in(&hosts.a, &a.api).await;
    hosts.sql(&format!("ALTER ROLE {role} NOLOGIN"));
    hosts.sql(&format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"
    ));
    let reply = a
        .api
        .post("/api/auth/start", &json!({ "provider": "codex" }))
        .await;
    assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE);
    let body: Value = reply.json().await.unwrap();
    assert!(
        body["error"]["message"]
            .as_str()
            .unwrap()
            .contains("can't be reached"),
        "{body}"
    );
    let view = b.api.until(id, SessionState::Failed).await;
    assert_eq!(
        view.failure.unwrap().finding.unwrap().cause.id(),
        "host-lost"
    );
    assert!(runner.is_alive(), "its controller is cut off");
    // What its runner says meanwhile comes too late.
    runner.capture(FILE, SECRET);
    hosts.sql(&format!("ALTER ROLE {role} LOGIN"));
    nothing_left(&hosts.a).await;
    assert_eq!(b.api.session(id).await.state, SessionState::Failed);
    assert_eq!(b.api.json("/api/credentials").await, json!([]));
    a.stop().await;
    b.stop().await;
}

/// A copy of a home is not the home: two controllers would end each other's VMs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_home_is_refused() {
    let hosts = Hosts::new("lease_s = 5", "");
    let a = hosts.a.serve().await;
    let id = std::fs::read(hosts.a.path().join("host-id")).unwrap();
    std::fs::write(hosts.b.path().join("host-id"), id).unwrap();
    let err = hosts.b.refused().await;
    assert!(err.contains("another copy of its home directory"), "{err}");
    a.stop().await;
    let b = hosts.b.serve().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_controllers_of_the_cluster_speak_for_others() {
    let hosts = Hosts::new("", "");
    let (a, b) = on_a(&hosts).await;
    let (id, _runner) = signing_in(&hosts.a, &a.api).await;
    let admin = BASE64.encode(
        r#"{"kind":"local","id":"local","name":"local","role":"admin","organisation":null}"#,
    );
    for signature in ["", "1.2.3", "nonsense"] {
        let request = a.api.bare(Method::GET, &session_path(id, ""));
        let request = request
            .header("vestibule-caller", &admin)
            .header("vestibule-signature", signature);
        assert_eq!(
            request.send().await.unwrap().status(),
            StatusCode::FORBIDDEN,
            "{signature}"
        );
    }
    let request = a
        .api
        .bare(Method::GET, &session_path(id, ""))
        .header("vestibule-caller", &admin);
    assert_eq!(
        request.send().await.unwrap().status(),
        StatusCode::UNAUTHORIZED
    );
    // What is out of reach is so by every way.
    let (stranger, _) = b.api.service("stranger", "signer", None).await;
    for path in [
        session_path(id, ""),
        format!("/api/vms/{}", a.api.machine(id).await),
    ] {
        let status = stranger.get(&path).await.status();
        assert!(
            matches!(status, StatusCode::NOT_FOUND | StatusCode::FORBIDDEN),
            "{path}: {status}"
        );
    }
    // A token that is revoked at one controller ends what it opened at the other.
    let (watcher, token) = b.api.service("watcher", "operator", None).await;
    let watching = Api::new(a.api.address, &watcher.token);
    let events = tokio::spawn(async move { watching.events(id, 0, |_| false).await.len() });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!events.is_finished());
    let reply = b
        .api
        .request(Method::DELETE, &format!("/api/tokens/{token}"))
        .send();
    assert_eq!(reply.await.unwrap().status(), StatusCode::NO_CONTENT);
    tokio::time::timeout(Duration::from_secs(2), events)
        .await
        .unwrap()
        .unwrap();
    a.stop().await;
    b.stop().await;
}

/// The database goes away for a while: everybody hears so by name, and sign-ins go on when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_takes_no_changes_is_named() {
    let hosts = Hosts::new("", "");
    let a = hosts.a.serve().await;
    let (id, runner) = signing_in(&hosts.a, &a.api).await;
    let name = hosts.name();
    hosts.sql(&format!(
        "ALTER DATABASE {name} SET default_transaction_read_only = on"
    ));
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
    hosts.sql(end);
    let refused = wait_for("the refusal", || async {
        let reply = a
            .api
            .post("/api/auth/start", &json!({ "provider": "codex" }))
            .await;
        let status = reply.status();
        let body: Value = reply.json().await.unwrap();
        let message = body["error"]["message"].as_str()?.to_owned();
        (status == StatusCode::SERVICE_UNAVAILABLE && message.contains("takes no changes"))
            .then_some(body)
    });
    assert_eq!(refused.await["error"]["code"], "unavailable");
    runner.capture(FILE, SECRET);
    // From another database: in this one every transaction is read-only.
    let other = hosts.database.replacen(name, "postgres", 1);
    let sql = format!("ALTER DATABASE {name} RESET default_transaction_read_only");
    postgres::cluster().psql(&other, &sql);
    hosts.sql(end);
    a.api.until(id, SessionState::Completed).await;
    nothing_left(&hosts.a).await;
    a.stop().await;
}

/// What the relay costs: `--ignored --nocapture` prints it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn a_relayed_round_trip() {
    let hosts = Hosts::new("", "");
    let (a, b) = on_a(&hosts).await;
    let (id, _runner) = signing_in(&hosts.a, &a.api).await;
    for (way, api) in [("direct", &a.api), ("relayed", &b.api)] {
        let ticket = api.ticket(id, Right::Control).await;
        let begun = Instant::now();
        let mut terminal = api.socket(id, "terminal", &ticket).await;
        bytes(&mut terminal).await.unwrap();
        let opened = begun.elapsed();
        let mut times = Vec::new();
        for _ in 0..2000 {
            let begun = Instant::now();
            terminal
                .send(Message::Binary(b"x".to_vec().into()))
                .await
                .unwrap();
            bytes(&mut terminal).await.unwrap();
            times.push(begun.elapsed());
        }
        times.sort();
        eprintln!(
            "{way}: open {opened:?}, round trip p50 {:?}, p99 {:?}",
            times[1000], times[1980]
        );
    }
    a.stop().await;
    b.stop().await;
}
