//! Memory snapshots: a VM's memory and devices on disk, from which any number of VMs begin.
//!
//! A snapshot is a directory of mode 0700 with three files, written by the runner and never changed afterwards. They have mode
//! 0600; memory and state of Firecracker's have 0644, for a jailed VMM runs as another user:
//!
//! | file | what |
//! |---|---|
//! | [`MEMORY_FILE`] | the guest's memory, page for page; free pages are holes. Clones map it privately |
//! | [`STATE_FILE`] | CPUs and devices as the VMM wrote them |
//! | [`MANIFEST_FILE`] | [`SnapshotManifest`]; the SHA-256 of its bytes is the snapshot's id |
//!
//! A runner with [`crate::machine::VmSpec::restore`] holds a shared lock (flock(2)) on [`MANIFEST_FILE`] for as long as
//! its VM lives; who removes a snapshot takes the lock exclusively first.
use crate::{ids::ImageDigest, time::Timestamp};
use serde::{Deserialize, Serialize};

/// Version of [`SnapshotManifest`].
pub const SNAPSHOT_SCHEMA: u32 = 1;
pub const MEMORY_FILE: &str = "memory";
pub const STATE_FILE: &str = "state";
pub const MANIFEST_FILE: &str = "snapshot.json";
/// Clocks of two hosts may tick differently by so many parts in a million before a snapshot of one is refused on the
/// other: NTP corrects 500 (`adjtimex(2)`), and two measurements of one host differ by less.
const TSC_TOLERANCE_PPM: u64 = 500;

/// `snapshot.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SnapshotManifest {
    pub schema: u32,
    /// What must be the same where it is restored.
    pub binding: Binding,
    pub taken_at: Timestamp,
    pub memory: SavedFile,
    pub state: SavedFile,
}

/// What a snapshot belongs to. All of it must be the same at a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Binding {
    pub image_digest: ImageDigest,
    /// SHA-256 of the agent's program, as the image declares it.
    pub agent_build: String,
    /// VMM and accelerator: `qemu/tcg`.
    pub driver: String,
    /// The VMM's own version, package included: `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)`.
    pub vmm_version: String,
    /// The versioned machine type: `pc-q35-7.2`.
    pub machine: String,
    /// The CPU model that the VMM was given; with `host`, the host's own model follows: `host (AMD EPYC 9R14)`.
    pub cpu: String,
    /// The features that the VMM gives to the guest's CPU, sorted.
    pub cpu_features: Vec<String>,
    pub memory_mib: u32,
    pub vcpus: u32,
    /// Version of the runner.
    pub runner: String,
    /// SHA-256 of the VMM's arguments, without what differs from VM to VM (ids, paths, descriptors): any change of the
    /// runner's that gives the guest another machine changes it.
    pub arguments: String,
    /// Kernel command line as launched.
    pub cmdline: String,
    /// What the host's time-stamp counter ticks in a millisecond, as measured; a guest's clock is built on it.
    pub tsc_khz: u64,
}

/// One file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SavedFile {
    /// Length, holes included.
    pub bytes: u64,
    /// What it took on disk when it was written.
    pub allocated_bytes: u64,
    /// SHA-256 of what is in it. Over each block of 64 KiB that is not all zeros: its number (8 bytes, little endian) and
    /// its bytes; then the file's length (8 bytes). A hole and zeros are the same, and cost nothing to read.
    pub sha256: String,
}

impl SnapshotManifest {
    /// What differs between the snapshot and `here`, in words; `None` where it can be restored.
    pub fn binding_mismatch(&self, here: &Binding) -> Option<String> {
        if self.schema != SNAPSHOT_SCHEMA {
            return Some(format!(
                "the snapshot has schema {}, this runner reads {SNAPSHOT_SCHEMA}",
                self.schema
            ));
        }
        let there = &self.binding;
        let same = |what: &str, saved: &str, now: &str| {
            (saved != now).then(|| format!("{what}: the snapshot has {saved}, here it is {now}"))
        };
        same(
            "image",
            there.image_digest.as_str(),
            here.image_digest.as_str(),
        )
        .or_else(|| same("agent build", &there.agent_build, &here.agent_build))
        .or_else(|| same("driver", &there.driver, &here.driver))
        .or_else(|| same("VMM version", &there.vmm_version, &here.vmm_version))
        .or_else(|| same("machine type", &there.machine, &here.machine))
        .or_else(|| same("CPU", &there.cpu, &here.cpu))
        .or_else(|| features(&there.cpu_features, &here.cpu_features))
        .or_else(|| number("memory", there.memory_mib, here.memory_mib, "MiB"))
        .or_else(|| number("CPUs", there.vcpus, here.vcpus, "vCPUs"))
        .or_else(|| same("runner version", &there.runner, &here.runner))
        .or_else(|| same("kernel command line", &there.cmdline, &here.cmdline))
        .or_else(|| same("VMM arguments", &there.arguments, &here.arguments))
        .or_else(|| tsc(there.tsc_khz, here.tsc_khz))
    }
}

fn number(what: &str, saved: u32, now: u32, unit: &str) -> Option<String> {
    (saved != now)
        .then(|| format!("{what}: the snapshot has {saved} {unit}, here it would be {now} {unit}"))
}

fn features(saved: &[String], now: &[String]) -> Option<String> {
    let only = |a: &[String], b: &[String]| {
        let names: Vec<_> = a.iter().filter(|name| !b.contains(name)).cloned().collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    let missing = only(saved, now).map(|names| format!("{names} missing here"));
    let added = only(now, saved).map(|names| format!("{names} only here"));
    let words: Vec<_> = missing.into_iter().chain(added).collect();
    (!words.is_empty()).then(|| format!("CPU features: {}", words.join("; ")))
}

fn tsc(saved: u64, now: u64) -> Option<String> {
    let off = saved
        .abs_diff(now)
        .saturating_mul(1_000_000)
        .checked_div(saved)
        .unwrap_or(u64::MAX);
    (off > TSC_TOLERANCE_PPM).then(|| {
        format!("time-stamp counter: the snapshot's host counts {saved} kHz, this one {now} kHz")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> SnapshotManifest {
        let file = SavedFile {
            bytes: 256 << 20,
            allocated_bytes: 50 << 20,
            sha256: "c".repeat(64),
        };
        SnapshotManifest {
            schema: SNAPSHOT_SCHEMA,
            binding: Binding {
                image_digest: "a".repeat(64).parse().unwrap(),
                agent_build: "b".repeat(64),
                driver: "qemu/tcg".into(),
                vmm_version: "7.2.22".into(),
                machine: "pc-q35-7.2".into(),
                cpu: "max".into(),
                cpu_features: vec!["aes".into(), "avx2".into()],
                memory_mib: 256,
                vcpus: 1,
                runner: "0.1.0".into(),
                arguments: "d".repeat(64),
                cmdline: "quiet".into(),
                tsc_khz: 2_445_430,
            },
            taken_at: Timestamp::from_micros(1),
            memory: file.clone(),
            state: file,
        }
    }

    #[test]
    fn each_difference_is_named() {
        let manifest = manifest();
        assert_eq!(manifest.binding_mismatch(&manifest.binding), None);
        type Change = fn(&mut Binding);
        let changes: [(&str, Change); 13] = [
            ("image", |b| {
                b.image_digest = "e".repeat(64).parse().unwrap();
            }),
            ("agent build", |b| b.agent_build = "x".into()),
            ("driver", |b| b.driver = "qemu/kvm".into()),
            ("VMM version", |b| b.vmm_version = "10.0.2".into()),
            ("machine type", |b| b.machine = "pc-q35-7.1".into()),
            ("CPU: ", |b| b.cpu = "host (x)".into()),
            ("CPU features: avx2 missing here; sse9 only here", |b| {
                b.cpu_features = vec!["aes".into(), "sse9".into()];
            }),
            ("memory: the snapshot has 256 MiB", |b| b.memory_mib = 512),
            ("CPUs: ", |b| b.vcpus = 2),
            ("runner version", |b| b.runner = "9".into()),
            ("kernel command line", |b| b.cmdline = "loud".into()),
            ("VMM arguments", |b| b.arguments = "x".into()),
            ("time-stamp counter", |b| b.tsc_khz = 2_000_000),
        ];
        for (words, change) in changes {
            let mut here = manifest.binding.clone();
            change(&mut here);
            let said = manifest.binding_mismatch(&here).unwrap_or_default();
            assert!(said.starts_with(words), "{words}: {said}");
        }
        let mut near = manifest.binding.clone();
        near.tsc_khz += 200;
        assert_eq!(manifest.binding_mismatch(&near), None);
        let mut newer = manifest.clone();
        newer.schema += 1;
        assert!(newer.binding_mismatch(&near).unwrap().contains("schema"));
    }
}
