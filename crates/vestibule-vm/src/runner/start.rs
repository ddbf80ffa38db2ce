//! From a specification to a running VMM: hold the image, choose a driver, make the key, launch.
use super::{findings, prepare::Prepared, save::Unfinished, shared::Shared};
use crate::{
    config_drive,
    driver::{Capabilities, Driver, Launch, LaunchError, Machine, Memory, ProbeError, Restored},
    firecracker::{FirecrackerDriver, Standing, request},
    image::{Image, VMLINUX},
    jail::Jail,
    qemu::QemuDriver,
    snapshot::{self, Snapshot},
};
use camino::Utf8Path;
use std::{sync::Arc, time::Duration};
use vestibule_api::{
    crash,
    finding::Finding,
    machine::{DriverChoice, Exit, VmSpec},
    mux::StreamKey,
};

/// A VMM that has not said a word by then hangs.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);
const _: () = assert!(request::START.as_secs() < LAUNCH_TIMEOUT.as_secs());
/// Each runner boots its VM once.
const GENERATION: u64 = 1;

/// What a start gives.
pub(super) struct Started {
    pub image: Image,
    pub machine: Arc<dyn Machine>,
    pub capabilities: Capabilities,
    pub key: StreamKey,
    /// Where the VM's memory goes, where it is one that can be saved.
    pub unfinished: Option<Unfinished>,
    /// Held for as long as the VM lives on its memory.
    pub snapshot: Option<std::fs::File>,
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

/// What lies on the host's disk for this VM.
struct Files {
    image: Image,
    memory: Memory,
    unfinished: Option<Unfinished>,
    snapshot: Option<std::fs::File>,
}

/// Opens and makes the files. Blocks on the disk.
fn files(spec: &VmSpec) -> Result<Files, Box<Finding>> {
    let host = |err: std::io::Error| Box::new(findings::host(&err));
    let image = Image::open(spec).map_err(|err| Box::new(findings::image(&err)))?;
    let mut files = Files {
        image,
        memory: Memory::Own,
        unfinished: None,
        snapshot: None,
    };
    match (&spec.restore, &spec.save_to) {
        (None, None) => {}
        (Some(_), Some(_)) => {
            let words = "`restore` and `saveTo`: a restored VM has an identity, and is not saved";
            return Err(Box::new(findings::contradiction(words)));
        }
        (None, Some(_)) if spec.session_id.is_some() => {
            let words = "`saveTo` and `sessionId`: what is saved has never been anybody's";
            return Err(Box::new(findings::contradiction(words)));
        }
        (None, Some(directory)) => {
            let unfinished = Unfinished::make(directory).map_err(host)?;
            let memory = snapshot::make_memory(unfinished.path(), spec.memory_mib).map_err(host)?;
            files.memory = Memory::Shared(memory);
            files.unfinished = Some(unfinished);
        }
        (Some(restore), None) => {
            let snapshot = Snapshot::open(restore)
                .map_err(|err| Box::new(findings::snapshot_refused(&err)))?;
            files.memory = Memory::Restored(Box::new(Restored {
                manifest: snapshot.manifest,
                memory: snapshot.memory,
                state: snapshot.state,
                backend: spec.memory_backend,
            }));
            files.snapshot = Some(snapshot.hold);
        }
    }
    Ok(files)
}

pub(super) async fn start(shared: &Shared, prepared: Prepared) -> Result<Started, NotStarted> {
    let spec = shared.spec.clone();
    let files = tokio::task::spawn_blocking(move || files(&spec));
    let chosen = async {
        let (driver, capabilities) = choose(&shared.spec).await?;
        let standing = prepared.take_up(&shared.spec, &capabilities).await;
        let jail = make_jail(shared, &capabilities, standing.as_ref());
        let jail = jail.await.map_err(Box::new)?;
        tracing::debug!("the driver is found, and the jail made");
        Ok::<_, Box<Finding>>((driver, capabilities, standing, jail))
    };
    let (files, chosen) = tokio::join!(files, chosen);
    let Files {
        image,
        memory,
        unfinished,
        snapshot,
    } = files
        .map_err(|err| findings::host(&err))?
        .map_err(|finding| *finding)?;
    let (driver, capabilities, standing, jail) = chosen.map_err(|finding| *finding)?;
    if !matches!(memory, Memory::Own) && !capabilities.snapshot {
        let words = format!("{} {}", capabilities.driver, capabilities.version);
        return Err(findings::no_snapshots(&words).into());
    }
    tracing::debug!("files are open");
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
        vmlinux: image.vmlinux.clone(),
        initrd: image.initrd.clone(),
        cmdline: image.manifest.cmdline.clone(),
        config,
        image_digest: shared.spec.image_digest.clone(),
        agent_build: image.manifest.agent_build.clone(),
        memory,
        jail: Some(jail),
        standing,
        spawned: shared.spawned.clone(),
        console: Arc::clone(&shared.console),
        vmm_log: Arc::clone(&shared.vmm_log),
    };
    crash::point("runner:begin");
    let launched = tokio::time::timeout(LAUNCH_TIMEOUT, driver.launch(&capabilities, launch)).await;
    let machine = match launched {
        Ok(Ok(machine)) => machine,
        Ok(Err(err)) => return Err(not_launched(&err, shared).await),
        Err(_) => {
            let hangs = std::io::Error::other("the VMM did not answer on its control socket");
            return Err(findings::host(&hangs).into());
        }
    };
    crash::point("runner:launched");
    Ok(Started {
        image,
        machine,
        capabilities,
        key,
        unfinished,
        snapshot,
    })
}

/// MiB that a VMM needs besides its guest's: Firecracker little, QEMU more, and its translation most.
const OVERHEAD: [(&str, u32); 3] = [("firecracker", 128), ("qemu/kvm", 512), ("qemu/tcg", 1536)];

/// The jail of the VMM that stands by, or a new one.
async fn make_jail(
    shared: &Shared,
    capabilities: &Capabilities,
    standing: Option<&Standing>,
) -> Result<Arc<Jail>, Finding> {
    let spec = &shared.spec;
    let overhead = OVERHEAD
        .iter()
        .find(|(name, _)| *name == capabilities.driver);
    let memory = spec
        .memory_mib
        .saturating_add(overhead.map_or(0, |(_, mib)| *mib));
    let (jail, vcpus) = (spec.jail, spec.vcpus);
    let made = if let Some(standing) = standing {
        let jail = Arc::clone(standing.jail());
        jail.limit(memory, vcpus)
            .map_err(|err| findings::host(&err))?;
        jail
    } else {
        let made = tokio::task::spawn_blocking(move || Jail::make(jail, memory, vcpus)).await;
        let made = made.map_err(|err| findings::host(&err))?;
        Arc::new(made.map_err(|err| findings::host(&err))?)
    };
    // One VM has one.
    let _ = shared.jail.set(Arc::clone(&made));
    made.leave_mark(Utf8Path::new(&spec.vm_dir))
        .map_err(|err| findings::host(&err))?;
    Ok(made)
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

type Chosen = (Box<dyn Driver>, Capabilities);

/// The driver that the specification asks for, probed. `auto` is the one whose snapshot is restored; where the VM boots it is
/// Firecracker if that and the image can, else QEMU.
async fn choose(spec: &VmSpec) -> Result<Chosen, Box<Finding>> {
    let restored = spec.restore.as_ref().and_then(snapshot::driver_of);
    match (spec.driver, restored) {
        (DriverChoice::Qemu, _) | (DriverChoice::Auto, Some(DriverChoice::Qemu)) => {
            qemu(spec).await
        }
        (DriverChoice::Firecracker, _) | (DriverChoice::Auto, Some(DriverChoice::Firecracker)) => {
            match FirecrackerDriver::probed(spec.cache_dir.as_deref()).await {
                Ok((driver, capabilities)) => Ok((Box::new(driver), capabilities)),
                Err(err) => Err(Box::new(findings::no_firecracker(&err))),
            }
        }
        (DriverChoice::Auto, Some(DriverChoice::Auto) | None) => {
            let has_kernel = Utf8Path::new(&spec.image_dir).join(VMLINUX).is_file();
            match FirecrackerDriver::probed(spec.cache_dir.as_deref()).await {
                Ok((driver, capabilities)) if capabilities.pause && has_kernel => {
                    Ok((Box::new(driver), capabilities))
                }
                Ok(_) | Err(_) => qemu(spec).await,
            }
        }
    }
}

async fn qemu(spec: &VmSpec) -> Result<Chosen, Box<Finding>> {
    let no_driver = |err: ProbeError| Box::new(findings::no_driver(&err));
    let driver = QemuDriver::find(spec.cache_dir.clone().map(Into::into)).map_err(no_driver)?;
    let capabilities = driver.probe().await.map_err(no_driver)?;
    Ok((Box::new(driver), capabilities))
}
