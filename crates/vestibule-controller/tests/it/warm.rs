//! Warm starts: each way in which a session's VM begins, what it gets when that fails, and how all of it is told.
use crate::{
    pool::{
        fallbacks, metrics, reasons, so_far, start_cold, starts, states, stocked, warm, warm_start,
    },
    support::{
        api::{Api, bytes},
        home::Home,
        runner::ClaimFate,
        wait_for,
    },
};
use serde_json::json;
use std::sync::atomic::Ordering;
use vestibule_api::{
    agent::LoginEvent,
    cause::Cause,
    ids::{MachineId, SessionId},
    machine::{Phase, RunnerEventKind},
    session::{NotPooled, Right, SessionEventKind, SessionState, StartKind},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_viewer_sees_first_is_an_event() {
    let home = warm("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let id = api.start("codex").await;
    let events = so_far(api, id).await;
    assert_eq!(starts(&events), [StartKind::Restore]);
    assert_eq!(reasons(&events), [NotPooled::NoPool]);
    let runner = home.runner(api.machine(id).await).await;
    assert_eq!(runner.spec.session_id, Some(id));
    assert_eq!(runner.spec.boot_deadline_s, 120);
    runner.login(LoginEvent::BrowserOpened);
    runner.say(RunnerEventKind::FirstFrame);
    let events = api
        .events(id, 0, |events| {
            let kinds = events.iter().map(|event| &event.event);
            let wanted = [
                SessionEventKind::BrowserNavigated,
                SessionEventKind::FirstFrame,
            ];
            kinds.filter(|kind| wanted.contains(kind)).count() == 2
        })
        .await;
    assert_eq!(states(&events), SessionState::ALL[..5]);
    let mut view = api.view(id, Right::View).await;
    assert!(bytes(&mut view).await.is_some());
    let text = metrics(api).await;
    for line in [
        "vestibule_starts_total{start=\"restore\"} 1",
        "vestibule_phase_seconds_count{phase=\"browser-navigated\",start=\"restore\"} 1",
        "vestibule_phase_seconds_count{phase=\"first-frame\",start=\"restore\"} 1",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert!(
        !text.contains("result=\"miss\""),
        "there is no pool to miss"
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_may_ask_for_a_boot() {
    let home = warm("");
    let controller = home.serve().await;
    let api = &controller.api;
    let pooled = stocked(&home, api, 1).await.remove(0);
    let id = start_cold(api).await;
    let runner = home.runner(api.machine(id).await).await;
    assert!(runner.spec.restore.is_none() && pooled.claims.lock().unwrap().is_empty());
    runner.up();
    let events = so_far(api, id).await;
    assert_eq!(starts(&events), [StartKind::Cold]);
    assert_eq!(reasons(&events), [NotPooled::Asked]);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_boot_for_want_of_a_snapshot_is_told_phase_by_phase() {
    let home = Home::with("");
    home.publish("6.1");
    let controller = home.serve().await;
    let api = &controller.api;
    let id = api.start("codex").await;
    let runner = home.runner(api.machine(id).await).await;
    let boot = [
        Phase::VmmStarted,
        Phase::KernelOutput,
        Phase::StreamUp,
        Phase::AgentUp,
    ];
    for phase in boot {
        runner.say(RunnerEventKind::Phase { phase });
    }
    runner.up();
    let events = so_far(api, id).await;
    assert_eq!(starts(&events), [StartKind::Cold]);
    assert_eq!(reasons(&events), [NotPooled::NoSnapshot]);
    let told = events.iter().filter_map(|event| match event.event {
        SessionEventKind::Phase { phase } => Some(phase),
        _ => None,
    });
    let all = [&boot[..], &[Phase::Painted, Phase::Ready]].concat();
    assert_eq!(told.collect::<Vec<_>>(), all);
    let text = metrics(api).await;
    for phase in "claimed vmm-started kernel-output stream-up agent-up painted ready".split(' ') {
        let line = format!("vestibule_phase_seconds_count{{phase=\"{phase}\",start=\"cold\"}} 1");
        assert!(text.contains(&line), "{line} in {text}");
    }
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_can_not_be_restored_is_booted_around() {
    for cause in [Cause::SnapshotRefused, Cause::SnapshotFailed] {
        let home = warm("[pool]\nbrowser = 0\n");
        *home.runners.restores_fail.lock().unwrap() = Some(cause);
        let controller = home.serve().await;
        let api = &controller.api;
        let id = api.start("codex").await;
        let (first, second) = two_machines(&home, api, id).await;
        home.runner(second).await.up();
        let events = so_far(api, id).await;
        assert_eq!(starts(&events), [StartKind::Restore, StartKind::Cold]);
        let why = [NotPooled::NoPool, NotPooled::FellBack];
        assert_eq!(reasons(&events), why);
        let back = (StartKind::Restore, StartKind::Cold, cause);
        assert_eq!(fallbacks(&events), [back]);
        let text = format!("{events:?}");
        assert!(
            text.contains("the snapshot has aa, here it is bb"),
            "{text}"
        );
        assert!(api.session(id).await.failure.is_none());
        let evidence = home.evidence(first);
        wait_for("the first VM's evidence", || async {
            evidence.join("verdict.json").exists().then_some(())
        })
        .await;
        let verdict = std::fs::read_to_string(evidence.join("verdict.json")).unwrap();
        assert!(verdict.contains(cause.id()), "{verdict}");
        assert_eq!(
            home.runners.count_alive(),
            1,
            "nothing of the first is left"
        );
        assert!(!home.path().join("vms").join(first.to_string()).exists());

        // The next one does not pay for it again, and it is said why.
        wait_for("the words", || async {
            let words = warm_start(api).await;
            (words.contains("set aside") && words.contains(cause.id())).then_some(())
        })
        .await;
        let next = api.start("codex").await;
        let runner = home.runner(api.machine(next).await).await;
        assert!(runner.spec.restore.is_none());
        runner.up();
        let events = so_far(api, next).await;
        assert_eq!(starts(&events), [StartKind::Cold]);
        let why = if cause == Cause::SnapshotRefused {
            NotPooled::SnapshotRefused
        } else {
            NotPooled::SnapshotFailed
        };
        assert_eq!(reasons(&events), [why]);
        controller.kill().await;

        // The host may have changed: the next controller tries it again.
        *home.runners.restores_fail.lock().unwrap() = None;
        let controller = home.serve().await;
        let api = &controller.api;
        let id = api.start("codex").await;
        assert_eq!(starts(&so_far(api, id).await), [StartKind::Restore]);
        for id in [id, next] {
            api.cancel(id).await;
        }
        controller.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_vms_never_come_up_costs_two_sessions() {
    let home = warm("[pool]\nbrowser = 0\n");
    *home.runners.restores_fail.lock().unwrap() = Some(Cause::BrowserNotReady);
    let controller = home.serve().await;
    let api = &controller.api;
    for _ in 0..2 {
        let id = api.start("codex").await;
        let (_, second) = two_machines(&home, api, id).await;
        home.runner(second).await.up();
        let back = (StartKind::Restore, StartKind::Cold, Cause::BrowserNotReady);
        assert_eq!(fallbacks(&so_far(api, id).await), [back]);
        api.cancel(id).await;
    }
    let id = api.start("codex").await;
    home.runner(api.machine(id).await).await.up();
    let events = so_far(api, id).await;
    assert_eq!(starts(&events), [StartKind::Cold]);
    assert_eq!(reasons(&events), [NotPooled::SnapshotFailed]);
    wait_for("the words", || async {
        let words = warm_start(api).await;
        (words.contains("set aside") && words.contains("browser-not-ready")).then_some(())
    })
    .await;
    controller.stop().await;
}

/// Its runner says what is wrong with it (here the test does), and the session hears that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncated_snapshot_is_no_missing_one() {
    let home = warm("[pool]\nbrowser = 0\n");
    let snapshots = home.path().join("snapshots");
    let id = snapshots.read_dir_utf8().unwrap().next().unwrap().unwrap();
    std::fs::write(id.path().join("memory"), "").unwrap();
    *home.runners.restores_fail.lock().unwrap() = Some(Cause::SnapshotRefused);
    let controller = home.serve().await;
    let api = &controller.api;
    wait_for("the reason", || async {
        let why = "is damaged: its `memory` has 0 bytes, the manifest says 1";
        warm_start(api).await.contains(why).then_some(())
    })
    .await;
    let id = api.start("codex").await;
    let (_, second) = two_machines(&home, api, id).await;
    home.runner(second).await.up();
    let back = (StartKind::Restore, StartKind::Cold, Cause::SnapshotRefused);
    assert_eq!(fallbacks(&so_far(api, id).await), [back]);
    let next = api.start("codex").await;
    home.runner(api.machine(next).await).await.up();
    let events = so_far(api, next).await;
    assert_eq!(reasons(&events), [NotPooled::SnapshotRefused]);
    controller.stop().await;
}

/// As Firecracker 1.16 does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_pauses_nothing_has_a_pool_all_the_same() {
    let home = warm("[pool]\nbrowser = 2\n");
    home.runners.stay_up.store(true, Ordering::Relaxed);
    let controller = home.serve().await;
    let api = &controller.api;
    wait_for("a full pool", || async {
        let words = warm_start(api).await;
        words
            .starts_with("`browser`: 2 of 2 VMs ready")
            .then_some(())
    })
    .await;
    for runner in home.runners.pool() {
        assert_eq!(*runner.pauses.lock().unwrap(), 1, "asked once");
    }
    let id = api.start("codex").await;
    assert_eq!(starts(&so_far(api, id).await), [StartKind::Pool]);
    controller.stop().await;
}

/// The VM that the session had first, and the one that it was given instead.
async fn two_machines(home: &Home, api: &Api, id: SessionId) -> (MachineId, MachineId) {
    wait_for("the second VM", || async {
        let vms = api.json("/api/vms?all=1").await;
        let ids = vms.as_array().unwrap().iter();
        let ids = ids.filter(|vm| vm["sessionId"] == json!(id));
        let mut ids: Vec<MachineId> = ids
            .map(|vm| vm["machineId"].as_str().unwrap().parse().unwrap())
            .collect();
        ids.sort();
        let known = ids.len() == 2 && home.runners.get(ids[1]).is_some();
        known.then(|| (ids[0], ids[1]))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_vm_of_the_pool_can_not_be_had_gets_another() {
    for (fate, cause) in [
        (ClaimFate::Dies, Cause::RunnerLost),
        (ClaimFate::Refused, Cause::LaunchRefused),
    ] {
        let home = warm("");
        let controller = home.serve().await;
        let api = &controller.api;
        let first = stocked(&home, api, 1).await.remove(0);
        *first.claim_fate.lock().unwrap() = fate;
        let id = api.start("codex").await;
        let events = so_far(api, id).await;
        assert_eq!(starts(&events), [StartKind::Pool, StartKind::Restore]);
        assert_eq!(reasons(&events), [NotPooled::FellBack]);
        let back = (StartKind::Pool, StartKind::Restore, cause);
        assert_eq!(fallbacks(&events), [back], "{fate:?}");
        assert!(api.session(id).await.failure.is_none());
        assert_ne!(api.machine(id).await, first.spec.machine_id);
        let evidence = home.evidence(first.spec.machine_id);
        wait_for("the first VM's end", || async {
            let gone = !first.is_alive() && !std::fs::exists(&first.spec.vm_dir).unwrap();
            (gone && evidence.join("verdict.json").exists()).then_some(())
        })
        .await;
        let text = metrics(api).await;
        let line = format!("vestibule_fallbacks_total{{cause=\"{}\"}} 1", cause.id());
        assert!(text.contains(&line), "{line} in {text}");
        controller.stop().await;
    }
}
