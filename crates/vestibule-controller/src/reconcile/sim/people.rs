//! Who signs in: whether they have to confirm their account, and what they say when it is shown to them.
use super::{site::End, world::World};
use crate::{
    state::Event,
    store::{Applied, Facts, SessionRow},
};
use rand::Rng as _;
use vestibule_api::{
    ids::{CredentialId, SessionId},
    session::SessionState,
};

/// Somebody who signs in.
#[derive(Clone, Debug)]
pub(super) struct Person {
    /// Has to confirm the account.
    pub(super) confirms: bool,
    /// Says nothing, whatever is shown, as long as the session waits.
    silent: bool,
    pub(super) shown: Option<Shown>,
    /// That account was confirmed, whether they were told so or not.
    pub(super) said_yes: bool,
    /// A controller was killed after they were shown something.
    crashed: bool,
}

/// What a session that waits for its owner is about.
#[derive(Clone, Debug)]
pub(super) struct Shown {
    /// None where the tool names none.
    pub(super) account: Option<String>,
    credential: CredentialId,
}

/// What an answer is to the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    InTime,
    /// They said so before.
    Again,
    /// The session ended meanwhile.
    TooLate,
}

impl Person {
    pub(super) fn new(confirms: bool, silent: bool) -> Self {
        Self {
            confirms,
            silent,
            shown: None,
            said_yes: false,
            crashed: false,
        }
    }
}

impl World {
    /// Somebody looks at their session, and says something to an account that it shows, or showed before.
    pub(super) async fn answer(&mut self) {
        let Some(at) = self.some_site() else {
            return;
        };
        let waiting = match self.show(at).await {
            Ok(waiting) => waiting,
            Err(end) => return self.tally.ended(end),
        };
        let wanted = match self.rng.random_range(0..100) {
            // They look, and say nothing yet.
            0..30 => return,
            30..80 => Answer::InTime,
            80..90 => Answer::Again,
            _ => Answer::TooLate,
        };
        let answer = |id: &SessionId| match (waiting.contains(id), self.people[id].said_yes) {
            (true, _) => Answer::InTime,
            (false, true) => Answer::Again,
            (false, false) => Answer::TooLate,
        };
        let people = &self.people;
        let asked = |id: &&SessionId| people[id].shown.is_some() && !people[id].silent;
        let of = self.sessions.iter().filter(asked);
        let of: Vec<_> = of.filter(|id| answer(id) == wanted).copied().collect();
        if of.is_empty() {
            return;
        }
        let id = of[self.rng.random_range(0..of.len())];
        if self.rng.random_bool(0.15) && !self.people[&id].said_yes {
            let refused = self.cancel_one(at, id).await;
            self.tally.refused += u64::from(refused);
        } else {
            self.confirm(at, id).await;
        }
    }

    /// Everybody who is asked now says something; those who are silent do so when it is too late.
    pub(super) async fn answer_all(&mut self) {
        let there = self.sites.iter().position(|site| !site.lost);
        let at = there.expect("one host is never lost");
        let waiting = self.show(at).await.expect("no more faults");
        for id in self.sessions.clone() {
            let Person {
                silent,
                said_yes,
                shown: Some(_),
                ..
            } = self.people[&id]
            else {
                continue;
            };
            if waiting.contains(&id) == silent {
                continue;
            }
            if !silent && !said_yes && self.rng.random_bool(0.2) {
                let refused = self.cancel_one(at, id).await;
                self.tally.refused += u64::from(refused);
                continue;
            }
            self.confirm(at, id).await;
            if let Some(person) = self.people.get_mut(&id) {
                person.silent = false;
            }
        }
    }

    /// People see what waits for them. Returns which sessions do.
    async fn show(&mut self, at: usize) -> Result<Vec<SessionId>, End> {
        let store = &self.sites[at].core().store;
        let waiting = store.sessions_in(SessionState::Confirming).await;
        let waiting: Vec<SessionRow> = waiting.map_err(|err| End::of(&err))?;
        let mut ids = Vec::new();
        for row in waiting {
            // Of a session of which its person heard nothing, they see nothing.
            if !self.sessions.contains(&row.id) {
                continue;
            }
            let (account, credential) = (row.account, row.credential_id);
            let person = self.people.get_mut(&row.id);
            let person = person.expect("somebody asked for every session");
            person.shown.get_or_insert(Shown {
                account,
                credential,
            });
            ids.push(row.id);
        }
        Ok(ids)
    }

    /// As the handler does that compares the account with what the session showed: the session may have gone on since then.
    pub(super) async fn confirm(&mut self, at: usize, id: SessionId) {
        let (person, name) = (self.people[&id].clone(), self.session_name(id));
        let shown = person.shown.expect("who confirms was shown something");
        if !person.said_yes && self.was_sealed(shown.credential) {
            self.broken.push(format!("{name}: {TAKEN_EARLY}"));
        }
        let (core, now) = (self.sites[at].core(), self.clock.now());
        let facts = Facts::default();
        let applied = core.store.apply(id, Event::AccountConfirmed, &facts, now);
        let (said_yes, words) = match applied.await {
            Ok(Applied::Moved(_)) => {
                self.tally.confirmed += 1;
                self.tally.confirmed_after_crash += u64::from(person.crashed);
                (true, "is confirmed")
            }
            Ok(Applied::Ignored(_) | Applied::Missing) if person.said_yes => {
                self.tally.confirmed_again += 1;
                (true, "is confirmed again")
            }
            Ok(Applied::Ignored(_) | Applied::Missing) => {
                self.tally.confirmed_late += 1;
                (false, "is confirmed too late")
            }
            Err(err) => {
                assert_eq!(End::of(&err), End::CutOff);
                (true, "is perhaps confirmed")
            }
        };
        if let Some(person) = self.people.get_mut(&id) {
            person.said_yes |= said_yes;
        }
        self.say(format!("{name} {words}"));
    }

    /// A controller was killed: whoever has not said anything yet says it to the next one.
    pub(super) fn people_wait_on(&mut self) {
        for person in self.people.values_mut() {
            person.crashed |= person.shown.is_some() && !person.said_yes;
        }
    }
}

/// What must never be said of a session.
pub(super) const TAKEN_EARLY: &str =
    "its credential was taken before its owner confirmed the account";
