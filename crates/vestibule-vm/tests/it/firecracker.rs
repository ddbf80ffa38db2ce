//! The Firecracker driver against a real Firecracker under its own seccomp filters, with guests of a few bytes of 64-bit
//! machine code. They need a `/dev/kvm` that creates VMs, and not one that can run Linux: an interpreting one (PVM) will do.
//!
//! `script/lib.sh` puts the program into `target/tools` (`need_firecracker`); `VESTIBULE_FIRECRACKER` names another one. Where
//! there is none, or no `/dev/kvm`, a test prints why and does nothing.
mod kernel;

use crate::support::{gone, soon};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use kernel::{PAGE, Then, WORDS, kernel};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::File,
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{FileExt as _, MetadataExt as _},
            net::UnixListener,
        },
    },
    sync::Arc,
    time::{Duration, Instant},
};
use vestibule_api::{
    ids::MachineId,
    machine::{Exit, JailSpec, MemoryBackend, RestoreSpec},
    mux::StreamKey,
    snapshot::SnapshotManifest,
};
use vestibule_vm::{
    config_drive,
    driver::{Capabilities, Driver, Launch, LaunchError, Machine, Memory, ProbeError, Restored},
    evidence::Bundle,
    firecracker::{
        FirecrackerDriver, PROGRAM_VARIABLE,
        api::{Api, ApiError},
        request::{self, BackendType, Restore},
        version::Version,
    },
    jail::{self, Jail},
    kvm,
    log::BoundedLog,
    process::{Child, Program},
    snapshot::{self, Snapshot},
};

const MEMORY_MIB: u32 = 32;
/// A whole life may take so long; it takes a second, or two beside a build.
const LIFE: Duration = Duration::from_secs(10);

/// What the tests run; none, with a printed reason, where that is not possible here.
fn firecracker() -> Option<(FirecrackerDriver, Capabilities)> {
    let beside = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/firecracker");
    let installed = beside.join("firecracker");
    let program = match std::env::var(PROGRAM_VARIABLE) {
        Ok(program) => Utf8PathBuf::from(program),
        Err(_) if installed.is_file() => installed,
        Err(_) => {
            println!("skipped: there is no `{installed}`, and {PROGRAM_VARIABLE} names none");
            return None;
        }
    };
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(err) = kvm {
        println!("skipped: open /dev/kvm: {err}");
        return None;
    }
    let driver = FirecrackerDriver::at(program).unwrap();
    // The driver's own probe refuses a KVM that cannot run Linux, which is what these guests do without.
    let capabilities = FirecrackerDriver::capabilities(&driver.installed().unwrap(), &kvm::probe());
    println!("{} {}", capabilities.driver, capabilities.version);
    Some((driver, capabilities))
}

/// A place for VMs of one kernel.
struct Place {
    home: Utf8TempDir,
}

impl Place {
    fn new(kernel: &[u8]) -> Self {
        let home = camino_tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(home.path().join(name), bytes);
        write("vmlinux", kernel).unwrap();
        write("initrd", b"none").unwrap();
        write("root.ext4", &[0; 1 << 20]).unwrap();
        Self { home }
    }

    /// In a directory whose path is longer than a socket's may be.
    fn launch(&self, memory: Memory) -> Launch {
        let machine_id = MachineId::generate();
        let vm_dir = self
            .home
            .path()
            .join("d".repeat(120))
            .join(machine_id.to_string());
        std::fs::create_dir_all(&vm_dir).unwrap();
        let log = |name: &str| BoundedLog::create(&vm_dir.join(name), 64 << 10).unwrap();
        Launch {
            machine_id,
            memory_mib: MEMORY_MIB,
            vcpus: 1,
            root: self.home.path().join("root.ext4"),
            kernel: self.home.path().join("vmlinuz"),
            vmlinux: Some(self.home.path().join("vmlinux")),
            initrd: self.home.path().join("initrd"),
            spawned: Default::default(),
            jail: None,
            cmdline: String::from("quiet"),
            config: config_drive::make(machine_id, 1, &StreamKey::generate()).unwrap(),
            image_digest: "0".repeat(64).parse().unwrap(),
            agent_build: String::new(),
            memory,
            console: log("serial.log"),
            vmm_log: log("vmm.log"),
            vm_dir,
        }
    }
}

fn text(log: &BoundedLog) -> String {
    String::from_utf8(log.render().unwrap()).unwrap()
}

/// Waits until the console has so many bytes more than `before`; returns all of it.
async fn more(console: &Arc<BoundedLog>, before: u64, bytes: u64) -> String {
    let mut progress = console.progress();
    soon(progress.wait_for(|progress| progress.total >= before + bytes))
        .await
        .unwrap();
    text(console)
}

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
            Self::Jailer => assert_jailed(launched, others),
        }
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
        launch.jail = apart.jail();
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

fn restored(spec: &RestoreSpec, backend: MemoryBackend) -> Memory {
    let snapshot = Snapshot::open(spec).unwrap();
    Memory::Restored(Box::new(Restored {
        manifest: snapshot.manifest,
        memory: snapshot.memory,
        state: snapshot.state,
        backend,
    }))
}

#[tokio::test]
async fn a_guest_that_resets_ends_the_vmm() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    let place = Place::new(&kernel(Then::Reset));
    let launch = place.launch(Memory::Own);
    let console = Arc::clone(&launch.console);
    let machine = soon(driver.launch(&capabilities, launch)).await.unwrap();
    // Firecracker fact 22.
    let exit = soon(machine.wait()).await;
    assert_eq!((exit.code, exit.signal), (Some(0), None));
    soon(console.progress().wait_for(|progress| progress.ended))
        .await
        .unwrap();
    assert_eq!(text(&console), WORDS);
    assert!(machine.binding().is_none());
}

#[tokio::test]
async fn a_vmm_ends_with_its_handle() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    let place = Place::new(&kernel(Then::Count));
    let launch = place.launch(Memory::Own);
    // What a VM of the same directory would have left (Firecracker fact 9).
    let directory = launch.vm_dir.join("firecracker");
    std::fs::create_dir(&directory).unwrap();
    let open = File::open(&directory).unwrap();
    for name in ["api.sock", "stream.sock", "stream.sock_1025"] {
        let path = format!("/proc/self/fd/{}/{name}", open.as_raw_fd());
        drop(UnixListener::bind(path).unwrap());
    }
    let machine = soon(driver.launch(&capabilities, launch)).await.unwrap();
    let ended = machine.wait();
    drop(machine);
    let exit: Exit = soon(ended).await;
    assert_eq!(exit.signal, Some(9));
}

/// The VMM's directory is the VMM's: what it makes of the file that its counters are in keeps nobody from ending it.
#[tokio::test]
async fn a_stop_waits_for_nothing_that_the_vmm_made() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    let place = Place::new(&kernel(Then::Count));
    let launch = place.launch(Memory::Own);
    let metrics = launch.vm_dir.join("firecracker").join(request::METRICS);
    let machine = soon(driver.launch(&capabilities, launch)).await.unwrap();
    std::fs::remove_file(&metrics).unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        metrics.as_std_path(),
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .unwrap();
    let evidence = Bundle::open(&place.home.path().join("evidence"));
    let (exit, _) = soon(machine.stop(evidence)).await;
    assert_eq!(exit.signal, Some(9));
}

/// It writes them every minute; the last minute's alone are lost.
#[tokio::test]
async fn the_counters_of_a_vmm_that_died_are_kept() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    let place = Place::new(&kernel(Then::Count));
    let launch = place.launch(Memory::Own);
    let vmm_log = Arc::clone(&launch.vmm_log);
    let metrics = launch.vm_dir.join("firecracker").join(request::METRICS);
    let machine = soon(driver.launch(&capabilities, launch)).await.unwrap();
    std::fs::write(metrics, "{\"vcpu\":{\"failures\":3}}\n").unwrap();
    let vmm = Pid::from_raw(machine.pid().try_into().unwrap()).unwrap();
    kill_process(vmm, Signal::KILL).unwrap();
    soon(machine.wait()).await;
    let evidence = Bundle::open(&place.home.path().join("evidence"));
    let (exit, _) = soon(machine.stop(evidence)).await;
    assert_eq!(exit.signal, Some(9));
    let said = text(&vmm_log);
    assert!(said.contains("vcpu.failures 3"), "{said}");
}

#[tokio::test]
async fn what_is_no_kernel_is_refused_in_firecrackers_words() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    // As a bzImage begins.
    let mut image = b"MZ".to_vec();
    image.resize(PAGE, 0);
    let place = Place::new(&image);
    let launch = place.launch(Memory::Own);
    let vmm_log = Arc::clone(&launch.vmm_log);
    let err = soon(driver.launch(&capabilities, launch))
        .await
        .map(drop)
        .unwrap_err();
    // Firecracker fact 2: not at `PUT /boot-source`.
    let words = vestibule_api::error::Chain(&err).to_string();
    assert!(
        words.contains("PUT /actions") && words.contains("magic number"),
        "{words}"
    );
    // Firecracker fact 3: it may be alive after that, and is ended all the same.
    soon(vmm_log.progress().wait_for(|progress| progress.ended))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_snapshot_that_does_not_fit_is_refused_before_and_a_damaged_one_after() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    let place = Place::new(&kernel(Then::Count));
    let saved = place.home.path().join("snapshot");
    std::fs::create_dir(&saved).unwrap();
    let memory = snapshot::make_memory(&saved, MEMORY_MIB).unwrap();
    let launch = place.launch(Memory::Shared(memory));
    let machine = soon(driver.launch(&capabilities, launch)).await.unwrap();
    let binding = machine.binding().unwrap().clone();
    machine
        .save(snapshot::make_state(&saved).unwrap())
        .await
        .unwrap();
    let sealed = snapshot::seal(&saved, binding).unwrap();
    let spec = RestoreSpec {
        id: sealed.id,
        dir: saved.to_string(),
    };
    // Firecracker fact 14: said in words, before a process is started.
    type Change = fn(&mut SnapshotManifest);
    let changes: [(&str, Change); 3] = [
        ("VMM version: the snapshot has 1.2.3", |m| {
            m.binding.vmm_version = "1.2.3".into();
        }),
        ("machine type: the snapshot has mmio, state v0.0.0", |m| {
            m.binding.machine = "mmio, state v0.0.0".into();
        }),
        ("kernel command line", |m| m.binding.cmdline = "loud".into()),
    ];
    for (words, change) in changes {
        let Memory::Restored(mut other) = restored(&spec, MemoryBackend::File) else {
            unreachable!("it is restored");
        };
        change(&mut other.manifest);
        let launch = place.launch(Memory::Restored(other));
        let directory = launch.vm_dir.join("firecracker");
        let err = soon(driver.launch(&capabilities, launch))
            .await
            .map(drop)
            .unwrap_err();
        assert!(matches!(err, LaunchError::Mismatch(_)), "{err}");
        assert!(err.to_string().contains(words), "{err}");
        assert!(!directory.exists());
    }
    // Firecracker fact 3: the process ends by itself.
    let memory = restored(&spec, MemoryBackend::File);
    let state = File::options()
        .write(true)
        .open(saved.join("state"))
        .unwrap();
    state.write_all_at(&[0xff; 64], 64).unwrap();
    let launch = place.launch(memory);
    let vmm_log = Arc::clone(&launch.vmm_log);
    let err = soon(driver.launch(&capabilities, launch))
        .await
        .map(drop)
        .unwrap_err();
    assert!(matches!(err, LaunchError::Load(_)), "{err}");
    let words = vestibule_api::error::Chain(&err).to_string();
    assert!(
        words.contains("PUT /snapshot/load") && words.contains("400"),
        "{words}"
    );
    soon(vmm_log.progress().wait_for(|progress| progress.ended))
        .await
        .unwrap();
}

#[tokio::test]
async fn the_probe_trusts_no_kvm_that_runs_no_guest() {
    let Some((driver, capabilities)) = firecracker() else {
        return;
    };
    match (kvm::probe().usable(), soon(driver.probe()).await) {
        (true, probed) => assert_eq!(probed.unwrap().version, capabilities.version),
        (false, Ok(_)) => panic!("a KVM that cannot run Linux was taken for one that can"),
        (false, Err(err)) => {
            assert!(matches!(err, ProbeError::Kvm { .. }), "{err}");
            println!("{err}");
        }
    }
}

/// A Firecracker without a VM.
async fn bare(driver: &FirecrackerDriver, directory: &Utf8Path) -> (Child, Api) {
    let null = || File::options().write(true).open("/dev/null").unwrap();
    let program = Program {
        confinement: Default::default(),
        path: driver.program().to_owned(),
        args: vec!["--api-sock".into(), "api.sock".into()],
        directory: directory.to_owned(),
        stdout: Some(null().into()),
        stderr: null().into(),
        inherit: Vec::new(),
    };
    let child = program.spawn().await.unwrap();
    let api = Api::new(directory.join("api.sock"));
    soon(async {
        while api.version().await.is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    (child, api)
}

/// The contract test's other half: that Firecracker really denies what its document does not list, and says so.
#[tokio::test]
async fn a_field_that_a_version_does_not_know_is_refused_by_it() {
    let Some((driver, _)) = firecracker() else {
        return;
    };
    let newest = Version::new(1, 16, 1);
    let dir = camino_tempfile::tempdir().unwrap();
    let (_child, api) = bare(&driver, dir.path()).await;
    if api.version().await.unwrap() >= Version::new(1, 16, 0) {
        println!("skipped: this Firecracker knows every field that the driver does");
        return;
    }
    let restore = Restore {
        state: "state".into(),
        memory: request::MemoryBackend {
            backend_type: BackendType::File,
            backend_path: "memory".into(),
        },
    };
    let requests = request::restore(newest.features(), &restore);
    let err = api.send(requests.last().unwrap()).await.unwrap_err();
    assert!(
        matches!(&err, ApiError::Refused { fault, .. } if fault.contains("vsock_override")),
        "{err}"
    );
    // Firecracker fact 5: before 1.14 a file for metrics that is not there is an error, so the driver makes it.
    let metrics = request::boot(&request::Boot {
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        cmdline: String::new(),
    })
    .remove(0);
    let made = dir.path().join(request::METRICS);
    if api.version().await.unwrap() < Version::new(1, 14, 0) {
        assert!(!made.exists() && api.send(&metrics).await.is_err());
    }
    File::create(&made).unwrap();
    api.send(&metrics).await.unwrap();
}
