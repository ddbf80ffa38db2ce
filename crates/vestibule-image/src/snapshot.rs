//! From an image to a snapshot: one boot under the runner that people get, saved when it is ready.
use crate::{
    boot::{self, BootError, BootOptions, Seen, Timing, Vm},
    progress::{Phase as Step, Progress, Steps},
    store::{SnapshotView, Store, StoreError},
};
use camino::Utf8PathBuf;
use serde::Serialize;
use std::time::{Duration, Instant};
use vestibule_api::{
    finding::Finding,
    ids::ImageDigest,
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
    Boot(#[from] BootError),
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
    /// Of the boot: when each milestone was reached.
    pub timings: Vec<Timing>,
    /// From the runner's start until the snapshot was in the store.
    pub took_ms: u64,
    /// Where the evidence of this boot is.
    pub evidence: Utf8PathBuf,
}

/// Boots `digest`, saves the VM when it is ready, and puts the snapshot into the store. The VM ends with it.
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
    let manifest = store.manifest(digest)?;
    let _hold = store.hold(digest)?;
    let size = (
        options.memory_mib.unwrap_or(manifest.default_memory_mib),
        options.vcpus.unwrap_or(manifest.default_vcpus),
    );
    let _turn = store.snapshot_turn(digest, size)?;
    // What a killed one left may be what this one has no room for.
    store.sweep_snapshots()?;
    let mut spec = boot::spec(store, digest, size, &options.boot)?;
    let unfinished = store.begin_snapshot(spec.machine_id)?;
    spec.save_to = Some(unfinished.path().to_string());
    let steps = Steps {
        progress,
        phases: &Step::SNAPSHOT,
    };
    let begun = Instant::now();
    let mut vm = Vm::start(&options.boot, &spec, unfinished.stderr()?, unfinished.log()).await?;
    let saved = save(&mut vm, steps).await;
    let keeping = steps.begin(Step::Keep);
    let seen = vm.ended().await;
    let evidence = Utf8PathBuf::from(spec.evidence_dir);
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
        timings: seen.timings,
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        evidence,
    })
}

/// Waits until the VM is ready, and saves it; `None` where either went wrong.
async fn save(vm: &mut Vm<'_>, steps: Steps<'_>) -> Option<Saved> {
    if !vm.up(steps).await {
        return None;
    }
    if !vm.seen.reached(Phase::Ready) {
        vm.stop("it did not become ready").await;
        return None;
    }
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
