//! The best start that there can be: Firecracker alone and a few requests to its API, without driver, runner, jail, checks or
//! evidence, from its start to the agent's first answer. `script/bench overhead` compares with it.
//!
//! ```text
//! firecracker-by-hand IMAGE_DIR                  boots; prints the seconds to the API's last answer, and to the agent's first
//! firecracker-by-hand IMAGE_DIR SNAPSHOT_DIR     restores
//! ```
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    os::unix::fs::symlink,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    process::Command,
};
use vestibule_api::{
    agent::Health,
    client,
    ids::MachineId,
    image::Manifest,
    mux::{Side, StreamKey, host_handshake, start},
    stream::{Open, VSOCK_LISTENS_PORT, VSOCK_PORT},
};
use vestibule_vm::{
    config_drive,
    firecracker::{
        FirecrackerDriver,
        api::{Api, ApiError},
        request::{self, BackendType, Boot, MemoryBackend, Restore},
    },
    process,
};

const LIMIT: Duration = Duration::from_secs(400);
const POLL: Duration = Duration::from_millis(2);
/// Between two connections to a guest that does not listen yet: each costs the emulated processor something.
const AGAIN: Duration = Duration::from_millis(50);

#[tokio::main]
#[expect(
    clippy::print_stdout,
    reason = "the figures are what this program is for"
)]
async fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).map(Utf8PathBuf::from).collect();
    let (image, snapshot) = match arguments.as_slice() {
        [image] => (image, None),
        [image, snapshot] => (image, Some(snapshot)),
        _ => bail!("usage: firecracker-by-hand IMAGE_DIR [SNAPSHOT_DIR]"),
    };
    let (asked, answered) = tokio::time::timeout(LIMIT, run(image, snapshot))
        .await
        .context("the guest did not answer")??;
    println!("{asked:.4} {answered:.4}");
    Ok(())
}

async fn run(image: &Utf8Path, snapshot: Option<&Utf8PathBuf>) -> Result<(f64, f64)> {
    // Before the clock starts: what a script would have found out once.
    let manifest: Manifest = serde_json::from_slice(&std::fs::read(image.join("manifest.json"))?)?;
    let driver = FirecrackerDriver::find().context("find Firecracker")?;
    let features = driver.installed()?.version.features();
    let home = camino_tempfile::tempdir()?;
    let (machine_id, key) = (MachineId::generate(), StreamKey::generate());

    let begun = Instant::now();
    let at = |name: &str| home.path().join(name);
    let config = config_drive::make(machine_id, 1, &key)?;
    let named = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        process::number(&config.0)
    );
    for (name, target) in [
        (request::KERNEL, image.join("vmlinux")),
        (request::INITRD, image.join("initrd")),
        (request::ROOT, image.join("root.ext4")),
        (request::CONFIG, named.into()),
    ] {
        symlink(target, at(name))?;
    }
    std::fs::write(at(request::METRICS), "")?;
    let listens = UnixListener::bind(at(&format!("{}_{VSOCK_LISTENS_PORT}", request::VSOCK)))?;
    let mut vmm = Command::new(driver.program())
        .args(["--id", "by-hand", "--api-sock", "api.sock"])
        .current_dir(home.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let requests = match snapshot {
        None => request::boot(&Boot {
            vcpus: manifest.default_vcpus,
            memory_mib: manifest.default_memory_mib,
            cmdline: request::cmdline(&manifest.cmdline),
        }),
        Some(snapshot) => {
            let restore = Restore {
                state: snapshot.join(vestibule_api::snapshot::STATE_FILE).into(),
                memory: MemoryBackend {
                    backend_type: BackendType::File,
                    backend_path: snapshot.join(vestibule_api::snapshot::MEMORY_FILE).into(),
                },
                track_dirty_pages: false,
                clock_realtime: false,
            };
            let mut requests = request::restore(features, &restore);
            requests.push(request::resume());
            requests
        }
    };
    let api = Api::new(at("api.sock"));
    while let Err(err) = api.version().await {
        let alive = vmm.try_wait()?.is_none();
        ensure!(alive && matches!(err, ApiError::Connect { .. }), "{err}");
        tokio::time::sleep(POLL).await;
    }
    for one in &requests {
        api.send(one).await?;
    }
    let asked = begun.elapsed().as_secs_f64();
    let stream = at(request::VSOCK);
    if snapshot.is_none() {
        // A guest that boots says when it listens.
        listens.accept().await?;
    }
    let health = loop {
        // The guest says when it listens, and whoever dialled before dials again: a connection that was accepted right after a
        // restore may be silent for ever (Firecracker fact 11).
        tokio::select! {
            answer = ask(&stream, &key) => match answer {
                Ok(health) => break health,
                Err(_) => tokio::time::sleep(AGAIN).await,
            },
            _ = listens.accept() => {}
        }
    };
    ensure!(!health.build.is_empty(), "the agent answered with nothing");
    Ok((asked, begun.elapsed().as_secs_f64()))
}

/// One connection: the port, the handshake, the question.
async fn ask(socket: &Utf8Path, key: &StreamKey) -> Result<Health> {
    let mut io = UnixStream::connect(socket).await?;
    io.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes())
        .await?;
    while io.read_u8().await? != b'\n' {}
    host_handshake(&mut io, key).await?;
    let (mux, _incoming) = start(io, Side::Host);
    let request = client::json_request(hyper::Method::GET, "/health", None::<&()>)?;
    let reply = client::send(mux.open(Open::Http).await?, request).await?;
    let bytes = client::body("GET /health", reply).await?;
    Ok(serde_json::from_slice(&bytes)?)
}
