//! Bugs that a controller could have: each has to break an invariant, or that invariant proves nothing.
use super::{people::TAKEN_EARLY, run, world::World};
use crate::{
    state::Event,
    store::{Facts, SessionRow},
};
use sqlx::{AnyPool, any::AnyPoolOptions};
use vestibule_api::{
    secret::Secret,
    session::{SessionEventKind, SessionState},
};
use vestibule_vault::{Access, ContentFile, NewCredential};

/// Something that goes wrong once in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    /// An account is confirmed, and nobody did it.
    ConfirmsItself,
    /// A credential is sealed, and its owner confirms the account after that: the session's end looks as it should.
    SealsUnasked,
    /// A session is about another account than was shown when its owner confirms it.
    TakesAnother,
    /// A session that ended ends once more.
    EndsTwice,
    /// A credential leaves the vault, and its session stays completed.
    LosesCredential,
    /// The tool was started twice.
    StartsTwice,
    /// Code that is simulated panics.
    Panics,
}

impl World {
    /// Does what is wrong, once, as soon as it can be done.
    pub(super) async fn go_wrong(&mut self) {
        let able = |site: &super::site::Site| site.process.is_some() && site.away.is_none();
        let (Some(bug), Some(at)) = (self.bug, self.sites.iter().position(able)) else {
            return;
        };
        let state = match bug {
            Bug::ConfirmsItself | Bug::SealsUnasked | Bug::TakesAnother => SessionState::Confirming,
            Bug::EndsTwice | Bug::LosesCredential | Bug::StartsTwice => SessionState::Completed,
            Bug::Panics => panic!("{bug:?}"),
        };
        let core = self.sites[at].core();
        for row in core.store.sessions_in(state).await.unwrap() {
            if self.sessions.contains(&row.id) && self.goes_wrong(bug, at, row).await {
                self.say(format!("a bug: {bug:?}"));
                self.bug = None;
                return;
            }
        }
    }

    /// Whether it could be done to this session.
    async fn goes_wrong(&mut self, bug: Bug, at: usize, row: SessionRow) -> bool {
        let core = self.sites[at].core();
        let (id, now) = (row.id, self.clock.now());
        let person = &self.people[&id];
        let undecided = person.shown.clone().filter(|_| !person.said_yes);
        let runner = row.machine_id.and_then(|id| self.runner(id));
        let runner = runner.expect("it has a VM");
        let home = self
            .sites
            .iter()
            .find(|site| site.host.get(runner.spec.machine_id).is_some())
            .and_then(|site| site.process.as_ref());
        match bug {
            Bug::ConfirmsItself => {
                let (event, facts) = (Event::AccountConfirmed, Facts::default());
                core.store.apply(id, event, &facts, now).await.unwrap();
            }
            Bug::SealsUnasked => {
                let (Some(_), Some(process)) = (undecided, home) else {
                    return false;
                };
                let vm = (runner.vm.lock().unwrap().secret.clone()).expect("it was captured");
                let new = credential(&row, vm);
                process.core.vault.put(&new, &access()).unwrap();
                self.confirm(at, id).await;
            }
            Bug::TakesAnother => {
                let other = runner.vm.lock().unwrap().hands_over.clone();
                if undecided.is_none_or(|shown| shown.account == other) {
                    return false;
                }
                let query = sqlx::query("UPDATE session SET account = $2 WHERE id = $1");
                let query = query.bind(id.to_string()).bind(other);
                query.execute(&self.database().await).await.unwrap();
                self.confirm(at, id).await;
            }
            Bug::EndsTwice => {
                let events = core.store.events(id, 0, 10_000).await.unwrap();
                let again = SessionEventKind::State {
                    state: SessionState::Failed,
                };
                let query = sqlx::query(
                    "INSERT INTO session_event (session_id, seq, at, kind) VALUES ($1, $2, $3, $4)",
                );
                let seq = i64::try_from(events.len()).unwrap() + 1;
                let query = query.bind(id.to_string()).bind(seq).bind(now.as_micros());
                let query = query.bind(serde_json::to_string(&again).unwrap());
                query.execute(&self.database().await).await.unwrap();
            }
            Bug::LosesCredential => {
                let Some(process) = home else {
                    return false;
                };
                let vault = &process.core.vault;
                vault.remove(row.credential_id, &access()).unwrap();
            }
            Bug::StartsTwice => runner.vm.lock().unwrap().logins += 1,
            Bug::Panics => {}
        }
        true
    }

    /// The database, past the store.
    async fn database(&self) -> AnyPool {
        let path = self.sites[0].home.join("vestibule.db");
        let pool = AnyPoolOptions::new().max_connections(1);
        pool.connect(&format!("sqlite://{path}")).await.unwrap()
    }
}

fn access() -> Access {
    Access {
        actor: "bug".to_owned(),
        purpose: "to be found".to_owned(),
    }
}

/// As the collector makes one.
fn credential(row: &SessionRow, secret: Vec<u8>) -> NewCredential {
    let file = ContentFile {
        path: ".codex/auth.json".to_owned(),
        mode: 0o600,
        bytes: Secret::new(secret),
    };
    NewCredential {
        credential_id: row.credential_id,
        provider: row.provider.clone(),
        user_id: row.user_id.clone(),
        session_id: row.id,
        account: row.account.clone(),
        expires_at: None,
        files: vec![file],
    }
}

#[test]
fn every_bug_breaks_its_invariant_and_the_seed_shows_it_again() {
    for (bug, words) in [
        (Bug::ConfirmsItself, TAKEN_EARLY),
        (Bug::SealsUnasked, TAKEN_EARLY),
        (
            Bug::TakesAnother,
            "another account than its owner confirmed was sealed",
        ),
        (Bug::EndsTwice, "its states were"),
        (Bug::LosesCredential, "its credential is lost"),
        (Bug::StartsTwice, "its tool was started 2 times"),
        (Bug::Panics, "a panic: Panics"),
    ] {
        let report = run(1, 400, Some(bug)).expect_err("no world had the bug");
        let last = report.lines().last().unwrap();
        assert!(last.contains(words), "{bug:?}: {report}");
        let seed = report.split("VESTIBULE_SIM_SEED=").nth(1).unwrap();
        let seed = seed.split_whitespace().next().unwrap().parse().unwrap();
        let again = super::live(seed, Some(bug)).unwrap_err();
        assert_eq!(again.lines().last(), Some(last), "{bug:?}");
        assert!(
            again.lines().count() >= report.lines().count() - 2,
            "its whole history"
        );
    }
}
