//! A VM of the suite: its specification, its runner as a process, and its evidence.
use super::Setup;
use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::StreamExt as _;
use http_body_util::BodyExt as _;
use hyper::{Method, Response, body::Incoming};
use serde::de::DeserializeOwned;
use std::{
    fs::File,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};
use tokio_util::{
    codec::{FramedRead, LinesCodec},
    io::StreamReader,
};
use vestibule_api::{
    agent::{ExecReply, ExecRequest, ExecUser},
    client::{Runner, json_request},
    descriptor,
    egress::EgressPolicy,
    finding::Finding,
    ids::MachineId,
    image::Manifest,
    machine::{
        CGROUP_PARENT, Disposal, JailSpec, MachineState, MachineView, MemoryBackend, RunnerEvent,
        RunnerEventKind, StopRequest, VmSpec,
    },
    standby::{self, Preparation},
};

/// A boot in an emulation within an emulation, on a machine that is busy besides.
pub(super) const BOOT_S: u32 = 400;
const EVENT: Duration = Duration::from_secs(500);
/// What needs nobody's help but the runner's.
pub(super) const SOON: Duration = Duration::from_secs(60);
pub(super) const CONSOLE_KEEP: u64 = 4 << 10;

pub(super) async fn soon<F: Future>(what: &str, future: F) -> Result<F::Output> {
    tokio::time::timeout(SOON, future)
        .await
        .with_context(|| format!("waited {SOON:?} for {what}"))
}

/// A runner without a VM.
#[derive(Debug)]
pub(crate) struct Standing {
    process: Child,
    socket: UnixStream,
}

impl Standing {
    /// Nobody needs it any more.
    pub(super) async fn dismissed(mut self) -> Result<()> {
        drop(self.socket);
        let status = soon("the runner to end", self.process.wait()).await??;
        ensure!(status.success(), "the runner ended with {status}");
        Ok(())
    }

    pub(super) async fn killed(mut self) -> Result<()> {
        Ok(soon("the runner to be killed", self.process.kill()).await??)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Vm {
    program: Utf8PathBuf,
    pub(crate) spec: VmSpec,
    /// Whom the runner runs as, where that is somebody else.
    user: Option<u32>,
}

impl Vm {
    pub(crate) fn new(setup: &Setup, manifest: &Manifest) -> Result<Self> {
        let machine_id = MachineId::generate();
        let digest = setup.image.file_name().unwrap_or_default().parse();
        let below = |name: &str| -> Result<String> {
            let parent = setup.home.join(name);
            std::fs::create_dir_all(&parent)?;
            Ok(parent.join(machine_id.to_string()).into_string())
        };
        Ok(Self {
            program: setup.program.clone(),
            user: None,
            spec: VmSpec {
                machine_id,
                session_id: None,
                image_digest: digest.context("the image's directory is named by its digest")?,
                image_dir: setup.image.to_string(),
                driver: setup.driver,
                memory_mib: manifest.default_memory_mib,
                vcpus: manifest.default_vcpus,
                vm_dir: below("vms")?,
                evidence_dir: below("evidence")?,
                egress: EgressPolicy::default(),
                boot_deadline_s: BOOT_S,
                console_keep_bytes: CONSOLE_KEEP,
                idle_deadline_s: None,
                restore: None,
                save_to: None,
                jail: JailSpec::default(),
                cache_dir: None,
                memory_backend: MemoryBackend::default(),
            },
        })
    }

    pub(super) fn program(&self) -> &str {
        self.program.as_str()
    }

    /// Makes it one of this user's, with its directories below `home`.
    pub(super) fn of(&mut self, user: u32, home: &Utf8Path) -> Result<()> {
        std::os::unix::fs::chown(home, Some(user), Some(user))?;
        self.user = Some(user);
        self.spec.vm_dir = home.join("vm").into_string();
        self.spec.evidence_dir = home.join("evidence").into_string();
        Ok(())
    }

    /// Starts the runner and waits until it answers, or has ended.
    pub(crate) async fn start(&self) -> Result<Running> {
        let mut process = self.spawn(&["run-vm"], Stdio::piped(), self.log()?.into())?;
        let mut stdin = process.stdin.take().context("its standard input")?;
        stdin.write_all(&serde_json::to_vec(&self.spec)?).await?;
        drop(stdin);
        self.listens(process).await
    }

    /// A runner that waits for this VM, as the controller has one.
    pub(crate) fn stand_by(&self) -> Result<Standing> {
        let (socket, stdin) = UnixStream::pair()?;
        let stdin = OwnedFd::from(stdin);
        let process = self.spawn(&["run-vm", "--standby"], stdin.into(), Stdio::null())?;
        let preparation = Preparation {
            directory: self.standby().into_string(),
            driver: self.spec.driver,
            jail: self.spec.jail,
            cache_dir: self.spec.cache_dir.clone(),
        };
        standby::prepare(&socket, &preparation).context("tell the runner what to prepare for")?;
        Ok(Standing { process, socket })
    }

    /// As [`Vm::start`], by a runner that stood by.
    pub(crate) async fn start_by(&self, standing: Standing) -> Result<Running> {
        let spec = descriptor::in_memory(&serde_json::to_vec(&self.spec)?)?;
        standby::give(&standing.socket, self.log()?.as_fd(), spec.as_fd())
            .context("give the VM to the runner that stood by")?;
        self.listens(standing.process).await
    }

    /// Where runners that stand by make what they need.
    pub(super) fn standby(&self) -> Utf8PathBuf {
        let vms = Utf8Path::new(&self.spec.vm_dir).parent();
        vms.unwrap_or_else(|| Utf8Path::new("/"))
            .with_file_name("standby")
    }

    fn log(&self) -> Result<File> {
        Ok(File::create(format!("{}.log", self.spec.evidence_dir))?)
    }

    /// What the runner has said so far.
    pub(super) fn said(&self) -> Result<String> {
        Ok(std::fs::read_to_string(format!(
            "{}.log",
            self.spec.evidence_dir
        ))?)
    }

    fn spawn(&self, args: &[&str], stdin: Stdio, stderr: Stdio) -> Result<Child> {
        let mut command = Command::new(&self.program);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
            .args(args)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start `{}`", self.program))
    }

    async fn listens(&self, mut process: Child) -> Result<Running> {
        let client = Runner::at(Utf8Path::new(&self.spec.vm_dir).join("runner.sock"));
        soon("the runner to listen", async {
            while client.dial().await.is_err() && matches!(process.try_wait(), Ok(None)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await?;
        Ok(Running { client, process })
    }

    /// Starts it and waits until it is up.
    pub(crate) async fn up(&self) -> Result<Running> {
        let running = self.start().await?;
        running.up().await?;
        Ok(running)
    }

    /// Starts it; it must fail by itself, with this finding, and leave its evidence and nothing else.
    pub(super) async fn fails(&self) -> Result<Finding> {
        let running = self.start().await?;
        let finding = running.failure().await;
        running.ended().await?;
        let finding = match finding {
            Ok(finding) => finding,
            // It was over before anybody could ask.
            Err(_) => self.recorded_failure()?,
        };
        self.nothing_left(None)?;
        Ok(finding)
    }

    fn recorded_failure(&self) -> Result<Finding> {
        let events = self.events()?.into_iter();
        let finding = events.filter_map(|line| failed(&line.event)).next();
        finding.context("no event says that it failed")
    }

    pub(super) fn evidence(&self, name: &str) -> Result<String> {
        let path = Utf8Path::new(&self.spec.evidence_dir).join(name);
        let bytes = std::fs::read(&path).with_context(|| format!("read `{path}`"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(super) fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let text = self.evidence(name)?;
        serde_json::from_str(&text).with_context(|| format!("understand `{name}`"))
    }

    pub(crate) fn events(&self) -> Result<Vec<RunnerEvent>> {
        let text = self.evidence("events.ndjson")?;
        text.lines()
            .map(|line| Ok(serde_json::from_str(line)?))
            .collect()
    }

    /// What every VM that has ended has in common: the whole bundle, and nothing beside it.
    pub(super) fn nothing_left(&self, vmm: Option<u32>) -> Result<()> {
        ensure!(
            !Utf8Path::new(&self.spec.vm_dir).exists(),
            "its directory is left"
        );
        ensure!(vmm.is_none_or(|pid| !alive(pid)), "its VMM is left");
        let disposal: Disposal = self.json("disposal.json")?;
        ensure!(disposal.complete, "{disposal:?}");
        let names = |kind: &str| disposal.items.iter().any(|item| item.kind == kind);
        // Also one that never came to run a VM.
        let ran = vmm.is_some() || !self.evidence("vmm.log")?.is_empty();
        ensure!(names("process") || !ran, "no VMM is named: {disposal:?}");
        let machine: serde_json::Value = self.json("machine.json")?;
        if let Some(group) = machine["jail"]["cgroup"].as_str() {
            ensure!(
                names("cgroup") && !Utf8Path::new(group).exists(),
                "`{group}` is left: {disposal:?}"
            );
        }
        let groups = empty_groups()?;
        ensure!(groups.is_empty(), "groups of no VM are left: {groups:?}");
        for name in ["machine.json", "serial.log", "vmm.log", "exit.json"] {
            self.evidence(name)?;
        }
        let events = self.events()?;
        let numbered = events.iter().zip(1..).all(|(event, n)| event.seq == n);
        ensure!(numbered, "events are missing: {events:?}");
        let last = events.last().map(|line| &line.event);
        ensure!(
            matches!(last, Some(RunnerEventKind::Ended { .. })),
            "the last event is {last:?}"
        );
        let left = processes_of(&self.spec.machine_id.to_string());
        ensure!(left.is_empty(), "processes of the VM are left: {left:?}");
        Ok(())
    }
}

/// A runner that runs.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) client: Runner,
    pub(crate) process: Child,
}

pub(crate) fn failed(event: &RunnerEventKind) -> Option<Finding> {
    if let RunnerEventKind::Failed { finding } = event {
        Some(finding.clone())
    } else {
        None
    }
}

impl Running {
    pub(super) async fn view(&self) -> Result<MachineView> {
        Ok(soon("the VM's state", self.client.get("/machine")).await??)
    }

    pub(super) async fn vmm(&self) -> Result<u32> {
        self.view().await?.vmm_pid.context("there is no VMM")
    }

    pub(super) async fn post<R: DeserializeOwned>(&self, path: &str) -> Result<R> {
        let call = self.client.call(Method::POST, path, None::<&()>);
        Ok(soon(path, call).await??)
    }

    pub(super) async fn open(&self, path: &str) -> Result<Response<Incoming>> {
        let request = json_request(Method::GET, path, None::<&()>)?;
        Ok(soon(path, self.client.open(request)).await??)
    }

    pub(super) async fn console(&self) -> Result<String> {
        let body = self.open("/console").await?.into_body().collect();
        let bytes = soon("the console", body).await??.to_bytes();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Reads events until one is what is wanted.
    pub(crate) async fn event<T>(
        &self,
        wanted: impl Fn(&RunnerEventKind) -> Option<T>,
    ) -> Result<T> {
        let body = self.open("/events?after=0").await?.into_body();
        let body = body
            .into_data_stream()
            .map(|r| r.map_err(std::io::Error::other));
        let mut lines = FramedRead::new(StreamReader::new(body), LinesCodec::new());
        let mut seen = Vec::new();
        let find = async {
            while let Some(line) = lines.next().await {
                let event: RunnerEvent = serde_json::from_str(&line?)?;
                if let Some(found) = wanted(&event.event) {
                    return Ok(found);
                }
                seen.push(format!("{:?}", event.event));
            }
            bail!("the event never came: {}", seen.join("\n"))
        };
        tokio::time::timeout(EVENT, find)
            .await
            .context("the event took too long")?
    }

    pub(super) async fn reaches(&self, wanted: MachineState) -> Result<()> {
        self.event(|event| match event {
            RunnerEventKind::State { state, .. } if *state == wanted => Some(Ok(())),
            RunnerEventKind::Failed { finding } => {
                Some(Err(anyhow::anyhow!("it failed: {finding:?}")))
            }
            RunnerEventKind::State { .. }
            | RunnerEventKind::Phase { .. }
            | RunnerEventKind::Agent { .. }
            | RunnerEventKind::Egress { .. }
            | RunnerEventKind::Viewers { .. }
            | RunnerEventKind::FirstFrame
            | RunnerEventKind::Ended { .. } => None,
        })
        .await?
    }

    pub(crate) async fn up(&self) -> Result<()> {
        self.reaches(MachineState::Up).await
    }

    pub(super) async fn failure(&self) -> Result<Finding> {
        self.event(failed).await
    }

    pub(super) async fn exec(&self, script: &str) -> Result<ExecReply> {
        self.exec_within(script, 100).await
    }

    pub(super) async fn exec_within(&self, script: &str, timeout_s: u32) -> Result<ExecReply> {
        let request = ExecRequest {
            argv: ["bash", "-c", script].map(str::to_owned).into(),
            user: ExecUser::Root,
            stdin: String::new(),
            timeout_s,
        };
        let call = self
            .client
            .call(Method::POST, "/agent/exec", Some(&request));
        let limit = Duration::from_secs(u64::from(timeout_s) + 20);
        let reply: ExecReply = tokio::time::timeout(limit, call)
            .await
            .with_context(|| format!("`{script}` took too long"))??;
        ensure!(!reply.timed_out, "`{script}` timed out: {reply:?}");
        Ok(reply)
    }

    pub(crate) async fn stop(&self) -> Result<Disposal> {
        let request = StopRequest {
            reason: "the case is over".into(),
        };
        let call = self.client.call(Method::POST, "/stop", Some(&request));
        Ok(soon("the VM to end", call).await??)
    }

    /// Waits for the runner's end, which must be a good one.
    pub(crate) async fn ended(mut self) -> Result<()> {
        let status = soon("the runner to end", self.process.wait()).await??;
        ensure!(status.success(), "the runner ended with {status}");
        Ok(())
    }
}

/// Groups of VMs' on this host that have no process: none is made before its VMM is about to be started.
pub(super) fn empty_groups() -> Result<Vec<Utf8PathBuf>> {
    let parent = Utf8Path::new("/sys/fs/cgroup").join(CGROUP_PARENT);
    let mut empty = Vec::new();
    for entry in parent.read_dir_utf8().into_iter().flatten() {
        let path = entry?.into_path();
        let procs = std::fs::read_to_string(path.join("cgroup.procs"));
        if procs.is_ok_and(|procs| procs.is_empty()) {
            empty.push(path);
        }
    }
    Ok(empty)
}

/// Whether a process of this number exists, and is not a zombie.
pub(super) fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

pub(super) async fn gone(pid: u32) -> Result<()> {
    soon("the VMM to be gone", async {
        while alive(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

/// Processes that have the VM's id among their arguments.
pub(super) fn processes_of(id: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| alive(*pid))
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(id)
        })
        .collect()
}
