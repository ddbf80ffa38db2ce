//! One sign-in from start to sealed credential, and every way of ending one early.
use crate::support::{api::Api, home::Home, runner::Runner, wait_for};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use reqwest::{Method, StatusCode};
use serde_json::json;
use std::{collections::HashSet, sync::Arc};
use vestibule_api::{
    agent::{LoginEvent, UrlSource},
    ids::SessionId,
    machine::MachineState,
    session::{SessionEventKind, SessionState},
};

pub(crate) const FILE: &str = ".codex/auth.json";
/// Distinct enough to be found wherever it does not belong.
pub(crate) const SECRET: &[u8] = b"{\"tokens\":{\"access_token\":\"sk-test-4f1c9b27d0e8\"}}\n";

/// A session whose person is at work.
pub(crate) async fn signing_in(home: &Home, api: &Api) -> (SessionId, Arc<Runner>) {
    let id = api.start("codex").await;
    let runner = home.runner(api.machine(id).await).await;
    runner.up();
    api.until(id, SessionState::AwaitingUser).await;
    (id, runner)
}

/// Waits until nothing of any VM is left.
pub(crate) async fn nothing_left(home: &Home) {
    wait_for("an empty host", || async {
        home.residue().is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_start_to_sealed_credential() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    assert_eq!(runner.spec.session_id, Some(id));
    assert_eq!(
        runner.logins.lock().unwrap()[0].pack.provider.id.as_str(),
        "codex"
    );
    let view = api.session(id).await;
    assert!(
        view.viewable
            && view.credential_id.is_none()
            && view.machine_state == Some(MachineState::Up)
    );

    let (host, path) = ("auth.openai.com".to_owned(), "/oauth/authorize".to_owned());
    runner.login(LoginEvent::UrlCaptured {
        source: UrlSource::Shim,
        host,
        path,
    });
    runner.login(LoginEvent::UserCode {
        code: "WXYZ-9876".to_owned(),
    });
    wait_for("the user code", || async {
        api.session(id).await.user_code
    })
    .await;
    runner.capture(FILE, SECRET);
    let view = api.until(id, SessionState::Completed).await;
    assert_eq!(view.account.as_deref(), Some("ada@example.org"));
    let credential = view.credential_id.unwrap();

    let events = api.events(id, 0, |_| false).await;
    let states = events.iter().filter_map(|event| match event.event {
        SessionEventKind::State { state } => Some(state),
        _ => None,
    });
    let all = SessionState::ALL.into_iter().take(8);
    let expected = all.filter(|state| *state != SessionState::Confirming);
    assert_eq!(states.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    assert!(
        events.iter().zip(1..).all(|(event, seq)| event.seq == seq),
        "{events:?}"
    );
    assert!(events.iter().any(|event| matches!(&event.event, SessionEventKind::UrlOpened { host, .. } if host == "auth.openai.com")));

    let reply = api
        .post(
            &format!("/api/credentials/{credential}/content"),
            &json!({ "purpose": "test" }),
        )
        .await;
    assert_eq!(reply.headers()["cache-control"], "no-store");
    let content: serde_json::Value = reply.json().await.unwrap();
    assert_eq!(content["files"][0]["path"], FILE);
    assert_eq!(
        BASE64
            .decode(content["files"][0]["content"].as_str().unwrap())
            .unwrap(),
        SECRET
    );
    let audit = std::fs::read_to_string(home.path().join("vault/audit.log")).unwrap();
    assert!(
        audit.lines().last().unwrap().contains("\"released\""),
        "{audit}"
    );

    nothing_left(&home).await;
    let evidence = home.evidence(view.machine_id.unwrap());
    wait_for("the evidence", || async {
        evidence.join("verdict.json").exists().then_some(())
    })
    .await;
    let story = std::fs::read_to_string(evidence.join("session.json")).unwrap();
    assert!(story.contains("\"completed\""));
    assert_eq!(*runner.stops.lock().unwrap(), ["session completed"]);
    controller.stop().await;
    no_secret_outside_the_vault(&home);
}

/// Neither the credential nor the user code is in any file but (sealed) in the vault.
fn no_secret_outside_the_vault(home: &Home) {
    let mut stack = vec![home.path().to_owned()];
    let mut files = 0;
    while let Some(dir) = stack.pop() {
        for entry in dir.read_dir_utf8().unwrap() {
            let path = entry.unwrap().path().to_owned();
            if path.is_dir() {
                stack.push(path);
                continue;
            }
            files += 1;
            let bytes = std::fs::read(&path).unwrap();
            for secret in [
                &b"sk-test-4f1c9b27d0e8"[..],
                b"WXYZ-9876",
                BASE64.encode(SECRET).as_bytes(),
            ] {
                let found = bytes.windows(secret.len()).any(|window| window == secret);
                assert!(!found, "{path} holds {}", String::from_utf8_lossy(secret));
            }
        }
    }
    assert!(
        files > 8,
        "the database, the vault and the evidence were looked at"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sign_ins_at_once_do_not_mix() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let ((a, one), (b, two)) = tokio::join!(signing_in(&home, api), signing_in(&home, api));
    assert_ne!(one.spec.machine_id, two.spec.machine_id);
    one.capture(FILE, b"secret of a");
    two.capture(FILE, b"secret of b");
    for (id, content) in [(a, "secret of a"), (b, "secret of b")] {
        let credential = api
            .until(id, SessionState::Completed)
            .await
            .credential_id
            .unwrap();
        let path = format!("/api/credentials/{credential}/content");
        let reply: serde_json::Value = api
            .post(&path, &json!({ "purpose": "test" }))
            .await
            .json()
            .await
            .unwrap();
        assert_eq!(reply["files"][0]["content"], BASE64.encode(content));
    }
    let listed = api.json("/api/credentials").await;
    assert_eq!(listed.as_array().unwrap().len(), 2);
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_in_every_state() {
    let home = Home::with("[limits]\nvms = 1\n");
    let controller = home.serve().await;
    let api = &controller.api;

    let blocker = api.start("codex").await;
    let runner = home.runner(api.machine(blocker).await).await;
    let waiting = api.start("codex").await;
    api.until(waiting, SessionState::Placing).await;
    assert_eq!(
        api.cancel(waiting).await.state,
        SessionState::Cancelled,
        "placing"
    );
    assert_eq!(api.session(blocker).await.state, SessionState::Starting);
    assert_eq!(
        api.cancel(blocker).await.state,
        SessionState::Cancelled,
        "starting"
    );
    nothing_left(&home).await;
    assert_eq!(*runner.stops.lock().unwrap(), ["session cancelled"]);

    let (id, _) = signing_in(&home, api).await;
    assert_eq!(
        api.cancel(id).await.state,
        SessionState::Cancelled,
        "awaiting the user"
    );
    assert_eq!(api.cancel(id).await.state, SessionState::Cancelled, "again");
    let reply = api
        .request(Method::DELETE, &format!("/api/vm/auth/{id}"))
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), StatusCode::NO_CONTENT);
    nothing_left(&home).await;

    // Captured, but the agent does not hand the credential over: the collector tries again and again.
    let (id, runner) = signing_in(&home, api).await;
    runner.login(LoginEvent::Captured {
        account: None,
        expires_at: None,
    });
    api.until(id, SessionState::Capturing).await;
    assert_eq!(
        api.cancel(id).await.state,
        SessionState::Cancelled,
        "capturing"
    );
    nothing_left(&home).await;
    assert_eq!(api.json("/api/credentials").await, json!([]));
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_sign_ins_than_places_wait_and_are_told() {
    let home = Home::with("[limits]\nvms = 1\nwaiting = 2\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let (first, runner) = signing_in(&home, api).await;
    let (second, third) = (api.start("codex").await, api.start("codex").await);
    for (id, words) in [(second, "is next"), (third, "1 sign-ins are ahead")] {
        let events = api.events(id, 0, |events| {
            events
                .iter()
                .any(|event| matches!(event.event, SessionEventKind::Waiting { .. }))
        });
        let text = format!("{:?}", events.await);
        assert!(text.contains(words), "{text}");
    }
    let reply = api
        .post("/api/auth/start", &json!({ "provider": "codex" }))
        .await;
    assert_eq!(reply.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(reply.headers().contains_key("retry-after"));
    runner.capture(FILE, SECRET);
    api.until(first, SessionState::Completed).await;
    let next = home.runner(api.machine(second).await).await;
    assert!(
        next.is_alive() && home.runners.count_alive() == 1,
        "one at a time"
    );
    assert_eq!(api.session(third).await.state, SessionState::Placing);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_resumed_without_gap_or_repeat() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    let first = api.events(id, 0, |events| events.len() >= 4).await;
    let seen = first[1].seq;
    let following = tokio::spawn({
        let api = api.clone();
        async move { api.events(id, seen, |_| false).await }
    });
    runner.capture(FILE, SECRET);
    let rest = following.await.unwrap();
    assert_eq!(rest[0].seq, seen + 1);
    assert!(rest.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
    let last = rest.last().unwrap();
    assert_eq!(
        last.event,
        SessionEventKind::State {
            state: SessionState::Completed
        }
    );
    let request = api.request(Method::GET, &format!("/api/auth/session/{id}/events"));
    let reply = request
        .header("last-event-id", last.seq.to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(
        reply.status(),
        StatusCode::NO_CONTENT,
        "an event source does not come again"
    );
    let request = api.request(Method::GET, &format!("/api/auth/session/{id}/events"));
    let reply = request
        .header("last-event-id", "soon")
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), StatusCode::BAD_REQUEST);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vms_are_shown_while_they_live_and_afterwards() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    let vm = runner.spec.machine_id;
    let list = api.json("/api/vms").await;
    assert_eq!(
        (list[0]["machineId"].as_str(), list[0]["driver"].as_str()),
        (Some(&*vm.to_string()), Some("qemu/tcg"))
    );
    assert_eq!(list[0]["madeFromOlderImage"], false);
    let console = api
        .get(&format!("/api/vms/{vm}/console?tail=100"))
        .await
        .text()
        .await
        .unwrap();
    assert!(console.contains("Linux version"));
    assert_eq!(
        api.json(&format!("/api/vms/{vm}/report")).await["kernel"],
        "6.1-live"
    );
    assert_eq!(
        api.json(&format!("/api/vms/{vm}/verdict")).await["verdict"],
        "healthy"
    );

    let reply = api
        .request(Method::DELETE, &format!("/api/vms/{vm}"))
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), StatusCode::NO_CONTENT);
    api.until(id, SessionState::Cancelled).await;
    nothing_left(&home).await;
    wait_for("the VM to be gone", || async {
        (api.json("/api/vms").await == json!([])).then_some(())
    })
    .await;
    assert_eq!(
        api.json("/api/vms?all=1").await.as_array().unwrap().len(),
        1
    );
    let view = api.json(&format!("/api/vms/{vm}")).await;
    assert_eq!(
        (view["state"].as_str(), view["hasEvidence"].as_bool()),
        (Some("gone"), Some(true))
    );
    let console = api
        .get(&format!("/api/vms/{vm}/console?tail=10"))
        .await
        .text()
        .await
        .unwrap();
    assert_eq!(console, "last line\n");
    assert_eq!(
        api.json(&format!("/api/vms/{vm}/report")).await["kernel"],
        "6.1"
    );
    let files = api.json(&format!("/api/vms/{vm}/evidence")).await;
    let names: HashSet<_> = files
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file["name"].as_str().unwrap())
        .collect();
    for name in [
        "serial.log",
        "report.json",
        "exit.json",
        "session.json",
        "verdict.json",
    ] {
        assert!(names.contains(name), "{name} of {names:?}");
        let reply = api.get(&format!("/api/vms/{vm}/evidence/{name}")).await;
        assert_eq!(reply.status(), StatusCode::OK);
    }
    for outside in ["..%2f..%2ftoken", "..", "nothing.log"] {
        let reply = api.get(&format!("/api/vms/{vm}/evidence/{outside}")).await;
        assert_eq!(reply.status(), StatusCode::NOT_FOUND, "{outside}");
    }
    controller.stop().await;
}
