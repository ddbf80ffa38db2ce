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
use vestibule_image::store::{Candidates, DamagedSnapshot};

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
    /// The newest snapshot from which VMs can begin now.
    pub(crate) snapshot: Option<SnapshotId>,
    /// A newer one, or the newest there is, where it is not used now.
    pub(crate) aside: Option<Aside>,
    /// Snapshots that are damaged. One is tried where there is no other, so that who waited for its VM hears why it boots.
    pub(crate) damaged: Vec<DamagedSnapshot>,
}

/// A snapshot that is not used now.
#[derive(Clone, Debug)]
pub(crate) struct Aside {
    pub(crate) id: SnapshotId,
    pub(crate) until: Timestamp,
    pub(crate) finding: Finding,
}

impl Plan {
    /// A new machine, for nobody yet.
    pub(crate) fn machine(&self, at_most: StartKind) -> MachineRow {
        let mut machine = MachineRow::new(
            self.alias.clone(),
            self.image.digest.clone(),
            self.memory_mib,
            self.vcpus,
        );
        if at_most > StartKind::Cold {
            machine.snapshot_id.clone_from(&self.snapshot);
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

    /// Whether it begins from what VMs begin from now; from anything, where they boot.
    pub(crate) fn is_current(&self, machine: &MachineRow) -> bool {
        self.snapshot.is_none() || self.snapshot == machine.snapshot_id
    }

    /// How a VM would begin now, for people.
    pub(crate) fn words(&self) -> String {
        let begins = match &self.snapshot {
            Some(id) => format!("VMs begin from the snapshot {}", id.short()),
            None if self.aside.is_some() => "VMs boot".to_owned(),
            None => "VMs boot: there is no snapshot of the image for VMs of this size".to_owned(),
        };
        let aside = self.aside.as_ref().map(|aside| {
            let quote = aside.finding.evidence.first();
            format!(
                "the snapshot {} is set aside until {}: {}{}",
                aside.id.short(),
                aside.until,
                aside.finding.cause,
                quote.map_or_else(String::new, |quote| format!(" ({})", quote.text)),
            )
        });
        let known = self.aside.as_ref().map(|aside| &aside.id);
        let damaged = self.damaged.iter().filter(|one| known != Some(&one.id));
        let damaged =
            damaged.map(|one| format!("the snapshot {} is damaged: {}", one.id.short(), one.why));
        let words = std::iter::once(begins).chain(aside).chain(damaged);
        words.collect::<Vec<_>>().join("; ")
    }
}

/// What a VM under `alias` would be made from now.
pub(crate) async fn plan(core: &Core, alias: &str) -> Result<Plan, PlanError> {
    let (images, vm, name) = (
        core.images.clone(),
        core.config.vm.clone(),
        alias.to_owned(),
    );
    let (mut plan, snapshots) = off_runtime(move || look(&images, &vm, name)).await??;
    for id in snapshots.ids().cloned() {
        match aside(core, &id).await? {
            None => {
                plan.snapshot = Some(id);
                break;
            }
            Some(aside) => {
                plan.aside.get_or_insert(aside);
            }
        }
    }
    plan.damaged = snapshots.damaged;
    Ok(plan)
}

/// The plan without a snapshot, and those that there are for it.
fn look(images: &Images, vm: &VmConfig, alias: String) -> Result<(Plan, Candidates), PlanError> {
    let image = match images.resolve(&alias) {
        Ok(image) => image,
        Err(err) => return Err(PlanError::Image { alias, err }),
    };
    let memory_mib = vm
        .memory_mib
        .unwrap_or(image.manifest.default_memory_mib)
        .max(image.manifest.min_memory_mib);
    let vcpus = vm.vcpus.unwrap_or(image.manifest.default_vcpus);
    let found = images.snapshots_for(&image.digest, memory_mib, vcpus, vm.driver);
    let snapshots = found.unwrap_or_else(|err| {
        tracing::warn!(image = alias, error = %Chain(&err), "snapshots can't be looked at; VMs boot");
        Candidates::default()
    });
    let plan = Plan {
        alias,
        image,
        memory_mib,
        vcpus,
        snapshot: None,
        aside: None,
        damaged: Vec::new(),
    };
    Ok((plan, snapshots))
}

/// Failures in a row count for as long as the controller runs: the first after the pause sets the snapshot aside again.
async fn aside(core: &Core, snapshot: &SnapshotId) -> Result<Option<Aside>, StoreError> {
    let failed = core
        .store
        .snapshot_failure(snapshot, core.started_at)
        .await?;
    let aside = failed.map(|(at, finding)| Aside {
        id: snapshot.clone(),
        until: at.plus(ASIDE),
        finding,
    });
    Ok(aside.filter(|aside| core.now() < aside.until))
}
