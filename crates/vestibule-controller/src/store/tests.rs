//! Each body runs on SQLite and on PostgreSQL.
use super::*;
use crate::{
    people::{Owner, Principal},
    state::{Effect, Event},
};
use std::time::Duration;
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
    ids::{ImageDigest, ProviderId},
    machine::MachineState,
    session::{NotPooled, SessionEventKind, SessionState, StartKind},
    time::Timestamp,
};

mod hosts;
mod people;
mod warm;

const DEADLINES: Deadlines = {
    let minute = Duration::from_secs(60);
    Deadlines {
        requested: minute,
        placing: minute,
        starting: minute,
        ready: minute,
        confirming: minute,
        capturing: minute,
    }
};

/// Runs the body on a fresh database of each kind.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[tokio::test]
            async fn sqlite() {
                let home = camino_tempfile::tempdir().unwrap();
                let store = super::Store::open("sqlite", home.path(), super::DEADLINES).await.unwrap();
                super::bodies::$name(&store).await;
                store.close().await;
            }

            #[tokio::test]
            async fn postgres() {
                let database = vestibule_testkit::postgres::database().await;
                let home = camino_tempfile::tempdir().unwrap();
                let store = super::Store::open(&database, home.path(), super::DEADLINES).await.unwrap();
                super::bodies::$name(&store).await;
                store.close().await;
            }
        }
    )+ };
}

on_both!(
    a_session_is_made_and_listed,
    transitions_write_events_and_effects,
    late_events_change_nothing,
    effects_come_in_order_and_come_back,
    runner_events_are_taken_in_once,
    a_place_is_given_once,
    the_pools_machines_are_taken_once,
    a_warm_start_that_fails_is_tried_another_way,
    a_snapshot_whose_vms_do_not_come_up_is_known_by_the_second,
    deadlines_are_found,
    concurrent_writers_lose_nothing,
    old_sessions_are_forgotten,
    dashboards_sign_in_and_out,
    a_verdict_can_be_improved,
    strangers_machines_are_adopted,
    a_flood_of_events_is_bounded,
    a_machine_is_claimed_by_one_host,
    effects_are_the_hosts_that_has_the_machine,
    a_lease_is_one_controllers,
    users_are_known_by_name_and_by_dashboard,
    a_token_is_somebody_until_it_expires,
    an_organisation_goes_when_nothing_is_its,
    quotas_count_what_is_live,
    quotas_hold_when_many_ask_at_once,
);

fn digest() -> ImageDigest {
    "a".repeat(64).parse().unwrap()
}

fn finding() -> Finding {
    let quote = Quote {
        source: "serial".to_owned(),
        line: Some(7),
        text: "Kernel panic".to_owned(),
    };
    Finding::new(Cause::KernelPanic, quote, "it says so", "look at the image")
}

async fn session(store: &Store) -> SessionId {
    let provider: ProviderId = "codex".parse().unwrap();
    let new = NewSession {
        id: SessionId::generate(),
        provider,
        flow: "browser".to_owned(),
        user_id: "ada".to_owned(),
        image_alias: "browser".to_owned(),
        login_timeout: Duration::from_secs(30),
        start_at_most: StartKind::Pool,
        owner: Owner::local(),
        quota: Quota::default(),
        confirm_account: false,
    };
    store.create_session(&new, Timestamp::now()).await.unwrap();
    new.id
}

async fn apply(store: &Store, id: SessionId, event: Event) -> Applied {
    store
        .apply(id, event, &Facts::default(), Timestamp::now())
        .await
        .unwrap()
}

fn given_to(session: SessionId) -> MachineRow {
    let mut machine = MachineRow::new("browser".to_owned(), digest(), 2048, 2);
    machine.session_id = Some(session);
    machine
}

async fn placed(store: &Store) -> (SessionId, MachineRow) {
    let id = session(store).await;
    apply(store, id, Event::Accepted).await;
    let machine = given_to(id);
    assert!(
        store
            .place(&machine, NotPooled::NoSnapshot, Timestamp::now())
            .await
            .unwrap()
    );
    (id, machine)
}

async fn due(store: &Store) -> Vec<(SessionId, Effect)> {
    let due = store.due_effects(Timestamp::now()).await.unwrap();
    due.into_iter().map(|e| (e.session, e.kind)).collect()
}

mod bodies {
    use super::*;
    pub(super) use super::{hosts::*, people::*, warm::*};

    pub(super) async fn a_session_is_made_and_listed(store: &Store) {
        let (first, second) = (session(store).await, session(store).await);
        let row = store.session(first).await.unwrap().unwrap();
        assert_eq!(
            (row.state, row.user_id.as_str(), row.flow.as_str()),
            (SessionState::Requested, "ada", "browser")
        );
        assert_eq!(row.login_timeout, Duration::from_secs(30));
        assert!(
            row.deadline_at.unwrap() > row.created_at
                && row.failure.is_none()
                && row.machine_id.is_none()
        );
        let listed: Vec<_> = store
            .sessions(&Scope::All, None, 10)
            .await
            .unwrap()
            .iter()
            .map(|r| r.id)
            .collect();
        assert_eq!(listed, [second, first]);
        let page: Vec<_> = store
            .sessions(&Scope::All, Some(second), 10)
            .await
            .unwrap()
            .iter()
            .map(|r| r.id)
            .collect();
        assert_eq!(page, [first]);
        assert!(
            store
                .session(SessionId::generate())
                .await
                .unwrap()
                .is_none()
        );
        assert_eq!(
            store
                .sessions_in(SessionState::Requested)
                .await
                .unwrap()
                .len(),
            2
        );
        store.ping().await.unwrap();
    }

    pub(super) async fn transitions_write_events_and_effects(store: &Store) {
        let (id, machine) = placed(store).await;
        assert_eq!(due(store).await, [(id, Effect::Launch)]);
        let facts = Facts::from(finding());
        let applied = store
            .apply(id, Event::MachineFailed, &facts, Timestamp::now())
            .await
            .unwrap();
        assert_eq!(applied, Applied::Moved(SessionState::Failed));
        let row = store.session(id).await.unwrap().unwrap();
        assert_eq!(row.failure.unwrap().finding.unwrap(), finding());
        assert_eq!(
            (row.machine_id, row.image_digest, row.deadline_at),
            (Some(machine.id), Some(digest()), None)
        );
        let events = store.events(id, 0, 100).await.unwrap();
        assert_eq!(
            events[2].event,
            SessionEventKind::Claimed {
                start: StartKind::Cold,
                snapshot_id: None,
                why: Some(NotPooled::NoSnapshot)
            }
        );
        let numbers: Vec<_> = events.iter().map(|e| e.seq).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
        assert_eq!(
            events[5].event,
            SessionEventKind::State {
                state: SessionState::Failed
            }
        );
        assert_eq!(
            events[4].event,
            SessionEventKind::Failure { finding: finding() }
        );
        assert_eq!(store.events(id, 3, 1).await.unwrap().len(), 1);
    }

    pub(super) async fn late_events_change_nothing(store: &Store) {
        let id = session(store).await;
        assert_eq!(
            apply(store, id, Event::Cancelled).await,
            Applied::Moved(SessionState::Cancelled)
        );
        for event in Event::ALL {
            assert!(
                matches!(apply(store, id, event).await, Applied::Ignored(_)),
                "{event:?}"
            );
        }
        store
            .add_events(id, &[SessionEventKind::BrowserRestarted], Timestamp::now())
            .await
            .unwrap();
        assert_eq!(store.events(id, 0, 100).await.unwrap().len(), 2);
        assert_eq!(
            apply(store, SessionId::generate(), Event::Accepted).await,
            Applied::Missing
        );
        assert!(due(store).await.is_empty());
    }

    pub(super) async fn effects_come_in_order_and_come_back(store: &Store) {
        let (id, _) = placed(store).await;
        apply(store, id, Event::Cancelled).await;
        assert_eq!(
            due(store).await,
            [(id, Effect::Launch)],
            "the teardown waits for the launch"
        );
        let now = Timestamp::now();
        let launch = store.due_effects(now).await.unwrap().remove(0);
        store
            .effect_failed(&launch.id, now, Duration::from_secs(5), "no runner")
            .await
            .unwrap();
        assert!(
            due(store).await.is_empty(),
            "put off, and the teardown still waits"
        );
        assert_eq!(
            store.next_due(now).await.unwrap(),
            Some(now.plus(Duration::from_secs(5)))
        );
        let again = store
            .due_effects(now.plus(Duration::from_secs(6)))
            .await
            .unwrap()
            .remove(0);
        assert_eq!((again.attempts, again.id.as_str()), (1, launch.id.as_str()));
        store
            .effect_done(&launch.id, Timestamp::now())
            .await
            .unwrap();
        assert_eq!(due(store).await, [(id, Effect::Teardown)]);
    }

    pub(super) async fn runner_events_are_taken_in_once(store: &Store) {
        let (id, machine) = placed(store).await;
        let before = store.events(id, 0, 100).await.unwrap().len();
        let reported = Reported {
            state: Some((MachineState::Up, 3)),
            events: vec![SessionEventKind::BrowserRestarted],
            event: Some((Event::MachineReady, Facts::default())),
            failure: Some(finding()),
        };
        for _ in 0..3 {
            store
                .ingest(machine.id, 4, &reported, Timestamp::now())
                .await
                .unwrap();
        }
        let row = store.machine(machine.id).await.unwrap().unwrap();
        assert_eq!(
            (row.state, row.generation, row.last_seq),
            (MachineState::Up, 3, 4)
        );
        assert!(row.ready_at.is_some() && row.failure == Some(finding()));
        assert_eq!(
            store.session(id).await.unwrap().unwrap().state,
            SessionState::Ready
        );
        assert_eq!(store.events(id, 0, 100).await.unwrap().len(), before + 2);
        let older = Reported {
            state: Some((MachineState::Booting, 2)),
            ..Reported::default()
        };
        store
            .ingest(machine.id, 5, &older, Timestamp::now())
            .await
            .unwrap();
        assert_eq!(
            store.machine(machine.id).await.unwrap().unwrap().state,
            MachineState::Up,
            "an older generation"
        );
        let lost = store.machine_lost(machine.id, finding(), Timestamp::now());
        lost.await.unwrap();
        assert_eq!(
            store.machines().await.unwrap().len(),
            1,
            "lost, but not yet cleaned up"
        );
        store
            .machine_gone(machine.id, Timestamp::now())
            .await
            .unwrap();
        assert!(store.machines().await.unwrap().is_empty());
        let row = store.all_machines(5).await.unwrap().remove(0);
        assert!(row.state == MachineState::Lost && row.gone_at.is_some());
    }

    pub(super) async fn a_place_is_given_once(store: &Store) {
        let (id, _) = placed(store).await;
        let second = given_to(id);
        assert!(
            !store
                .place(&second, NotPooled::NoSnapshot, Timestamp::now())
                .await
                .unwrap()
        );
        assert!(store.machine(second.id).await.unwrap().is_none());
        assert_eq!(store.machines().await.unwrap().len(), 1);
    }

    pub(super) async fn deadlines_are_found(store: &Store) {
        let id = session(store).await;
        let now = Timestamp::now();
        assert!(store.overdue(now).await.unwrap().is_empty());
        let later = now.plus(Duration::from_secs(61));
        assert_eq!(store.overdue(later).await.unwrap().len(), 1);
        let applied = store
            .apply(id, Event::DeadlinePassed, &Facts::default(), later)
            .await
            .unwrap();
        assert_eq!(applied, Applied::Moved(SessionState::Failed));
        assert!(store.overdue(later).await.unwrap().is_empty());
    }

    pub(super) async fn concurrent_writers_lose_nothing(store: &Store) {
        let id = session(store).await;
        let kinds = [SessionEventKind::BrowserRestarted];
        let one = async {
            for _ in 0..10 {
                store
                    .add_events(id, &kinds, Timestamp::now())
                    .await
                    .unwrap();
            }
        };
        let other = async {
            for _ in 0..10 {
                store
                    .add_events(id, &kinds, Timestamp::now())
                    .await
                    .unwrap();
            }
        };
        let third = apply(store, id, Event::Accepted);
        tokio::join!(one, other, third);
        let events = store.events(id, 0, 100).await.unwrap();
        assert!(
            events.iter().zip(1..).all(|(event, seq)| event.seq == seq),
            "no gap"
        );
        assert_eq!(events.len(), 22);
        assert_eq!(
            store.session(id).await.unwrap().unwrap().state,
            SessionState::Placing
        );
    }

    pub(super) async fn old_sessions_are_forgotten(store: &Store) {
        let (ended, running) = (session(store).await, session(store).await);
        apply(store, ended, Event::Cancelled).await;
        let later = Timestamp::now().plus(Duration::from_secs(1));
        assert_eq!(store.forget_sessions(later, later).await.unwrap(), 1);
        assert!(
            store.session(ended).await.unwrap().is_none()
                && store.was_forgotten(ended).await.unwrap()
        );
        assert!(
            store.session(running).await.unwrap().is_some()
                && !store.was_forgotten(running).await.unwrap()
        );
        assert!(store.events(ended, 0, 10).await.unwrap().is_empty());
    }

    pub(super) async fn dashboards_sign_in_and_out(store: &Store) {
        let now = Timestamp::now();
        let later = now.plus(Duration::from_secs(60));
        store.add_login("abc", None, later, now).await.unwrap();
        let who = async |hash: &str, at| store.principal_of_login(hash, at).await.unwrap();
        assert_eq!(who("abc", now).await, Some(Principal::local()));
        assert!(who("abd", now).await.is_none() && who("abc", later).await.is_none());
        store.remove_login("abc").await.unwrap();
        assert!(who("abc", now).await.is_none());
    }

    pub(super) async fn a_verdict_can_be_improved(store: &Store) {
        let (id, _) = placed(store).await;
        let verdict = vestibule_api::finding::Verdict::of(finding(), vec!["serial".to_owned()]);
        store.set_verdict(id, &verdict).await.unwrap();
        assert!(
            store.session(id).await.unwrap().unwrap().failure.is_none(),
            "it did not fail"
        );
        let facts = Facts::from(finding());
        store
            .apply(id, Event::MachineFailed, &facts, Timestamp::now())
            .await
            .unwrap();
        store.set_verdict(id, &verdict).await.unwrap();
        assert_eq!(
            store
                .session(id)
                .await
                .unwrap()
                .unwrap()
                .failure
                .unwrap()
                .looked_at,
            ["serial"]
        );
    }

    pub(super) async fn strangers_machines_are_adopted(store: &Store) {
        let machine = MachineRow::new("x".to_owned(), digest(), 1, 1);
        store.add_machine(&machine).await.unwrap();
        store.add_machine(&machine).await.unwrap();
        assert_eq!(store.machines().await.unwrap().len(), 1);
        let reported = Reported {
            state: Some((MachineState::Up, 1)),
            ..Reported::default()
        };
        store
            .ingest(machine.id, 1, &reported, Timestamp::now())
            .await
            .unwrap();
        assert_eq!(
            store.machine(machine.id).await.unwrap().unwrap().state,
            MachineState::Up
        );
        assert!(
            !store
                .place(&machine, NotPooled::NoSnapshot, Timestamp::now())
                .await
                .unwrap(),
            "it is for no session"
        );
    }

    pub(super) async fn a_flood_of_events_is_bounded(store: &Store) {
        let id = session(store).await;
        let flood = vec![SessionEventKind::BrowserRestarted; 5200];
        store
            .add_events(id, &flood, Timestamp::now())
            .await
            .unwrap();
        assert_eq!(store.events(id, 0, 10_000).await.unwrap().len(), 5000);
        apply(store, id, Event::Cancelled).await;
        let last = store.events(id, 5000, 10).await.unwrap();
        assert_eq!(last.len(), 1, "the state still is told");
    }
}

#[tokio::test]
async fn the_file_is_for_its_owner_only_and_survives() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = camino_tempfile::tempdir().unwrap();
    let store = Store::open("sqlite", home.path(), DEADLINES).await.unwrap();
    let id = session(&store).await;
    for name in ["vestibule.db", "vestibule.db-wal"] {
        let mode = std::fs::metadata(home.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    // Not closed: as if the process had been killed.
    drop(store);
    let store = Store::open("sqlite", home.path(), DEADLINES).await.unwrap();
    assert!(store.session(id).await.unwrap().is_some());
}

#[tokio::test]
async fn what_is_not_a_database_is_named() {
    let home = camino_tempfile::tempdir().unwrap();
    std::fs::write(
        home.path().join("vestibule.db"),
        "not a database, but long enough to be looked at as one",
    )
    .unwrap();
    let err = Store::open("sqlite", home.path(), DEADLINES)
        .await
        .unwrap_err();
    assert!(err.to_string().contains("vestibule.db"), "{err}");
}
