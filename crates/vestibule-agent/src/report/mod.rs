//! `GET /report`: what a person would look up with `systemctl`, `ss` and `xwininfo`. A part that cannot be read is named in
//! `missing`; the rest is still there.
mod proc;

use crate::{
    agent::{Agent, uptime_ms},
    systemd::{BusError, Systemd},
};
use std::sync::Arc;
use vestibule_api::{
    agent::{JobReport, Report, UnitReport},
    error::Chain,
    time::Timestamp,
};

/// Collects a report. Takes as long as PID 1 takes to answer, and no thread meanwhile.
pub(crate) async fn collect(agent: &Arc<Agent>) -> Report {
    let mut report = Report {
        at: Some(Timestamp::now()),
        kernel: proc::line("/proc/sys/kernel/osrelease"),
        hostname: proc::line("/proc/sys/kernel/hostname"),
        machine_id: proc::line("/etc/machine-id"),
        boot_id: proc::line("/proc/sys/kernel/random/boot_id"),
        uptime_ms: uptime_ms(),
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
    match units().await {
        Ok((state, units, jobs)) => {
            (report.system_state, report.units, report.jobs) = (state, units, jobs);
        }
        Err(err) => report.missing.push(format!("units: {}", Chain(&err))),
    }
    report
}

async fn units() -> Result<(String, Vec<UnitReport>, Vec<JobReport>), BusError> {
    let mut systemd = Systemd::connect().await?;
    Ok((
        systemd.state().await?,
        systemd.units().await?,
        systemd.jobs().await?,
    ))
}
