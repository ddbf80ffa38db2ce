//! Follows one runner: `GET /events` from the first to the last line, each taken in once.
use super::{lost, report};
use crate::{
    core::{Shared, off_runtime},
    crash::point,
    store::{MachineRow, StoreError},
};
use http_body_util::BodyExt as _;
use hyper::{Method, Response, body::Incoming};
use std::{io::Read as _, time::Duration};
use vestibule_api::{
    client::{self, CallError},
    error::Chain,
    finding::Quote,
    ids::MachineId,
    machine::{RunnerEvent, RunnerEventKind},
};

/// A line of a runner's events is shorter than this.
const LINE_LIMIT: usize = 256 << 10;
/// The runner's events in the evidence, and more bytes than it keeps of them.
const EVENTS_FILE: &str = "events.ndjson";
const EVENTS_LIMIT: u64 = 16 << 20;
/// A runner that lives and does not listen yet, or broke the stream, is asked again after this.
const AGAIN: Duration = Duration::from_millis(50);
const AGAIN_MAX: Duration = Duration::from_secs(2);

/// Why following broke off. It begins again where it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FollowError {
    #[error("read the runner's events")]
    Call(#[from] CallError),
    #[error("read the runner's events")]
    Body(#[source] hyper::Error),
    #[error("understand a line of the runner's events")]
    Line(#[source] serde_json::Error),
    #[error("a line of the runner's events has more than {LINE_LIMIT} bytes")]
    TooLong,
    #[error("take in a runner's event")]
    Store(#[from] StoreError),
}

/// Follows `machine` until its runner has said its last word or is gone.
pub(crate) async fn follow(core: Shared, mut machine: MachineRow) {
    let id = machine.id;
    let mut pause = AGAIN;
    loop {
        match once(&core, &mut machine).await {
            Ok(true) => return finished(&core, &machine).await,
            Ok(false) => pause = AGAIN,
            Err(err) => {
                tracing::debug!(machine.id = %id, error = %Chain(&err), "following the runner broke off");
                pause = (pause * 2).min(AGAIN_MAX);
            }
        }
        if !core.runner_alive(id).await {
            return gone(&core, &mut machine).await;
        }
        tokio::time::sleep(pause).await;
    }
}

/// One stream of events. `true`: it ended with the runner's last word.
async fn once(core: &Shared, machine: &mut MachineRow) -> Result<bool, FollowError> {
    // Always from the first: what lives in memory only (a user code) comes back after a restart. Rows are not repeated.
    let request = client::json_request(Method::GET, "/events?after=0", None::<&()>)?;
    let mut reply = core.runner(machine.id).open(request).await?;
    if !reply.status().is_success() {
        client::body("GET /events", reply).await?;
        return Ok(false);
    }
    let mut buffer = Vec::new();
    let mut ended = false;
    while let Some(frame) = next_frame(&mut reply).await? {
        buffer.extend_from_slice(&frame);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            ended |= take_in(core, machine, &line).await?;
        }
        if buffer.len() > LINE_LIMIT {
            return Err(FollowError::TooLong);
        }
    }
    Ok(ended)
}

async fn next_frame(reply: &mut Response<Incoming>) -> Result<Option<bytes::Bytes>, FollowError> {
    while let Some(frame) = reply.body_mut().frame().await {
        if let Ok(data) = frame.map_err(FollowError::Body)?.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// Takes in one line; whether it was the last.
pub(crate) async fn take_in(
    core: &Shared,
    machine: &mut MachineRow,
    line: &[u8],
) -> Result<bool, FollowError> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(false);
    }
    let event: RunnerEvent = serde_json::from_slice(line).map_err(FollowError::Line)?;
    let (mut reported, code) = report::read(&event.event);
    if machine.session_id.is_none() && machine.pooled {
        // A session may have taken it meanwhile.
        let row = core.store.machine(machine.id).await?;
        machine.session_id = row.and_then(|row| row.session_id);
    }
    if machine
        .session_id
        .is_some_and(|id| !core.live.is_watched(id))
    {
        report::unwatched(&mut reported);
    }
    if let (Some(code), Some(session)) = (code, machine.session_id) {
        core.live.set_user_code(session, code);
    }
    let now = core.now();
    let told = core
        .store
        .ingest(machine.id, event.seq, &reported, now)
        .await?;
    point("follow:taken-in").await;
    core.metrics.ingested(told.as_ref(), &reported.events, now);
    if let (RunnerEventKind::FirstFrame, Some(session)) = (&event.event, machine.session_id) {
        core.live.shown(session);
    }
    Ok(matches!(event.event, RunnerEventKind::Ended { .. }))
}

/// The runner said its last word. A VM of a session is torn down by the session's effect, one of the pool by the pool;
/// another one is simply gone.
pub(crate) async fn finished(core: &Shared, machine: &MachineRow) {
    if machine.session_id.is_none() && !machine.pooled {
        log(
            core.store.machine_gone(machine.id, core.now()).await,
            machine.id,
        );
    }
}

/// The runner is gone, and its last word was not heard. One that ended its VM itself, faster than it could be followed,
/// left what it said in the evidence.
pub(crate) async fn gone(core: &Shared, machine: &mut MachineRow) {
    let id = machine.id;
    let written = match left_behind(core, machine).await {
        Ok(written) => written,
        Err(err) => {
            tracing::warn!(machine.id = %id, error = %Chain(&err), "what the runner left behind can't be read");
            false
        }
    };
    let now = core.now();
    let finding = lost(last_words(core, id));
    let told = if written {
        core.store.machine_failed(id, finding, now).await
    } else {
        core.store.machine_lost(id, finding, now).await
    };
    if let Ok(told) = &told {
        core.metrics.ingested(told.as_ref(), &[], now);
    }
    log(told, id);
    finished(core, machine).await;
    core.store.signals.wake();
}

/// Takes in the events that the runner wrote to the evidence; whether it wrote any.
async fn left_behind(core: &Shared, machine: &mut MachineRow) -> Result<bool, FollowError> {
    let path = core.evidence_dir(machine.id).join(EVENTS_FILE);
    let read = off_runtime(move || {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&path)?;
        file.take(EVENTS_LIMIT).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    });
    // Nothing to be read is nothing left behind.
    let Ok(Ok(bytes)) = read.await else {
        return Ok(false);
    };
    for line in bytes.split(|byte| *byte == b'\n') {
        take_in(core, machine, line).await?;
    }
    Ok(!bytes.is_empty())
}

fn log<T>(result: Result<T, StoreError>, id: MachineId) {
    if let Err(err) = result {
        // The machines' reconciler sees the same rows again and follows anew.
        tracing::error!(machine.id = %id, error = %Chain(&err), "can't write down a VM's end");
    }
}

/// The last line that the runner wrote to its standard error.
fn last_words(core: &Shared, id: MachineId) -> Quote {
    let file = ["vms", "evidence"]
        .map(|part| {
            core.config
                .home
                .join(part)
                .join(id.to_string())
                .join("runner.stderr")
        })
        .into_iter()
        .find_map(|path| std::fs::read(path).ok())
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&file);
    let lines: Vec<_> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    match lines.last() {
        Some(line) => Quote {
            source: "runner".to_owned(),
            line: u64::try_from(lines.len()).ok(),
            text: line.chars().take(400).collect(),
        },
        None => Quote {
            source: "runner".to_owned(),
            line: None,
            text: "runner.sock does not answer, runner.stderr is empty and nobody holds it open"
                .to_owned(),
        },
    }
}
