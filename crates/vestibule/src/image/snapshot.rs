//! `vestibule image snapshot`, and what `publish` does of it.
use super::{DEADLINE_S, boot_options, progress::Bars};
use crate::output::{self, Output};
use vestibule_api::{
    ids::{AliasName, ImageDigest},
    machine::DriverChoice,
};
use vestibule_image::{BootOptions, SnapshotOptions, Store, Taken, Trial, store::SnapshotView};

#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotArgs {
    /// Image alias or digest.
    image: String,
    /// Memory of the VM in MiB [default: what the image declares].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    memory: Option<u32>,
    /// Virtual CPUs [default: what the image declares].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    vcpus: Option<u32>,
    /// What runs the VM, and those that begin from the snapshot: `auto`, `qemu` or `firecracker`.
    #[arg(long, default_value = "auto")]
    driver: DriverChoice,
    /// Seconds until the VM must be ready.
    #[arg(long, default_value_t = DEADLINE_S)]
    deadline: u64,
}

pub(super) fn take(store: &Store, args: &SnapshotArgs, out: Output) -> anyhow::Result<()> {
    let options = SnapshotOptions {
        boot: boot_options(args.deadline, args.driver)?,
        memory_mib: args.memory,
        vcpus: args.vcpus,
    };
    let taken = run(store, &store.resolve(&args.image)?, &options, out)?;
    out.print(&taken, |taken| taken.snapshot.id.to_string())
}

/// Takes a snapshot for VMs of the image's default size under this host's driver, unless there is one from which a VM really
/// begins, and with it the verification, if that is missing.
pub(super) fn where_none(store: &Store, image: &ImageDigest, out: Output) -> anyhow::Result<()> {
    let boot = boot_options(DEADLINE_S, DriverChoice::Auto)?;
    if store.inspect(image)?.verification.is_some() {
        match tried(store, image, &boot, out)? {
            Trial::Fits => return Ok(()),
            Trial::Missing => {}
            Trial::Refused { id, why } => output::note(&format!(
                "snapshot {} is of no use here any more, another one is taken: {why}",
                id.short()
            )),
        }
    }
    let options = SnapshotOptions {
        boot,
        memory_mib: None,
        vcpus: None,
    };
    let taken = run(store, image, &options, out)?;
    if let Some(report) = &taken.verification {
        output::note(&report.to_string());
    }
    output::note(&format!("its VMs begin from {}", described(&taken)));
    Ok(())
}

fn tried(
    store: &Store,
    image: &ImageDigest,
    options: &BootOptions,
    out: Output,
) -> anyhow::Result<Trial> {
    let bars = Bars::new(out);
    let trial = vestibule_image::try_snapshot(store, image, options, &bars);
    Ok(crate::runtime()?.block_on(trial)?)
}

fn run(
    store: &Store,
    image: &ImageDigest,
    options: &SnapshotOptions,
    out: Output,
) -> anyhow::Result<Taken> {
    let bars = Bars::new(out);
    let taken = vestibule_image::snapshot(store, image, options, &bars);
    Ok(crate::runtime()?.block_on(taken)?)
}

fn described(taken: &Taken) -> String {
    format!(
        "snapshot {}: {} MiB, {} on disk",
        taken.snapshot.id.short(),
        taken.snapshot.memory_mib,
        output::bytes(taken.snapshot.allocated_bytes)
    )
}

/// Without the package that it came in: `7.2.22`.
fn version(whole: &str) -> &str {
    whole.split(' ').next().unwrap_or(whole)
}

pub(super) fn list(snapshots: &[SnapshotView]) -> String {
    let row = |one: &SnapshotView| {
        let aliases: Vec<&str> = one.aliases.iter().map(AliasName::as_str).collect();
        vec![
            one.id.short().to_owned(),
            one.image_digest.short().to_owned(),
            aliases.join(", "),
            format!("{} MiB", one.memory_mib),
            one.vcpus.to_string(),
            output::bytes(one.allocated_bytes),
            format!("{} {}", one.driver, version(&one.vmm_version)),
            if one.in_use { "yes" } else { "no" }.to_owned(),
            one.taken_at.to_string(),
        ]
    };
    output::table(
        &[
            "SNAPSHOT", "IMAGE", "ALIASES", "MEMORY", "CPUS", "ON DISK", "VMM", "IN USE", "TAKEN",
        ],
        &snapshots.iter().map(row).collect::<Vec<_>>(),
    )
}
