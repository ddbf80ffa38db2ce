//! Deterministic simulation of session lives: the state machine, the store (SQLite), the vault, the outbox, the
//! reconcilers and what they do to runners are the real ones; host, runners, guests, people and the clock are simulated
//! from a seed.
//!
//! A *world* is one home, or two that share a database, with several sessions. A seed decides at each step which of the
//! things that can happen now happens: somebody starts or cancels a sign-in or answers what it asks, a reconciler begins, an
//! effect that is due begins, an action that stands at a named point ([`crate::crash::point`]) goes on, a VM goes on or dies, an
//! event arrives (once more, late, or never), a reply is lost, time passes, or the controller is killed: everything that it has
//! under way stops where it stands, and another one comes up on the same rows. After that there are no more faults, and the world
//! must settle.
//!
//! Two homes have a host, a vault and a controller each. Their database is one SQLite file that is told to be shared
//! (`store/simulated.rs`): leases by the simulation's clock, fencing by generation. There a controller may also stand still
//! until its lease has run out and then go on with what it had under way; be cut off from the database after any call, with a
//! commit of which it does not hear; lose its home to another process while it goes on; be forgotten by an admin and come back; or never come
//! back: then its sessions end, and nothing of it is left once it is forgotten.
//!
//! What is not simulated: the loops around the reconcilers (when one runs is the seed's choice), the HTTP stream of a
//! runner's events (its lines come one by one), PostgreSQL's own concurrency and requests relayed between controllers
//! (`tests/it/cluster.rs` and the store's tests have both on PostgreSQL).
//!
//! Some sessions wait until their owner has confirmed the account. The owner confirms it, once or again, in time or too late, ends
//! the session, or says nothing; and some guests hand over another account than was shown.
//!
//! [`bugs`] are there to be found: each breaks an invariant.
//!
//! `VESTIBULE_SIM_LIVES=100000 cargo test --release -p vestibule-controller --lib sim:: -- --nocapture` is the long run.
//!
//! | variable | effect |
//! |---|---|
//! | `VESTIBULE_SIM_LIVES` | so many lives instead of 400 |
//! | `VESTIBULE_SIM_FIRST` | the first seed; 1 otherwise |
//! | `VESTIBULE_SIM_SEED` | this seed alone, with its whole history |
mod actions;
mod bugs;
mod faults;
pub(crate) mod gate;
mod host;
mod image;
mod invariants;
mod people;
mod site;
mod tally;
mod world;

use bugs::Bug;
use futures_util::FutureExt as _;
use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};
use tally::Tally;
use world::{LIVES, World};

/// Lives of an ordinary test run.
const SOME: u64 = 400;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// One world from its seed: what happened, or the history until an invariant broke, and which.
fn live(seed: u64, bug: Option<Bug>) -> Result<(Tally, Vec<String>), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let result = runtime.block_on(async {
        let mut world = World::new(seed).await;
        world.bug = bug;
        // Without its history a panic says little.
        let lived = AssertUnwindSafe(world.live()).catch_unwind().await;
        let lived = lived.unwrap_or_else(|panic| Err(words_of(panic.as_ref())));
        let history = std::mem::take(&mut world.history);
        let tally = world.tally.clone();
        world.end().await;
        match lived {
            Ok(()) => Ok((tally, history)),
            Err(broken) => Err(format!("{}\n{broken}", history.join("\n"))),
        }
    });
    runtime.shutdown_background();
    result
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("a panic: {}", text.unwrap_or("without words"))
}

/// Worlds from seed `first` on, with so many lives together: what happened; or what broke first, and how to see it again.
fn run(first: u64, lives: u64, bug: Option<Bug>) -> Result<Tally, String> {
    let (next, end) = (AtomicU64::new(first), first + lives.div_ceil(LIVES as u64));
    let (sum, broken) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || !broken.lock().unwrap().is_empty() {
                        return;
                    }
                    match live(seed, bug) {
                        Ok((tally, _)) => sum.lock().unwrap().add(&tally),
                        Err(why) => broken.lock().unwrap().push((seed, why)),
                    }
                }
            });
        }
    });
    let Some((seed, why)) = broken.into_inner().unwrap().into_iter().min() else {
        return Ok(sum.into_inner().unwrap());
    };
    let lines: Vec<_> = why.lines().collect();
    let last = lines[lines.len().saturating_sub(60)..].join("\n");
    Err(format!(
        "an invariant broke. At the same commit, with any profile, all of it again: \
         VESTIBULE_SIM_SEED={seed} cargo test -p vestibule-controller --lib {TEST} -- --nocapture\n{last}"
    ))
}

/// The name of the test below.
const TEST: &str = "reconcile::sim::every_life_ends_once_and_leaves_nothing";

#[test]
fn every_life_ends_once_and_leaves_nothing() {
    if let Some(seed) = number("VESTIBULE_SIM_SEED") {
        match live(seed, None) {
            Ok((tally, history)) => eprintln!("{}\n{tally:?}", history.join("\n")),
            Err(broken) => panic!("seed {seed}:\n{broken}"),
        }
        return;
    }
    let lives = number("VESTIBULE_SIM_LIVES").unwrap_or(SOME);
    let begun = Instant::now();
    let first = number("VESTIBULE_SIM_FIRST").unwrap_or(1);
    let sum = run(first, lives, None).unwrap_or_else(|report| panic!("{report}"));
    eprintln!(
        "simulated {} lives in {:.1} s: {sum:?}",
        sum.lives,
        begun.elapsed().as_secs_f64()
    );
    // A simulation in which nothing goes wrong proves nothing.
    for (what, count) in sum.named() {
        assert!(count > 0 || lives < SOME, "no life had {what}: {sum:?}");
    }
}

#[test]
fn a_seed_gives_the_same_history_again() {
    for seed in [7, 1234] {
        let (once, again) = (live(seed, None).unwrap().1, live(seed, None).unwrap().1);
        assert_eq!(once, again, "seed {seed}");
        assert!(once.len() > 50, "something happened: {}", once.len());
    }
}

#[tokio::test]
async fn a_clock_that_jumps_takes_no_time_from_anybody() {
    use crate::reconcile::deadlines::{self, Clocks};
    use std::time::Duration;
    let mut world = World::alone(1).await;
    world.ask().await;
    let (core, id) = (world.core(), world.sessions[0]);
    let deadline = async || {
        core.store
            .session(id)
            .await
            .unwrap()
            .unwrap()
            .deadline_at
            .unwrap()
    };
    let before = deadline().await;
    let (steady, mut seen) = (Instant::now(), None);
    let look = |passed| Clocks {
        steady: steady + Duration::from_secs(passed),
        wall: core.now(),
    };
    deadlines::follow_clock(&core, &mut seen, look(0))
        .await
        .unwrap();
    let hour = Duration::from_secs(3600);
    world.clock.advance_to(core.now().plus(hour));
    deadlines::follow_clock(&core, &mut seen, look(0))
        .await
        .unwrap();
    assert_eq!(deadline().await, before.plus(hour));
    assert_eq!(deadlines::run(&core).await.unwrap(), 0, "nobody is late");
    // Time that really passed is not given back.
    world.clock.advance_to(core.now().plus(hour));
    deadlines::follow_clock(&core, &mut seen, look(3600))
        .await
        .unwrap();
    assert_eq!(deadlines::run(&core).await.unwrap(), 1);
    drop(core);
    world.end().await;
}

#[tokio::test]
async fn a_clock_that_jumps_makes_nothing_old() {
    use crate::{
        reconcile::{Kind, State, calendar::Look, once},
        state::Event,
        store::Facts,
    };
    use std::time::Duration;
    use vestibule_api::ids::MachineId;
    const HOUR: Duration = Duration::from_hours(1);
    let mut world = World::alone(1).await;
    world.ask().await;
    let (core, id) = (world.core(), world.sessions[0]);
    let (event, facts) = (Event::Cancelled, Facts::default());
    let cancelled = core.store.apply(id, event, &facts, core.now()).await;
    cancelled.unwrap();
    let bundle = core.evidence_dir(MachineId::generate());
    std::fs::create_dir(&bundle).unwrap();
    std::fs::write(bundle.join("serial.log"), "it booted").unwrap();
    let mut states: [State; 3] = Default::default();
    let removed = async |[one, two, three]: &mut [State; 3], steady| {
        let wall = core.now();
        let look = Look { steady, wall };
        [
            once(&core, Kind::Retention, one, look).await.unwrap(),
            once(&core, Kind::Evidence, two, look).await.unwrap(),
            once(&core, Kind::Images, three, look).await.unwrap(),
        ]
    };
    let boot = Duration::from_secs(100);
    assert_eq!(removed(&mut states, boot).await, [0; 3], "all is young");
    // Without a record of when it was built it is old by any clock that is believed.
    let image = image::build(&core.config.home, "nobody's");
    let image = core.config.home.join("images").join(image);

    world.clock.advance_to(core.now().plus(31 * 24 * HOUR));
    assert_eq!(removed(&mut states, boot + HOUR).await, [0; 3], "it leapt");
    let mut anew = Default::default();
    let restarted = removed(&mut anew, boot + HOUR).await;
    assert_eq!(restarted, [0; 3], "the next controller doubts it, too");
    assert!(core.store.session(id).await.unwrap().is_some());
    assert!(bundle.exists() && image.exists());

    world.clock.advance_to(core.now().plus(HOUR));
    assert_eq!(
        removed(&mut states, boot + 2 * HOUR).await,
        [1; 3],
        "it stood"
    );
    assert!(core.store.was_forgotten(id).await.unwrap());
    assert!(!bundle.exists() && !image.exists());
    // What one has believed, the next one does.
    world.clock.advance_to(core.now().plus(HOUR));
    image::build(&core.config.home, "nobody's");
    let mut anew = Default::default();
    let restarted = removed(&mut anew, boot + 3 * HOUR).await;
    assert_eq!(restarted, [0, 0, 1]);
    drop(core);
    world.end().await;
}
