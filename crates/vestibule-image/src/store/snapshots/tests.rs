//! Snapshots as directories and locks: what is in a memory is nothing to the store.
use super::*;
use crate::{
    KEEP_UNPUBLISHED,
    store::tests::{add, alias, store, verified},
};
use vestibule_api::{
    machine::DriverChoice,
    snapshot::{Binding, SavedFile},
};

/// A snapshot as a runner leaves it, taken so many seconds after the beginning of time.
fn snapshot(store: &Store, image: &ImageDigest, memory_mib: u32, second: i64) -> SnapshotId {
    let directory = store.snapshots_dir().join("new");
    std::fs::create_dir(&directory).unwrap();
    let file = |name: &str, bytes| {
        let file = File::create(directory.join(name)).unwrap();
        file.set_len(bytes).unwrap();
        SavedFile {
            bytes,
            allocated_bytes: 0,
            sha256: "c".repeat(64),
        }
    };
    let manifest = SnapshotManifest {
        schema: SNAPSHOT_SCHEMA,
        binding: Binding {
            image_digest: image.clone(),
            agent_build: String::new(),
            driver: "qemu/tcg".to_owned(),
            vmm_version: "7.2".to_owned(),
            machine: String::new(),
            cpu: String::new(),
            cpu_features: Vec::new(),
            memory_mib,
            vcpus: 1,
            runner: String::new(),
            arguments: String::new(),
            cmdline: String::new(),
            tsc_khz: 1,
        },
        taken_at: Timestamp::from_micros(second * 1_000_000),
        memory: file(MEMORY_FILE, u64::from(memory_mib) << 20),
        state: file(STATE_FILE, 10),
    };
    let bytes = serde_json::to_vec(&manifest).unwrap();
    std::fs::write(directory.join(MANIFEST_FILE), &bytes).unwrap();
    let id = SnapshotId::try_from(digest::of(&bytes)).unwrap();
    std::fs::rename(&directory, store.snapshot_dir(&id)).unwrap();
    id
}

/// What a runner does for as long as its VM lives.
fn hold(store: &Store, id: &SnapshotId) -> File {
    let file = File::open(store.snapshot_dir(id).join(MANIFEST_FILE)).unwrap();
    file.lock_shared().unwrap();
    file
}

fn ids(views: &[SnapshotView]) -> Vec<SnapshotId> {
    views.iter().map(|view| view.id.clone()).collect()
}

#[test]
fn the_newest_that_fits_is_the_one_for_a_vm() {
    let (_home, store) = store();
    let (image, other) = (add(&store, "a"), add(&store, "b"));
    assert_eq!(
        store
            .snapshot_for(&image, 1, 1, DriverChoice::Auto)
            .unwrap(),
        None
    );
    let new = snapshot(&store, &image, 1, 20);
    snapshot(&store, &image, 1, 10);
    snapshot(&store, &image, 2, 30);
    snapshot(&store, &other, 1, 40);
    let found = store
        .snapshot_for(&image, 1, 1, DriverChoice::Auto)
        .unwrap()
        .unwrap();
    assert_eq!(found.id, new);
    assert_eq!(found.dir, store.snapshot_dir(&new));
    assert_eq!(
        store
            .snapshot_for(&image, 1, 2, DriverChoice::Auto)
            .unwrap(),
        None
    );
    assert_eq!(
        store
            .snapshot_for(&image, 3, 1, DriverChoice::Auto)
            .unwrap(),
        None
    );
}

#[test]
fn what_is_not_whole_is_not_offered() {
    let (_home, store) = store();
    let image = add(&store, "a");
    let old = snapshot(&store, &image, 1, 10);
    let best = || {
        store
            .snapshot_for(&image, 1, 1, DriverChoice::Auto)
            .unwrap()
            .unwrap()
            .id
    };
    type Damage = fn(&Utf8Path);
    let damages: [Damage; 4] = [
        |dir| std::fs::write(dir.join(MANIFEST_FILE), "{}").unwrap(),
        |dir| std::fs::remove_file(dir.join(MANIFEST_FILE)).unwrap(),
        |dir| std::fs::remove_file(dir.join(MEMORY_FILE)).unwrap(),
        |dir| std::fs::write(dir.join(STATE_FILE), "short").unwrap(),
    ];
    let mut damaged = Vec::new();
    for (damage, second) in damages.iter().zip(20..) {
        let new = snapshot(&store, &image, 1, second);
        assert_eq!(best(), new);
        damage(&store.snapshot_dir(&new));
        assert_eq!(best(), old);
        damaged.push(new);
    }
    assert_eq!(ids(&store.snapshots().unwrap()), [old]);
    let mut gone = store.gc(KEEP_UNPUBLISHED).unwrap().snapshots;
    gone.sort();
    damaged.sort();
    // The image went as well, being old and nobody's, and its snapshot with it.
    assert_eq!(gone.len(), damaged.len() + 1);
    assert!(damaged.iter().all(|id| gone.contains(id)));
}

#[test]
fn a_damaged_one_is_known_with_the_reason_and_hides_no_other() {
    let (_home, store) = store();
    let [image, other] = ["a", "b"].map(|name| {
        let image = verified(&store, name, true);
        store.publish(&image, &alias(name)).unwrap();
        image
    });
    let collected = |store: &Store| store.gc(KEEP_UNPUBLISHED).unwrap().snapshots;
    let of = |image| {
        store
            .snapshots_for(image, 1, 1, DriverChoice::Qemu)
            .unwrap()
    };
    type Damage = fn(&Utf8Path);
    let damages: [(Damage, &str, bool); 5] = [
        (
            |dir| std::fs::write(dir.join(MEMORY_FILE), "short").unwrap(),
            "its `memory` has 5 bytes, the manifest says 1048576",
            false,
        ),
        (
            |dir| std::fs::remove_file(dir.join(STATE_FILE)).unwrap(),
            "its `state` can't be read",
            false,
        ),
        (
            |dir| {
                let path = dir.join(MANIFEST_FILE);
                let text = std::fs::read_to_string(&path).unwrap();
                std::fs::write(path, text.replace("7.2", "7.3")).unwrap();
            },
            "its manifest is not what was written",
            false,
        ),
        // Then nobody knows whose it was.
        (
            |dir| std::fs::write(dir.join(MANIFEST_FILE), "{").unwrap(),
            "its manifest is not what was written",
            true,
        ),
        (
            |dir| std::fs::remove_file(dir.join(MANIFEST_FILE)).unwrap(),
            "its `snapshot.json` can't be read",
            true,
        ),
    ];
    for (damage, why, anybodys) in damages {
        let id = snapshot(&store, &image, 1, 10);
        damage(&store.snapshot_dir(&id));
        let found = of(&image);
        assert!(found.damaged[0].why.starts_with(why), "{found:?}");
        assert_eq!(found.ids().collect::<Vec<_>>(), [&id], "{why}");
        assert_eq!(of(&other).damaged.len(), usize::from(anybodys), "{why}");
        assert_eq!(collected(&store), [], "it is why VMs boot");
        let whole = snapshot(&store, &image, 1, 5);
        assert_eq!(of(&image).ids().collect::<Vec<_>>(), [&whole, &id]);
        let others = snapshot(&store, &other, 1, 5);
        assert_eq!(collected(&store), [id], "{why}");
        for id in [whole, others] {
            store.rm_snapshot(&id).unwrap();
        }
    }
}

#[test]
fn one_that_can_not_be_read_stays_and_the_others_are_found() {
    let (_home, store) = store();
    let image = verified(&store, "a", true);
    store.publish(&image, &alias("browser")).unwrap();
    let [unread, short, whole] = [30, 20, 10].map(|at| snapshot(&store, &image, 1, at));
    let path = store.snapshot_dir(&unread).join(MANIFEST_FILE);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    std::fs::write(store.snapshot_dir(&short).join(STATE_FILE), "").unwrap();
    assert_eq!(ids(&store.snapshots().unwrap()), [whole]);
    let gone = store.gc(KEEP_UNPUBLISHED).unwrap();
    assert_eq!(gone.snapshots, std::slice::from_ref(&short));
    assert!(path.exists());
}

#[test]
fn the_list_says_what_is_in_use_and_what_points_there() {
    let (_home, store) = store();
    let image = verified(&store, "a", true);
    store.publish(&image, &alias("browser")).unwrap();
    let (old, new) = (
        snapshot(&store, &image, 1, 10),
        snapshot(&store, &image, 1, 20),
    );
    let held = hold(&store, &old);
    let views = store.snapshots().unwrap();
    assert_eq!(ids(&views), [new.clone(), old.clone()]);
    assert_eq!(
        views.iter().map(|view| view.in_use).collect::<Vec<_>>(),
        [false, true]
    );
    assert_eq!(views[0].aliases, [alias("browser")]);
    assert_eq!(views[0].memory_bytes, 1 << 20);
    assert!(views[0].allocated_bytes < 64 << 10, "{views:?}");
    // Being listed is no use.
    drop(held);
    store.rm_snapshot(&old).unwrap();
    let image_view = store.list().unwrap().remove(0);
    let shown = image_view.snapshot.unwrap();
    assert_eq!((shown.id, shown.memory_mib), (new.clone(), 1));
    assert_eq!(ids(&store.inspect(&image).unwrap().snapshots), [new]);
}

#[test]
fn one_in_use_is_not_removed() {
    let (_home, store) = store();
    let image = add(&store, "a");
    let id = snapshot(&store, &image, 1, 10);
    assert_eq!(store.resolve_snapshot(&id.as_str()[..8]).unwrap(), id);
    assert!(matches!(
        store.resolve_snapshot(&id.as_str()[..7]),
        Err(StoreError::UnknownSnapshot { .. })
    ));
    let held = hold(&store, &id);
    let refused = store.rm_snapshot(&id).unwrap_err();
    assert!(refused.to_string().contains("in use by a VM"), "{refused}");
    assert!(matches!(
        store.rm(&image),
        Err(StoreError::SnapshotInUse { .. })
    ));
    assert_eq!(
        store.gc(KEEP_UNPUBLISHED).unwrap().in_use,
        std::slice::from_ref(&image)
    );
    assert!(
        store
            .snapshot_for(&image, 1, 1, DriverChoice::Auto)
            .unwrap()
            .is_some()
    );
    drop(held);
    assert_eq!(
        store.rm(&image).unwrap().snapshots,
        std::slice::from_ref(&id)
    );
    assert_eq!(store.snapshot_entries().unwrap(), Vec::<String>::new());
    assert!(matches!(
        store.rm_snapshot(&id),
        Err(StoreError::UnknownSnapshot { .. })
    ));
}

#[test]
fn gc_keeps_for_a_day_what_was_replaced_last() {
    let (_home, store) = store();
    let image = verified(&store, "a", true);
    store.publish(&image, &alias("browser")).unwrap();
    let now = Timestamp::now().as_micros() / 1_000_000;
    let [first, second, _] =
        [now - 90_000, now - 80_000, now - 60].map(|at| snapshot(&store, &image, 1, at));
    let month = Duration::from_hours(30 * 24);
    assert_eq!(store.gc(month).unwrap().snapshots, [first]);
    assert_eq!(store.gc(Duration::ZERO).unwrap().snapshots, [second]);
    let old = snapshot(&store, &image, 2, now - 90_000);
    snapshot(&store, &image, 2, now - 86_401);
    assert_eq!(store.gc(month).unwrap().snapshots, [old]);
}

#[test]
fn gc_keeps_the_newest_of_each_size_and_what_is_used() {
    let (_home, store) = store();
    let image = verified(&store, "a", true);
    store.publish(&image, &alias("browser")).unwrap();
    let [used, old, new, large] =
        [(1, 10), (1, 20), (1, 30), (2, 5)].map(|(mib, at)| snapshot(&store, &image, mib, at));
    let nobodys = snapshot(
        &store,
        &ImageDigest::try_from("d".repeat(64)).unwrap(),
        1,
        9,
    );
    let held = hold(&store, &used);
    let gone = store.gc(KEEP_UNPUBLISHED).unwrap();
    let mut removed = gone.snapshots.clone();
    removed.sort();
    let mut expected = vec![old, nobodys];
    expected.sort();
    assert_eq!(removed, expected);
    assert_eq!(gone.snapshots_in_use, std::slice::from_ref(&used));
    assert!(gone.to_string().contains("2 snapshots"), "{gone}");
    assert_eq!(
        ids(&store.snapshots().unwrap()),
        [new.clone(), used.clone(), large.clone()]
    );
    drop(held);
    assert_eq!(store.gc(KEEP_UNPUBLISHED).unwrap().snapshots, [used]);
    assert_eq!(ids(&store.snapshots().unwrap()), [new, large]);
}
