//! What the runner knows of a VM from outside (`machine.json`, `exit.json`, `report.json`, `events.ndjson`).
use serde::{Deserialize, Serialize};
use vestibule_api::{
    finding::Finding,
    machine::{Exit, Phase},
};

/// Facts of the host. Absent ones are unknown, not false.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HostFacts {
    /// The image that the VM was made from.
    pub image_digest: Option<String>,
    /// Where that image lay.
    pub image_dir: Option<String>,
    /// The image that its alias points to now.
    pub current_digest: Option<String>,
    /// Build hash of the agent that answered.
    pub agent_build: Option<String>,
    /// Build hash of the agent that the image declares.
    pub declared_agent_build: Option<String>,
    /// Units that the image's manifest requires: meant where nobody named one.
    pub required_units: Vec<String>,
    /// How the VMM ended; none: it runs.
    pub exit: Option<Exit>,
    /// The last lines that the VMM wrote.
    pub vmm_log: Option<String>,
    /// The last milestone of the start.
    pub phase: Option<Phase>,
    /// What the runner itself found.
    pub failure: Option<Finding>,
    /// Whether the VM was meant to be up and is not: then "nothing found" is not healthy.
    pub failed: bool,
}
