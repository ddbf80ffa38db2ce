//! What a VM under an alias would be made from now: image, size, and the snapshot to begin from, if one can be used.
//!
//! A snapshot that a runner refused or could not restore, or from which two VMs in a row did not become ready, is set aside by
//! this controller for [`ASIDE`], so that not every session pays for it. That is no state of its own: the rows of the machines
//! that failed say it.
use crate::{
    config::VmConfig,
    core::{Core, off_runtime},
    images::{Image, Images},
    store::{MachineRow, StoreError},
};
use std::time::Duration;
use tokio::task::JoinError;
use vestibule_api::{
    error::Chain, finding::Finding, ids::SnapshotId, session::StartKind, time::Timestamp,
};

/// A snapshot that failed is tried again after this: the host may have changed meanwhile.
const ASIDE: Duration = Duration::from_secs(3600);

/// Why it is not known what a VM would be made from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("use the database")]
    Store(#[from] StoreError),
    #[error("look at images off the runtime")]
    Join(#[from] JoinError),
    #[error("find the image `{alias}`")]
    Image {
        alias: String,
        #[source]
        err: vestibule_image::StoreError,
    },
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) alias: String,
    pub(crate) image: Image,
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u32,
    pub(crate) snapshot: Option<SnapshotId>,
    /// Why the snapshot is not used now.
    pub(crate) aside: Option<Aside>,
}

/// A snapshot that is not used now.
#[derive(Clone, Debug)]
pub(crate) struct Aside {
    pub(crate) until: Timestamp,
    pub(crate) finding: Finding,
}

impl Plan {
    /// The snapshot, if VMs begin from it now.
    pub(crate) fn usable(&self) -> Option<&SnapshotId> {
        self.snapshot.as_ref().filter(|_| self.aside.is_none())
    }

    /// A new machine, for nobody yet.
    pub(crate) fn machine(&self, at_most: StartKind) -> MachineRow {
        let mut machine = MachineRow::new(
            self.alias.clone(),
            self.image.digest.clone(),
            self.memory_mib,
            self.vcpus,
        );
        if at_most > StartKind::Cold {
            machine.snapshot_id = self.usable().cloned();
        }
        machine
    }

    /// Whether a machine is what would be made now, but for its snapshot.
    pub(crate) fn fits(&self, machine: &MachineRow) -> bool {
        machine.image_alias == self.alias
            && machine.image_digest == self.image.digest
            && machine.memory_mib == self.memory_mib
            && machine.vcpus == self.vcpus
    }

    /// How a VM would begin now, for people.
    pub(crate) fn words(&self) -> String {
        match (&self.snapshot, &self.aside) {
            (None, _) => {
                "VMs boot: there is no snapshot of the image for VMs of this size".to_owned()
            }
            (Some(id), None) => format!("VMs begin from the snapshot {}", id.short()),
            (Some(id), Some(aside)) => format!(
                "VMs boot: the snapshot {} is set aside until {}: {}{}",
                id.short(),
                aside.until,
                aside.finding.cause,
                aside
                    .finding
                    .evidence
                    .first()
                    .map(|quote| format!(" ({})", quote.text))
                    .unwrap_or_default(),
            ),
        }
    }
}

/// What a VM under `alias` would be made from now.
pub(crate) async fn plan(core: &Core, alias: &str) -> Result<Plan, PlanError> {
    let (images, vm, name) = (
        core.images.clone(),
        core.config.vm.clone(),
        alias.to_owned(),
    );
    let mut plan = off_runtime(move || look(&images, &vm, name)).await??;
    if let Some(snapshot) = &plan.snapshot {
        plan.aside = aside(core, snapshot).await?;
    }
    Ok(plan)
}

fn look(images: &Images, vm: &VmConfig, alias: String) -> Result<Plan, PlanError> {
    let image = match images.resolve(&alias) {
        Ok(image) => image,
        Err(err) => return Err(PlanError::Image { alias, err }),
    };
    let memory_mib = vm
        .memory_mib
        .unwrap_or(image.manifest.default_memory_mib)
        .max(image.manifest.min_memory_mib);
    let vcpus = vm.vcpus.unwrap_or(image.manifest.default_vcpus);
    let found = images.snapshot_for(&image.digest, memory_mib, vcpus, vm.driver);
    let snapshot = found.unwrap_or_else(|err| {
        tracing::warn!(image = alias, error = %Chain(&err), "snapshots can't be looked at; VMs boot");
        None
    });
    Ok(Plan {
        alias,
        image,
        memory_mib,
        vcpus,
        snapshot,
        aside: None,
    })
}

/// Failures in a row count for as long as the controller runs: the first after the pause sets the snapshot aside again.
async fn aside(core: &Core, snapshot: &SnapshotId) -> Result<Option<Aside>, StoreError> {
    let failed = core.store.snapshot_failure(snapshot, core.started_at).await?;
    let aside = failed.map(|(at, finding)| Aside {
        until: at.plus(ASIDE),
        finding,
    });
    Ok(aside.filter(|aside| core.now() < aside.until))
}
