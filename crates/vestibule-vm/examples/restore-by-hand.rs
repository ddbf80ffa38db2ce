//! The best restore that there can be: the VMM alone, without runner, controller, checks or evidence, from its start to the
//! agent's first answer. `script/bench warm` compares with it.
//!
//! ```text
//! restore-by-hand IMAGE_DIR SNAPSHOT_DIR SNAPSHOT_ID   prints the seconds
//! ```
use anyhow::{Context, Result, ensure};
use camino::Utf8PathBuf;
use std::time::{Duration, Instant};
use vestibule_api::{
    agent::Health,
    client,
    ids::MachineId,
    image::Manifest,
    machine::{MemoryBackend, RestoreSpec},
    mux::{Side, StreamKey, host_handshake, start},
    stream::Open,
};
use vestibule_vm::{
    config_drive,
    driver::{Driver, Launch, Memory, Restored},
    log::BoundedLog,
    qemu::QemuDriver,
    snapshot::Snapshot,
};

const LOG_BYTES: u64 = 64 << 10;
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::main]
#[expect(
    clippy::print_stdout,
    reason = "the figure is what this program is for"
)]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [image, dir, id] = arguments.as_slice() else {
        anyhow::bail!("usage: restore-by-hand IMAGE_DIR SNAPSHOT_DIR SNAPSHOT_ID");
    };
    let spec = RestoreSpec {
        id: id.parse()?,
        dir: dir.clone(),
    };
    // Before the clock starts: what a script would have found out once.
    let snapshot = Snapshot::open(&spec)?;
    let image = Utf8PathBuf::from(image);
    let manifest: Manifest = serde_json::from_slice(&std::fs::read(image.join("manifest.json"))?)?;
    let driver = QemuDriver::find(None).context("find QEMU")?;
    let capabilities = driver.probe().await?;
    let home = camino_tempfile::tempdir()?;

    let begun = Instant::now();
    let (machine_id, key) = (MachineId::generate(), StreamKey::generate());
    let binding = &snapshot.manifest.binding;
    let launch = Launch {
        machine_id,
        memory_mib: binding.memory_mib,
        vcpus: binding.vcpus,
        vm_dir: home.path().to_owned(),
        root: image.join("root.ext4"),
        kernel: image.join("vmlinuz"),
        vmlinux: None,
        initrd: image.join("initrd"),
        spawned: Default::default(),
        jail: None,
        standing: None,
        cmdline: manifest.cmdline,
        config: config_drive::make(machine_id, 1, &key)?,
        image_digest: binding.image_digest.clone(),
        agent_build: binding.agent_build.clone(),
        console: BoundedLog::create(&home.path().join("serial.log"), LOG_BYTES)?,
        vmm_log: BoundedLog::create(&home.path().join("vmm.log"), LOG_BYTES)?,
        memory: Memory::Restored(Box::new(Restored {
            manifest: snapshot.manifest,
            memory: snapshot.memory,
            state: snapshot.state,
            backend: MemoryBackend::default(),
        })),
    };
    let machine = driver.launch(&capabilities, launch).await?;
    machine.resume().await?;
    let answer = async {
        let mut io = machine.dial().await?;
        host_handshake(&mut io, &key).await?;
        let (mux, _incoming) = start(io, Side::Host);
        let stream = mux.open(Open::Http).await?;
        let request = client::json_request(hyper::Method::GET, "/health", None::<&()>)?;
        let reply = client::send(stream, request).await?;
        let bytes = client::body("GET /health", reply).await?;
        Ok::<Health, anyhow::Error>(serde_json::from_slice(&bytes)?)
    };
    let health = tokio::time::timeout(LIMIT, answer).await??;
    let took = begun.elapsed();
    ensure!(!health.build.is_empty(), "the agent answered with nothing");
    println!("{:.4}", took.as_secs_f64());
    Ok(())
}
