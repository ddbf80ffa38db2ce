//! A VMM that stands by: it has nothing of anybody's, becomes the VMM of the VM that its runner is given, or goes.
use super::{
    Outcome,
    jail::lacks,
    vm::{Standing, Vm, empty_groups, gone, processes_of, soon},
};
use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use std::time::Duration;
use vestibule_api::machine::DriverChoice;

/// A VMM that waits.
struct Waiting {
    vmm: u32,
    /// What its runner has made for it.
    place: Utf8PathBuf,
}

pub(super) async fn all(vm: Result<Vm>, other: Result<Vm>, required: bool) -> Result<Outcome> {
    let (vm, other) = (vm?, other?);
    if vm.spec.driver != DriverChoice::Firecracker {
        return lacks(false, "QEMU is told of its VM when it is started");
    }
    if !rustix::process::geteuid().is_root() {
        return lacks(required, "only root has jails");
    }
    dismissed(&vm).await.context("nobody needs it")?;
    killed(&vm).await.context("its runner is killed")?;
    taken_up(vm).await.context("its runner is given its VM")?;
    unfit(other)
        .await
        .context("its runner is given another's VM")?;
    let words = "nobody's, of a runner that is killed, of its VM, of another's";
    Ok(Outcome::Passed(words.to_owned()))
}

async fn dismissed(vm: &Vm) -> Result<()> {
    let (standing, waiting) = waiting(vm).await?;
    standing.dismissed().await?;
    gone(waiting.vmm).await?;
    ensure!(!waiting.place.exists(), "`{}` is left", waiting.place);
    let groups = empty_groups()?;
    ensure!(groups.is_empty(), "groups are left: {groups:?}");
    Ok(())
}

/// What is left then is a directory, which is its starter's to remove, and a group, which is the next one's.
async fn killed(vm: &Vm) -> Result<()> {
    let (standing, waiting) = waiting(vm).await?;
    standing.killed().await?;
    gone(waiting.vmm).await?;
    std::fs::remove_dir_all(&waiting.place)?;
    Ok(())
}

async fn taken_up(vm: Vm) -> Result<()> {
    let (standing, waiting) = waiting(&vm).await?;
    let running = vm.start_by(standing).await?;
    running.up().await?;
    let vmm = running.vmm().await?;
    ensure!(vmm == waiting.vmm, "{vmm} is another one: {}", vm.said()?);
    ensure!(!waiting.place.exists(), "`{}` is left", waiting.place);
    running.stop().await?;
    running.ended().await?;
    vm.nothing_left(Some(vmm))
}

async fn unfit(mut vm: Vm) -> Result<()> {
    let (standing, waiting) = waiting(&vm).await?;
    vm.spec.jail.first_uid += vm.spec.jail.uids;
    let running = vm.start_by(standing).await?;
    running.up().await?;
    let vmm = running.vmm().await?;
    ensure!(vmm != waiting.vmm, "it has another VM's user");
    gone(waiting.vmm).await?;
    ensure!(!waiting.place.exists(), "`{}` is left", waiting.place);
    let said = vm.said()?;
    ensure!(said.contains("is not this VM's"), "nobody says so: {said}");
    running.stop().await?;
    running.ended().await?;
    vm.nothing_left(Some(vmm))
}

/// A runner whose VMM waits, which can reach nothing of an image, of a snapshot, or of a VM.
async fn waiting(vm: &Vm) -> Result<(Standing, Waiting)> {
    let standing = vm.stand_by()?;
    let find = async {
        loop {
            if let Some(root) = root(&vm.standby()).filter(|root| root.join("api.sock").exists()) {
                return root;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let root = soon("a VMM to stand by", find).await?;
    let mut above = root.ancestors().skip(1);
    let id = above.next().and_then(Utf8Path::file_name);
    let place = above.nth(2).context("the place of its runner")?.to_owned();
    let processes = processes_of(id.context("its id")?);
    let &[vmm] = processes.as_slice() else {
        anyhow::bail!("processes of one that waits: {processes:?}");
    };
    let inside = Utf8PathBuf::from(format!("/proc/{vmm}/root"));
    for name in [
        "vmlinux",
        "initrd",
        "root",
        "memory",
        "loaded",
        "private/config",
    ] {
        ensure!(!inside.join(name).exists(), "it has `{name}`");
    }
    Ok((standing, Waiting { vmm, place }))
}

/// `<directory>/<id>/jail/<program>/<id>/root`.
fn root(directory: &Utf8Path) -> Option<Utf8PathBuf> {
    let only = |path: &Utf8Path| Some(path.read_dir_utf8().ok()?.next()?.ok()?.into_path());
    let jails = only(directory)?.join("jail");
    Some(only(&only(&jails)?)?.join("root"))
}
