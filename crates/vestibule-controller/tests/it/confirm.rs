//! A sign-in is for one person: the account is confirmed before anything enters the vault, and views are the owner's to
//! give and to take back.
use crate::{
    lifecycle::{FILE, SECRET, nothing_left},
    support::{
        api::{Api, bytes, closed},
        home::Home,
        people::Person,
        runner::Runner,
        wait_for,
    },
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::Utf8Path;
use futures_util::SinkExt as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::{
    cause::Cause,
    ids::SessionId,
    session::{CloseCode, Right, SessionEventKind, SessionState, TicketReply},
};

const CONFIG: &str = "[pool]\nbrowser = 0\n";

async fn signing_in(home: &Home, api: &Api, person: &Person) -> (SessionId, Arc<Runner>) {
    let reply = person
        .post("/api/auth/start", &json!({ "provider": "codex" }))
        .await;
    let reply: Value = reply.json().await.unwrap();
    let id: SessionId = reply["sessionId"].as_str().unwrap().parse().unwrap();
    let runner = home.runner(api.machine(id).await).await;
    runner.up();
    api.until(id, SessionState::AwaitingUser).await;
    (id, runner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_enters_the_vault_before_the_owner_has_confirmed_the_account() {
    let home = Home::with(CONFIG);
    let controller = home.serve().await;
    let api = &controller.api;
    let ada = api.user("ada", "signer", None).await;
    let eve = api.user("eve", "operator", None).await;
    let (id, runner) = signing_in(&home, api, &ada).await;
    let confirm = format!("/api/auth/session/{id}/confirm");
    let right = json!({ "account": "ada@example.org" });
    assert_eq!(
        ada.post(&confirm, &right).await.status(),
        StatusCode::CONFLICT,
        "too early"
    );
    runner.capture(FILE, SECRET);
    let view = api.until(id, SessionState::Confirming).await;
    assert!(view.confirm_account && view.credential_id.is_none() && view.viewable);
    assert_eq!(view.account.as_deref(), Some("ada@example.org"), "shown");

    let wrong = json!({ "account": "eve@example.org" });
    assert_eq!(
        ada.post(&confirm, &wrong).await.status(),
        StatusCode::CONFLICT
    );
    assert_eq!(
        ada.post(&confirm, &json!({})).await.status(),
        StatusCode::CONFLICT,
        "no account is another one"
    );
    assert_eq!(
        eve.post(&confirm, &right).await.status(),
        StatusCode::NOT_FOUND,
        "an operator"
    );
    assert_eq!(
        api.post(&confirm, &right).await.status(),
        StatusCode::NOT_FOUND,
        "the admin"
    );
    assert_eq!(
        api.json("/api/credentials").await,
        json!([]),
        "nothing in the vault"
    );

    assert_eq!(ada.post(&confirm, &right).await.status(), StatusCode::OK);
    let view = api.until(id, SessionState::Completed).await;
    assert!(view.credential_id.is_some());
    assert_eq!(
        ada.post(&confirm, &right).await.status(),
        StatusCode::CONFLICT,
        "again"
    );
    let mine: Value = ada.get("/api/credentials").await.json().await.unwrap();
    assert_eq!(mine[0]["account"], "ada@example.org");
    nothing_left(&home).await;
    controller.stop().await;
}

/// Two tabs: whoever is told that the account is confirmed finds it so in the timeline, whatever the other one did.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_confirmation_that_comes_after_a_cancel_is_refused() {
    let home = Home::with(CONFIG);
    let controller = home.serve().await;
    let api = &controller.api;
    let ada = api.user("ada", "signer", None).await;
    for _ in 0..12 {
        let (id, runner) = signing_in(&home, api, &ada).await;
        runner.capture(FILE, SECRET);
        api.until(id, SessionState::Confirming).await;
        let right = json!({ "account": "ada@example.org" });
        let (confirm, cancel) = (
            format!("/api/auth/session/{id}/confirm"),
            format!("/api/auth/session/{id}/cancel"),
        );
        let none = json!({});
        let (told, _) = tokio::join!(ada.post(&confirm, &right), ada.post(&cancel, &none));
        let events = api.events(id, 0, |_| false).await;
        let confirmed = events.iter().any(|event| {
            matches!(event.event, SessionEventKind::State { state, .. } if state == SessionState::Capturing)
        });
        let expected = if confirmed {
            StatusCode::OK
        } else {
            StatusCode::CONFLICT
        };
        assert_eq!(told.status(), expected, "{events:?}");
    }
    nothing_left(&home).await;
    controller.stop().await;
}

/// What the owner confirmed is what was shown. Between that and the hand-over an agent may turn to another account.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_of_another_account_than_confirmed_is_refused() {
    let home = Home::with(CONFIG);
    let controller = home.serve().await;
    let api = &controller.api;
    let ada = api.user("ada", "signer", None).await;
    for other in [Some("eve@example.org"), None] {
        let (id, runner) = signing_in(&home, api, &ada).await;
        runner.capture(FILE, SECRET);
        let view = api.until(id, SessionState::Confirming).await;
        assert_eq!(view.account.as_deref(), Some("ada@example.org"));
        *runner.account.lock().unwrap() = other.map(str::to_owned);
        let right = json!({ "account": "ada@example.org" });
        let confirm = format!("/api/auth/session/{id}/confirm");
        assert_eq!(ada.post(&confirm, &right).await.status(), StatusCode::OK);
        let view = api.until(id, SessionState::Failed).await;
        assert_eq!(view.credential_id, None);
        let finding = view.failure.unwrap().finding.unwrap();
        assert_eq!(finding.cause, Cause::CredentialInvalid);
        let quote = &finding.evidence[0].text;
        assert!(
            quote.contains("another one than its owner confirmed"),
            "{quote}"
        );
        let evidence = home.evidence(view.machine_id.unwrap());
        wait_for("the evidence", || async {
            evidence.join("verdict.json").exists().then_some(())
        })
        .await;
    }
    nothing_left(&home).await;
    assert_eq!(api.json("/api/credentials").await, json!([]));
    let records = home.path().join("vault/records");
    assert_eq!(
        records.read_dir_utf8().unwrap().count(),
        0,
        "no record, and none on its way"
    );
    let audit = std::fs::read_to_string(home.path().join("vault/audit.log")).unwrap();
    assert!(!audit.contains("\"stored\""), "{audit}");
    for secret in [SECRET, BASE64.encode(SECRET).as_bytes(), b"eve@example.org"] {
        assert!(!home.stores(secret));
        assert_eq!(files_with(home.path(), secret), [""; 0], "{secret:?}");
    }
    // So that the search is known to find what is there.
    assert_ne!(files_with(home.path(), b"ada@example.org"), [""; 0]);
    controller.stop().await;
}

/// Paths below `dir` of files that hold these bytes.
fn files_with(dir: &Utf8Path, bytes: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in dir.read_dir_utf8().unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(files_with(entry.path(), bytes));
        } else if kind.is_file() {
            let held = std::fs::read(entry.path()).unwrap();
            if held.windows(bytes.len()).any(|window| window == bytes) {
                found.push(entry.path().to_string());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forwarded_sign_in_captures_nothing() {
    let home = Home::with(&format!("{CONFIG}[deadlines]\nconfirm_s = 1\n"));
    let controller = home.serve().await;
    let api = &controller.api;
    let ada = api.user("ada", "signer", None).await;
    let eve = api.user("eve", "signer", None).await;
    // The link alone: for anybody else there is no such session.
    let (id, runner) = signing_in(&home, api, &ada).await;
    for path in ["", "/events"] {
        let reply = eve.get(&format!("/api/auth/session/{id}{path}")).await;
        assert_eq!(reply.status(), StatusCode::NOT_FOUND, "{path}");
    }
    let ticket = eve
        .post(
            &format!("/api/auth/session/{id}/tickets"),
            &json!({ "right": "view" }),
        )
        .await;
    assert_eq!(ticket.status(), StatusCode::NOT_FOUND);
    // Somebody else signed in, and the owner says no.
    runner.capture(FILE, SECRET);
    api.until(id, SessionState::Confirming).await;
    let cancel = ada
        .post(&format!("/api/auth/session/{id}/cancel"), &json!({}))
        .await;
    assert_eq!(cancel.status(), StatusCode::OK);
    // Or says nothing.
    let (late, runner) = signing_in(&home, api, &ada).await;
    runner.capture(FILE, SECRET);
    let view = api.until(late, SessionState::Expired).await;
    assert!(view.failure.is_some());
    assert_eq!(api.json("/api/credentials").await, json!([]));
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_vm_loses_what_was_not_confirmed_and_a_restart_does_not() {
    let home = Home::with(&format!("confirm_account = 'always'\n{CONFIG}"));
    let controller = home.serve().await;
    let (id, runner) = crate::lifecycle::signing_in(&home, &controller.api).await;
    runner.capture(FILE, SECRET);
    controller.api.until(id, SessionState::Confirming).await;
    controller.kill().await;
    let controller = home.serve().await;
    let api = &controller.api;
    let view = api.until(id, SessionState::Confirming).await;
    let confirm = json!({ "account": view.account });
    let reply = api
        .post(&format!("/api/auth/session/{id}/confirm"), &confirm)
        .await;
    assert_eq!(
        reply.status(),
        StatusCode::OK,
        "the local admin's own, where that is configured"
    );
    api.until(id, SessionState::Completed).await;

    let (id, runner) = crate::lifecycle::signing_in(&home, api).await;
    runner.capture(FILE, SECRET);
    api.until(id, SessionState::Confirming).await;
    runner.die();
    let view = api.until(id, SessionState::Failed).await;
    assert!(view.credential_id.is_none() && view.failure.is_some());
    controller.stop().await;
}

async fn ticket(person: &Person, id: SessionId, right: &str, who: Option<&str>) -> String {
    let body = json!({ "right": right, "who": who });
    let reply = person
        .post(&format!("/api/auth/session/{id}/tickets"), &body)
        .await;
    assert_eq!(reply.status(), StatusCode::CREATED);
    reply.json::<TicketReply>().await.unwrap().ticket
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owner_sees_who_watches_and_ends_it_within_a_second() {
    let home = Home::with(CONFIG);
    let controller = home.serve().await;
    let api = &controller.api;
    let ada = api.user("ada", "signer", None).await;
    for old in [false, true] {
        let (id, runner) = signing_in(&home, api, &ada).await;
        runner.old.store(old, Ordering::Relaxed);
        let own = ticket(&ada, id, "control", None).await;
        let help = ticket(&ada, id, "view", Some("Grace of support")).await;
        let unused = ticket(&ada, id, "control", None).await;
        let mut screen = api.socket(id, "view", &own).await;
        assert!(bytes(&mut screen).await.is_some());
        let mut watching = api.socket(id, "view", &help).await;
        assert!(bytes(&mut watching).await.is_some());
        let mut terminal = api
            .socket(id, "terminal", &ticket(&ada, id, "control", None).await)
            .await;
        let viewers = wait_for("three viewers", || async {
            let viewers = api.session(id).await.viewers;
            (viewers.len() == 3).then_some(viewers)
        })
        .await;
        let names: Vec<_> = viewers.iter().map(|viewer| viewer.who.as_str()).collect();
        assert_eq!(names, ["ada", "Grace of support", "ada"]);

        let begun = Instant::now();
        let revoke = ada.request(Method::DELETE, &format!("/api/auth/session/{id}/tickets"));
        assert_eq!(
            revoke.send().await.unwrap().status(),
            StatusCode::NO_CONTENT
        );
        for socket in [&mut screen, &mut watching, &mut terminal] {
            let (code, reason) = closed(socket).await;
            assert!(
                code == CloseCode::Revoked as u16 && reason.contains("revoked"),
                "{code} {reason}"
            );
        }
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "{:?}",
            begun.elapsed()
        );
        let (code, _) = closed(&mut api.socket(id, "view", &unused).await).await;
        assert_eq!(
            code,
            CloseCode::BadTicket as u16,
            "one that was not used yet"
        );
        let events = api.events(id, 0, |events| left(events) == 3).await;
        let joined = events.iter().filter(|event| {
            matches!(&event.event, SessionEventKind::ViewerJoined { who, .. } if who == "Grace of support")
        });
        assert_eq!(joined.count(), 1);
        // The owner may look again.
        let mut again = api
            .socket(id, "view", &ticket(&ada, id, "control", None).await)
            .await;
        assert!(bytes(&mut again).await.is_some());
        again.close(None).await.unwrap();
        api.cancel(id).await;
    }
    controller.stop().await;
}

fn left(events: &[vestibule_api::session::SessionEvent]) -> usize {
    let left = |event: &&vestibule_api::session::SessionEvent| {
        matches!(event.event, SessionEventKind::ViewerLeft { .. })
    };
    events.iter().filter(left).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_user_watches_nothing_any_more() {
    let home = Home::with(CONFIG);
    let controller = home.serve().await;
    let api = &controller.api;
    let ada = api.user("ada", "signer", None).await;
    let (id, _runner) = signing_in(&home, api, &ada).await;
    let mut screen = api
        .socket(id, "view", &ticket(&ada, id, "control", None).await)
        .await;
    assert!(bytes(&mut screen).await.is_some());
    let begun = Instant::now();
    let remove = api
        .request(Method::DELETE, "/api/users/ada")
        .send()
        .await
        .unwrap();
    assert_eq!(remove.status(), StatusCode::NO_CONTENT);
    assert_eq!(closed(&mut screen).await.0, CloseCode::Revoked as u16);
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_that_takes_nothing_is_cut_off_amid_a_frame() {
    let home = Home::with(CONFIG);
    let controller = home.serve().await;
    let api = &controller.api;
    for old in [false, true] {
        let (id, runner) = crate::lifecycle::signing_in(&home, api).await;
        runner.old.store(old, Ordering::Relaxed);
        let mut screen = api.view(id, Right::Control).await;
        assert!(bytes(&mut screen).await.is_some());
        screen
            .send(Message::Binary(b"POUR".to_vec().into()))
            .await
            .unwrap();
        assert!(bytes(&mut screen).await.is_some(), "it pours");
        // Nothing is read: what is under way fills the connection and stands there.
        let revoke = api.request(Method::DELETE, &format!("/api/auth/session/{id}/tickets"));
        assert_eq!(
            revoke.send().await.unwrap().status(),
            StatusCode::NO_CONTENT
        );
        wait_for("the viewer to be gone", || async {
            api.session(id).await.viewers.is_empty().then_some(())
        })
        .await;
        let mut total = 0;
        while let Some(frame) = bytes(&mut screen).await {
            total += frame.len();
        }
        assert!(total < 32 << 20, "all of it came");
        api.cancel(id).await;
    }
    controller.stop().await;
}
