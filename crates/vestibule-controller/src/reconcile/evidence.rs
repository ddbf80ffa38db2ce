//! Removes evidence that is old, and the oldest where there is too much.
//!
//! A bundle is as old as its newest file: nothing writes to one whose VM is gone. One that was only half removed is
//! therefore as old as it was, and goes the next time.
use super::{ReconcileError, calendar::system_time, days};
use crate::core::{Shared, off_runtime};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    io,
    os::unix::fs::MetadataExt as _,
    time::{Duration, SystemTime},
};
use vestibule_api::{ids::MachineId, time::Timestamp};

/// However much there is, so young a bundle stays: somebody is about to read why their sign-in failed.
const YOUNG: Duration = Duration::from_secs(3600);

/// What is left of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bundle {
    id: MachineId,
    age: Duration,
    bytes: u64,
}

pub(super) async fn run(core: &Shared, now: Timestamp) -> Result<u64, ReconcileError> {
    let limits = &core.config.limits;
    let (keep, most) = (
        days(limits.keep_evidence_days),
        match limits.keep_evidence_mib {
            0 => u64::MAX,
            mib => mib.saturating_mul(1 << 20),
        },
    );
    let home = core.config.home.join("evidence");
    let all = off_runtime(move || bundles(&home, system_time(now))).await??;
    let (mut count, mut freed) = (0_u64, 0);
    for bundle in superfluous(all, keep, most) {
        let row = core.store.machine(bundle.id).await?;
        if row.is_some_and(|row| row.gone_at.is_none()) {
            continue;
        }
        let dir = core.evidence_dir(bundle.id);
        off_runtime(move || remove(&dir)).await??;
        count += 1;
        freed += bundle.bytes;
    }
    if count > 0 {
        tracing::info!(
            bundles = count,
            freed_mib = freed >> 20,
            "removed old evidence"
        );
    }
    Ok(count)
}

/// Those that are older than `keep`, and the oldest of those that have more than `most` bytes together.
fn superfluous(mut all: Vec<Bundle>, keep: Duration, most: u64) -> Vec<Bundle> {
    all.sort_by_key(|bundle| bundle.age);
    let mut total = 0_u64;
    all.retain(|bundle| {
        total = total.saturating_add(bundle.bytes);
        bundle.age >= keep || total > most && bundle.age >= YOUNG
    });
    all
}

/// Every bundle in `dir`. What has another name than a VM's is not the controller's.
fn bundles(dir: &Utf8Path, now: SystemTime) -> Result<Vec<Bundle>, ReconcileError> {
    let failed = |path: &Utf8Path| {
        let path = path.to_owned();
        move |err| ReconcileError::List { path, err }
    };
    let entries = match dir.read_dir_utf8() {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed(dir))?,
    };
    let named = entries.flatten().filter_map(|entry| {
        let id = entry.file_name().parse().ok()?;
        Some((id, entry.into_path()))
    });
    named
        .map(|(id, path)| bundle(id, &path, now).map_err(failed(&path)))
        .collect()
}

fn bundle(id: MachineId, path: &Utf8Path, now: SystemTime) -> io::Result<Bundle> {
    let (mut newest, mut bytes) = (None, 0);
    for entry in path.read_dir_utf8()? {
        let meta = entry?.metadata()?;
        newest = newest.max(Some(meta.modified()?));
        bytes += meta.blocks() * 512;
    }
    let changed = match newest {
        Some(at) => at,
        None => path.symlink_metadata()?.modified()?,
    };
    Ok(Bundle {
        id,
        // A time to come is of a clock that was set back since.
        age: now.duration_since(changed).unwrap_or_default(),
        bytes,
    })
}

fn remove(dir: &Utf8PathBuf) -> Result<(), ReconcileError> {
    match std::fs::remove_dir_all(dir) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(ReconcileError::Remove {
            path: dir.clone(),
            err,
        }),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, create_dir, write};

    const DAY: Duration = Duration::from_secs(86_400);

    fn bundle_of(home: &Utf8Path, age: Duration, bytes: usize) -> MachineId {
        let id = MachineId::generate();
        let dir = home.join(id.to_string());
        create_dir(&dir).unwrap();
        let at = SystemTime::now() - age;
        for (name, bytes, at) in [
            ("serial.log", bytes, at),
            ("machine.json", 10, at - 3 * DAY),
        ] {
            write(dir.join(name), vec![b'x'; bytes]).unwrap();
            let file = File::options().write(true).open(dir.join(name)).unwrap();
            file.set_modified(at).unwrap();
        }
        id
    }

    #[test]
    fn what_is_old_goes_and_of_too_much_the_oldest() {
        let home = camino_tempfile::tempdir().unwrap();
        let mib = 1 << 20;
        let [old, month, day, hour, new] = [
            31 * DAY,
            29 * DAY,
            DAY,
            Duration::from_secs(3700),
            Duration::ZERO,
        ]
        .map(|age| bundle_of(home.path(), age, mib));
        create_dir(home.path().join("mine")).unwrap();
        let gone = |most: usize| {
            let all = bundles(home.path(), SystemTime::now()).unwrap();
            assert_eq!(all.len(), 5);
            superfluous(all, 30 * DAY, most as u64)
                .into_iter()
                .map(|bundle| bundle.id)
                .collect::<Vec<_>>()
        };
        assert_eq!(gone(100 * mib), [old]);
        assert_eq!(gone(7 * mib / 2), [day, month, old][1..]);
        assert_eq!(gone(0), [hour, day, month, old], "not {new}");
    }

    #[test]
    fn an_empty_bundle_and_a_missing_directory_are_fine() {
        let home = camino_tempfile::tempdir().unwrap();
        let path = home.path().join(MachineId::generate().to_string());
        create_dir(&path).unwrap();
        let later = SystemTime::now() + 40 * DAY;
        let all = bundles(home.path(), later).unwrap();
        assert_eq!(superfluous(all.clone(), 30 * DAY, u64::MAX), all);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(bundles(&home.path().join("none"), later).unwrap(), []);
    }
}
