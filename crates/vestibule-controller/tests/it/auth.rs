//! Who may ask, by enumeration of the OpenAPI document, and from where.
use crate::support::home::Home;
use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};

/// Operations that need no token, and why.
const OPEN: [(&str, &str); 6] = [
    ("get", "/health"),
    // Exchanges a one-time code for the cookie.
    ("post", "/api/login"),
    // Asks for name and password.
    ("post", "/api/login/password"),
    // Say where else somebody signs in, lead there, and take whoever comes back.
    ("get", "/api/login/methods"),
    ("get", "/api/login/oidc"),
    ("get", "/api/login/oidc/callback"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_needs_a_token() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let document = api.json("/api/openapi.json").await;
    let mut operations = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            operations += 1;
            let concrete = path
                .replace("{file}", "serial.log")
                .replace("{id}", "01890000-0000-7000-8000-000000000000")
                .replace("{name}", "nobody")
                .replace("{sessionId}", "01890000-0000-7000-8000-000000000000");
            let verb: Method = method.to_uppercase().parse().unwrap();
            let send =
                |request: reqwest::RequestBuilder| async { request.send().await.unwrap().status() };
            let bare = send(api.bare(verb.clone(), &concrete)).await;
            let wrong = send(
                api.bare(verb.clone(), &concrete)
                    .bearer_auth("x".repeat(43)),
            )
            .await;
            let cookie = format!("vestibule-{}=forged", api.address.port());
            let origin = format!("http://{}", api.address);
            let forged = api
                .bare(verb.clone(), &concrete)
                .header(header::COOKIE, cookie)
                .header(header::ORIGIN, origin);
            let forged = send(forged).await;
            if OPEN.contains(&(method.as_str(), path.as_str())) {
                assert_ne!(bare, StatusCode::UNAUTHORIZED, "{method} {path}");
            } else {
                assert_eq!(
                    [bare, wrong, forged],
                    [StatusCode::UNAUTHORIZED; 3],
                    "{method} {path}"
                );
            }
            if path != "/api/logout" {
                let good = send(api.request(verb, &concrete)).await;
                assert_ne!(
                    good,
                    StatusCode::UNAUTHORIZED,
                    "{method} {path} with the token"
                );
            }
        }
    }
    assert!(operations >= 30, "{operations} operations");
    for path in [
        "/api",
        "/api/",
        "/api/nothing",
        "/ready",
        "/metrics",
        "/docs",
    ] {
        assert_eq!(
            api.bare(Method::GET, path).send().await.unwrap().status(),
            StatusCode::UNAUTHORIZED,
            "{path}"
        );
    }
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dashboard_signs_in_once_with_a_code_and_out_again() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let own = format!("http://{}", api.address);
    let code = controller
        .serving
        .link
        .rsplit('/')
        .next()
        .unwrap()
        .to_owned();
    let login = |code: String| {
        api.bare(Method::POST, "/api/login")
            .header(header::ORIGIN, &own)
            .json(&json!({ "code": code }))
            .send()
    };
    let reply = login(code.clone()).await.unwrap();
    assert_eq!(reply.status(), StatusCode::NO_CONTENT);
    let cookie = reply.headers()[header::SET_COOKIE]
        .to_str()
        .unwrap()
        .to_owned();
    for flag in ["HttpOnly", "SameSite=Strict", "Path=/"] {
        assert!(cookie.contains(flag), "{flag}");
    }
    let cookie = cookie.split(';').next().unwrap().to_owned();
    assert_eq!(
        login(code).await.unwrap().status(),
        StatusCode::UNAUTHORIZED,
        "a code is for once"
    );

    let with = |method, path: &str| api.bare(method, path).header(header::COOKIE, &cookie);
    assert_eq!(
        with(Method::GET, "/api/providers")
            .send()
            .await
            .unwrap()
            .status(),
        StatusCode::OK
    );
    let start = || with(Method::POST, "/api/auth/start").json(&json!({ "provider": "nobody" }));
    assert_eq!(
        start()
            .header(header::ORIGIN, &own)
            .send()
            .await
            .unwrap()
            .status(),
        StatusCode::BAD_REQUEST
    );
    for (origin, name) in [
        (Some("http://evil.example"), "foreign"),
        (Some("null"), "opaque"),
        (None, "none"),
    ] {
        let request = origin.iter().fold(start(), |request, origin| {
            request.header(header::ORIGIN, *origin)
        });
        assert_eq!(
            request.send().await.unwrap().status(),
            StatusCode::FORBIDDEN,
            "{name}"
        );
    }
    let codes = with(Method::POST, "/api/login-codes")
        .header(header::ORIGIN, &own)
        .send()
        .await
        .unwrap();
    assert_eq!(
        codes.status(),
        StatusCode::FORBIDDEN,
        "a dashboard makes no codes"
    );
    let more = api
        .request(Method::POST, "/api/login-codes")
        .send()
        .await
        .unwrap();
    assert_eq!(more.status(), StatusCode::CREATED);
    let more: Value = more.json().await.unwrap();
    assert!(
        more["link"]
            .as_str()
            .unwrap()
            .starts_with(&format!("{own}/#/login/"))
    );

    // The sign-in survives the controller, the code does not.
    let value = cookie.split_once('=').unwrap().1;
    assert!(!home.stores(value.as_bytes()));
    let out = with(Method::POST, "/api/logout")
        .header(header::ORIGIN, &own)
        .send()
        .await
        .unwrap();
    assert_eq!(out.status(), StatusCode::NO_CONTENT);
    assert_eq!(
        with(Method::GET, "/api/providers")
            .send()
            .await
            .unwrap()
            .status(),
        StatusCode::UNAUTHORIZED
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_host_name_is_refused_and_every_reply_is_guarded() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    for path in ["/health", "/", "/api/providers"] {
        let request = api
            .request(Method::GET, path)
            .header(header::HOST, "rebound.example:80");
        let reply = request.send().await.unwrap();
        assert_eq!(reply.status(), StatusCode::FORBIDDEN, "{path}");
    }
    for path in ["/", "/health", "/api/nothing", "/assets/none.js"] {
        let reply = api.get(path).await;
        let headers = reply.headers();
        let csp = headers["content-security-policy"].to_str().unwrap();
        assert!(
            csp.contains("frame-ancestors 'none'") && csp.contains("script-src 'self'"),
            "{path}"
        );
        assert_eq!(
            (
                &headers["x-content-type-options"],
                &headers["referrer-policy"]
            ),
            (&"nosniff".parse().unwrap(), &"no-referrer".parse().unwrap())
        );
        assert!(headers.contains_key("x-request-id"));
    }
    controller.stop().await;
}
