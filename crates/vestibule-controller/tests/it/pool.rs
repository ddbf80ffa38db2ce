//! The pool: how it is filled and emptied, and sessions that take VMs out of it.
use crate::{
    lifecycle::{FILE, SECRET, nothing_left, signing_in},
    support::{
        api::Api,
        home::Home,
        runner::{ClaimFate, Runner},
        wait_for,
    },
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use vestibule_api::{
    cause::Cause,
    egress::EgressPolicy,
    ids::SessionId,
    machine::MachineState,
    session::{NotPooled, SessionEvent, SessionEventKind, SessionState, StartKind, StartReply},
};

/// A home whose image has a snapshot.
pub(crate) fn warm(config: &str) -> Home {
    let home = Home::with(config);
    home.snapshot(&home.publish("6.1"));
    home
}

pub(crate) fn ready(home: &Home) -> Vec<Arc<Runner>> {
    let mut pool = home.runners.pool();
    pool.retain(|r| r.now() == MachineState::Paused && r.claims.lock().unwrap().is_empty());
    pool
}

/// Waits until the controller knows so many VMs to be ready, and no other of the pool is there.
pub(crate) async fn stocked(home: &Home, api: &Api, count: usize) -> Vec<Arc<Runner>> {
    wait_for(&format!("{count} VMs in the pool"), || async {
        let vms = api.json("/api/vms").await;
        let pooled = vms.as_array().unwrap().iter();
        let pooled: Vec<_> = pooled.filter(|vm| vm["pooled"] == true).collect();
        let paused = pooled.iter().all(|vm| vm["state"] == "paused");
        let there = ready(home);
        (pooled.len() == count && paused && there.len() == count).then_some(there)
    })
    .await
}

pub(crate) async fn start_cold(api: &Api) -> SessionId {
    let body = json!({ "provider": "codex", "warm": false });
    let reply = api.post("/api/auth/start", &body).await;
    assert_eq!(reply.status(), StatusCode::CREATED);
    reply.json::<StartReply>().await.unwrap().session_id
}

pub(crate) async fn so_far(api: &Api, id: SessionId) -> Vec<SessionEvent> {
    let seen = |events: &[SessionEvent]| {
        let state = events.iter().rev().find_map(|event| match event.event {
            SessionEventKind::State { state } => Some(state),
            _ => None,
        });
        state == Some(SessionState::AwaitingUser)
    };
    api.events(id, 0, seen).await
}

pub(crate) fn starts(events: &[SessionEvent]) -> Vec<StartKind> {
    let starts = events.iter().filter_map(|event| match &event.event {
        SessionEventKind::Claimed {
            start,
            snapshot_id,
            why,
        } => {
            assert_eq!(snapshot_id.is_some(), *start != StartKind::Cold);
            assert_eq!(why.is_none(), *start == StartKind::Pool);
            Some(*start)
        }
        _ => None,
    });
    starts.collect()
}

/// Why the VMs that a session was given were none of the pool.
pub(crate) fn reasons(events: &[SessionEvent]) -> Vec<NotPooled> {
    let reasons = events.iter().filter_map(|event| match &event.event {
        SessionEventKind::Claimed { why, .. } => *why,
        _ => None,
    });
    reasons.collect()
}

pub(crate) fn fallbacks(events: &[SessionEvent]) -> Vec<(StartKind, StartKind, Cause)> {
    let fallbacks = events.iter().filter_map(|event| match &event.event {
        SessionEventKind::FellBack { from, to, finding } => {
            assert!(!finding.evidence.is_empty() && !finding.why.is_empty());
            Some((*from, *to, finding.cause))
        }
        _ => None,
    });
    fallbacks.collect()
}

pub(crate) fn states(events: &[SessionEvent]) -> Vec<SessionState> {
    let states = events.iter().filter_map(|event| match event.event {
        SessionEventKind::State { state } => Some(state),
        _ => None,
    });
    states.collect()
}

pub(crate) async fn metrics(api: &Api) -> String {
    api.get("/metrics").await.text().await.unwrap()
}

pub(crate) async fn warm_start(api: &Api) -> String {
    let ready: Value = api.get("/ready").await.json().await.unwrap();
    let checks = ready["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "warm-start");
    assert_eq!(check.unwrap()["ok"], true);
    check.unwrap()["observed"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_takes_a_vm_and_the_pool_makes_another() {
    let home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let first = stocked(&home, api, 1).await.remove(0);
    let spec = &first.spec;
    assert!(spec.session_id.is_none() && spec.restore.is_some());
    assert_eq!(spec.egress, EgressPolicy::default(), "nothing leaves it");
    assert_eq!(spec.idle_deadline_s, Some(3600));

    let id = api.start("codex").await;
    let events = so_far(api, id).await;
    assert_eq!(states(&events), SessionState::ALL[..5], "one shape");
    assert_eq!(starts(&events), [StartKind::Pool]);
    assert_eq!(api.machine(id).await, spec.machine_id);
    assert_eq!(first.logins.lock().unwrap().len(), 1);
    let claims = first.claims.lock().unwrap().clone();
    assert!(claims.iter().all(|claim| claim.session_id == id));

    let second = stocked(&home, api, 1).await.remove(0);
    assert_ne!(second.spec.machine_id, spec.machine_id);
    let full = "vestibule_pool_vms{alias=\"browser\",state=\"ready\"} 1";
    let text = wait_for("the pool's gauge", || async {
        Some(metrics(api).await).filter(|text| text.contains(full))
    })
    .await;
    for line in [
        "vestibule_pool_claims_total{result=\"hit\"} 1",
        "vestibule_starts_total{start=\"pool\"} 1",
        "vestibule_phase_seconds_count{phase=\"claimed\",start=\"pool\"} 1",
        "vestibule_phase_seconds_count{phase=\"resumed\",start=\"pool\"} 1",
        "vestibule_phase_seconds_count{phase=\"ready\",start=\"pool\"} 1",
        "vestibule_phase_seconds_count{phase=\"login-started\",start=\"pool\"} 1",
        "vestibule_pool_vms{alias=\"browser\",state=\"target\"} 1",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    first.capture(FILE, SECRET);
    api.until(id, SessionState::Completed).await;
    wait_for("the used VM's end", || async {
        (!first.is_alive()).then_some(())
    })
    .await;
    assert!(second.is_alive(), "and no other's");
    assert!(
        warm_start(api)
            .await
            .starts_with("`browser`: 1 of 1 VMs ready"),
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_vm_is_given_to_two_sessions() {
    let home = warm("[limits]\nvms = 8\n[pool]\nbrowser = 2\n");
    let controller = home.serve().await;
    let api = &controller.api;
    stocked(&home, api, 2).await;
    let ids = futures_util::future::join_all((0..5).map(|_| api.start("codex"))).await;
    let mut all = Vec::new();
    let (mut machines, mut why) = (HashSet::new(), Vec::new());
    for id in &ids {
        let events = so_far(api, *id).await;
        all.extend(starts(&events));
        why.extend(reasons(&events));
        machines.insert(api.machine(*id).await);
    }
    assert_eq!(machines.len(), ids.len());
    all.sort();
    let (restore, pool) = (StartKind::Restore, StartKind::Pool);
    assert_eq!(all, [restore, restore, restore, pool, pool]);
    assert_eq!(why, [NotPooled::PoolEmpty; 3]);
    assert!(metrics(api).await.contains("result=\"miss\"} 3"));
    for id in ids {
        let runner = home.runner(api.machine(id).await).await;
        let claims = runner.claims.lock().unwrap().clone();
        assert!(claims.iter().all(|claim| claim.session_id == id));
    }
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_follows_the_alias_the_snapshot_and_the_configuration() {
    let mut home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let old = stocked(&home, api, 1).await.remove(0);

    // Another image, which has no snapshot.
    let image = home.publish("6.2");
    stocked(&home, api, 0).await;
    assert_eq!(
        *old.stops.lock().unwrap(),
        ["its alias means another image, or VMs have another size"]
    );
    assert!(
        !home.evidence(old.spec.machine_id).exists(),
        "of a VM that nobody had"
    );
    assert!(warm_start(api).await.contains("no snapshot"));

    let snapshot = home.snapshot(&image);
    let first = stocked(&home, api, 1).await.remove(0);
    assert_eq!(first.spec.restore.as_ref().unwrap().id, snapshot);
    let newer = home.snapshot(&image);
    wait_for("the newer snapshot's VM", || async {
        let pool = ready(&home);
        let of = |r: &Arc<Runner>| r.spec.restore.as_ref().unwrap().id == newer;
        (pool.len() == 1 && of(&pool[0])).then_some(())
    })
    .await;
    assert_eq!(*first.stops.lock().unwrap(), ["there is another snapshot"]);
    // Without any, what is there still serves.
    for id in [&snapshot, &newer] {
        home.remove_snapshot(id);
    }
    let id = api.start("codex").await;
    assert_eq!(starts(&so_far(api, id).await), [StartKind::Pool]);
    wait_for("the reason", || async {
        warm_start(api).await.contains("no snapshot").then_some(())
    })
    .await;
    api.cancel(id).await;

    home.snapshot(&image);
    let last = stocked(&home, api, 1).await.remove(0);
    controller.stop().await;
    assert!(last.is_alive());
    home.configure("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    nothing_left(&home).await;
    assert_eq!(
        *last.stops.lock().unwrap(),
        ["the configuration keeps none of its alias"]
    );
    controller.stop().await;
}

/// Neither the VMs that began from the good one, nor the good one itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_snapshot_that_can_not_be_used_takes_nothing_with_it() {
    let home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let good = stocked(&home, api, 1).await.remove(0);
    let of = |runner: &Runner| runner.spec.restore.as_ref().unwrap().id.clone();
    *home.runners.restores_fail.lock().unwrap() = Some(Cause::SnapshotRefused);
    let bad = home.snapshot(&good.spec.image_digest);
    wait_for("the words", || async {
        let words = warm_start(api).await;
        let both = [bad.short(), of(&good).short()].map(|id| words.contains(id));
        (both == [true; 2] && words.contains("set aside")).then_some(())
    })
    .await;
    assert_eq!(*good.stops.lock().unwrap(), Vec::<String>::new());
    // Sessions take it, and the next ones begin from what it began from.
    *home.runners.restores_fail.lock().unwrap() = None;
    let first = api.start("codex").await;
    assert_eq!(api.machine(first).await, good.spec.machine_id);
    let next = stocked(&home, api, 1).await.remove(0);
    assert_eq!(of(&next), of(&good));
    controller.stop().await;
}

/// The new one's first VM has its place from an old one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_host_gets_over_to_a_new_snapshot() {
    let home = warm("[limits]\nvms = 2\n[pool]\nbrowser = 2\n");
    let controller = home.serve().await;
    let old = stocked(&home, &controller.api, 2).await.remove(0);
    let newer = home.snapshot(&old.spec.image_digest);
    wait_for("VMs of the newer snapshot", || async {
        let pool = ready(&home);
        let of = |r: &Arc<Runner>| r.spec.restore.as_ref().unwrap().id == newer;
        (pool.len() == 2 && pool.iter().all(of)).then_some(())
    })
    .await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alias_that_moves_during_a_claim_changes_nothing_for_it() {
    let home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let pooled = stocked(&home, api, 1).await.remove(0);
    *pooled.claim_fate.lock().unwrap() = ClaimFate::Hangs;
    let id = api.start("codex").await;
    assert_eq!(api.machine(id).await, pooled.spec.machine_id);
    home.snapshot(&home.publish("6.2"));
    *pooled.claim_fate.lock().unwrap() = ClaimFate::Granted;
    let view = api.until(id, SessionState::AwaitingUser).await;
    assert!(view.made_from_older_image);
    let next = stocked(&home, api, 1).await.remove(0);
    assert_ne!(next.spec.image_digest, pooled.spec.image_digest);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_dies_in_the_pool_is_replaced() {
    let home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let first = stocked(&home, api, 1).await.remove(0);
    std::fs::write(format!("{}/runner.stderr", first.spec.vm_dir), "so sad\n").unwrap();
    first.die();
    let second = stocked(&home, api, 1).await.remove(0);
    assert_ne!(second.spec.machine_id, first.spec.machine_id);
    assert!(!std::fs::exists(&first.spec.vm_dir).unwrap());
    let evidence = home.evidence(first.spec.machine_id);
    assert!(evidence.join("runner.stderr").exists(), "it failed");

    // Somebody ends it by hand.
    let path = format!("/api/vms/{}", second.spec.machine_id);
    let reply = api.request(Method::DELETE, &path).send().await.unwrap();
    assert_eq!(reply.status(), StatusCode::NO_CONTENT);
    wait_for("a third", || async {
        let pool = ready(&home);
        let other = |r: &Arc<Runner>| r.spec.machine_id != second.spec.machine_id;
        (pool.len() == 1 && other(&pool[0])).then_some(())
    })
    .await;
    assert_eq!(*second.stops.lock().unwrap(), ["asked for"]);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_whose_reply_is_lost_holds() {
    let home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let pooled = stocked(&home, api, 1).await.remove(0);
    *pooled.claim_fate.lock().unwrap() = ClaimFate::ReplyLost;
    let id = api.start("codex").await;
    let events = so_far(api, id).await;
    assert_eq!(
        (starts(&events), fallbacks(&events).len()),
        (vec![StartKind::Pool], 0)
    );
    assert_eq!(api.machine(id).await, pooled.spec.machine_id);
    let claims = pooled.claims.lock().unwrap().clone();
    assert!(claims.iter().all(|claim| claim.session_id == id));

    // Cancelled before anybody knows whether the claim was heard: the VM is the session's all the same.
    let next = stocked(&home, api, 1).await.remove(0);
    *next.claim_fate.lock().unwrap() = ClaimFate::Hangs;
    let id = api.start("codex").await;
    assert_eq!(api.machine(id).await, next.spec.machine_id);
    api.cancel(id).await;
    *next.claim_fate.lock().unwrap() = ClaimFate::ReplyLost;
    wait_for("its end", || async { (!next.is_alive()).then_some(()) }).await;
    assert_eq!(*next.stops.lock().unwrap(), ["session cancelled"]);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_can_not_be_filled_says_why_and_does_not_try_again_at_once() {
    let home = warm("");
    *home.runners.restores_fail.lock().unwrap() = Some(Cause::SnapshotRefused);
    let began = Instant::now();
    let controller = home.serve().await;
    let api = &controller.api;
    wait_for("the reason", || async {
        let words = warm_start(api).await;
        (words.contains("set aside") && words.contains("the snapshot has aa")).then_some(())
    })
    .await;
    nothing_left(&home).await;
    let (id, runner) = signing_in(&home, api).await;
    assert!(runner.spec.restore.is_none(), "people do not pay for it");
    assert_eq!(fallbacks(&so_far(api, id).await), []);
    // The pool's, and the sign-in's. It tries again when 5 s have passed, and not before.
    let launches = *home.runners.launches.lock().unwrap();
    let again = began.elapsed().as_secs() / 5;
    assert!((2..=2 + again).contains(&launches.into()), "{launches}");
    api.cancel(id).await;
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_gives_its_place_to_whoever_needs_it() {
    let home = warm("[limits]\nvms = 2\n[pool]\nbrowser = 2\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let pool = stocked(&home, api, 2).await;
    let cold = start_cold(api).await;
    let runner = home.runner(api.machine(cold).await).await;
    runner.up();
    api.until(cold, SessionState::AwaitingUser).await;
    let stopped: Vec<_> = pool
        .iter()
        .filter(|r| !r.stops.lock().unwrap().is_empty())
        .collect();
    assert_eq!(stopped.len(), 1);
    assert_eq!(
        *stopped[0].stops.lock().unwrap(),
        ["a sign-in needs its place"]
    );
    assert_eq!(home.runners.count_alive(), 2);

    // The one that is left serves; then the host is full, and those that wait are told their position.
    let hit = api.start("codex").await;
    assert_eq!(starts(&so_far(api, hit).await), [StartKind::Pool]);
    let (next, last) = (api.start("codex").await, api.start("codex").await);
    for (id, words) in [(next, "is next"), (last, "1 sign-ins are ahead")] {
        let told = |events: &[SessionEvent]| {
            let told = |event: &SessionEvent| format!("{:?}", event.event).contains(words);
            events.iter().any(told)
        };
        api.events(id, 0, told).await;
    }
    assert_eq!(home.runners.count_alive(), 2);
    // People first: the place goes to who is next, not to the pool.
    api.cancel(cold).await;
    let events = so_far(api, next).await;
    assert_eq!(starts(&events), [StartKind::Restore]);
    let waits = |events: &[SessionEvent]| {
        let next = |event: &SessionEvent| format!("{:?}", event.event).contains("is next");
        events.iter().any(next)
    };
    api.events(last, 0, waits).await;
    assert_eq!(api.session(last).await.state, SessionState::Placing);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pool_is_filled_though_a_sign_in_is_always_on_its_way() {
    let home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let first = stocked(&home, api, 1).await.remove(0);
    // It boots for as long as the test lasts.
    let slow = start_cold(api).await;
    api.machine(slow).await;
    let id = api.start("codex").await;
    assert_eq!(api.machine(id).await, first.spec.machine_id);
    api.until(id, SessionState::AwaitingUser).await;
    wait_for("whom the pool waits for", || async {
        let words = warm_start(api).await;
        words.contains("sign-ins that start go first").then_some(())
    })
    .await;
    let second = stocked(&home, api, 1).await.remove(0);
    assert_ne!(second.spec.machine_id, first.spec.machine_id);
    assert_eq!(api.session(slow).await.state, SessionState::Starting);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn controllers_come_and_go_and_the_pool_stays() {
    let home = warm("");
    let controller = home.serve().await;
    let pooled = stocked(&home, &controller.api, 1).await.remove(0);
    controller.kill().await;

    let controller = home.serve().await;
    let again = stocked(&home, &controller.api, 1).await.remove(0);
    assert_eq!(again.spec.machine_id, pooled.spec.machine_id);
    assert_eq!(*home.runners.launches.lock().unwrap(), 1, "adopted");
    // Killed between the take and the claim.
    *pooled.claim_fate.lock().unwrap() = ClaimFate::Hangs;
    let id = controller.api.start("codex").await;
    assert_eq!(controller.api.machine(id).await, pooled.spec.machine_id);
    controller.kill().await;
    *pooled.claim_fate.lock().unwrap() = ClaimFate::Granted;

    let controller = home.serve().await;
    let api = &controller.api;
    assert_eq!(starts(&so_far(api, id).await), [StartKind::Pool]);
    let next = stocked(&home, api, 1).await.remove(0);
    controller.kill().await;
    // Died while no controller ran.
    next.die();
    let controller = home.serve().await;
    let api = &controller.api;
    let last = stocked(&home, api, 1).await.remove(0);
    assert_ne!(last.spec.machine_id, next.spec.machine_id);
    api.cancel(id).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_while_the_pool_is_filled_nothing_is_made_twice() {
    for delay_ms in [0, 5, 15, 40] {
        let home = warm("");
        home.runners.restores_wait.store(true, Ordering::Relaxed);
        let controller = home.serve().await;
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        controller.kill().await;
        let controller = home.serve().await;
        let api = &controller.api;
        let filling = wait_for("a VM that is made", || async { home.runners.pool().pop() }).await;
        filling.up();
        stocked(&home, api, 1).await;
        assert_eq!(*home.runners.launches.lock().unwrap(), 1, "{delay_ms} ms");
        controller.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_takes_a_vm_that_is_still_on_its_way() {
    let home = warm("");
    home.runners.restores_wait.store(true, Ordering::Relaxed);
    let controller = home.serve().await;
    let api = &controller.api;
    let filling = wait_for("a VM that is made", || async {
        let vms = api.json("/api/vms").await;
        let known = vms[0]["state"] == "booting";
        home.runners.pool().pop().filter(|_| known)
    })
    .await;
    let id = api.start("codex").await;
    assert_eq!(api.machine(id).await, filling.spec.machine_id);
    wait_for("the claim", || async {
        (!filling.claims.lock().unwrap().is_empty()).then_some(())
    })
    .await;
    filling.up();
    api.until(id, SessionState::AwaitingUser).await;
    assert_eq!(*filling.pauses.lock().unwrap(), 0, "it is somebody's");
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_given_back_when_the_host_needs_it() {
    let home = warm("");
    *home.runners.memory.lock().unwrap() = Some((2048 + 511, 0.0));
    let controller = home.serve().await;
    let api = &controller.api;
    wait_for("the reason", || async {
        let words = warm_start(api).await;
        words
            .contains("2559 MiB are available of 2560")
            .then_some(())
    })
    .await;
    assert_eq!(*home.runners.launches.lock().unwrap(), 0);
    *home.runners.memory.lock().unwrap() = Some((2048 + 512, 9.9));
    let pooled = stocked(&home, api, 1).await.remove(0);
    *home.runners.memory.lock().unwrap() = Some((8192, 10.0));
    nothing_left(&home).await;
    assert_eq!(
        *pooled.stops.lock().unwrap(),
        ["the host is short of memory"]
    );
    *home.runners.memory.lock().unwrap() = Some((8192, 0.0));
    wait_for("the pause", || async {
        let words = warm_start(api).await;
        words.contains("given back a moment ago").then_some(())
    })
    .await;
    // A person's sign-in does not wait for that.
    let id = api.start("codex").await;
    assert_eq!(starts(&so_far(api, id).await), [StartKind::Restore]);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_took_is_replaced_in_time() {
    let home = warm("[deadlines]\npool_s = 1\n");
    let controller = home.serve().await;
    let first = wait_for("a VM", || async { ready(&home).pop() }).await;
    wait_for("its successor", || async {
        let id = first.spec.machine_id;
        let pool = ready(&home);
        pool.iter().any(|r| r.spec.machine_id != id).then_some(())
    })
    .await;
    assert_eq!(*first.stops.lock().unwrap(), ["it is too old"]);
    controller.stop().await;
}
