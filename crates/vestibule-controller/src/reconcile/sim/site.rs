//! One home: its host, its vault, and the processes of its controller.
use super::{
    gate::{Step, drive},
    host::{Dice, Host},
    image::publish,
};
use crate::{
    auth::{self, Access},
    clock::Clock,
    config::{ClusterConfig, Config},
    core::{Core, Shared},
    http,
    images::Images,
    lease::Lease,
    live::Live,
    metrics::Metrics,
    packs::Packs,
    peers::Peers,
    people::limits::Limits,
    reconcile::{Statuses, Stock},
    store::{Hindrance, Store, StoreError, simulated::Wire},
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    collections::HashMap,
    error::Error,
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::sync::watch;
use vestibule_api::{
    error::Chain,
    ids::{HostId, MachineId},
    time::Timestamp,
};
use vestibule_vault::{KeySource, Vault};

/// For so many seconds a lease is taken, and so long after it ran out its host is lost.
const LEASE_S: u32 = 30;
const LOST_AFTER_S: u32 = 30;
/// The lease is renewed when so much time has passed.
pub(super) const THIRD: Duration = Duration::from_secs(10);

/// How an action ended, or why a call of the store's failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Done,
    /// Another process has the lease.
    Fenced,
    /// The database is out of reach.
    CutOff,
    /// Something that a reconciler's loop logs, and tries again.
    Again,
}

impl End {
    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Fenced => "fenced",
            Self::CutOff => "cut off",
            Self::Again => "to be tried again",
        }
    }

    /// What `err` means.
    pub(super) fn of(err: &(dyn Error + 'static)) -> Self {
        let mut next = Some(err);
        while let Some(err) = next {
            match err.downcast_ref::<StoreError>() {
                Some(StoreError::Fenced) => return Self::Fenced,
                Some(err) if err.hindrance() == Some(Hindrance::Gone) => return Self::CutOff,
                Some(_) => panic!("{}", Chain(err)),
                None => next = err.source(),
            }
        }
        Self::Again
    }
}

/// Something that a process has under way.
pub(super) struct Action {
    /// What is under way once at a time: a reconciler, an effect, a runner that is followed.
    key: String,
    pub(super) words: String,
    /// Whose runner is heard.
    pub(super) hears: Option<MachineId>,
    future: Pin<Box<dyn Future<Output = End>>>,
}

impl Action {
    pub(super) async fn drive(&mut self) -> Step<End> {
        drive(&mut self.future).await
    }
}

/// One life of a controller.
pub(super) struct Process {
    pub(super) core: Shared,
    _stop: watch::Sender<bool>,
    pub(super) wire: Arc<Wire>,
    pub(super) actions: Vec<Action>,
    /// Events of each runner that it has taken in.
    pub(super) taken: HashMap<MachineId, usize>,
    pub(super) renewed_at: Timestamp,
}

impl Process {
    /// `false`: the same is under way.
    pub(super) fn begin(
        &mut self,
        key: String,
        words: String,
        future: impl Future<Output = End> + 'static,
    ) -> bool {
        if self.actions.iter().any(|action| action.key == key) {
            return false;
        }
        self.actions.push(Action {
            key,
            words,
            hears: None,
            future: Box::pin(future),
        });
        true
    }

    /// An action is over.
    pub(super) fn ended(&mut self, at: usize, end: End) {
        let action = self.actions.remove(at);
        if let Some(machine) = action.hears.filter(|_| end != End::Done) {
            // Following broke off; the runner's events come from the first again.
            self.taken.insert(machine, 0);
        }
    }

    /// As SIGKILL: what is under way stops where it stands. Returns how much that was.
    pub(super) async fn die(self) -> u64 {
        let actions = self.actions.len();
        drop(self.actions);
        self.core.store.close().await;
        actions as u64
    }
}

/// What keeps a controller from its work for a while.
#[derive(Clone, Copy, Debug)]
pub(super) struct Away {
    /// Whether its whole process stands still; else it can't reach the database.
    pub(super) stands: bool,
    /// Steps that are left of it.
    pub(super) steps: u32,
    /// What passes with each.
    pub(super) each: Duration,
}

pub(super) struct Site {
    pub(super) name: &'static str,
    pub(super) home: Utf8PathBuf,
    pub(super) host: Arc<Host>,
    /// Once a controller came up on it.
    pub(super) id: Option<HostId>,
    /// Whether other homes may have the same database.
    pub(super) shared: bool,
    pub(super) pool: u32,
    clock: Clock,
    packs: Packs,
    pub(super) process: Option<Process>,
    /// The process before, which somebody forgot to end.
    pub(super) former: Option<Process>,
    pub(super) away: Option<Away>,
    /// Whether its controller ever failed to renew its lease in time.
    pub(super) was_away: bool,
    /// It never comes back.
    pub(super) lost: bool,
    /// An admin removed it, for good or so that it was a new one when it came back.
    pub(super) forgotten: bool,
    pub(super) was_forgotten: bool,
    /// Of the newest lease that a process came up with.
    generation: u64,
    /// Whether a process came up with a generation that one before it had.
    pub(super) repeated: bool,
}

impl Site {
    /// A home in `world`, whose database others may share.
    pub(super) fn new(
        world: &Utf8Path,
        name: &'static str,
        shared: bool,
        warm: bool,
        pool: u32,
        clock: Clock,
        dice: Arc<Dice>,
    ) -> Self {
        let home = world.join(name);
        std::fs::create_dir(&home).unwrap();
        publish(&home, warm);
        if shared {
            std::os::unix::fs::symlink("../shared.db", home.join("vestibule.db")).unwrap();
        }
        // Read once: a debug build takes half a second for it.
        static PACKS: OnceLock<Packs> = OnceLock::new();
        let packs = PACKS.get_or_init(|| Packs::load(&home, &Default::default()).unwrap());
        Self {
            name,
            host: Host::new(dice),
            id: None,
            home,
            shared,
            pool,
            clock,
            packs: packs.clone(),
            process: None,
            former: None,
            away: None,
            was_away: false,
            lost: false,
            forgotten: false,
            was_forgotten: false,
            generation: 0,
            repeated: false,
        }
    }

    /// A controller on the home, as `serve` puts one together.
    pub(super) async fn come_up(&mut self) {
        let home = self.home.clone();
        let mut config = Config::default();
        config.home.clone_from(&home);
        config.limits.vms = 3;
        config.limits.min_free_mib = 0;
        config.limits.min_free_memory_mib = 0;
        config.pool.insert("browser".parse().unwrap(), self.pool);
        config.cluster = self.shared.then(|| ClusterConfig {
            lease_s: LEASE_S,
            lost_after_s: LOST_AFTER_S,
            ..ClusterConfig::default()
        });
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let (stop, stopping) = watch::channel(false);
        let token = auth::token(&home).unwrap();
        let wire = Arc::<Wire>::default();
        let mut store = Store::open("sqlite", &home, config.deadlines())
            .await
            .unwrap();
        if self.shared {
            store = store.simulate(self.clock.clone(), Arc::clone(&wire)).await;
        }
        self.id = Some(store.host());
        let lease = Lease::take(
            &store,
            self.clock.clone(),
            &home,
            self.name.to_owned(),
            None,
            config.cluster().lease(),
        )
        .await
        .unwrap();
        if self.shared {
            let hosts = store.hosts().await.unwrap();
            let own = hosts.iter().find(|host| Some(host.id) == self.id);
            let generation = own.unwrap().generation;
            self.repeated |= generation <= self.generation;
            self.generation = generation;
        }
        let core = Core {
            clock: self.clock.clone(),
            access: Access::new(token, address, address, &[], false),
            oidc: None,
            base: config.base(address),
            policy: http::policy(&config.frame_ancestors),
            limits: Limits::new(config.limits.starts_per_minute),
            images: Images::new(home.clone()),
            packs: self.packs.clone(),
            metrics: Metrics::new(store.pace.commits()),
            store,
            lease,
            peers: Peers::new(None, Peers::tls(None).unwrap()),
            vault: Arc::new(Vault::open(&home.join("vault"), &KeySource::Own).unwrap()),
            scheduler: Arc::<Host>::clone(&self.host),
            config,
            live: Live::default(),
            statuses: Statuses::default(),
            stock: Stock::default(),
            places: tokio::sync::Mutex::default(),
            started_at: self.clock.now(),
            stopping,
        };
        self.process = Some(Process {
            core: Arc::new(core),
            _stop: stop,
            wire,
            actions: Vec::new(),
            taken: HashMap::new(),
            renewed_at: self.clock.now(),
        });
        self.away = None;
    }

    pub(super) fn core(&self) -> Shared {
        Arc::clone(&self.process.as_ref().unwrap().core)
    }

    /// Whether its controller begins things, as the loops around the reconcilers do.
    pub(super) fn acts(&self) -> bool {
        let stands = self.away.is_some_and(|away| away.stands);
        let process = self.process.as_ref();
        process.is_some_and(|process| !stands && process.core.lease.is_held())
    }

    /// What is young is left alone by the reconciler `orphans`, by the file system's clock: here it is old.
    pub(super) fn make_old(&self) {
        let Ok(entries) = self.home.join("vms").read_dir_utf8() else {
            return;
        };
        for entry in entries.flatten() {
            let old = std::time::SystemTime::now() - Duration::from_secs(3600);
            if let Ok(dir) = std::fs::File::open(entry.path()) {
                drop(dir.set_modified(old));
            }
        }
    }

    /// As SIGKILL of all its processes. Returns how much they had under way.
    pub(super) async fn die(&mut self) -> u64 {
        let mut actions = 0;
        for process in [self.process.take(), self.former.take()]
            .into_iter()
            .flatten()
        {
            actions += process.die().await;
        }
        actions
    }

    /// Nothing of it runs any more.
    pub(super) async fn end(&mut self) {
        self.die().await;
        for runner in self.host.all() {
            runner.die();
        }
    }
}
