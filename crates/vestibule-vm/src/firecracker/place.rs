//! The VMM's working directory, and how it is started there: as it is, or by its jailer.
//!
//! ```text
//! vms/<id>/firecracker/                              unjailed: links lead to the image
//! vms/<id>/jail/<program's name>/<id>/root/          jailed: the VMM's root. The image's files are bound to empty ones, and
//!   vmlinux initrd root memory loaded                `private` is in memory; only the VMM sees either
//!   config ─▶ private/config
//!   log                                              a FIFO, whose reader is the runner
//! ```
//! In both, files have the same names relative to the directory, which is what a snapshot keeps (Firecracker fact 13).
use super::{request, unlink};
use crate::{
    driver::{Launch, LaunchError, Memory},
    jail::{
        Jail,
        enter::{Bind, Confinement, Mounts},
        landlock::Allowed,
    },
    log::{piped, pump},
    process,
};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Mode, OFlags};
use std::{
    ffi::CString,
    fs::{DirBuilder, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, symlink},
            net::UnixListener,
        },
    },
};
use vestibule_api::machine::MemoryBackend;

/// A file of a jailed VMM's is never longer, but for a memory that is saved. What grows is its counters, by 10 KiB a minute: a VMM
/// whose file is full, which takes two months, would end.
const FILE_LIMIT: u64 = 1 << 30;
/// Below the VM's own directory.
const DIRECTORY: &str = "firecracker";
const JAIL: &str = "jail";
pub(super) const API_SOCKET: &str = "api.sock";
/// In a jail.
const PRIVATE: &str = "private";
const LOG: &str = "log";
const MEMORY: &str = "memory";
const LOADED: &str = "loaded";
const FAULTS: &str = "faults.sock";

/// See the module.
pub(super) struct Place {
    /// The working directory, by the host's name.
    pub(super) directory: Utf8PathBuf,
    pub(super) program: Utf8PathBuf,
    pub(super) args: Vec<String>,
    pub(super) stderr: OwnedFd,
    pub(super) inherit: Vec<OwnedFd>,
    pub(super) confinement: Confinement,
    /// The memory's and the state's names, as the VMM is to say them.
    pub(super) memory: Option<String>,
    pub(super) state: Option<String>,
    /// Where the VMM asks for its memory page by page, if it does.
    pub(super) faults: Option<UnixListener>,
    /// Whom the files belong to, where that is not the runner's user.
    pub(super) owner: Option<u32>,
}

/// How a child names a descriptor that it inherits, where a path is asked for.
fn descriptor(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", process::number(fd))
}

/// Makes the place. With a jailer, and a jail that has a user for it, the VMM is jailed.
pub(super) fn make(
    program: &Utf8Path,
    jailer: Option<&Utf8Path>,
    launch: &Launch,
) -> Result<Place, LaunchError> {
    let vmlinux = launch.vmlinux.as_deref().ok_or(LaunchError::NoVmlinux)?;
    let jail = launch.jail.as_deref();
    match (jailer, jail.and_then(Jail::uid), jail) {
        (Some(jailer), Some(uid), Some(jail)) => {
            let made = jailed(program, jailer, jail, uid, launch, vmlinux);
            made.map_err(LaunchError::prepare("make the VMM's jail"))
        }
        (_, _, jail) => {
            let made = unjailed(program, jail, launch, vmlinux);
            made.map_err(LaunchError::prepare("make the VMM's directory"))
        }
    }
}

fn vmm_args(log: &str) -> Vec<String> {
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

fn directory(path: &Utf8Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// What both have: no stale socket, which would end the VMM with "Address already in use" (Firecracker fact 9), and a file for
/// metrics, which must be there before 1.14 (Firecracker fact 5).
fn common(directory: &Utf8Path) -> io::Result<Utf8PathBuf> {
    for socket in [API_SOCKET, request::VSOCK, FAULTS] {
        unlink(&directory.join(socket))?;
    }
    let metrics = directory.join(request::METRICS);
    made(&metrics)?;
    Ok(metrics)
}

/// An empty file.
fn made(path: &Utf8Path) -> io::Result<()> {
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path).map(drop)
}

/// Takes the jail's directories from the VMM: what it has made by now is all that there will be. Called before a guest runs, so
/// that none of it was made by one; with the longest that a file may be, it bounds what a VM can fill of the host's disk.
pub(super) fn seal(root: &Utf8Path) -> io::Result<()> {
    chown(root, Some(0), Some(0))?;
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o755))?;
    for entry in root.read_dir_utf8()? {
        let entry = entry?;
        // The mount over this one is the VMM's alone, and as small as what is in it.
        if entry.file_type()?.is_dir() && entry.file_name() != PRIVATE {
            seal(entry.path())?;
        }
    }
    Ok(())
}

fn unjailed(
    program: &Utf8Path,
    jail: Option<&Jail>,
    launch: &Launch,
    vmlinux: &Utf8Path,
) -> io::Result<Place> {
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
    Ok(Place {
        directory: place,
        program: program.to_owned(),
        args,
        stderr: piped("vmm log", launch.vmm_log.clone())?,
        inherit,
        confinement,
        memory,
        state,
        faults,
        owner: None,
    })
}

fn c(path: &Utf8Path) -> io::Result<CString> {
    CString::new(path.as_str()).map_err(io::Error::other)
}

fn jailed(
    program: &Utf8Path,
    jailer: &Utf8Path,
    jail: &Jail,
    uid: u32,
    launch: &Launch,
    vmlinux: &Utf8Path,
) -> io::Result<Place> {
    let base = launch.vm_dir.join(JAIL);
    // The jailer's own way to name it (Firecracker fact 23).
    let root = base
        .join(program.file_name().unwrap_or_default())
        .join(launch.machine_id.to_string())
        .join("root");
    directory(&root.join(PRIVATE))?;
    let own = |path: &Utf8Path| chown(path, Some(uid), Some(uid));
    own(&common(&root)?)?;
    unlink(&root.join(request::CONFIG))?;
    symlink(format!("{PRIVATE}/config"), root.join(request::CONFIG))?;
    let mut binds = Vec::new();
    let mut bind = |from: &str, name: &str, writable: bool| -> io::Result<()> {
        let to = root.join(name);
        if !writable {
            readable(from.into())?;
        }
        File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&to)?;
        binds.push(Bind {
            from: c(from.into())?,
            to: c(&to)?,
            writable,
        });
        Ok(())
    };
    bind(vmlinux.as_str(), request::KERNEL, false)?;
    bind(launch.initrd.as_str(), request::INITRD, false)?;
    bind(launch.root.as_str(), request::ROOT, false)?;
    let mut faults = None;
    let mut longest = FILE_LIMIT;
    let (memory, state) = match &launch.memory {
        Memory::Own => (None, None),
        Memory::Shared(path) => {
            bind(path.as_str(), MEMORY, true)?;
            own(path)?;
            longest = longest.max(u64::from(launch.memory_mib) << 20);
            let state = root.join(request::STATE);
            made(&state)?;
            own(&state)?;
            (Some(MEMORY.to_owned()), None)
        }
        Memory::Restored(restored) => {
            let state = restored
                .memory
                .with_file_name(vestibule_api::snapshot::STATE_FILE);
            bind(state.as_str(), LOADED, false)?;
            let memory = if restored.backend == MemoryBackend::Uffd {
                faults = Some(crate::socket::listen(&root.join(FAULTS))?);
                own(&root.join(FAULTS))?;
                FAULTS
            } else {
                bind(restored.memory.as_str(), MEMORY, false)?;
                MEMORY
            };
            (Some(memory.to_owned()), Some(LOADED.to_owned()))
        }
    };
    let mounts = Mounts {
        binds,
        private: c(&root.join(PRIVATE))?,
        config: c(&root.join(PRIVATE).join("config"))?,
        content: launch.config.0.try_clone()?,
    };
    let stderr = fifo(&root.join(LOG), launch)?;
    own(&root.join(LOG))?;
    let mut args: Vec<_> = [
        "--id",
        &launch.machine_id.to_string(),
        "--exec-file",
        program.as_str(),
        "--uid",
        &uid.to_string(),
        "--gid",
        &uid.to_string(),
        "--chroot-base-dir",
        base.as_str(),
        "--resource-limit",
        &format!("fsize={longest}"),
        "--",
    ]
    .map(str::to_owned)
    .into();
    args.extend(vmm_args(LOG));
    Ok(Place {
        directory: root,
        program: jailer.to_owned(),
        args,
        stderr,
        inherit: Vec::new(),
        confinement: jail.around_jailer(mounts)?,
        memory,
        state,
        faults,
        owner: Some(uid),
    })
}

/// A snapshot's directory is its owner's alone; in it a file may be read by whoever it is bound for. Snapshots of before there were
/// jails have it otherwise.
fn readable(path: &Utf8Path) -> io::Result<()> {
    let mode = std::fs::metadata(path)?.permissions().mode();
    if mode & 0o004 == 0 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode | 0o044))?;
    }
    Ok(())
}

/// A FIFO that the runner reads into the VMM's log, and its other end. Opened for both at first: a reader without a writer reads
/// its end, and a writer without a reader is refused (fifo(7)).
fn fifo(path: &Utf8Path, launch: &Launch) -> io::Result<OwnedFd> {
    unlink(path)?;
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        path.as_std_path(),
        Mode::from_raw_mode(0o600),
    )?;
    let open = |flags| rustix::fs::open(path.as_std_path(), flags | OFlags::CLOEXEC, Mode::empty());
    let both = open(OFlags::RDWR)?;
    let read = open(OFlags::RDONLY)?;
    let write = open(OFlags::WRONLY)?;
    drop(both);
    pump("vmm log", File::from(read), launch.vmm_log.clone())?;
    Ok(write)
}
