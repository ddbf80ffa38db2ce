//! `vestibule session bench`: starts and ends sign-ins against a running controller, and says how long each phase took.
use crate::{
    api::Controller,
    output::{self, Output},
};
use anyhow::{Context as _, anyhow, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _, future::join_all};
use hyper::Method;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    pin::pin,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::{
    cause::Cause,
    control::VmView,
    ids::{MachineId, ProviderId, SessionId},
    session::{
        Milestone, Right, SessionEvent, SessionEventKind, SessionState, SessionView, StartKind,
        StartReply, StartRequest, TicketReply, TicketRequest,
    },
    time::Timestamp,
};

/// A VM that ends has ended within this time.
const VM_END: Duration = Duration::from_secs(120);
/// After a sign-in that failed, and after a cancellation that did, the next one is tried.
const AGAIN: Duration = Duration::from_secs(1);
/// Times that a cancellation is tried.
const TRIES: u32 = 5;
/// A guest whose view is open has shown its screen within this time.
const VIEW: Duration = Duration::from_secs(60);

/// The runner's word of the first frame, and the page that the tool opens, come within this after the tool runs; where a flow
/// opens none, nothing does.
const PAGE: Duration = Duration::from_secs(30);

/// What is timed here besides a session's milestones: the reply to the request, and what the viewer itself sees.
const ACCEPTED: &str = "accepted";
const GREETS: &str = "view-greets";
const SHOWS: &str = "view-shows";

/// In the order in which a session passes them; those that no session passed are not printed.
fn phases() -> impl Iterator<Item = &'static str> {
    let milestones = Milestone::ALL.into_iter().map(Milestone::id);
    std::iter::once(ACCEPTED)
        .chain(milestones)
        .chain([GREETS, SHOWS])
}

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    /// Whose sign-in is started; nobody finishes it.
    #[arg(long, default_value = "codex")]
    provider: ProviderId,
    /// Image alias [default: the configured one].
    #[arg(long)]
    image: Option<String>,
    /// Sign-ins in all.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,
    /// Sign-ins at a time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    parallel: u32,
    /// Seconds after a sign-in before the next one: time for the pool to be filled.
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// Boot every VM.
    #[arg(long)]
    cold: bool,
}

/// One sign-in that was measured.
#[derive(Debug, Default)]
struct Turn {
    /// How the VM that it ended with began.
    start: Option<StartKind>,
    fallbacks: Vec<Cause>,
    /// Milliseconds from the request.
    phases: BTreeMap<&'static str, f64>,
    /// Why it did not come to its end.
    failed: Option<String>,
}

/// The distribution of one phase.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    phase: &'static str,
    start: StartKind,
    /// Sign-ins that passed it.
    n: usize,
    min_ms: f64,
    p50_ms: f64,
    p90_ms: f64,
    p95_ms: f64,
    max_ms: f64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    sessions: usize,
    /// Sign-ins by how their VM began.
    starts: BTreeMap<&'static str, usize>,
    /// Starts that failed and were made good, by cause.
    fallbacks: BTreeMap<&'static str, usize>,
    failures: Vec<String>,
    /// From the request to each phase.
    phases: Vec<Row>,
}

pub(super) async fn run(
    controller: &Controller,
    args: BenchArgs,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let left = AtomicU32::new(args.count);
    let (stop, stopping) = watch::channel(false);
    let worker = |_| worker(controller, &args, &left, stopping.clone());
    let mut workers = pin!(join_all((0..args.parallel.min(args.count)).map(worker)));
    let turns = tokio::select! {
        turns = &mut workers => turns,
        () = interrupted() => {
            output::note("ending the sign-ins that are under way; once more, and they are left");
            stop.send_replace(true);
            tokio::select! {
                turns = workers => turns,
                () = interrupted() => bail!("sign-ins are left; `vestibule session list` shows them"),
            }
        }
    };
    let report = report(&turns.into_iter().flatten().collect::<Vec<_>>());
    out.print(&report, show)?;
    Ok(if report.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Resolves at SIGINT.
async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        // Then it ends this process, as ever.
        std::future::pending::<()>().await;
    }
}

async fn stopped(mut stopping: watch::Receiver<bool>) {
    // An error means that nobody will say so any more: nobody waits for this then.
    drop(stopping.wait_for(|stop| *stop).await);
}

async fn worker(
    controller: &Controller,
    args: &BenchArgs,
    left: &AtomicU32,
    stopping: watch::Receiver<bool>,
) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    let take = |left: u32| left.checked_sub(1);
    while left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
        .is_ok()
    {
        let pause = turns.last().map(|last| {
            let pause = Duration::from_secs(args.pause);
            // A controller that refuses is not asked as fast as it can say so.
            pause.max(last.failed.as_ref().map_or(Duration::ZERO, |_| AGAIN))
        });
        tokio::select! {
            () = tokio::time::sleep(pause.unwrap_or_default()) => {}
            () = stopped(stopping.clone()) => break,
        }
        turns.push(turn(controller, args, stopping.clone()).await);
    }
    turns
}

/// One sign-in from its request to the end of its VMs.
async fn turn(controller: &Controller, args: &BenchArgs, stopping: watch::Receiver<bool>) -> Turn {
    let request = StartRequest {
        provider: args.provider.clone(),
        user_id: Some("bench".to_owned()),
        owner: None,
        flow: None,
        image: args.image.clone(),
        warm: args.cold.then_some(false),
    };
    let begun = Instant::now();
    let mut turn = Turn::default();
    let started = controller.call(Method::POST, "/api/auth/start", Some(&request));
    let session = match started.await {
        Ok(StartReply { session_id, .. }) => session_id,
        Err(err) => {
            turn.failed = Some(format!("{err:#}"));
            return turn;
        }
    };
    turn.phases.insert(ACCEPTED, ms(begun.elapsed()));
    let watched = tokio::select! {
        watched = watch(controller, session, begun, &mut turn) => watched,
        () = stopped(stopping) => Err(anyhow!("interrupted")),
    };
    // However it went, nothing of it stays.
    let ended = end(controller, session).await;
    let failures: Vec<_> = [watched, ended]
        .into_iter()
        .filter_map(Result::err)
        .map(|err| format!("{err:#}"))
        .collect();
    turn.failed = (!failures.is_empty()).then(|| failures.join("; "));
    turn
}

/// Follows a session until a person could begin: the tool runs, the screen is seen, and the tool's page was handed to the
/// browser, if it comes.
async fn watch(
    controller: &Controller,
    session: SessionId,
    begun: Instant,
    turn: &mut Turn,
) -> anyhow::Result<()> {
    let mut events = controller.events(session).await?;
    let mut asked_at = None;
    let mut views = tokio::task::JoinSet::<anyhow::Result<(f64, f64, View)>>::new();
    // Aborted when this returns. Until then the frame has to be taken: it counts as shown when all of it has gone.
    let mut watching = tokio::task::JoinSet::new();
    let (mut seen, mut started) = (None, None);
    let whole = |turn: &Turn| {
        [Milestone::FirstFrame, Milestone::BrowserNavigated]
            .iter()
            .all(|milestone| turn.phases.contains_key(milestone.id()))
    };
    loop {
        let could_begin = started.zip(seen);
        let patience = could_begin
            .map(|(since, limit): (Instant, Duration)| limit.saturating_sub(since.elapsed()));
        if patience.is_some_and(|left| left.is_zero() || whole(turn)) {
            return Ok(());
        }
        let event = tokio::select! {
            event = events.next() => event?.context("the controller ended the event stream")?,
            () = tokio::time::sleep(patience.unwrap_or_default()), if patience.is_some() => continue,
            Some(shown) = views.join_next() => {
                // An image without a screen has no view; the sign-in goes on.
                match shown? {
                    Ok((greets, shows, mut view)) => {
                        watching.spawn(async move { while let Some(Ok(_)) = view.socket.next().await {} });
                        turn.phases.insert(GREETS, greets);
                        turn.phases.insert(SHOWS, shows);
                        seen = Some(PAGE);
                    }
                    Err(err) => {
                        output::note(&format!("session {session}: no view: {err:#}"));
                        seen = Some(Duration::ZERO);
                    }
                }
                continue;
            }
        };
        let asked_at = *asked_at.get_or_insert(event.at);
        take(turn, &event, asked_at);
        let SessionEventKind::State { state } = event.event else {
            continue;
        };
        if state == SessionState::Ready {
            let controller = controller.clone();
            views.spawn(async move {
                let shown = tokio::time::timeout(VIEW, view_of(&controller, session, begun));
                shown.await.context("nothing was shown in a minute")?
            });
        }
        if state == SessionState::AwaitingUser {
            started.get_or_insert_with(Instant::now);
        }
        if state.is_terminal() && could_begin.is_some() {
            return Ok(());
        }
        if state.is_terminal() {
            let view = view(controller, session).await?;
            let cause = view.failure.and_then(|v| v.finding).map(|f| f.cause.id());
            bail!("it ended: {} ({})", state.id(), cause.unwrap_or("no cause"));
        }
    }
}

async fn view(controller: &Controller, session: SessionId) -> anyhow::Result<SessionView> {
    controller
        .get(&format!("/api/auth/session/{session}"))
        .await
}

/// What an event tells of a sign-in.
fn take(turn: &mut Turn, event: &SessionEvent, asked_at: Timestamp) {
    if let SessionEventKind::Claimed { start, .. } = &event.event {
        turn.start = Some(*start);
    }
    if let SessionEventKind::FellBack { finding, .. } = &event.event {
        turn.fallbacks.push(finding.cause);
    }
    if let Some(milestone) = Milestone::of(&event.event) {
        let elapsed = Duration::from_micros(event.at.micros_since(asked_at));
        // After a fallback, the last time counts.
        turn.phases.insert(milestone.id(), ms(elapsed));
    }
}

/// Opens the view as a person's browser does: a ticket, a WebSocket, and RFB (RFC 6143 section 7) up to the first frame.
/// Milliseconds to the server's greeting and to the frame, and the view, whose frame is still coming.
async fn view_of(
    controller: &Controller,
    session: SessionId,
    begun: Instant,
) -> anyhow::Result<(f64, f64, View)> {
    let request = TicketRequest {
        right: Right::View,
        who: None,
    };
    let path = format!("/api/auth/session/{session}/tickets");
    let ticket: TicketReply = controller.call(Method::POST, &path, Some(&request)).await?;
    let path = format!("/api/auth/session/{session}/view?ticket={}", ticket.ticket);
    let mut view = View {
        socket: controller.websocket(&path).await?,
        buffer: Vec::new(),
    };
    ensure!(view.read(12).await? == b"RFB 003.008\n", "not RFB 3.8");
    let greets = ms(begun.elapsed());
    view.say(b"RFB 003.008\n").await?;
    let types = view.read(1).await?;
    let types = view
        .read(types.first().copied().unwrap_or(0).into())
        .await?;
    ensure!(types.contains(&1), "the server asks for a password");
    view.say(&[1]).await?;
    ensure!(view.read(4).await? == [0; 4], "the server refused");
    view.say(&[1]).await?;
    let init = view.read(24).await?;
    let (size, name) = (init.get(..4), init.get(20..24));
    let (Some(size), Some(Ok(name))) = (size.map(<[u8]>::to_vec), name.map(<[u8; 4]>::try_from))
    else {
        bail!("the server's first message is too short");
    };
    view.read(
        usize::try_from(u32::from_be_bytes(name))
            .unwrap_or(usize::MAX)
            .min(1 << 16),
    )
    .await?;
    // Raw pixels; all of the screen, also what has not changed.
    view.say(&[2, 0, 0, 1, 0, 0, 0, 0]).await?;
    view.say(&[&[3, 0, 0, 0, 0, 0][..], &size].concat()).await?;
    ensure!(
        view.read(1).await? == [0],
        "the first message is not a frame"
    );
    Ok((greets, ms(begun.elapsed()), view))
}

/// A view's bytes, whatever frames they came in.
struct View {
    socket: crate::api::WebSocket,
    buffer: Vec<u8>,
}

impl View {
    async fn read(&mut self, count: usize) -> anyhow::Result<Vec<u8>> {
        while self.buffer.len() < count {
            match self.socket.next().await {
                Some(Ok(Message::Binary(bytes))) => self.buffer.extend_from_slice(&bytes),
                Some(Ok(Message::Close(Some(frame)))) => bail!("closed: {}", frame.reason),
                Some(Ok(Message::Close(None))) | None => bail!("closed"),
                Some(Ok(_)) => {}
                Some(Err(err)) => return Err(err).context("read the view"),
            }
        }
        Ok(self.buffer.drain(..count).collect())
    }

    async fn say(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let message = Message::Binary(bytes.to_vec().into());
        self.socket.send(message).await.context("write to the view")
    }
}

/// Cancels a sign-in and waits until nothing is left of its VMs, those that it fell back from included: the next one is measured
/// without them.
async fn end(controller: &Controller, session: SessionId) -> anyhow::Result<()> {
    let path = format!("/api/auth/session/{session}/cancel");
    let mut tries = 1;
    while let Err(err) = controller
        .call::<_, SessionView>(Method::POST, &path, None::<&()>)
        .await
    {
        if tries == TRIES {
            return Err(err.context(format!("cancel session {session}")));
        }
        tries += 1;
        tokio::time::sleep(AGAIN).await;
    }
    let mut vms: Vec<VmView> = controller.get("/api/vms").await?;
    vms.retain(|vm| vm.session_id == Some(session));
    for vm in vms {
        ended(controller, vm.machine_id).await?;
    }
    Ok(())
}

async fn ended(controller: &Controller, machine: MachineId) -> anyhow::Result<()> {
    let gone = async {
        loop {
            let vm: VmView = controller.get(&format!("/api/vms/{machine}")).await?;
            if vm.gone_at.is_some() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(VM_END, gone)
        .await
        .with_context(|| format!("VM {machine} did not end"))?
}

fn ms(elapsed: Duration) -> f64 {
    elapsed.as_secs_f64() * 1e3
}

fn report(turns: &[Turn]) -> Report {
    let mut report = Report {
        sessions: turns.len(),
        starts: BTreeMap::new(),
        fallbacks: BTreeMap::new(),
        failures: turns
            .iter()
            .filter_map(|turn| turn.failed.clone())
            .collect(),
        phases: Vec::new(),
    };
    for turn in turns {
        let start = turn.start.map_or("none", StartKind::id);
        *report.starts.entry(start).or_default() += 1;
        for cause in &turn.fallbacks {
            *report.fallbacks.entry(cause.id()).or_default() += 1;
        }
    }
    for start in StartKind::ALL.into_iter().rev() {
        for phase in phases() {
            let of = turns.iter().filter(|turn| turn.start == Some(start));
            let samples = of.filter_map(|turn| turn.phases.get(phase).copied());
            report.phases.extend(row(phase, start, samples.collect()));
        }
    }
    report
}

fn row(phase: &'static str, start: StartKind, mut samples: Vec<f64>) -> Option<Row> {
    samples.sort_by(f64::total_cmp);
    // Nearest rank: the smallest sample that at least so many of a hundred do not exceed.
    let rank = |percent: usize| {
        let rank = (samples.len() * percent).div_ceil(100).max(1);
        samples.get(rank - 1).copied()
    };
    Some(Row {
        phase,
        start,
        n: samples.len(),
        min_ms: rank(0)?,
        p50_ms: rank(50)?,
        p90_ms: rank(90)?,
        p95_ms: rank(95)?,
        max_ms: rank(100)?,
    })
}

fn show(report: &Report) -> String {
    let counts = |counts: &BTreeMap<&'static str, usize>| {
        let words: Vec<_> = counts
            .iter()
            .map(|(what, n)| format!("{n} {what}"))
            .collect();
        words.join(", ")
    };
    let mut text = format!("{} sign-ins: {}", report.sessions, counts(&report.starts));
    if !report.fallbacks.is_empty() {
        text.push_str(&format!("\nfell back: {}", counts(&report.fallbacks)));
    }
    for failure in &report.failures {
        text.push_str(&format!("\nfailed: {failure}"));
    }
    let number = |ms: f64| format!("{ms:>8.1}");
    let rows: Vec<_> = report
        .phases
        .iter()
        .map(|row| {
            vec![
                row.start.id().to_owned(),
                row.phase.to_owned(),
                row.n.to_string(),
                number(row.min_ms),
                number(row.p50_ms),
                number(row.p90_ms),
                number(row.p95_ms),
                number(row.max_ms),
            ]
        })
        .collect();
    let head = [
        "START", "PHASE", "N", "     MIN", "     P50", "     P90", "     P95", "  MAX MS",
    ];
    format!("{text}\n{}", output::table(&head, &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_measured_from_the_request_and_ranked() {
        let mut turn = Turn::default();
        let asked_at = Timestamp::from_micros(1_000_000);
        let kinds = [
            SessionEventKind::Claimed {
                start: StartKind::Pool,
                snapshot_id: None,
                why: None,
            },
            SessionEventKind::Phase {
                phase: vestibule_api::machine::Phase::Resumed,
            },
            SessionEventKind::State {
                state: SessionState::Ready,
            },
        ];
        for (seq, event) in (1..).zip(kinds) {
            let at = asked_at.plus(Duration::from_millis(10 * seq));
            take(&mut turn, &SessionEvent { seq, at, event }, asked_at);
        }
        let expected = [("claimed", 10.0), ("ready", 30.0), ("resumed", 20.0)];
        assert_eq!(turn.phases, expected.into());
        let report = report(&[turn]);
        assert_eq!(report.starts, [("pool", 1)].into());
        assert_eq!(report.phases.len(), 3);
        assert!(show(&report).contains("pool   ready"), "{}", show(&report));

        let twenty = (1..=20).rev().map(f64::from).collect();
        let row = row("ready", StartKind::Cold, twenty).unwrap();
        let ranks = [row.min_ms, row.p50_ms, row.p90_ms, row.p95_ms, row.max_ms];
        assert_eq!(ranks, [1.0, 10.0, 18.0, 19.0, 20.0]);
        assert!(super::row("ready", StartKind::Cold, Vec::new()).is_none());
    }
}
