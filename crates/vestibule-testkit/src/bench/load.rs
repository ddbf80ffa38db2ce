//! Load: thousands of live sessions on one controller, each with somebody who follows its events and watches its screen. The
//! controller is the real one, on its SQLite database; it starts a program for each VM, and what these become is a
//! [`Crowd`] in this process, beside the people.
//!
//! 1. Sessions are started as fast as they come, until so many live; beside it, in turns, what starting the same programs
//!    costs without a controller.
//! 2. With all of them live: events, and further sign-ins that come and go as people do.
//! 3. Churn: everybody signs in, leaves, and somebody else comes, as often as in an hour; memory before and after.
mod client;

use super::{
    report::{Report, Required},
    serve::Controller,
    stats::{median, percentile},
    usage,
};
use crate::{
    api::Api,
    runner::{Pace, crowd::Crowd},
    wait,
};
use anyhow::{Context, Result, ensure};
use camino::Utf8Path;
use client::{Person, Seen};
use futures_util::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, FuturesUnordered},
};
use rand::{SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use std::{
    collections::VecDeque,
    process::Stdio,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt as _, process::Command};
use vestibule_api::{
    control::VmView,
    ids::{MachineId, SessionId},
    machine::VmSpec,
    session::SessionState,
};

/// Live sessions.
const SESSIONS: usize = 2000;
/// Places beside them, for those that come and go.
const SPARE: usize = 64;
/// Requests at a time.
const AT_ONCE: usize = 16;
/// With everybody there: each session has an event in ten seconds.
const EVENTS_A_SECOND: u32 = 200;
const EVENTS_FOR: Duration = Duration::from_secs(30);
/// And so many further sign-ins a second begin and end.
const STARTS_A_SECOND: u32 = 4;
/// Lives of the churn: what an hour brings where everybody stays a quarter of it.
const LIVES: usize = 4 * SESSIONS;
/// Samples of the memory during the churn.
const SAMPLES: usize = 8;
/// Programs that are started without a controller.
const BARE: usize = 400;
/// For hangs, not for slowness.
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: f64 = 1024.0 * 1024.0;

/// Runs the bench.
///
/// # Errors
/// When a session does not go as it should, or something of one is left over.
pub async fn run() -> Result<Report> {
    let sessions = given("VESTIBULE_LOAD_SESSIONS")?.unwrap_or(SESSIONS);
    let lives = given("VESTIBULE_LOAD_LIVES")?.unwrap_or(sessions * LIVES / SESSIONS);
    let mut report = Report::new("load");
    let dir = camino_tempfile::Builder::new()
        .prefix("vl-")
        .tempdir()
        .context("make a directory")?;
    let path = dir.path().join("crowd.sock");
    let pace = Pace {
        boot: Duration::ZERO,
        sign_in: None,
        hand_over: Duration::ZERO,
    };
    let crowd = Crowd::listen(&path, pace)?;
    let limits = format!("vms = {}\nwaiting = 100000\n", sessions + SPARE);
    let controller = Controller::start(&["runner", "--crowd", path.as_str()], &limits).await?;
    let load = Load {
        api: controller.api(),
        pid: controller.pid()?,
        crowd: &crowd,
        seen: Seen::new(),
    };

    // Its first session makes what it makes once.
    load.life().await?;
    let (empty, descriptors) = (usage::anonymous_bytes(load.pid)?, descriptors(load.pid)?);

    say(&format!("starting {sessions} sessions"));
    let begun = Instant::now();
    let people: Vec<(f64, Person)> = stream::iter(0..sessions)
        .map(|_| load.begin())
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    let rate = count(sessions) / begun.elapsed().as_secs_f64();
    let (starts, mut people): (Vec<f64>, Vec<Person>) = people.into_iter().unzip();
    let bare = bare_rate(&crowd, &path, dir.path()).await?;
    report.figure("sign-ins begun until a person is asked", "1/s", rate, &[]);
    report.figure("the same programs started alone", "1/s", bare, &[]);
    report.figure("begun ÷ started alone", "x", rate / bare, &[]);
    percentiles(
        &mut report,
        "POST /api/auth/start, 16 at a time, flat out",
        &starts,
    );
    let full = usage::anonymous_bytes(load.pid)?;
    report.figure("controller, nobody there", "MiB", empty / MIB, &[]);
    report.figure(
        format!("controller, {sessions} live"),
        "MiB",
        full / MIB,
        &[],
    );
    report.figure(
        "for each session",
        "KiB",
        (full - empty) / count(sessions) / 1024.0,
        &[],
    );

    say(&format!(
        "{rate:.1} sessions a second; events for {EVENTS_FOR:?}"
    ));
    let frames = load.seen.frames.load(Ordering::Relaxed);
    let cpu = usage::cpu_seconds(load.pid)?;
    let begun = Instant::now();
    let ids: Vec<SessionId> = people.iter().map(|person| person.id).collect();
    let (starts, ()) = tokio::try_join!(load.visits(), load.events(&ids))?;
    let seconds = begun.elapsed().as_secs_f64();
    let latencies = load.seen.take_latencies();
    let sent = EVENTS_FOR.as_secs() * u64::from(EVENTS_A_SECOND);
    ensure!(
        latencies.len() as u64 == sent,
        "{} of {sent} events arrived",
        latencies.len()
    );
    percentiles(
        &mut report,
        "an event, from its runner to its person",
        &latencies,
    );
    report.require(Required::AtMost(100.0));
    percentiles(&mut report, "POST /api/auth/start, beside them", &starts);
    let frames = load.seen.frames.load(Ordering::Relaxed) - frames;
    #[expect(clippy::cast_precision_loss, reason = "less than 2⁵² frames")]
    report.figure(
        "frames that people saw",
        "1/s",
        frames as f64 / seconds,
        &[],
    );
    let busy = (usage::cpu_seconds(load.pid)? - cpu) / seconds;
    report.figure("controller's processors meanwhile", "cores", busy, &[]);
    ensure!(
        load.seen.watching.load(Ordering::Relaxed) == sessions,
        "some screens closed"
    );

    let begun = Instant::now();
    let mut memory = Vec::new();
    for part in 1..=SAMPLES {
        say(&format!(
            "churn, part {part} of {SAMPLES}: {} lives",
            lives / SAMPLES
        ));
        load.churn(&mut people, lives / SAMPLES).await?;
        memory.push(usage::anonymous_bytes(load.pid)? / MIB);
    }
    let churn = count(lives) / begun.elapsed().as_secs_f64();
    report.figure("whole lives, churn", "1/s", churn, &[]);
    report.median("controller amid the churn", "MiB", &memory);
    // The first quarter fills caches and the allocator's lists.
    let growth = median(&memory[SAMPLES - 2..]) / median(&memory[1..3]);
    report.figure(
        "its memory at the end ÷ after a quarter",
        "x",
        growth,
        &memory,
    );
    report.require(Required::AtMost(1.05));

    say("everybody leaves");
    for person in &people {
        load.crowd.sign_in(person.id)?;
    }
    for person in people {
        left(person).await?;
    }
    load.nothing_left(descriptors).await?;
    report.note(format!(
        "{} sign-ins, {lives} of them churn; every one completed, and nothing of any is left",
        sessions * 2 + lives
    ));
    report.note("runners and people are one process on the same two cores; each request has a connection of its own");
    controller.end().await?;
    Ok(report)
}

/// It is long.
#[expect(clippy::print_stderr, reason = "progress is for whoever waits")]
fn say(what: &str) {
    eprintln!("load: {what}");
}

fn given(name: &str) -> Result<Option<usize>> {
    let text = std::env::var(name).ok();
    let number = text.map(|text| text.parse()).transpose();
    number.with_context(|| format!("understand `{name}`"))
}

#[expect(clippy::cast_precision_loss, reason = "less than 2⁵² of anything")]
fn count(count: usize) -> f64 {
    count as f64
}

/// Median and 99th percentile, the latter last.
fn percentiles(report: &mut Report, what: &str, samples: &[f64]) {
    report.median(what, "ms", samples);
    report.figure(
        format!("{what}: p99"),
        "ms",
        percentile(samples, 99),
        samples,
    );
}

/// Open files of a process.
fn descriptors(pid: u32) -> Result<usize> {
    let path = format!("/proc/{pid}/fd");
    let open = std::fs::read_dir(&path).with_context(|| format!("read `{path}`"))?;
    Ok(open.count())
}

struct Load<'a> {
    api: &'a Api,
    pid: u32,
    crowd: &'a Crowd,
    seen: Arc<Seen>,
}

impl Load<'_> {
    /// Somebody starts a sign-in and comes to its screen. How long the request took, ms.
    async fn begin(&self) -> Result<(f64, Person)> {
        let begun = Instant::now();
        let id = self.api.start("codex", None).await?;
        let took = begun.elapsed().as_secs_f64() * 1e3;
        let arrived = tokio::time::timeout(PATIENCE, Person::arrive(self.api, id, &self.seen));
        let arrived = arrived.await.context("wait for a person to be asked")?;
        let person = arrived.with_context(|| format!("begin session {id}"))?;
        Ok((took, person))
    }

    /// They sign in, and the session ends well.
    async fn end(&self, person: Person) -> Result<()> {
        self.crowd.sign_in(person.id)?;
        tokio::time::timeout(PATIENCE, left(person))
            .await
            .context("wait for a session's end")?
    }

    async fn life(&self) -> Result<f64> {
        let (took, person) = self.begin().await?;
        self.end(person).await?;
        Ok(took)
    }

    /// Events of sessions by chance, at an even pace.
    async fn events(&self, ids: &[SessionId]) -> Result<()> {
        let mut random = StdRng::seed_from_u64(1);
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / EVENTS_A_SECOND);
        for _ in 0..EVENTS_FOR.as_secs() * u64::from(EVENTS_A_SECOND) {
            ticks.tick().await;
            let id = ids.choose(&mut random).context("nobody is there")?;
            self.crowd.say(*id, self.seen.stamp())?;
        }
        // The last ones arrive.
        let sent = self.seen.frames.load(Ordering::Relaxed);
        wait::until("a further frame of each", PATIENCE, || async {
            let now = self.seen.frames.load(Ordering::Relaxed) - sent;
            if now > ids.len() as u64 {
                Ok(())
            } else {
                Err(now)
            }
        })
        .await
    }

    /// People who come, sign in and go, at an even pace; how long their requests took, ms.
    async fn visits(&self) -> Result<Vec<f64>> {
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / STARTS_A_SECOND);
        let mut running = FuturesUnordered::new();
        let mut took = Vec::new();
        for _ in 0..EVENTS_FOR.as_secs() * u64::from(STARTS_A_SECOND) {
            loop {
                tokio::select! {
                    _ = ticks.tick() => break,
                    Some(one) = running.next() => took.push(one?),
                }
            }
            running.push(self.life());
        }
        while let Some(one) = running.next().await {
            took.push(one?);
        }
        Ok(took)
    }

    /// So many people leave, the longest there first, and others come.
    async fn churn(&self, people: &mut Vec<Person>, lives: usize) -> Result<()> {
        let (mut there, mut running) = (
            VecDeque::from(std::mem::take(people)),
            FuturesUnordered::new(),
        );
        for _ in 0..lives {
            if running.len() == AT_ONCE {
                let next: Option<Result<Person>> = running.next().await;
                there.push_back(next.context("nobody is under way")??);
            }
            let oldest = there.pop_front().context("nobody is there")?;
            running.push(async {
                self.end(oldest).await?;
                Ok(self.begin().await?.1)
            });
        }
        while let Some(next) = running.next().await {
            there.push_back(next?);
        }
        people.extend(there);
        Ok(())
    }

    /// No VM, no runner, no file of one, and no more open files than before.
    async fn nothing_left(&self, before: usize) -> Result<()> {
        wait::until("nothing left", PATIENCE, || async {
            let vms: Vec<VmView> = self
                .api
                .get("/api/vms")
                .await
                .map_err(|err| format!("{err:#}"))?;
            let open = descriptors(self.pid).map_err(|err| format!("{err:#}"))?;
            // Connections to the database come and go.
            if vms.is_empty() && self.crowd.is_empty() && open <= before + 8 {
                return Ok(());
            }
            let (vms, runners) = (vms.len(), self.crowd.len());
            Err(format!(
                "{vms} VMs, {runners} runners, {open} open files; {before} before"
            ))
        })
        .await
    }
}

/// Waits until they left, and their session ended well.
async fn left(person: Person) -> Result<()> {
    let id = person.id;
    let state = person.leave().await;
    let state = state.with_context(|| format!("end session {id}"))?;
    ensure!(
        state == SessionState::Completed,
        "{id} ended as {}",
        state.id()
    );
    Ok(())
}

/// Starts the program of a runner as the controller does, for nobody: how many a second come up.
async fn bare_rate(crowd: &Crowd, path: &Utf8Path, dir: &Utf8Path) -> Result<f64> {
    let like = crowd.any_spec().context("no runner lives")?;
    let before = crowd.len();
    let begun = Instant::now();
    let started = stream::iter(0..BARE).map(|_| start_bare(like.clone(), path, dir));
    let specs: Vec<VmSpec> = started.buffer_unordered(AT_ONCE).try_collect().await?;
    wait::until("every program to have a runner", PATIENCE, || async {
        let there = crowd.len() - before;
        if there == BARE { Ok(()) } else { Err(there) }
    })
    .await?;
    let rate = count(BARE) / begun.elapsed().as_secs_f64();
    for spec in specs {
        if let Some(session) = spec.session_id {
            crowd.end(session)?;
        }
    }
    wait::until("their end", PATIENCE, || async {
        if crowd.len() == before {
            Ok(())
        } else {
            Err(crowd.len())
        }
    })
    .await?;
    Ok(rate)
}

async fn start_bare(mut spec: VmSpec, path: &Utf8Path, dir: &Utf8Path) -> Result<VmSpec> {
    spec.machine_id = MachineId::generate();
    spec.session_id = Some(SessionId::generate());
    let own = dir.join(spec.machine_id.to_string());
    spec.vm_dir = own.join("vm").into_string();
    spec.evidence_dir = own.join("evidence").into_string();
    for dir in [&spec.vm_dir, &spec.evidence_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("make `{dir}`"))?;
    }
    let stderr = std::fs::File::create(own.join("vm/runner.stderr"))?;
    let mut child = Command::new(std::env::current_exe()?)
        .args(["runner", "--crowd", path.as_str()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .context("start a runner's program")?;
    let mut stdin = child.stdin.take().context("its input")?;
    stdin.write_all(&serde_json::to_vec(&spec)?).await?;
    drop(stdin);
    let status = child.wait().await?;
    ensure!(status.success(), "a runner's program ended with {status}");
    Ok(spec)
}
