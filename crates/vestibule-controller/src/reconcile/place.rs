//! Gives waiting sessions their machines, oldest first, as long as this host has places.
use super::ReconcileError;
use crate::{
    core::{Shared, off_runtime},
    images::{self, Image},
    state::Event,
    store::{Facts, MachineRow, SessionRow},
};
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
    session::{SessionEventKind, SessionState},
    time::Timestamp,
};

pub(super) async fn run(core: &Shared) -> Result<u64, ReconcileError> {
    let now = Timestamp::now();
    for session in core.store.sessions_in(SessionState::Requested).await? {
        core.store
            .apply(session.id, Event::Accepted, &Facts::default(), now)
            .await?;
    }
    let waiting = core.store.sessions_in(SessionState::Placing).await?;
    if waiting.is_empty() {
        return Ok(0);
    }
    let taken = core.store.machines().await?.len();
    let places = usize::try_from(core.config.limits.vms)
        .unwrap_or(usize::MAX)
        .saturating_sub(taken);
    let mut placed = 0;
    for (position, session) in waiting.iter().enumerate() {
        if position < places {
            placed += u64::from(place(core, session).await?);
        } else {
            tell_position(core, session, position - places).await?;
        }
    }
    Ok(placed)
}

async fn place(core: &Shared, session: &SessionRow) -> Result<bool, ReconcileError> {
    match prepare(core, session).await? {
        Ok(machine) => Ok(core.store.place(&machine, Timestamp::now()).await?),
        Err(finding) => {
            let facts = Facts {
                finding: Some(finding),
                ..Facts::default()
            };
            core.store
                .apply(session.id, Event::MachineFailed, &facts, Timestamp::now())
                .await?;
            Ok(false)
        }
    }
}

/// The machine for a session, or why this host can't make one.
async fn prepare(
    core: &Shared,
    session: &SessionRow,
) -> Result<Result<MachineRow, Finding>, ReconcileError> {
    let (images, alias) = (core.images.clone(), session.image_alias.clone());
    let image = match off_runtime(move || images.resolve(&alias)).await? {
        Ok(image) => image,
        Err(err) => return Ok(Err(images::missing(&session.image_alias, &err))),
    };
    let home = core.config.home.clone();
    let free = off_runtime(move || free_mib(&home)).await?;
    let needed = core.config.limits.min_free_mib;
    if let Some(free) = free.filter(|free| *free < needed) {
        return Ok(Err(disk_full(&core.config.home, free, needed)));
    }
    Ok(Ok(machine(core, session, &image)))
}

fn machine(core: &Shared, session: &SessionRow, image: &Image) -> MachineRow {
    let vm = &core.config.vm;
    let memory = vm
        .memory_mib
        .unwrap_or(image.manifest.default_memory_mib)
        .max(image.manifest.min_memory_mib);
    let vcpus = vm.vcpus.unwrap_or(image.manifest.default_vcpus);
    MachineRow::new(
        session.id,
        session.image_alias.clone(),
        image.digest.clone(),
        memory,
        vcpus,
    )
}

/// MiB that an unprivileged process may still write to the file system of `path`.
pub(crate) fn free_mib(path: &camino::Utf8Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path.as_std_path()).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize) >> 20)
}

fn disk_full(home: &camino::Utf8Path, free: u64, needed: u64) -> Finding {
    let quote = Quote {
        source: "host".to_owned(),
        line: None,
        text: format!("{free} MiB are free on the file system of {home}"),
    };
    Finding::new(
        Cause::HostDiskFull,
        quote,
        format!("a VM is started only while {needed} MiB are free for its logs and evidence"),
        format!("make room on the file system of {home}, or lower `limits.min_free_mib`"),
    )
    .refuted_by(format!("`df -m {home}` shows {needed} MiB or more"))
    .retryable()
}

/// Says how many are ahead, when that changed.
async fn tell_position(
    core: &Shared,
    session: &SessionRow,
    ahead: usize,
) -> Result<(), ReconcileError> {
    let limit = core.config.limits.vms;
    let what = match ahead {
        0 => format!(
            "a free place: {limit} VMs run, as many as this host allows; this sign-in is next"
        ),
        _ => format!(
            "a free place: {limit} VMs run, as many as this host allows; {ahead} sign-ins are ahead"
        ),
    };
    if !core.live.waits_for(session.id, &what) {
        return Ok(());
    }
    let waiting = SessionEventKind::Waiting {
        waiting_for: vec![what],
    };
    core.store
        .add_events(session.id, &[waiting], Timestamp::now())
        .await?;
    Ok(())
}
