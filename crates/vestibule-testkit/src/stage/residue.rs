//! What is left of a controller's VMs: processes, sockets, files, mounts and cgroups, found by looking, not by asking the
//! controller.
use camino::Utf8Path;
use std::{
    fs::{self, File, TryLockError},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    time::SystemTime,
};
use vestibule_api::machine::{CGROUP_PARENT, CGROUP_PREFIX};

/// Where runners lock the uids of their VMs, each in a file of its number.
const UIDS: &str = "/run/vestibule/uids";

/// Every process that mentions `home` or holds a file in it open, except `controller`, every socket, VM directory and mount
/// in it, and every cgroup of a VM that was made since `home` was and is nobody's. Empty when nothing was left behind.
pub fn residue(home: &Utf8Path, controller: Option<u32>) -> Vec<String> {
    let mut found = processes(home, controller);
    sockets(home.as_std_path(), &mut found);
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    found.extend(mounts(&mountinfo, home));
    // Of what was made before there is a home, or by whom after it, nothing is known here.
    if let (Some(parent), Ok(born)) = (
        groups_of_vms(&mountinfo),
        home.metadata().and_then(|home| home.created()),
    ) {
        found.extend(groups(&parent, Path::new(UIDS), born));
    }
    for entry in fs::read_dir(home.join("vms"))
        .into_iter()
        .flatten()
        .flatten()
    {
        found.push(format!("directory {}", entry.path().display()));
    }
    found
}

/// Every process but this one that mentions `home` or has a file in it open.
pub fn processes_of(home: &Utf8Path) -> Vec<u32> {
    found_processes(home)
        .into_iter()
        .map(|(pid, _)| pid)
        .collect()
}

fn processes(home: &Utf8Path, controller: Option<u32>) -> Vec<String> {
    found_processes(home)
        .into_iter()
        .filter(|(pid, _)| Some(*pid) != controller)
        .map(|(pid, line)| format!("process {pid} {line}"))
        .collect()
}

fn found_processes(home: &Utf8Path) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(home.as_str()) || holds(&entry.path(), home) {
            let short: String = line.chars().take(120).collect();
            found.push((pid, short));
        }
    }
    found
}

/// Whether the process has a file below `home` open or works there.
fn holds(process: &Path, home: &Utf8Path) -> bool {
    let below =
        |link: &Path| fs::read_link(link).is_ok_and(|to| to.starts_with(home.as_std_path()));
    below(&process.join("cwd"))
        || fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|fd| below(&fd.path()))
}

/// Of proc_pid_mountinfo(5): what is mounted in `home`, or from it.
fn mounts(mountinfo: &str, home: &Utf8Path) -> Vec<String> {
    let below = |field: &str| Utf8Path::new(field).starts_with(home);
    let of_home = |line: &&str| line.split(' ').any(below);
    let lines = mountinfo.lines().filter(of_home);
    lines.map(|line| format!("mount {line}")).collect()
}

/// Where runners make cgroups, if there are any of version 2: the mount point is the fifth field, the type the first after a
/// dash.
fn groups_of_vms(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let point = place.split(' ').nth(4)?;
        let unified = kind.starts_with("cgroup2 ");
        unified.then(|| Path::new(point).join(CGROUP_PARENT))
    })
}

/// The groups `vm-UID` in `parent`, not older than `born`, whose uid no runner holds.
fn groups(parent: &Path, uids: &Path, born: SystemTime) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(uid) = name
            .to_str()
            .and_then(|name| name.strip_prefix(CGROUP_PREFIX))
        else {
            continue;
        };
        let made = entry.metadata().and_then(|group| group.modified());
        if made.is_ok_and(|made| made >= born) && !is_held(&uids.join(uid)) {
            found.push(format!("cgroup {}", entry.path().display()));
        }
    }
    found
}

/// Whether somebody has locked the file (flock(2)).
fn is_held(lock: &Path) -> bool {
    let tried = File::open(lock).map(|lock| lock.try_lock_shared());
    matches!(tried, Ok(Err(TryLockError::WouldBlock)))
}

fn sockets(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // The kind of the entry itself: links to the shared images are not followed.
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => sockets(&entry.path(), found),
            Ok(kind) if kind.is_socket() => {
                found.push(format!("socket {}", entry.path().display()));
            }
            Ok(_) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_sockets_and_directories_are_found() {
        let home = camino_tempfile::tempdir().unwrap();
        assert_eq!(residue(home.path(), None), Vec::<String>::new());
        fs::create_dir_all(home.path().join("vms/1")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(home.path().join("vms/1/s")).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir(home.path())
            .spawn()
            .unwrap();
        let found = residue(home.path(), None);
        assert!(
            found
                .iter()
                .any(|f| f.starts_with(&format!("process {} ", child.id()))),
            "{found:?}"
        );
        assert!(
            found.iter().any(|f| f.starts_with("socket "))
                && found.iter().any(|f| f.starts_with("directory "))
        );
        assert!(
            !residue(home.path(), Some(child.id()))
                .iter()
                .any(|f| f.starts_with("process "))
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn mounts_are_found_by_either_end() {
        let mountinfo = "30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                         31 30 0:27 / /tmp/vt-a/vms/1/root rw shared:10 - tmpfs vm rw\n\
                         32 30 0:28 /tmp/vt-a/images /srv/jail rw - ext4 /dev/vda rw\n\
                         33 30 0:29 / /tmp/vt-ab rw - tmpfs other rw\n";
        let found = mounts(mountinfo, "/tmp/vt-a".into());
        let numbers: Vec<_> = found.iter().map(|line| &line[..9]).collect();
        assert_eq!(numbers, ["mount 31 ", "mount 32 "]);
        assert_eq!(groups_of_vms(mountinfo), None);
    }

    #[test]
    fn a_cgroup_that_nobody_holds_is_found() {
        let dir = camino_tempfile::tempdir().unwrap();
        let (parent, uids) = (dir.path().join("vestibule"), dir.path().join("uids"));
        let born = || {
            groups(
                parent.as_std_path(),
                uids.as_std_path(),
                SystemTime::UNIX_EPOCH,
            )
        };
        assert_eq!(born(), Vec::<String>::new());
        fs::create_dir_all(&uids).unwrap();
        for name in ["vm-470000", "vm-470001", "vm-470002", "system.slice"] {
            fs::create_dir_all(parent.join(name)).unwrap();
        }
        let lock = |uid: &str| File::create(uids.join(uid)).unwrap();
        let (held, _free) = (lock("470000"), lock("470001"));
        held.lock().unwrap();
        let mut found = born();
        found.sort();
        let group = |name: &str| format!("cgroup {}", parent.join(name));
        assert_eq!(found, [group("vm-470001"), group("vm-470002")]);
        drop(held);
        assert_eq!(born().len(), 3);
        let later =
            fs::metadata(&parent).unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
        assert_eq!(
            groups(parent.as_std_path(), uids.as_std_path(), later),
            Vec::<String>::new()
        );
        let mountinfo =
            "31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n";
        let unified = Path::new("/sys/fs/cgroup/unified/vestibule");
        assert_eq!(groups_of_vms(mountinfo).as_deref(), Some(unified));
    }
}
