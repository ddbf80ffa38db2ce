//! What a VM of Vestibule's is, whatever runs it: one suite for every driver, by way of the program that people get
//! (`vestibule run-vm`) and its socket. It needs an image and, for Firecracker, a KVM that runs Linux ([`crate::nested`]).
//!
//! One VM boots, is asked everything that one VM can be asked, and is saved; everything else begins from its snapshot or ends
//! before it is up. Each case prints a line; a case that fails leaves the others standing.
//!
//! | part | cases |
//! |---|---|
//! | [`guest`] | what is asked of the VM that booted |
//! | [`copies`] | save, restore, what must be a copy's own, pause and claim, snapshots that do not fit |
//! | [`ends`] | kills at each step, wrong inputs, evidence, disposal |
//! | [`jail`] | what a VMM can reach, where it is jailed |
//! | [`standby`] | a VMM that waits for its VM |
pub(crate) mod copies;
mod ends;
mod guest;
mod jail;
mod standby;
pub(crate) mod vm;

use anyhow::{Result, ensure};
use camino::Utf8PathBuf;
use std::time::Instant;
use vestibule_api::{image::Manifest, machine::DriverChoice};
use vm::{Running, Vm};

/// What runs the suite and where.
#[derive(Clone, Debug)]
pub struct Setup {
    /// `vestibule`.
    pub program: Utf8PathBuf,
    pub driver: DriverChoice,
    /// The directory of an image.
    pub image: Utf8PathBuf,
    /// An empty directory, for VMs, evidence and the snapshot.
    pub home: Utf8PathBuf,
    /// The machine has all that a jail is made of: a case about it that finds less fails, and is not left out.
    pub jail_required: bool,
}

impl Setup {
    pub(crate) fn manifest(&self) -> Result<Manifest> {
        let bytes = std::fs::read(self.image.join("manifest.json"))?;
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// A line begins with this and `ok`, `skipped` or `FAILED`.
pub const SAYS: &str = "conformance: ";

/// The suite under way.
struct Suite {
    setup: Setup,
    manifest: Manifest,
    passed: u32,
    failed: u32,
    skipped: u32,
}

/// Runs every case. Prints a line for each.
///
/// # Errors
/// When a case failed, or the image cannot be read.
pub async fn run(setup: Setup) -> Result<()> {
    let manifest = setup.manifest()?;
    let begun = Instant::now();
    let mut suite = Suite {
        setup,
        manifest,
        passed: 0,
        failed: 0,
        skipped: 0,
    };
    ends::wrong_inputs(&mut suite).await;
    ends::killed_while_booting(&mut suite).await;
    let (vm, required) = (suite.vm(), suite.setup.jail_required);
    suite
        .case("jail: without root", jail::without_root(vm, required))
        .await;
    if let Some(from) = Box::pin(guest::whole_life(&mut suite)).await {
        Box::pin(copies::all(&mut suite, &from)).await;
    }
    suite.say(&format!(
        "{} passed, {} failed, {} skipped, {} in {:.1} s",
        suite.passed,
        suite.failed,
        suite.skipped,
        suite.setup.driver,
        begun.elapsed().as_secs_f64()
    ));
    ensure!(suite.failed == 0, "{} cases failed", suite.failed);
    Ok(())
}

impl Suite {
    #[expect(
        clippy::print_stdout,
        reason = "the lines are what whoever runs it reads"
    )]
    fn say(&self, line: &str) {
        println!("{SAYS}{line}");
    }

    /// Runs one case; what it gives, if it went well, may be a note for its line.
    async fn case<T: Noted>(
        &mut self,
        name: &str,
        case: impl Future<Output = Result<T>>,
    ) -> Option<T> {
        let begun = Instant::now();
        let ended = case.await;
        let took = begun.elapsed().as_secs_f64();
        match ended {
            Ok(given) => {
                let word = if given.is_skipped() {
                    self.skipped += 1;
                    "skipped"
                } else {
                    self.passed += 1;
                    "ok"
                };
                let note = given.note();
                let gap = if note.is_empty() { "" } else { "  " };
                self.say(&format!("{word:<7} {name:<36} {took:6.1} s{gap}{note}"));
                Some(given)
            }
            Err(err) => {
                self.failed += 1;
                let words = format!("{err:#}").replace('\n', "\n    ");
                self.say(&format!("FAILED  {name:<36} {took:6.1} s  {words}"));
                None
            }
        }
    }

    /// A VM that is not started yet.
    fn vm(&self) -> Result<Vm> {
        Vm::new(&self.setup, &self.manifest)
    }
}

/// What a case gives may have something to say.
trait Noted {
    fn note(&self) -> String {
        String::new()
    }

    /// Whether there was nothing that could be asked.
    fn is_skipped(&self) -> bool {
        false
    }
}

/// What a case gives that may not be possible on this machine.
enum Outcome {
    Passed(String),
    /// Why nothing was asked.
    Skipped(String),
}

impl Noted for Outcome {
    fn note(&self) -> String {
        match self {
            Self::Passed(note) | Self::Skipped(note) => note.clone(),
        }
    }

    fn is_skipped(&self) -> bool {
        matches!(self, Self::Skipped(_))
    }
}

impl Noted for () {}

impl Noted for String {
    fn note(&self) -> String {
        self.clone()
    }
}

impl Noted for Running {}
