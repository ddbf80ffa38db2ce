//! Snapshots of a real guest: the image in `VESTIBULE_TEST_IMAGE` boots once, is saved, and everything else is restored.
use crate::{
    guest::{exec, place},
    inherited, profile,
    support::{Place, Running, gone, soon, tree},
};
use camino::{Utf8Path, Utf8PathBuf};
use hyper::Method;
use std::{
    collections::BTreeSet,
    fs::File,
    time::{Duration, Instant},
};
use vestibule_api::{
    cause::Cause,
    client::CallError,
    egress::EgressPolicy,
    finding::Finding,
    ids::SnapshotId,
    machine::{
        Claim, Exit, MachineState, MachineView, MemoryBackend, RestoreSpec, RunnerEventKind, Saved,
    },
    mux::{Side, StreamKey, host_handshake, start},
    snapshot::{MANIFEST_FILE, MEMORY_FILE},
    stream::Open,
    time::Timestamp,
};
use vestibule_testkit::clock;
use vestibule_vm::{
    config_drive,
    driver::{Driver, Launch, Memory, Restored},
    log::BoundedLog,
    qemu::QemuDriver,
    snapshot::Snapshot,
};

/// The golden's clock is so far behind.
const OLD_DAYS: i64 = 7;
const SAVING: Duration = Duration::from_secs(300);

fn at_home() -> Place {
    place(EgressPolicy::default())
}

async fn save(runner: &Running) -> Result<Saved, CallError> {
    let call = runner.client.call(Method::POST, "/snapshot", None::<&()>);
    tokio::time::timeout(SAVING, call)
        .await
        .expect("the save took too long")
}

/// Boots, makes the clock old, saves.
async fn golden(home: &Utf8Path) -> RestoreSpec {
    golden_within(home, 240).await
}

pub(crate) async fn golden_within(home: &Utf8Path, deadline_s: u32) -> RestoreSpec {
    if let Some(kept) = kept() {
        return kept;
    }
    let mut place = at_home();
    place.spec.boot_deadline_s = deadline_s;
    let dir = kept_dir().unwrap_or_else(|| home.join("unfinished"));
    place.spec.save_to = Some(dir.to_string());
    let runner = place.start().await;
    runner.state(MachineState::Up).await;
    let old = exec(&runner, &format!("date -s '-{OLD_DAYS} days'")).await;
    assert_eq!(old.code, Some(0), "{old:?}");
    let begun = Instant::now();
    let saved = save(&runner).await.unwrap();
    println!(
        "save: {:.1} s; memory {} MiB of {} MiB, state {} KiB",
        begun.elapsed().as_secs_f64(),
        saved.manifest.memory.allocated_bytes >> 20,
        saved.manifest.memory.bytes >> 20,
        saved.manifest.state.bytes >> 10,
    );
    runner.ended().await;
    assert!(!Utf8Path::new(&place.spec.vm_dir).exists());
    assert!(saved.manifest.memory.allocated_bytes * 2 < saved.manifest.memory.bytes);
    RestoreSpec {
        id: saved.id,
        dir: dir.into_string(),
    }
}

/// Where a golden is kept from one run of the tests to the next, for whoever works on them.
fn kept_dir() -> Option<Utf8PathBuf> {
    std::env::var("VESTIBULE_TEST_SNAPSHOT")
        .ok()
        .map(Into::into)
}

fn kept() -> Option<RestoreSpec> {
    let dir = kept_dir()?;
    let manifest = std::fs::read(dir.join(MANIFEST_FILE)).ok()?;
    Some(RestoreSpec {
        id: id_of(&manifest),
        dir: dir.into_string(),
    })
}

pub(crate) fn restored(from: &RestoreSpec) -> Place {
    let mut place = at_home();
    place.spec.restore = Some(from.clone());
    place
}

/// How far the guest's clock is off, in ms.
pub(crate) async fn clock_error_ms(runner: &Running) -> f64 {
    clock::error_ms(&runner.client).await.unwrap()
}

/// What must be a VM's own.
pub(crate) async fn identity(runner: &Running) -> Vec<String> {
    let script = "cat /etc/machine-id; hostname; cat /etc/hostname; cat /proc/sys/kernel/random/boot_id; \
                  head -c 1024 /dev/urandom | sha256sum; \
                  for n in {1..300}; do [ $(ls /run/log/journal | wc -l) = 1 ] && break; sleep .1; done; \
                  ls /run/log/journal";
    let reply = exec(runner, script).await;
    let lines: Vec<_> = reply.stdout.lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 6, "{reply:?}");
    assert_eq!(lines[1], lines[2]);
    // The journal is the new machine's, and only its.
    assert_eq!(lines[0], lines[5]);
    lines
}

async fn failure(place: &Place) -> Finding {
    let runner = place.start().await;
    let finding = runner
        .event(|event| match event {
            RunnerEventKind::Failed { finding } => Some(finding.clone()),
            RunnerEventKind::Ended { .. } => panic!("it did not fail"),
            _ => None,
        })
        .await;
    runner.ended().await;
    assert!(!Utf8Path::new(&place.spec.vm_dir).exists());
    finding
}

pub(crate) fn digest(from: &RestoreSpec) -> String {
    let file = File::open(Utf8Path::new(&from.dir).join(MEMORY_FILE)).unwrap();
    vestibule_vm::snapshot::digest(&file).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real image: set VESTIBULE_TEST_IMAGE, run with --ignored"]
async fn another_key_is_refused() {
    let home = camino_tempfile::tempdir().unwrap();
    other_key(&golden(home.path()).await).await;
}

async fn claimed(runner: &Running) {
    let claim = Claim {
        session_id: vestibule_api::ids::SessionId::generate(),
        egress: EgressPolicy::default(),
    };
    let begun = Instant::now();
    let view: MachineView = soon(runner.client.call(Method::POST, "/claim", Some(&claim)))
        .await
        .unwrap();
    println!(
        "claim of a paused VM: {:.3} s",
        begun.elapsed().as_secs_f64()
    );
    assert_eq!(
        (view.state, view.session_id),
        (MachineState::Up, Some(claim.session_id))
    );
}

/// The driver alone: a host with any key but the one on the copy's own config drive is refused, and one with that is not.
async fn other_key(from: &RestoreSpec) {
    let place = restored(from);
    let directory = place.home.path().join("vm");
    std::fs::create_dir(&directory).unwrap();
    let snapshot = Snapshot::open(from).unwrap();
    let image = Utf8PathBuf::from(&place.spec.image_dir);
    let key = StreamKey::generate();
    let binding = snapshot.manifest.binding.clone();
    let launch = Launch {
        machine_id: place.spec.machine_id,
        memory_mib: place.spec.memory_mib,
        vcpus: place.spec.vcpus,
        vm_dir: directory.clone(),
        root: image.join("root.ext4"),
        kernel: image.join("vmlinuz"),
        vmlinux: None,
        initrd: image.join("initrd"),
        spawned: Default::default(),
        jail: None,
        standing: None,
        cmdline: manifest(&image).cmdline,
        config: config_drive::make(place.spec.machine_id, 1, &key).unwrap(),
        image_digest: binding.image_digest.clone(),
        agent_build: binding.agent_build.clone(),
        memory: Memory::Restored(Box::new(Restored {
            manifest: snapshot.manifest,
            memory: snapshot.memory,
            state: snapshot.state,
            backend: MemoryBackend::default(),
        })),
        console: BoundedLog::create(&directory.join("serial.log"), 4096).unwrap(),
        vmm_log: BoundedLog::create(&directory.join("vmm.log"), 4096).unwrap(),
    };
    let driver = QemuDriver::find(None).unwrap();
    let capabilities = driver.probe().await.unwrap();
    assert!(capabilities.snapshot && capabilities.machine.starts_with("pc-q35-"));
    let machine = driver.launch(&capabilities, launch).await.unwrap();
    machine.resume().await.unwrap();
    let mut io = soon(machine.dial()).await.unwrap();
    let other = StreamKey::generate();
    assert!(soon(host_handshake(&mut io, &other)).await.is_err());
    drop(io);
    let io = soon(async {
        // The guest closes its end after a refusal and opens it again; of whoever dials in between, QEMU says late that it ended.
        loop {
            let mut io = machine.dial().await.unwrap();
            if host_handshake(&mut io, &key).await.is_ok() {
                return io;
            }
        }
    })
    .await;
    let (mux, _incoming) = start(io, Side::Host);
    drop(soon(mux.open(Open::Http)).await.unwrap());
    let pid = machine.pid();
    drop(machine);
    gone(pid).await;
}

fn manifest(image: &Utf8Path) -> vestibule_api::image::Manifest {
    serde_json::from_slice(&std::fs::read(image.join("manifest.json")).unwrap()).unwrap()
}

fn id_of(bytes: &[u8]) -> SnapshotId {
    use sha2::Digest;
    let hex: String = sha2::Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    hex.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real image: set VESTIBULE_TEST_IMAGE, run with --ignored"]
async fn two_are_saved_at_once() {
    let homes = [
        camino_tempfile::tempdir().unwrap(),
        camino_tempfile::tempdir().unwrap(),
    ];
    let (a, b) = tokio::join!(golden(homes[0].path()), golden(homes[1].path()));
    assert_ne!(a.id, b.id);
    for from in [a, b] {
        let place = restored(&from);
        let runner = place.start().await;
        runner.state(MachineState::Up).await;
        runner.stop().await;
        runner.ended().await;
    }
}

/// A file system of so many bytes, gone with the value. Needs root.
struct Tmpfs(camino_tempfile::Utf8TempDir);

impl Tmpfs {
    fn new(bytes: u64) -> Self {
        let dir = camino_tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount(
            "tmpfs",
            dir.path().as_std_path(),
            "tmpfs",
            flags,
            options.as_c_str(),
        )
        .unwrap();
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(
            self.0.path().as_std_path(),
            rustix::mount::UnmountFlags::DETACH,
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real image: set VESTIBULE_TEST_IMAGE, run with --ignored"]
async fn a_full_disk_is_said_and_nothing_is_left() {
    let mut place = at_home();
    let memory = u64::from(place.spec.memory_mib) << 20;
    // No room for the memory: the VM does not begin.
    let small = Tmpfs::new(memory / 2);
    let dir = small.0.path().join("unfinished");
    place.spec.save_to = Some(dir.to_string());
    let finding = failure(&place).await;
    assert_eq!(finding.cause, Cause::HostDiskFull, "{finding:?}");
    assert_eq!(tree(small.0.path()), Vec::<String>::new());
    // Room for the memory and not for the state.
    let small = Tmpfs::new(memory + (64 << 10));
    let dir = small.0.path().join("unfinished");
    let mut place = at_home();
    place.spec.save_to = Some(dir.to_string());
    let runner = place.start().await;
    runner.state(MachineState::Up).await;
    let err = save(&runner).await.unwrap_err();
    assert!(err.to_string().contains("host-disk-full"), "{err}");
    let exit: Exit = runner
        .event(|event| match event {
            RunnerEventKind::Ended { exit } => Some(exit.clone()),
            _ => None,
        })
        .await;
    assert!(exit.asked, "the runner ended it: {exit:?}");
    runner.ended().await;
    assert_eq!(tree(small.0.path()), Vec::<String>::new());
}

/// Memory of the VMM in KiB that is no file's: what it costs beside the snapshot's pages, which all copies and the page
/// cache share (proc(5), `smaps_rollup`).
fn private_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let of = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    of("Anonymous:")
}

/// What one browser's installation is told from another by, its cookie for the X server, and who holds the profile.
const BROWSER_IDS: &str = r#"cd /home/person/.config/chromium
grep -ohE '"(enterprise_profile_guid|signin_scoped_device_id|receiver_id_hash_token|limited_entropy_randomization_source|ablation_seed)":"[^"]*"' 'Local State' Default/Preferences | sort
sha256sum < /run/vnc/Xauthority
readlink SingletonLock
"#;

/// Desktop and browser are up in the snapshot; a copy's are its own before it is ready.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots an image with a browser: set VESTIBULE_TEST_IMAGE, run with --ignored"]
async fn browsers_are_their_copys_own() {
    let home = camino_tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let from = golden_within(home.path(), 600).await;
    println!("golden: {:.1} s", begun.elapsed().as_secs_f64());
    let before = digest(&from);
    let (mut seen, mut randoms) = (BTreeSet::new(), Vec::new());
    for _ in 0..2 {
        let mut place = restored(&from);
        place.spec.boot_deadline_s = 600;
        let since = Timestamp::now();
        let runner = place.start().await;
        runner.state(MachineState::Up).await;
        let inherited = inherited::found(&runner, since).await;
        assert_eq!(inherited, Vec::<String>::new());
        let ids = exec(&runner, BROWSER_IDS).await;
        println!("{}", ids.stdout);
        let lines: Vec<_> = ids.stdout.lines().collect();
        assert_eq!(lines.len(), 7, "{ids:?}");
        for line in lines {
            assert!(seen.insert(line.to_owned()), "twice: {line}");
        }
        randoms.push(profile::randoms(&runner).await);
        let _: MachineView = runner
            .client
            .call(Method::POST, "/pause", None::<&()>)
            .await
            .unwrap();
        let pid = runner.view().await.vmm_pid.unwrap();
        let private = private_kib(pid) as f64 / f64::from(place.spec.memory_mib << 10);
        println!("private memory: {private:.3} of the guest's");
        claimed(&runner).await;
        runner.stop().await;
        runner.ended().await;
        let events = place.events();
        for event in &events {
            if let RunnerEventKind::Phase { phase } = event.event {
                let took = event.at.micros_since(events[0].at);
                println!("{phase:?} after {:.2} s", took as f64 / 1e6);
            }
        }
    }
    assert_eq!(
        profile::shared(&randoms[0], &randoms[1]),
        Vec::<&str>::new(),
        "in both copies"
    );
    assert_eq!(digest(&from), before, "a clone wrote to the shared memory");
}
