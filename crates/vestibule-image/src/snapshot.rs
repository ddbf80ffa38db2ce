//! From an image to a snapshot: one boot under the runner that people get, saved when it is ready. Where the image has no
//! verification yet, the VM that is saved proves it first.
use crate::{
    boot::{self, BootError, BootOptions, Seen, Timing, Vm},
    lint::LintError,
    progress::{Phase as Step, Progress, Steps},
    store::{SnapshotView, Store, StoreError},
    verify::{Gate, Verification},
};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use std::{
    fs::File,
    time::{Duration, Instant},
};
use vestibule_api::{
    finding::Finding,
    ids::{ImageDigest, SnapshotId},
    machine::{Phase, Saved},
};

/// The runner itself gives guest and VMM less than this together; digesting the memory is as fast as the disk.
const SAVE: Duration = Duration::from_secs(1800);

/// Which VM to save.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    pub boot: BootOptions,
    /// Of the guest, in MiB; none: what the image declares.
    pub memory_mib: Option<u32>,
    /// None: what the image declares.
    pub vcpus: Option<u32>,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Lint(#[from] LintError),
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The report is beside the image.
    #[error("image {} is not what its manifest promises: {}; the VM's evidence is in `{}`", .0.digest.short(), .0.shortcomings(), .0.evidence)]
    NotGreen(Box<Verification>),
    #[error("take a snapshot of image {}: {why}; the VM's evidence is in `{evidence}`", digest.short())]
    NotTaken {
        digest: ImageDigest,
        why: String,
        evidence: Utf8PathBuf,
    },
}

/// A snapshot that was taken, and how that went.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Taken {
    pub snapshot: SnapshotView,
    /// Of this boot, where the image had none.
    pub verification: Option<Verification>,
    /// Of the boot: when each milestone was reached.
    pub timings: Vec<Timing>,
    /// From the runner's start until the snapshot was in the store.
    pub took_ms: u64,
    /// Where the evidence of this boot is.
    pub evidence: Utf8PathBuf,
}

/// Boots `digest`, saves the VM when it is ready, and puts the snapshot into the store. The VM ends with it. An image without
/// a verification gets one of this VM, and no snapshot unless that is green.
///
/// # Errors
/// [`SnapshotError`]; nothing of the attempt is left then but its evidence. Only one snapshot of an image and size is taken
/// at a time: a second one is refused, naming the process of the first.
pub async fn snapshot(
    store: &Store,
    digest: &ImageDigest,
    options: &SnapshotOptions,
    progress: &dyn Progress,
) -> Result<Taken, SnapshotError> {
    let image = store.inspect(digest)?;
    let manifest = image.manifest;
    let _hold = store.hold(digest)?;
    let size = (
        options.memory_mib.unwrap_or(manifest.default_memory_mib),
        options.vcpus.unwrap_or(manifest.default_vcpus),
    );
    let _turn = store.snapshot_turn(digest, size)?;
    // What a killed one left may be what this one has no room for.
    store.sweep_snapshots()?;
    let unverified = image.verification.is_none();
    let steps = Steps {
        progress,
        phases: if unverified {
            &Step::VERIFY_AND_SNAPSHOT
        } else {
            &Step::SNAPSHOT
        },
    };
    let begun = Instant::now();
    let mut gate = if unverified {
        Some(Gate::open(store, digest, manifest, steps)?)
    } else {
        None
    };
    let mut spec = boot::spec(store, digest, size, &options.boot)?;
    let unfinished = store.begin_snapshot(spec.machine_id)?;
    spec.save_to = Some(unfinished.path().to_string());
    let mut vm = Vm::start(&options.boot, &spec, unfinished.stderr()?, unfinished.log()).await?;
    let up = vm.up(Phase::Ready, steps).await;
    let mut verification = None;
    // A VM that the host could not start says nothing of the image.
    if let Some(gate) = gate.as_mut().filter(|_| vm.seen.reached(Phase::VmmStarted)) {
        if up {
            gate.ask(&mut vm, steps).await;
        }
        let report = gate.report(&vm.seen, &spec);
        store.attach(&report)?;
        verification = Some(report);
    }
    let refused = verification.as_ref().is_some_and(|report| !report.green);
    let saved = if up && !refused && vm.seen.reached(Phase::Ready) {
        save(&mut vm, steps).await
    } else {
        if up {
            vm.stop("it is not to be saved").await;
        }
        None
    };
    let keeping = steps.begin(Step::Keep);
    let seen = vm.ended().await;
    let evidence = Utf8PathBuf::from(spec.evidence_dir);
    if refused && let Some(report) = verification {
        return Err(SnapshotError::NotGreen(Box::new(report)));
    }
    let Some(saved) = saved else {
        return Err(SnapshotError::NotTaken {
            digest: digest.clone(),
            why: why(seen),
            evidence,
        });
    };
    let snapshot = store.keep_snapshot(&unfinished, &saved.id)?;
    keeping.done(false);
    Ok(Taken {
        snapshot,
        verification,
        timings: seen.timings,
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        evidence,
    })
}

/// What became of a VM that was to begin from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trial {
    /// It was ready.
    Fits,
    /// There is no snapshot of this image and size.
    Missing,
    /// It did not come so far, in words: the snapshot is another VMM's or another runner's, or it is damaged.
    Refused { id: SnapshotId, why: String },
}

/// Starts a VM of the image's default size from its newest snapshot, waits until it is ready, and ends it. Only that says
/// whether the snapshot still fits: VMM, CPU and runner may be others by now, and a browser may paint no more in a copy.
///
/// # Errors
/// When there is no such image, or no VM to watch.
pub async fn try_snapshot(
    store: &Store,
    digest: &ImageDigest,
    options: &BootOptions,
    progress: &dyn Progress,
) -> Result<Trial, SnapshotError> {
    let manifest = store.inspect(digest)?.manifest;
    let _hold = store.hold(digest)?;
    let size = (manifest.default_memory_mib, manifest.default_vcpus);
    let Some(restore) = store.snapshot_for(digest, size.0, size.1, options.driver)? else {
        return Ok(Trial::Missing);
    };
    let id = restore.id.clone();
    let mut spec = boot::spec(store, digest, size, options)?;
    spec.restore = Some(restore);
    let log = Utf8Path::new(&spec.evidence_dir).join("runner.stderr");
    let stderr = File::create(&log).map_err(|err| BootError::Prepare {
        path: log.clone(),
        err,
    })?;
    let steps = Steps {
        progress,
        phases: &Step::TRIAL,
    };
    let mut vm = Vm::start(options, &spec, stderr, &log).await?;
    if vm.up(Phase::Ready, steps).await {
        vm.stop("it has shown that the snapshot fits").await;
    }
    let seen = vm.ended().await;
    if seen.reached(Phase::Ready) {
        // Nothing failed, so there is nothing to look up.
        let _ = std::fs::remove_dir_all(&spec.evidence_dir);
        return Ok(Trial::Fits);
    }
    let why = why(seen);
    Ok(Trial::Refused { id, why })
}

async fn save(vm: &mut Vm<'_>, steps: Steps<'_>) -> Option<Saved> {
    let saving = steps.begin(Step::Save);
    let saved = vm.last("/snapshot", SAVE, steps.progress).await;
    saving.done(false);
    saved
}

/// Why nothing was saved: what the runner found, or else what was seen from outside.
fn why(seen: Seen) -> String {
    match seen.finding {
        Some(Finding {
            cause,
            why,
            fix,
            evidence,
            ..
        }) => {
            let quote = evidence.first().map(|quote| format!(" ({})", quote.text));
            format!("{cause}: {why}{}; {fix}", quote.unwrap_or_default())
        }
        None if seen.problems.is_empty() => "the VM ended before it was ready".to_owned(),
        None => seen.problems.join("; "),
    }
}
