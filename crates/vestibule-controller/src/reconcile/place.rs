//! Gives waiting sessions their machines, oldest first: one of the pool, else a new one as long as this host has places.
//! A place that the pool holds and cannot use for whoever is next is given back.
use super::ReconcileError;
use crate::{
    core::{Shared, off_runtime},
    crash::point,
    images,
    state::Event,
    store::{Facts, MachineRow, SessionRow, StoreError},
    warm::{self, Plan, PlanError},
};
use std::cmp::Reverse;
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
    machine::MachineState,
    session::{NotPooled, SessionEventKind, SessionState, StartKind},
    time::Timestamp,
};

/// Why a VM of the pool is ended for a session that it is not for.
const NEEDED: &str = "a sign-in needs its place";

pub(super) async fn run(core: &Shared) -> Result<u64, ReconcileError> {
    let now = core.now();
    for session in core.store.sessions_in(SessionState::Requested).await? {
        core.store
            .apply(session.id, Event::Accepted, &Facts::default(), now)
            .await?;
    }
    let waiting = core.store.sessions_in(SessionState::Placing).await?;
    if waiting.is_empty() {
        return Ok(0);
    }
    let _counting = core.places.lock().await;
    let mut host = Host::look(core).await?;
    let (mut placed, mut ahead) = (0, 0);
    for session in &waiting {
        match host.serve(core, session).await? {
            Served::Placed => placed += 1,
            Served::Over => {}
            Served::Waits => {
                host.give_back(core).await?;
                if host.tells {
                    tell(core, session, position(core, ahead, host.others)).await?;
                }
                ahead += 1;
            }
            Served::Elsewhere(lack) => {
                if host.tells {
                    let what = format!("another host: {lack} on `{}`", host.name);
                    tell(core, session, what).await?;
                }
            }
        }
    }
    Ok(placed)
}

/// What this host has for those that wait.
struct Host {
    places: usize,
    /// The pool, what is ready first.
    stock: Vec<MachineRow>,
    /// VMs of the pool that are being ended: each frees a place soon.
    leaving: usize,
    /// Whether other hosts share the database, and may serve whom this one can't.
    others: bool,
    /// This host's name, for people.
    name: String,
    /// Whether this host is the one that says to people what they wait for.
    tells: bool,
}

/// What came of a waiting session.
enum Served {
    Placed,
    /// It does not wait any more: it failed, or somebody ended it.
    Over,
    /// For a place.
    Waits,
    /// For another host, whatever places there are here; what this one lacks.
    Elsewhere(&'static str),
}

impl Host {
    async fn look(core: &Shared) -> Result<Self, ReconcileError> {
        let places = usize::try_from(core.config.limits.vms)
            .unwrap_or(usize::MAX)
            .saturating_sub(core.store.count_own_machines().await?);
        let machines = core.store.nobodys_machines().await?;
        let leaving = machines.iter().filter(|m| !m.is_stock()).count();
        let mut live = core.store.hosts().await?;
        live.retain(|host| host.live);
        let own = core.store.host();
        let others = live.iter().any(|host| host.id != own);
        let name = live.iter().find(|host| host.id == own);
        let name = name.map_or_else(|| own.to_string(), |host| host.name.clone());
        let mut stock: Vec<_> = machines
            .into_iter()
            .filter(|m| m.is_stock() && m.launched_at.is_some())
            .collect();
        stock.sort_by_key(|m| Reverse(readiness(m.state)));
        Ok(Self {
            places,
            stock,
            leaving,
            others,
            name,
            tells: !others || live.first().is_some_and(|host| host.id == own),
        })
    }

    async fn serve(
        &mut self,
        core: &Shared,
        session: &SessionRow,
    ) -> Result<Served, ReconcileError> {
        if self.places == 0 && self.stock.is_empty() {
            return Ok(Served::Waits);
        }
        let plan = match warm::plan(core, &session.image_alias).await {
            Ok(plan) => plan,
            Err(PlanError::Image { .. }) if self.others => {
                return Ok(Served::Elsewhere("its image can't be used"));
            }
            Err(PlanError::Image { alias, err }) => {
                let finding = images::missing(&alias, &err);
                core.store
                    .session_failed(session, finding, core.now())
                    .await?;
                return Ok(Served::Over);
            }
            Err(err) => return Err(err.into()),
        };
        if session.start_at_most == StartKind::Pool {
            while let Some(index) = self.stock.iter().position(|m| plan.fits(m)) {
                let machine = self.stock.remove(index);
                let now = core.now();
                if core.store.take(machine.id, session.id, now).await? {
                    given(core, session, &plan, StartKind::Pool, now);
                    return Ok(Served::Placed);
                }
            }
        }
        if self.places == 0 {
            return Ok(Served::Waits);
        }
        let home = core.config.home.clone();
        let free = off_runtime(move || free_mib(&home)).await?;
        let needed = core.config.limits.min_free_mib;
        if let Some(free) = free.filter(|free| *free < needed) {
            if self.others {
                return Ok(Served::Elsewhere("too little is free on the disk"));
            }
            let finding = disk_full(&core.config.home, free, needed);
            core.store
                .session_failed(session, finding, core.now())
                .await?;
            return Ok(Served::Over);
        }
        let mut machine = plan.machine(session.start_at_most);
        machine.session_id = Some(session.id);
        let why = not_pooled(core, session, &plan).await?;
        point("place:planned").await;
        let now = core.now();
        if !core.store.place(&machine, why, now).await? {
            return Ok(Served::Over);
        }
        self.places -= 1;
        given(core, session, &plan, machine.start(), now);
        Ok(Served::Placed)
    }

    /// A session waits for a place: the pool gives one up for it.
    async fn give_back(&mut self, core: &Shared) -> Result<(), ReconcileError> {
        if self.leaving > 0 {
            self.leaving -= 1;
            return Ok(());
        }
        while let Some(machine) = self.stock.pop() {
            if core.store.retire(machine.id, NEEDED).await? {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// How far a VM of the pool is.
fn readiness(state: MachineState) -> u8 {
    match state {
        MachineState::Paused => 3,
        MachineState::Up => 2,
        MachineState::Booting => 1,
        MachineState::Creating
        | MachineState::Stopping
        | MachineState::Gone
        | MachineState::Lost => 0,
    }
}

/// Why a session gets a VM of its own; it was looked for one in stock.
async fn not_pooled(
    core: &Shared,
    session: &SessionRow,
    plan: &Plan,
) -> Result<NotPooled, StoreError> {
    if session.start_at_most != StartKind::Pool {
        // Both who asks and a failed start lower what the row allows.
        return Ok(if core.store.had_a_vm(session.id).await? {
            NotPooled::FellBack
        } else {
            NotPooled::Asked
        });
    }
    let aside = plan.aside.as_ref().map(|aside| aside.finding.cause);
    Ok(match (&plan.snapshot, aside) {
        (Some(_), _) if keeps(core, plan) => NotPooled::PoolEmpty,
        (Some(_), _) => NotPooled::NoPool,
        (None, None) => NotPooled::NoSnapshot,
        (None, Some(Cause::SnapshotRefused)) => NotPooled::SnapshotRefused,
        (None, Some(_)) => NotPooled::SnapshotFailed,
    })
}

/// Whether the configuration wants VMs of this alias in stock.
fn keeps(core: &Shared, plan: &Plan) -> bool {
    core.config.pool().get(&plan.alias).copied().unwrap_or(0) > 0
}

fn given(core: &Shared, session: &SessionRow, plan: &Plan, start: StartKind, now: Timestamp) {
    let pool =
        keeps(core, plan) && session.start_at_most == StartKind::Pool && plan.snapshot.is_some();
    core.metrics.given(start, pool, session.created_at, now);
}

/// MiB that an unprivileged process may still write to the file system of `path`.
pub(crate) fn free_mib(path: &camino::Utf8Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path.as_std_path()).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize) >> 20)
}

fn disk_full(home: &camino::Utf8Path, free: u64, needed: u64) -> Finding {
    let quote = Quote {
        source: "host".to_owned(),
        line: None,
        text: format!("{free} MiB are free on the file system of {home}"),
    };
    Finding::new(
        Cause::HostDiskFull,
        quote,
        format!("a VM is started only while {needed} MiB are free for its logs and evidence"),
        format!("make room on the file system of {home}, or lower `limits.min_free_mib`"),
    )
    .refuted_by(format!("`df -m {home}` shows {needed} MiB or more"))
    .retryable()
}

/// How many are ahead of one that waits for a place.
fn position(core: &Shared, ahead: usize, others: bool) -> String {
    let limit = core.config.limits.vms;
    let limit = if others {
        "every host has as many VMs as it allows".to_owned()
    } else {
        format!("{limit} VMs run, as many as this host allows")
    };
    match ahead {
        0 => format!("a free place: {limit}; this sign-in is next"),
        _ => format!("a free place: {limit}; {ahead} sign-ins are ahead"),
    }
}

/// Says what a session waits for, when that changed.
async fn tell(core: &Shared, session: &SessionRow, what: String) -> Result<(), ReconcileError> {
    if !core.live.waits_for(session.id, &what) {
        return Ok(());
    }
    let waiting = SessionEventKind::Waiting {
        waiting_for: vec![what],
    };
    core.store
        .add_events(session.id, &[waiting], core.now())
        .await?;
    Ok(())
}
