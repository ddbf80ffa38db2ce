//! Warm starts with real VMs: sessions out of the pool and from the snapshot, a controller that is killed meanwhile, and a
//! snapshot that is damaged. The image `tiny` has no browser, so a sign-in ends soon after its VM is ready: what counts here
//! is the way there.
use super::{END, READY, alone, assert_nothing_left, ended, kept, took};
use anyhow::{Context, Result, ensure};
use std::{
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};
use vestibule_api::{
    cause::Cause,
    control::VmView,
    ids::{MachineId, SessionId},
    machine::{MachineState, PROCESSES_MARK, ProcessesMark},
    session::{SessionEvent, SessionEventKind, SessionState, StartKind},
    snapshot::MEMORY_FILE,
};
use vestibule_testkit::{
    stage::{Setting, Stage},
    wait,
};

/// Sessions that take a VM out of the pool.
const TURNS: usize = 5;
/// A VM is restored and paused, or one of an ended session is gone.
const STOCK: Duration = Duration::from_secs(120);

/// A provider whose client is the agent itself: every image has its tool.
const OIDC: &str = "[providers.oidc]\nallow_http = true\n\
                    parameters = { issuer = \"http://idp.test\", client_id = \"vestibule\" }\n";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the image tiny; script/test warm"]
async fn warm_starts_serve_and_fall_back() -> Result<()> {
    let _alone = alone().await;
    let setting = Setting::image("tiny")
        .without_snapshots()
        .pool(1)
        .with(OIDC);
    let stage = Stage::start(&setting).await?;
    let begin = Instant::now();
    stage.vestibule(&["image", "snapshot", "tiny"]).await?;
    took("a snapshot of tiny", begin);
    let (stage, result) = pool(stage).await;
    let result = match result {
        Ok(()) => damaged(&stage).await.context("a damaged snapshot"),
        Err(err) => Err(err.context("the pool")),
    };
    kept("warm", stage, result).await
}

/// Ends with a controller that keeps no pool.
async fn pool(mut stage: Stage) -> (Stage, Result<()>) {
    if let Err(err) = hits(&stage).await {
        return (stage, Err(err));
    }
    let before = match stocked(&stage).await {
        Ok(before) => before,
        Err(err) => return (stage, Err(err)),
    };
    let home = stage.home().to_owned();
    stage = match stage.crash_and_restart().await {
        Ok(stage) => stage,
        Err(err) => panic!("the controller did not come back: {err:#}"),
    };
    let adopted = async {
        ensure!(stocked(&stage).await? == before, "the pool was adopted");
        let path = home.join("vestibule.toml");
        let text = std::fs::read_to_string(&path)?;
        std::fs::write(&path, text.replace("tiny = 1", "tiny = 0"))?;
        Ok(())
    }
    .await;
    if adopted.is_err() {
        return (stage, adopted);
    }
    stage = match stage.crash_and_restart().await {
        Ok(stage) => stage,
        Err(err) => panic!("the controller did not come back: {err:#}"),
    };
    let drained = assert_nothing_left(&stage).await;
    (stage, drained.context("a pool that is kept no more"))
}

async fn hits(stage: &Stage) -> Result<()> {
    let (mut ready, mut by_standby) = (Vec::new(), 0);
    for _ in 0..TURNS {
        let machine = stocked(stage).await?;
        by_standby += u32::from(stood_by(stage, machine)?);
        let id = stage.api().start("oidc", None).await?;
        let events = until_ready(stage, id).await?;
        ensure!(starts(&events) == [StartKind::Pool], "{events:?}");
        ready.push(millis(&events));
        let view = ended(stage, id).await?;
        ensure!(view.machine_id == Some(machine), "the one that was ready");
    }
    ready.sort_unstable();
    tell(&format!(
        "{TURNS} out of the pool, start to ready: {ready:?} ms; {by_standby} of their runners had stood by"
    ));
    // From 2 s after a start on the next one's runner stands by.
    ensure!(by_standby > 0, "none of the runners had stood by");
    Ok(())
}

/// Whether this VM's runner was started before there was a VM for it.
fn stood_by(stage: &Stage, machine: MachineId) -> Result<bool> {
    let mark = stage.home().join("vms").join(machine.to_string());
    let mark = std::fs::read(mark.join(PROCESSES_MARK))?;
    let mark: ProcessesMark = serde_json::from_slice(&mark)?;
    let words = std::fs::read_to_string(format!("/proc/{}/cmdline", mark.runner.pid))?;
    Ok(words.split('\0').any(|word| word == "--standby"))
}

async fn damaged(stage: &Stage) -> Result<()> {
    let id = stage.api().start("oidc", None).await?;
    let events = until_ready(stage, id).await?;
    ensure!(starts(&events) == [StartKind::Restore], "{events:?}");
    tell(&format!("restored, start to ready: {} ms", millis(&events)));
    ended(stage, id).await?;
    assert_nothing_left(stage).await?;

    let snapshots = stage.home().join("snapshots");
    for entry in snapshots.read_dir_utf8()?.flatten() {
        let path = entry.path().join(MEMORY_FILE);
        if !path.exists() {
            continue;
        }
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)?;
        let middle = file.metadata()?.len() / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, middle)?;
        file.write_all_at(&[!byte[0]], middle)?;
    }
    let id = stage.api().start("oidc", None).await?;
    let events = until_ready(stage, id).await?;
    ensure!(
        starts(&events) == [StartKind::Restore, StartKind::Cold],
        "{events:?}"
    );
    let why = events.iter().find_map(|event| {
        if let SessionEventKind::FellBack { finding, .. } = &event.event {
            Some(finding)
        } else {
            None
        }
    });
    let why = why.context("the session says why")?;
    ensure!(
        matches!(why.cause, Cause::SnapshotFailed | Cause::SnapshotRefused),
        "{why:?}"
    );
    tell(&format!(
        "damaged, start to ready by a boot: {} ms; {}: {}",
        millis(&events),
        why.cause,
        why.evidence.first().map_or("", |quote| quote.text.as_str())
    ));
    let view = ended(stage, id).await?;
    let vms: Vec<VmView> = stage.api().get("/api/vms?all=1").await?;
    let of: Vec<_> = vms.iter().filter(|vm| vm.session_id == Some(id)).collect();
    ensure!(of.len() == 2, "{of:?}");
    assert_nothing_left(stage).await?;
    for vm in of {
        let evidence = stage
            .home()
            .join("evidence")
            .join(vm.machine_id.to_string());
        for file in [
            "machine.json",
            "events.ndjson",
            "disposal.json",
            "verdict.json",
        ] {
            ensure!(evidence.join(file).exists(), "{evidence} lacks {file}");
        }
    }
    // The next one boots at once.
    let id = stage.api().start("oidc", None).await?;
    let events = until_ready(stage, id).await?;
    ensure!(starts(&events) == [StartKind::Cold], "{events:?}");
    ended(stage, id).await?;
    ensure!(view.machine_id.is_some(), "it had a VM");
    assert_nothing_left(stage).await
}

/// The one VM of the pool, once it is ready and no other is there.
async fn stocked(stage: &Stage) -> Result<MachineId> {
    wait::until("one VM in the pool", STOCK, || async {
        let vms: Vec<VmView> = stage
            .api()
            .get("/api/vms")
            .await
            .map_err(|err| format!("{err:#}"))?;
        match &vms[..] {
            [vm] if vm.pooled && vm.state == MachineState::Paused => Ok(vm.machine_id),
            _ => Err(format!(
                "{:?}",
                vms.iter().map(|vm| vm.state).collect::<Vec<_>>()
            )),
        }
    })
    .await
}

async fn until_ready(stage: &Stage, id: SessionId) -> Result<Vec<SessionEvent>> {
    let ready = |event: &SessionEvent| {
        matches!(event.event, SessionEventKind::State { state }
            if state == SessionState::Ready || state.is_terminal())
    };
    let events = stage.api().events(id, 0, READY.max(END), ready).await?;
    let last = events.last().map(|event| &event.event);
    let state = SessionState::Ready;
    ensure!(
        last == Some(&SessionEventKind::State { state }),
        "{events:?}"
    );
    Ok(events)
}

fn starts(events: &[SessionEvent]) -> Vec<StartKind> {
    let starts = events.iter().filter_map(|event| {
        if let SessionEventKind::Claimed { start, .. } = event.event {
            Some(start)
        } else {
            None
        }
    });
    starts.collect()
}

/// From the request to the last event.
fn millis(events: &[SessionEvent]) -> u64 {
    match events {
        [first, .., last] => last.at.micros_since(first.at) / 1000,
        [_] | [] => 0,
    }
}

#[expect(
    clippy::print_stdout,
    reason = "timings are what the test's reader asked for"
)]
fn tell(what: &str) {
    println!("  {what}");
}
