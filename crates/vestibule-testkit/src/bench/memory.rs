//! What a controller holds that waits for work, and what one VM costs besides: its runner, and its VMM with the guest's
//! memory in it.
use super::{Report, serve::Controller, usage, vm::Vm};
use anyhow::Result;
use std::time::Duration;

/// As long as this after its start, a controller's reconcilers have all run and it does nothing.
const IDLE: Duration = Duration::from_secs(5);

/// Runs the bench. Without a built image only the controller is measured, and a note says so.
///
/// # Errors
/// When the controller or a VM does not come up.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("memory");
    let controller = Controller::start(&["pour", "--pattern", "bulk"], "").await?;
    tokio::time::sleep(IDLE).await;
    tell(&mut report, "idle controller", controller.pid()?)?;
    controller.end().await?;
    for image in ["tiny", "browser"] {
        if !Vm::is_built(image) {
            report.note(format!(
                "no image `{image}` was built: its runner and VMM were not measured"
            ));
            continue;
        }
        let vm = Vm::start(image).await?;
        tell(
            &mut report,
            &format!("{image}: runner of a ready VM"),
            vm.view.runner_pid,
        )?;
        if let Some(vmm) = vm.view.vmm_pid {
            tell(
                &mut report,
                &format!("{image}: VMM, {} MiB for the guest", vm.view.memory_mib),
                vmm,
            )?;
        }
        vm.stop().await?;
    }
    report.note("RSS counts shared pages fully, PSS by their share (proc_pid_smaps(5))");
    Ok(report)
}

fn tell(report: &mut Report, what: &str, pid: u32) -> Result<()> {
    let memory = usage::memory(pid)?;
    report.median(format!("{what}, RSS"), "MiB", &[mib(memory.rss)]);
    report.median(format!("{what}, PSS"), "MiB", &[mib(memory.pss)]);
    report.median(format!("{what}, private"), "MiB", &[mib(memory.private)]);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "no process has 2⁵² KiB")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
