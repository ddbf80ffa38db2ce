//! What keeps VMs apart on this host, as far as it can be seen without starting one.
use crate::{
    firecracker::{FirecrackerDriver, version::Version},
    jail::{self, cgroup::CgroupFound},
};
use std::fmt;

/// See the module.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Confined {
    /// Whether VMs have users and namespaces of their own, which only root gives.
    pub root: bool,
    #[serde(flatten)]
    pub cgroup: CgroupFound,
    /// Version of the kernel's Landlock.
    pub landlock: Option<u32>,
    /// Firecracker is here, and no jailer of its release.
    #[serde(skip)]
    jailer: Option<String>,
}

impl Confined {
    pub(super) fn look() -> Self {
        let firecracker = FirecrackerDriver::find();
        let jailer = firecracker.ok().and_then(|driver| {
            let installed = driver.installed().ok()?;
            why_no_jailer(&driver, installed.version)
        });
        Self {
            root: jail::is_root(),
            cgroup: jail::cgroup::find(),
            landlock: jail::landlock::abi(),
            jailer,
        }
    }

    /// What to do for VMs that are kept apart better.
    pub(super) fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        if self.root {
            advice.extend(self.jailer.clone());
        } else {
            advice.push(String::from(
                "WARNING: VMs are not jailed: without root all VMMs run as this user, with seccomp and Landlock alone; run the controller as root for a user, namespaces and a cgroup for each",
            ));
        }
        if self.landlock.is_none() {
            advice.push(String::from(
                "the kernel has no Landlock, so that a VMM without a jailer can open what its user can; use Linux 5.13 or newer with `landlock` in its `lsm=`",
            ));
        }
        let cgroup = match &self.cgroup {
            CgroupFound::Usable { .. } => None,
            CgroupFound::NoPermission { .. } => {
                (self.root).then_some("make the cgroup file system writable")
            }
            CgroupFound::Absent | CgroupFound::Lacks { .. } => Some(
                "start the host with cgroup v2 alone (`systemd.unified_cgroup_hierarchy=1`), so that VMs get limits of memory, processes and CPU",
            ),
        };
        advice.extend(cgroup.map(str::to_owned));
        advice
    }
}

fn why_no_jailer(driver: &FirecrackerDriver, version: Version) -> Option<String> {
    match (driver.jailer(), driver.check_jailer(version)) {
        (None, _) => Some(format!(
            "WARNING: Firecracker runs without its jailer: install `jailer` {version}, of the same release, beside `{}`",
            driver.program()
        )),
        (Some(_), Err(err)) => Some(format!("WARNING: {err}: VMs cannot be started")),
        (Some(_), Ok(())) => None,
    }
}

impl fmt::Display for Confined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = if self.root {
            "root: a VM has a uid, and namespaces of processes, network and mounts, of its own"
        } else {
            "not root: all VMMs run as this user, in its namespaces"
        };
        writeln!(f, "user          {user}")?;
        writeln!(f, "cgroup        {}", self.cgroup)?;
        match self.landlock {
            Some(version) => write!(f, "landlock      version {version}"),
            None => f.write_str("landlock      none"),
        }
    }
}
