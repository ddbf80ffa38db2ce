//! Warm starts in the rows.
use super::*;
use vestibule_api::ids::SnapshotId;

pub(in crate::store::tests) async fn the_pools_machines_are_taken_once(store: &Store) {
    let mut machine = MachineRow::new("browser".to_owned(), digest(), 2048, 2);
    machine.pooled = true;
    machine.snapshot_id = Some("d".repeat(64).parse().unwrap());
    store.add_machine(&machine).await.unwrap();
    let mut sessions = Vec::new();
    for _ in 0..6 {
        let id = session(store).await;
        apply(store, id, Event::Accepted).await;
        sessions.push(id);
    }
    let now = Timestamp::now();
    let takes = sessions.iter().map(|id| store.take(machine.id, *id, now));
    let taken = futures_util::future::join_all(takes).await;
    let taken: Vec<bool> = taken.into_iter().map(Result::unwrap).collect();
    assert_eq!(taken.iter().filter(|taken| **taken).count(), 1);
    let winner = sessions[taken.iter().position(|taken| *taken).unwrap()];
    let row = store.machine(machine.id).await.unwrap().unwrap();
    assert_eq!(
        (row.session_id, row.start()),
        (Some(winner), StartKind::Pool)
    );
    for id in sessions {
        let row = store.session(id).await.unwrap().unwrap();
        let starting = row.state == SessionState::Starting;
        assert_eq!(
            (starting, row.machine_id.is_some()),
            (id == winner, id == winner)
        );
    }
    assert!(!store.retire(machine.id, "too late").await.unwrap());

    let mut other = MachineRow::new("browser".to_owned(), digest(), 2048, 2);
    other.pooled = true;
    store.add_machine(&other).await.unwrap();
    assert!(store.retire(other.id, "old").await.unwrap());
    let id = session(store).await;
    apply(store, id, Event::Accepted).await;
    assert!(!store.take(other.id, id, now).await.unwrap(), "retired");
    assert_eq!(store.pool_history("browser", 5).await.unwrap().len(), 2);
}

pub(in crate::store::tests) async fn a_warm_start_that_fails_is_tried_another_way(store: &Store) {
    let snapshot: SnapshotId = "d".repeat(64).parse().unwrap();
    let id = session(store).await;
    apply(store, id, Event::Accepted).await;
    let before = Timestamp::now();
    assert!(!store.had_a_vm(id).await.unwrap());
    for (pooled, cause, next) in [
        (true, Cause::RunnerLost, StartKind::Restore),
        (false, Cause::SnapshotRefused, StartKind::Cold),
    ] {
        let mut machine = given_to(id);
        machine.snapshot_id = Some(snapshot.clone());
        machine.pooled = pooled;
        assert!(
            store
                .place(&machine, NotPooled::PoolEmpty, Timestamp::now())
                .await
                .unwrap()
        );
        let seen = store.session(id).await.unwrap().unwrap();
        let why = Finding::new(cause, finding().evidence[0].clone(), "why", "fix");
        let failed = || store.machine_failed(machine.id, why.clone(), Timestamp::now());
        let told = failed().await.unwrap().unwrap();
        assert_eq!(
            (told.moved, told.fell_back),
            (Some(SessionState::Placing), Some(cause))
        );
        let row = store.session(id).await.unwrap().unwrap();
        assert_eq!((row.start_at_most, row.machine_id), (next, None));
        assert!(row.failure.is_none(), "it did not fail");
        assert!(store.had_a_vm(id).await.unwrap());
        // Whoever still looks at the machine that it had says nothing about the session any more.
        for event in [
            Event::MachineFailed,
            Event::MachineReady,
            Event::LoginFailed,
        ] {
            let facts = Facts::from(finding());
            let late = store.apply_there(&seen, event, &facts, before);
            assert!(matches!(late.await.unwrap(), Applied::Ignored(_)));
        }
        let row = store.session(id).await.unwrap().unwrap();
        assert_eq!((row.state, row.machine_id), (SessionState::Placing, None));
        assert!(failed().await.unwrap().is_none(), "told once");
    }
    let refused = store.snapshot_failure(&snapshot, before).await.unwrap();
    assert_eq!(refused.unwrap().1.cause, Cause::SnapshotRefused);
    let later = Timestamp::now();
    assert!(
        store
            .snapshot_failure(&snapshot, later)
            .await
            .unwrap()
            .is_none()
    );
    let effects: Vec<_> = due(store).await;
    assert_eq!(effects, [(id, Effect::Launch)], "in order, one at a time");

    let machine = given_to(id);
    assert!(
        store
            .place(&machine, NotPooled::PoolEmpty, Timestamp::now())
            .await
            .unwrap()
    );
    let failed = store.machine_failed(machine.id, finding(), Timestamp::now());
    let told = failed.await.unwrap().unwrap();
    assert_eq!(
        told.moved,
        Some(SessionState::Failed),
        "nothing is left to try"
    );
}

pub(in crate::store::tests) async fn a_snapshot_whose_vms_do_not_come_up_is_known_by_the_second(
    store: &Store,
) {
    let snapshot: SnapshotId = "e".repeat(64).parse().unwrap();
    let before = Timestamp::now();
    let failed = async || store.snapshot_failure(&snapshot, before).await.unwrap();
    let begin = async |launched: bool| {
        let mut machine = MachineRow::new("browser".to_owned(), digest(), 2048, 2);
        machine.snapshot_id = Some(snapshot.clone());
        machine.pooled = true;
        store.add_machine(&machine).await.unwrap();
        if launched {
            let now = Timestamp::now();
            store.machine_launched(machine.id, now).await.unwrap();
        }
        machine.id
    };
    let fail = async |id| {
        let now = Timestamp::now();
        store.machine_failed(id, finding(), now).await.unwrap();
    };
    let up = Reported {
        state: Some((MachineState::Up, 3)),
        ..Reported::default()
    };
    fail(begin(true).await).await;
    assert_eq!(failed().await, None, "it may be the VM's own misfortune");
    // One that came up between them, also if it failed later, is as good as any.
    let lived = begin(true).await;
    store.ingest(lived, 1, &up, Timestamp::now()).await.unwrap();
    fail(lived).await;
    fail(begin(true).await).await;
    assert_eq!(failed().await, None);
    fail(begin(false).await).await;
    assert_eq!(failed().await, None, "no runner looked at it");
    fail(begin(true).await).await;
    assert_eq!(failed().await.unwrap().1.cause, Cause::KernelPanic);
}
