//! Starts a machine's runner, once, or claims a VM of the pool.
use super::{EffectError, login};
use crate::{
    core::{Shared, off_runtime},
    crash::point,
    descriptors,
    images::{self, Image},
    scheduler::LaunchError,
    state::Event,
    store::{Applied, Facts, MachineRow, SessionRow},
};
use hyper::StatusCode;
use std::{io::ErrorKind, sync::Arc};
use vestibule_api::{
    cause::Cause,
    egress::EgressPolicy,
    error::Chain,
    finding::{Finding, Quote},
    machine::{MachineState, RestoreSpec, VmSpec},
    session::{Milestone, SessionState},
};

/// Carries [`crate::state::Effect::Launch`] out.
pub(crate) async fn launch(core: &Shared, session: &SessionRow) -> Result<(), EffectError> {
    let Some(machine) = machine_of(core, session).await? else {
        return Ok(());
    };
    if session.state != SessionState::Starting {
        return Ok(());
    }
    if machine.pooled {
        return claim(core, session, &machine).await;
    }
    if machine.launched_at.is_some() {
        return Ok(());
    }
    match start(core, &machine).await? {
        Ok(()) => Ok(()),
        Err(finding) => {
            tracing::error!(session.id = %session.id, machine.id = %machine.id, cause = %finding.cause, "no runner was started");
            core.store
                .session_failed(session, finding, core.now())
                .await?;
            Ok(())
        }
    }
}

/// Gives a VM of the pool to its session, which lets it run again. Done twice it is done once. A VM that can't be had is
/// the start's failure, not the session's.
async fn claim(
    core: &Shared,
    session: &SessionRow,
    machine: &MachineRow,
) -> Result<(), EffectError> {
    let request = match login::request(core, session) {
        Ok(request) => request,
        Err(finding) => {
            core.store
                .session_failed(session, *finding, core.now())
                .await?;
            return Ok(());
        }
    };
    match login::claim(core, machine.id, &request).await {
        Ok(Ok(view)) => {
            point("claim:done").await;
            // Its runner says so as well, unless the VM was up already.
            if view.state == MachineState::Up {
                let now = core.now();
                let facts = Facts::default();
                let ready = core
                    .store
                    .apply_there(session, Event::MachineReady, &facts, now);
                if matches!(ready.await?, Applied::Moved(_)) {
                    core.metrics
                        .phase(Milestone::Ready, machine.start(), session.created_at, now);
                }
            }
            Ok(())
        }
        Ok(Err(finding)) => {
            core.store
                .session_failed(session, finding, core.now())
                .await?;
            Ok(())
        }
        Err(err) if is_hopeless(&err) => {
            let quote = Quote {
                source: "runner".to_owned(),
                line: None,
                text: Chain(&err).to_string(),
            };
            let finding = Finding::new(
                Cause::LaunchRefused,
                quote,
                "the VM of the pool was not given to the session",
                "nothing: the session gets another VM",
            );
            tracing::warn!(session.id = %session.id, machine.id = %machine.id, error = %Chain(&err), "a VM of the pool can't be had");
            let now = core.now();
            let told = core.store.machine_failed(machine.id, finding, now).await?;
            core.metrics.ingested(told.as_ref(), &[], now);
            Ok(())
        }
        Err(err) => Err(err),
    }
}

/// Whether asking the runner again would change nothing, or take longer than another VM.
fn is_hopeless(err: &EffectError) -> bool {
    match err {
        EffectError::Runner(err) => err.status() == Some(StatusCode::CONFLICT),
        EffectError::Timeout(_) => true,
        EffectError::Store(_)
        | EffectError::StillAlive
        | EffectError::Evidence(_)
        | EffectError::Vault(_)
        | EffectError::Remove(_)
        | EffectError::Join(_) => false,
    }
}

/// The machine that the session was given, on this host. An effect may outlive the machine that it was for: where the next one
/// is on another host, that host has an effect of its own for it.
pub(super) async fn machine_of(
    core: &Shared,
    session: &SessionRow,
) -> Result<Option<MachineRow>, EffectError> {
    let Some(id) = session.machine_id else {
        return Ok(None);
    };
    let machine = core.store.machine(id).await?;
    Ok(machine.filter(|machine| machine.host_id == Some(core.store.host())))
}

/// Starts the runner of a machine, once. The inner error is why this host could not.
pub(crate) async fn start(
    core: &Shared,
    machine: &MachineRow,
) -> Result<Result<(), Finding>, EffectError> {
    let (images, digest) = (core.images.clone(), machine.image_digest.to_string());
    let snapshot = machine.snapshot_id.clone();
    let found = off_runtime(move || {
        let restore = snapshot.map(|id| images.restore(&id)).transpose()?;
        Ok((images.resolve(&digest)?, restore))
    });
    let (image, restore) = match found.await? {
        Ok(found) => found,
        Err(err) => return Ok(Err(images::missing(&machine.image_alias, &err))),
    };
    let spec = spec(core, machine, &image, restore);
    point("launch:begin").await;
    // Who stood still here may not act for the host any more; who does may have started it, and somebody been in it.
    core.store.check_fence().await?;
    let scheduler = Arc::clone(&core.scheduler);
    if let Err(err) = off_runtime(move || scheduler.launch(&spec)).await? {
        return Ok(Err(not_launched(&err)));
    }
    point("launch:started").await;
    core.store.machine_launched(machine.id, core.now()).await?;
    Ok(Ok(()))
}

fn spec(
    core: &Shared,
    machine: &MachineRow,
    image: &Image,
    restore: Option<RestoreSpec>,
) -> VmSpec {
    let config = &core.config;
    let deadlines = &config.deadlines;
    VmSpec {
        machine_id: machine.id,
        // Whoever takes a VM out of the pool may claim it.
        session_id: machine.session_id.filter(|_| !machine.pooled),
        image_digest: machine.image_digest.clone(),
        image_dir: image.dir.to_string(),
        driver: config.vm.driver,
        memory_mib: machine.memory_mib,
        vcpus: machine.vcpus,
        vm_dir: core.vm_dir(machine.id).into_string(),
        evidence_dir: core.evidence_dir(machine.id).into_string(),
        // Nothing leaves before the claim.
        egress: EgressPolicy::default(),
        boot_deadline_s: match &restore {
            Some(_) => deadlines.restore_s.min(deadlines.boot_s),
            None => deadlines.boot_s,
        },
        console_keep_bytes: config.limits.console_keep_bytes,
        // While a controller follows it, the VM is not idle: this ends it where none does.
        idle_deadline_s: machine.pooled.then_some(deadlines.pool_s),
        restore,
        save_to: None,
        jail: config.vm.jail,
        cache_dir: Some(core.config.cache_dir().into_string()),
        memory_backend: core.config.vm.memory_backend,
    }
}

fn not_launched(err: &LaunchError) -> Finding {
    let full = matches!(
        err.io().map(std::io::Error::kind),
        Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::ReadOnlyFilesystem)
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
    if descriptors::are_gone(err) {
        return descriptors::finding(quote);
    }
    Finding::new(
        Cause::LaunchRefused,
        quote,
        "the host refused to start the VM's runner",
        "correct what the quoted error names (permissions, the configured `runner` or `scheduler`), then start the sign-in again",
    )
}
