//! What keeps a VMM apart from the host, from other VMs and from the controller, beside the VMM's own seccomp filters.
//!
//! | | as root, Firecracker with its jailer | as root, else | without root |
//! |---|---|---|---|
//! | files | a root of its own (chroot): the VM's | landlock: the VM's, and the programs' | landlock, as before |
//! | user | a uid and gid that no other VM has | root's uid without capabilities, but to read what is not root's | the runner's |
//! | processes | a pid namespace of its own | the same | landlock: no signal leaves it (Linux 6.12) |
//! | network, System V IPC | namespaces of its own, empty | the same | landlock: no TCP (Linux 6.7) |
//! | memory, processes, CPU | cgroup v2, where the host has it | the same | the host's |
//!
//! Root without namespaces to give (in a container, often) has what there is without root, and no capabilities.
//!
//! Landlock is the kernel's own (landlock(7)); what the running kernel lacks of it, and every other part that a host cannot
//! give, `vestibule doctor` says.
//!
//! The jailer is Firecracker's. What the VMM needs in its root is mounted into its mount namespace, which ends with it, so that
//! nothing of it can be left, an image may be on any file system, and an image's inode stays as it is (a hard link would
//! change its ctime, by which `snapshot.rs` knows a file that was checked). The config drive, which holds the stream's key, is in a
//! tmpfs there: the jailer closes every descriptor, and a jailed VMM has no `/proc` to name one by. All of it is mounted when the
//! VMM runs already and has no guest (`mounts.rs`): one may wait in its jail for its VM.
pub(crate) mod cgroup;
pub(crate) mod enter;
pub(crate) mod landlock;
pub(crate) mod mounts;
mod uid;

pub use cgroup::CgroupFound;
pub use uid::UidError;

use camino::Utf8Path;
use cgroup::{Cgroup, CgroupError, Limits};
use enter::Confinement;
use landlock::Allowed;
use rustix::thread::CapabilitySet;
use serde::Serialize;
use std::{io, os::unix::fs::MetadataExt as _, sync::OnceLock};
use uid::UidLock;
use vestibule_api::{
    error::Chain,
    machine::{CGROUP_MARK, CGROUP_PREFIX, CgroupMark, DisposedItem, JailSpec},
};

/// In the evidence.
const NO_CAPABILITIES: &[&str] = &[];
/// Files and directories of another user's are root's to read only by a capability.
const READ_ALL: &[&str] = &["CAP_DAC_READ_SEARCH"];

/// What one VM has of the host for itself. Removed when dropped.
#[derive(Debug)]
pub struct Jail {
    /// Before the uid, which gives the group its name: it is removed before another VM can have the uid.
    cgroup: Option<Cgroup>,
    uid: Option<UidLock>,
    /// Whether the VMM gets namespaces.
    namespaces: bool,
    /// What is missing that root could have, and why.
    notes: Vec<String>,
    /// What the VMM was started in.
    applied: OnceLock<Applied>,
}

/// What stands in the evidence: what was done, not what could be.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JailRecord {
    /// Of the VM alone; none where the VMM runs as the runner's user.
    pub uid: Option<u32>,
    pub cgroup: Option<String>,
    /// None of a VM whose VMM was never started.
    #[serde(flatten)]
    pub applied: Option<Applied>,
    pub notes: Vec<String>,
}

/// How a VMM was confined when it was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    /// What the VMM runs as.
    pub user: u32,
    /// Those that it has; none: what its user has.
    pub capabilities: Option<&'static [&'static str]>,
    pub namespaces: bool,
    /// Version of Landlock that it is held by; a jailer's root takes Landlock's place.
    pub landlock: Option<u32>,
}

/// Whether this process can make jails.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What [`prepare`] found, in a process that waits for its VM.
static TRIED: OnceLock<Result<(), String>> = OnceLock::new();

/// Tries what this host can give, for the VM that this process will have. Blocks for some milliseconds.
pub(crate) fn prepare() {
    if is_root() {
        TRIED.get_or_init(tried);
    }
}

/// Whether a VMM can be given namespaces here, or why not.
fn tried() -> Result<(), String> {
    enter::try_namespaces().map_err(|err| err.to_string())
}

impl Jail {
    /// Takes what the host can give. Blocks for some milliseconds.
    ///
    /// # Errors
    /// When this is root and there is no uid left.
    pub fn make(spec: JailSpec, memory_mib: u32, vcpus: u32) -> Result<Self, UidError> {
        let mut jail = Self {
            cgroup: None,
            uid: None,
            namespaces: false,
            notes: Vec::new(),
            applied: OnceLock::new(),
        };
        if !is_root() {
            return Ok(jail);
        }
        match TRIED.get().cloned().unwrap_or_else(tried) {
            Ok(()) => jail.namespaces = true,
            Err(why) => jail.lacks(format!("no namespaces can be made: {why}")),
        }
        let (uid, cgroup) = own(spec, Limits { memory_mib, vcpus })?;
        jail.uid = Some(uid);
        match cgroup {
            Ok(group) => jail.cgroup = Some(group),
            Err(why) => jail.lacks(format!("no cgroup: {why}")),
        }
        Ok(jail)
    }

    /// Gives other limits to what is in it already.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub fn limit(&self, memory_mib: u32, vcpus: u32) -> io::Result<()> {
        let limits = Limits { memory_mib, vcpus };
        self.cgroup
            .as_ref()
            .map_or(Ok(()), |group| group.limit(limits))
    }

    /// Keeps in mind what the VM is without, and says it.
    fn lacks(&mut self, note: String) {
        tracing::warn!(note, "the VMM is kept apart by less than a jail");
        self.notes.push(note);
    }

    /// What a jailed VMM runs as; none where there can be no jail.
    pub fn uid(&self) -> Option<u32> {
        let uid = self.uid.as_ref().filter(|_| self.namespaces);
        uid.map(UidLock::uid)
    }

    pub fn record(&self) -> JailRecord {
        let applied = self.applied.get().cloned();
        let user = applied.as_ref().map(|applied| applied.user);
        JailRecord {
            uid: self.uid().filter(|uid| Some(*uid) == user),
            cgroup: self.cgroup.as_ref().map(|group| group.path().to_string()),
            applied,
            notes: self.notes.clone(),
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
        let (keep, capabilities) = if !is_root() {
            (None, None)
        } else if allowed.has_foreign() && had()?.contains(CapabilitySet::DAC_READ_SEARCH) {
            (Some(CapabilitySet::DAC_READ_SEARCH), Some(READ_ALL))
        } else {
            (Some(CapabilitySet::empty()), Some(NO_CAPABILITIES))
        };
        let (landlock, version) = landlock::ruleset(allowed)?.unzip();
        if version.is_none() {
            tracing::warn!("the kernel has no Landlock: the VMM can open what its user can");
        }
        let confinement = Confinement {
            cgroup: self.entry()?,
            namespaces: self.namespaces,
            init: false,
            keep,
            landlock,
        };
        self.applied.get_or_init(|| Applied {
            user: rustix::process::geteuid().as_raw(),
            capabilities,
            namespaces: confinement.namespaces,
            landlock: version,
        });
        Ok(confinement)
    }

    /// For a jailer, which makes the rest of it.
    pub(crate) fn around_jailer(&self) -> io::Result<Confinement> {
        let confinement = Confinement {
            cgroup: self.entry()?,
            namespaces: true,
            init: true,
            ..Confinement::default()
        };
        self.applied.get_or_init(|| Applied {
            user: self.uid().unwrap_or_default(),
            capabilities: Some(NO_CAPABILITIES),
            namespaces: confinement.namespaces,
            landlock: None,
        });
        Ok(confinement)
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

/// The capabilities of this process.
fn had() -> io::Result<CapabilitySet> {
    Ok(rustix::thread::capabilities(None)?.permitted)
}

/// A uid and the group that has its name, or why there is none. Where somebody has the group, the uid is somebody's as well,
/// whose lock is not to be seen from here: the next one is taken.
fn own(spec: JailSpec, limits: Limits) -> Result<(UidLock, Result<Cgroup, String>), UidError> {
    let root = match cgroup::find() {
        CgroupFound::Usable { root } => root,
        other @ (CgroupFound::Absent
        | CgroupFound::Lacks { .. }
        | CgroupFound::NoPermission { .. }
        | CgroupFound::Refused { .. }) => {
            return Ok((UidLock::take(spec, |_| true)?, Err(other.to_string())));
        }
    };
    let mut made = Err(String::new());
    let uid = UidLock::take(spec, |uid| {
        match Cgroup::make(&root, &format!("{CGROUP_PREFIX}{uid}"), limits) {
            Err(CgroupError::InUse(_)) => return false,
            Err(err) => made = Err(Chain(&err).to_string()),
            Ok(group) => made = Ok(group),
        }
        true
    })?;
    Ok((uid, made))
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
        let jail = Jail::make(JailSpec::default(), 256, 1).unwrap();
        said_in(&jail, script, allowed).await
    }

    async fn said_in(jail: &Jail, script: &str, allowed: &Allowed) -> String {
        let home = camino_tempfile::tempdir().unwrap();
        let log = BoundedLog::create(&home.path().join("log"), 64 << 10).unwrap();
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
        if landlock::abi().unwrap().is_none_or(|abi| abi < 4) {
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
            execute: programs(),
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
            execute: programs(),
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
    /// The programs that the shell needs.
    fn programs() -> Vec<camino::Utf8PathBuf> {
        ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
            .map(Into::into)
            .into()
    }

    /// Where the home is another user's, a capability is left to read it, and no other; the evidence says that and no more.
    #[tokio::test]
    async fn the_record_says_what_the_vmm_has() {
        if !is_root() {
            println!("skipped: not root");
            return;
        }
        let home = camino_tempfile::tempdir().unwrap();
        let (file, dir) = (home.path().join("dir/file"), home.path().join("dir"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(&file, "of somebody").unwrap();
        let foreign = |path: &Utf8Path| {
            std::os::unix::fs::chown(path, Some(1234), Some(1234)).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            std::fs::set_permissions(path, mode).unwrap();
        };
        for (of_another, set, named) in [
            (false, "0000000000000000", NO_CAPABILITIES),
            (true, "0000000000000004", READ_ALL),
        ] {
            if of_another {
                foreign(&file);
                foreign(&dir);
            }
            let allowed = Allowed {
                read: vec![dir.clone(), "/proc".into()],
                execute: programs(),
                write: vec![],
            };
            let jail = Jail::make(JailSpec::default(), 256, 1).unwrap();
            assert_eq!(jail.record().applied, None);
            let script = format!("grep -E '^(Cap|Uid)' /proc/self/status >&2; cat {file} >&2");
            let said = said_in(&jail, &script, &allowed).await;
            for name in ["CapPrm", "CapEff"] {
                assert!(said.contains(&format!("{name}:\t{set}")), "{said}");
            }
            assert!(
                said.contains("Uid:\t0\t") && said.contains("of somebody"),
                "{said}"
            );
            let record = jail.record();
            assert_eq!(record.uid, None, "it runs as root's: {record:?}");
            let applied = Applied {
                user: 0,
                capabilities: Some(named),
                namespaces: true,
                landlock: landlock::abi().unwrap(),
            };
            assert_eq!(record.applied, Some(applied));
        }
    }

    /// Root in an ordinary container: VMMs are confined as without root, and it is said.
    #[tokio::test]
    async fn root_without_namespaces_is_confined_all_the_same() {
        if !is_root() {
            println!("skipped: not root");
            return;
        }
        // Capabilities are a thread's own.
        let poor = std::thread::spawn(|| {
            let none = rustix::thread::CapabilitySets {
                effective: CapabilitySet::empty(),
                permitted: CapabilitySet::empty(),
                inheritable: CapabilitySet::empty(),
            };
            rustix::thread::set_capabilities(None, none).unwrap();
            Jail::make(JailSpec::default(), 256, 1).unwrap()
        });
        let jail = poor.join().unwrap();
        assert_eq!(jail.uid(), None, "a jailer would fail");
        let notes = jail.record().notes;
        assert!(notes[0].contains("no namespaces can be made"), "{notes:?}");
        let allowed = Allowed {
            read: vec!["/proc".into()],
            execute: programs(),
            write: vec![],
        };
        let script = "grep CapEff /proc/self/status >&2; readlink /proc/self/ns/net >&2";
        let said = said_in(&jail, script, &allowed).await;
        assert!(said.contains("CapEff:\t0000000000000000"), "{said}");
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        assert!(said.contains(&*own.to_string_lossy()), "{said}");
        assert!(!jail.record().applied.unwrap().namespaces);
    }
}
