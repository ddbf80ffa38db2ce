//! What keeps a VMM apart from the host, from other VMs and from the controller, beside the VMM's own seccomp filters.
//!
//! | | as root, Firecracker with its jailer | as root, else | without root |
//! |---|---|---|---|
//! | files | a root of its own (chroot): the VM's | landlock: the VM's, and the programs' | landlock, as before |
//! | user | a uid and gid that no other VM has | root's uid without capabilities | the runner's |
//! | processes | a pid namespace of its own | the same | landlock: no signal leaves it |
//! | network, System V IPC | namespaces of its own, empty | the same | landlock: no TCP |
//! | memory, processes, CPU | cgroup v2, where the host has it | the same | the host's |
//!
//! Landlock is the kernel's own (landlock(7)); what the running kernel lacks of it, and every other part that a host cannot
//! give, `vestibule doctor` says.
//!
//! The jailer is Firecracker's. What it needs in its root is bind-mounted into a mount namespace that ends with the VMM, so that
//! nothing of it can be left, an image may be on any file system, and an image's inode stays as it is (a hard link would
//! change its ctime, by which `snapshot.rs` knows a file that was checked). The config drive, which holds the stream's key, is in a
//! tmpfs there: the jailer closes every descriptor, and a jailed VMM has no `/proc` to name one by.
pub(crate) mod cgroup;
pub(crate) mod enter;
pub(crate) mod landlock;
mod uid;

pub use cgroup::CgroupFound;
pub use uid::UidError;

use camino::Utf8Path;
use cgroup::{Cgroup, Limits};
use enter::{Confinement, Mounts};
use landlock::Allowed;
use serde::Serialize;
use std::{io, os::unix::fs::MetadataExt as _, path::Path};
use uid::UidLock;
use vestibule_api::machine::{CGROUP_MARK, CGROUP_PREFIX, CgroupMark, DisposedItem, JailSpec};

/// What one VM has of the host for itself. Removed when dropped.
#[derive(Debug)]
pub struct Jail {
    uid: Option<UidLock>,
    cgroup: Option<Cgroup>,
    /// Why something is missing that root could have.
    note: Option<String>,
}

/// What stands in the evidence.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JailRecord {
    /// Of the VM alone: what a jailed VMM runs as.
    pub uid: Option<u32>,
    pub cgroup: Option<String>,
    pub landlock: Option<u32>,
    pub note: Option<String>,
}

/// Whether this process can make jails.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Jail {
    /// Takes what the host can give. Blocks for some milliseconds.
    ///
    /// # Errors
    /// When this is root and there is no uid left.
    pub fn make(spec: JailSpec, memory_mib: u32, vcpus: u32) -> Result<Self, UidError> {
        if !is_root() {
            return Ok(Self {
                uid: None,
                cgroup: None,
                note: None,
            });
        }
        let uid = UidLock::take(spec)?;
        // The uid is nobody else's, so neither is the name.
        let name = format!("{CGROUP_PREFIX}{}", uid.uid());
        let limits = Limits { memory_mib, vcpus };
        let (cgroup, note) = match cgroup::find() {
            CgroupFound::Usable { root } => match Cgroup::make(&root, &name, limits) {
                Ok(group) => (Some(group), None),
                Err(err) => (None, Some(err.to_string())),
            },
            other @ (CgroupFound::Absent
            | CgroupFound::Lacks { .. }
            | CgroupFound::NoPermission { .. }) => (None, Some(other.to_string())),
        };
        if let Some(note) = &note {
            tracing::debug!(note, "the VMM has no cgroup of its own");
        }
        Ok(Self {
            uid: Some(uid),
            cgroup,
            note,
        })
    }

    /// What a jailed VMM runs as; none where this is not root.
    pub fn uid(&self) -> Option<u32> {
        self.uid.as_ref().map(UidLock::uid)
    }

    pub fn record(&self) -> JailRecord {
        JailRecord {
            uid: self.uid(),
            cgroup: self.cgroup.as_ref().map(|group| group.path().to_string()),
            landlock: landlock::abi(),
            note: self.note.clone(),
        }
    }

    /// Says in the VM's directory which group is the VM's: a runner that is killed can't remove it.
    ///
    /// # Errors
    /// When the group is gone or the directory can't be written to.
    pub fn leave_mark(&self, vm_dir: &Utf8Path) -> io::Result<()> {
        let Some(group) = &self.cgroup else {
            return Ok(());
        };
        let mark = CgroupMark {
            path: group.path().to_string(),
            inode: group.path().metadata()?.ino(),
        };
        std::fs::write(vm_dir.join(CGROUP_MARK), serde_json::to_vec(&mark)?)
    }

    /// For a VMM that is started as it is, and whose files are `allowed`.
    pub(crate) fn direct(&self, allowed: &Allowed) -> io::Result<Confinement> {
        // Files of another user's are root's to read only by a capability.
        let foreign = |path: &Path| path.metadata().is_ok_and(|meta| meta.uid() != 0);
        let mut files = allowed.read.iter().chain(&allowed.write);
        let foreign = files.any(|path| path.ancestors().any(|path| foreign(path.as_std_path())));
        Ok(Confinement {
            cgroup: self.entry()?,
            namespaces: self.uid.is_some(),
            mounts: None,
            init: false,
            drop_capabilities: self.uid.is_some() && !foreign,
            landlock: landlock::ruleset(allowed)?,
        })
    }

    /// For a jailer, which makes the rest of it.
    pub(crate) fn around_jailer(&self, mounts: Mounts) -> io::Result<Confinement> {
        Ok(Confinement {
            cgroup: self.entry()?,
            namespaces: true,
            mounts: Some(mounts),
            init: true,
            ..Confinement::default()
        })
    }

    fn entry(&self) -> io::Result<Option<std::os::fd::OwnedFd>> {
        self.cgroup.as_ref().map(Cgroup::entry).transpose()
    }

    /// Removes what it had, once the VMM is gone.
    pub fn remove(&self) -> Vec<DisposedItem> {
        let group = self.cgroup.iter().map(|group| DisposedItem {
            kind: String::from("cgroup"),
            name: group.path().to_string(),
            gone: group.remove(),
        });
        group.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        log::{BoundedLog, piped},
        process::Program,
    };
    use std::{net::TcpListener, time::Duration};

    /// What a shell says that is confined as a VMM without a jailer is.
    async fn said(script: &str, allowed: &Allowed) -> String {
        let home = camino_tempfile::tempdir().unwrap();
        let log = BoundedLog::create(&home.path().join("log"), 64 << 10).unwrap();
        let jail = Jail::make(JailSpec::default(), 256, 1).unwrap();
        let program = Program {
            path: "/bin/bash".into(),
            args: vec!["-c".into(), script.into()],
            directory: "/".into(),
            stdout: None,
            stderr: piped("log", log.clone()).unwrap(),
            inherit: Vec::new(),
            confinement: jail.direct(allowed).unwrap(),
        };
        let child = program.spawn().await.unwrap();
        let exit = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
        exit.unwrap();
        let mut progress = log.progress();
        progress.wait_for(|progress| progress.ended).await.unwrap();
        String::from_utf8(log.render().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_confined_process_reaches_nothing_else() {
        if landlock::abi().is_none_or(|abi| abi < 4) {
            println!("skipped: the kernel's Landlock is older than TCP rules, or missing");
            return;
        }
        let home = camino_tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        for name in ["own", "secret"] {
            std::fs::create_dir(path(name)).unwrap();
            std::fs::write(path(name).join("file"), name).unwrap();
        }
        let service = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = service.local_addr().unwrap().port();
        let allowed = Allowed {
            read: vec![path("own")],
            execute: ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
                .map(Into::into)
                .into(),
            write: vec!["/dev/null".into()],
        };
        let me = std::process::id();
        let (own, secret) = (path("own"), path("secret"));
        let script = format!(
            "exec 1>&2; echo begun
             cat {own}/file >/dev/null && echo 'read its own'
             cat {secret}/file /etc/passwd /proc/{me}/environ 2>/dev/null
             (echo x >{own}/file) 2>/dev/null && echo 'wrote what it may read'
             (echo x >{own}/new) 2>/dev/null && echo 'made a file'
             (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null && echo 'connected'
             kill -0 {me} 2>/dev/null && echo 'signalled the runner'
             echo done"
        );
        let said = said(&script, &allowed).await;
        println!("{said}");
        assert_eq!(
            said.lines().collect::<Vec<_>>(),
            ["begun", "read its own", "done"]
        );
        service.set_nonblocking(true).unwrap();
        assert!(service.accept().is_err(), "it connected");
    }

    /// The same as another user, whom only Landlock confines.
    #[test]
    fn without_root_a_confined_process_reaches_nothing_else() {
        use std::os::unix::process::CommandExt as _;
        if !is_root() {
            println!("skipped: what runs as root is run as nobody here, and this is not root");
            return;
        }
        let test = "jail::tests::a_confined_process_reaches_nothing_else";
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", test, "--nocapture"])
            .uid(65534)
            .gid(65534);
        match command.output() {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stdout);
                println!("{said}");
                assert!(
                    output.status.success() && said.contains("1 passed"),
                    "{said}"
                );
            }
            Err(err) => println!("skipped: nobody cannot run this test's program: {err}"),
        }
    }

    #[tokio::test]
    async fn root_is_no_root_in_it() {
        if !is_root() {
            println!("skipped: not root");
            return;
        }
        let allowed = Allowed {
            read: vec!["/proc".into()],
            execute: ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
                .map(Into::into)
                .into(),
            write: vec![],
        };
        let script = "grep -E '^(CapEff|CapPrm|NoNewPrivs|NSpid)' /proc/self/status >&2; exec 1>&2; \
                      cat /proc/net/dev | tail -n +3 | cut -d: -f1";
        let said = said(script, &allowed).await;
        println!("{said}");
        assert!(
            said.contains("CapEff:\t0000000000000000")
                && said.contains("CapPrm:\t0000000000000000")
        );
        assert!(said.contains("NoNewPrivs:\t1"), "{said}");
        // Two numbers: the host's, and its own namespace's.
        let numbers = said
            .lines()
            .find(|line| line.starts_with("NSpid:"))
            .unwrap();
        assert_eq!(numbers.split_whitespace().count(), 3, "{said}");
        assert!(!said.contains("eth0"), "{said}");
    }
}
