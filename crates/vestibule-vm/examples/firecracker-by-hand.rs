//! An image's life under Firecracker, by the driver alone: boot, the agent's answer, save, two copies at once, their answers.
//! It needs a KVM that runs Linux; nested under QEMU's TCG one can be had anywhere.
//!
//! ```text
//! firecracker-by-hand IMAGE_DIR   prints what happened, and after how many seconds
//! ```
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use vestibule_api::{
    agent::Health,
    client,
    ids::MachineId,
    image::Manifest,
    machine::RestoreSpec,
    mux::{Mux, Side, StreamKey, host_handshake, start},
    stream::Open,
};
use vestibule_vm::{
    config_drive,
    driver::{Capabilities, Driver, Launch, Machine, Memory, Restored},
    firecracker::FirecrackerDriver,
    log::BoundedLog,
    snapshot::{self, Snapshot},
};

const LOG_BYTES: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(300);
/// A connection that was accepted may end before a byte has come, right after a restore; nested, the guest takes its time.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(20);
/// Between the agent's word that it listens and its waiting there is next to nothing to do.
const SETTLE: Duration = Duration::from_millis(500);

/// What the VMs of this run share.
struct Place {
    home: camino_tempfile::Utf8TempDir,
    image: Utf8PathBuf,
    manifest: Manifest,
    driver: FirecrackerDriver,
    capabilities: Capabilities,
    begun: Instant,
}

/// One VM, and the key of its stream.
struct Vm {
    machine: Arc<dyn Machine>,
    key: StreamKey,
    console: Arc<BoundedLog>,
    vmm_log: Arc<BoundedLog>,
}

#[tokio::main]
#[expect(
    clippy::print_stderr,
    reason = "what a VM said that failed is for whoever runs this"
)]
async fn main() -> Result<()> {
    let image: Utf8PathBuf = std::env::args()
        .nth(1)
        .context("usage: firecracker-by-hand IMAGE_DIR")?
        .into();
    let manifest = serde_json::from_slice(&std::fs::read(image.join("manifest.json"))?)?;
    let driver = FirecrackerDriver::find().context("find Firecracker")?;
    let capabilities = driver.probe().await.context("probe")?;
    let place = Place {
        home: camino_tempfile::tempdir()?,
        image,
        manifest,
        driver,
        capabilities,
        begun: Instant::now(),
    };
    let about = &place.capabilities;
    place.say(&format!(
        "{} {}: {}",
        about.driver, about.version, about.because
    ));

    let saved = place.home.path().join("snapshot");
    std::fs::create_dir(&saved)?;
    let memory_mib = place.manifest.default_memory_mib;
    let memory = snapshot::make_memory(&saved, memory_mib)?;
    let vm = place.launch(Memory::Shared(memory)).await?;
    place.say("started");
    let spec = match place.save(&vm, &saved).await {
        Ok(spec) => spec,
        Err(err) => {
            eprintln!("{}", String::from_utf8_lossy(&vm.console.render()?));
            eprintln!("{}", String::from_utf8_lossy(&vm.vmm_log.render()?));
            return Err(err);
        }
    };
    drop(vm);

    let mut copies = Vec::new();
    for number in 1..=2 {
        let snapshot = Snapshot::open(&spec)?;
        let restored = Memory::Restored(Box::new(Restored {
            manifest: snapshot.manifest,
            memory: snapshot.memory,
            state: snapshot.state,
        }));
        let vm = place.launch(restored).await?;
        place.say(&format!("copy {number} loaded"));
        vm.machine.resume().await?;
        let mux = place.connect(&vm).await?;
        let health = health(&mux).await?;
        place.say(&format!("copy {number} answers: {:?}", health.status));
        copies.push((vm, mux));
    }
    for (number, (vm, mux)) in copies.iter().enumerate() {
        health(mux).await?;
        if place.capabilities.pause {
            vm.machine.pause().await?;
            vm.machine.resume().await?;
            // Whatever became of the connection, the agent can be reached.
            health(mux).await?;
        }
        place.say(&format!("copy {} was paused, and answers", number + 1));
    }
    place.say("done");
    Ok(())
}

impl Place {
    #[expect(
        clippy::print_stdout,
        reason = "the figures are what this program is for"
    )]
    fn say(&self, what: &str) {
        println!("{:8.3} s  {what}", self.begun.elapsed().as_secs_f64());
    }

    async fn launch(&self, memory: Memory) -> Result<Vm> {
        let (machine_id, key) = (MachineId::generate(), StreamKey::generate());
        let vm_dir = self.home.path().join(machine_id.to_string());
        std::fs::create_dir(&vm_dir)?;
        let console = BoundedLog::create(&vm_dir.join("serial.log"), LOG_BYTES)?;
        let vmm_log = BoundedLog::create(&vm_dir.join("vmm.log"), LOG_BYTES)?;
        let launch = Launch {
            machine_id,
            memory_mib: self.manifest.default_memory_mib,
            vcpus: self.manifest.default_vcpus,
            root: self.image.join("root.ext4"),
            kernel: self.image.join("vmlinuz"),
            vmlinux: Some(self.image.join("vmlinux")),
            initrd: self.image.join("initrd"),
            jail: None,
            cmdline: self.manifest.cmdline.clone(),
            config: config_drive::make(machine_id, 1, &key)?,
            image_digest: "0".repeat(64).parse()?,
            agent_build: self.manifest.agent_build.clone(),
            console: Arc::clone(&console),
            vmm_log: Arc::clone(&vmm_log),
            memory,
            vm_dir,
        };
        let machine = self.driver.launch(&self.capabilities, launch).await?;
        Ok(Vm {
            machine,
            key,
            console,
            vmm_log,
        })
    }

    /// Dials until the agent has proven that it is the one.
    async fn connect(&self, vm: &Vm) -> Result<Mux> {
        let connecting = async {
            loop {
                let Ok(mut io) = vm.machine.dial().await else {
                    continue;
                };
                let shaken =
                    tokio::time::timeout(HANDSHAKE_LIMIT, host_handshake(&mut io, &vm.key)).await;
                match shaken {
                    Ok(Ok(())) => return start(io, Side::Host).0,
                    Ok(Err(err)) => self.say(&format!("a connection ended: {err}")),
                    Err(_) => self.say("a connection was silent"),
                }
            }
        };
        tokio::time::timeout(LIMIT, connecting)
            .await
            .context("the agent was not reached")
    }

    /// Prepares the guest, and saves it once it waits for its next host.
    async fn save(&self, vm: &Vm, saved: &Utf8Path) -> Result<RestoreSpec> {
        let mux = self.connect(vm).await?;
        self.say("the agent is on the stream");
        let first = health(&mux).await?;
        ensure!(!first.build.is_empty(), "the agent answered with nothing");
        self.say(&format!("the agent answers: {:?}", first.status));
        let what = "POST /prepare-snapshot";
        let request = client::json_request(hyper::Method::POST, "/prepare-snapshot", None::<&()>)?;
        let reply = client::send(mux.open(Open::Http).await?, request).await?;
        client::body(what, reply).await?;
        self.say("the guest is prepared");
        let reopened = vm.machine.reopened();
        mux.close().await;
        tokio::time::timeout(LIMIT, reopened)
            .await
            .context("the guest did not listen again")?;
        tokio::time::sleep(SETTLE).await;
        let binding = vm.machine.binding().context("it can be saved")?.clone();
        vm.machine.save(snapshot::make_state(saved)?).await?;
        self.say("saved");
        let sealed = snapshot::seal(saved, binding)?;
        self.say(&format!(
            "sealed: {} MiB of memory on disk",
            sealed.manifest.memory.allocated_bytes >> 20
        ));
        Ok(RestoreSpec {
            id: sealed.id,
            dir: saved.to_string(),
        })
    }
}

async fn health(mux: &Mux) -> Result<Health> {
    let answer = async {
        let request = client::json_request(hyper::Method::GET, "/health", None::<&()>)?;
        let reply = client::send(mux.open(Open::Http).await?, request).await?;
        let bytes = client::body("GET /health", reply).await?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    tokio::time::timeout(LIMIT, answer)
        .await
        .context("`GET /health` was not answered")?
}
