//! VMs that end before they are up, or because something was killed.
use super::{
    Suite,
    vm::{Running, Vm, gone, soon},
};
use anyhow::{Context, Result, ensure};
use camino::Utf8Path;
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::fs::symlink;
use vestibule_api::{
    cause::Cause,
    machine::{DriverChoice, MachineState, PROCESSES_MARK, ProcessesMark, RestoreSpec},
};

pub(super) fn kill(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid.try_into()?).context("a process id")?;
    Ok(kill_process(pid, signal)?)
}

/// The VMM is killed: that is said with the signal, the bundle is whole, and nothing is left.
pub(super) async fn vmm_killed(vm: &Vm, running: Running) -> Result<()> {
    let vmm = running.vmm().await?;
    kill(vmm, Signal::KILL)?;
    let finding = running.failure().await?;
    ensure!(
        finding.cause == Cause::VmmExited && finding.retryable,
        "{finding:?}"
    );
    ensure!(finding.why.contains("signal 9"), "{finding:?}");
    running.ended().await?;
    vm.nothing_left(Some(vmm))
}

pub(super) async fn killed_while_booting(suite: &mut Suite) {
    let vm = suite.vm();
    suite
        .case("the VMM of one that boots is killed", async {
            let vm = vm?;
            let running = vm.start().await?;
            running.reaches(MachineState::Booting).await?;
            vmm_killed(&vm, running).await
        })
        .await;
    let vm = suite.vm();
    suite
        .case("the runner of one that boots is killed", async {
            let vm = vm?;
            let mut running = vm.start().await?;
            running.reaches(MachineState::Booting).await?;
            let vmm = running.vmm().await?;
            let runner = running.process.id().context("it runs")?;
            running.process.kill().await?;
            gone(vmm).await?;
            named(&vm, runner, vmm)
        })
        .await;
    let vm = suite.vm();
    suite
        .case("SIGTERM is a stop with evidence", async {
            let vm = vm?;
            let running = vm.start().await?;
            running.reaches(MachineState::Booting).await?;
            let vmm = running.vmm().await?;
            kill(running.process.id().context("it runs")?, Signal::TERM)?;
            running.ended().await?;
            vm.nothing_left(Some(vmm))?;
            ensure!(
                vm.evidence("machine.json")?.contains("SIGTERM"),
                "why is not said"
            );
            Ok(())
        })
        .await;
    let vm = suite.vm();
    suite
        .case("a stop before there is a VMM", async {
            let vm = vm?;
            let running = vm.start().await?;
            ensure!(running.stop().await?.complete, "something is left");
            running.ended().await?;
            vm.nothing_left(None)
        })
        .await;
    let vm = suite.vm();
    suite
        .case("a boot deadline that passes", async {
            let mut vm = vm?;
            vm.spec.boot_deadline_s = 1;
            let finding = vm.fails().await?;
            // How far a guest comes in a second is the machine's business; it comes to no agent that answers.
            let so_far = [
                Cause::GuestNotExecuting,
                Cause::StreamRefused,
                Cause::ListeningNotAnswering,
            ];
            ensure!(
                so_far.contains(&finding.cause) && finding.why.contains("after 1 s"),
                "{finding:?}"
            );
            Ok(format!("{}", finding.cause))
        })
        .await;
}

/// What a killed runner leaves names it and its VMM's group, in which a jailed VMM is the second.
fn named(vm: &Vm, runner: u32, vmm: u32) -> Result<String> {
    let path = Utf8Path::new(&vm.spec.vm_dir).join(PROCESSES_MARK);
    let mark: ProcessesMark = serde_json::from_slice(&std::fs::read(path)?)?;
    let first = mark.vmm.context("no VMM is named")?.pid;
    ensure!(mark.runner.pid == runner && first <= vmm, "{mark:?}");
    Ok(format!("runner {runner}, group {first}"))
}

/// An image like the suite's, but for `name`, which is missing or what is given.
fn like(suite: &Suite, vm: &mut Vm, name: &str, with: Option<&[u8]>) -> Result<()> {
    let directory = Utf8Path::new(&suite.setup.home)
        .join(format!("image-without-{name}"))
        .join(vm.spec.image_digest.as_str());
    std::fs::create_dir_all(&directory)?;
    for entry in suite.setup.image.read_dir_utf8()? {
        let entry = entry?;
        if entry.file_name() != name {
            symlink(entry.path(), directory.join(entry.file_name()))?;
        }
    }
    if let Some(content) = with {
        std::fs::write(directory.join(name), content)?;
    }
    vm.spec.image_dir = directory.into_string();
    Ok(())
}

type Wrong = fn(&Suite, &mut Vm) -> Result<()>;

pub(super) async fn wrong_inputs(suite: &mut Suite) {
    let cases: [(&str, Cause, Wrong); 6] = [
        (
            "an image that is not there",
            Cause::ImageMissing,
            |_, vm| {
                vm.spec.image_dir.push_str("-nowhere");
                Ok(())
            },
        ),
        (
            "an image without its root",
            Cause::ImageMissing,
            |suite, vm| like(suite, vm, "root.ext4", None),
        ),
        ("a kernel that is none", Cause::VmmExited, |suite, vm| {
            let name = match suite.setup.driver {
                DriverChoice::Firecracker => "vmlinux",
                DriverChoice::Auto | DriverChoice::Qemu => "vmlinuz",
            };
            like(suite, vm, name, Some(b"not a kernel"))
        }),
        ("too little memory", Cause::OutOfMemoryGuest, |_, vm| {
            vm.spec.memory_mib = 8;
            Ok(())
        }),
        (
            "a snapshot that is not there",
            Cause::SnapshotRefused,
            |_, vm| {
                vm.spec.restore = Some(RestoreSpec {
                    id: "0".repeat(64).parse()?,
                    dir: "/nowhere".to_owned(),
                });
                Ok(())
            },
        ),
        (
            "both to restore and to save",
            Cause::LaunchRefused,
            |_, vm| {
                vm.spec.restore = Some(RestoreSpec {
                    id: "0".repeat(64).parse()?,
                    dir: "/nowhere".to_owned(),
                });
                vm.spec.save_to = Some("/nowhere".to_owned());
                Ok(())
            },
        ),
    ];
    for (name, cause, wrong) in cases {
        let made = suite
            .vm()
            .and_then(|mut vm| wrong(suite, &mut vm).map(|()| vm));
        suite
            .case(&format!("wrong input: {name}"), async {
                let finding = soon("the VM to fail", made?.fails()).await??;
                ensure!(finding.cause == cause, "{finding:?}");
                ensure!(
                    !finding.evidence.is_empty() && !finding.fix.is_empty(),
                    "{finding:?}"
                );
                Ok(finding.evidence[0].text.clone())
            })
            .await;
    }
}
