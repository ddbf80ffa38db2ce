//! A cgroup of a VM's own, with limits (cgroup v2, the kernel's Documentation/admin-guide/cgroup-v2.rst).
use camino::{Utf8Path, Utf8PathBuf};
use std::{
    fs::{File, TryLockError},
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    time::{Duration, Instant},
};
use vestibule_api::{error::Chain, ids::MachineId, machine::CGROUP_PARENT};

const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];
/// A killed process is out of its group after this, on a host that is busy, too: 2 s were not enough for a VMM of 256 MiB in the nested
/// machine beside a build.
const EMPTY_LIMIT: Duration = Duration::from_secs(10);
/// Claims that may be lost to another runner's, one after the other.
const CLAIMS: u32 = 3;
/// What `cpu.max` counts in, in µs.
const PERIOD: u32 = 100_000;
/// Threads of a VMM besides those that run the guest's CPUs.
const THREADS: u32 = 64;

/// What this host has of cgroup v2.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(
    tag = "state",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum CgroupFound {
    /// All three controllers, and this process may make groups.
    Usable { root: Utf8PathBuf },
    /// No cgroup2 file system is mounted.
    Absent,
    /// It is mounted without these controllers: they are cgroup v1's, or turned off.
    Lacks {
        root: Utf8PathBuf,
        what: Vec<String>,
    },
    /// Only root makes groups, or whom a group was delegated to.
    NoPermission { root: Utf8PathBuf },
    /// All seems to be there, and the kernel makes no group: in a container, often.
    Refused { root: Utf8PathBuf, why: String },
}

impl std::fmt::Display for CgroupFound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usable { root } => write!(f, "v2 at {root}: memory, pids and cpu are limited"),
            Self::Absent => f.write_str("no cgroup v2 is mounted: nothing is limited"),
            Self::Lacks { root, what } => write!(
                f,
                "v2 at {root} lacks {}: nothing is limited",
                what.join(", ")
            ),
            Self::NoPermission { root } => {
                write!(f, "v2 at {root} is root's: nothing is limited")
            }
            Self::Refused { root, why } => {
                write!(
                    f,
                    "v2 at {root} takes no group of a VM: nothing is limited: {why}"
                )
            }
        }
    }
}

/// Looks what there is. Changes nothing.
pub(crate) fn find() -> CgroupFound {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Some(root) = mount_point(&mounts) else {
        return CgroupFound::Absent;
    };
    let there = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    let there: Vec<_> = there.split_whitespace().collect();
    let what: Vec<_> = CONTROLLERS
        .iter()
        .filter(|one| !there.contains(one))
        .map(|one| (*one).to_owned())
        .collect();
    let writable = rustix::fs::access(root.as_std_path(), rustix::fs::Access::WRITE_OK).is_ok();
    match (what.is_empty(), writable) {
        (false, _) => CgroupFound::Lacks { root, what },
        (true, false) => CgroupFound::NoPermission { root },
        (true, true) => CgroupFound::Usable { root },
    }
}

/// As [`find`]; where groups can be made by what is to be seen, one is made and removed.
pub(crate) fn probe() -> CgroupFound {
    let found = find();
    let CgroupFound::Usable { root } = &found else {
        return found;
    };
    // Nobody else's, in whatever container.
    let name = format!("probe-{}", MachineId::generate());
    let limits = Limits {
        memory_mib: 1,
        vcpus: 1,
    };
    match Cgroup::make(root, &name, limits) {
        Ok(_) => found,
        Err(err) => CgroupFound::Refused {
            root: root.clone(),
            why: Chain(&err).to_string(),
        },
    }
}

/// Of proc_pid_mountinfo(5): the mount point is the fifth field, the type the first after a dash.
fn mount_point(mounts: &str) -> Option<Utf8PathBuf> {
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let point = place.split(' ').nth(4)?;
        kind.starts_with("cgroup2 ").then(|| point.into())
    })
}

/// What a VM may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub memory_mib: u32,
    pub vcpus: u32,
}

/// A group that is removed with this.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: Utf8PathBuf,
    /// The directory, locked (flock(2)) for as long as this lives: whoever sees the group, from whatever container, sees that it has
    /// an owner.
    lock: File,
}

/// Why there is no group for a VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// Another runner's, though nobody has the uid's lock: it keeps its locks elsewhere.
    #[error("the cgroup `{0}` is another VM's")]
    InUse(Utf8PathBuf),
    #[error("make a cgroup")]
    Refused(#[from] io::Error),
}

impl Cgroup {
    /// Makes the group `name` with limits. One that a killed runner left is ended and made anew.
    ///
    /// # Errors
    /// When somebody has the group, or the kernel refuses it or a limit.
    pub(crate) fn make(root: &Utf8Path, name: &str, limits: Limits) -> Result<Self, CgroupError> {
        let parent = root.join(CGROUP_PARENT);
        let enable = CONTROLLERS.map(|one| format!("+{one}")).join(" ");
        write(&root.join("cgroup.subtree_control"), &enable)?;
        create(&parent)?;
        write(&parent.join("cgroup.subtree_control"), &enable)?;
        let group = Self::claim(parent.join(name))?;
        group.limit(limits)?;
        // A guest's memory on a swap device would outlive the VM. Kernels without swap have no such file.
        if let Err(err) = group.set("memory.swap.max", "0") {
            tracing::debug!(error = %err, "swapping of the VM's memory is not refused");
        }
        Ok(group)
    }

    /// Sets limits in the place of those that it has.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub(crate) fn limit(&self, limits: Limits) -> io::Result<()> {
        let cpu = (limits.vcpus + 1).saturating_mul(PERIOD);
        self.set("memory.max", &format!("{}M", limits.memory_mib))?;
        self.set("pids.max", &(THREADS + limits.vcpus).to_string())?;
        self.set("cpu.max", &format!("{cpu} {PERIOD}"))
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        write(&self.path.join(file), value)
    }

    /// Makes the group's directory, new and locked. One that is there and that nobody has locked is an orphan: its processes
    /// died with their runner, or are about to.
    fn claim(mut path: Utf8PathBuf) -> Result<Self, CgroupError> {
        for _ in 0..CLAIMS {
            let new = create(&path)?;
            let lock = match File::open(&path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
                opened => opened?,
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(CgroupError::InUse(path)),
                Err(TryLockError::Error(err)) => return Err(err.into()),
            }
            let group = Self { path, lock };
            if new && group.is_there() {
                return Ok(group);
            }
            // An orphan, which is removed here and made anew in the next round; or another claim was faster.
            group.remove();
            path = group.path.clone();
        }
        Err(CgroupError::InUse(path))
    }

    pub(crate) fn path(&self) -> &Utf8Path {
        &self.path
    }

    /// The group's directory, for a process that is to be in it.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub(crate) fn entry(&self) -> io::Result<OwnedFd> {
        Ok(self.lock.try_clone()?.into())
    }

    /// Whether its name is still its own, and not that of a later group.
    fn is_there(&self) -> bool {
        let inode = |meta: io::Result<std::fs::Metadata>| meta.map(|meta| meta.ino()).ok();
        inode(self.path.as_std_path().metadata()) == inode(self.lock.metadata())
    }

    /// Ends what is in it and removes it. Returns whether it is gone.
    pub(crate) fn remove(&self) -> bool {
        if !self.is_there() {
            return true;
        }
        // Since Linux 5.14; before, the processes were ended one by one by whoever started them.
        let _ = write(&self.path.join("cgroup.kill"), "1");
        let begun = Instant::now();
        loop {
            match std::fs::remove_dir(&self.path) {
                Ok(()) => return true,
                Err(err) if err.kind() == io::ErrorKind::NotFound => return true,
                Err(_) if begun.elapsed() < EMPTY_LIMIT => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(_) => return false,
            }
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Makes a directory; returns whether it was not there before.
fn create(path: &Utf8Path) -> io::Result<bool> {
    match std::fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(err) => Err(io::Error::new(err.kind(), format!("make `{path}`: {err}"))),
    }
}

fn write(path: &Utf8Path, value: &str) -> io::Result<()> {
    // Never makes the file: a kernel that has none does not know it.
    File::options()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|err| io::Error::new(err.kind(), format!("write `{value}` to `{path}`: {err}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_beside_those_of_v1() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n\
                      32 30 0:28 / /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory\n";
        let point = mount_point(mounts);
        assert_eq!(point.as_deref(), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("30 23 0:26 / /tmp rw - tmpfs tmpfs rw"), None);
    }

    #[test]
    fn this_host_has_some_answer() {
        println!("{}", find());
    }

    /// A directory does for a group here: what is locked and removed is the same.
    #[test]
    fn a_group_that_somebody_has_is_left_alone() {
        let home = camino_tempfile::tempdir().unwrap();
        let path = home.path().join("vm-1");
        let claim = || Cgroup::claim(path.clone());
        let first = claim().unwrap();
        let other = claim().unwrap_err();
        assert!(matches!(other, CgroupError::InUse(_)), "{other}");
        assert!(first.is_there(), "another claim removed it");
        // A killed runner's: there, and nobody's.
        let inode = path.metadata().unwrap().ino();
        rustix::fs::flock(&first.lock, rustix::fs::FlockOperation::Unlock).unwrap();
        let second = claim().unwrap();
        assert!(second.is_there() && !first.is_there(), "{inode}");
        // Whoever had it before does not remove what has its name now.
        drop(first);
        assert!(second.is_there());
        assert!(second.remove() && !path.exists());
    }

    #[test]
    fn a_host_that_takes_no_groups_is_told_in_words() {
        let found = CgroupFound::Refused {
            root: "/sys/fs/cgroup".into(),
            why: String::from("make a cgroup: Device or resource busy"),
        };
        assert!(
            found.to_string().contains("nothing is limited: make"),
            "{found}"
        );
    }
}
