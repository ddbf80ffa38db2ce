//! `GET /report`: what a person would look up with `systemctl`, `ss` and `xwininfo`. A part that cannot be read is named in
//! `missing`; the rest is still there.
mod proc;
mod processes;

use crate::{
    agent::Agent,
    systemd::{BusError, Systemd},
};
use std::sync::Arc;
use vestibule_api::{agent::Report, error::Chain, time::Timestamp};

/// Collects a report. Takes as long as PID 1 takes to answer, and no thread meanwhile.
pub(crate) async fn collect(agent: &Arc<Agent>) -> Report {
    let mut report = Report {
        at: Some(Timestamp::now()),
        kernel: proc::line("/proc/sys/kernel/osrelease"),
        hostname: proc::line("/proc/sys/kernel/hostname"),
        machine_id: proc::line("/etc/machine-id"),
        boot_id: proc::line("/proc/sys/kernel/random/boot_id"),
        uptime_ms: agent.health().uptime_ms,
        display: agent.display.borrow().clone(),
        ..Report::default()
    };
    match proc::memory() {
        Ok(memory) => report.memory = memory,
        Err(err) => report.missing.push(format!("memory: {err}")),
    }
    match tokio::task::spawn_blocking(proc::listeners).await {
        Ok((listeners, troubles)) => {
            report.listeners = listeners;
            report.missing.extend(troubles);
        }
        Err(err) => report.missing.push(format!("listeners: {err}")),
    }
    match tokio::task::spawn_blocking(processes::busiest).await {
        Ok(Ok(processes)) => report.processes = processes,
        Ok(Err(err)) => report.missing.push(format!("processes: {err}")),
        Err(err) => report.missing.push(format!("processes: {err}")),
    }
    if let Err(err) = units(&mut report).await {
        report.missing.push(format!("units: {}", Chain(&err)));
    }
    report
}

/// Each part on its own: a question that PID 1 does not answer must not cost the answers before it.
async fn units(report: &mut Report) -> Result<(), BusError> {
    let mut systemd = Systemd::connect().await?;
    report.system_state = systemd.state().await?;
    report.jobs = systemd.jobs().await?;
    report.units = systemd.units().await?;
    Ok(())
}
