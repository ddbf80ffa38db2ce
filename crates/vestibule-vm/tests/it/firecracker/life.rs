//! One VM's whole life, in each way in which it can be kept apart.
use super::{
    MEMORY_MIB, Place, firecracker,
    kernel::{Then, WORDS, kernel},
    more, restored, text,
};
use crate::support::{gone, soon};
use std::{
    os::unix::fs::MetadataExt as _,
    sync::Arc,
    time::{Duration, Instant},
};
use vestibule_api::{
    machine::{DriverChoice, JailSpec, MemoryBackend, RestoreSpec},
    standby::Preparation,
};
use vestibule_vm::{
    driver::{Capabilities, Driver as _, Launch, Machine, Memory},
    firecracker::FirecrackerDriver,
    jail::{self, Jail},
    snapshot::{self, Snapshot},
};

/// A whole life may take so long; it takes a second, or two beside a build.
const LIFE: Duration = Duration::from_secs(10);

/// The letters of a console, in order from `first` on and with none missing.
fn assert_letters(letters: &str, first: u8) {
    let mut expected = first;
    for letter in letters.bytes() {
        assert_eq!(letter, expected, "{letters}");
        expected = next(letter);
    }
}

fn next(letter: u8) -> u8 {
    if letter == b'z' { b'a' } else { letter + 1 }
}

/// `Seccomp: 2` (proc(5)) in every thread.
fn assert_filtered(pid: u32) {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let filters: Vec<_> = tasks
        .map(|task| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line = status.lines().find(|line| line.starts_with("Seccomp:"));
            line.unwrap().to_owned()
        })
        .collect();
    assert!(filters.len() >= 3, "{filters:?}");
    assert!(
        filters.iter().all(|line| line == "Seccomp:\t2"),
        "{filters:?}"
    );
}

#[tokio::test]
async fn start_pause_save_restore_twice_and_end() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    life(&driver, &capabilities, Apart::Nothing).await;
}

#[tokio::test]
async fn the_same_in_jails() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    if !jail::is_root() || driver.jailer().is_none() {
        println!("skipped: only root can jail, with a `jailer` beside Firecracker");
        return;
    }
    life(&driver, &capabilities, Apart::Jailer).await;
    println!("by VMMs that stood by:");
    life(&driver, &capabilities, Apart::Standing).await;
}

/// As the package installs it, and wherever there is no jailer.
#[tokio::test]
async fn the_same_under_landlock() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    life(&driver.without_jailer(), &capabilities, Apart::Landlock).await;
}

/// What VMs are kept apart by.
#[derive(Clone, Copy, PartialEq)]
enum Apart {
    Nothing,
    Landlock,
    Jailer,
    /// The same, and VMMs that were started before there was a VM for them.
    Standing,
}

impl Apart {
    fn jail(self) -> Option<Arc<Jail>> {
        let make = || Jail::make(JailSpec::default(), MEMORY_MIB + 128, 1).unwrap();
        (self != Self::Nothing).then(|| Arc::new(make()))
    }

    fn assert(self, launched: &Launched, others: &[Launched]) {
        match self {
            Self::Nothing => {}
            Self::Landlock => assert_confined(launched),
            Self::Jailer | Self::Standing => assert_jailed(launched, others),
        }
    }

    /// What a copy has of it.
    async fn of_copy(
        self,
        driver: &FirecrackerDriver,
        capabilities: &Capabilities,
        launch: &mut Launch,
    ) {
        if self != Self::Standing {
            launch.jail = self.jail();
            return;
        }
        let preparation = Preparation {
            directory: launch.vm_dir.with_file_name("standby").into_string(),
            driver: DriverChoice::Firecracker,
            jail: JailSpec::default(),
            cache_dir: None,
        };
        let standing = driver.stand_by(capabilities, &preparation).await.unwrap();
        let mut standing = standing.unwrap();
        standing.move_to(&launch.vm_dir).unwrap();
        launch.jail = Some(Arc::clone(standing.jail()));
        standing.jail().limit(MEMORY_MIB + 128, 1).unwrap();
        launch.standing = Some(standing);
    }
}

/// Without a jailer a VMM gets no privileges, and has none.
fn assert_confined(launched: &Launched) {
    let pid = launched.machine.pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let has = |line: &str| assert!(status.contains(line), "{line}: {status}");
    has("NoNewPrivs:\t1");
    has("CapEff:\t0000000000000000");
    has("CapPrm:\t0000000000000000");
}

/// A jailed VMM has a user, a root and namespaces that no other process has, and no capability.
fn assert_jailed(launched: &Launched, others: &[Launched]) {
    let uid = launched.uid.unwrap();
    let pid = launched.machine.pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let has = |line: String| assert!(status.contains(&line), "{line}: {status}");
    has(format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"));
    has(format!("Gid:\t{uid}\t{uid}\t{uid}\t{uid}"));
    has(String::from("CapEff:\t0000000000000000"));
    for name in ["mnt", "net", "pid", "ipc", "uts"] {
        let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        assert_ne!(of(pid), of(std::process::id()), "{name}");
        assert!(
            others
                .iter()
                .all(|other| of(other.machine.pid()) != of(pid))
        );
    }
    assert!(others.iter().all(|other| other.uid != Some(uid)));
    let mut names: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/root"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    println!("the jail has {names:?}");
    assert!(
        !names
            .iter()
            .any(|name| ["etc", "proc", "tmp", "usr", "work"].contains(&name.as_str()))
    );
    // Nothing of it can grow: it makes no file where it is, and what it has is only so long.
    for name in ["", "dev", "dev/net", "run"] {
        let meta = std::fs::metadata(format!("/proc/{pid}/root/{name}")).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o755), "{name}");
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let longest = limits
        .lines()
        .find(|line| line.starts_with("Max file size"));
    assert!(longest.unwrap().contains(" 1073741824 "), "{limits}");
    let devices = std::fs::read_dir(format!("/proc/{pid}/root/dev"))
        .unwrap()
        .count();
    assert!(devices <= 4, "{devices}");
}

/// A VM under test.
struct Launched {
    machine: Arc<dyn Machine>,
    uid: Option<u32>,
    /// Held for as long as the VM lives.
    _jail: Option<Arc<Jail>>,
}

async fn life(driver: &FirecrackerDriver, capabilities: &Capabilities, apart: Apart) {
    let begun = Instant::now();
    let place = Place::new(&kernel(Then::Count));
    let saved = place.home.path().join("snapshot");
    std::fs::create_dir(&saved).unwrap();
    let memory = snapshot::make_memory(&saved, MEMORY_MIB).unwrap();
    let mut launch = place.launch(Memory::Shared(memory));
    launch.jail = apart.jail();
    let held = launch.jail.clone();
    let uid = launch.jail.as_ref().and_then(|jail| jail.uid());
    let (console, vmm_log) = (Arc::clone(&launch.console), Arc::clone(&launch.vmm_log));
    let launched = soon(driver.launch(capabilities, launch)).await;
    let machine = launched.unwrap_or_else(|err| panic!("{err:?}: {}", text(&vmm_log)));
    println!("started after {:?}", begun.elapsed());
    let first = Launched {
        machine,
        uid,
        _jail: held,
    };
    apart.assert(&first, &[]);
    let machine = first.machine;
    // The console has the guest's words from the first byte, and none of the VMM's.
    let said = more(&console, 0, WORDS.len() as u64 + 3).await;
    assert_letters(said.strip_prefix(WORDS).unwrap(), b'a');
    assert!(text(&vmm_log).contains("Running Firecracker v"));
    assert_filtered(machine.pid());

    machine.pause().await.unwrap();
    // What was written before the pause may still be on its way.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let paused = console.progress().borrow().total;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(console.progress().borrow().total, paused);
    machine.resume().await.unwrap();
    more(&console, paused, 3).await;

    let binding = machine.binding().unwrap().clone();
    let state = snapshot::make_state(&saved).unwrap();
    let begun_save = Instant::now();
    machine.save(state).await.unwrap();
    println!("saved after {:?}", begun_save.elapsed());
    // The VMM ends with the save, and only then is the console whole.
    gone(machine.pid()).await;
    soon(console.progress().wait_for(|progress| progress.ended))
        .await
        .unwrap();
    let said = text(&console);
    let letters = said.strip_prefix(WORDS).unwrap();
    assert_letters(letters, b'a');
    let last = letters.bytes().last().unwrap();
    let sealed = snapshot::seal(&saved, binding).unwrap();
    let spec = RestoreSpec {
        id: sealed.id,
        dir: saved.to_string(),
    };

    // Copies at once go on where it was, each in memory of its own, wherever that comes from.
    let mut copies = Vec::new();
    for backend in [
        MemoryBackend::File,
        MemoryBackend::Uffd,
        MemoryBackend::Uffd,
    ] {
        let mut launch = place.launch(restored(&spec, backend));
        apart.of_copy(driver, capabilities, &mut launch).await;
        let held = launch.jail.clone();
        let uid = launch.jail.as_ref().and_then(|jail| jail.uid());
        let console = Arc::clone(&launch.console);
        let begun = Instant::now();
        let machine = soon(driver.launch(capabilities, launch)).await.unwrap();
        println!("loaded after {:?}", begun.elapsed());
        // Its CPUs wait (Firecracker fact 12: loading is not resuming).
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(console.progress().borrow().total, 0);
        machine.resume().await.unwrap();
        let said = more(&console, 0, 5).await;
        assert_letters(&said, next(last));
        assert_filtered(machine.pid());
        let launched = Launched {
            machine,
            uid,
            _jail: held,
        };
        apart.assert(&launched, &copies);
        copies.push(launched);
    }
    drop(copies);
    // The memory's file is as it was: every byte is read again, since the note of the last time is gone.
    std::fs::remove_file(saved.join(snapshot::VERIFIED_FILE)).unwrap();
    Snapshot::open(&spec).unwrap();
    println!("all of it after {:?}", begun.elapsed());
    assert!(begun.elapsed() < LIFE, "{:?}", begun.elapsed());
}
