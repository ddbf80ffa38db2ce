//! What a runner does before it knows its VM: threads for what blocks at a start, which stay for as long as the runtime keeps idle
//! ones; what this host is, which is looked at once; and a VMM that waits, where one can.
use crate::{
    driver::Capabilities,
    firecracker::{FirecrackerDriver, Standing},
};
use camino::Utf8Path;
use vestibule_api::{
    error::Chain,
    machine::{DriverChoice, VmSpec},
    standby::Preparation,
};

/// See the module. The default is a runner's that is started for its VM.
#[derive(Debug, Default)]
pub struct Prepared {
    vmm: Option<Standing>,
}

/// Does what needs no VM yet. What fails here fails again where somebody is told.
pub async fn prepare(preparation: &Preparation) -> Prepared {
    let look = tokio::task::spawn_blocking(|| {
        crate::cpu::read();
    });
    let attempt = tokio::task::spawn_blocking(crate::jail::prepare);
    // Both at once, for two threads.
    let _ = tokio::join!(look, attempt);
    // Alone: whoever takes the processor meanwhile makes it less exact.
    let cache_dir = preparation.cache_dir.clone();
    let measure = move || crate::tsc::prepare(cache_dir.as_deref().map(Utf8Path::new));
    let _ = tokio::task::spawn_blocking(measure).await;
    Prepared {
        vmm: stand_by(preparation).await,
    }
}

async fn stand_by(preparation: &Preparation) -> Option<Standing> {
    if preparation.driver == DriverChoice::Qemu {
        return None;
    }
    let probed = FirecrackerDriver::probed(preparation.cache_dir.as_deref()).await;
    let (driver, capabilities) = probed.ok()?;
    let standing = driver.stand_by(&capabilities, preparation).await;
    standing.unwrap_or_else(|err| {
        tracing::warn!(error = %Chain(&err), "no VMM stands by");
        None
    })
}

impl Prepared {
    /// The VMM that stood by, in the directory of its VM, where it can become this one's. Else it is gone.
    pub(super) async fn take_up(
        self,
        spec: &VmSpec,
        capabilities: &Capabilities,
    ) -> Option<Standing> {
        let mut vmm = self.vmm?;
        let unfit = match vmm.unfit(spec, capabilities) {
            Some(why) => why.to_owned(),
            None => match vmm.move_to(Utf8Path::new(&spec.vm_dir)) {
                Ok(()) => {
                    tracing::info!("the VMM stood by");
                    return Some(vmm);
                }
                Err(err) => format!("move it into the VM's directory: {err}"),
            },
        };
        tracing::info!(because = unfit, "the VMM that stood by is not this VM's");
        // Its user and its memory may be what the VM needs.
        let gone = tokio::task::spawn_blocking(move || drop(vmm)).await;
        gone.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        None
    }
}
