//! From a VM to its copies: each is another one in everything that could tell two of them apart.
use super::{
    Noted, Outcome, Suite, jail, standby,
    vm::{Running, Vm, failed, gone, processes_of, soon},
};
use crate::clock;
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use hyper::Method;
use sha2::Digest as _;
use std::{
    collections::BTreeSet,
    fs::File,
    os::unix::fs::FileExt as _,
    time::{Duration, Instant},
};
use vestibule_api::{
    cause::Cause,
    client::CallError,
    egress::EgressPolicy,
    ids::{SessionId, SnapshotId},
    machine::Phase,
    machine::{
        Claim, DriverChoice, MachineState, MachineView, MemoryBackend, RestoreSpec,
        RunnerEventKind, Saved,
    },
    snapshot::{MANIFEST_FILE, MEMORY_FILE, STATE_FILE, SnapshotManifest},
};

const SAVING: Duration = Duration::from_secs(400);
const COPIES: usize = 2;
/// Longer than the runner leaves the guest's clock alone, so that it wants to look at it meanwhile. With watchdogs none would
/// outlast an hour, which is too long for a test: that there are none is looked at as well.
const PAUSE: Duration = Duration::from_secs(25);
/// Ways in which a snapshot may not fit.
const REFUSALS: usize = 10;
/// A copy's clock may be off by so much, the time that it takes to ask included.
const CLOCK_MS: f64 = 100.0;

/// A snapshot that was taken.
pub(crate) struct Taken(pub(crate) RestoreSpec, String);

impl Noted for Taken {
    fn note(&self) -> String {
        self.1.clone()
    }
}

/// Where a VM's snapshot goes.
pub(crate) struct Saving(Utf8PathBuf);

impl Saving {
    /// Makes the VM one that can be saved.
    pub(crate) fn of(vm: &mut Vm) -> Self {
        let home = Utf8Path::new(&vm.spec.vm_dir).ancestors().nth(2);
        let path = home.unwrap_or_else(|| Utf8Path::new("/")).join("snapshot");
        vm.spec.save_to = Some(path.to_string());
        Self(path)
    }

    pub(crate) async fn save(self, running: Running) -> Result<Taken> {
        let call = running.client.call(Method::POST, "/snapshot", None::<&()>);
        let saved: Saved = tokio::time::timeout(SAVING, call)
            .await
            .context("the save took too long")??;
        running.ended().await?;
        let (memory, state) = (&saved.manifest.memory, &saved.manifest.state);
        ensure!(
            memory.allocated_bytes * 2 < memory.bytes,
            "free memory is saved: {memory:?}"
        );
        let note = format!(
            "memory {} of {} MiB, state {} KiB",
            memory.allocated_bytes >> 20,
            memory.bytes >> 20,
            state.bytes >> 10
        );
        let from = RestoreSpec {
            id: saved.id,
            dir: self.0.into_string(),
        };
        Ok(Taken(from, note))
    }
}

pub(super) async fn all(suite: &mut Suite, from: &RestoreSpec) {
    let before = digest(from).ok();
    let mut copies = Vec::new();
    for number in 1..=COPIES {
        let vm = restored(suite, from, MemoryBackend::File);
        let name = format!("restore: copy {number} is up");
        if let Some(running) = suite.case(&name, up(&vm)).await {
            copies.push((vm, running));
        }
    }
    suite
        .case("copies are VMs of their own", own(from, &copies))
        .await;
    suite
        .case("copies: the clock is the host's", clocks(&copies))
        .await;
    if let [(Ok(first), one), (Ok(second), two)] = copies.as_slice() {
        jail::all(suite, (first, one), (second, two)).await;
    }
    if let Some((vm, running)) = copies.pop() {
        suite
            .case("a pause that outlasts the watchdogs", long_pause(&running))
            .await;
        suite
            .case("a guest that does not answer is not kept", deaf(&running))
            .await;
        suite
            .case("pause, resume, claim", pause_and_claim(&running))
            .await;
        suite
            .case("evidence and disposal after a stop", stopped(vm, running))
            .await;
    }
    if let Some((vm, running)) = copies.pop() {
        suite
            .case(
                "the VMM of one that is up is killed",
                vmm_killed(vm, running),
            )
            .await;
    }
    let (vm, other) = (
        restored(suite, from, MemoryBackend::File),
        restored(suite, from, MemoryBackend::File),
    );
    let required = suite.setup.jail_required;
    suite
        .case("a VMM that stands by", standby::all(vm, other, required))
        .await;
    for wait_ms in [0, 100, 400] {
        let vm = restored(suite, from, MemoryBackend::File);
        let name = format!("the runner is killed {wait_ms} ms into a restore");
        suite.case(&name, runner_killed(vm, wait_ms)).await;
    }
    let same = async {
        ensure!(digest(from).ok() == before, "a copy wrote to it");
        Ok(())
    };
    suite.case("the snapshot's memory is as it was", same).await;
    let vms: Result<Vec<_>> = (0..REFUSALS).map(|_| suite.vm()).collect();
    suite
        .case("snapshots that do not fit", async {
            refusals(vms?, from).await
        })
        .await;
    let by_page = "restore: page by page";
    if suite.setup.driver == DriverChoice::Firecracker {
        let vm = restored(suite, from, MemoryBackend::Uffd);
        let served = suite.case(by_page, up(&vm)).await;
        if let Some(running) = served {
            let dies = handler_dies(vm, running, from);
            suite.case("the handler of page faults dies", dies).await;
        }
    } else {
        let why = "QEMU maps the snapshot's memory itself";
        let skipped = async { Ok(Outcome::Skipped(why.to_owned())) };
        suite.case(by_page, skipped).await;
    }
}

/// The snapshot's memory is cut short below a copy that lives on it: the handler ends, and with it the VM, which says why.
async fn handler_dies(vm: Result<Vm>, running: Running, from: &RestoreSpec) -> Result<String> {
    let vm = vm?;
    let vmm = running.vmm().await?;
    let memory = Utf8Path::new(&from.dir).join(MEMORY_FILE);
    File::options().write(true).open(memory)?.set_len(0)?;
    // Memory that the guest has not used yet: whoever asks for it hangs until the VM ends.
    let asks = running.exec_within("head -c 64M /dev/zero | tail -c 64M | wc -c", 100);
    let asked = asks.await;
    ensure!(asked.is_err(), "the guest went on: {asked:?}");
    // It may be gone before anybody has asked why: the evidence says it.
    running.ended().await?;
    let events = vm.events()?;
    let finding = events.iter().find_map(|line| failed(&line.event));
    let finding = finding.context("no event says why it ended")?;
    ensure!(finding.cause == Cause::VmmExited, "{finding:?}");
    let said = finding.evidence[0].text.clone();
    ensure!(
        said.contains("serve the guest's memory: read page"),
        "{finding:?}"
    );
    vm.nothing_left(Some(vmm))?;
    Ok(said)
}

fn restored(suite: &Suite, from: &RestoreSpec, backend: MemoryBackend) -> Result<Vm> {
    let mut vm = suite.vm()?;
    vm.spec.memory_backend = backend;
    vm.spec.restore = Some(from.clone());
    Ok(vm)
}

/// By a runner that stood by, as copies have it from a controller.
async fn up(vm: &Result<Vm>) -> Result<Running> {
    let vm = vm.as_ref().map_err(|err| anyhow::anyhow!("{err:#}"))?;
    let running = vm.start_by(vm.stand_by()?).await?;
    running.up().await?;
    Ok(running)
}

/// SHA-256 of the memory's file.
fn digest(from: &RestoreSpec) -> Result<String> {
    let mut sha = sha2::Sha256::new();
    let mut file = File::open(Utf8Path::new(&from.dir).join(MEMORY_FILE))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = std::io::Read::read(&mut file, &mut buffer)?;
        if read == 0 {
            return Ok(hex(&sha.finalize()));
        }
        sha.update(&buffer[..read]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What must be a VM's own: machine-id, host name, boot id, what its generator gives, and its journal.
async fn identity(running: &Running) -> Result<Vec<String>> {
    let script = "cat /etc/machine-id; hostname; cat /etc/hostname; cat /proc/sys/kernel/random/boot_id; \
                  head -c 1024 /dev/urandom | sha256sum; \
                  for n in {1..300}; do [ $(ls /run/log/journal | wc -l) = 1 ] && break; sleep .1; done; \
                  ls /run/log/journal";
    let reply = running.exec(script).await?;
    let lines: Vec<_> = reply.stdout.lines().map(str::to_owned).collect();
    ensure!(lines.len() == 6, "{reply:?}");
    ensure!(lines[1] == lines[2] && lines[0] == lines[5], "{reply:?}");
    Ok(lines)
}

async fn own(from: &RestoreSpec, copies: &[(Result<Vm>, Running)]) -> Result<()> {
    ensure!(
        copies.len() == COPIES,
        "there are {} of {COPIES}",
        copies.len()
    );
    let mut seen = BTreeSet::new();
    for (vm, running) in copies {
        let Ok(vm) = vm else { continue };
        let lines = identity(running).await?;
        let id = vm.spec.machine_id.to_string();
        ensure!(
            lines[0] == id.replace('-', "") && lines[1] == format!("vm-{id}"),
            "{lines:?}"
        );
        for line in [0, 1, 3, 4] {
            ensure!(
                seen.insert(lines[line].clone()),
                "{} is in two copies",
                lines[line]
            );
        }
        let view = running.view().await?;
        ensure!(view.snapshot_id.as_ref() == Some(&from.id), "{view:?}");
    }
    Ok(())
}

async fn clocks(copies: &[(Result<Vm>, Running)]) -> Result<String> {
    let mut worst = 0.0_f64;
    for (_, running) in copies {
        worst = worst.max(clock::error_ms(&running.client).await?);
    }
    ensure!(worst < CLOCK_MS, "{worst} ms");
    Ok(format!("off by {worst:.0} ms at most"))
}

/// In the pool a VM is paused for an hour. Timers that are due when it goes on must do no harm: a service whose watchdog was not
/// fed meanwhile would be killed by systemd.
async fn long_pause(running: &Running) -> Result<String> {
    let script = "cut -d' ' -f1 /proc/uptime; systemctl --failed --plain --no-legend --no-pager; \
                  systemctl show -p Id -p MainPID -p NRestarts -p WatchdogUSec vm-browser-agent systemd-journald systemd-udevd";
    let (uptime, services) = lines_of(running, script).await?;
    let _: MachineView = running.post("/pause").await?;
    tokio::time::sleep(PAUSE).await;
    let _: MachineView = running.post("/resume").await?;
    let off = clock::error_ms(&running.client).await?;
    ensure!(off < CLOCK_MS, "after a pause the clock is off by {off} ms");
    // What is due runs first, and what it kills is started again.
    let (later, after) = lines_of(running, &format!("sleep 3; {script}")).await?;
    ensure!(
        services == after,
        "services before and after: {services}\n{after}"
    );
    let watched = after.lines().find(|line| {
        line.strip_prefix("WatchdogUSec=")
            .is_some_and(|time| !["0", "infinity"].contains(&time))
    });
    ensure!(watched.is_none(), "a longer pause would end one: {after}");
    let guest = later - uptime;
    Ok(format!(
        "{guest:.0} s passed in the guest; its clock is off by {off:.0} ms at most"
    ))
}

/// A VM that is kept in stock has answered for its clock just before.
async fn deaf(running: &Running) -> Result<()> {
    let script = "agent=$(systemctl show -P MainPID vm-browser-agent); \
                  systemd-run -q --no-block sh -c \"sleep 1; kill -STOP $agent; sleep 20; kill -CONT $agent\"";
    running.exec(script).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let asked = running
        .client
        .call::<_, MachineView>(Method::POST, "/pause", None::<&()>);
    let Err(err) = soon("a refusal", asked).await? else {
        bail!("it was paused");
    };
    let said = format!("{err:#?}");
    ensure!(said.contains("listening-not-answering"), "{said}");
    let view = running.view().await?;
    ensure!(view.state == MachineState::Up, "{view:?}");
    // When it goes on it is as it was.
    running.exec("true").await?;
    Ok(())
}

/// The number on the first line, and the other lines.
async fn lines_of(running: &Running, script: &str) -> Result<(f64, String)> {
    let reply = running.exec(script).await?;
    let (first, rest) = reply.stdout.split_once('\n').context("no line")?;
    Ok((first.parse()?, rest.to_owned()))
}

async fn pause_and_claim(running: &Running) -> Result<()> {
    let refused = running
        .client
        .call::<_, Saved>(Method::POST, "/snapshot", None::<&()>);
    let refused: Result<Saved, CallError> = soon("a refusal", refused).await?;
    let status = refused.err().and_then(|err| err.status());
    ensure!(
        status.is_some_and(|status| status == 409),
        "a copy was saved: {status:?}"
    );
    for _ in 0..2 {
        let view: MachineView = running.post("/pause").await?;
        ensure!(view.state == MachineState::Paused, "{view:?}");
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let view: MachineView = running.post("/resume").await?;
    ensure!(view.state == MachineState::Up, "{view:?}");
    let off = clock::error_ms(&running.client).await?;
    ensure!(off < CLOCK_MS, "after a pause the clock is off by {off} ms");
    let _: MachineView = running.post("/pause").await?;
    let claim = Claim {
        session_id: SessionId::generate(),
        egress: EgressPolicy::default(),
    };
    let call = running.client.call(Method::POST, "/claim", Some(&claim));
    let view: MachineView = soon("the claim", call).await??;
    ensure!(
        (view.state, view.session_id) == (MachineState::Up, Some(claim.session_id)),
        "{view:?}"
    );
    Ok(())
}

/// Asked by two, it ends once, and what it began with is in its events in order.
async fn stopped(vm: Result<Vm>, running: Running) -> Result<()> {
    use Phase::{AgentUp, Identity, Ready, Restored, Resumed, StreamUp, VmmStarted};
    let vm = vm?;
    let vmm = running.vmm().await?;
    let (one, two) = tokio::join!(running.stop(), running.stop());
    let one = one?;
    ensure!(one.complete && one == two?, "{one:?}");
    running.ended().await?;
    vm.nothing_left(Some(vmm))?;
    ensure!(
        vm.evidence("machine.json")?.contains("the case is over"),
        "why is not said"
    );
    let mut phases = Vec::new();
    for line in vm.events()? {
        if let RunnerEventKind::Phase { phase } = line.event
            && phase != Phase::KernelOutput
        {
            phases.push(phase);
        }
    }
    let expected = [
        VmmStarted, Restored, Resumed, StreamUp, AgentUp, Identity, Ready,
    ];
    ensure!(phases.starts_with(&expected), "{phases:?}");
    Ok(())
}

async fn vmm_killed(vm: Result<Vm>, running: Running) -> Result<()> {
    super::ends::vmm_killed(&vm?, running).await
}

/// A runner that is killed takes its VMM along, and leaves nothing with the snapshot.
async fn runner_killed(vm: Result<Vm>, wait_ms: u64) -> Result<()> {
    let vm = vm?;
    let mut running = vm.start().await?;
    tokio::time::sleep(Duration::from_millis(wait_ms)).await;
    let vmm = running.view().await?.vmm_pid;
    running.process.kill().await?;
    if let Some(pid) = vmm {
        gone(pid).await?;
    }
    let id = vm.spec.machine_id.to_string();
    let begun = Instant::now();
    while !processes_of(&id).is_empty() {
        ensure!(
            begun.elapsed() < super::vm::SOON,
            "processes are left: {:?}",
            processes_of(&id)
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn id_of(bytes: &[u8]) -> Result<SnapshotId> {
    Ok(hex(&sha2::Sha256::digest(bytes)).parse()?)
}

async fn is_refused(vm: Vm, words: &str) -> Result<()> {
    let finding = vm.fails().await?;
    ensure!(
        finding.cause == Cause::SnapshotRefused,
        "{words}: {finding:?}"
    );
    let said = &finding.evidence[0].text;
    ensure!(said.contains(words), "{words}: {said}");
    Ok(())
}

/// Every way in which a snapshot may not fit, each said in words; the damaged files come last.
async fn refusals(mut vms: Vec<Vm>, from: &RestoreSpec) -> Result<String> {
    type Change = fn(&mut SnapshotManifest);
    const CHANGES: [(&str, Change); 5] = [
        ("VMM version: the snapshot has 0.0.1", |m| {
            m.binding.vmm_version = "0.0.1".into();
        }),
        ("machine type: the snapshot has an old one", |m| {
            m.binding.machine = "an old one".into();
        }),
        ("CPU features: x-none missing here", |m| {
            m.binding.cpu_features.push("x-none".into());
        }),
        ("CPU: the snapshot has Nehalem", |m| {
            m.binding.cpu = "Nehalem".into();
        }),
        ("time-stamp counter", |m| m.binding.tsc_khz /= 2),
    ];
    let mut restored = |from: &RestoreSpec| -> Result<Vm> {
        let mut vm = vms.pop().context("there are as many VMs as refusals")?;
        vm.spec.restore = Some(from.clone());
        Ok(vm)
    };
    let dir = Utf8Path::new(&from.dir);
    let path = dir.join(MANIFEST_FILE);
    let bytes = std::fs::read(&path)?;
    let original: SnapshotManifest = serde_json::from_slice(&bytes)?;
    for (words, change) in CHANGES {
        let mut manifest = original.clone();
        change(&mut manifest);
        let changed = serde_json::to_vec(&manifest)?;
        std::fs::write(&path, &changed)?;
        let mut other = from.clone();
        other.id = id_of(&changed)?;
        is_refused(restored(&other)?, words).await?;
    }
    std::fs::write(&path, &bytes)?;
    let mut vm = restored(from)?;
    vm.spec.image_digest = "1".repeat(64).parse()?;
    is_refused(vm, "image: the snapshot has").await?;
    let mut vm = restored(from)?;
    vm.spec.memory_mib += 64;
    is_refused(vm, "memory: the snapshot has").await?;
    let mut other = from.clone();
    other.id = id_of(b"other")?;
    is_refused(restored(&other)?, "its manifest is another one's").await?;
    let open = |name: &str| File::options().read(true).write(true).open(dir.join(name));
    let memory = open(MEMORY_FILE)?;
    let (mut byte, at) = ([0], original.memory.bytes / 2 + 77);
    memory.read_exact_at(&mut byte, at)?;
    memory.write_all_at(&[byte[0] ^ 4], at)?;
    let words = "use the snapshot's `memory`: its content is not what was saved";
    is_refused(restored(from)?, words).await?;
    memory.write_all_at(&byte, at)?;
    let state = open(STATE_FILE)?;
    let last = original.state.bytes - 1;
    state.read_exact_at(&mut byte, last)?;
    state.set_len(last)?;
    is_refused(restored(from)?, "use the snapshot's `state`: it has").await?;
    state.write_all_at(&byte, last)?;
    Ok(format!("{REFUSALS} ways"))
}
