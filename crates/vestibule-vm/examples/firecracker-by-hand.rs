//! The best start that there can be: Firecracker alone and a few requests to its API, without driver, runner, jail, checks or
//! evidence, from its start to the agent's first answer. `script/bench overhead` compares with it.
//!
//! ```text
//! firecracker-by-hand IMAGE_DIR                  boots; prints the seconds to the API's last answer, to the stream's handshake, and
//!                                                to the agent's first answer
//! firecracker-by-hand IMAGE_DIR SNAPSHOT_DIR     restores
//! firecracker-by-hand --jailer …                 the same in Firecracker's own jailer: a root and a user of its own
//! ```
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::{mount::MountPropagationFlags, thread::UnshareFlags};
use std::{
    os::unix::fs::{PermissionsExt as _, symlink},
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
    snapshot::{MEMORY_FILE, STATE_FILE},
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

const ID: &str = "by-hand";
const API: &str = "api.sock";
/// Nobody's.
const USER: u32 = 469_999;
const LIMIT: Duration = Duration::from_secs(400);
const POLL: Duration = Duration::from_millis(2);
/// Between two connections to a guest that does not listen yet: each costs the emulated processor something.
const AGAIN: Duration = Duration::from_millis(50);

#[expect(
    clippy::print_stdout,
    reason = "the figures are what this program is for"
)]
fn main() -> Result<()> {
    let mut arguments: Vec<_> = std::env::args().skip(1).map(Utf8PathBuf::from).collect();
    let jailed = arguments.first().is_some_and(|word| word == "--jailer");
    arguments.drain(..usize::from(jailed));
    let (image, snapshot) = match arguments.as_slice() {
        [image] => (image, None),
        [image, snapshot] => (image, Some(snapshot)),
        _ => bail!("usage: firecracker-by-hand [--jailer] IMAGE_DIR [SNAPSHOT_DIR]"),
    };
    if jailed {
        // What is mounted in a jail ends with this program. Threads share what this parts, so before there are any.
        // SAFETY: this process has one thread, and no descriptor is concerned.
        #[expect(unsafe_code, reason = "unshare(2) may break what threads share")]
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        let alone = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", alone)?;
    }
    let [asked, shaken, answered] = tokio::runtime::Runtime::new()?
        .block_on(async { tokio::time::timeout(LIMIT, run(image, snapshot, jailed)).await })
        .context("the guest did not answer")??;
    println!("{asked:.4} {shaken:.4} {answered:.4}");
    Ok(())
}

/// Where the VMM runs, as a script would make it.
struct Place {
    directory: Utf8PathBuf,
    program: Utf8PathBuf,
    words: Vec<String>,
    owner: Option<u32>,
}

impl Place {
    fn make(home: &Utf8Path, program: &Utf8Path, jailed: bool) -> Result<Self> {
        let own = ["--api-sock", API].map(str::to_owned);
        if !jailed {
            let id = ["--id", ID].map(str::to_owned);
            return Ok(Self {
                directory: home.to_owned(),
                program: program.to_owned(),
                words: [id, own].concat(),
                owner: None,
            });
        }
        let name = program.file_name().context("the program's name")?;
        let directory = home.join(name).join(ID).join("root");
        std::fs::create_dir_all(&directory)?;
        let user = USER.to_string();
        let jail = [
            "--id",
            ID,
            "--exec-file",
            program.as_str(),
            "--uid",
            &user,
            "--gid",
            &user,
            "--chroot-base-dir",
            home.as_str(),
            "--",
        ];
        let place = Self {
            directory,
            program: program.with_file_name("jailer"),
            words: [jail.map(str::to_owned).as_slice(), &own].concat(),
            owner: Some(USER),
        };
        place.own("")?;
        Ok(place)
    }

    fn at(&self, name: &str) -> Utf8PathBuf {
        self.directory.join(name)
    }

    /// The VMM's user may write to it.
    fn own(&self, name: &str) -> Result<()> {
        Ok(std::os::unix::fs::chown(
            self.at(name),
            self.owner,
            self.owner,
        )?)
    }

    /// Lets the VMM read a file under this name: a jailed one has no way to another directory.
    fn give(&self, file: &Utf8Path, name: &str) -> Result<()> {
        match self.owner {
            None => symlink(file, self.at(name))?,
            Some(_) if file.starts_with("/proc") => {
                std::fs::write(self.at(name), std::fs::read(file)?)?;
                self.own(name)?;
            }
            Some(_) => {
                let mode = file.metadata()?.permissions().mode();
                if mode & 0o004 == 0 {
                    std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode | 0o044))?;
                }
                std::fs::write(self.at(name), "")?;
                rustix::mount::mount_bind(file.as_std_path(), self.at(name).as_std_path())?;
            }
        }
        Ok(())
    }
}

/// Seconds to each point.
async fn run(image: &Utf8Path, snapshot: Option<&Utf8PathBuf>, jailed: bool) -> Result<[f64; 3]> {
    // Before the clock starts: what a script would have found out once.
    let manifest: Manifest = serde_json::from_slice(&std::fs::read(image.join("manifest.json"))?)?;
    let driver = FirecrackerDriver::find().context("find Firecracker")?;
    let features = driver.installed()?.version.features();
    let home = camino_tempfile::tempdir()?;
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o755))?;
    let (machine_id, key) = (MachineId::generate(), StreamKey::generate());

    let begun = Instant::now();
    let place = Place::make(home.path(), driver.program(), jailed)?;
    let at = |name: &str| place.at(name);
    let config = config_drive::make(machine_id, 1, &key)?;
    let named = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        process::number(&config.0)
    );
    for (name, file) in [
        (request::KERNEL, image.join("vmlinux")),
        (request::INITRD, image.join("initrd")),
        (request::ROOT, image.join("root.ext4")),
        (request::CONFIG, named.into()),
    ] {
        place.give(&file, name)?;
    }
    std::fs::write(at(request::METRICS), "")?;
    place.own(request::METRICS)?;
    let said = format!("{}_{VSOCK_LISTENS_PORT}", request::VSOCK);
    let listens = UnixListener::bind(at(&said))?;
    place.own(&said)?;
    let mut vmm = Command::new(&place.program)
        .args(&place.words)
        .current_dir(&place.directory)
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
            for name in [STATE_FILE, MEMORY_FILE] {
                place.give(&snapshot.join(name), name)?;
            }
            let restore = Restore {
                state: STATE_FILE.into(),
                memory: MemoryBackend {
                    backend_type: BackendType::File,
                    backend_path: MEMORY_FILE.into(),
                },
            };
            vec![request::restore(features, &restore), request::resume()]
        }
    };
    let api = Api::new(at(API));
    while let Err(err) = api.version().await {
        let alive = vmm.try_wait()?.is_none();
        ensure!(alive && matches!(err, ApiError::Connect { .. }), "{err}");
        tokio::time::sleep(POLL).await;
    }
    api.send(&request::metrics()).await?;
    for one in &requests {
        api.send(one).await?;
    }
    let asked = begun.elapsed().as_secs_f64();
    let stream = at(request::VSOCK);
    if snapshot.is_none() {
        // A guest that boots says when it listens.
        listens.accept().await?;
    }
    let (health, shaken) = loop {
        // The guest says when it listens, and whoever dialled before dials again: a connection that was accepted right after a
        // restore may be silent for ever (Firecracker fact 11).
        tokio::select! {
            answer = ask(&stream, &key) => match answer {
                Ok(answer) => break answer,
                Err(_) => tokio::time::sleep(AGAIN).await,
            },
            _ = listens.accept() => {}
        }
    };
    ensure!(!health.build.is_empty(), "the agent answered with nothing");
    let answered = begun.elapsed().as_secs_f64();
    let shaken = shaken.duration_since(begun).as_secs_f64();
    // A VM that is still being taken down takes the processor from whatever is measured next.
    vmm.kill().await?;
    Ok([asked, shaken, answered])
}

/// One connection: the port, the handshake (and when), the question.
async fn ask(socket: &Utf8Path, key: &StreamKey) -> Result<(Health, Instant)> {
    let mut io = UnixStream::connect(socket).await?;
    io.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes())
        .await?;
    while io.read_u8().await? != b'\n' {}
    host_handshake(&mut io, key).await?;
    let shaken = Instant::now();
    let (mux, _incoming) = start(io, Side::Host);
    let request = client::json_request(hyper::Method::GET, "/health", None::<&()>)?;
    let reply = client::send(mux.open(Open::Http).await?, request).await?;
    let bytes = client::body("GET /health", reply).await?;
    Ok((serde_json::from_slice(&bytes)?, shaken))
}
