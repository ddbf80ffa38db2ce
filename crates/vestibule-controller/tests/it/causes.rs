//! What a failed session is told where its own finding says little: what the controller knows besides the VM's evidence.
use crate::{
    lifecycle::{nothing_left, signing_in},
    support::{api::Api, home::Home, wait_for},
};
use serde_json::json;
use vestibule_api::{
    agent::LoginEvent,
    cause::Cause,
    egress::EgressReason,
    finding::{Finding, Quote, Verdict},
    ids::SessionId,
    machine::RunnerEventKind,
    session::SessionState,
};

/// The verdict with which the session's VM was put away.
async fn verdict(home: &Home, api: &Api, id: SessionId) -> Verdict {
    api.until(id, SessionState::Failed).await;
    nothing_left(home).await;
    let vm = api.session(id).await.machine_id.unwrap();
    let path = home.evidence(vm).join("verdict.json");
    wait_for("the verdict", || async {
        serde_json::from_slice(&std::fs::read(&path).ok()?).ok()
    })
    .await
}

fn finding(cause: Cause, said: &str) -> Finding {
    let quote = Quote {
        source: "terminal".to_owned(),
        line: None,
        text: said.to_owned(),
    };
    Finding::new(cause, quote, "why", "fix")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tool_without_a_way_out_is_told_so() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    for (host, reason) in [
        ("api.vendor.test", EgressReason::NameNotFound),
        ("update.browser.test", EgressReason::Policy),
    ] {
        runner.say(RunnerEventKind::Egress {
            host: host.to_owned(),
            port: 443,
            reason,
            count: 2,
        });
    }
    let said = "error: POST https://api.vendor.test/oauth/token failed";
    runner.login(LoginEvent::Failed {
        finding: finding(Cause::ToolFailed, said),
    });
    let verdict = verdict(&home, api, id).await;
    let found = verdict.finding.unwrap();
    assert_eq!(found.cause, Cause::NameNotFound, "{found:?}");
    assert!(found.evidence[0].text.contains("api.vendor.test:443"));
    assert_eq!(verdict.also[0].cause, Cause::ToolFailed);
    // The evidence has it first.
    wait_for("the session's own verdict", || async {
        let told = api.session(id).await.failure?.finding?;
        (told.cause == Cause::NameNotFound).then_some(())
    })
    .await;
    controller.stop().await;
}

/// An image that was mended is of no use to a VM that began before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_of_an_older_image_is_told_so() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let id = api.start("codex").await;
    let runner = home.runner(api.machine(id).await).await;
    let newer = home.publish("6.1.0-2");
    let missed = finding(Cause::DisplayNotReady, "no display");
    // What a real runner leaves.
    let evidence = home.evidence(runner.spec.machine_id);
    std::fs::create_dir_all(&evidence).unwrap();
    let record = json!({ "spec": runner.spec, "view": { "failure": missed } });
    std::fs::write(evidence.join("machine.json"), record.to_string()).unwrap();
    runner.say(RunnerEventKind::Failed { finding: missed });
    let verdict = verdict(&home, api, id).await;
    let found = verdict.finding.unwrap();
    assert_eq!(found.cause, Cause::MadeFromOlderImage, "{found:?}");
    assert!(found.evidence[0].text.contains(newer.as_str()), "{found:?}");
    assert_eq!(verdict.also[0].cause, Cause::DisplayNotReady);
    controller.stop().await;
}
