//! Images: what a manifest declares, and what the store shows of it.
use crate::{
    ids::{AliasName, ImageDigest, SnapshotId},
    time::Timestamp,
};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use std::collections::BTreeMap;

/// `manifest.json`, in an image's directory. Its bytes' SHA-256 is the image's digest, so nothing in it may depend on
/// when or where the image was built; that stands in `build.json` beside it.
///
/// Its list of files is most of it, and takes longest to understand; [`BriefManifest`] is for whoever needs none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Manifest<Files = BTreeMap<String, String>> {
    /// Version of this schema.
    pub schema: u32,
    /// Name of the recipe: `browser`, `tiny`.
    pub recipe: String,
    /// SHA-256 of the recipe and of every file that it takes in.
    pub recipe_digest: String,
    /// File name in the image's directory → what it is. `root.ext4`, `initrd`, and the kernel as each driver boots it:
    /// `vmlinuz` for QEMU, `vmlinux` (ELF) for Firecracker.
    pub artifacts: BTreeMap<String, Artifact>,
    /// Kernel release: the name below `/lib/modules`.
    pub kernel_release: String,
    /// Kernel command line that belongs to the image; drivers add what the machine needs.
    pub cmdline: String,
    /// Modules that the initrd carries, in load order.
    pub drivers: Vec<String>,
    pub min_memory_mib: u32,
    pub default_memory_mib: u32,
    pub default_vcpus: u32,
    /// Units that must be active when the VM is ready.
    pub required_units: Vec<String>,
    /// `agent`, `display`, `browser`, `terminal`, and `tool:<provider>` for each tool.
    pub features: Vec<String>,
    /// SHA-256 of the agent's binary in the image.
    pub agent_build: String,
    pub packages: Vec<Package>,
    /// Provider tools, with version as installed.
    pub tools: Vec<Tool>,
    /// Every regular file of the root: path → SHA-256. Links and directories are in the root image's own digest.
    pub files: Files,
}

/// A manifest whose files are skipped.
pub type BriefManifest = Manifest<IgnoredAny>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Artifact {
    pub sha256: String,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub architecture: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tool {
    /// Id of the provider pack that uses it.
    pub provider: String,
    pub package: String,
    pub version: String,
    /// Absolute path in the guest.
    pub path: String,
}

/// An image as the store lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageView {
    pub digest: ImageDigest,
    pub recipe: String,
    pub built_at: Timestamp,
    /// Bytes on disk, holes not counted.
    pub disk_bytes: u64,
    pub aliases: Vec<AliasName>,
    /// Whether a green `verification.json` belongs to it.
    pub verified: bool,
    pub features: Vec<String>,
    pub kernel_release: String,
    pub default_memory_mib: u32,
    pub default_vcpus: u32,
    /// What a VM of the default size is restored from.
    #[serde(default)]
    pub snapshot: Option<ImageSnapshot>,
}

/// The newest snapshot of an image for VMs of its default size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageSnapshot {
    pub id: SnapshotId,
    pub taken_at: Timestamp,
    /// Bytes on disk, holes not counted.
    pub allocated_bytes: u64,
    /// The guest's memory.
    pub memory_mib: u32,
}
