//! `vestibule vm`: VMs by their runners' sockets below `$VESTIBULE_HOME/vms`, with or without a controller.
mod shell;
mod start;

use crate::{
    home::Home,
    output::{self, Output},
};
use anyhow::{Context as _, bail};
use camino::{Utf8Path, Utf8PathBuf};
use http_body_util::BodyExt as _;
use hyper::Method;
use std::{
    io::Write as _, os::unix::fs::OpenOptionsExt as _, process::ExitCode, str::FromStr as _,
};
use vestibule_api::{
    agent::{ExecReply, ExecRequest, ExecUser},
    client::{Runner, json_request},
    finding::Verdict,
    ids::MachineId,
    machine::{Disposal, MachineView, StopRequest, VmSpec},
    standby,
};
use vestibule_vm::{Prepared, memory::RUNNER_BYTES};

#[derive(Debug, clap::Args)]
pub(crate) struct RunVmArgs {
    /// The VM's specification; the runner takes the lock of the VM's directory by itself.
    #[arg(long, value_name = "FILE", conflicts_with = "standby")]
    spec: Option<Utf8PathBuf>,
    /// Wait on standard input, a Unix socket, for standard error and a specification: of the controller, which keeps one such
    /// runner, so that a VM does not wait for the start of a program.
    #[arg(long)]
    standby: bool,
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum VmCommand {
    /// Start a VM that belongs to no session, and say when it is ready.
    Run(start::StartArgs),
    /// List running VMs.
    List,
    /// Print a VM's serial console; of a VM that is gone, from its evidence.
    Logs {
        vm: MachineId,
        /// Go on until the VM ends.
        #[arg(short, long)]
        follow: bool,
    },
    /// Run a program in a VM (not in one that belongs to a session).
    Exec {
        vm: MachineId,
        /// Run as the unprivileged user instead of root.
        #[arg(long)]
        person: bool,
        /// Give up after so many seconds.
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u32,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true)]
        argv: Vec<String>,
    },
    /// Open a shell in a VM (not in one that belongs to a session).
    Shell { vm: MachineId },
    /// Take a VM's evidence and end it.
    Stop { vm: MachineId },
    /// Say why a VM failed, also one that is long gone: the stored verdict, else what its evidence says.
    Why { vm: MachineId },
}

/// The role `run-vm`: gets the specification and owns the VM until it ends.
pub(crate) async fn run_vm(args: RunVmArgs) -> anyhow::Result<ExitCode> {
    vestibule_vm::memory::limit(RUNNER_BYTES).context("limit the runner's memory")?;
    let (text, prepared) = if args.standby {
        match stand_by().await? {
            Some(given) => given,
            None => return Ok(ExitCode::SUCCESS),
        }
    } else {
        let text = match &args.spec {
            Some(path) => std::fs::read_to_string(path)
                .with_context(|| format!("read the VM's specification `{path}`"))?,
            None => std::io::read_to_string(std::io::stdin())
                .context("read the VM's specification from standard input")?,
        };
        (text, Prepared::default())
    };
    let spec: VmSpec = serde_json::from_str(&text).context("understand the VM's specification")?;
    if args.spec.is_some() {
        take_lock(Utf8Path::new(&spec.vm_dir))?;
    }
    if !args.standby {
        crate::serve::init_logging();
    }
    tracing::debug!(machine.id = %spec.machine_id, "the VM's specification is here");
    vestibule_vm::run(spec, prepared).await?;
    Ok(ExitCode::SUCCESS)
}

/// Does what needs no specification, and waits for one; none: nobody has one for this runner any more.
async fn stand_by() -> anyhow::Result<Option<(String, Prepared)>> {
    crate::serve::init_logging();
    const WAIT: &str = "wait on standard input, which is to be a Unix socket, for a VM";
    let Some(preparation) = standby::preparation(std::io::stdin()).context(WAIT)? else {
        return Ok(None);
    };
    let prepared = vestibule_vm::prepare(&preparation).await;
    let Some(given) = standby::take(std::io::stdin()).context(WAIT)? else {
        return Ok(None);
    };
    rustix::stdio::dup2_stderr(&given.stderr).context("write to the VM's own log")?;
    let text = std::io::read_to_string(std::fs::File::from(given.spec))
        .context("read the VM's specification, which was handed over")?;
    Ok(Some((text, prepared)))
}

/// Makes `runner.stderr` of a VM's directory standard error, locked: as the controller hands it to a runner of its own.
fn take_lock(vm_dir: &Utf8Path) -> anyhow::Result<()> {
    let path = vm_dir.join("runner.stderr");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("open `{path}`"))?;
    file.try_lock()
        .with_context(|| format!("lock `{path}`: another runner has it"))?;
    rustix::stdio::dup2_stderr(&file).with_context(|| format!("write to `{path}`"))
}

pub(crate) async fn run(home: &Home, command: VmCommand, out: Output) -> anyhow::Result<ExitCode> {
    match command {
        VmCommand::Run(args) => return start::start(home, args, out).await,
        VmCommand::List => list(home, out).await?,
        VmCommand::Logs { vm, follow } => logs(home, vm, follow).await?,
        VmCommand::Exec {
            vm,
            person,
            timeout,
            argv,
        } => return exec(home, vm, person, timeout, argv, out).await,
        VmCommand::Shell { vm } => shell::shell(&runner(home, vm)?).await?,
        VmCommand::Stop { vm } => {
            let request = StopRequest {
                reason: "asked for on the command line".to_owned(),
            };
            let disposal: Disposal = runner(home, vm)?
                .call(Method::POST, "/stop", Some(&request))
                .await?;
            out.print(&disposal, |d| {
                let state = if d.complete {
                    "gone, without a trace"
                } else {
                    "ended, but something is left"
                };
                format!(
                    "{vm} is {state}; evidence in {}",
                    home.evidence().join(vm.to_string())
                )
            })?;
        }
        VmCommand::Why { vm } => return why(home, vm, out),
    }
    Ok(ExitCode::SUCCESS)
}

/// The runner of a VM that runs.
fn runner(home: &Home, vm: MachineId) -> anyhow::Result<Runner> {
    let socket = home.vms().join(vm.to_string()).join("runner.sock");
    if socket.exists() {
        return Ok(Runner::at(socket));
    }
    bail!(
        "VM {vm} does not run; `vestibule vm list` shows those that do, `vestibule vm why {vm}` says how it ended"
    )
}

async fn list(home: &Home, out: Output) -> anyhow::Result<()> {
    let mut views = Vec::new();
    let entries = match home.vms().read_dir_utf8() {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>()?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("list `{}`", home.vms())),
    };
    for entry in entries {
        let Ok(id) = MachineId::from_str(entry.file_name()) else {
            continue;
        };
        let Ok(runner) = runner(home, id) else {
            continue;
        };
        // A runner that does not answer is not running; what is left of it is the controller's to collect.
        if let Ok(view) = runner.get::<MachineView>("/machine").await {
            views.push(view);
        }
    }
    out.print(&views, |views| {
        let row = |v: &MachineView| {
            vec![
                v.machine_id.to_string(),
                serde_json::to_value(v.state)
                    .ok()
                    .and_then(|s| s.as_str().map(str::to_owned))
                    .unwrap_or_default(),
                v.driver.clone(),
                v.image_digest.short().to_owned(),
                v.session_id.map(|s| s.to_string()).unwrap_or_default(),
                v.started_at.to_string(),
            ]
        };
        output::table(
            &["VM", "STATE", "DRIVER", "IMAGE", "SESSION", "STARTED"],
            &views.iter().map(row).collect::<Vec<_>>(),
        )
    })
}

async fn logs(home: &Home, vm: MachineId, follow: bool) -> anyhow::Result<()> {
    let Ok(runner) = runner(home, vm) else {
        let path = evidence_of(home, vm)?.join("serial.log");
        let bytes = std::fs::read(&path).with_context(|| format!("read `{path}`"))?;
        return std::io::stdout()
            .lock()
            .write_all(&bytes)
            .context("write to standard output");
    };
    let request = json_request(
        Method::GET,
        &format!("/console?follow={follow}"),
        None::<&()>,
    )?;
    let mut body = runner.open(request).await?.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            let mut stdout = std::io::stdout().lock();
            stdout
                .write_all(&data)
                .and_then(|()| stdout.flush())
                .context("write to standard output")?;
        }
    }
    Ok(())
}

async fn exec(
    home: &Home,
    vm: MachineId,
    person: bool,
    timeout_s: u32,
    argv: Vec<String>,
    out: Output,
) -> anyhow::Result<ExitCode> {
    let user = if person {
        ExecUser::Person
    } else {
        ExecUser::Root
    };
    let request = ExecRequest {
        argv,
        user,
        stdin: String::new(),
        timeout_s,
    };
    let reply: ExecReply = runner(home, vm)?
        .call(Method::POST, "/agent/exec", Some(&request))
        .await?;
    if out.json {
        out.print(&reply, |_| String::new())?;
    } else {
        std::io::stdout()
            .lock()
            .write_all(reply.stdout.as_bytes())?;
        std::io::stderr()
            .lock()
            .write_all(reply.stderr.as_bytes())?;
        if reply.truncated {
            output::note("vestibule: the output was longer than 1 MiB and is cut");
        }
        if reply.timed_out {
            output::note(&format!(
                "vestibule: ended after {timeout_s} s; give it more with --timeout"
            ));
        }
    }
    let code = reply
        .code
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(255);
    Ok(ExitCode::from(code))
}

/// Where a VM's evidence is: its bundle; of one that runs, or whose runner was killed, the runner's own directory.
fn evidence_of(home: &Home, vm: MachineId) -> anyhow::Result<Utf8PathBuf> {
    let places = [home.evidence(), home.vms()].map(|place| place.join(vm.to_string()));
    places
        .into_iter()
        .find(|dir| dir.exists())
        .with_context(|| {
            format!(
                "there is no VM {vm} and no evidence of one in `{}`",
                home.evidence()
            )
        })
}

fn why(home: &Home, vm: MachineId, out: Output) -> anyhow::Result<ExitCode> {
    let dir = evidence_of(home, vm)?;
    crate::diagnose::print(&verdict(&dir)?, out)
}

/// The controller's verdict, which also weighs what the session knew; of a VM without a session, the bundle's own.
fn verdict(dir: &Utf8Path) -> anyhow::Result<Verdict> {
    let path = dir.join("verdict.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("understand `{path}`")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let evidence = vestibule_diagnose::Evidence::of_vm(dir.as_std_path())?;
            Ok(vestibule_diagnose::diagnose(&evidence))
        }
        Err(error) => Err(error).with_context(|| format!("read `{path}`")),
    }
}
