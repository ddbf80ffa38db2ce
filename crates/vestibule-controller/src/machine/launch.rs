//! Starts a session's runner, once.
use super::EffectError;
use crate::{
    core::{Shared, off_runtime},
    images::{self, Image},
    scheduler::LaunchError,
    state::Event,
    store::{Facts, MachineRow, SessionRow},
};
use std::{io::ErrorKind, sync::Arc};
use vestibule_api::{
    cause::Cause,
    egress::EgressPolicy,
    error::Chain,
    finding::{Finding, Quote},
    machine::VmSpec,
    time::Timestamp,
};

/// Carries [`crate::state::Effect::Launch`] out.
pub(crate) async fn launch(core: &Shared, session: &SessionRow) -> Result<(), EffectError> {
    let Some(machine) = machine_of(core, session).await? else {
        return Ok(());
    };
    if session.state.is_terminal() || machine.launched_at.is_some() {
        return Ok(());
    }
    match try_launch(core, session, &machine).await? {
        Ok(()) => {
            core.store
                .machine_launched(machine.id, Timestamp::now())
                .await?;
        }
        Err(finding) => {
            tracing::error!(session.id = %session.id, machine.id = %machine.id, cause = %finding.cause, "no runner was started");
            let facts = Facts {
                finding: Some(finding),
                ..Facts::default()
            };
            core.store
                .apply(session.id, Event::MachineFailed, &facts, Timestamp::now())
                .await?;
        }
    }
    Ok(())
}

/// The machine that the session was given.
pub(super) async fn machine_of(
    core: &Shared,
    session: &SessionRow,
) -> Result<Option<MachineRow>, EffectError> {
    match session.machine_id {
        Some(id) => Ok(core.store.machine(id).await?),
        None => Ok(None),
    }
}

async fn try_launch(
    core: &Shared,
    session: &SessionRow,
    machine: &MachineRow,
) -> Result<Result<(), Finding>, EffectError> {
    let (images, digest) = (core.images.clone(), machine.image_digest.to_string());
    let image = match off_runtime(move || images.resolve(&digest)).await? {
        Ok(image) => image,
        Err(err) => return Ok(Err(images::missing(&session.image_alias, &err))),
    };
    let spec = spec(core, session, machine, &image);
    let scheduler = Arc::clone(&core.scheduler);
    Ok(off_runtime(move || scheduler.launch(&spec))
        .await?
        .map_err(|err| refused(&err)))
}

fn spec(core: &Shared, session: &SessionRow, machine: &MachineRow, image: &Image) -> VmSpec {
    let config = &core.config;
    VmSpec {
        machine_id: machine.id,
        session_id: Some(session.id),
        image_digest: machine.image_digest.clone(),
        image_dir: image.dir.to_string(),
        driver: config.vm.driver,
        memory_mib: machine.memory_mib,
        vcpus: machine.vcpus,
        vm_dir: core.vm_dir(machine.id).into_string(),
        evidence_dir: core.evidence_dir(machine.id).into_string(),
        // Nothing leaves before the claim.
        egress: EgressPolicy::default(),
        boot_deadline_s: config.deadlines.boot_s,
        console_keep_bytes: config.limits.console_keep_bytes,
        idle_deadline_s: None,
        restore: None,
        save_to: None,
    }
}

fn refused(err: &LaunchError) -> Finding {
    let full = matches!(
        err.io().kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::ReadOnlyFilesystem
    );
    let quote = Quote {
        source: "host".to_owned(),
        line: None,
        text: Chain(err).to_string(),
    };
    if full {
        return Finding::new(
            Cause::HostDiskFull,
            quote,
            "the host could not write what the VM needs",
            "make room on the file system of the home directory",
        )
        .retryable();
    }
    Finding::new(
        Cause::LaunchRefused,
        quote,
        "the host refused to start the VM's runner",
        "correct what the quoted error names (permissions, the configured `runner`), then start the sign-in again",
    )
}
