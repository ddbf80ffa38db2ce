//! The rules: each is one pure function from the case to what it may prove. None knows of another; [`crate::verdict`]
//! weighs what they say.
pub mod boot;
pub mod cmdline;
pub mod enablement;
pub mod exec;
pub mod firewall;
pub mod host;
pub mod isolation;
pub mod load;
pub mod logged;
pub mod mounts;
pub mod network;
mod node;
pub mod notes;
pub mod paths;
mod patterns;
pub mod reach;
pub mod requirements;
pub mod runtime;
pub mod said;
mod scripts;
pub mod storage;
pub mod waiting;

use crate::case::Case;
use vestibule_api::{
    cause::Cause,
    finding::{Finding, Quote},
};

/// How much a finding is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strength {
    /// It may be so; never a verdict by itself.
    Suspicion,
    /// The disk makes it depend on something outside.
    Conditional,
    /// The disk says so.
    Static,
    /// The run said so.
    Observed,
}

/// A finding and its weight.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub finding: Finding,
    pub strength: Strength,
    /// Among findings of one stage, the more specific one wins.
    pub specific: u8,
    /// Causes that this finding explains away: their findings are its consequences.
    pub explains: &'static [Cause],
    /// Whether a unit that was seen to run refutes it.
    pub refuted_by_run: bool,
}

impl Candidate {
    /// A finding that stands on the disk alone.
    pub fn fixed(finding: Finding) -> Self {
        Self {
            finding,
            strength: Strength::Static,
            specific: 5,
            explains: &[],
            refuted_by_run: true,
        }
    }

    /// A finding that was observed in a run.
    pub fn observed(finding: Finding) -> Self {
        Self {
            finding,
            strength: Strength::Observed,
            specific: 5,
            explains: &[],
            refuted_by_run: false,
        }
    }

    /// The same with another strength.
    #[must_use]
    pub fn strength(mut self, strength: Strength) -> Self {
        self.strength = strength;
        self
    }

    /// The same, more or less specific than the usual 5.
    #[must_use]
    pub fn specific(mut self, specific: u8) -> Self {
        self.specific = specific;
        self
    }

    /// The same, explaining away findings of these causes.
    #[must_use]
    pub fn explaining(mut self, causes: &'static [Cause]) -> Self {
        self.explains = causes;
        self
    }

    /// The same, standing although the unit was seen to run.
    #[must_use]
    pub fn despite_run(mut self) -> Self {
        self.refuted_by_run = false;
        self
    }
}

/// A rule about the whole VM.
pub type VmRule = fn(&Case<'_>) -> Vec<Candidate>;
/// A rule about one unit that must run.
pub type UnitRule = fn(&Case<'_>, &str) -> Vec<Candidate>;

/// Rules about the whole VM.
pub const VM_RULES: &[VmRule] = &[
    host::wrong_image,
    host::vmm_exited,
    host::guest_not_executing,
    boot::root_device,
    cmdline::root_on_disk,
    boot::panics,
    boot::init_on_disk,
    mounts::incomplete_image,
    mounts::mount_device,
    boot::filesystem_check,
    boot::first_boot_prompt,
    boot::out_of_memory,
    boot::generator_hangs,
    storage::disk_space,
    storage::read_only_root,
    network::driver_missing,
];

/// Rules about one unit.
pub const UNIT_RULES: &[UnitRule] = &[
    enablement::never_queued,
    enablement::generator_masks,
    cmdline::init_is_a_shell,
    waiting::conditions,
    waiting::cycle,
    waiting::conflict,
    waiting::waits_for_others,
    network::waits_for_network,
    load::refused,
    load::shadowed,
    requirements::requirements,
    exec::commands,
    exec::accounts,
    paths::paths,
    exec::security,
    runtime::known_endings,
    runtime::network_namespace,
    runtime::listeners_taken,
    reach::address_and_port,
    isolation::isolation,
    firewall::firewall,
    reach::wrong_address,
    reach::blocked_loop,
    logged::manager_lines,
    said::program_lines,
    said::waiting_jobs,
    said::reported,
];

/// Starts a finding about a unit.
pub(crate) fn about(
    unit: &str,
    cause: Cause,
    quote: Quote,
    why: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    Finding::new(cause, quote, why, fix).about(unit)
}

/// Starts a finding about the VM.
pub(crate) fn vm(
    cause: Cause,
    quote: Quote,
    why: impl Into<String>,
    fix: impl Into<String>,
) -> Finding {
    Finding::new(cause, quote, why, fix)
}
