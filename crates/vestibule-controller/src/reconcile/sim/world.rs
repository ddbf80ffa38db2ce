//! One home, its sessions, and the seed that decides.
use super::{
    gate::{Step, drive},
    host::{Dice, Host, Runner},
    image::publish,
    tally::Tally,
};
use crate::{
    auth::{self, Access},
    clock::Clock,
    config::Config,
    core::{Core, Shared},
    http,
    images::Images,
    lease::Lease,
    live::Live,
    machine::follow,
    metrics::Metrics,
    packs::Packs,
    peers::Peers,
    people::{Owner, limits::Limits},
    reconcile::{self, Statuses, Stock},
    scheduler::Scheduler as _,
    state::Event,
    store::{Applied, Facts, NewSession, Quota, Store},
};
use camino_tempfile::Utf8TempDir;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::sync::watch;
use vestibule_api::{
    error::Chain,
    ids::{MachineId, SessionId},
    machine::MachineState,
    session::{SessionState, StartKind},
};
use vestibule_vault::{KeySource, Vault};

/// Sessions of one world.
pub(super) const LIVES: usize = 10;
/// Steps with faults; then the world settles.
const STEPS: usize = 1200;
/// Rounds in which it must have settled.
const ROUNDS: usize = 400;

/// Both reconcilers that count places hold a lock: one that waits for it would wait for one that stands still.
const PLACES: &str = "places";

/// Something that the controller has under way.
struct Action {
    /// What is under way once at a time: a reconciler, an effect, a runner that is followed.
    key: String,
    words: String,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

pub(super) struct World {
    rng: StdRng,
    dice: Arc<Dice>,
    pub(super) clock: Clock,
    pub(super) home: Utf8TempDir,
    pub(super) host: Arc<Host>,
    core: Option<Shared>,
    stop: Option<watch::Sender<bool>>,
    actions: Vec<Action>,
    pub(super) sessions: Vec<SessionId>,
    /// Sessions that somebody ended.
    pub(super) cancelled: Vec<SessionId>,
    /// Events of each runner that this controller has taken in.
    taken: HashMap<MachineId, usize>,
    /// Names of machines in the history, by the order in which they were seen: ids are not the seed's.
    names: Vec<MachineId>,
    pool: u32,
    packs: Packs,
    pub(super) history: Vec<String>,
    pub(super) tally: Tally,
}

impl World {
    pub(super) async fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        // Memory where there is some: a world writes and syncs a lot.
        let shm = camino::Utf8Path::new("/dev/shm");
        let home = camino_tempfile::Builder::new()
            .prefix("vs-")
            .tempdir_in(if shm.exists() {
                shm
            } else {
                camino::Utf8Path::new("/tmp")
            })
            .unwrap();
        let warm = rng.random_bool(0.6);
        publish(home.path(), warm);
        let dice = Dice::new(rng.random());
        // Read once: a debug build takes half a second for it.
        static PACKS: OnceLock<Packs> = OnceLock::new();
        let packs = PACKS.get_or_init(|| Packs::load(home.path(), &BTreeMap::new()).unwrap());
        let mut world = Self {
            packs: packs.clone(),
            pool: u32::from(warm && rng.random_bool(0.6)),
            host: Host::new(Arc::clone(&dice)),
            dice,
            rng,
            clock: Clock::simulated(),
            home,
            core: None,
            stop: None,
            actions: Vec::new(),
            sessions: Vec::new(),
            cancelled: Vec::new(),
            taken: HashMap::new(),
            names: Vec::new(),
            history: Vec::new(),
            tally: Tally::default(),
        };
        world.come_up().await;
        world
    }

    /// A controller on the home, as `serve` puts one together.
    async fn come_up(&mut self) {
        let home = self.home.path().to_owned();
        let mut config = Config::default();
        config.home.clone_from(&home);
        config.limits.vms = 3;
        config.limits.min_free_mib = 0;
        config.limits.min_free_memory_mib = 0;
        let alias = "browser".parse().unwrap();
        config.pool.insert(alias, self.pool);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let (stop, stopping) = watch::channel(false);
        let token = auth::token(&home).unwrap();
        let deadlines = config.deadlines();
        let core = Core {
            clock: self.clock.clone(),
            access: Access::new(token, address, address, &[], false),
            oidc: None,
            base: config.base(address),
            policy: http::policy(&config.frame_ancestors),
            limits: Limits::new(config.limits.starts_per_minute),
            images: Images::new(home.clone()),
            packs: self.packs.clone(),
            store: Store::open("sqlite", &home, deadlines).await.unwrap(),
            lease: Lease::always(),
            peers: Peers::new(None, Peers::tls(None).unwrap()),
            vault: Arc::new(Vault::open(&home.join("vault"), &KeySource::Own).unwrap()),
            scheduler: Arc::<Host>::clone(&self.host),
            config,
            live: Live::default(),
            statuses: Statuses::default(),
            stock: Stock::default(),
            places: tokio::sync::Mutex::default(),
            started_at: self.clock.now(),
            metrics: Metrics::default(),
            stopping,
        };
        self.core = Some(Arc::new(core));
        self.stop = Some(stop);
        self.taken.clear();
    }

    pub(super) fn core(&self) -> Shared {
        Arc::clone(self.core.as_ref().unwrap())
    }

    /// As SIGKILL: what is under way stops where it stands.
    async fn crash(&mut self) {
        self.tally.crashes += 1;
        self.tally.killed_mid_action += self.actions.len() as u64;
        self.say("the controller is killed".to_owned());
        self.actions.clear();
        let core = self.core.take().unwrap();
        core.store.close().await;
        drop(core);
        self.come_up().await;
    }

    pub(super) async fn end(mut self) {
        self.actions.clear();
        let core = self.core.take().unwrap();
        core.store.close().await;
        for runner in self.host.all() {
            runner.die();
        }
    }

    fn say(&mut self, words: String) {
        self.history.push(words);
    }

    fn name(&mut self, id: MachineId) -> String {
        let at = self.names.iter().position(|known| *known == id);
        let at = at.unwrap_or_else(|| {
            self.names.push(id);
            self.names.len() - 1
        });
        format!("m{at}")
    }

    fn session_name(&self, id: SessionId) -> String {
        let at = self.sessions.iter().position(|known| *known == id);
        format!("s{}", at.unwrap_or(usize::MAX))
    }

    /// Faults and chance, then neither; then everything must be as it should.
    pub(super) async fn live(&mut self) -> Result<(), String> {
        for _ in 0..STEPS {
            self.step().await;
        }
        while self.sessions.len() < LIVES {
            self.ask().await;
        }
        self.say("no more faults".to_owned());
        self.dice.rest();
        self.pool = 0;
        self.crash().await;
        self.tally.crashes -= 1;
        self.settle().await?;
        self.check().await?;
        self.count().await;
        Ok(())
    }

    async fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..4 => self.ask().await,
            4..40 => self.resume().await,
            40..45 => self.begin_place(),
            45..59 => self.begin_effect().await,
            59..61 => self.begin_deadlines(),
            61..77 => self.begin_follow().await,
            77..89 => self.vm_goes_on(),
            89..91 => self.begin_pool(),
            91 => self.begin_orphans(),
            92..97 => self.time_passes(),
            97 if self.rng.random_bool(0.2) => self.cancel().await,
            98 if self.rng.random_bool(0.15) => self.vm_dies(),
            99 => self.crash().await,
            _ => self.resume().await,
        }
    }

    /// Somebody clicks *Connect*.
    pub(super) async fn ask(&mut self) {
        if self.sessions.len() >= LIVES {
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
            confirm_account: false,
        };
        let now = self.clock.now();
        self.core().store.create_session(&new, now).await.unwrap();
        self.sessions.push(new.id);
        self.tally.lives += 1;
        self.say(format!("{} is asked for", self.session_name(new.id)));
    }

    async fn cancel(&mut self) {
        if self.sessions.is_empty() {
            return;
        }
        let id = self.sessions[self.rng.random_range(0..self.sessions.len())];
        let (core, now) = (self.core(), self.clock.now());
        let applied = core
            .store
            .apply(id, Event::Cancelled, &Facts::default(), now)
            .await
            .unwrap();
        if matches!(applied, Applied::Moved(_)) {
            self.cancelled.push(id);
            self.say(format!("{} is cancelled", self.session_name(id)));
        }
    }

    fn begin(
        &mut self,
        key: String,
        words: String,
        future: impl Future<Output = ()> + 'static,
    ) -> bool {
        if self.actions.iter().any(|action| action.key == key) {
            return false;
        }
        let future = Box::pin(future);
        self.actions.push(Action { key, words, future });
        true
    }

    /// One of the actions goes on to its next point.
    async fn resume(&mut self) {
        if self.actions.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.actions.len());
        let step = drive(&mut self.actions[at].future).await;
        match step {
            Step::At(point) => {
                let words = format!("{} is at {point}", self.actions[at].words);
                self.say(words);
            }
            Step::Done(()) => {
                let action = self.actions.remove(at);
                self.say(format!("{} is done", action.words));
            }
        }
    }

    /// Whether the action is still under way.
    async fn finish_all(&mut self) {
        while let Some(mut action) = self.actions.pop() {
            while let Step::At(_) = drive(&mut action.future).await {}
            self.say(format!("{} is done", action.words));
        }
    }

    fn begin_place(&mut self) {
        let core = self.core();
        self.begin(PLACES.to_owned(), "place".to_owned(), async move {
            if let Err(err) = reconcile::place::run(&core).await {
                panic!("place: {}", Chain(&err));
            }
        });
    }

    fn begin_deadlines(&mut self) {
        let core = self.core();
        self.begin("deadlines".to_owned(), "deadlines".to_owned(), async move {
            if let Err(err) = reconcile::deadlines::run(&core).await {
                panic!("deadlines: {}", Chain(&err));
            }
        });
    }

    fn begin_pool(&mut self) {
        let core = self.core();
        self.begin(PLACES.to_owned(), "pool".to_owned(), async move {
            let mut state = reconcile::State::default();
            if let Err(err) = reconcile::pool::run(&core, &mut state).await {
                panic!("pool: {}", Chain(&err));
            }
            while state.tasks.join_next().await.is_some() {}
        });
    }

    /// A stray that can't be ended now is tried again the next time: the loop around it logs that.
    fn begin_orphans(&mut self) {
        let core = self.core();
        self.begin("orphans".to_owned(), "orphans".to_owned(), async move {
            drop(reconcile::orphans::run(&core).await);
        });
    }

    /// One of the effects that are due, as the reconciler begins it.
    async fn begin_effect(&mut self) {
        let core = self.core();
        let mut due = core.store.due_effects(self.clock.now()).await.unwrap();
        if due.is_empty() {
            return;
        }
        let effect = due.swap_remove(self.rng.random_range(0..due.len()));
        let words = format!(
            "{} of {}",
            effect.kind.id(),
            self.session_name(effect.session)
        );
        // Somebody looks and has seen a frame: nobody is waited for in real time.
        core.live.shown(effect.session);
        let key = effect.id.clone();
        self.begin(key, words, async move {
            reconcile::effects::carry_out(&core, &effect).await;
        });
    }

    /// The controller hears from one of the runners that it follows, or that one is gone.
    async fn begin_follow(&mut self) {
        let machines = self.followed().await;
        if machines.is_empty() {
            return;
        }
        let machine = machines[self.rng.random_range(0..machines.len())];
        if self.rng.random_bool(0.05) {
            // The connection broke; the runner's events come from the first again.
            let before = self.taken.insert(machine, 0).unwrap_or(0);
            self.tally.events_again += before as u64;
        }
        self.follow(machine);
    }

    /// As the reconciler `machines` chooses them.
    async fn followed(&self) -> Vec<MachineId> {
        let rows = self.core().store.machines().await.unwrap();
        let over = |state| matches!(state, MachineState::Gone | MachineState::Lost);
        rows.iter()
            .filter(|row| row.launched_at.is_some() && !over(row.state))
            .map(|row| row.id)
            .collect()
    }

    fn follow(&mut self, id: MachineId) -> bool {
        let Some(runner) = self.host.get(id) else {
            return false;
        };
        let key = format!("follow {id}");
        if self.actions.iter().any(|action| action.key == key) {
            return false;
        }
        let name = self.name(id);
        let taken = self.taken.get(&id).copied().unwrap_or(0);
        let line = runner.vm.lock().unwrap().events.get(taken).map(|event| {
            self.taken.insert(id, taken + 1);
            serde_json::to_vec(event).unwrap()
        });
        let core = self.core();
        match line {
            Some(line) if runner.is_alive() => self.begin(
                key,
                format!("event {} of {name}", taken + 1),
                hear(core, id, line, runner),
            ),
            _ if runner.is_alive() => false,
            _ => {
                let words = format!("{name} is seen to be gone");
                self.begin(key, words, async move {
                    let Some(mut row) = core.store.machine(id).await.unwrap() else {
                        return;
                    };
                    follow::gone(&core, &mut row).await;
                })
            }
        }
    }

    fn vm_goes_on(&mut self) {
        let alive: Vec<_> = self.alive();
        if alive.is_empty() {
            return;
        }
        let runner = &alive[self.rng.random_range(0..alive.len())];
        let before = runner.vm.lock().unwrap().events.len();
        runner.goes_on(&mut self.rng);
        if runner.vm.lock().unwrap().events.len() > before {
            let name = self.name(runner.spec.machine_id);
            self.say(format!("{name} goes on"));
        }
    }

    fn alive(&self) -> Vec<Arc<Runner>> {
        let mut all = self.host.all();
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

    fn time_passes(&mut self) {
        let length = match self.rng.random_range(0..20) {
            0 => Duration::from_secs(self.rng.random_range(60..1000)),
            1..6 => Duration::from_secs(self.rng.random_range(1..20)),
            _ => Duration::from_millis(self.rng.random_range(1..500)),
        };
        self.clock.advance_to(self.clock.now().plus(length));
        self.say(format!("{length:?} pass"));
    }

    /// Without faults, everything that can be done is done, until nothing is left to do.
    async fn settle(&mut self) -> Result<(), String> {
        for round in 0..ROUNDS {
            self.make_old();
            self.begin_place();
            self.begin_deadlines();
            self.begin_orphans();
            self.finish_all().await;
            self.begin_pool();
            self.finish_all().await;
            for id in self.followed().await {
                while self.follow(id) {
                    self.finish_all().await;
                    // One that is gone is seen to be gone once; its row is the teardown's.
                    if !self.host.alive(id) {
                        break;
                    }
                }
            }
            let core = self.core();
            for effect in core.store.due_effects(self.clock.now()).await.unwrap() {
                core.live.shown(effect.session);
                reconcile::effects::carry_out(&core, &effect).await;
            }
            if self.has_settled().await {
                self.say(format!("settled after {round} rounds"));
                return Ok(());
            }
            // Half a minute, or to what is due before.
            let now = self.clock.now();
            let soon = now.plus(Duration::from_secs(30));
            let due = core.store.next_due(now).await.unwrap().unwrap_or(soon);
            self.clock.advance_to(due.min(soon));
        }
        Err(format!("does not settle: {}", self.unsettled().await))
    }

    /// What is young is left alone by the reconciler `orphans`, by the file system's clock: here it is old.
    fn make_old(&self) {
        let Ok(entries) = self.home.path().join("vms").read_dir_utf8() else {
            return;
        };
        for entry in entries.flatten() {
            let old = std::time::SystemTime::now() - Duration::from_secs(3600);
            if let Ok(dir) = std::fs::File::open(entry.path()) {
                drop(dir.set_modified(old));
            }
        }
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
            let events = core.store.events(id, 0, 10_000).await.unwrap();
            let text = serde_json::to_string(&events).unwrap();
            self.tally.fell_back += u64::from(text.contains("fell-back"));
            self.tally.from_pool += u64::from(text.contains("\"start\":\"pool\""));
        }
        // Events of runners whose session had ended before they were taken in.
        for row in core.store.all_machines(1000).await.unwrap() {
            let said = self
                .host
                .get(row.id)
                .map_or(0, |runner| runner.vm.lock().unwrap().events.len() as u64);
            self.tally.events_late += said.saturating_sub(row.last_seq);
        }
    }
}

/// Takes in one line of a runner's events, and what follows on its last one.
async fn hear(core: Shared, id: MachineId, line: Vec<u8>, runner: Arc<Runner>) {
    let Some(mut row) = core.store.machine(id).await.unwrap() else {
        return;
    };
    match follow::take_in(&core, &mut row, &line).await {
        Ok(true) => follow::finished(&core, &row).await,
        Ok(false) => {}
        Err(err) => panic!("{}: {}", runner.spec.machine_id, Chain(&err)),
    }
}
