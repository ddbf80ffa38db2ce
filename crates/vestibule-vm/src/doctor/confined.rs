//! What keeps VMs apart on this host, as far as it can be seen without starting one.
use crate::{
    firecracker::{FirecrackerDriver, version::Version},
    jail::{self, cgroup::CgroupFound},
};
use std::fmt;
use vestibule_api::{error::Chain, machine::DriverChoice};

/// See the module.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Confined {
    /// Whether VMs could have users and namespaces of their own, which only root gives.
    pub root: bool,
    /// Why there are no namespaces for root's VMs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_namespaces: Option<String>,
    pub cgroup: CgroupFound,
    /// Version of the kernel's Landlock.
    pub landlock: Option<u32>,
    /// Why it can't be had though the kernel may have it: no VM without a jailer starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub landlock_refused: Option<String>,
    /// Firecracker is here, and no jailer of its release.
    #[serde(skip)]
    jailer: Option<Weakness>,
}

/// What VMs are kept apart less by than they could be, in words, and what to do.
type Weakness = (String, String);

impl Confined {
    /// Makes namespaces and a group, and removes both.
    pub(super) fn look() -> Self {
        let firecracker = FirecrackerDriver::find();
        let jailer = firecracker.ok().and_then(|driver| {
            let installed = driver.installed().ok()?;
            why_no_jailer(&driver, installed.version)
        });
        let root = jail::is_root();
        let namespaces = root.then(jail::enter::try_namespaces).transpose();
        let landlock = jail::landlock::abi();
        Self {
            root,
            no_namespaces: namespaces.err().map(|err| err.to_string()),
            cgroup: if root {
                jail::cgroup::probe()
            } else {
                jail::cgroup::find()
            },
            landlock_refused: landlock.as_ref().err().map(ToString::to_string),
            landlock: landlock.ok().flatten(),
            jailer,
        }
    }

    /// What of a jail VMs of this driver lack, worst first.
    fn weaknesses(&self, driver: DriverChoice) -> Vec<Weakness> {
        let mut all = Vec::new();
        if let Some(why) = &self.landlock_refused {
            all.push((
                format!("VMs without a jailer cannot be started: {why}"),
                String::from(
                    "allow landlock_create_ruleset, landlock_add_rule and landlock_restrict_self in the unit's `SystemCallFilter=` or the container's seccomp profile",
                ),
            ));
        }
        match (self.root, &self.no_namespaces) {
            (false, _) => all.push((
                format!(
                    "VMs are not jailed: without root all VMMs run as this user, held by no more than {}",
                    self.held()
                ),
                String::from("run the controller as root for a user, namespaces and a cgroup for each"),
            )),
            (true, Some(why)) => all.push((
                format!(
                    "VMs are not jailed: root has no namespaces for them here ({why}), and all VMMs run as this user, held by no more than {}",
                    self.held()
                ),
                String::from(
                    "give the container CAP_SYS_ADMIN and let it mount (`--privileged`), or use packaging/vestibule-jailed.conf for the unit",
                ),
            )),
            (true, None) => {
                all.extend(match driver {
                    DriverChoice::Qemu => Some(self.no_jailer_of_qemu()),
                    DriverChoice::Auto | DriverChoice::Firecracker => self.jailer.clone(),
                });
                all.extend(self.no_limits());
            }
        }
        all
    }

    /// Why VMs have no limits, which root could give them.
    fn no_limits(&self) -> Option<Weakness> {
        let fix = match &self.cgroup {
            CgroupFound::Usable { .. } => return None,
            CgroupFound::NoPermission { .. } => "make the cgroup file system writable",
            CgroupFound::Absent | CgroupFound::Lacks { .. } => {
                "start the host with cgroup v2 alone (`systemd.unified_cgroup_hierarchy=1`), so that VMs get limits of memory, processes and CPU"
            }
            CgroupFound::Refused { .. } => {
                "in a container use the host's cgroup namespace (`--cgroupns=host`) with /sys/fs/cgroup writable: in one of its own, a group that holds processes gives no limits to others"
            }
        };
        let why = format!(
            "VMs have no limits of memory, processes and CPU: cgroup {}",
            self.cgroup
        );
        Some((why, fix.to_owned()))
    }

    /// What holds a VMM that has no user of its own: Landlock as far as this kernel has it.
    fn held(&self) -> String {
        let Some(version) = self.landlock else {
            return String::from("seccomp, without Landlock");
        };
        let lacks = jail::landlock::lacks(version);
        if lacks.is_empty() {
            return String::from("seccomp and Landlock");
        }
        format!(
            "seccomp and Landlock {version}, which does not keep them from {}",
            lacks.join(", ")
        )
    }

    /// Root's namespaces are what there is for it.
    fn no_jailer_of_qemu(&self) -> Weakness {
        let why = format!(
            "QEMU has no jailer: all VMMs run as root, without its capabilities and in namespaces of their own, held by {}",
            self.held()
        );
        let fix = "use Firecracker with its jailer, where KVM works, for a user and a root of each VM's own";
        (why, fix.to_owned())
    }

    /// Why a VMM is not jailed, and what to do.
    fn not_jailed(&self, driver: DriverChoice) -> Option<Weakness> {
        let (why, fixes): (Vec<_>, Vec<_>) = self.weaknesses(driver).into_iter().unzip();
        (!why.is_empty()).then(|| (why.join("; "), fixes.join("; ")))
    }

    /// What to do for VMs that are kept apart better, where they run under this driver.
    pub(super) fn advice(&self, driver: DriverChoice) -> Vec<String> {
        let mut all = self.weaknesses(driver);
        if driver == DriverChoice::Qemu {
            // It may be why there is no Firecracker to choose.
            all.extend(self.jailer.clone());
        }
        let warning = |(why, fix): Weakness| format!("WARNING: {why}; {fix}");
        let mut advice: Vec<_> = all.into_iter().map(warning).collect();
        if self.landlock.is_none() && self.landlock_refused.is_none() {
            advice.push(String::from(
                "the kernel has no Landlock, so that a VMM without a jailer can open what its user can; use Linux 5.13 or newer with `landlock` in its `lsm=`",
            ));
        }
        advice
    }
}

/// Why VMs of this driver are not jailed on this host, and what to do; none: they are. Blocks for as long as Firecracker takes to say
/// its version.
pub fn not_jailed(driver: DriverChoice) -> Option<(String, String)> {
    Confined::look().not_jailed(driver)
}

fn why_no_jailer(driver: &FirecrackerDriver, version: Version) -> Option<Weakness> {
    match (driver.jailer(), driver.check_jailer(version)) {
        (None, _) => Some((
            String::from("Firecracker runs without its jailer"),
            format!(
                "install `jailer` {version}, of the same release, beside `{}`",
                driver.program()
            ),
        )),
        (Some(_), Err(err)) => Some((
            format!("Firecracker's VMs cannot be started: {}", Chain(&err)),
            format!("install `jailer` {version}, of Firecracker's own release"),
        )),
        (Some(_), Ok(())) => None,
    }
}

impl fmt::Display for Confined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = match (self.root, &self.no_namespaces) {
            (true, None) => {
                "root: a VM has namespaces of processes, network and mounts of its own, and with Firecracker's jailer a uid"
            }
            (true, Some(_)) => {
                "root without namespaces: all VMMs run as this user, without capabilities"
            }
            (false, _) => "not root: all VMMs run as this user, in its namespaces",
        };
        writeln!(f, "user          {user}")?;
        if let Some(why) = &self.no_namespaces {
            writeln!(f, "namespaces    none: {why}")?;
        }
        writeln!(f, "cgroup        {}", self.cgroup)?;
        match (self.landlock, &self.landlock_refused) {
            (Some(version), _) => {
                write!(f, "landlock      version {version}")?;
                match jail::landlock::lacks(version)[..] {
                    [] => Ok(()),
                    ref lacks => write!(f, ", not yet of {}", lacks.join(", ")),
                }
            }
            (None, Some(why)) => write!(f, "landlock      {why}"),
            (None, None) => f.write_str("landlock      none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn confined() -> Confined {
        Confined {
            root: true,
            no_namespaces: None,
            cgroup: CgroupFound::Usable {
                root: "/sys/fs/cgroup".into(),
            },
            landlock: Some(6),
            landlock_refused: None,
            jailer: None,
        }
    }

    fn warnings(confined: &Confined) -> usize {
        let advice = confined.advice(DriverChoice::Firecracker);
        let warned = advice.iter().filter(|line| line.starts_with("WARNING: "));
        warned.count()
    }

    #[test]
    fn it_is_told_to_programs_as_well() {
        let said = serde_json::to_value(confined()).unwrap();
        assert_eq!(said["root"], true, "{said}");
        assert_eq!(said["cgroup"]["root"], "/sys/fs/cgroup", "{said}");
        assert_eq!(said["cgroup"]["state"], "usable", "{said}");
    }

    #[test]
    fn whoever_is_jailed_is_not_warned() {
        let jailed = confined();
        assert_eq!(jailed.not_jailed(DriverChoice::Firecracker), None);
        assert_eq!(warnings(&jailed), 0);
    }

    #[test]
    fn whoever_is_not_jailed_is_warned() {
        let eperm = || Some(String::from("Operation not permitted"));
        let cases: [(&str, Confined, &str, &str); 8] = [
            (
                "not root",
                Confined {
                    root: false,
                    ..confined()
                },
                "not jailed: without root",
                "as root",
            ),
            (
                "not root, Debian 12",
                Confined {
                    root: false,
                    landlock: Some(2),
                    ..confined()
                },
                "Landlock 2, which does not keep them from cutting files short (Linux 6.2), TCP (Linux 6.7)",
                "as root",
            ),
            (
                "not root, no Landlock",
                Confined {
                    root: false,
                    landlock: None,
                    ..confined()
                },
                "no more than seccomp, without Landlock",
                "as root",
            ),
            (
                "a container's root",
                Confined {
                    no_namespaces: eperm(),
                    ..confined()
                },
                "root has no namespaces for them here (Operation not permitted)",
                "CAP_SYS_ADMIN",
            ),
            (
                "cgroup v1",
                Confined {
                    cgroup: CgroupFound::Absent,
                    ..confined()
                },
                "no limits of memory, processes and CPU",
                "unified_cgroup_hierarchy",
            ),
            (
                "a cgroup namespace",
                Confined {
                    cgroup: CgroupFound::Refused {
                        root: "/sys/fs/cgroup".into(),
                        why: String::from("Device or resource busy"),
                    },
                    ..confined()
                },
                "resource busy",
                "--cgroupns=host",
            ),
            (
                "an old systemd's filter",
                Confined {
                    landlock: None,
                    landlock_refused: eperm(),
                    ..confined()
                },
                "cannot be started: Operation not permitted",
                "SystemCallFilter=",
            ),
            (
                "no jailer",
                Confined {
                    jailer: Some((
                        "Firecracker runs without its jailer".into(),
                        "install it".into(),
                    )),
                    ..confined()
                },
                "without its jailer",
                "install it",
            ),
        ];
        for (name, confined, words, what) in cases {
            let (why, fix) = confined.not_jailed(DriverChoice::Firecracker).unwrap();
            assert!(
                why.contains(words) && fix.contains(what),
                "{name}: {why}; {fix}"
            );
            assert_eq!(warnings(&confined), 1, "{name}");
        }
    }

    /// Root's uid is what it runs as, whatever else it has.
    #[test]
    fn qemu_is_never_called_jailed() {
        let qemu = |confined: Confined| confined.not_jailed(DriverChoice::Qemu).unwrap();
        let (why, fix) = qemu(confined());
        assert!(
            why.contains("run as root") && fix.contains("Firecracker"),
            "{why}; {fix}"
        );
        let mut both = confined();
        both.cgroup = CgroupFound::Absent;
        let (why, _) = qemu(both);
        assert!(
            why.contains("run as root") && why.contains("no limits"),
            "{why}"
        );
    }

    /// Another release's jailer keeps Firecracker from being chosen, and `doctor` says what to do about it.
    #[test]
    fn a_jailer_that_is_not_used_is_spoken_of_all_the_same() {
        let mut other = confined();
        other.jailer = Some(("another version".into(), "install `jailer`".into()));
        let advice = other.advice(DriverChoice::Qemu);
        assert!(
            advice.iter().any(|line| line.ends_with("install `jailer`")),
            "{advice:?}"
        );
        let (why, _) = other.not_jailed(DriverChoice::Qemu).unwrap();
        assert!(!why.contains("another version"), "{why}");
    }
}
