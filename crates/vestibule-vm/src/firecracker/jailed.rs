//! A VMM in Firecracker's jailer. It is started without a VM, whose files it gets when its API is up: so one may wait for its VM
//! (`standby.rs`).
//!
//! ```text
//! vms/<id>/jail/<program's name>/<id>/root/          the VMM's root. The image's files are bound to empty ones, and `private` is in
//!   vmlinux initrd | memory loaded, root             memory; only the VMM sees either
//!   config ─▶ private/config
//!   log                                              a FIFO, whose reader is the runner
//! ```
use super::{
    place::{FAULTS, Names, Vmm, common, directory, made, vmm_args, widen},
    request, unlink,
};
use crate::{
    driver::{Launch, LaunchError, Memory},
    jail::{
        Jail,
        mounts::{Bind, Mounts},
    },
    log::{BoundedLog, pump},
    process::Program,
};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    fs::{Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
};
use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt as _, chown, symlink},
    },
    sync::Arc,
};
use vestibule_api::{ids::MachineId, machine::MemoryBackend};

/// A file of the VMM's is never longer, but for a memory that is saved. What grows is its counters, by 10 KiB a minute: a VMM
/// whose file is full, which takes two months, would end.
const FILE_LIMIT: u64 = 1 << 30;
/// Below the VM's own directory.
pub(super) const JAIL: &str = "jail";
/// In the VMM's root.
const PRIVATE: &str = "private";
const LOG: &str = "log";
const MEMORY: &str = "memory";
const LOADED: &str = "loaded";

/// What a VMM is started with.
pub(super) struct Begin<'a> {
    pub(super) program: &'a Utf8Path,
    pub(super) jailer: &'a Utf8Path,
    pub(super) jail: &'a Jail,
    /// The jail's.
    pub(super) uid: u32,
    /// Where the jailer makes the VMM's root.
    pub(super) base: Utf8PathBuf,
    pub(super) id: MachineId,
    /// Bytes of the longest file that it writes, beside its own.
    pub(super) writes: u64,
}

/// Where what the VMM says can be read: the guest's serial line, and the log.
#[derive(Debug)]
pub(super) struct Said {
    serial: OwnedFd,
    log: OwnedFd,
}

impl Said {
    /// Has both kept, with what was said before.
    pub(super) fn keep(self, console: Arc<BoundedLog>, vmm_log: Arc<BoundedLog>) -> io::Result<()> {
        pump("console", File::from(self.serial), console)?;
        pump("vmm log", File::from(self.log), vmm_log)
    }
}

/// Starts the VMM.
///
/// # Errors
/// When the place is not made or the jailer not started.
pub(super) async fn begin(begin: Begin<'_>) -> Result<(Vmm, Said), LaunchError> {
    let uid = begin.uid;
    let made = begin.program();
    let (program, said) = made.map_err(LaunchError::prepare("make the VMM's jail"))?;
    Ok((Vmm::spawn(program, Some(uid)).await?, said))
}

impl Begin<'_> {
    fn program(self) -> io::Result<(Program, Said)> {
        let uid = self.uid;
        // The jailer's own way to name it (Firecracker fact 23).
        let root = self
            .base
            .join(self.program.file_name().unwrap_or_default())
            .join(self.id.to_string())
            .join("root");
        directory(&root.join(PRIVATE))?;
        own(&common(&root)?, uid)?;
        unlink(&root.join(request::CONFIG))?;
        symlink(format!("{PRIVATE}/config"), root.join(request::CONFIG))?;
        let (log, stderr) = fifo(&root.join(LOG))?;
        own(&root.join(LOG), uid)?;
        let (serial, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        widen(&stdout);
        let mut args: Vec<_> = [
            "--id",
            &self.id.to_string(),
            "--exec-file",
            self.program.as_str(),
            "--uid",
            &uid.to_string(),
            "--gid",
            &uid.to_string(),
            "--chroot-base-dir",
            self.base.as_str(),
            "--resource-limit",
            &format!("fsize={}", FILE_LIMIT.max(self.writes)),
            "--",
        ]
        .map(str::to_owned)
        .into();
        args.extend(vmm_args(LOG));
        let program = Program {
            path: self.jailer.to_owned(),
            args,
            directory: root,
            stdout: Some(stdout),
            stderr,
            inherit: Vec::new(),
            confinement: self.jail.around_jailer()?,
        };
        Ok((program, Said { serial, log }))
    }
}

/// Gives a VMM whose API is up, and that has no guest, the files of its VM.
///
/// # Errors
/// When one is not there, or is not mounted, or the VMM has no jail.
pub(super) fn fill(vmm: &Vmm, launch: &Launch, vmlinux: &Utf8Path) -> io::Result<Names> {
    let root = &vmm.directory;
    let no_jail = || io::Error::other("the VMM has no user of its own");
    let uid = vmm.owner.ok_or_else(no_jail)?;
    let mut binds = Vec::new();
    let mut bind = |from: &Utf8Path, name: &str, writable: bool| -> io::Result<()> {
        if !writable {
            readable(from)?;
        }
        made(&root.join(name))?;
        binds.push(Bind {
            from: from.to_owned(),
            to: Utf8Path::new("/").join(name),
            writable,
        });
        Ok(())
    };
    if !matches!(launch.memory, Memory::Restored(_)) {
        bind(vmlinux, request::KERNEL, false)?;
        bind(&launch.initrd, request::INITRD, false)?;
    }
    bind(&launch.root, request::ROOT, false)?;
    let mut names = Names::default();
    match &launch.memory {
        Memory::Own => {}
        Memory::Shared(path) => {
            bind(path, MEMORY, true)?;
            own(path, uid)?;
            let state = root.join(request::STATE);
            made(&state)?;
            own(&state, uid)?;
            names.memory = Some(MEMORY.to_owned());
        }
        Memory::Restored(restored) => {
            let state = restored
                .memory
                .with_file_name(vestibule_api::snapshot::STATE_FILE);
            bind(&state, LOADED, false)?;
            names.state = Some(LOADED.to_owned());
            let memory = if restored.backend == MemoryBackend::Uffd {
                let faults = root.join(FAULTS);
                names.faults = Some(crate::socket::listen(&faults)?);
                own(&faults, uid)?;
                FAULTS
            } else {
                bind(&restored.memory, MEMORY, false)?;
                MEMORY
            };
            names.memory = Some(memory.to_owned());
        }
    }
    let private = Utf8Path::new("/").join(PRIVATE);
    let mounts = Mounts {
        binds,
        file: private.join("config"),
        private,
        content: launch.config.0.try_clone()?,
    };
    mounts.make(vmm.pid(), uid)?;
    Ok(names)
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

fn own(path: &Utf8Path, uid: u32) -> io::Result<()> {
    chown(path, Some(uid), Some(uid))
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

/// A FIFO for the VMM's log: what the runner reads, and its other end. Opened for both at first: a reader without a writer reads
/// its end, and a writer without a reader is refused (fifo(7)).
fn fifo(path: &Utf8Path) -> io::Result<(OwnedFd, OwnedFd)> {
    unlink(path)?;
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        path.as_std_path(),
        Mode::from_raw_mode(0o600),
    )?;
    let open = |flags| rustix::fs::open(path.as_std_path(), flags | OFlags::CLOEXEC, Mode::empty());
    let both = open(OFlags::RDWR)?;
    let ends = (open(OFlags::RDONLY)?, open(OFlags::WRONLY)?);
    drop(both);
    Ok(ends)
}
