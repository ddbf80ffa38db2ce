//! The VMM's working directory, and how it is started there: as it is, here, or by its jailer (`jailed.rs`).
//!
//! In both, files have the same names relative to the directory, which is what a snapshot keeps (Firecracker fact 13).
use super::{request, unlink};
use crate::{
    driver::{Launch, LaunchError, Memory},
    jail::{Jail, enter::Confinement, landlock::Allowed},
    log::piped,
    process::{self, Child, Program},
};
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::{DirBuilder, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink},
            net::UnixListener,
        },
    },
};
use vestibule_api::machine::MemoryBackend;

/// Below the VM's own directory.
const DIRECTORY: &str = "firecracker";
pub(super) const API_SOCKET: &str = "api.sock";
pub(super) const FAULTS: &str = "faults.sock";
/// Bytes of serial output between the guest and the log's reader: without it a pipe has 64 KiB, and a burst loses sooner what
/// Firecracker does not wait to write.
const SERIAL_BUFFER: usize = 1 << 20;

/// A VMM's process, with or without a guest in it.
#[derive(Debug)]
pub(super) struct Vmm {
    pub(super) child: Child,
    pub(super) command_line: Vec<String>,
    /// The working directory, by the host's name.
    pub(super) directory: Utf8PathBuf,
    /// Whom the files belong to, where that is not the runner's user: it is jailed.
    pub(super) owner: Option<u32>,
}

/// How the VMM is to name the files of a memory that is not its own alone.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) memory: Option<String>,
    pub(super) state: Option<String>,
    /// Where the VMM asks for its memory page by page, if it does.
    pub(super) faults: Option<UnixListener>,
}

/// How a child names a descriptor that it inherits, where a path is asked for.
fn descriptor(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", process::number(fd))
}

pub(super) fn vmm_args(log: &str) -> Vec<String> {
    // The log from the first line on: what is said before the API could say where to would go to the serial line.
    [
        "--api-sock",
        API_SOCKET,
        "--log-path",
        log,
        "--level",
        "Info",
        "--show-level",
    ]
    .map(str::to_owned)
    .into()
}

pub(super) fn directory(path: &Utf8Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// What both have: no stale socket, which would end the VMM with "Address already in use" (Firecracker fact 9), and a file for
/// metrics, which must be there before 1.14 (Firecracker fact 5).
pub(super) fn common(directory: &Utf8Path) -> io::Result<Utf8PathBuf> {
    for socket in [API_SOCKET, request::VSOCK, FAULTS] {
        unlink(&directory.join(socket))?;
    }
    let metrics = directory.join(request::METRICS);
    made(&metrics)?;
    Ok(metrics)
}

/// An empty file.
pub(super) fn made(path: &Utf8Path) -> io::Result<()> {
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path).map(drop)
}

/// Gives the serial line's pipe room.
pub(super) fn widen(serial: &OwnedFd) {
    let _ = rustix::pipe::fcntl_setpipe_size(serial, SERIAL_BUFFER);
}

/// Starts the VMM as it is, with links to its VM's files.
///
/// # Errors
/// When the place is not made or the program not started.
pub(super) async fn begin(
    program: &Utf8Path,
    launch: &Launch,
    vmlinux: &Utf8Path,
) -> Result<(Vmm, Names), LaunchError> {
    let made = unjailed(program, launch.jail.as_deref(), launch, vmlinux);
    let (program, names) = made.map_err(LaunchError::prepare("make the VMM's directory"))?;
    Ok((Vmm::spawn(program, None).await?, names))
}

impl Vmm {
    pub(super) async fn spawn(program: Program, owner: Option<u32>) -> Result<Self, LaunchError> {
        let first = std::iter::once(program.path.to_string());
        Ok(Self {
            command_line: first.chain(program.args.iter().cloned()).collect(),
            directory: program.directory.clone(),
            owner,
            child: program.spawn().await?,
        })
    }

    /// The VMM itself: jailed, it is the one child of the process that was started (proc_tid_children(5)).
    pub(super) fn pid(&self) -> u32 {
        let pid = self.child.pid();
        if self.owner.is_none() {
            return pid;
        }
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let first = children
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse().ok());
        first.unwrap_or(pid)
    }
}

fn unjailed(
    program: &Utf8Path,
    jail: Option<&Jail>,
    launch: &Launch,
    vmlinux: &Utf8Path,
) -> io::Result<(Program, Names)> {
    let place = launch.vm_dir.join(DIRECTORY);
    directory(&place)?;
    common(&place)?;
    let config = launch.config.0.try_clone()?;
    let named = Utf8PathBuf::from(descriptor(&config));
    for (name, target) in [
        (request::KERNEL, vmlinux),
        (request::INITRD, &launch.initrd),
        (request::ROOT, &launch.root),
        (request::CONFIG, &named),
    ] {
        let link = place.join(name);
        unlink(&link)?;
        symlink(target, link)?;
    }
    let mut inherit = vec![config];
    let mut allowed = Allowed {
        read: vec![
            vmlinux.to_owned(),
            launch.initrd.clone(),
            launch.root.clone(),
        ],
        execute: vec![program.to_owned()],
        write: vec![launch.vm_dir.clone(), "/dev/kvm".into()],
    };
    let mut faults = None;
    let (memory, state) = match &launch.memory {
        Memory::Own => (None, None),
        Memory::Shared(path) => {
            allowed.write.push(path.clone());
            (Some(path.to_string()), None)
        }
        Memory::Restored(restored) => {
            let state = OwnedFd::from(restored.state.try_clone()?);
            let name = descriptor(&state);
            // The name leads to the file, which the rules must know.
            let directory = restored.memory.parent().unwrap_or(&restored.memory);
            allowed.read.push(directory.to_owned());
            inherit.push(state);
            if restored.backend == MemoryBackend::Uffd {
                allowed.write.push("/dev/userfaultfd".into());
                faults = Some(crate::socket::listen(&place.join(FAULTS))?);
                (Some(FAULTS.to_owned()), Some(name))
            } else {
                (Some(restored.memory.to_string()), Some(name))
            }
        }
    };
    let confinement = match jail {
        Some(jail) => jail.direct(&allowed)?,
        None => Confinement::default(),
    };
    let mut args = vec!["--id".to_owned(), launch.machine_id.to_string()];
    args.extend(vmm_args("/proc/self/fd/2"));
    let serial = piped("console", launch.console.clone())?;
    widen(&serial);
    let program = Program {
        path: program.to_owned(),
        args,
        directory: place,
        stdout: Some(serial),
        stderr: piped("vmm log", launch.vmm_log.clone())?,
        inherit,
        confinement,
    };
    let names = Names {
        memory,
        state,
        faults,
    };
    Ok((program, names))
}
