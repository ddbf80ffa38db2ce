//! What the tests share: patience, runners as processes of their own, and counts of what is left on the machine.
use crate::bare::{self, Then};
use camino::{Utf8Path, Utf8PathBuf};
use camino_tempfile::Utf8TempDir;
use futures_util::StreamExt;
use http_body_util::BodyExt;
use hyper::{Method, body::Incoming};
use std::{
    io::Write, os::unix::process::ExitStatusExt, process::Stdio, str::FromStr, time::Duration,
};
use tokio::process::{Child, Command};
use tokio_util::{
    codec::{FramedRead, LinesCodec},
    io::StreamReader,
};
use vestibule_api::{
    client::{Runner, json_request},
    egress::EgressPolicy,
    ids::{ImageDigest, MachineId},
    machine::{
        Disposal, DriverChoice, JailSpec, MachineState, MachineView, MemoryBackend, RunnerEvent,
        RunnerEventKind, StopRequest, VmSpec,
    },
};

const PATIENCE: Duration = Duration::from_secs(60);

/// What is awaited must come; how long it takes is the machine's business.
pub(crate) async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("it took too long")
}

pub(crate) fn qemu_program() -> Utf8PathBuf {
    vestibule_vm::doctor::find_program(vestibule_vm::qemu::PROGRAM).unwrap()
}

/// The example `run-vm`.
fn runner_program() -> Utf8PathBuf {
    example("run-vm")
}

/// An example, which cargo builds beside the tests.
pub(crate) fn example(name: &str) -> Utf8PathBuf {
    let test = Utf8PathBuf::from_path_buf(std::env::current_exe().unwrap()).unwrap();
    let program = test
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .join("examples")
        .join(name);
    assert!(
        program.exists(),
        "`{program}` is not built; run the tests with `cargo test -p vestibule-vm`"
    );
    program
}

/// A place of its own for one VM: image, VM directory, evidence.
pub(crate) struct Place {
    pub(crate) home: Utf8TempDir,
    pub(crate) spec: VmSpec,
}

impl Place {
    /// With a guest of a few bytes.
    pub(crate) fn bare(words: &str, then: Then) -> Self {
        let home = camino_tempfile::tempdir().unwrap();
        let image = home.path().join("image-with-\"quotes\"");
        bare::image(&image, words, then);
        Self::new(home, &image, 32)
    }

    pub(crate) fn new(home: Utf8TempDir, image: &Utf8Path, memory_mib: u32) -> Self {
        let machine_id = MachineId::generate();
        let spec = VmSpec {
            machine_id,
            session_id: None,
            image_digest: ImageDigest::from_str(&"0".repeat(64)).unwrap(),
            image_dir: image.to_string(),
            driver: DriverChoice::Auto,
            memory_mib,
            vcpus: 1,
            vm_dir: home.path().join("vms").join(machine_id.to_string()).into(),
            evidence_dir: home
                .path()
                .join("evidence")
                .join(machine_id.to_string())
                .into(),
            egress: EgressPolicy::default(),
            boot_deadline_s: 60,
            console_keep_bytes: 4096,
            idle_deadline_s: None,
            restore: None,
            save_to: None,
            jail: JailSpec::default(),
            cache_dir: None,
            memory_backend: MemoryBackend::default(),
        };
        Self { home, spec }
    }

    pub(crate) fn evidence(&self, name: &str) -> String {
        let path = Utf8Path::new(&self.spec.evidence_dir).join(name);
        let bytes = std::fs::read(&path).unwrap_or_else(|err| panic!("read `{path}`: {err}"));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) fn events(&self) -> Vec<RunnerEvent> {
        let text = self.evidence("events.ndjson");
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Starts the runner and waits until it answers.
    pub(crate) async fn start(&self) -> Running {
        self.start_with(|_| ()).await
    }

    pub(crate) async fn start_with(&self, change: impl FnOnce(&mut Command)) -> Running {
        let mut command = Command::new(runner_program());
        command
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        change(&mut command);
        let mut process = command.spawn().unwrap();
        let spec = serde_json::to_vec(&self.spec).unwrap();
        let stdin = process.stdin.take().unwrap().into_owned_fd().unwrap();
        std::fs::File::from(stdin).write_all(&spec).unwrap();
        let socket = Utf8Path::new(&self.spec.vm_dir).join(vestibule_vm::SOCKET);
        let client = Runner::at(&socket);
        soon(async {
            // The socket's appearance has no event; its answer is what counts.
            while client.dial().await.is_err() && process.try_wait().unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        Running { process, client }
    }
}

/// A runner that runs.
pub(crate) struct Running {
    pub(crate) process: Child,
    pub(crate) client: Runner,
}

impl Running {
    pub(crate) async fn view(&self) -> MachineView {
        soon(self.client.get("/machine")).await.unwrap()
    }

    pub(crate) async fn stop(&self) -> Disposal {
        let request = StopRequest {
            reason: "the test is over".into(),
        };
        soon(self.client.call(Method::POST, "/stop", Some(&request)))
            .await
            .unwrap()
    }

    pub(crate) async fn open(&self, path: &str) -> hyper::Response<Incoming> {
        let request = json_request(Method::GET, path, None::<&()>).unwrap();
        soon(self.client.open(request)).await.unwrap()
    }

    /// Everything that the console has said so far.
    pub(crate) async fn console(&self) -> String {
        let body = soon(self.open("/console").await.into_body().collect())
            .await
            .unwrap();
        String::from_utf8_lossy(&body.to_bytes()).into_owned()
    }

    /// Reads events until one satisfies `wanted`; panics at the last event.
    pub(crate) async fn event<T>(&self, wanted: impl Fn(&RunnerEventKind) -> Option<T>) -> T {
        let body = self
            .open("/events?after=0")
            .await
            .into_body()
            .into_data_stream();
        let body = StreamReader::new(body.map(|r| r.map_err(std::io::Error::other)));
        let mut lines = FramedRead::new(body, LinesCodec::new());
        let mut seen = Vec::new();
        let find = async {
            while let Some(Ok(line)) = lines.next().await {
                let event: RunnerEvent = serde_json::from_str(&line).unwrap();
                if let Some(found) = wanted(&event.event) {
                    return found;
                }
                seen.push(line);
            }
            panic!("the event never came: {seen:#?}");
        };
        tokio::time::timeout(Duration::from_secs(300), find)
            .await
            .expect("the event took too long")
    }

    pub(crate) async fn state(&self, wanted: MachineState) {
        self.event(|event| match event {
            RunnerEventKind::State { state, .. } if *state == wanted => Some(()),
            _ => None,
        })
        .await;
    }

    /// Waits for the runner's end; it must end well, and its words are returned.
    pub(crate) async fn ended(self) -> String {
        let output = soon(self.process.wait_with_output()).await.unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "{:?} {:?} {words}",
            output.status.code(),
            output.status.signal()
        );
        words
    }
}

/// Whether a process of this number exists (and is not a zombie).
pub(crate) fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Waits until the process is gone.
pub(crate) async fn gone(pid: u32) {
    soon(async {
        while alive(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Every path below `directory`.
pub(crate) fn tree(directory: &Utf8Path) -> Vec<String> {
    let mut paths = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in next.read_dir_utf8().into_iter().flatten().flatten() {
            paths.push(entry.path().to_string());
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.into_path());
            }
        }
    }
    paths.sort();
    paths
}
