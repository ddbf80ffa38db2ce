//! Users, service tokens, organisations, and how often somebody may ask for what costs much.
use crate::support::{
    api::Api,
    home::Home,
    people::{PASSWORD, Person, code},
    wait_for,
};
use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use vestibule_api::session::SessionState;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_signs_in_changes_the_password_and_is_removed() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let ada = api.user("ada", "signer", None).await;
    let second = api.log_in("ada", PASSWORD).await;
    let second = second.headers()[header::SET_COOKIE]
        .to_str()
        .unwrap()
        .to_owned();
    let second = second.split(';').next().unwrap().to_owned();
    let as_second = || {
        api.bare(Method::GET, "/api/me")
            .header(header::COOKIE, &second)
            .send()
    };
    assert_eq!(as_second().await.unwrap().status(), StatusCode::OK);

    // Whether the name or the password is wrong is not said.
    let mut said = Vec::new();
    for (name, password) in [("ada", "another password"), ("eve", PASSWORD), ("ada", "")] {
        let reply = api.log_in(name, password).await;
        assert_eq!(reply.status(), StatusCode::UNAUTHORIZED, "{name}");
        assert!(!reply.headers().contains_key(header::SET_COOKIE));
        let body: Value = reply.json().await.unwrap();
        said.push(body["error"]["message"].clone());
    }
    assert!(said.iter().all(|message| *message == said[0]), "{said:?}");

    let change = async |current: &str, password: &str| {
        let body = json!({ "current": current, "password": password });
        let request = ada.request(Method::PUT, "/api/me/password").json(&body);
        request.send().await.unwrap().status()
    };
    let fresh = "another correct horse";
    assert_eq!(change(PASSWORD, "short").await, StatusCode::BAD_REQUEST);
    assert_eq!(
        change("not the password", fresh).await,
        StatusCode::FORBIDDEN
    );
    assert_eq!(change(PASSWORD, fresh).await, StatusCode::NO_CONTENT);
    assert_eq!(
        ada.get("/api/me").await.status(),
        StatusCode::OK,
        "this dashboard stays"
    );
    assert_eq!(
        as_second().await.unwrap().status(),
        StatusCode::UNAUTHORIZED,
        "the other does not"
    );

    let start = ada
        .post("/api/auth/start", &json!({ "provider": "codex" }))
        .await;
    assert_eq!(start.status(), StatusCode::CREATED);
    let start: Value = start.json().await.unwrap();
    let session = start["sessionId"].as_str().unwrap().parse().unwrap();
    let other = json!({ "provider": "codex", "userId": "eve" });
    assert_eq!(
        ada.post("/api/auth/start", &other).await.status(),
        StatusCode::BAD_REQUEST
    );
    let owner = json!({ "provider": "codex", "owner": "eve" });
    assert_eq!(
        ada.post("/api/auth/start", &owner).await.status(),
        StatusCode::BAD_REQUEST
    );
    assert_eq!(api.session(session).await.user_id, "ada");

    let removed = api
        .request(Method::DELETE, "/api/users/ada")
        .send()
        .await
        .unwrap();
    assert_eq!(removed.status(), StatusCode::NO_CONTENT);
    assert_eq!(ada.get("/api/me").await.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.session(session).await.state, SessionState::Cancelled);

    // A new user of the same name is somebody else.
    let again = api.user("ada", "signer", None).await;
    let reply = again.get(&format!("/api/auth/session/{session}")).await;
    assert_eq!(reply.status(), StatusCode::NOT_FOUND);
    controller.stop().await;
    nothing_of_a_password_is_kept(&home);
}

fn nothing_of_a_password_is_kept(home: &Home) {
    for secret in [PASSWORD, "another correct horse"] {
        assert!(!home.stores(secret.as_bytes()));
    }
    assert!(home.stores(b"$argon2id$"), "the look sees what is there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_is_refused_with_the_field() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    api.organisation("acme").await;
    let user = |change: Value| {
        let mut user = json!({ "name": "ada", "role": "signer", "password": PASSWORD });
        user.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        user
    };
    for (change, word) in [
        (json!({ "name": "local" }), "name"),
        (json!({ "name": "Ada Lovelace" }), "name"),
        (json!({ "role": "root" }), "role"),
        (json!({ "password": "short" }), "password"),
        (json!({ "organisation": "nobody" }), "organisation"),
        (
            json!({ "organisation": "acme", "role": "admin" }),
            "organisation",
        ),
        (json!({ "shoe": 1 }), "shoe"),
    ] {
        let reply = api.post("/api/users", &user(change.clone())).await;
        assert_eq!(reply.status(), StatusCode::BAD_REQUEST, "{change}");
        let body: Value = reply.json().await.unwrap();
        let message = body["error"]["message"].as_str().unwrap();
        assert!(
            message.contains(word) && !message.contains(PASSWORD),
            "{message}"
        );
    }
    let good = user(json!({ "organisation": "acme" }));
    assert_eq!(
        api.post("/api/users", &good).await.status(),
        StatusCode::CREATED
    );
    assert_eq!(
        api.post("/api/users", &good).await.status(),
        StatusCode::CONFLICT
    );
    let list = api.json("/api/users").await;
    assert_eq!(
        (&list[0]["name"], &list[0]["organisation"]),
        (&json!("ada"), &json!("acme"))
    );
    assert!(!list.to_string().contains("argon2"));

    let remove = async |path: &str| {
        api.request(Method::DELETE, path)
            .send()
            .await
            .unwrap()
            .status()
    };
    assert_eq!(
        remove("/api/organisations/acme").await,
        StatusCode::CONFLICT,
        "ada is of it"
    );
    assert_eq!(remove("/api/users/ada").await, StatusCode::NO_CONTENT);
    assert_eq!(
        remove("/api/organisations/acme").await,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        remove("/api/organisations/acme").await,
        StatusCode::NOT_FOUND
    );
    for body in [
        json!({ "name": "x", "role": "operator", "expiresInS": 59 }),
        json!({ "name": "x" }),
    ] {
        assert_eq!(
            api.post("/api/tokens", &body).await.status(),
            StatusCode::BAD_REQUEST
        );
    }
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_token_is_good_until_it_is_revoked() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let (platform, id) = api.service("platform", "operator", None).await;
    assert_eq!(platform.get("/api/sessions").await.status(), StatusCode::OK);
    assert_eq!(
        platform.get("/api/users").await.status(),
        StatusCode::FORBIDDEN
    );
    let codes = platform
        .request(Method::POST, "/api/login-codes")
        .send()
        .await
        .unwrap();
    assert_eq!(
        codes.status(),
        StatusCode::FORBIDDEN,
        "only the home's token makes codes"
    );
    // Not the local admin's: a label of the token's own.
    let start = json!({ "provider": "codex", "userId": "customer-7" });
    let reply: Value = platform
        .post("/api/auth/start", &start)
        .await
        .json()
        .await
        .unwrap();
    let session = reply["sessionId"].as_str().unwrap().parse().unwrap();
    assert!(platform.session(session).await.confirm_account);
    let ticket = api
        .post(
            &format!("/api/auth/session/{session}/tickets"),
            &json!({ "right": "control" }),
        )
        .await;
    assert_eq!(
        ticket.status(),
        StatusCode::NOT_FOUND,
        "not even the admin views another's session"
    );

    let list = api.json("/api/tokens").await;
    assert_eq!(
        (&list[0]["name"], &list[0]["createdBy"]),
        (&json!("platform"), &json!("api:local"))
    );
    assert!(list[0]["lastUsedAt"].is_string(), "{list}");
    assert!(!home.stores(platform.token.as_bytes()));

    // An open stream of events ends with the token.
    let events = tokio::spawn({
        let platform = platform.clone();
        async move { platform.events(session, 0, |_| false).await }
    });
    wait_for("the first event", || async {
        (platform.session(session).await.state != SessionState::Requested).then_some(())
    })
    .await;
    let revoke = api.request(Method::DELETE, &format!("/api/tokens/{id}"));
    assert_eq!(
        revoke.send().await.unwrap().status(),
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        platform.get("/api/sessions").await.status(),
        StatusCode::UNAUTHORIZED
    );
    let events = tokio::time::timeout(std::time::Duration::from_secs(10), events).await;
    assert!(events.is_ok(), "the stream goes on");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_token_is_good_until_it_expires() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let made = async |name: &str| {
        let token = json!({ "name": name, "role": "operator", "expiresInS": 60 });
        let reply = api.post("/api/tokens", &token).await;
        assert_eq!(reply.status(), StatusCode::CREATED, "{name}");
        let reply: Value = reply.json().await.unwrap();
        Api::new(api.address, reply["token"].as_str().unwrap())
    };
    let (short, other) = (made("short").await, made("other").await);
    assert_eq!(short.get("/api/sessions").await.status(), StatusCode::OK);
    // Its minute has passed.
    home.sql("UPDATE service_token SET expires_at = created_at WHERE name = 'short'")
        .await;
    for path in ["/api/sessions", "/api/me"] {
        let refused = short.get(path).await;
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(code(refused).await, "unauthenticated");
    }
    let start = json!({ "provider": "codex" });
    let refused = short.post("/api/auth/start", &start).await;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(api.json("/api/sessions").await, json!([]));
    assert_eq!(other.get("/api/sessions").await.status(), StatusCode::OK);
    let list = api.json("/api/tokens").await;
    assert_eq!(list[1]["name"], "short", "{list}");
    assert_eq!(list[1]["expiresAt"], list[1]["createdAt"], "it is shown");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quotas_hold_also_when_many_ask_at_once() {
    let home =
        Home::with("[limits]\nlive_per_user = 2\nlive_per_organisation = 3\n[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    api.organisation("acme").await;
    let (platform, _) = api.service("platform", "operator", Some("acme")).await;
    let start = async |api: &Api, user: &str| {
        api.post(
            "/api/auth/start",
            &json!({ "provider": "codex", "userId": user }),
        )
        .await
    };
    let all = futures_util::future::join_all((0..6).map(|_| start(&platform, "a"))).await;
    let made = all
        .iter()
        .filter(|reply| reply.status() == StatusCode::CREATED);
    assert_eq!(made.count(), 2, "of one user");
    let full = start(&platform, "a").await;
    assert_eq!(full.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(full.headers().contains_key(header::RETRY_AFTER));
    assert_eq!(code(full).await, "quota_exceeded");
    let others =
        futures_util::future::join_all(["b", "c", "d"].map(|user| start(&platform, user))).await;
    let made = others
        .iter()
        .filter(|reply| reply.status() == StatusCode::CREATED);
    assert_eq!(made.count(), 1, "of one organisation");
    for _ in 0..3 {
        assert_eq!(
            start(api, "a").await.status(),
            StatusCode::CREATED,
            "not the local admin's"
        );
    }
    let organisations = api.json("/api/organisations").await;
    assert_eq!(organisations[0]["live"], 3);

    // One that has ended makes room.
    let sessions: Value = platform.get("/api/sessions").await.json().await.unwrap();
    platform
        .cancel(sessions[0]["sessionId"].as_str().unwrap().parse().unwrap())
        .await;
    assert_eq!(start(&platform, "e").await.status(), StatusCode::CREATED);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn costly_actions_are_limited_and_cheap_ones_are_not() {
    let home =
        Home::with("[limits]\nstarts_per_minute = 3\nlive_per_user = 0\n[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let (platform, _) = api.service("platform", "operator", None).await;
    let wanted = json!({ "provider": "codex" });
    let start = || platform.post("/api/auth/start", &wanted);
    for _ in 0..3 {
        assert_eq!(start().await.status(), StatusCode::CREATED);
    }
    let limited = start().await;
    assert_eq!(limited.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = limited.headers()[header::RETRY_AFTER]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=21).contains(&wait), "{wait}");
    assert_eq!(code(limited).await, "rate_limited");
    for _ in 0..200 {
        assert_eq!(platform.get("/api/sessions").await.status(), StatusCode::OK);
    }
    let mut statuses = Vec::new();
    for _ in 0..11 {
        statuses.push(api.log_in("ada", "not the password").await.status());
    }
    assert_eq!(
        statuses[9..],
        [StatusCode::UNAUTHORIZED, StatusCode::TOO_MANY_REQUESTS]
    );
    // Also with the right password: whoever guesses learns nothing.
    assert_eq!(
        api.log_in("ada", PASSWORD).await.status(),
        StatusCode::TOO_MANY_REQUESTS
    );
    controller.stop().await;
}

/// Whoever found a dashboard open does not find the password out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_the_own_password_is_limited() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let (ada, eve) = (
        api.user("ada", "signer", None).await,
        api.user("eve", "signer", None).await,
    );
    let change = async |person: &Person, current: &str| {
        let body = json!({ "current": current, "password": "another correct horse" });
        let request = person.request(Method::PUT, "/api/me/password").json(&body);
        request.send().await.unwrap()
    };
    // Ten attempts at once, of which signing in was one.
    for _ in 0..9 {
        let wrong = change(&ada, "not the password").await;
        assert_eq!(wrong.status(), StatusCode::FORBIDDEN);
    }
    let limited = change(&ada, PASSWORD).await;
    assert_eq!(
        limited.status(),
        StatusCode::TOO_MANY_REQUESTS,
        "also with the right one"
    );
    let wait = limited.headers()[header::RETRY_AFTER].to_str().unwrap();
    assert!((1..=15).contains(&wait.parse().unwrap()), "{wait}");
    assert_eq!(code(limited).await, "rate_limited");
    assert_eq!(
        api.log_in("ada", PASSWORD).await.status(),
        StatusCode::TOO_MANY_REQUESTS,
        "and by no other way"
    );
    assert_eq!(ada.get("/api/me").await.status(), StatusCode::OK);
    let others = change(&eve, PASSWORD).await;
    assert_eq!(others.status(), StatusCode::NO_CONTENT);
    controller.stop().await;
}
