//! The view's relay against websockify: the same bytes from the same source, through one relay and then the other, to the
//! same viewer, in turns.
//!
//! ```text
//! pour (fake runner) ──unix──▶ vestibule serve ──WebSocket──▶ viewer
//! pour (plain)       ──unix──▶ websockify      ──WebSocket──▶ viewer
//! ```
//! Each relay runs as its own program, so that its processor time is what the kernel says of its process and of nothing
//! else. Source and viewer share the cores with it.
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
use std::{
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant},
};
use stream::{Pattern, Ring};
use tokio::process::Command;
use vestibule_api::session::Right;
use viewer::Viewer;

/// Each relay's turns for each pattern.
const TURNS: usize = 5;
/// Before a turn counts: the connection's windows grow.
const WARM_UP: Duration = Duration::from_millis(500);
/// What a turn counts: 300 ticks of the clock that counts processor time.
const TURN: Duration = Duration::from_secs(3);
/// How long a relay or its session may take to come up.
const START: Duration = Duration::from_secs(30);
const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
/// Issue 2 requires it of both ratios.
const REQUIRED: Required = Required::AtLeast(5.0);

/// One turn of one relay.
#[derive(Clone, Copy, Debug)]
struct Turn {
    gib_per_s: f64,
    cpu_s_per_gib: f64,
    frame_kib: f64,
}

/// Runs the bench.
///
/// # Errors
/// When websockify is not installed, a relay does not come up, or bytes arrive that were not sent.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("relay");
    for pattern in Pattern::ALL {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            ours.push(vestibule(pattern).await.context("vestibule's relay")?);
            theirs.push(websockify(pattern).await.context("websockify")?);
        }
        tell(&mut report, pattern, &ours, &theirs);
    }
    report.note("bulk: whole raw screens of 1280×800, written 64 KiB at a time");
    report.note("updates: 64 B to 64 KiB each, every size class equally often, one write each");
    report.note("processor time is user and kernel time of the relay's process alone; source and viewer share the cores");
    report.note(format!(
        "{TURNS} turns of {} s for each, relays alternating; medians",
        TURN.as_secs()
    ));
    Ok(report)
}

fn tell(report: &mut Report, pattern: Pattern, ours: &[Turn], theirs: &[Turn]) {
    let pick = |turns: &[Turn], of: fn(&Turn) -> f64| turns.iter().map(of).collect::<Vec<_>>();
    let id = pattern.id();
    for (name, turns) in [("vestibule", ours), ("websockify", theirs)] {
        report.median(
            format!("{id}: {name}, processor time"),
            "s/GiB",
            &pick(turns, |t| t.cpu_s_per_gib),
        );
        report.median(
            format!("{id}: {name}, throughput"),
            "GiB/s",
            &pick(turns, |t| t.gib_per_s),
        );
        report.median(
            format!("{id}: {name}, mean frame"),
            "KiB",
            &pick(turns, |t| t.frame_kib),
        );
    }
    let ratio = |of: fn(&Turn) -> f64| median(&pick(ours, of)) / median(&pick(theirs, of));
    report.figure(
        format!("{id}: ratio of processor time"),
        "x",
        ratio(|t| t.cpu_s_per_gib).recip(),
        &[],
    );
    report.require(REQUIRED);
    report.figure(
        format!("{id}: ratio of throughput"),
        "x",
        ratio(|t| t.gib_per_s),
        &[],
    );
    report.require(REQUIRED);
}

/// One turn of the controller's relay, through a session's view as a dashboard opens it.
async fn vestibule(pattern: Pattern) -> Result<Turn> {
    let controller = Controller::start(&["pour", "--pattern", pattern.id()]).await?;
    let api = controller.api();
    let session = api.start("gh", None).await?;
    api.wait_session(session, "a view", START, |view| view.viewable)
        .await?;
    let ticket = api.ticket(session, Right::Control).await?.ticket;
    let path = format!("/api/auth/session/{session}/view?ticket={ticket}");
    let turn = turn(pattern, api.address(), path, vec![controller.pid()?]).await?;
    api.cancel(session).await?;
    api.wait_session(session, "the end", START, |view| view.state.is_terminal())
        .await?;
    controller.end().await?;
    Ok(turn)
}

/// One turn of websockify, as Debian packages it, with nothing logged.
async fn websockify(pattern: Pattern) -> Result<Turn> {
    let dir = camino_tempfile::tempdir().context("make a directory")?;
    let (socket, log) = (dir.path().join("s"), dir.path().join("log"));
    let mut source = Command::new(std::env::current_exe()?);
    source.args([
        "pour",
        "--pattern",
        pattern.id(),
        "--plain",
        socket.as_str(),
    ]);
    let source = Process::start("the source", source, &log)?;
    wait::until("the source's socket", START, || {
        std::future::ready(if socket.exists() { Ok(()) } else { Err("none") })
    })
    .await?;
    let address = free_address()?;
    let mut relay = Command::new("websockify");
    relay
        .arg(format!("--unix-target={socket}"))
        .arg(address.to_string())
        .stdin(Stdio::null());
    let relay = Process::start("websockify (Debian package `websockify`)", relay, &log)?;
    let pid = relay.pid().context("websockify has ended")?;
    wait::until("websockify's port", START, || async {
        tokio::net::TcpStream::connect(address)
            .await
            .map(drop)
            .map_err(|err| err.to_string())
    })
    .await?;
    let turn = turn(pattern, address, "/".to_owned(), vec![pid]).await?;
    relay.crash().await?;
    source.crash().await?;
    Ok(turn)
}

/// A port that was free a moment ago: websockify does not say which one it would choose itself.
fn free_address() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr()?)
}

/// Opens the view, compares, warms up, and counts. `relays` are the relay's processes; the children that they have for
/// this connection count too, unless they are sources.
async fn turn(
    pattern: Pattern,
    address: SocketAddr,
    path: String,
    relays: Vec<u32>,
) -> Result<Turn> {
    let own = relays.clone();
    tokio::task::spawn_blocking(move || {
        let mut viewer = Viewer::open(address, &path)?;
        viewer.compare(&Ring::new(pattern))?;
        viewer.count(WARM_UP)?;
        let relays = with_forks(&own)?;
        let cpu = || {
            relays.iter().try_fold(0.0, |sum, pid| {
                Ok::<_, anyhow::Error>(sum + usage::cpu_seconds(*pid)?)
            })
        };
        let (before, begun) = (cpu()?, Instant::now());
        let (bytes, frames) = viewer.count(TURN)?;
        let (seconds, used) = (begun.elapsed().as_secs_f64(), cpu()? - before);
        #[expect(clippy::cast_precision_loss, reason = "a turn has less than 2⁵² bytes")]
        let (gib, frames) = (bytes as f64 / GIB, frames as f64);
        Ok(Turn {
            gib_per_s: gib / seconds,
            cpu_s_per_gib: used / gib,
            frame_kib: gib * 1024.0 * 1024.0 / frames,
        })
    })
    .await?
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
