//! One VM without a controller: a runner, asked over its socket.
use anyhow::{Context, Result, ensure};
use camino::Utf8Path;
use hyper::Method;
use std::{process::Stdio, time::Duration};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
};
use vestibule_api::{
    agent::{ExecReply, ExecRequest, ExecUser},
    client::{Runner, body, json_request},
    egress::EgressPolicy,
    ids::MachineId,
    machine::{
        Disposal, DriverChoice, JailSpec, MachineState, MachineView, MemoryBackend, RunnerEvent,
        StopRequest, VmSpec,
    },
};
use vestibule_testkit::{stage::binary, wait};

/// A boot under software emulation, on a busy machine.
const UP: Duration = Duration::from_secs(300);

/// Starts `program` in the role `run-vm` and gives it the specification.
pub(super) async fn run_vm(spec: &VmSpec, mut program: Command) -> Result<Child> {
    let vm_dir = Utf8Path::new(&spec.vm_dir);
    std::fs::create_dir(vm_dir)?;
    let mut process = program
        .arg("run-vm")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(vm_dir.with_file_name("runner.log"))?)
        .kill_on_drop(true)
        .spawn()
        .context("start the runner")?;
    let mut stdin = process.stdin.take().context("its standard input")?;
    stdin.write_all(&serde_json::to_vec(spec)?).await?;
    Ok(process)
}

pub(super) struct Guest {
    runner: Runner,
    process: Child,
}

impl Guest {
    /// A VM of the image in this directory, which is named by its digest; what it has on the host is in `dir`.
    pub(super) fn spec(dir: &Utf8Path, image_dir: &Utf8Path) -> Result<VmSpec> {
        Ok(VmSpec {
            machine_id: MachineId::generate(),
            session_id: None,
            image_digest: image_dir.file_name().unwrap_or_default().parse()?,
            image_dir: image_dir.to_string(),
            driver: DriverChoice::Auto,
            memory_mib: 256,
            vcpus: 1,
            vm_dir: dir.join("vm").to_string(),
            evidence_dir: dir.join("evidence").to_string(),
            egress: EgressPolicy::default(),
            boot_deadline_s: 300,
            console_keep_bytes: 1 << 20,
            idle_deadline_s: None,
            restore: None,
            save_to: None,
            jail: JailSpec::default(),
            cache_dir: None,
            memory_backend: MemoryBackend::default(),
        })
    }

    /// Starts the runner and waits until the VM is up.
    pub(super) async fn start(spec: &VmSpec) -> Result<Self> {
        Self::start_with(spec, Command::new(binary()?)).await
    }

    /// The same, on a host whose `/etc/resolv.conf` is the file `resolvers`. Needs root.
    pub(super) async fn start_where(spec: &VmSpec, resolvers: &Utf8Path) -> Result<Self> {
        let mut command = Command::new("unshare");
        // A mount namespace of its own: nobody else's names change.
        let script = r#"mount --bind "$0" /etc/resolv.conf && exec "$@""#;
        command
            .args(["--mount", "--", "sh", "-c", script, resolvers.as_str()])
            .arg(binary()?);
        Self::start_with(spec, command).await
    }

    async fn start_with(spec: &VmSpec, program: Command) -> Result<Self> {
        let process = run_vm(spec, program).await?;
        let runner = Runner::at(Utf8Path::new(&spec.vm_dir).join("runner.sock"));
        wait::until("the VM to be up", UP, || async {
            match runner.get::<MachineView>("/machine").await {
                Ok(view) if view.state == MachineState::Up => Ok(()),
                Ok(view) => Err(format!("{:?}", view.state)),
                Err(err) => Err(err.to_string()),
            }
        })
        .await?;
        Ok(Self { runner, process })
    }

    pub(super) async fn view(&self) -> Result<MachineView> {
        Ok(self.runner.get("/machine").await?)
    }

    pub(super) async fn run(&self, user: ExecUser, script: &str, argument: &str) -> Result<String> {
        Ok(self.exec(user, script, argument, 60).await?.stdout)
    }

    /// What a script of root's says, if it ends well.
    pub(super) async fn root(&self, script: &str, timeout_s: u32) -> Result<String> {
        let reply = self.exec(ExecUser::Root, script, "", timeout_s).await?;
        ensure!(reply.code == Some(0), "`{script}`: {reply:?}");
        Ok(reply.stdout)
    }

    async fn exec(
        &self,
        user: ExecUser,
        script: &str,
        argument: &str,
        timeout_s: u32,
    ) -> Result<ExecReply> {
        let request = ExecRequest {
            argv: ["bash", "-c", script, "ask", argument]
                .map(str::to_owned)
                .to_vec(),
            user,
            stdin: String::new(),
            timeout_s,
        };
        let reply: ExecReply = self
            .runner
            .call(Method::POST, "/agent/exec", Some(&request))
            .await?;
        ensure!(!reply.timed_out, "`{script}` timed out");
        Ok(reply)
    }

    /// Ends the VM. Returns everything that its runner said.
    pub(super) async fn end(mut self) -> Result<Vec<RunnerEvent>> {
        let events = json_request(Method::GET, "/events?after=0", None::<&()>)?;
        let events = self.runner.open(events).await?;
        let reason = StopRequest {
            reason: "the test is over".into(),
        };
        let disposal: Disposal = self
            .runner
            .call(Method::POST, "/stop", Some(&reason))
            .await?;
        ensure!(disposal.complete, "{disposal:?}");
        let bytes = body("GET /events", events).await?;
        self.process.wait().await?;
        bytes
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| Ok(serde_json::from_slice(line)?))
            .collect()
    }
}
