//! From a [`Launch`] to a process that runs a VM.
use super::{
    END_LIMIT, FirecrackerDriver, FirecrackerMachine, Saved,
    api::{Api, ApiError},
    jailed::{self, Begin, JAIL, Said},
    place::{self, API_SOCKET, Names, Vmm},
    request::{self, BackendType, Boot, MemoryBackend, Request, Restore},
    snapshot,
    version::Version,
    vsock,
};
use crate::{
    driver::{Capabilities, Launch, LaunchError, Memory, Restored},
    faults,
    jail::Jail,
    log::BoundedLog,
    process::Child,
};
use camino::Utf8Path;
use std::{fs::File, io, os::unix::net::UnixListener, sync::Arc, time::Duration};
use tokio::sync::OnceCell;
use vestibule_api::error::Chain;

/// From the start of the process to its API there are milliseconds of work.
const API_LIMIT: Duration = Duration::from_secs(20);
const API_POLL: Duration = Duration::from_millis(2);

pub(super) async fn start(
    driver: &FirecrackerDriver,
    capabilities: &Capabilities,
    mut launch: Launch,
) -> Result<FirecrackerMachine, LaunchError> {
    let binding = snapshot::binding(capabilities, driver.cache_dir.clone(), &launch).await?;
    if let (Memory::Restored(restored), Some(here)) = (&launch.memory, &binding)
        && let Some(words) = restored.manifest.binding_mismatch(here)
    {
        return Err(LaunchError::Mismatch(words));
    }
    tracing::debug!("what the snapshot is bound to is known");
    let (vmm, version, names) = begin(driver, capabilities, &mut launch).await?;
    tracing::debug!("the VMM answers, and has its files");
    let listens = vsock::hear(&vmm.directory, vmm.owner)
        .map_err(LaunchError::prepare("listen for the guest's word"))?;
    let (restore, memory) = match (&launch.memory, names.memory, names.state) {
        (Memory::Restored(_), Some(memory), Some(state)) => {
            let restore = Restore {
                state,
                memory: MemoryBackend {
                    backend_type: match &names.faults {
                        None => BackendType::File,
                        Some(_) => BackendType::Uffd,
                    },
                    backend_path: memory,
                },
            };
            (Some(restore), None)
        }
        (Memory::Shared(path), Some(name), _) => {
            let saved = Saved {
                name,
                path: path.clone(),
                foreign: vmm.owner.is_some(),
            };
            (None, Some(saved))
        }
        (Memory::Own | Memory::Shared(_) | Memory::Restored(_), _, _) => (None, None),
    };
    let faults = match (&launch.memory, names.faults) {
        (Memory::Restored(restored), Some(listener)) => {
            let serving = serve(restored, listener, &vmm.child, Arc::clone(&launch.vmm_log));
            Some(serving.map_err(LaunchError::prepare("serve the snapshot's memory"))?)
        }
        (_, _) => None,
    };
    let requests = match &restore {
        None => request::boot(&boot_of(&launch)),
        Some(restore) => vec![request::restore(version.features(), restore)],
    };
    let api = Api::new(vmm.directory.join(API_SOCKET));
    if let Err(failed) = ask(&api, &vmm, &requests).await {
        return Err(failed.explain(&vmm, capabilities).await);
    }
    Ok(FirecrackerMachine {
        vmm: vmm.pid(),
        child: vmm.child,
        api,
        features: version.features(),
        version,
        command_line: vmm.command_line,
        kernel_cmdline: request::cmdline(&launch.cmdline),
        directory: vmm.directory,
        binding,
        restored: restore.is_some(),
        memory,
        _faults: faults,
        vmm_log: launch.vmm_log,
        listens,
        ended: OnceCell::new(),
    })
}

/// A VMM whose API is up, with its VM's files: the one that stands by, or a new one.
async fn begin(
    driver: &FirecrackerDriver,
    capabilities: &Capabilities,
    launch: &mut Launch,
) -> Result<(Vmm, Version, Names), LaunchError> {
    let vmlinux = launch.vmlinux.clone().ok_or(LaunchError::NoVmlinux)?;
    let keep = |said: Said, launch: &Launch| {
        let kept = said.keep(launch.console.clone(), launch.vmm_log.clone());
        kept.map_err(LaunchError::prepare("keep what the VMM says"))
    };
    let (vmm, version) = if let Some(standing) = launch.standing.take() {
        let (vmm, said, version) = standing.into_parts();
        launch.spawned.is(&vmm.child);
        keep(said, launch)?;
        (vmm, version)
    } else if let Some((jailer, jail, uid)) = jailed(driver, launch) {
        let begun = jailed::begin(Begin {
            program: driver.program(),
            jailer,
            jail,
            uid,
            base: launch.vm_dir.join(JAIL),
            id: launch.machine_id,
            writes: match launch.memory {
                Memory::Shared(_) => u64::from(launch.memory_mib) << 20,
                Memory::Own | Memory::Restored(_) => 0,
            },
        });
        let (vmm, said) = begun.await?;
        launch.spawned.is(&vmm.child);
        keep(said, launch)?;
        let version = greeted(&vmm, capabilities).await?;
        (vmm, version)
    } else {
        let (vmm, names) = place::begin(driver.program(), launch, &vmlinux).await?;
        launch.spawned.is(&vmm.child);
        let version = greeted(&vmm, capabilities).await?;
        return Ok((vmm, version, names));
    };
    let names = jailed::fill(&vmm, launch, &vmlinux)
        .map_err(LaunchError::prepare("give the VMM its VM's files"))?;
    Ok((vmm, version, names))
}

/// What jails the VMM, and as whom; none: it goes without.
fn jailed<'a>(
    driver: &'a FirecrackerDriver,
    launch: &'a Launch,
) -> Option<(&'a Utf8Path, &'a Jail, u32)> {
    let jail = launch.jail.as_deref()?;
    Some((driver.jailer()?, jail, jail.uid()?))
}

/// Has the VMM do so much, until it has its VM.
async fn ask(api: &Api, vmm: &Vmm, requests: &[Request]) -> Result<(), Failed> {
    let seal = || match vmm.owner {
        Some(_) => jailed::seal(&vmm.directory).map_err(Failed::Seal),
        None => Ok(()),
    };
    for request in requests {
        // The next one runs the guest.
        if matches!(request, Request::Action(_)) {
            seal()?;
        }
        let loading = matches!(request, Request::LoadSnapshot(_));
        api.send(request)
            .await
            .map_err(|err| Failed::Request { loading, err })?;
        tracing::debug!(path = %request.path(), "the VMM did as it was asked");
        if loading {
            seal()?;
        }
    }
    Ok(())
}

/// Serves the VMM's page faults from the snapshot's memory. A VM whose handler ended before it would hang: it is ended, and the
/// log says why.
fn serve(
    restored: &Restored,
    listener: UnixListener,
    child: &Child,
    vmm_log: Arc<BoundedLog>,
) -> io::Result<faults::Handler> {
    let source = faults::Source {
        memory: File::open(&restored.memory)?,
        directory: restored
            .memory
            .parent()
            .unwrap_or(&restored.memory)
            .to_owned(),
    };
    let kill = child.killer()?;
    faults::start(listener, source, move |ended| match ended {
        Ok(served) => tracing::debug!(?served, "the snapshot's memory was served"),
        Err(err) => {
            let words = format!("[vestibule: serve the guest's memory: {}]\n", Chain(&err));
            vmm_log.append(words.as_bytes());
            kill();
        }
    })
}

pub(super) fn boot_of(launch: &Launch) -> Boot {
    Boot {
        vcpus: launch.vcpus,
        memory_mib: launch.memory_mib,
        cmdline: request::cmdline(&launch.cmdline),
    }
}

/// Why a process that was started became no VM.
enum Failed {
    /// It ended, or never opened its API.
    Api(ApiError),
    Request {
        loading: bool,
        err: ApiError,
    },
    /// It is another version than was asked a moment ago.
    Changed(Version),
    Seal(io::Error),
}

impl Failed {
    /// A process that has ended says more by its end; one that has not is killed when `vmm` is dropped.
    async fn explain(self, vmm: &Vmm, capabilities: &Capabilities) -> LaunchError {
        let (loading, err) = match self {
            Self::Changed(version) => {
                return LaunchError::Mismatch(format!(
                    "VMM version: Firecracker said {} before it was started, and {version} since; try again",
                    capabilities.version
                ));
            }
            Self::Seal(err) => {
                return LaunchError::prepare("take the jail's directories from the VMM")(err);
            }
            Self::Api(err) => (false, err),
            Self::Request { loading, err } => (loading, err),
        };
        let refused = matches!(err, ApiError::Refused { .. });
        let ended = tokio::time::timeout(END_LIMIT, vmm.child.wait()).await;
        match ended {
            Ok(exit) if !refused => LaunchError::Died {
                exit,
                command_line: vmm.command_line.clone(),
            },
            Ok(_) | Err(_) if loading => LaunchError::Load(err.into()),
            Ok(_) | Err(_) => LaunchError::Control(err.into()),
        }
    }
}

/// Waits until the VMM answers, as the version that it was, and has its metrics kept.
///
/// # Errors
/// When it ends, is another one, or refuses.
pub(super) async fn greeted(
    vmm: &Vmm,
    capabilities: &Capabilities,
) -> Result<Version, LaunchError> {
    let api = Api::new(vmm.directory.join(API_SOCKET));
    let failed = match greet(&api, &vmm.child).await {
        Ok(version) if version.to_string() == capabilities.version => {
            match ask(&api, vmm, &[request::metrics()]).await {
                Ok(()) => return Ok(version),
                Err(failed) => failed,
            }
        }
        Ok(version) => Failed::Changed(version),
        Err(failed) => failed,
    };
    Err(failed.explain(vmm, capabilities).await)
}

/// Waits for the API and asks for the version.
async fn greet(api: &Api, child: &Child) -> Result<Version, Failed> {
    let deadline = tokio::time::Instant::now() + API_LIMIT;
    let ended = child.watch();
    tokio::pin!(ended);
    loop {
        // Its socket appears when it begins to listen, a moment after it was made.
        let err = match api.version().await {
            Ok(version) => return Ok(version),
            Err(err) => err,
        };
        if !matches!(err, ApiError::Connect { .. }) || tokio::time::Instant::now() >= deadline {
            return Err(Failed::Api(err));
        }
        tokio::select! {
            _ = &mut ended => return Err(Failed::Api(err)),
            () = tokio::time::sleep(API_POLL) => {}
        }
    }
}
