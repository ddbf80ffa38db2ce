//! What driver and runner cost over Firecracker alone: a start and a load of a snapshot, each to the agent's first answer, by turns
//! by hand (`firecracker-by-hand`, an example of vestibule-vm) and as people get them (`vestibule run-vm`: one that stands by, as the
//! controller has it, and one that is started for the VM). It needs a KVM that runs Linux, so all of it is done in the nested machine,
//! whose processor is an emulated one.
use super::{
    Report,
    report::Required,
    stats::{mean, median, ratio_range},
};
use crate::{
    conformance::{
        Setup,
        copies::Saving,
        vm::{Standing, Vm, failed},
    },
    nested::{Nested, OnImage},
    stage::{binary, image_home},
};
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use tokio::process::Command;
use vestibule_api::{
    machine::{DriverChoice, Phase, RestoreSpec, RunnerEventKind},
    time::Timestamp,
};

const TURNS: usize = 6;
/// In each turn, for one start: a load is short, and chance makes as much of it.
const LOADS: usize = 4;
const LIMIT: Duration = Duration::from_secs(3600);
const PHASE: Duration = Duration::from_secs(400);
/// Before each start: what the kernel still clears up of one VM (namespaces, mounts, after grace periods of RCU) holds the next one
/// up by as much as a second, whoever starts it.
const SETTLE: Duration = Duration::from_secs(2);
/// Before the line with the samples, on L1's console.
const SAYS: &str = "overhead: ";

/// Seconds from a start to the VMM's last answer, to the stream's handshake, and to the agent's first answer; one entry for each turn.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Way {
    asked: Vec<f64>,
    stream: Vec<f64>,
    answered: Vec<f64>,
    /// Huge pages that were given out meanwhile, nearly all of them to the guest.
    huge_pages: Vec<f64>,
    /// Of VMs that did not come to an answer: why.
    failed: Vec<String>,
}

impl Way {
    fn push(&mut self, vm: Result<[f64; 3]>, huge_pages: f64) {
        match vm {
            Ok([asked, stream, answered]) => {
                self.asked.push(asked);
                self.stream.push(stream);
                self.answered.push(answered);
                self.huge_pages.push(huge_pages);
            }
            Err(err) => self.failed.push(format!("{err:#}")),
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Series {
    by_hand: Way,
    /// The same in Firecracker's jailer.
    jailed: Way,
    /// `run-vm` that stood by, as the controller keeps one.
    ours: Way,
    /// `run-vm` that is started for the VM, as engines do it and the controller where two VMs come at once.
    started: Way,
    /// Of that, to its first event.
    runner: Vec<f64>,
}

#[derive(Clone, Copy)]
enum How {
    ByHand,
    Jailed,
    Ours,
    Started,
}

/// What L1 says.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Samples {
    start: Series,
    load: Series,
}

/// Runs the bench with the image `tiny` in the nested machine.
///
/// # Errors
/// When the machine or the image is not made, or a VM does not answer.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("overhead");
    let nested = Nested::find()?;
    let image = image_home().join("aliases/tiny").canonicalize_utf8();
    let image = image.context("no image `tiny`: `script/test tiny` builds it")?;
    let testkit = Utf8PathBuf::try_from(std::env::current_exe()?)?;
    let by_hand = testkit.with_file_name("examples/firecracker-by-hand");
    ensure!(
        by_hand.exists(),
        "`{by_hand}` is not built: `script/bench` builds it"
    );
    let ran = nested
        .run_on_image(&OnImage {
            testkit: &testkit,
            image: &image,
            programs: &[("firecracker-by-hand", by_hand.as_path())],
            command: &["overhead"],
            limit: LIMIT,
        })
        .await?;
    let said = ran.console.lines().find_map(|line| line.strip_prefix(SAYS));
    let said = said.with_context(|| format!("L1 said no samples: {}", ran.console))?;
    let samples: Samples = serde_json::from_str(said).context("understand the samples")?;
    for (what, series) in [("start", &samples.start), ("load", &samples.load)] {
        report.median(
            format!("{what}: run-vm started for it, to its first event"),
            "s",
            &series.runner,
        );
        for (how, way) in [
            ("by hand", &series.by_hand),
            ("by hand in its jailer", &series.jailed),
            ("run-vm", &series.ours),
            ("run-vm started for it", &series.started),
        ] {
            let mut line =
                |to: &str, samples| report.median(format!("{what}: {how}, {to}"), "s", samples);
            line("to the VMM's last answer", &way.asked);
            line("to the stream's handshake", &way.stream);
            line("to the agent's first answer", &way.answered);
            report.median(
                format!("{what}: {how}, huge pages"),
                "pages",
                &way.huge_pages,
            );
            let failed = way.failed.len() as f64;
            report.figure(format!("{what}: {how}, failed"), "VMs", failed, &[]);
            if how.starts_with("run-vm") {
                report.require(Required::AtMost(0.0));
            }
            for failed in &way.failed {
                report.note(format!("{what}: {how}: {failed}"));
            }
        }
        let ours = median(&series.ours.answered);
        let jailed = ours / median(&series.jailed.answered);
        report.figure(
            format!("{what}: run-vm ÷ by hand in its jailer"),
            "x",
            jailed,
            &[],
        );
        let by_hand = median(&series.by_hand.answered);
        let started = median(&series.started.answered) / by_hand;
        report.figure(
            format!("{what}: run-vm started for it ÷ by hand"),
            "x",
            started,
            &[],
        );
        let ratio = ours / by_hand;
        report.figure(format!("{what}: run-vm ÷ by hand"), "x", ratio, &[]);
        report.require(Required::AtMost(1.1));
        // Where a machine has two speeds, a median is of the one or of the other.
        let means = mean(&series.ours.answered) / mean(&series.by_hand.answered);
        report.figure(
            format!("{what}: run-vm ÷ by hand, of the means"),
            "x",
            means,
            &[],
        );
        let (low, high) = ratio_range(&series.ours.answered, &series.by_hand.answered);
        report.note(format!("{what}: run-vm ÷ by hand is {low:.2} to {high:.2} in 90 of 100 draws from these samples"));
    }
    report.note(format!("image `tiny`, {TURNS} turns of a start and {LOADS} loads, nested under QEMU's TCG; run-vm has a jail and evidence, by hand there is neither"));
    Ok(report)
}

/// The part in L1: prints the samples.
///
/// # Errors
/// When a VM does not answer.
#[expect(clippy::print_stdout, reason = "the samples go to whoever runs L1")]
pub async fn samples(image: Utf8PathBuf, home: Utf8PathBuf) -> Result<()> {
    let setup = Setup {
        program: binary()?,
        driver: DriverChoice::Firecracker,
        image,
        home,
        jail_required: true,
    };
    let mut samples = Samples::default();
    let snapshot = saved(&setup).await?;
    for turn in 1..=TURNS {
        each_way(&setup, None, turn, &mut samples.start).await?;
        for load in 0..LOADS {
            each_way(&setup, Some(&snapshot), turn + load, &mut samples.load).await?;
        }
        println!("turn {turn}: {}", serde_json::to_string(&samples)?);
    }
    println!("{SAYS}{}", serde_json::to_string(&samples)?);
    Ok(())
}

/// One VM in each way, each time another one first.
async fn each_way(
    setup: &Setup,
    snapshot: Option<&RestoreSpec>,
    turn: usize,
    series: &mut Series,
) -> Result<()> {
    let dir = snapshot.map(|snapshot| snapshot.dir.as_str());
    let mut order = [How::ByHand, How::Jailed, How::Ours, How::Started];
    let first = turn % order.len();
    order.rotate_left(first);
    for how in order {
        let vm = vm(setup, snapshot)?;
        let standing = match how {
            How::Ours => Some(vm.stand_by()?),
            How::ByHand | How::Jailed | How::Started => None,
        };
        settle().await?;
        let before = huge_pages().await?;
        let (way, points) = match how {
            How::ByHand => (&mut series.by_hand, by_hand(&setup.image, dir, &[]).await),
            How::Jailed => (
                &mut series.jailed,
                by_hand(&setup.image, dir, &["--jailer"]).await,
            ),
            How::Ours => (
                &mut series.ours,
                ours(&vm, standing).await.map(|ran| ran.points),
            ),
            How::Started => {
                let ran = ours(&vm, standing).await;
                series.runner.extend(ran.as_ref().map(|ran| ran.runner));
                (&mut series.started, ran.map(|ran| ran.points))
            }
        };
        way.push(points, huge_pages().await? - before);
    }
    Ok(())
}

/// Lets the machine become what it was before the last VM. Its memory is in pieces then; made whole, it gives every guest as many huge
/// pages, so that a difference between two boots is none of theirs.
async fn settle() -> Result<()> {
    const COMPACT: &str = "/proc/sys/vm/compact_memory";
    tokio::time::sleep(SETTLE).await;
    let compacted = tokio::fs::write(COMPACT, "1").await;
    compacted.with_context(|| format!("write to `{COMPACT}`"))
}

/// How many huge pages were given out at a fault since L1's start (Linux, admin-guide/mm/transhuge, *Monitoring usage*).
async fn huge_pages() -> Result<f64> {
    const STATISTICS: &str = "/proc/vmstat";
    let text = tokio::fs::read_to_string(STATISTICS).await?;
    let count = text
        .lines()
        .find_map(|line| line.strip_prefix("thp_fault_alloc "));
    let count = count.with_context(|| format!("no huge pages in `{STATISTICS}`"))?;
    Ok(count.parse()?)
}

async fn saved(setup: &Setup) -> Result<RestoreSpec> {
    let mut vm = Vm::new(setup, &setup.manifest()?)?;
    let saving = Saving::of(&mut vm);
    let running = vm.up().await?;
    Ok(saving.save(running).await?.0)
}

/// Seconds to each point of a [`Way`].
async fn by_hand(image: &Utf8Path, snapshot: Option<&str>, how: &[&str]) -> Result<[f64; 3]> {
    let output = Command::new(binary()?.with_file_name("firecracker-by-hand"))
        .args(how)
        .arg(image)
        .args(snapshot)
        .kill_on_drop(true)
        .output()
        .await
        .context("start firecracker-by-hand")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let seconds: Vec<f64> = said.split_whitespace().flat_map(str::parse).collect();
    seconds
        .try_into()
        .map_err(|_| anyhow::anyhow!("by hand: {}", String::from_utf8_lossy(&output.stderr)))
}

fn vm(setup: &Setup, snapshot: Option<&RestoreSpec>) -> Result<Vm> {
    let mut vm = Vm::new(setup, &setup.manifest()?)?;
    vm.spec.restore = snapshot.cloned();
    vm.spec.cache_dir = Some(setup.home.join("cache").into_string());
    Ok(vm)
}

/// A VM of `run-vm`'s.
struct Ran {
    /// Seconds to each point of a [`Way`].
    points: [f64; 3],
    /// Seconds to its first event.
    runner: f64,
}

async fn ours(vm: &Vm, standing: Option<Standing>) -> Result<Ran> {
    let (begun, began) = (Instant::now(), Timestamp::now());
    let running = match standing {
        Some(standing) => vm.start_by(standing).await?,
        None => vm.start().await?,
    };
    let answered = running.event(|event| {
        if let Some(finding) = failed(event) {
            return Some(Err(anyhow::anyhow!("the VM failed: {finding:?}")));
        }
        let phase = Phase::AgentUp;
        (*event == RunnerEventKind::Phase { phase }).then_some(Ok(()))
    });
    let came = tokio::time::timeout(PHASE, answered).await??;
    let answered = begun.elapsed().as_secs_f64();
    let (stopped, ended) = (running.stop().await, running.ended().await);
    // Of a VM that failed, its finding says most.
    came?;
    stopped?;
    ended?;
    let events = vm.events()?;
    let after = |wanted: &dyn Fn(&RunnerEventKind) -> bool| {
        let event = events.iter().find(|event| wanted(&event.event));
        let event = event.context("an event that every VM has")?;
        anyhow::Ok((event.at.as_micros() - began.as_micros()) as f64 / 1e6)
    };
    let asked = if vm.spec.restore.is_some() {
        Phase::Resumed
    } else {
        Phase::VmmStarted
    };
    let phase = |wanted| move |event: &RunnerEventKind| matches!(event, RunnerEventKind::Phase { phase } if *phase == wanted);
    Ok(Ran {
        points: [
            after(&phase(asked))?,
            after(&phase(Phase::StreamUp))?,
            answered,
        ],
        runner: after(&|_| true)?,
    })
}
