//! The Firecracker driver against a real Firecracker under its own seccomp filters, with guests of a few bytes of 64-bit
//! machine code. They need a `/dev/kvm` that creates VMs, and not one that can run Linux: an interpreting one (PVM) will do.
//!
//! `script/lib.sh` puts the program into `target/tools` (`need_firecracker`); `VESTIBULE_FIRECRACKER` names another one. Where
//! there is none, or no `/dev/kvm`, a test prints why and does nothing.
mod kernel;
mod life;

use crate::support::soon;
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use kernel::{PAGE, Then, WORDS, kernel};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs::File,
    os::{
        fd::AsRawFd as _,
        unix::{fs::FileExt as _, net::UnixListener},
    },
    sync::Arc,
    time::Duration,
};
use vestibule_api::{
    ids::MachineId,
    machine::{Exit, MemoryBackend, RestoreSpec},
    mux::StreamKey,
    snapshot::SnapshotManifest,
};
use vestibule_vm::{
    config_drive,
    driver::{Capabilities, Driver, Launch, LaunchError, Memory, ProbeError, Restored},
    evidence::Bundle,
    firecracker::{
        FirecrackerDriver, PROGRAM_VARIABLE,
        api::{Api, ApiError},
        request::{self, BackendType, Restore},
        version::Version,
    },
    kvm,
    log::BoundedLog,
    process::{Child, Program},
    snapshot::{self, Snapshot},
};

const MEMORY_MIB: u32 = 32;

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
            standing: None,
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
    let load = request::restore(newest.features(), &restore);
    let err = api.send(&load).await.unwrap_err();
    assert!(
        matches!(&err, ApiError::Refused { fault, .. } if fault.contains("vsock_override")),
        "{err}"
    );
    // Firecracker fact 5: before 1.14 a file for metrics that is not there is an error, so the driver makes it.
    let metrics = request::metrics();
    let made = dir.path().join(request::METRICS);
    if api.version().await.unwrap() < Version::new(1, 14, 0) {
        assert!(!made.exists() && api.send(&metrics).await.is_err());
    }
    File::create(&made).unwrap();
    api.send(&metrics).await.unwrap();
}
