//! Files of the host's in the root of a VMM that runs: mounted into its namespace, where nobody else sees them. So a VMM can be
//! started before it is known which VM it will run.
//!
//! A mount is made in the namespace that a thread is in. One is cloned here as open_tree(2) does, without a place; a thread of its own
//! then enters the VMM's namespace (setns(2)), attaches it, and ends.
use camino::{Utf8Path, Utf8PathBuf};
use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{
        MountFlags, MoveMountFlags, OpenTreeFlags, mount, mount_remount, move_mount, open_tree,
    },
    process::{Gid, Uid, dumpable_behavior, getegid, geteuid, set_dumpable_behavior},
    thread::{
        LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_thread_res_gid,
        set_thread_res_uid, unshare_unsafe,
    },
};
use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
};
use zeroize::Zeroizing;

/// What is mounted is data.
const NONE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// A file of the host's at a place of the VMM's. Both are there.
#[derive(Debug)]
pub(crate) struct Bind {
    pub(crate) from: Utf8PathBuf,
    /// In the VMM's root.
    pub(crate) to: Utf8PathBuf,
    pub(crate) writable: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Mounts {
    pub(crate) binds: Vec<Bind>,
    /// A directory of the VMM's root that becomes one in memory, and a file in it that everybody may read, with what `content` has:
    /// never on a disk.
    pub(crate) private: Utf8PathBuf,
    pub(crate) file: Utf8PathBuf,
    pub(crate) content: OwnedFd,
}

impl Mounts {
    /// Makes them in the root of the process `pid`, which runs as the user and group `uid`. Blocks for some milliseconds.
    ///
    /// # Errors
    /// When there is no such process, it is another user's, or the kernel refuses a mount.
    pub(crate) fn make(self, pid: u32, uid: u32) -> io::Result<()> {
        let attempt = move || self.make_here(&namespace(pid, uid)?);
        let thread = std::thread::Builder::new().name(String::from("mounts"));
        let ended = thread.spawn(attempt)?.join();
        ended.unwrap_or_else(|_| Err(io::Error::other("the thread that mounts panicked")))
    }

    /// In a thread that ends with it.
    fn make_here(self, namespace: &OwnedFd) -> io::Result<()> {
        let clone = |bind: Bind| cloned(&bind.from).map(|tree| (tree, bind));
        let trees = self.binds.into_iter().map(clone);
        let trees = trees.collect::<io::Result<Vec<_>>>()?;
        // SAFETY: this thread shares root and working directory with the others of its process until here, names no file of theirs
        // afterwards, and ends.
        #[expect(unsafe_code, reason = "unshare(2) may break what threads share")]
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        enter(namespace)?;
        mount(
            c"tmpfs",
            self.private.as_std_path(),
            c"tmpfs",
            NONE,
            c"size=64k,mode=755",
        )?;
        copy(self.content, &self.file).map_err(|err| named("write", &self.file, &err))?;
        for (tree, bind) in trees {
            attach(&tree, &bind.to)?;
            let access = if bind.writable {
                MountFlags::empty()
            } else {
                MountFlags::RDONLY
            };
            mount_remount(bind.to.as_std_path(), MountFlags::BIND | NONE | access, c"")?;
        }
        Ok(())
    }
}

/// The mount of a file or directory, without a place.
pub(super) fn cloned(path: &Utf8Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path.as_std_path(), flags).map_err(|err| named("clone", path, &err.into()))
}

/// Has this thread, which shares its root with no other, go on in a mount namespace.
pub(super) fn enter(namespace: &OwnedFd) -> io::Result<()> {
    Ok(move_into_link_name_space(
        namespace.as_fd(),
        Some(LinkNameSpaceType::Mount),
    )?)
}

/// Gives a mount its place.
pub(super) fn attach(tree: &OwnedFd, to: &Utf8Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree, c"", CWD, to.as_std_path(), flags)
        .map_err(|err| named("mount at", to, &err.into()))
}

/// What a path was to be for: that of the VMM's root alone would not say it.
fn named(what: &str, path: &Utf8Path, err: &io::Error) -> io::Error {
    io::Error::new(err.kind(), format!("{what} `{path}`: {err}"))
}

fn copy(content: OwnedFd, path: &Utf8Path) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o444);
    let file = rustix::fs::open(path.as_std_path(), flags, mode)?;
    // Whatever this process' umask takes from it.
    rustix::fs::fchmod(&file, mode)?;
    let (content, mut file) = (File::from(content), File::from(file));
    let (mut page, mut at) = (Zeroizing::new([0; 4096]), 0);
    loop {
        // Whoever else has the descriptor has the same offset.
        let read = content.read_at(&mut *page, at)?;
        if read == 0 {
            return Ok(());
        }
        file.write_all(&page[..read])?;
        at += read as u64;
    }
}

/// The mount namespace of a process of this user's, and of no other that has got the number since. To look at one of another's needs
/// CAP_SYS_PTRACE (proc(5), "Permission to access", of `/proc/pid/ns`), which nothing else of ours does: so this thread looks as that
/// user, and keeps what else it may.
fn namespace(pid: u32, uid: u32) -> io::Result<OwnedFd> {
    let process = rustix::fs::open(
        format!("/proc/{pid}"),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let owner = rustix::fs::fstat(&process)?.st_uid;
    if owner != uid {
        let words = format!("process {pid} is not the user {uid}'s, but {owner}'s");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, words));
    }
    let dumpable = dumpable_behavior()?;
    let (own, group) = (geteuid(), getegid());
    set_thread_res_gid(None, Gid::from_raw(uid), None)?;
    set_thread_res_uid(None, Uid::from_raw(uid), None)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(&process, c"ns/mnt", flags, Mode::empty());
    set_thread_res_uid(None, own, None)?;
    set_thread_res_gid(None, group, None)?;
    // A process of which a thread has changed its user is one that others of its user may not look at (prctl(2), PR_SET_DUMPABLE): the
    // controller does.
    set_dumpable_behavior(dumpable)?;
    let named = |err: io::Error| {
        let words = format!("look at the mounts of process {pid}: {err}");
        io::Error::new(err.kind(), words)
    };
    opened.map_err(|err| named(err.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        jail::{enter::Confinement, is_root},
        log::{BoundedLog, piped},
        process::{Child, Program},
    };
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    use std::time::Duration;

    const NOBODY: u32 = 65534;

    /// As a VMM is started by its jailer, and is somebody else's then.
    async fn other(home: &Utf8Path) -> (Child, u32) {
        let log = BoundedLog::create(&home.join("log"), 64 << 10).unwrap();
        let ids = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
        let [user, group] = ids;
        let program = Program {
            path: "/usr/bin/setpriv".into(),
            args: vec![
                user,
                group,
                "--clear-groups".into(),
                "sleep".into(),
                "60".into(),
            ],
            directory: "/".into(),
            stdout: None,
            stderr: piped("log", log).unwrap(),
            inherit: Vec::new(),
            confinement: Confinement {
                namespaces: true,
                init: true,
                ..Confinement::default()
            },
        };
        let child = program.spawn().await.unwrap();
        let pid = child.pid();
        let sleeps = async {
            loop {
                let children = format!("/proc/{pid}/task/{pid}/children");
                let children = std::fs::read_to_string(children).unwrap();
                if let Ok(pid) = children.trim().parse::<u32>()
                    && std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() == "sleep\n"
                {
                    return pid;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let inner = tokio::time::timeout(Duration::from_secs(60), sleeps).await;
        (child, inner.unwrap())
    }

    fn without(capability: CapabilitySet) {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(capability);
        sets.permitted.remove(capability);
        set_capabilities(None, sets).unwrap();
    }

    #[tokio::test]
    async fn files_are_mounted_where_one_process_sees_them() {
        if !is_root() || super::super::enter::try_namespaces().is_err() {
            println!("skipped: only root mounts, and where it may");
            return;
        }
        let home = camino_tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        for name in ["read", "write", "from-read", "from-write"] {
            std::fs::write(path(name), name).unwrap();
        }
        std::fs::create_dir(path("private")).unwrap();
        let mounts = || Mounts {
            binds: ["read", "write"]
                .map(|name| Bind {
                    from: path(&format!("from-{name}")),
                    to: path(name),
                    writable: name == "write",
                })
                .into(),
            private: path("private"),
            file: path("private/config"),
            content: File::open(path("from-read")).unwrap().into(),
        };
        let (child, pid) = other(home.path()).await;
        // Not somebody else's, who has the number since.
        let err = mounts().make(pid, NOBODY - 1).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::PermissionDenied, "{err}");
        // Nothing of it needs what the packaged unit does not give.
        let made = std::thread::spawn({
            let mounts = mounts();
            move || {
                without(CapabilitySet::SYS_PTRACE);
                mounts.make(pid, NOBODY)
            }
        });
        let before = dumpable_behavior().unwrap();
        made.join().unwrap().unwrap();
        assert_eq!(dumpable_behavior().unwrap(), before);
        let seen = |name: &str| Utf8PathBuf::from(format!("/proc/{pid}/root{}", path(name)));
        let text = |path: Utf8PathBuf| std::fs::read_to_string(path).unwrap();
        assert_eq!(text(seen("read")), "from-read");
        assert_eq!(text(seen("private/config")), "from-read");
        let err = std::fs::write(seen("read"), "changed").unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
        std::fs::write(seen("write"), "changed").unwrap();
        assert_eq!(text(path("from-write")), "changed");
        // Nobody else sees any of it.
        assert_eq!(
            (text(path("read")), text(path("write"))),
            ("read".into(), "write".into())
        );
        assert_eq!(path("private").read_dir_utf8().unwrap().count(), 0);
        child.kill();
        child.wait().await;
    }
}
