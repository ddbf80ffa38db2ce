//! The view's relay against websockify: the same bytes from the same kind of source to the same viewer, in turns.
//!
//! ```text
//! vestibule   pour (fake runner) ───────────────────────────WebSocket──▶ viewer    (vestibule serve holds the other half)
//! websockify  pour --plain ──unix──▶ websockify ────────────WebSocket──▶ viewer
//! no relay    pour --websocket ─────────────────────────────WebSocket──▶ viewer    what the kernel's TCP costs by itself
//! source      pour --plain ──unix──▶ read                                          what a source costs by itself
//! ```
//! The controller hands the viewer's connection to the runner, so a part of the relay's work is done in the source's
//! process. Therefore the processor time of source and relay is counted together for each, and the relay's part is what is
//! more than the source costs by itself. Every program runs as a process of its own; all share the cores.
pub mod pour;
pub mod stream;
mod viewer;

use super::{
    report::{Report, Required},
    serve::Controller,
    stats::median,
    usage,
};
use crate::{process::Process, wait};
use anyhow::{Context, Result};
use camino::Utf8Path;
use std::{
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant},
};
use stream::{Pattern, Ring};
use tokio::process::Command;
use vestibule_api::session::Right;
use viewer::{Drain, Viewer};

/// Turns of each for each shape.
const TURNS: usize = 3;
/// Before a turn counts: the connection's windows grow.
const WARM_UP: Duration = Duration::from_millis(500);
/// What a turn counts.
const TURN: Duration = Duration::from_secs(3);
/// How long a relay or its session may take to come up.
const START: Duration = Duration::from_secs(30);
const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// How many watch: one, and a busy host.
const VIEWERS: [usize; 2] = [1, 20];
/// All of them watch one session.
const VIEWERS_LIMIT: &str = "viewers = 32";
/// Issue 2 requires it of both ratios.
const REQUIRED: Required = Required::AtLeast(5.0);
/// A smaller part of what the source costs cannot be told from noise: the ratio is not made larger by it.
const NOISE: f64 = 0.05;

/// A stream and how many viewers have one each.
#[derive(Clone, Copy, Debug)]
struct Shape {
    pattern: Pattern,
    viewers: usize,
}

/// One turn of one way.
#[derive(Clone, Copy, Debug)]
struct Turn {
    gib_per_s: f64,
    /// Processor time of the source and of the relay, s/GiB.
    source: f64,
    relay: f64,
    frame_kib: f64,
}

/// The turns of a shape.
#[derive(Debug, Default)]
struct Turns {
    vestibule: Vec<Turn>,
    websockify: Vec<Turn>,
    without: Vec<Turn>,
    source: Vec<Turn>,
}

/// Runs the bench.
///
/// # Errors
/// When websockify is not installed, a relay does not come up, or bytes arrive that were not sent.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("relay");
    for pattern in Pattern::ALL {
        for viewers in VIEWERS {
            let shape = Shape { pattern, viewers };
            let mut turns = Turns::default();
            for _ in 0..TURNS {
                let ours = vestibule(shape).await.context("vestibule's relay")?;
                turns.vestibule.push(ours);
                let theirs = websockify(shape).await.context("websockify")?;
                turns.websockify.push(theirs);
                let without = without(shape).await.context("without a relay")?;
                turns.without.push(without);
                turns
                    .source
                    .push(source(shape).await.context("the source")?);
            }
            tell(&mut report, shape, &turns);
        }
    }
    report.note("bulk: whole raw screens of 1280×800, written 64 KiB at a time");
    report.note("updates: 64 B to 64 KiB each, every size class equally often, one write each");
    report.note("paced: 30 updates a second of 2 to 40 KiB, one write each; every relay keeps up, so there is no ratio of throughput");
    report.note("processor time is user and kernel time of source and relay; viewers are not counted, but share the cores");
    report.note("the relay's part: source and relay together, less what the source costs by itself on a socket that is read");
    report.note("a part below 5 % of that counts as 5 %");
    report.note("no relay: a program that writes each update as a frame from its memory to the viewer; larger frames can be cheaper");
    report.note(format!(
        "{TURNS} turns of {} s for each, all alternating; medians",
        TURN.as_secs()
    ));
    Ok(report)
}

fn tell(report: &mut Report, shape: Shape, turns: &Turns) {
    let pick = |turns: &[Turn], of: fn(&Turn) -> f64| turns.iter().map(of).collect::<Vec<_>>();
    let way = |turn: &Turn| turn.source + turn.relay;
    let id = format!("{} ×{}", shape.pattern.id(), shape.viewers);
    let saturated = shape.pattern != Pattern::Paced;
    let named = [
        ("vestibule", &turns.vestibule),
        ("websockify", &turns.websockify),
        ("no relay", &turns.without),
        ("source", &turns.source),
    ];
    let alone = median(&pick(&turns.source, way));
    let part = |turns: &[Turn]| (median(&pick(turns, way)) - alone).max(NOISE * alone);
    for (name, turns) in named {
        let what = format!("{id}: {name}, source and relay");
        report.median(what, "s/GiB", &pick(turns, way));
    }
    for (name, turns) in &named[..2] {
        let what = format!("{id}: {name}, the relay's process");
        report.median(what, "s/GiB", &pick(turns, |turn| turn.relay));
        let what = format!("{id}: {name}, the relay's part");
        report.figure(what, "s/GiB", part(turns), &[]);
        let what = format!("{id}: {name}, mean frame");
        report.median(what, "KiB", &pick(turns, |turn| turn.frame_kib));
    }
    if saturated {
        for (name, turns) in named {
            let what = format!("{id}: {name}, throughput");
            report.median(what, "GiB/s", &pick(turns, |turn| turn.gib_per_s));
        }
    }
    let ratio = part(&turns.websockify) / part(&turns.vestibule);
    report.figure(format!("{id}: ratio of the relay's part"), "x", ratio, &[]);
    report.require(REQUIRED);
    let theirs = median(&pick(&turns.websockify, way));
    let ratio = theirs / median(&pick(&turns.vestibule, way));
    report.figure(format!("{id}: ratio of source and relay"), "x", ratio, &[]);
    let ratio = theirs / median(&pick(&turns.without, way));
    report.figure(format!("{id}: the same without a relay"), "x", ratio, &[]);
    if saturated {
        let speed = |turns: &[Turn]| median(&pick(turns, |turn| turn.gib_per_s));
        let theirs = speed(&turns.websockify);
        let ratio = speed(&turns.vestibule) / theirs;
        report.figure(format!("{id}: ratio of throughput"), "x", ratio, &[]);
        report.require(REQUIRED);
        let ratio = speed(&turns.without) / theirs;
        report.figure(format!("{id}: the same without a relay"), "x", ratio, &[]);
    }
}

/// One turn of the controller's relay, through a session's view as a dashboard opens it.
async fn vestibule(shape: Shape) -> Result<Turn> {
    let controller =
        Controller::start(&["pour", "--pattern", shape.pattern.id()], VIEWERS_LIMIT).await?;
    let api = controller.api();
    let session = api.start("gh", None).await?;
    api.wait_session(session, "a view", START, |view| view.viewable)
        .await?;
    let mut paths = Vec::new();
    for _ in 0..shape.viewers {
        let ticket = api.ticket(session, Right::Control).await?.ticket;
        paths.push(format!("/api/auth/session/{session}/view?ticket={ticket}"));
    }
    let relay = controller.pid()?;
    // Its one child is the runner.
    let source = move || usage::children(relay);
    let turn = turn(shape, api.address(), paths, source, vec![relay]).await?;
    api.cancel(session).await?;
    api.wait_session(session, "the end", START, |view| view.state.is_terminal())
        .await?;
    controller.end().await?;
    Ok(turn)
}

/// The source as a program; its file `name` in `dir` is there when it listens.
async fn pour(dir: &Utf8Path, pattern: Pattern, option: &str, name: &str) -> Result<Process> {
    let (path, log) = (dir.join(name), dir.join("log"));
    let mut source = Command::new(std::env::current_exe()?);
    source.args(["pour", "--pattern", pattern.id(), option, path.as_str()]);
    let source = Process::start("the source", source, &log)?;
    wait::until("the source", START, || {
        let there =
            path.exists() && (name == SOCKET || std::fs::read(&path).is_ok_and(|b| !b.is_empty()));
        std::future::ready(if there { Ok(()) } else { Err("none") })
    })
    .await?;
    Ok(source)
}

/// The plain source's socket.
const SOCKET: &str = "s";

/// One turn of websockify, as Debian packages it, with nothing logged.
async fn websockify(shape: Shape) -> Result<Turn> {
    let dir = camino_tempfile::tempdir().context("make a directory")?;
    let source = pour(dir.path(), shape.pattern, "--plain", SOCKET).await?;
    let address = free_address()?;
    let mut relay = Command::new("websockify");
    relay
        .arg(format!("--unix-target={}", dir.path().join(SOCKET)))
        .arg(address.to_string())
        .stdin(Stdio::null());
    let log = dir.path().join("log");
    let relay = Process::start("websockify (Debian package `websockify`)", relay, &log)?;
    let pid = relay.pid().context("websockify has ended")?;
    wait::until("websockify's port", START, || async {
        tokio::net::TcpStream::connect(address)
            .await
            .map(drop)
            .map_err(|err| err.to_string())
    })
    .await?;
    let pouring = source.pid().context("the source has ended")?;
    let paths = vec!["/".to_owned(); shape.viewers];
    let turn = turn(shape, address, paths, move || Ok(vec![pouring]), vec![pid]).await?;
    relay.crash().await?;
    source.crash().await?;
    Ok(turn)
}

/// One turn of a source that writes the frames itself.
async fn without(shape: Shape) -> Result<Turn> {
    let dir = camino_tempfile::tempdir().context("make a directory")?;
    let source = pour(dir.path(), shape.pattern, "--websocket", "address").await?;
    let address = std::fs::read_to_string(dir.path().join("address"))?.parse()?;
    let pouring = source.pid().context("the source has ended")?;
    let paths = vec!["/".to_owned(); shape.viewers];
    let turn = turn(shape, address, paths, move || Ok(vec![pouring]), vec![]).await?;
    source.crash().await?;
    Ok(turn)
}

/// One turn of a source whose socket is read and nothing else.
async fn source(shape: Shape) -> Result<Turn> {
    let dir = camino_tempfile::tempdir().context("make a directory")?;
    let source = pour(dir.path(), shape.pattern, "--plain", SOCKET).await?;
    let pid = source.pid().context("the source has ended")?;
    let path = dir.path().join(SOCKET);
    let turn = tokio::task::spawn_blocking(move || {
        let drains = (0..shape.viewers).map(|_| Drain::open(&path));
        let mut drains = drains.collect::<Result<Vec<_>>>()?;
        measure(
            &mut drains,
            |drain, time| Ok((drain.count(time)?, 0)),
            &[pid],
            &[],
        )
    })
    .await??;
    source.crash().await?;
    Ok(turn)
}

/// A port that was free a moment ago: websockify does not say which one it would choose itself.
fn free_address() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?)
}

/// Opens the views, compares, and measures. `relays` are the relay's processes; the children that they have for these
/// connections count too, unless they run another program.
async fn turn(
    shape: Shape,
    address: SocketAddr,
    paths: Vec<String>,
    sources: impl FnOnce() -> Result<Vec<u32>> + Send + 'static,
    relays: Vec<u32>,
) -> Result<Turn> {
    tokio::task::spawn_blocking(move || {
        let ring = Ring::new(shape.pattern);
        let mut viewers = Vec::new();
        for path in paths {
            let mut viewer = Viewer::open(address, &path)?;
            viewer.compare(&ring)?;
            viewers.push(viewer);
        }
        let (sources, relays) = (sources()?, with_forks(&relays)?);
        measure(&mut viewers, Viewer::count, &sources, &relays)
    })
    .await?
}

/// Warms up and counts: all viewers at once, a thread each.
fn measure<V: Send>(
    viewers: &mut [V],
    count: impl Fn(&mut V, Duration) -> Result<(u64, u64)> + Sync,
    sources: &[u32],
    relays: &[u32],
) -> Result<Turn> {
    let mut all = |time| -> Result<(u64, u64)> {
        std::thread::scope(|scope| {
            let count = &count;
            let threads: Vec<_> = viewers
                .iter_mut()
                .map(|viewer| scope.spawn(move || count(viewer, time)))
                .collect();
            let counts = threads.into_iter().map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a viewer panicked")))
            });
            counts
                .reduce(|a, b| {
                    let ((a, frames), (b, more)) = (a?, b?);
                    Ok((a + b, frames + more))
                })
                .context("no viewer")?
        })
    };
    all(WARM_UP)?;
    let cpu = |pids: &[u32]| {
        pids.iter().try_fold(0.0, |sum, pid| {
            Ok::<_, anyhow::Error>(sum + usage::thread_seconds(*pid)?)
        })
    };
    let (source, relay, begun) = (cpu(sources)?, cpu(relays)?, Instant::now());
    let (bytes, frames) = all(TURN)?;
    let seconds = begun.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a turn has less than 2⁵² bytes")]
    let (gib, frames) = (bytes as f64 / GIB, frames as f64);
    Ok(Turn {
        gib_per_s: gib / seconds,
        source: (cpu(sources)? - source) / gib,
        relay: (cpu(relays)? - relay) / gib,
        frame_kib: gib * 1024.0 * 1024.0 / frames,
    })
}

/// websockify forks for each connection, without another program: those children are the relay. A child that runs another
/// program (the fake runner) is not.
fn with_forks(relays: &[u32]) -> Result<Vec<u32>> {
    let mut all = relays.to_vec();
    for relay in relays {
        let program = std::fs::read_link(format!("/proc/{relay}/exe"))?;
        for child in usage::children(*relay)? {
            if std::fs::read_link(format!("/proc/{child}/exe")).is_ok_and(|exe| exe == program) {
                all.push(child);
            }
        }
    }
    Ok(all)
}
