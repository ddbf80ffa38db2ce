//! What a world's VMs are made from.
use camino::Utf8Path;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use vestibule_api::{
    snapshot::{
        Binding, MANIFEST_FILE, MEMORY_FILE, SNAPSHOT_SCHEMA, STATE_FILE, SavedFile,
        SnapshotManifest,
    },
    time::Timestamp,
};

/// An image as the store holds one, without anything that boots, or a record of when it was built. Returns its digest.
pub(super) fn build(home: &Utf8Path, recipe: &str) -> String {
    let manifest = json!({
        "schema": 1, "recipe": recipe, "recipeDigest": "0".repeat(64), "artifacts": {}, "kernelRelease": "6.1",
        "cmdline": "quiet", "drivers": [], "minMemoryMib": 512, "defaultMemoryMib": 512, "defaultVcpus": 1,
        "requiredUnits": [], "features": ["agent", "browser"], "agentBuild": "0".repeat(64), "packages": [],
        "tools": [{ "provider": "codex", "package": "codex", "version": "1", "path": "/usr/bin/codex" }], "files": {},
    });
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let digest = sha256(&bytes);
    let dir = home.join("images").join(&digest);
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("manifest.json"), bytes).unwrap();
    digest
}

/// An image that sign-ins take, and perhaps a snapshot of it.
pub(super) fn publish(home: &Utf8Path, snapshot: bool) {
    let digest = build(home, "browser");
    for dir in ["aliases", "vms", "evidence"] {
        std::fs::create_dir_all(home.join(dir)).unwrap();
    }
    std::os::unix::fs::symlink(format!("../images/{digest}"), home.join("aliases/browser"))
        .unwrap();
    if !snapshot {
        return;
    }
    let file = SavedFile {
        bytes: 1,
        allocated_bytes: 1,
        sha256: "c".repeat(64),
    };
    let manifest = SnapshotManifest {
        schema: SNAPSHOT_SCHEMA,
        binding: Binding {
            image_digest: digest.parse().unwrap(),
            agent_build: "0".repeat(64),
            driver: "simulated".to_owned(),
            vmm_version: "1".to_owned(),
            machine: "1".to_owned(),
            cpu: "max".to_owned(),
            cpu_features: Vec::new(),
            memory_mib: 512,
            vcpus: 1,
            runner: "0".to_owned(),
            arguments: "d".repeat(64),
            cmdline: "quiet".to_owned(),
            tsc_khz: 1,
        },
        taken_at: Timestamp::from_micros(0),
        memory: file.clone(),
        state: file,
    };
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let dir = home.join("snapshots").join(sha256(&bytes));
    std::fs::create_dir_all(&dir).unwrap();
    for (name, content) in [
        (MEMORY_FILE, &b"m"[..]),
        (STATE_FILE, b"s"),
        (MANIFEST_FILE, &bytes),
    ] {
        std::fs::write(dir.join(name), content).unwrap();
    }
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
