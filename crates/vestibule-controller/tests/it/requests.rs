//! Requests that are wrong, and what they are told.
use crate::support::{home::Home, wait_for};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};
use vestibule_api::{control::ReconcilerView, time::Timestamp};

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_start_is_named() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let cases = [
        (
            json!({ "provider": "nobody" }),
            400,
            "unknown_provider",
            "nobody",
        ),
        (
            json!({ "provider": "No Body" }),
            400,
            "invalid_request",
            "provider",
        ),
        (json!({}), 400, "invalid_request", "provider"),
        (
            json!({ "provider": "codex", "colour": 1 }),
            400,
            "invalid_request",
            "colour",
        ),
        (
            json!({ "provider": "codex", "flow": "none" }),
            400,
            "invalid_request",
            "flow",
        ),
        (
            json!({ "provider": "codex", "userId": "" }),
            400,
            "invalid_request",
            "userId",
        ),
        (
            json!({ "provider": "codex", "image": "../x" }),
            400,
            "invalid_request",
            "image",
        ),
        (json!({ "provider": "oidc" }), 409, "conflict", "issuer"),
        (json!({ "provider": "claude" }), 409, "conflict", "no tool"),
    ];
    for (body, status, code, word) in cases {
        let reply = api.post("/api/auth/start", &body).await;
        let sent = reply.headers()["x-request-id"].to_str().unwrap().to_owned();
        let found = reply.status().as_u16();
        let error: Value = reply.json().await.unwrap();
        let error = &error["error"];
        assert_eq!(
            (found, error["code"].as_str()),
            (status, Some(code)),
            "{body}: {error}"
        );
        let text = error["message"].as_str().unwrap();
        assert!(text.contains(word), "{body}: {text}");
        assert!(!error["fix"].as_str().unwrap().is_empty());
        assert_eq!(error["requestId"], sent.as_str());
    }
    for (body, status) in [("{", 400), ("[]", 400), ("\u{0}", 400)] {
        let request = api
            .request(Method::POST, "/api/auth/start")
            .header("content-type", "application/json");
        let reply = request.body(body).send().await.unwrap();
        assert_eq!(reply.status().as_u16(), status, "{body:?}");
        assert_eq!(
            reply.json::<Value>().await.unwrap()["error"]["code"],
            "invalid_request"
        );
    }
    let large = json!({ "provider": "codex", "userId": "x".repeat(100_000) });
    let reply = api.post("/api/auth/start", &large).await;
    assert_eq!(reply.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(
        reply.json::<Value>().await.unwrap()["error"]["code"],
        "too_large"
    );
    assert_eq!(
        api.json("/api/sessions").await,
        json!([]),
        "none of them is a session"
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_404_and_json() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let cases = [
        (Method::GET, format!("/api/auth/session/{NOBODY}")),
        (Method::GET, format!("/api/auth/session/{NOBODY}/events")),
        (Method::POST, format!("/api/auth/session/{NOBODY}/cancel")),
        (Method::DELETE, format!("/api/vm/auth/{NOBODY}")),
        (Method::GET, format!("/api/vms/{NOBODY}")),
        (Method::GET, format!("/api/vms/{NOBODY}/console")),
        (Method::GET, format!("/api/vms/{NOBODY}/evidence")),
        (Method::DELETE, format!("/api/vms/{NOBODY}")),
        (Method::GET, format!("/api/credentials/{NOBODY}")),
        (Method::DELETE, format!("/api/credentials/{NOBODY}")),
        (Method::GET, "/api/nothing".to_owned()),
    ];
    for (method, path) in cases {
        let reply = api.request(method.clone(), &path).send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::NOT_FOUND, "{method} {path}");
        assert_eq!(
            reply.json::<Value>().await.unwrap()["error"]["code"],
            "not_found",
            "{method} {path}"
        );
    }
    let content = api
        .post(
            &format!("/api/credentials/{NOBODY}/content"),
            &json!({ "purpose": "test" }),
        )
        .await;
    assert_eq!(content.status(), StatusCode::NOT_FOUND);
    let content = api
        .post(
            &format!("/api/credentials/{NOBODY}/content"),
            &json!({ "purpose": " " }),
        )
        .await;
    assert_eq!(
        content.status(),
        StatusCode::BAD_REQUEST,
        "no purpose, no credential"
    );
    let reply = api.get("/api/auth/session/not-an-id").await;
    assert_eq!(reply.status(), StatusCode::BAD_REQUEST);
    let reply = api
        .request(Method::PUT, "/api/auth/start")
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(
        reply.json::<Value>().await.unwrap()["error"]["code"],
        "method_not_allowed"
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ended_session_is_told_apart_from_one_that_was_removed() {
    let home = Home::with("[limits]\nkeep_sessions_days = 0\n");
    let controller = home.serve().await;
    let id = controller.api.start("codex").await;
    controller.api.cancel(id).await;
    assert_eq!(
        controller.api.session(id).await.state.id(),
        "cancelled",
        "an ended one can be looked up"
    );
    let ticket = controller
        .api
        .post(
            &format!("/api/auth/session/{id}/tickets"),
            &json!({ "right": "view" }),
        )
        .await;
    assert_eq!(ticket.status(), StatusCode::GONE);
    crate::lifecycle::nothing_left(&home).await;
    controller.stop().await;
    // Retention runs at the start.
    let controller = home.serve().await;
    let reply = wait_for("retention", || async {
        let reply = controller.api.get(&format!("/api/auth/session/{id}")).await;
        (reply.status() == StatusCode::GONE).then_some(reply)
    });
    let error: Value = reply.await.json().await.unwrap();
    assert_eq!(error["error"]["code"], "session_gone");
    assert!(
        error["error"]["fix"]
            .as_str()
            .unwrap()
            .contains("/api/auth/start")
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_health_metrics_and_docs() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let health: Value = api
        .bare(Method::GET, "/health")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(health["status"], "ok");
    let ids = [api.start("gh").await, api.start("codex").await];
    let page = api.json("/api/sessions?limit=1").await;
    assert_eq!(
        (page.as_array().unwrap().len(), &page[0]["sessionId"]),
        (1, &json!(ids[1]))
    );
    let rest = api.json(&format!("/api/sessions?before={}", ids[1])).await;
    assert_eq!(
        (rest.as_array().unwrap().len(), &rest[0]["sessionId"]),
        (1, &json!(ids[0]))
    );
    let providers = api.json("/api/providers").await;
    let why = |id: &str| {
        providers
            .as_array()
            .unwrap()
            .iter()
            .find(|p| p["id"] == id)
            .unwrap()["unavailable"]
            .clone()
    };
    assert_eq!(why("codex"), Value::Null);
    assert!(
        why("claude").as_str().unwrap().contains("no tool")
            && why("oidc").as_str().unwrap().contains("issuer")
    );
    let reconcilers = api.json("/api/reconcilers").await;
    let names: Vec<_> = reconcilers
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "place",
            "pool",
            "effects",
            "deadlines",
            "machines",
            "hosts",
            "orphans",
            "retention",
            "evidence",
            "images"
        ]
    );
    assert!(
        reconcilers
            .as_array()
            .unwrap()
            .iter()
            .all(|r| r["lastError"] == Value::Null),
        "{reconcilers}"
    );
    let metrics = api.get("/metrics").await.text().await.unwrap();
    for line in [
        "vestibule_sessions_started_total{provider=\"codex\"} 1",
        "vestibule_vms ",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
    let docs = api.get("/docs").await.text().await.unwrap();
    assert!(
        docs.contains("/api/auth/start")
            && docs.contains("SessionView")
            && !docs.contains("<script")
    );
    let page = api.bare(Method::GET, "/").send().await.unwrap();
    assert_eq!(page.status(), StatusCode::OK);
    assert!(
        page.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/html")
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcilers_say_when_they_ran_and_for_how_long() {
    let home = Home::new();
    home.snapshot(&home.publish("6.2"));
    // The pool looks at it each time, and makes nothing.
    *home.runners.memory.lock().unwrap() = Some((1, 0.0));
    let (start, begun) = (Timestamp::now(), Instant::now());
    let controller = home.serve().await;
    let api = &controller.api;
    let all = || async {
        let views = api.json("/api/reconcilers").await;
        serde_json::from_value::<Vec<ReconcilerView>>(views).unwrap()
    };
    let views = wait_for("a run of each", || async {
        let views = all().await;
        views.iter().all(|view| view.runs > 0).then_some(views)
    })
    .await;
    let passed = u64::try_from(begun.elapsed().as_millis()).unwrap();
    for view in &views {
        let (at, took) = (view.last_run_at.unwrap(), view.last_duration_ms.unwrap());
        assert!(at >= start && at <= Timestamp::now(), "{view:?}");
        assert!(took <= passed, "{view:?} in {passed} ms");
        assert_eq!((view.failures, &view.last_error), (0, &None), "{view:?}");
    }

    // A run that takes its time: one that begins while somebody else holds what it looks at.
    let (_, token) = api.service("platform", "operator", None).await;
    let (send, held) = mpsc::channel();
    let runners = Arc::clone(&home.runners);
    let holder = std::thread::spawn(move || {
        let memory = runners.memory.lock().unwrap();
        send.send(Timestamp::now()).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let released = Timestamp::now();
        drop(memory);
        released
    });
    let held = held.recv().unwrap();
    // Whoever may do something no more is a change of the rows, which wakes it.
    let revoke = api.request(Method::DELETE, &format!("/api/tokens/{token}"));
    assert_eq!(
        revoke.send().await.unwrap().status(),
        StatusCode::NO_CONTENT
    );
    let slow = wait_for("the slow run", || async {
        let pool = all().await.into_iter().find(|view| view.name == "pool");
        pool.filter(|pool| pool.last_run_at.is_some_and(|at| at > held))
    })
    .await;
    let released = holder.join().unwrap();
    let took = slow.last_duration_ms.unwrap();
    let over = slow.last_run_at.unwrap();
    let over = over.plus(Duration::from_millis(took + 1));
    assert!(over >= released, "{slow:?}, {released}");
    let elapsed = Timestamp::now().micros_since(held) / 1000;
    assert!(took <= elapsed, "{slow:?} in {elapsed} ms");
    controller.stop().await;
}
