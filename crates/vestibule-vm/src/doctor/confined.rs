//! What keeps VMs apart on this host, as far as it can be seen without starting one.
use crate::{
    firecracker::{FirecrackerDriver, version::Version},
    jail::{self, cgroup::CgroupFound},
};
use std::fmt;
use vestibule_api::machine::DriverChoice;

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
    jailer: Option<(String, String)>,
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

    /// Why a VMM is not jailed, and what to do.
    fn not_jailed(&self) -> Option<(String, String)> {
        if self.root {
            return self.jailer.clone();
        }
        Some((
            String::from(
                "VMs are not jailed: without root all VMMs run as this user, with seccomp and Landlock alone",
            ),
            String::from("run the controller as root for a user, namespaces and a cgroup for each"),
        ))
    }

    /// What to do for VMs that are kept apart better.
    pub(super) fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        if let Some((why, fix)) = self.not_jailed() {
            advice.push(format!("WARNING: {why}; {fix}"));
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

/// Why VMs of this driver are not jailed on this host, and what to do; none: they are. Blocks for as long as Firecracker takes to say
/// its version.
pub fn not_jailed(driver: DriverChoice) -> Option<(String, String)> {
    let mut confined = Confined::look();
    if driver == DriverChoice::Qemu {
        // It has no jailer; root's namespaces are what there is for it.
        confined.jailer = None;
    }
    confined.not_jailed()
}

fn why_no_jailer(driver: &FirecrackerDriver, version: Version) -> Option<(String, String)> {
    match (driver.jailer(), driver.check_jailer(version)) {
        (None, _) => Some((
            String::from("Firecracker runs without its jailer"),
            format!(
                "install `jailer` {version}, of the same release, beside `{}`",
                driver.program()
            ),
        )),
        (Some(_), Err(err)) => Some((
            format!("VMs cannot be started: {err}"),
            format!("install `jailer` {version}, of Firecracker's own release"),
        )),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_not_jailed_is_warned() {
        let mut confined = Confined {
            root: false,
            cgroup: CgroupFound::Absent,
            landlock: Some(6),
            jailer: None,
        };
        let warned = |confined: &Confined| {
            let advice = confined.advice();
            advice
                .iter()
                .filter(|line| line.starts_with("WARNING: "))
                .count()
        };
        let (why, fix) = confined.not_jailed().unwrap();
        assert!(
            why.contains("not jailed") && fix.contains("root"),
            "{why}; {fix}"
        );
        assert_eq!(warned(&confined), 1);
        confined.root = true;
        assert_eq!((confined.not_jailed(), warned(&confined)), (None, 0));
        confined.jailer = Some((
            "Firecracker runs without its jailer".into(),
            "install it".into(),
        ));
        assert_eq!(confined.not_jailed(), confined.jailer);
        assert_eq!(warned(&confined), 1);
    }
}
