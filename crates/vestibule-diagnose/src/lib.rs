//! Evidence to verdict. Reads disks, unit trees, journals and consoles from bytes: no mount, no root, no external
//! program, no running systemd, and no panic on anything that it reads.
//!
//! ```no_run
//! use vestibule_diagnose::{Evidence, diagnose, disk::{ext4::Ext4Tree, source::SeekSource}};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = Ext4Tree::open(SeekSource::file(std::fs::File::open("root.ext4")?)?)?;
//! let verdict = diagnose(&Evidence::new().disk(disk).serial(std::fs::read("serial.log")?));
//! # let _ = verdict; Ok(()) }
//! ```
//!
//! The way of a diagnosis: [`Evidence`] holds what there is → [`case`] reads it once (unit model over the disk, one log
//! out of console and journals) → each function of [`rules`] says what it can prove → [`mod@verdict`] weighs. Causes and
//! their explanations stand in `docs/causes.md`, which [`explain`] reads out.
#![forbid(unsafe_code)]
#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic,
    clippy::expect_used,
    clippy::unwrap_used
)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used,
        clippy::unwrap_used,
        clippy::allow_attributes,
        clippy::allow_attributes_without_reason,
        reason = "tests may panic"
    )
)]

pub mod bundle;
mod bytes;
pub mod case;
pub mod disk;
mod elf;
pub mod evidence;
mod explain;
pub mod host;
pub mod journal;
pub mod log;
mod nft;
pub mod rules;
mod text;
pub mod units;
mod verdict;

pub use evidence::Evidence;
pub use explain::explain;
pub use host::HostFacts;

use case::{Base, Case, DiskCase};
use std::time::Instant;
use vestibule_api::finding::Verdict;

/// Judges the evidence.
pub fn diagnose(evidence: &Evidence) -> Verdict {
    let start = Instant::now();
    let case = Case::new(evidence);
    let mut verdict = match &evidence.disk {
        None => verdict::judge(&case.with_default_units()),
        Some(root) => {
            let cmdline = case.cmdline.clone();
            let base = Base::read(root, cmdline.as_deref());
            let units = base.units(cmdline.as_deref());
            let disk = DiskCase::new(&base, &units, cmdline.as_deref());
            verdict::judge(&case.with_disk(disk))
        }
    };
    verdict.elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    verdict
}
