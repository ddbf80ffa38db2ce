//! What the controller shows and takes besides sessions: VMs, evidence, readiness, reconcilers, sign-in to the dashboard.
use crate::{
    agent::Health,
    finding::Finding,
    ids::{HostId, ImageDigest, MachineId, SessionId, SnapshotId},
    machine::{EgressCounters, MachineState},
    time::Timestamp,
};
use serde::{Deserialize, Serialize};

/// A VM, as the controller knows it: alive or long gone. What only its runner knows is absent when that does not answer.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmView {
    pub machine_id: MachineId,
    #[serde(default)]
    pub session_id: Option<SessionId>,
    /// The host that runs it; none: nobody knows yet.
    #[serde(default)]
    pub host_id: Option<HostId>,
    /// Whether it is kept in stock for whoever comes next, and nobody's yet.
    #[serde(default)]
    pub pooled: bool,
    pub state: MachineState,
    pub generation: u64,
    pub image_digest: ImageDigest,
    /// The snapshot that it begins from; none: it boots.
    #[serde(default)]
    pub snapshot_id: Option<SnapshotId>,
    /// Whether the alias that it was made from points to another image by now.
    pub made_from_older_image: bool,
    /// `qemu/tcg`, `qemu/kvm`, `firecracker`.
    #[serde(default)]
    pub driver: Option<String>,
    pub memory_mib: u32,
    pub vcpus: u32,
    pub created_at: Timestamp,
    #[serde(default)]
    pub ready_at: Option<Timestamp>,
    #[serde(default)]
    pub gone_at: Option<Timestamp>,
    #[serde(default)]
    pub runner_pid: Option<u32>,
    #[serde(default)]
    pub vmm_pid: Option<u32>,
    /// What the agent said when it became ready.
    #[serde(default)]
    pub health: Option<Health>,
    /// Open view streams.
    pub viewers: u32,
    pub egress: EgressCounters,
    /// Why the VM failed, where it did.
    #[serde(default)]
    pub failure: Option<Finding>,
    /// Whether an evidence bundle is there.
    pub has_evidence: bool,
}

/// One file of an evidence bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EvidenceFile {
    pub name: String,
    pub bytes: u64,
}

/// `GET /health`: the process lives. Says nothing about whether it can work; that is `GET /ready`.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Liveness {
    /// Always `ok`.
    pub status: String,
    pub version: String,
}

/// `GET /ready`: whether a sign-in can be started now, and if not, what is missing.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Readiness {
    pub ready: bool,
    pub version: String,
    pub checks: Vec<ReadyCheck>,
}

/// One thing that a sign-in needs.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReadyCheck {
    /// `database`, `lease` (where hosts share the database), `vault`, `image`, `driver`, `disk-space`, `providers`; and
    /// `warm-start` and `jail`, which a sign-in can do without and are `ok` for that.
    pub name: String,
    pub ok: bool,
    /// What was observed.
    pub observed: String,
    /// What to do, where it is missing; of one that is `ok`, a warning.
    #[serde(default)]
    pub fix: Option<String>,
}

/// A background task that carries out what the rows say.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReconcilerView {
    pub name: String,
    /// Times it ran since the controller started.
    pub runs: u64,
    pub failures: u64,
    #[serde(default)]
    pub last_run_at: Option<Timestamp>,
    #[serde(default)]
    pub last_duration_ms: Option<u64>,
    /// Things that its last run did.
    pub last_count: u64,
    /// The chain of its last error, if its last run failed.
    #[serde(default)]
    pub last_error: Option<String>,
}

/// `201` of `POST /api/login-codes`: opens the dashboard once, within ten minutes.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoginCodeReply {
    pub code: String,
    /// The whole link: `http://127.0.0.1:4000/#/login/<code>`.
    pub link: String,
    pub expires_at: Timestamp,
}

impl std::fmt::Debug for LoginCodeReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoginCodeReply")
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// `POST /api/login`: exchanges the code for the dashboard's cookie.
#[derive(Clone, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoginCodeRequest {
    pub code: String,
}

impl std::fmt::Debug for LoginCodeRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LoginCodeRequest([secret])")
    }
}

/// `POST /api/credentials/{id}/content`. The purpose stands in the audit log.
#[derive(Clone, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ContentRequest {
    /// For what the credential leaves the vault, 1 to 200 characters.
    #[schema(max_length = 200, pattern = r"\S")]
    pub purpose: String,
}

/// The bytes that the tool wrote. The only reply that carries a secret; `Cache-Control: no-store`.
#[derive(Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ContentReply {
    pub files: Vec<ContentFile>,
}

impl std::fmt::Debug for ContentReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ContentReply({} files, [secret])", self.files.len())
    }
}

/// One file of a [`ContentReply`].
#[derive(Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ContentFile {
    /// Relative to the home directory.
    pub path: String,
    /// Permission bits that the tool gave it.
    pub mode: u32,
    /// Base64 of the bytes.
    pub content: String,
}

impl std::fmt::Debug for ContentFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ContentFile({}, [secret])", self.path)
    }
}

impl Drop for ContentFile {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.content);
    }
}

/// A host: one home directory with the VMs of its machine, among those that share a database.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostView {
    pub host_id: HostId,
    pub name: String,
    pub state: HostState,
    /// Whether it is the host of the controller that answers.
    pub own: bool,
    /// Where other controllers reach its controller.
    #[serde(default)]
    pub address: Option<String>,
    /// Until when its controller acts for it, by the database's clock; none: it is the only one.
    #[serde(default)]
    pub lease_until: Option<Timestamp>,
    /// How often a controller took the lease.
    pub generation: u64,
    /// VMs of which something may be left.
    pub machines: u64,
}

/// Whether a host's controller acts for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    Live,
    /// Its lease ran out.
    Lost,
}
