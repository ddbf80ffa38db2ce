//! Hosts and leases in the rows.
use super::*;
use crate::store::host::{Forgotten, OwnHost};
use vestibule_api::ids::{HostId, MachineId};

const LEASE: Duration = Duration::from_secs(60);

fn own(home: &str) -> OwnHost {
    OwnHost {
        name: "a".to_owned(),
        address: None,
        home: home.to_owned(),
    }
}

pub(in crate::store::tests) async fn a_machine_is_claimed_by_one_host(store: &Store) {
    let (_, machine) = placed(store).await;
    assert_eq!(
        store.host_of_machine(machine.id).await.unwrap(),
        Some(store.host())
    );
    let set = async |host: Option<HostId>| {
        sqlx::query("UPDATE machine SET host_id = $1")
            .bind(host.map(|id| id.to_string()))
            .execute(&store.pool)
            .await
            .unwrap();
    };
    set(None).await;
    assert!(store.own_machines().await.unwrap().is_empty());
    assert!(store.claim_machine(machine.id).await.unwrap());
    assert!(
        store.claim_machine(machine.id).await.unwrap(),
        "twice is once"
    );
    assert_eq!(store.own_machines().await.unwrap().len(), 1);
    set(Some(HostId::generate())).await;
    assert!(!store.claim_machine(machine.id).await.unwrap());
    assert!(!store.claim_machine(MachineId::generate()).await.unwrap());
}

pub(in crate::store::tests) async fn effects_are_the_hosts_that_has_the_machine(store: &Store) {
    let (id, machine) = placed(store).await;
    let elsewhere = HostId::generate();
    sqlx::query("UPDATE machine SET host_id = $1")
        .bind(elsewhere.to_string())
        .execute(&store.pool)
        .await
        .unwrap();
    let now = Timestamp::now();
    for effect in store.due_effects(now).await.unwrap() {
        store.effect_done(&effect.id, now).await.unwrap();
    }
    apply(store, id, Event::Cancelled).await;
    assert!(due(store).await.is_empty(), "the other host tears down");
    assert_eq!(store.host_of_session(id).await.unwrap(), Some(elsewhere));
    assert!(store.machines_of(id).await.unwrap().is_empty());
    assert_eq!(
        store.machine(machine.id).await.unwrap().unwrap().host_id,
        Some(elsewhere)
    );
}

/// The lease, on PostgreSQL; on SQLite whoever has the home's lock has it.
pub(in crate::store::tests) async fn a_lease_is_one_controllers(store: &Store) {
    assert!(store.take_lease(&own("here"), LEASE).await.unwrap());
    assert!(
        store.take_lease(&own("here"), LEASE).await.unwrap(),
        "the successor on this home"
    );
    assert_eq!(store.hosts().await.unwrap().len(), 1);
    if !store.is_shared() {
        assert!(store.hosts().await.unwrap()[0].live);
        return;
    }
    assert!(!store.take_lease(&own("a copy"), LEASE).await.unwrap());
    assert!(store.renew_lease(LEASE).await.unwrap());
    let (id, machine) = placed(store).await;
    assert!(
        store
            .machines_of_lost_hosts(Duration::ZERO)
            .await
            .unwrap()
            .is_empty()
    );
    let lost = store.host_lost(machine.id, Duration::ZERO, finding(), Timestamp::now());
    assert!(lost.await.unwrap().is_none(), "its host is live");
    assert_eq!(
        store
            .forget_host(store.host(), Timestamp::now())
            .await
            .unwrap(),
        Forgotten::Live
    );

    sqlx::query("UPDATE host SET lease_until = 1")
        .execute(&store.pool)
        .await
        .unwrap();
    assert!(
        !store.renew_lease(LEASE).await.unwrap(),
        "what is over is not renewed"
    );
    assert!(!store.hosts().await.unwrap()[0].live);
    let found = store.machines_of_lost_hosts(LEASE).await.unwrap();
    assert_eq!(found, [(machine.id, "a".to_owned())]);
    let told = store
        .host_lost(machine.id, LEASE, finding(), Timestamp::now())
        .await
        .unwrap();
    assert_eq!(told.unwrap().moved, Some(SessionState::Failed));
    let row = store.machine(machine.id).await.unwrap().unwrap();
    assert!(row.state == MachineState::Lost && row.gone_at.is_none());
    assert!(store.session(id).await.unwrap().unwrap().failure.is_some());
    assert!(
        store
            .machines_of_lost_hosts(LEASE)
            .await
            .unwrap()
            .is_empty()
    );

    // Whoever takes it next raises the generation, and the one before acts no more.
    let before = store.generation.load(std::sync::atomic::Ordering::Relaxed);
    assert!(store.take_lease(&own("a copy"), LEASE).await.unwrap());
    store
        .generation
        .store(before, std::sync::atomic::Ordering::Relaxed);
    assert!(!store.renew_lease(LEASE).await.unwrap());
    let waiting = session(store).await;
    apply(store, waiting, Event::Accepted).await;
    let refused = store
        .place(&given_to(waiting), NotPooled::PoolEmpty, Timestamp::now())
        .await
        .unwrap_err();
    assert!(matches!(refused, StoreError::Fenced), "{refused}");
    let report = store
        .ingest(machine.id, 9, &Reported::default(), Timestamp::now())
        .await;
    assert!(matches!(report, Err(StoreError::Fenced)));
}

/// Controllers that start at once bring an empty database up to date together.
#[tokio::test]
async fn migrations_run_once() {
    let database = vestibule_testkit::postgres::database().await;
    let homes: Vec<_> = (0..4)
        .map(|_| camino_tempfile::tempdir().unwrap())
        .collect();
    let opened = homes
        .iter()
        .map(|home| Store::open(&database, home.path(), DEADLINES));
    for store in futures_util::future::join_all(opened).await {
        let store = store.unwrap();
        assert!(store.take_lease(&own("here"), LEASE).await.unwrap());
        store.close().await;
    }
}

/// Sessions that end on two controllers, and their events, at the same time.
#[tokio::test]
async fn two_controllers_do_not_stand_in_each_others_way() {
    let database = vestibule_testkit::postgres::database().await;
    let homes = [(); 2].map(|()| camino_tempfile::tempdir().unwrap());
    let open = |home: usize| Store::open(&database, homes[home].path(), DEADLINES);
    let (one, other) = (open(0).await.unwrap(), open(1).await.unwrap());
    for store in [&one, &other] {
        assert!(
            store
                .take_lease(&own(store.host().to_string().as_str()), LEASE)
                .await
                .unwrap()
        );
    }
    let mut waiting = Vec::new();
    for _ in 0..12 {
        let id = session(&one).await;
        apply(&one, id, Event::Accepted).await;
        waiting.push(id);
    }
    let place_all = async |store: &Store| {
        let mut placed = Vec::new();
        for id in &waiting {
            let machine = given_to(*id);
            if store
                .place(&machine, NotPooled::PoolEmpty, Timestamp::now())
                .await
                .unwrap()
            {
                placed.push(machine.id);
            }
        }
        placed
    };
    let (mut placed, more) = tokio::join!(place_all(&one), place_all(&other));
    placed.extend(more);
    assert_eq!(placed.len(), waiting.len(), "each once");
    assert_eq!(one.machines().await.unwrap().len(), waiting.len());
    // Reports, cancellations, moved deadlines and retention, all at once.
    let later = Timestamp::now().plus(Duration::from_secs(3600));
    let busy = async |store: &Store| {
        let reported = Reported {
            events: vec![SessionEventKind::BrowserRestarted],
            ..Reported::default()
        };
        for (machine, id) in placed.iter().zip(&waiting) {
            for seq in 1..4 {
                store
                    .ingest(*machine, seq, &reported, Timestamp::now())
                    .await
                    .unwrap();
            }
            store.shift(1).await.unwrap();
            apply(store, *id, Event::Cancelled).await;
            store.forget_sessions(later, later).await.unwrap();
        }
    };
    tokio::join!(busy(&one), busy(&other));
    assert!(
        one.sessions(&Scope::All, None, 100)
            .await
            .unwrap()
            .is_empty()
    );
    for store in [one, other] {
        store.close().await;
    }
}
