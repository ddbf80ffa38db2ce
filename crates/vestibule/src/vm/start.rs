//! `vestibule vm run`: starts a runner without a controller and follows it until the VM is ready.
use crate::{home::Home, output::Output};
use anyhow::{Context as _, bail};
use camino::Utf8PathBuf;
use http_body_util::BodyExt as _;
use hyper::Method;
use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode, Stdio},
};
use vestibule_api::{
    client::{Runner, json_request},
    egress::{EgressMode, EgressPolicy},
    ids::MachineId,
    machine::{
        DriverChoice, JailSpec, MachineState, MachineView, MemoryBackend, RunnerEvent,
        RunnerEventKind, VmSpec,
    },
};

#[derive(Debug, clap::Args)]
pub(crate) struct StartArgs {
    /// Image alias or digest.
    #[arg(default_value = "browser")]
    image: String,
    /// Memory in MiB [default: what the image declares].
    #[arg(long)]
    memory: Option<u32>,
    /// Virtual CPUs [default: what the image declares].
    #[arg(long)]
    vcpus: Option<u32>,
    /// What runs it: `auto`, `qemu` or `firecracker`.
    #[arg(long, default_value = "auto")]
    driver: DriverChoice,
    /// Let it reach public addresses.
    #[arg(long)]
    egress: bool,
    /// Seconds until the VM must be ready.
    #[arg(long, default_value_t = 300)]
    deadline: u32,
}

pub(crate) async fn start(home: &Home, args: StartArgs, out: Output) -> anyhow::Result<ExitCode> {
    let spec = spec(home, &args)?;
    let vm = spec.machine_id;
    let vm_dir = Utf8PathBuf::from(&spec.vm_dir);
    std::fs::create_dir_all(&vm_dir).with_context(|| format!("create `{vm_dir}`"))?;
    let mut child = spawn(&spec, &vm_dir)?;
    let runner = wait_for_socket(&vm_dir, &mut child)
        .await
        .with_context(|| format!("begin VM {vm}; `vestibule vm why {vm}` may say more"))?;
    follow(&runner, out).await?;
    let view: MachineView = runner
        .get("/machine")
        .await
        .with_context(|| format!("the VM ended; `vestibule vm why {vm}` says why"))?;
    if view.state != MachineState::Up {
        bail!("VM {vm} did not become ready; `vestibule vm why {vm}` says why");
    }
    out.print(&view, |view| view.machine_id.to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn spec(home: &Home, args: &StartArgs) -> anyhow::Result<VmSpec> {
    let store = vestibule_image::Store::open(home.path())?;
    let image = store.resolve(&args.image)?;
    let manifest = store.manifest(&image)?;
    let machine_id = MachineId::generate();
    let mode = if args.egress {
        EgressMode::Open
    } else {
        EgressMode::Closed
    };
    Ok(VmSpec {
        machine_id,
        session_id: None,
        image_dir: store.dir(&image).into_string(),
        image_digest: image,
        driver: args.driver,
        memory_mib: args.memory.unwrap_or(manifest.default_memory_mib),
        vcpus: args.vcpus.unwrap_or(manifest.default_vcpus),
        vm_dir: home.vms().join(machine_id.to_string()).into_string(),
        evidence_dir: home.evidence().join(machine_id.to_string()).into_string(),
        egress: EgressPolicy {
            mode,
            ..EgressPolicy::default()
        },
        boot_deadline_s: args.deadline,
        console_keep_bytes: 1 << 20,
        idle_deadline_s: None,
        restore: None,
        save_to: None,
        jail: JailSpec::default(),
        cache_dir: Some(home.path().join("cache").into_string()),
        memory_backend: MemoryBackend::default(),
    })
}

/// The runner outlives this command: a session of its own, its log in the VM's directory.
fn spawn(spec: &VmSpec, vm_dir: &camino::Utf8Path) -> anyhow::Result<std::process::Child> {
    let exe = std::env::current_exe().context("find the path of this program")?;
    let log = std::fs::File::create(vm_dir.join("runner.log"))
        .with_context(|| format!("create `{vm_dir}/runner.log`"))?;
    let mut child = Command::new(exe)
        .arg("run-vm")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()
        .context("start `vestibule run-vm`")?;
    let mut stdin = child
        .stdin
        .take()
        .context("the runner's standard input is a pipe")?;
    stdin
        .write_all(&serde_json::to_vec(spec)?)
        .context("hand the specification to the runner")?;
    Ok(child)
}

/// Waits until the runner listens; it says so by its socket, and when it can't, by ending.
async fn wait_for_socket(
    vm_dir: &camino::Utf8Path,
    child: &mut std::process::Child,
) -> anyhow::Result<Runner> {
    let runner = Runner::at(vm_dir.join("runner.sock"));
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(20));
    loop {
        tick.tick().await;
        if runner.dial().await.is_ok() {
            return Ok(runner);
        }
        if let Some(status) = child.try_wait()? {
            let log = std::fs::read_to_string(vm_dir.join("runner.log")).unwrap_or_default();
            bail!(
                "the runner ended ({status}) before it listened: {}",
                log.lines().last().unwrap_or("it said nothing")
            );
        }
    }
}

/// Prints phases until the VM is up or has failed.
async fn follow(runner: &Runner, out: Output) -> anyhow::Result<()> {
    let reply = runner
        .open(json_request(Method::GET, "/events?after=0", None::<&()>)?)
        .await?;
    let mut body = reply.into_body();
    let mut pending = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        pending.extend_from_slice(&data);
        while let Some(end) = pending.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let event: RunnerEvent =
                serde_json::from_slice(&line).context("understand the runner's event")?;
            match event.event {
                RunnerEventKind::Phase { phase } if !out.json => {
                    crate::output::note(&format!("{}  {phase:?}", event.at));
                }
                RunnerEventKind::State {
                    state: MachineState::Up,
                    ..
                } => return Ok(()),
                RunnerEventKind::Failed { finding } => {
                    bail!("{}", crate::output::finding(&finding))
                }
                RunnerEventKind::State { .. }
                | RunnerEventKind::Phase { .. }
                | RunnerEventKind::Agent { .. }
                | RunnerEventKind::Egress { .. }
                | RunnerEventKind::Viewers { .. }
                | RunnerEventKind::FirstFrame
                | RunnerEventKind::Ended { .. } => {}
            }
        }
    }
    Ok(())
}
