//! A running controller against its own OpenAPI document, by schemathesis (`script/schemathesis`).
use crate::{
    lifecycle::{FILE, SECRET, signing_in},
    support::{api::Api, home::Home, wait_for},
};
use std::process::Stdio;
use vestibule_api::session::SessionState;

/// Where an answer may be other than the document alone lets one expect, and why.
const EXCEPTIONS: &str = r#"
# Not ready is an answer, with the same body.
[[operations]]
include-operation-id = "ready"
checks.not_a_server_error.enabled = false

# Whether a provider, flow, image, user or organisation is there is not the schema's to say; 400 names the field.
[[operations]]
include-operation-id = ["start", "addUser", "addToken"]
checks.positive_data_acceptance.enabled = false

# A plain request is not an upgrade.
[[operations]]
include-operation-id = ["view", "terminal"]
checks.positive_data_acceptance.enabled = false
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs schemathesis: script/schemathesis"]
async fn the_document_is_what_the_server_does() {
    let program = std::env::var("VESTIBULE_SCHEMATHESIS").expect("run script/schemathesis");
    let examples =
        std::env::var("VESTIBULE_SCHEMATHESIS_EXAMPLES").unwrap_or_else(|_| "20".to_owned());
    let home = Home::with(
        "[limits]\nvms = 8\nwaiting = 1000\nlive_per_user = 0\nstarts_per_minute = 0\n[pool]\nbrowser = 0\n",
    );
    let controller = home.serve().await;
    let api = &controller.api;
    // In a file: not every role may fetch it.
    let document = home.path().join("openapi.json");
    let text = api.get("/api/openapi.json").await.bytes().await.unwrap();
    std::fs::write(&document, text).unwrap();
    api.organisation("acme").await;
    let (operator, _) = api.service("operator", "operator", Some("acme")).await;
    let (signer, _) = api.service("signer", "signer", Some("acme")).await;
    let (engineer, _) = api
        .service("engineer", "image-engineer", Some("acme"))
        .await;
    let (consumer, _) = api.service("consumer", "consumer", Some("acme")).await;
    // Each with who makes the objects: a consumer starts nothing, and fetches what its organisation has. The admin last: what it
    // finds it may remove, the others' tokens too.
    for (who, api, maker) in [
        ("signer", &signer, &signer),
        ("image-engineer", &engineer, &engineer),
        ("consumer", &consumer, &operator),
        ("operator", &operator, &operator),
        ("admin", api, api),
    ] {
        let config = config(&home, maker).await;
        let path = home.path().join(format!("{who}.toml"));
        std::fs::write(&path, config).unwrap();
        let run = tokio::process::Command::new(&program)
            .args(["--config-file", path.as_str(), "run"])
            .arg(&document)
            .args(["--url", &format!("http://{}", api.address)])
            .args(["--header", &format!("Authorization: Bearer {}", api.token)])
            .args([
                "--max-examples",
                &examples,
                "--phases",
                "examples,coverage,fuzzing",
            ])
            // Signing out and codes need what this caller does not have: a cookie, the home's token.
            .args([
                "--exclude-operation-id",
                "logout",
                "--exclude-operation-id",
                "loginCode",
            ])
            .args([
                "--continue-on-failure",
                "--seed",
                "6",
                "--no-color",
                "--workers",
                "1",
            ])
            .current_dir(home.path())
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(
            run.status.success(),
            "as {who}:\n{said}\n{}",
            String::from_utf8_lossy(&run.stderr)
        );
        let summary = said.lines().rev().take(30).collect::<Vec<_>>();
        println!("as {who}:");
        summary.iter().rev().for_each(|line| println!("{line}"));
    }
    controller.stop().await;
}

/// The exceptions, and the ids of objects of this one's: a session under way, and what is left of one that completed.
async fn config(home: &Home, api: &Api) -> String {
    let (live, _runner) = signing_in(home, api).await;
    let (done, runner) = signing_in(home, api).await;
    runner.capture(FILE, SECRET);
    let state = wait_for("the capture", || async {
        let view = api.session(done).await;
        let waits = matches!(
            view.state,
            SessionState::Completed | SessionState::Confirming
        );
        waits.then_some(view.state)
    })
    .await;
    if state == SessionState::Confirming {
        let account = serde_json::json!({ "account": "ada@example.org" });
        api.post(&format!("/api/auth/session/{done}/confirm"), &account)
            .await;
    }
    let view = api.until(done, SessionState::Completed).await;
    let (machine, credential) = (view.machine_id.unwrap(), view.credential_id.unwrap());
    let of = |path: &str, id: String| {
        // A session that another request has ended, and a role without the right, are answers too.
        format!(
            "[[operations]]\ninclude-path-regex = \"{path}\"\nparameters = {{ \"path.id\" = \"{id}\" }}\n\
             checks.positive_data_acceptance.expected-statuses = [\"2xx\", \"401\", \"403\", \"404\", \"409\", \"410\", \"503\"]\n"
        )
    };
    [
        EXCEPTIONS.to_owned(),
        of("^/api/auth/session/", live.to_string()),
        of("^/api/vms/", machine.to_string()),
        of("^/api/credentials/", credential.to_string()),
    ]
    .join("\n")
}
