//! What a snapshot saves a person from waiting for, and what a copy costs. In each turn, one after the other: the restore
//! that can be written by hand (`restore-by-hand`, an example of vestibule-vm), a session with an empty pool, one with a
//! VM in stock, and one that boots.
use super::{Report, report::Required, stats::median, usage, vm::vestibule};
use crate::{
    idp::Idp,
    stage::{self, Setting, Stage},
    wait,
};
use anyhow::{Context, Result, ensure};
use camino::Utf8PathBuf;
use serde::Deserialize;
use std::time::{Duration, Instant};
use tokio::process::Command;
use vestibule_api::{
    control::VmView,
    ids::{MachineId, SessionId},
    machine::{MachineState, Phase},
    session::{Right, SessionEvent, SessionEventKind, SessionState, StartKind},
    time::Timestamp,
};

const IMAGE: &str = "browser";
const TURNS: usize = 10;
/// Copies that are kept in stock at once.
const AT_ONCE: u32 = 8;
const LIMIT: Duration = Duration::from_secs(600);

/// One entry of `vestibule image snapshots`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Snapshot {
    id: String,
    directory: String,
    image_digest: String,
    aliases: Vec<String>,
    taken_at: Timestamp,
    memory_bytes: f64,
    allocated_bytes: f64,
}

/// From the request to each point, in seconds.
#[derive(Debug, Default)]
struct Series {
    answer: Vec<f64>,
    usable: Vec<f64>,
}

/// Runs the bench with the image `browser` and its newest snapshot.
///
/// # Errors
/// When there is none, or a session does not come so far.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("warm");
    let snapshot = newest().await?;
    let idp = Idp::start().await?;
    let setting = || Setting::image(IMAGE).idp(&idp);
    let empty = Stage::start(&setting()).await?;
    let mut by_hand = Vec::new();
    let (mut restored, mut booted, mut pooled) =
        (Series::default(), Series::default(), Series::default());
    for _ in 0..TURNS {
        by_hand.push(restore_by_hand(&snapshot).await?);
        session(&empty, StartKind::Restore, &mut restored).await?;
        session(&empty, StartKind::Cold, &mut booted).await?;
    }
    empty.end().await?;
    // What fills the pool would be in the way of the others.
    let one = setting().pool(1);
    let stocked = Stage::start(&one).await?;
    let (mut private, mut written) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        let vms = stock(&stocked, 1).await?;
        for (all, guests) in shares(&vms, &snapshot)? {
            private.push(all);
            written.push(guests);
        }
        session(&stocked, StartKind::Pool, &mut pooled).await?;
    }
    stocked.end_with_stock(&one).await?;
    let eight = setting()
        .pool(AT_ONCE)
        .with(&format!("[limits]\nvms = {}\n", AT_ONCE + 1));
    let many = Stage::start(&eight).await?;
    let of_many = shares(&stock(&many, AT_ONCE as usize).await?, &snapshot)?;
    many.end_with_stock(&eight).await?;

    report.median(
        "by hand: VMM's start to the agent's first answer",
        "s",
        &by_hand,
    );
    for (name, series, answer) in [
        (
            "restored, empty pool",
            &restored,
            "the agent's first answer",
        ),
        (
            "out of the pool",
            &pooled,
            "the agent's first answer (*ready*)",
        ),
        ("booted", &booted, "the agent's first answer"),
    ] {
        report.median(format!("{name}: request to {answer}"), "s", &series.answer);
        report.median(
            format!("{name}: request to the first frame at the viewer"),
            "s",
            &series.usable,
        );
    }
    for (what, over, under, required) in [
        (
            "booted ÷ out of the pool, to a usable view",
            &booted.usable,
            &pooled.usable,
            Required::AtLeast(40.0),
        ),
        (
            "restored ÷ by hand, to the agent's answer",
            &restored.answer,
            &by_hand,
            Required::AtMost(1.2),
        ),
        (
            "out of the pool ÷ by hand, to the agent's answer",
            &pooled.answer,
            &by_hand,
            Required::AtMost(0.1),
        ),
    ] {
        report.figure(what, "x", median(over) / median(under), &[]);
        report.require(required);
    }
    report.median(
        "private memory of an idle copy ÷ the guest's",
        "x",
        &private,
    );
    report.require(Required::AtMost(0.15));
    report.median("of that, what the guest has written to", "x", &written);
    let (private, written): (Vec<f64>, Vec<f64>) = of_many.into_iter().unzip();
    report.median(format!("private memory, {AT_ONCE} at once"), "x", &private);
    report.median(
        format!("of that, what the guest has written to, {AT_ONCE} at once"),
        "x",
        &written,
    );
    report.figure(
        "snapshot on disk ÷ the guest's memory",
        "x",
        snapshot.allocated_bytes / snapshot.memory_bytes,
        &[],
    );
    report.note(format!("image `{IMAGE}`, provider `oidc`, {TURNS} turns"));
    report.note(
        "private memory is the VMM's that is no file's (`Anonymous`), the code that TCG has translated with it",
    );
    Ok(report)
}

async fn newest() -> Result<Snapshot> {
    let said = vestibule(&stage::image_home(), &["--json", "image", "snapshots"]).await?;
    let all: Vec<Snapshot> = serde_json::from_slice(&said).context("understand the snapshots")?;
    all.into_iter()
        .filter(|snapshot| snapshot.aliases.iter().any(|alias| alias == IMAGE))
        .max_by_key(|snapshot| snapshot.taken_at)
        .with_context(|| {
            format!("`{IMAGE}` has no snapshot: `script/test images browser` takes it")
        })
}

/// The example that cargo builds beside this program.
async fn restore_by_hand(snapshot: &Snapshot) -> Result<f64> {
    let here = Utf8PathBuf::try_from(std::env::current_exe()?)?;
    let program = here.with_file_name("examples").join("restore-by-hand");
    ensure!(
        program.exists(),
        "`{program}` is not built: `script/bench` builds it"
    );
    let image = stage::image_home()
        .join("images")
        .join(&snapshot.image_digest);
    let output = Command::new(program)
        .args([image.as_str(), &snapshot.directory, &snapshot.id])
        .kill_on_drop(true)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stdout);
    said.trim()
        .parse()
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

/// One session, from the request to its end.
async fn session(stage: &Stage, start: StartKind, series: &mut Series) -> Result<()> {
    let api = stage.api();
    let begun = Instant::now();
    let id = api.start_warm("oidc", start != StartKind::Cold).await?;
    // In stock it has answered before; *ready* comes when it has answered again.
    let answer = if start == StartKind::Pool {
        SessionEventKind::State {
            state: SessionState::Ready,
        }
    } else {
        SessionEventKind::Phase {
            phase: Phase::AgentUp,
        }
    };
    let answered = |event: &SessionEvent| {
        let over = matches!(event.event, SessionEventKind::State { state } if state.is_terminal());
        over || event.event == answer
    };
    let events = api.events(id, 0, LIMIT, answered).await?;
    series.answer.push(begun.elapsed().as_secs_f64());
    let kind = events.iter().find_map(|event| {
        if let SessionEventKind::Claimed { start, .. } = event.event {
            Some(start)
        } else {
            None
        }
    });
    ensure!(kind == Some(start), "a session that began by {kind:?}");
    usable(stage, id).await?;
    series.usable.push(begun.elapsed().as_secs_f64());
    api.cancel(id).await?;
    api.wait_session(id, "the end", LIMIT, |view| view.state.is_terminal())
        .await?;
    wait::until("the end of the session's VM", LIMIT, || async {
        let vms: Vec<VmView> = api
            .get("/api/vms")
            .await
            .map_err(|err| format!("{err:#}"))?;
        if vms.iter().any(|vm| vm.session_id == Some(id)) {
            Err("it is still there".to_owned())
        } else {
            Ok(())
        }
    })
    .await
}

/// A viewer who sees a page.
async fn usable(stage: &Stage, id: SessionId) -> Result<()> {
    let api = stage.api();
    api.wait_session(id, "a VM that is ready", LIMIT, |view| {
        !matches!(
            view.state,
            SessionState::Requested | SessionState::Placing | SessionState::Starting
        )
    })
    .await?;
    let (rfb, _closed) = api.view(id, Right::Control).await?;
    rfb.wait_for("a frame with something on it", LIMIT, |frame| {
        (frame.commonest().1 < 99).then_some(())
    })
    .await
}

/// The VMs in stock, once there are so many and nothing else.
async fn stock(stage: &Stage, wanted: usize) -> Result<Vec<MachineId>> {
    wait::until("the pool", LIMIT, || async {
        let vms: Vec<VmView> = stage
            .api()
            .get("/api/vms")
            .await
            .map_err(|err| format!("{err:#}"))?;
        let ready = |vm: &&VmView| vm.pooled && vm.state == MachineState::Paused;
        let ready: Vec<_> = vms.iter().filter(ready).map(|vm| vm.machine_id).collect();
        if ready.len() == wanted && vms.len() == wanted {
            Ok(ready)
        } else {
            Err(format!("{} of {} VMs are ready", ready.len(), vms.len()))
        }
    })
    .await
}

/// Of each VM, as a share of the guest's memory, what its VMM holds beside files, and what of that is the guest's.
fn shares(vms: &[MachineId], snapshot: &Snapshot) -> Result<Vec<(f64, f64)>> {
    let memory = format!("{}/memory", snapshot.directory);
    let share = |vm: &MachineId| {
        let pid = usage::process_with(&format!("vestibule-{vm}"))?;
        let (all, guests) = (
            usage::anonymous_bytes(pid)?,
            usage::anonymous_bytes_of(pid, &memory)?,
        );
        Ok((all / snapshot.memory_bytes, guests / snapshot.memory_bytes))
    };
    vms.iter().map(share).collect()
}
