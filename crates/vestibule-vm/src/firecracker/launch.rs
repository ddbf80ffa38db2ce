//! From a [`Launch`] to a process that runs a VM.
use super::{
    END_LIMIT, FirecrackerDriver, FirecrackerMachine, Saved,
    api::{Api, ApiError},
    place::{self, API_SOCKET},
    request::{self, BackendType, Boot, MemoryBackend, Request, Restore},
    snapshot,
    version::Version,
    vsock,
};
use crate::{
    driver::{Capabilities, Launch, LaunchError, Memory, Restored},
    faults,
    log::{BoundedLog, piped},
    process::{Child, Program},
};
use std::{fs::File, io, os::unix::net::UnixListener, sync::Arc, time::Duration};
use tokio::sync::OnceCell;
use vestibule_api::error::Chain;

/// From the start of the process to its API there are milliseconds of work.
const API_LIMIT: Duration = Duration::from_secs(20);
const API_POLL: Duration = Duration::from_millis(2);
/// Bytes of serial output between the guest and the log's reader.
const SERIAL_BUFFER: usize = 1 << 20;

pub(super) async fn start(
    driver: &FirecrackerDriver,
    capabilities: &Capabilities,
    launch: Launch,
) -> Result<FirecrackerMachine, LaunchError> {
    let binding = snapshot::binding(capabilities, driver.cache_dir.clone(), &launch).await?;
    if let (Memory::Restored(restored), Some(here)) = (&launch.memory, &binding)
        && let Some(words) = restored.manifest.binding_mismatch(here)
    {
        return Err(LaunchError::Mismatch(words));
    }
    tracing::debug!("what the snapshot is bound to is known");
    let place = place::make(driver.program(), driver.jailer(), &launch)?;
    let directory = place.directory;
    let listens = vsock::hear(&directory, place.owner)
        .map_err(LaunchError::prepare("listen for the guest's word"))?;
    let serial = piped("console", launch.console.clone())
        .map_err(LaunchError::prepare("make a pipe for the console"))?;
    // Without it the pipe is 64 KiB, and a burst loses sooner what Firecracker does not wait to write.
    let _ = rustix::pipe::fcntl_setpipe_size(&serial, SERIAL_BUFFER);
    let (restore, memory) = match (&launch.memory, place.memory, place.state) {
        (Memory::Restored(_), Some(memory), Some(state)) => {
            let restore = Restore {
                state,
                memory: MemoryBackend {
                    backend_type: match &place.faults {
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
                foreign: place.owner.is_some(),
            };
            (None, Some(saved))
        }
        (Memory::Own | Memory::Shared(_) | Memory::Restored(_), _, _) => (None, None),
    };
    let command_line: Vec<_> = std::iter::once(place.program.to_string())
        .chain(place.args.iter().cloned())
        .collect();
    let child = Program {
        path: place.program,
        args: place.args,
        directory: directory.clone(),
        stdout: Some(serial),
        stderr: place.stderr,
        inherit: place.inherit,
        confinement: place.confinement,
    }
    .spawn()
    .await?;
    launch.spawned.is(&child);
    tracing::debug!("the VMM's process is started");
    let faults = match (&launch.memory, place.faults) {
        (Memory::Restored(restored), Some(listener)) => {
            let serving = serve(restored, listener, &child, Arc::clone(&launch.vmm_log));
            Some(serving.map_err(LaunchError::prepare("serve the snapshot's memory"))?)
        }
        (_, _) => None,
    };
    let api = Api::new(directory.join(API_SOCKET));
    let done = async {
        let version = greet(&api, &child).await?;
        if version.to_string() != capabilities.version {
            return Err(Failed::Changed(version));
        }
        tracing::debug!("the VMM answers");
        let requests = match &restore {
            None => request::boot(&boot_of(&launch)),
            Some(restore) => request::restore(version.features(), restore),
        };
        let seal = || match place.owner {
            Some(_) => place::seal(&directory).map_err(Failed::Seal),
            None => Ok(()),
        };
        for request in &requests {
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
        Ok(version)
    }
    .await;
    match done {
        Ok(version) => Ok(FirecrackerMachine {
            vmm: vmm_of(&child, place.owner.is_some()),
            child,
            api,
            features: version.features(),
            version,
            command_line,
            kernel_cmdline: request::cmdline(&launch.cmdline),
            directory,
            binding,
            restored: restore.is_some(),
            memory,
            _faults: faults,
            vmm_log: launch.vmm_log,
            listens,
            ended: OnceCell::new(),
        }),
        Err(failed) => Err(failed.explain(&child, command_line, capabilities).await),
    }
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

/// The VMM itself: jailed, it is the one child of the process that was started (proc_tid_children(5)).
fn vmm_of(child: &Child, jailed: bool) -> u32 {
    let pid = child.pid();
    if !jailed {
        return pid;
    }
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let first = children
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok());
    first.unwrap_or(pid)
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
    /// A process that has ended says more by its end; one that has not is killed when `child` is dropped.
    async fn explain(
        self,
        child: &Child,
        command_line: Vec<String>,
        capabilities: &Capabilities,
    ) -> LaunchError {
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
        let ended = tokio::time::timeout(END_LIMIT, child.wait()).await;
        match ended {
            Ok(exit) if !refused => LaunchError::Died { exit, command_line },
            Ok(_) | Err(_) if loading => LaunchError::Load(err.into()),
            Ok(_) | Err(_) => LaunchError::Control(err.into()),
        }
    }
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
