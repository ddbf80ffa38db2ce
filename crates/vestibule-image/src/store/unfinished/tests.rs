//! Leftovers, and the locks that tell them from work.
use super::*;
use crate::{
    KEEP_UNPUBLISHED,
    store::tests::{add, store},
};

fn begin(store: &Store) -> Unfinished {
    let begun = store.begin_snapshot(MachineId::generate()).unwrap();
    std::fs::create_dir(begun.path()).unwrap();
    std::fs::write(begun.path().join("memory"), vec![7; 64 << 10]).unwrap();
    begun
}

/// As if the process were killed: nothing is dropped, the locks are gone.
fn kill(begun: Unfinished) -> Utf8PathBuf {
    let path = begun.path.clone();
    rustix::fs::flock(&begun.log, rustix::fs::FlockOperation::Unlock).unwrap();
    std::mem::forget(begun);
    path
}

#[test]
fn what_is_being_taken_stays_and_what_was_left_goes() {
    let (_home, store) = store();
    let working = begin(&store);
    let killed = kill(begin(&store));
    // A log alone, a directory alone, and a removal that was cut off.
    let log_alone = kill(store.begin_snapshot(MachineId::generate()).unwrap());
    for name in [".unfinished-x", ".gone-y"] {
        std::fs::create_dir(store.snapshots_dir().join(name)).unwrap();
    }
    // The VM's own directory, with what its killed runner wrote.
    let machine = killed.file_name().unwrap().trim_start_matches(UNFINISHED);
    let of_machine = |part| store.home().join(part).join(machine);
    for part in ["vms", "evidence"] {
        std::fs::create_dir_all(of_machine(part)).unwrap();
    }
    std::fs::write(of_machine("vms").join("serial.log"), "last words").unwrap();
    let gone = store.gc(KEEP_UNPUBLISHED).unwrap();
    assert!(!of_machine("vms").exists() && store.home().join("vms").exists());
    assert!(of_machine("evidence").join("serial.log").exists());
    assert_eq!(gone.unfinished_snapshots, 4);
    assert!(gone.freed_bytes >= 64 << 10, "{gone:?}");
    assert!(!killed.exists() && !log_alone.exists());
    assert!(working.path().exists());
    assert_eq!(store.snapshot_entries().unwrap().len(), 2);
    drop(working);
    assert_eq!(store.snapshot_entries().unwrap(), Vec::<String>::new());
}

#[test]
fn what_is_dropped_leaves_nothing() {
    let (_home, store) = store();
    drop(begin(&store));
    assert_eq!(store.snapshot_entries().unwrap(), Vec::<String>::new());
}

#[test]
fn one_snapshot_of_an_image_and_size_at_a_time() {
    let (_home, store) = store();
    let image = add(&store, "a");
    let turn = store.snapshot_turn(&image, (256, 1)).unwrap();
    let refused = store
        .snapshot_turn(&image, (256, 1))
        .unwrap_err()
        .to_string();
    assert!(refused.contains("256 MiB and 1 CPU"), "{refused}");
    assert!(
        refused.contains(&std::process::id().to_string()),
        "{refused}"
    );
    store.snapshot_turn(&image, (512, 1)).unwrap();
    drop(turn);
    store.snapshot_turn(&image, (256, 1)).unwrap();
}
