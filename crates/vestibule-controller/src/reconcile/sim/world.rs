//! One or two homes, their sessions, and the seed that decides.
use super::{
    bugs::Bug,
    gate::Step,
    host::{Dice, Runner},
    people::Person,
    site::{End, Process, Site},
    tally::Tally,
};
use crate::{
    clock::Clock,
    core::Shared,
    people::Owner,
    state::Event,
    store::{Applied, Facts, NewSession, Quota},
};
use camino::Utf8Path;
use camino_tempfile::Utf8TempDir;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{collections::HashMap, sync::Arc, time::Duration};
use vestibule_api::{
    cause::Cause,
    ids::{MachineId, SessionId},
    session::{SessionState, StartKind},
};

/// Sessions of one world.
pub(super) const LIVES: usize = 10;
/// Steps with faults; then the world settles.
const STEPS: usize = 1200;
/// Rounds in which it must have settled.
const ROUNDS: usize = 400;

pub(super) struct World {
    pub(super) rng: StdRng,
    /// Nothing is slow, and few things go wrong: more sessions come to their late states.
    pub(super) calm: bool,
    dice: Arc<Dice>,
    pub(super) clock: Clock,
    /// The homes, and the database that they share.
    _dir: Utf8TempDir,
    pub(super) sites: Vec<Site>,
    pub(super) sessions: Vec<SessionId>,
    /// Whose they are.
    pub(super) people: HashMap<SessionId, Person>,
    /// Sessions that somebody ended.
    pub(super) cancelled: Vec<SessionId>,
    /// Sessions that somebody asked for and heard nothing.
    doubtful: Vec<SessionId>,
    /// Sessions that somebody ended and heard nothing.
    pub(super) perhaps_cancelled: Vec<SessionId>,
    /// Names of machines in the history, by the order in which they were seen: ids are not the seed's.
    names: Vec<MachineId>,
    pub(super) history: Vec<String>,
    pub(super) tally: Tally,
    /// What was seen on the way that must never be.
    pub(super) broken: Vec<String>,
    /// What goes wrong in it once, to see that an invariant breaks.
    pub(super) bug: Option<Bug>,
}

impl World {
    pub(super) async fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let names: &[&'static str] = if rng.random_bool(0.5) {
            &["a", "b"]
        } else {
            &["a"]
        };
        let shared = names.len() > 1 || rng.random_bool(0.2);
        Self::of(rng, names, shared).await
    }

    /// With one home, and its database for itself.
    pub(super) async fn alone(seed: u64) -> Self {
        Self::of(StdRng::seed_from_u64(seed), &["a"], false).await
    }

    async fn of(mut rng: StdRng, names: &[&'static str], shared: bool) -> Self {
        // Memory where there is some: a world writes and syncs a lot.
        let shm = Utf8Path::new("/dev/shm");
        let dir = camino_tempfile::Builder::new()
            .prefix("vs-")
            .tempdir_in(if shm.exists() {
                shm
            } else {
                Utf8Path::new("/tmp")
            })
            .unwrap();
        let calm = rng.random_bool(0.5);
        let dice = Dice::new(rng.random(), calm);
        let clock = Clock::simulated();
        let mut sites = Vec::new();
        for name in names {
            let warm = rng.random_bool(0.6);
            let pool = u32::from(warm && rng.random_bool(0.6));
            let (clock, dice) = (clock.clone(), Arc::clone(&dice));
            let mut site = Site::new(dir.path(), name, shared, warm, pool, clock, dice);
            site.come_up().await;
            sites.push(site);
        }
        Self {
            rng,
            calm,
            dice,
            clock,
            _dir: dir,
            sites,
            sessions: Vec::new(),
            people: HashMap::new(),
            cancelled: Vec::new(),
            doubtful: Vec::new(),
            perhaps_cancelled: Vec::new(),
            names: Vec::new(),
            history: Vec::new(),
            tally: Tally::default(),
            broken: Vec::new(),
            bug: None,
        }
    }

    /// Of the first controller that there is.
    pub(super) fn core(&self) -> Shared {
        let site = self.sites.iter().find(|site| site.process.is_some());
        site.unwrap().core()
    }

    /// The runner that a machine has, or had last.
    pub(super) fn runner(&self, id: MachineId) -> Option<Arc<Runner>> {
        self.sites.iter().find_map(|site| site.host.get(id))
    }

    pub(super) async fn end(mut self) {
        for site in &mut self.sites {
            site.end().await;
        }
    }

    pub(super) fn say(&mut self, words: String) {
        self.history.push(words);
    }

    pub(super) fn name(&mut self, id: MachineId) -> String {
        let at = self.names.iter().position(|known| *known == id);
        let at = at.unwrap_or_else(|| {
            self.names.push(id);
            self.names.len() - 1
        });
        format!("m{at}")
    }

    pub(super) fn session_name(&self, id: SessionId) -> String {
        let at = self.sessions.iter().position(|known| *known == id);
        at.map_or_else(|| "one in doubt".to_owned(), |at| format!("s{at}"))
    }

    /// Faults and chance, then neither; then everything must be as it should.
    pub(super) async fn live(&mut self) -> Result<(), String> {
        for _ in 0..STEPS {
            self.step().await;
            self.go_wrong().await;
        }
        self.say("no more faults".to_owned());
        self.dice.rest();
        for at in 0..self.sites.len() {
            self.sites[at].pool = 0;
            self.finish_former(at).await;
            if !self.sites[at].lost {
                self.crash(at).await;
                self.tally.crashes -= 1;
            }
        }
        for id in std::mem::take(&mut self.doubtful) {
            if self.core().store.session(id).await.unwrap().is_some() {
                self.is_asked_for(id);
            }
        }
        while self.sessions.len() < LIVES {
            self.ask().await;
        }
        self.settle().await?;
        self.check().await?;
        self.count().await;
        Ok(())
    }

    async fn step(&mut self) {
        self.tick().await;
        match self.rng.random_range(0..100) {
            0..4 => self.ask().await,
            4..37 => self.resume().await,
            37..40 => self.answer().await,
            40..45 => self.begin_at_some(Self::begin_place),
            45..59 => self.begin_effect().await,
            59..61 => self.begin_at_some(Self::begin_deadlines),
            61..77 => self.begin_follow().await,
            77..89 => self.vm_goes_on(),
            89..91 => self.begin_at_some(Self::begin_pool),
            91 => self.begin_at_some(Self::begin_orphans),
            92..97 => self.time_passes().await,
            97 if self.rng.random_bool(0.2) => self.cancel().await,
            98 if !self.calm && self.rng.random_bool(0.15) => self.vm_dies(),
            99 if !self.calm || self.rng.random_bool(0.4) => {
                let at = self.rng.random_range(0..self.sites.len());
                self.crash(at).await;
            }
            _ => self.resume().await,
        }
    }

    /// A controller that begins things, by chance. None: it is another one's turn.
    pub(super) fn some_site(&mut self) -> Option<usize> {
        let at = self.rng.random_range(0..self.sites.len());
        self.sites[at].acts().then_some(at)
    }

    fn begin_at_some(&mut self, begin: fn(&mut Self, usize)) {
        if let Some(at) = self.some_site() {
            begin(self, at);
        }
    }

    /// Somebody clicks *Connect*.
    pub(super) async fn ask(&mut self) {
        if self.sessions.len() + self.doubtful.len() >= LIVES {
            return;
        }
        let new = NewSession {
            id: SessionId::generate(),
            provider: "codex".parse().unwrap(),
            flow: "browser".to_owned(),
            user_id: String::new(),
            image_alias: "browser".to_owned(),
            login_timeout: Duration::from_secs(900),
            start_at_most: if self.rng.random_bool(0.2) {
                StartKind::Cold
            } else {
                StartKind::Pool
            },
            owner: Owner::local(),
            quota: Quota::default(),
            confirm_account: self.rng.random_bool(0.5),
        };
        let person = Person::new(new.confirm_account, self.rng.random_bool(0.2));
        let Some(at) = self.some_site() else {
            return;
        };
        self.people.insert(new.id, person);
        let now = self.clock.now();
        let core = self.sites[at].core();
        match core.store.create_session(&new, now).await {
            Ok(_) => self.is_asked_for(new.id),
            Err(err) => {
                assert_eq!(End::of(&err), End::CutOff);
                self.doubtful.push(new.id);
            }
        }
    }

    fn is_asked_for(&mut self, id: SessionId) {
        self.sessions.push(id);
        self.tally.lives += 1;
        self.say(format!("{} is asked for", self.session_name(id)));
    }

    async fn cancel(&mut self) {
        let Some(at) = self.some_site().filter(|_| !self.sessions.is_empty()) else {
            return;
        };
        let id = self.sessions[self.rng.random_range(0..self.sessions.len())];
        self.cancel_one(at, id).await;
    }

    /// Whether its person heard that it ended by this.
    pub(super) async fn cancel_one(&mut self, at: usize, id: SessionId) -> bool {
        let (core, now) = (self.sites[at].core(), self.clock.now());
        let applied = core
            .store
            .apply(id, Event::Cancelled, &Facts::default(), now)
            .await;
        match applied {
            Ok(Applied::Moved(_)) => {
                self.cancelled.push(id);
                self.say(format!("{} is cancelled", self.session_name(id)));
                true
            }
            Ok(Applied::Ignored(_) | Applied::Missing) => false,
            Err(err) => {
                assert_eq!(End::of(&err), End::CutOff);
                self.perhaps_cancelled.push(id);
                self.say(format!("{} is perhaps cancelled", self.session_name(id)));
                false
            }
        }
    }

    /// One of the actions goes on to its next point.
    async fn resume(&mut self) {
        let mut all = Vec::new();
        for (at, site) in self.sites.iter().enumerate() {
            let stands = site.away.is_some_and(|away| away.stands);
            for (process, former) in [(&site.process, false), (&site.former, true)] {
                let actions = process.as_ref().map_or(0, |process| process.actions.len());
                if former || !stands {
                    all.extend((0..actions).map(|action| (at, former, action)));
                }
            }
        }
        if all.is_empty() {
            return;
        }
        let (at, former, action) = all[self.rng.random_range(0..all.len())];
        let site = &mut self.sites[at];
        let (slot, of) = if former {
            (&mut site.former, "the former ")
        } else {
            (&mut site.process, "")
        };
        let process = slot.as_mut().unwrap();
        let words = process.actions[action].words.clone();
        let words = match process.actions[action].drive().await {
            Step::At(point) => format!("{words} is at {point}"),
            Step::Done(end) => {
                process.ended(action, end);
                self.tally.ended(end);
                format!("{words} is {}", end.words())
            }
        };
        let over = former && process.actions.is_empty();
        let words = format!("{of}{}: {words}", site.name);
        self.say(words);
        if over {
            self.finish_former(at).await;
        }
    }

    /// What this controller has under way is done.
    pub(super) async fn finish_all(&mut self, at: usize) {
        if let Some(process) = &mut self.sites[at].process {
            finish(process, &mut self.tally, &mut self.history).await;
        }
    }

    /// What the process before it has under way is done, and it ends.
    pub(super) async fn finish_former(&mut self, at: usize) {
        if let Some(mut former) = self.sites[at].former.take() {
            finish(&mut former, &mut self.tally, &mut self.history).await;
            former.die().await;
        }
    }

    /// One of those that can do so.
    fn vm_goes_on(&mut self) {
        let mut all = self.alive();
        all.retain(|runner| runner.goes_somewhere());
        if all.is_empty() {
            return;
        }
        let runner = &all[self.rng.random_range(0..all.len())];
        runner.goes_on(&mut self.rng);
        let name = self.name(runner.spec.machine_id);
        self.say(format!("{name} goes on"));
    }

    fn alive(&self) -> Vec<Arc<Runner>> {
        let there = self.sites.iter().filter(|site| !site.lost);
        let mut all: Vec<_> = there.flat_map(|site| site.host.all()).collect();
        all.retain(|runner| runner.is_alive());
        all
    }

    fn vm_dies(&mut self) {
        let alive = self.alive();
        if alive.is_empty() {
            return;
        }
        let runner = &alive[self.rng.random_range(0..alive.len())];
        let name = self.name(runner.spec.machine_id);
        if self.rng.random_bool(0.5) {
            runner.die();
            self.tally.runners_killed += 1;
            self.say(format!("the runner of {name} is killed"));
        } else {
            runner.breaks();
            self.tally.vms_broken += 1;
            self.say(format!("{name} breaks"));
        }
    }

    async fn time_passes(&mut self) {
        let length = match self.rng.random_range(0..20) {
            0 if !self.calm => Duration::from_secs(self.rng.random_range(60..1000)),
            1..6 => Duration::from_secs(self.rng.random_range(1..20)),
            _ => Duration::from_millis(self.rng.random_range(1..500)),
        };
        self.pass(length).await;
        self.say(format!("{length:?} pass"));
    }

    /// Without faults, everything that can be done is done, until nothing is left to do.
    async fn settle(&mut self) -> Result<(), String> {
        // Or they stay as they are, and their sessions end by their deadlines.
        let vms_go_on = self.rng.random_bool(0.5);
        for round in 0..ROUNDS {
            for _ in 0..LIVES {
                if vms_go_on {
                    self.vm_goes_on();
                }
            }
            self.answer_all().await;
            let now = self.clock.now();
            let mut soon = now.plus(Duration::from_secs(30));
            for at in 0..self.sites.len() {
                if self.sites[at].lost {
                    self.forget(at).await;
                } else {
                    self.reconcile(at).await;
                    let due = self.sites[at].core().store.next_due(now).await.unwrap();
                    soon = soon.min(due.unwrap_or(soon));
                }
            }
            if self.has_settled().await {
                self.say(format!("settled after {round} rounds"));
                return Ok(());
            }
            // Half a minute, or to what is due before.
            let left = soon.micros_since(self.clock.now());
            self.pass(Duration::from_micros(left)).await;
        }
        Err(format!("does not settle: {}", self.unsettled().await))
    }

    async fn count(&mut self) {
        let core = self.core();
        for id in self.sessions.clone() {
            let row = core.store.session(id).await.unwrap().unwrap();
            match row.state {
                SessionState::Completed => self.tally.completed += 1,
                SessionState::Cancelled => self.tally.cancelled += 1,
                SessionState::Expired => self.tally.expired += 1,
                SessionState::Failed => self.tally.failed += 1,
                SessionState::Requested
                | SessionState::Placing
                | SessionState::Starting
                | SessionState::Ready
                | SessionState::AwaitingUser
                | SessionState::Confirming
                | SessionState::Capturing => {}
            }
            let finding = row.failure.and_then(|verdict| verdict.finding);
            let cause = finding.map(|finding| finding.cause);
            self.tally.hosts_lost += u64::from(cause == Some(Cause::HostLost));
            self.tally.other_accounts += u64::from(cause == Some(Cause::CredentialInvalid));
            let events = core.store.events(id, 0, 10_000).await.unwrap();
            let text = serde_json::to_string(&events).unwrap();
            let confirming = text.contains(SessionState::Confirming.id());
            self.tally.unconfirmed += u64::from(confirming && row.state == SessionState::Expired);
            self.tally.fell_back += u64::from(text.contains("fell-back"));
            self.tally.from_pool += u64::from(text.contains("\"start\":\"pool\""));
        }
        // Events of runners whose session had ended before they were taken in.
        for row in core.store.all_machines(1000).await.unwrap() {
            let said = self
                .runner(row.id)
                .map_or(0, |runner| runner.vm.lock().unwrap().events.len() as u64);
            self.tally.events_late += said.saturating_sub(row.last_seq);
        }
    }
}

async fn finish(process: &mut Process, tally: &mut Tally, history: &mut Vec<String>) {
    while let Some(last) = process.actions.len().checked_sub(1) {
        let words = process.actions[last].words.clone();
        let end = loop {
            if let Step::Done(end) = process.actions[last].drive().await {
                break end;
            }
        };
        process.ended(last, end);
        tally.ended(end);
        history.push(format!("{words} is {}", end.words()));
    }
}
