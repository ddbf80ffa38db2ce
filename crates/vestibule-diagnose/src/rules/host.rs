//! Rules about what the runner knows: the image, the VMM, the agent's build.
use super::{Candidate, vm};
use crate::case::Case;
use vestibule_api::{cause::Cause, finding::Quote, machine::Phase};

fn quote(source: &str, text: impl Into<String>) -> Quote {
    Quote {
        source: source.into(),
        line: None,
        text: text.into(),
    }
}

/// The VM's image is not the current one, or the agent not the image's.
pub fn wrong_image(case: &Case<'_>) -> Vec<Candidate> {
    let host = &case.host;
    let mut out = Vec::new();
    if let (Some(used), Some(current)) = (&host.image_digest, &host.current_digest)
        && used != current
        && host.failed
    {
        let f = vm(
            Cause::MadeFromOlderImage,
            quote(
                "vmm",
                format!("made from {used}, the alias points to {current}"),
            ),
            "the VM was made before the image was published that may hold the repair",
            "start a new VM",
        )
        .retryable()
        .refuted_by("the same failure of a VM made from the current image");
        out.push(
            Candidate::observed(f)
                .strength(super::Strength::Conditional)
                .specific(2),
        );
    }
    if let (Some(is), Some(declared)) = (&host.agent_build, &host.declared_agent_build)
        && is != declared
    {
        let f = vm(
            Cause::AgentBuildMismatch,
            quote(
                "report",
                format!("the agent is {is}, the image declares {declared}"),
            ),
            "the agent that answers is not the one that was built into the image",
            "rebuild the image, or look for a second agent in it",
        )
        .refuted_by("equal hashes in `GET /health` and the manifest");
        out.push(Candidate::observed(f));
    }
    out
}

/// The VMM ended although nobody asked it to.
pub fn vmm_exited(case: &Case<'_>) -> Vec<Candidate> {
    let Some(exit) = case.host.exit.as_ref().filter(|e| !e.asked) else {
        return Vec::new();
    };
    let how = match (exit.code, exit.signal) {
        (_, Some(signal)) => format!("the VMM died of signal {signal}"),
        (Some(code), None) => format!("the VMM ended with status {code}"),
        (None, None) => "the VMM ended".to_owned(),
    };
    let last = case
        .host
        .vmm_log
        .as_deref()
        .and_then(|l| l.lines().rev().find(|l| !l.trim().is_empty()));
    let mut f = vm(
        Cause::VmmExited,
        quote("vmm", last.unwrap_or(&how)),
        how,
        "read the VMM's message; a guest that reboots or panics ends it as well",
    )
    .refuted_by("`asked: true` in exit.json");
    if exit.signal == Some(9) {
        f = f.retryable();
    }
    vec![Candidate::observed(f).specific(1)]
}

/// The VMM runs and the guest prints nothing.
pub fn guest_not_executing(case: &Case<'_>) -> Vec<Candidate> {
    let silent = case.serial_given && case.serial_len == 0 && case.host.failed;
    let started = case.host.phase == Some(Phase::VmmStarted);
    let asks_console = case
        .cmdline
        .as_deref()
        .is_none_or(|c| c.contains("console=ttyS") || c.contains("console=hvc"));
    if !silent || !started || !asks_console {
        return Vec::new();
    }
    let f = vm(
        Cause::GuestNotExecuting,
        quote("serial", "[no byte]"),
        "the VMM runs and the guest has not printed a single byte: its processor makes no progress",
        "run `vestibule doctor`: KVM may be there and unusable",
    )
    .refuted_by("any kernel line on the console");
    vec![Candidate::observed(f)]
}
