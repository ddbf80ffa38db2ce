//! The store's promises, on images without a root: the store never looks into one.
use super::*;
use camino_tempfile::{Utf8TempDir, tempdir};
use vestibule_api::ids::MachineId;

pub(super) fn store() -> (Utf8TempDir, Store) {
    let home = tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    (home, store)
}

/// Adds an image that differs from others by `name`.
pub(super) fn add(store: &Store, name: &str) -> ImageDigest {
    let manifest = serde_json::json!({
        "schema": 1, "recipe": name, "recipeDigest": "", "artifacts": {}, "kernelRelease": "6.1", "cmdline": "",
        "drivers": [], "minMemoryMib": 1, "defaultMemoryMib": 1, "defaultVcpus": 1, "requiredUnits": [],
        "features": [], "agentBuild": "", "packages": [], "tools": [], "files": {},
    });
    let from = store.home().join("new");
    std::fs::create_dir(&from).unwrap();
    std::fs::write(store.build_log(name).unwrap(), "log").unwrap();
    let bytes = serde_json::to_vec(&manifest).unwrap();
    std::fs::write(from.join("manifest.json"), &bytes).unwrap();
    let record = BuildRecord {
        // Long ago, for `gc`.
        built_at: Timestamp::from_micros(0),
        took_ms: 1,
        program: "test".to_owned(),
        phases: Vec::new(),
    };
    let digest = Store::digest(&bytes);
    assert!(
        !store
            .add(name, &digest::of(name.as_bytes()), &digest, &from, &record)
            .unwrap()
    );
    digest
}

pub(super) fn verified(store: &Store, name: &str, green: bool) -> ImageDigest {
    let digest = add(store, name);
    let report = Verification {
        digest: digest.clone(),
        green,
        at: Timestamp::now(),
        machine_id: MachineId::generate(),
        driver: "test".to_owned(),
        memory_mib: 1,
        vcpus: 1,
        timings: Vec::new(),
        units: Vec::new(),
        display: None,
        memory: vestibule_api::agent::MemoryReport::default(),
        agent_build: None,
        problems: if green {
            Vec::new()
        } else {
            vec!["it sulks".to_owned()]
        },
        finding: None,
        evidence: "/none".into(),
        sign_ins: Vec::new(),
    };
    store.attach(&report).unwrap();
    digest
}

pub(super) fn alias(name: &str) -> AliasName {
    name.parse().unwrap()
}

#[test]
fn only_a_green_image_is_published() {
    let (_home, store) = store();
    let (plain, red, green) = (
        add(&store, "plain"),
        verified(&store, "red", false),
        verified(&store, "green", true),
    );
    let browser = alias("browser");
    assert!(matches!(
        store.publish(&plain, &browser),
        Err(StoreError::Unverified { .. })
    ));
    let refused = store.publish(&red, &browser).unwrap_err().to_string();
    assert!(refused.contains("it sulks"), "{refused}");
    assert!(matches!(
        store.resolve("browser"),
        Err(StoreError::Unknown { .. })
    ));
    store.publish(&green, &browser).unwrap();
    assert_eq!(store.resolve("browser").unwrap(), green);
    assert_eq!(store.inspect(&green).unwrap().aliases, [browser]);
}

#[test]
fn a_rollback_goes_back_and_back_again_but_never_to_and_fro() {
    let (_home, store) = store();
    let images = ["a", "b", "c"].map(|name| verified(&store, name, true));
    let browser = alias("browser");
    for image in &images {
        store.publish(image, &browser).unwrap();
    }
    assert_eq!(store.rollback(&browser).unwrap(), images[1]);
    assert_eq!(store.rollback(&browser).unwrap(), images[0]);
    assert!(matches!(
        store.rollback(&browser),
        Err(StoreError::NoEarlier { .. })
    ));
    store.publish(&images[2], &browser).unwrap();
    assert_eq!(store.rollback(&browser).unwrap(), images[1]);
    let moves: Vec<bool> = store
        .history(&browser)
        .unwrap()
        .iter()
        .map(|entry| entry.rollback)
        .collect();
    assert_eq!(moves, [false, false, false, true, true, false, true]);
}

#[test]
fn an_image_in_use_stays() {
    let (_home, store) = store();
    let (held, aliased, free) = (
        add(&store, "held"),
        verified(&store, "aliased", true),
        add(&store, "free"),
    );
    store.publish(&aliased, &alias("browser")).unwrap();
    let hold = store.hold(&held).unwrap();
    assert!(matches!(store.rm(&held), Err(StoreError::InUse { .. })));
    assert!(matches!(
        store.rm(&aliased),
        Err(StoreError::Aliased { .. })
    ));
    let gone = store.gc(KEEP_UNPUBLISHED).unwrap();
    assert_eq!((gone.images, gone.in_use), (vec![free], vec![held.clone()]));
    drop(hold);
    store.rm(&held).unwrap();
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn what_a_rollback_needs_and_what_is_new_stays() {
    let (_home, store) = store();
    let images = ["a", "b", "c", "d"].map(|name| verified(&store, name, true));
    let (browser, next) = (alias("browser"), alias("next"));
    for image in &images[..3] {
        store.publish(image, &browser).unwrap();
    }
    store.publish(&images[3], &next).unwrap();
    let young = add(&store, "young");
    let path = store.dir(&young).join("build.json");
    let mut record: BuildRecord = read_json(&path).unwrap();
    record.built_at = Timestamp::now();
    write_json(&path, &record).unwrap();
    let gone = store.gc(KEEP_UNPUBLISHED).unwrap();
    assert_eq!(gone.images, [images[0].clone()]);
    assert_eq!(gone.rollback_targets, [images[1].clone()]);
    assert_eq!(gone.young, std::slice::from_ref(&young));
    assert!(gone.to_string().contains("--all"), "{gone}");
    assert_eq!(store.gc(Duration::ZERO).unwrap().images, [young]);
    assert_eq!(store.rollback(&browser).unwrap(), images[1]);
    // Back at the first one, the one that was rolled back from is nothing to go back to.
    assert_eq!(
        store.gc(Duration::ZERO).unwrap().images,
        [images[2].clone()]
    );
}

#[test]
fn whoever_is_first_makes_a_home_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempdir().unwrap();
    let home = dir.path().join("share/vestibule");
    Store::open(&home).unwrap();
    let mode = std::fs::metadata(&home).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn names_are_aliases_digests_or_beginnings_of_one() {
    let (_home, store) = store();
    let digest = add(&store, "a");
    assert_eq!(store.resolve(digest.as_str()).unwrap(), digest);
    assert_eq!(store.resolve(&digest.as_str()[..8]).unwrap(), digest);
    for name in ["", &digest.as_str()[..7], "browser", "../a"] {
        assert!(
            matches!(store.resolve(name), Err(StoreError::Unknown { .. })),
            "{name}"
        );
    }
}

#[test]
fn a_changed_manifest_is_damage() {
    let (_home, store) = store();
    let digest = add(&store, "a");
    let path = store.dir(&digest).join("manifest.json");
    let text = std::fs::read_to_string(&path)
        .unwrap()
        .replace("6.1", "6.2");
    std::fs::write(&path, text).unwrap();
    assert!(matches!(
        store.inspect(&digest),
        Err(StoreError::Damaged { .. })
    ));
}
