//! From the runner's start to each milestone of a VM, by the runner's own events, and the processor time that the VMM has
//! used when the VM is ready.
use super::{Report, usage, vm::Vm};
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use vestibule_api::{
    machine::{Phase, RunnerEvent, RunnerEventKind},
    time::Timestamp,
};

/// Boots of each image.
const BOOTS: usize = 3;

/// Runs the bench, for each image that is built.
///
/// # Errors
/// When no image is built, or a VM does not become ready.
pub async fn run() -> Result<Report> {
    let mut report = Report::new("boot");
    let built: Vec<&str> = ["tiny", "browser"]
        .into_iter()
        .filter(|image| Vm::is_built(image))
        .collect();
    ensure!(
        !built.is_empty(),
        "no image is built: `script/test images browser` builds them"
    );
    for image in built {
        let mut phases: BTreeMap<Phase, Vec<f64>> = BTreeMap::new();
        let (mut cpu, mut driver) = (Vec::new(), String::new());
        for _ in 0..BOOTS {
            let vm = Vm::start(image).await?;
            if let Some(vmm) = vm.view.vmm_pid {
                cpu.push(usage::cpu_seconds(vmm)?);
            }
            let begun = vm.view.started_at;
            driver.clone_from(&vm.view.driver);
            for (phase, seconds) in milestones(begun, &vm.stop().await?) {
                phases.entry(phase).or_default().push(seconds);
            }
        }
        for (phase, seconds) in &phases {
            report.median(
                format!("{image}: runner's start to {}", name(*phase)),
                "s",
                seconds,
            );
        }
        report.median(
            format!("{image}: processor time of the VMM until ready"),
            "s",
            &cpu,
        );
        report.note(format!("{image}: {driver}, {BOOTS} boots in sequence"));
    }
    Ok(report)
}

/// Seconds from `begun` to each phase's first time.
fn milestones(begun: Timestamp, events: &[RunnerEvent]) -> BTreeMap<Phase, f64> {
    let mut found = BTreeMap::new();
    for event in events {
        if let RunnerEventKind::Phase { phase } = event.event {
            #[expect(clippy::cast_precision_loss, reason = "a boot has less than 2⁵² µs")]
            let seconds = event.at.micros_since(begun) as f64 / 1e6;
            found.entry(phase).or_insert(seconds);
        }
    }
    found
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::VmmStarted => "VMM started",
        Phase::Restored => "snapshot loaded",
        Phase::Resumed => "resumed",
        Phase::KernelOutput => "first byte of the console",
        Phase::StreamUp => "stream up",
        Phase::Identity => "identity and clock",
        Phase::AgentUp => "agent",
        Phase::Painted => "painted screen",
        Phase::Ready => "ready",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_milestone_counts_from_the_start_and_once() {
        let begun = Timestamp::from_micros(5_000_000);
        let event = |seq, micros, phase| RunnerEvent {
            seq,
            at: Timestamp::from_micros(micros),
            event: RunnerEventKind::Phase { phase },
        };
        let events = [
            event(1, 5_250_000, Phase::VmmStarted),
            event(2, 9_000_000, Phase::AgentUp),
            event(3, 11_000_000, Phase::AgentUp),
        ];
        let found = milestones(begun, &events);
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            [(Phase::VmmStarted, 0.25), (Phase::AgentUp, 4.0)]
        );
    }
}
