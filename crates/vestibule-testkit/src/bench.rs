//! Benches: what Vestibule costs and how long a person waits, measured on the machine that runs them, with the real
//! programs. Each gives figures and, where something can be compared in the same run, a ratio.
//!
//! | bench | what it measures |
//! |---|---|
//! | [`images`] | builds from nothing, unchanged, and with another agent |
//! | [`boot`] | a VM's start, milestone by milestone, and the VMM's processor time |
//! | [`connect`] | from *Connect* to a view that somebody can use |
//! | [`warm`] | sessions from a snapshot and out of the pool, beside boots and the restore by hand; what a copy holds |
//! | [`diagnose`] | a verdict from the disk alone, beside mounting it |
//! | [`latency`] | from a key in noVNC to the pixel that it changes |
//! | [`relay`] | the view's relay against websockify, on the same bytes |
//! | [`overhead`] | a start and a load over Firecracker alone, nested under emulation |
//! | [`memory`] | what controller, runner and VMM hold |
//! | [`load`] | thousands of live sessions on one controller, and an hour's churn |
//!
//! `script/bench` runs them, `docs/benchmarks.md` says what they leave out.
pub mod boot;
pub mod cli;
pub mod connect;
pub mod diagnose;
pub mod host;
pub mod images;
pub mod latency;
pub mod load;
pub mod memory;
pub mod overhead;
pub mod relay;
pub mod report;
pub mod serve;
pub mod stats;
pub mod usage;
pub mod vm;
pub mod warm;

use anyhow::{Result, bail};
pub use report::Report;

/// The benches, in the order in which `script/bench` runs them.
pub const NAMES: [&str; 10] = [
    "images", "boot", "connect", "warm", "overhead", "diagnose", "latency", "relay", "memory",
    "load",
];

/// Runs one bench.
///
/// # Errors
/// When there is no such bench, or something that it needs is missing or fails.
pub async fn run(name: &str) -> Result<Report> {
    match name {
        "images" => images::run().await,
        "boot" => boot::run().await,
        "connect" => connect::run().await,
        "warm" => warm::run().await,
        "overhead" => overhead::run().await,
        "diagnose" => diagnose::run().await,
        "latency" => latency::run().await,
        "relay" => relay::run().await,
        "memory" => memory::run().await,
        "load" => load::run().await,
        _ => bail!("there is no bench `{name}`; there are {}", NAMES.join(", ")),
    }
}
