//! No credential leaves without its line in the audit log: whoever asks for one hears so, and gets it when the log is mended.
use crate::{
    lifecycle::{FILE, SECRET, signing_in},
    support::{api::Api, home::Home},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use camino::Utf8Path;
use reqwest::StatusCode;
use serde_json::{Value, json};
use vestibule_api::{ids::CredentialId, session::SessionState};

/// A credential in the vault.
pub(crate) async fn sealed(home: &Home, api: &Api) -> CredentialId {
    let (id, runner) = signing_in(home, api).await;
    runner.capture(FILE, SECRET);
    let view = api.until(id, SessionState::Completed).await;
    view.credential_id.unwrap()
}

/// Status and body of a request for its content. Nothing of the content is in an answer that is an error.
pub(crate) async fn content(api: &Api, id: CredentialId) -> (StatusCode, Value) {
    let path = format!("/api/credentials/{id}/content");
    let reply = api.post(&path, &json!({ "purpose": "test" })).await;
    let status = reply.status();
    let text = reply.text().await.unwrap();
    if !status.is_success() {
        let secret = std::str::from_utf8(SECRET).unwrap().trim();
        for part in [secret, "sk-test", &BASE64.encode(SECRET), FILE] {
            assert!(!text.contains(part), "{status}: {text}");
        }
    }
    (status, serde_json::from_str(&text).unwrap())
}

/// That it came, whole.
pub(crate) fn is_content(reply: &(StatusCode, Value)) {
    let (status, body) = reply;
    assert_eq!(*status, StatusCode::OK, "{body}");
    let content = body["files"][0]["content"].as_str().unwrap();
    assert_eq!(BASE64.decode(content).unwrap(), SECRET);
}

/// That whoever asked hears why it did not.
pub(crate) fn is_unaudited(reply: &(StatusCode, Value)) {
    let (status, body) = reply;
    assert_eq!(*status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    let error = &body["error"];
    assert_eq!(error["code"], "unavailable", "{body}");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("audit log"), "{message}");
    let fix = error["fix"].as_str().unwrap();
    assert!(fix.contains("vestibule audit verify"), "{fix}");
}

/// Lines about a release.
fn released(log: &Utf8Path) -> usize {
    let text = std::fs::read_to_string(log).unwrap();
    text.lines()
        .filter(|line| line.contains("\"released\""))
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_log_no_content_leaves_and_with_it_again() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let id = sealed(&home, api).await;
    is_content(&content(api, id).await);
    let log = home.path().join("vault/audit.log");
    let aside = home.path().join("aside.log");
    let without_its_last_line = || {
        let whole = std::fs::read_to_string(&aside).unwrap();
        let lines: Vec<_> = whole.split_inclusive('\n').collect();
        lines[..lines.len() - 1].concat()
    };
    type Damage<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn());
    let damages: [Damage<'_>; 4] = [
        (
            "a directory stands in its place",
            &|| std::fs::create_dir(&log).unwrap(),
            &|| std::fs::remove_dir(&log).unwrap(),
        ),
        ("it is gone", &|| {}, &|| {}),
        (
            "its last line is gone",
            &|| std::fs::write(&log, without_its_last_line()).unwrap(),
            &|| std::fs::remove_file(&log).unwrap(),
        ),
        (
            "what takes every line and keeps none stands in its place",
            &|| std::os::unix::fs::symlink("/dev/null", &log).unwrap(),
            &|| std::fs::remove_file(&log).unwrap(),
        ),
    ];
    for (nth, (what, damage, mend)) in (1..).zip(damages) {
        std::fs::rename(&log, &aside).unwrap();
        damage();
        for _ in 0..2 {
            let reply = content(api, id).await;
            assert_ne!(reply.0, StatusCode::OK, "{what}");
            is_unaudited(&reply);
        }
        mend();
        std::fs::rename(&aside, &log).unwrap();
        assert_eq!(
            released(&log),
            nth,
            "{what}: nothing was written down either"
        );
        is_content(&content(api, id).await);
        assert_eq!(released(&log), nth + 1, "{what}, and mended");
    }
    let metrics = api.get("/metrics").await.text().await.unwrap();
    let counted = "vestibule_credentials_released_total 5";
    assert!(metrics.contains(counted), "{metrics}");
    controller.stop().await;
}
