//! What the controller removes by itself: evidence that is old, images that nothing needs.
use crate::{
    lifecycle::{nothing_left, signing_in},
    support::{api::Api, home::Home, wait_for},
};
use reqwest::StatusCode;
use serde_json::{Value, json};
use std::time::Duration;
use vestibule_api::{ids::ImageDigest, time::Timestamp};

async fn count(api: &Api, name: &str) -> u64 {
    wait_for("a reconciler's first run", || async {
        let all = api.json("/api/reconcilers").await;
        let one = all.as_array().unwrap().iter().find(|r| r["name"] == name);
        let one = one.expect("it is listed").clone();
        assert_eq!(one["lastError"], Value::Null);
        (one["runs"].as_u64() > Some(0)).then(|| one["lastCount"].as_u64().unwrap())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evidence_goes_when_it_is_old() {
    let home = Home::with("[limits]\nkeep_evidence_days = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, _runner) = signing_in(&home, api).await;
    api.cancel(id).await;
    nothing_left(&home).await;
    let vm = api.session(id).await.machine_id.unwrap();
    let path = format!("/api/vms/{vm}/verdict");
    let view = wait_for("the VM's end", || async {
        let view = api.json(&format!("/api/vms/{vm}")).await;
        (view["goneAt"] != Value::Null).then_some(view)
    });
    assert_eq!(view.await["hasEvidence"], true);
    controller.stop().await;
    // What an operator puts there stays, whatever its age.
    let own = home.path().join("evidence/notes.txt");
    std::fs::write(&own, "mine").unwrap();

    let controller = home.serve().await;
    let api = &controller.api;
    assert_eq!(count(api, "evidence").await, 1);
    assert!(!home.evidence(vm).exists() && own.exists());
    let reply = api.get(&path).await;
    assert_eq!(reply.status(), StatusCode::NOT_FOUND);
    let error: Value = reply.json().await.unwrap();
    let fix = error["error"]["fix"].as_str().unwrap();
    assert!(fix.contains("keep_evidence_days"), "{fix}");
    assert_eq!(
        api.json(&format!("/api/vms/{vm}")).await["hasEvidence"],
        false
    );
    assert_eq!(
        api.session(id).await.state.id(),
        "cancelled",
        "the session is kept"
    );
    controller.stop().await;
}

/// As if the image had been built so long ago.
fn built(home: &Home, image: &ImageDigest, ago: Duration) {
    let path = home.path().join(format!("images/{image}/build.json"));
    let mut build: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let micros = Timestamp::now().as_micros() - i64::try_from(ago.as_micros()).unwrap();
    build["builtAt"] = json!(Timestamp::from_micros(micros));
    std::fs::write(path, build.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_without_an_alias_go_a_week_after_they_were_built() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let day = Duration::from_secs(86_400);
    let [old, young] = [("6.1.0-1", 8), ("6.1.0-2", 6)].map(|(kernel, days)| {
        let image = home.publish(kernel);
        built(&home, &image, days * day);
        image
    });
    let published = home.publish("6.1.0-3");
    built(&home, &published, 100 * day);
    let snapshots = [&old, &published].map(|image| home.snapshot(image));
    let controller = home.serve().await;
    let api = &controller.api;
    assert_eq!(count(api, "images").await, 2, "an image and its snapshot");
    let there = |path: String| home.path().join(path).exists();
    let images = [&old, &young, &published].map(|image| there(format!("images/{image}")));
    assert_eq!(images, [false, true, true]);
    let snapshots = snapshots.map(|id| there(format!("snapshots/{}", id.as_str())));
    assert_eq!(snapshots, [false, true]);
    let (id, _runner) = signing_in(&home, api).await;
    api.cancel(id).await;
    nothing_left(&home).await;
    controller.stop().await;
}
