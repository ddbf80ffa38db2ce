//! From a [`Launch`] to a process that runs a VM.
use super::{
    END_LIMIT, FirecrackerMachine, Saved,
    api::{Api, ApiError},
    place::{self, API_SOCKET},
    request::{self, BackendType, Boot, MemoryBackend, Request, Restore},
    snapshot,
    version::Version,
    vsock,
};
use crate::{
    driver::{Capabilities, Launch, LaunchError, Memory},
    log::piped,
    process::{Child, Program},
};
use camino::Utf8Path;
use std::time::Duration;

/// From the start of the process to its API there are milliseconds of work.
const API_LIMIT: Duration = Duration::from_secs(20);
const API_POLL: Duration = Duration::from_millis(2);
/// Bytes of serial output between the guest and the log's reader.
const SERIAL_BUFFER: usize = 1 << 20;

/// What Firecracker adds to the image's command line. `reboot=k` resets through the i8042 keyboard controller, which is how a
/// guest ends a Firecracker (fact 22: the process exits 0; there is no power button). A serial line must be asked for, and
/// Firecracker's own default would turn it off (fact 6). `pci=off` it adds itself. Disks have no serial number here, so the
/// agent is told which is which by their order (fact 20).
const CMDLINE: &str = "console=ttyS0 reboot=k random.trust_cpu=on i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce vestibule.root=vda vestibule.config=vdb vestibule.stream=vsock";

/// The kernel command line: the image's and the machine's.
pub(super) fn cmdline(launch: &Launch) -> String {
    format!("{} {CMDLINE}", launch.cmdline)
}

pub(super) async fn start(
    program: &Utf8Path,
    jailer: Option<&Utf8Path>,
    capabilities: &Capabilities,
    launch: Launch,
) -> Result<FirecrackerMachine, LaunchError> {
    let binding = snapshot::binding(capabilities, &launch).await?;
    if let (Memory::Restored(restored), Some(here)) = (&launch.memory, &binding)
        && let Some(words) = restored.manifest.binding_mismatch(here)
    {
        return Err(LaunchError::Mismatch(words));
    }
    let place = place::make(program, jailer, &launch)?;
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
                    backend_type: BackendType::File,
                    backend_path: memory,
                },
                track_dirty_pages: false,
                // The agent is told the time before anything else, whatever the version (Firecracker fact 16).
                clock_realtime: false,
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
    let api = Api::new(directory.join(API_SOCKET));
    let done = async {
        let version = greet(&api, &child).await?;
        if version.to_string() != capabilities.version {
            return Err(Failed::Changed(version));
        }
        let requests = match &restore {
            None => request::boot(&boot_of(&launch)),
            Some(restore) => request::restore(version.features(), restore),
        };
        for request in &requests {
            api.send(request).await.map_err(|err| Failed::Request {
                loading: matches!(request, Request::LoadSnapshot(_)),
                err,
            })?;
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
            directory,
            binding,
            memory,
            vmm_log: launch.vmm_log,
            listens,
        }),
        Err(failed) => Err(failed.explain(&child, command_line, capabilities).await),
    }
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
        cmdline: cmdline(launch),
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
