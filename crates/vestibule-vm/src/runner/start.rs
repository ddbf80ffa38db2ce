//! From a specification to a running VMM: hold the image, choose a driver, make the key, launch.
use super::{findings, shared::Shared};
use crate::{
    config_drive,
    driver::{Capabilities, Driver, Launch, LaunchError, Machine},
    image::Image,
    qemu::QemuDriver,
};
use std::{sync::Arc, time::Duration};
use vestibule_api::{
    finding::Finding,
    machine::{DriverChoice, Exit},
    mux::StreamKey,
};

/// A VMM that has not said a word by then hangs.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);
/// Each runner boots its VM once.
const GENERATION: u64 = 1;

/// What a start gives.
pub(super) struct Started {
    pub image: Image,
    pub machine: Arc<dyn Machine>,
    pub capabilities: Capabilities,
    pub key: StreamKey,
}

/// A start that failed: why, and how the VMM ended if there was one.
pub(super) struct NotStarted {
    pub finding: Finding,
    pub exit: Exit,
    pub command_line: Vec<String>,
}

impl From<Finding> for NotStarted {
    fn from(finding: Finding) -> Self {
        Self {
            finding,
            exit: Exit::default(),
            command_line: Vec::new(),
        }
    }
}

pub(super) async fn start(shared: &Shared) -> Result<Started, NotStarted> {
    let spec = shared.spec.clone();
    let image = tokio::task::spawn_blocking(move || Image::open(&spec))
        .await
        .map_err(|err| findings::host(&err))?
        .map_err(|err| findings::image(&err))?;
    let driver = driver(shared.spec.driver).map_err(|finding| *finding)?;
    let capabilities = driver
        .probe()
        .await
        .map_err(|err| findings::no_driver(&err))?;
    let key = StreamKey::generate();
    let config = config_drive::make(shared.spec.machine_id, GENERATION, &key)
        .map_err(|err| findings::host(&err))?;
    let launch = Launch {
        machine_id: shared.spec.machine_id,
        memory_mib: shared.spec.memory_mib,
        vcpus: shared.spec.vcpus,
        vm_dir: shared.spec.vm_dir.clone().into(),
        root: image.root.clone(),
        kernel: image.kernel.clone(),
        initrd: image.initrd.clone(),
        cmdline: image.manifest.cmdline.clone(),
        config,
        console: Arc::clone(&shared.console),
        vmm_log: Arc::clone(&shared.vmm_log),
    };
    let launched = tokio::time::timeout(LAUNCH_TIMEOUT, driver.launch(&capabilities, launch)).await;
    let machine = match launched {
        Ok(Ok(machine)) => machine,
        Ok(Err(err)) => return Err(not_launched(&err, shared).await),
        Err(_) => {
            let hangs = std::io::Error::other("the VMM did not answer on its control socket");
            return Err(findings::host(&hangs).into());
        }
    };
    Ok(Started {
        image,
        machine,
        capabilities,
        key,
    })
}

async fn not_launched(err: &LaunchError, shared: &Shared) -> NotStarted {
    shared.logs_ended().await;
    let mut not = NotStarted::from(findings::launch(err, shared));
    if let LaunchError::Died { exit, command_line } = err {
        not.exit = exit.clone();
        not.command_line.clone_from(command_line);
    }
    not
}

fn driver(choice: DriverChoice) -> Result<Box<dyn Driver>, Box<Finding>> {
    match choice {
        DriverChoice::Auto | DriverChoice::Qemu => {
            let qemu = QemuDriver::find().map_err(|err| Box::new(findings::no_driver(&err)))?;
            Ok(Box::new(qemu))
        }
        DriverChoice::Firecracker => Err(Box::new(findings::driver_absent("firecracker"))),
    }
}
