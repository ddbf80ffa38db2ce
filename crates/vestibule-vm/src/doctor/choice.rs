//! Which driver `auto` is on this host, and why.
use super::{find_program, program_version};
use crate::{
    driver::ProbeError,
    firecracker::{FirecrackerDriver, Installed},
    jail,
    kvm::{self, KvmVerdict},
    qemu,
};
use camino::{Utf8Path, Utf8PathBuf};
use vestibule_api::{error::Chain, machine::DriverChoice};

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// `Auto` where none can run.
    pub choice: DriverChoice,
    /// With accelerator: `firecracker`, `qemu/kvm`, `qemu/tcg`; none: no VM can run.
    pub driver: Option<String>,
    pub because: String,
}

/// `auto` as what it is on this host; another choice as it is. Blocks for some milliseconds.
pub fn resolve(choice: DriverChoice) -> DriverChoice {
    match choice {
        DriverChoice::Auto => choose(&kvm::probe()).choice,
        DriverChoice::Qemu | DriverChoice::Firecracker => choice,
    }
}

/// Firecracker where it can be used, else QEMU. Blocks for as long as programs take to say their versions.
pub fn choose(kvm: &KvmVerdict) -> Chosen {
    let firecracker = FirecrackerDriver::find().and_then(|driver| usable(&driver));
    let firecracker = match &firecracker {
        Ok((installed, program)) => Ok((installed, program.as_path())),
        Err(err) => Err(err),
    };
    let qemu = find_program(qemu::PROGRAM).and_then(|program| program_version(&program));
    decide(kvm, firecracker, qemu.as_deref().ok())
}

/// What is installed, with a jailer that fits where one will be used: root's VMs are jailed.
fn usable(driver: &FirecrackerDriver) -> Result<(Installed, Utf8PathBuf), ProbeError> {
    let installed = driver.installed()?;
    if jail::is_root() {
        driver.check_jailer(installed.version)?;
    }
    Ok((installed, driver.program().to_owned()))
}

fn decide(
    kvm: &KvmVerdict,
    firecracker: Result<(&Installed, &Utf8Path), &ProbeError>,
    qemu: Option<&str>,
) -> Chosen {
    let why_not = match firecracker {
        Ok((installed, program)) if !kvm.usable() => {
            format!("Firecracker {} ({program}) needs KVM", installed.version)
        }
        Ok((installed, program)) if installed.version.features().pause_keeps_stream => {
            return Chosen {
                choice: DriverChoice::Firecracker,
                driver: Some(crate::firecracker::NAME.to_owned()),
                because: format!(
                    "Firecracker {} ({program}) is installed, and {kvm}",
                    installed.version
                ),
            };
        }
        Ok((installed, _)) => format!(
            "Firecracker {} loses the stream of a VM that was paused, so that no pool can be kept; use 1.15, or 1.17 and newer",
            installed.version
        ),
        Err(ProbeError::Missing { .. }) => String::from("Firecracker is not installed"),
        Err(err) => Chain(err).to_string(),
    };
    match qemu {
        Some(_) => Chosen {
            choice: DriverChoice::Qemu,
            driver: Some(String::from(if kvm.usable() {
                "qemu/kvm"
            } else {
                "qemu/tcg"
            })),
            because: format!("{kvm}; {why_not}"),
        },
        None => Chosen {
            choice: DriverChoice::Auto,
            driver: None,
            because: format!(
                "no `{}` that runs was found; {why_not}; {kvm}",
                qemu::PROGRAM
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn installed(version: &str) -> Installed {
        Installed {
            version: version.parse().unwrap(),
            snapshot_version: String::from("v6.0.0"),
        }
    }

    #[test]
    fn firecracker_is_taken_where_it_can_be_used() {
        let (works, absent) = (KvmVerdict::Usable { micros: 900 }, KvmVerdict::Absent);
        let (good, bad) = (installed("1.12.1"), installed("1.16.1"));
        let at = Utf8Path::new("/opt/firecracker");
        let missing = ProbeError::Missing {
            program: String::from("firecracker"),
            searched: String::from("/bin"),
        };
        let jailer = ProbeError::OtherJailer {
            program: "/opt/jailer".into(),
            found: String::from("1.12.1"),
            expected: String::from("1.15.0"),
        };
        let cases = [
            (
                &works,
                Err(&jailer),
                Some("7.2"),
                Some("qemu/kvm"),
                "jail with `/opt/jailer`: it is version 1.12.1, and Firecracker 1.15.0",
            ),
            (
                &works,
                Ok(&good),
                Some("7.2"),
                Some("firecracker"),
                "1.12.1 (/opt/firecracker)",
            ),
            (
                &absent,
                Ok(&good),
                Some("7.2"),
                Some("qemu/tcg"),
                "needs KVM",
            ),
            (
                &works,
                Ok(&bad),
                Some("7.2"),
                Some("qemu/kvm"),
                "1.16.1 loses the stream",
            ),
            (
                &works,
                Err(&missing),
                Some("7.2"),
                Some("qemu/kvm"),
                "is not installed",
            ),
            (
                &works,
                Ok(&good),
                None,
                Some("firecracker"),
                "KVM runs guests",
            ),
            (
                &absent,
                Err(&missing),
                None,
                None,
                "no `qemu-system-x86_64`",
            ),
        ];
        for (kvm, firecracker, qemu, driver, words) in cases {
            let chosen = decide(kvm, firecracker.map(|one| (one, at)), qemu);
            assert_eq!(chosen.driver.as_deref(), driver, "{chosen:?}");
            assert!(chosen.because.contains(words), "{words}: {chosen:?}");
            let choice = driver.and_then(DriverChoice::of).unwrap_or_default();
            assert_eq!(chosen.choice, choice);
        }
    }

    /// What is upgraded alone, as `auto` finds it: a program that says a version, and a jailer that says another.
    #[test]
    fn a_jailer_of_another_release_is_not_taken() {
        use std::os::unix::fs::PermissionsExt as _;
        let home = camino_tempfile::tempdir().unwrap();
        let program = |name: &str, version: &str| {
            let path = home.path().join(name);
            let said = format!("#!/bin/sh\necho {name} v{version}\n");
            std::fs::write(&path, said).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let firecracker = program("firecracker", "1.15.0");
        program("jailer", "1.12.1");
        let driver = FirecrackerDriver::at(firecracker.clone()).unwrap();
        let err = usable(&driver).map(drop);
        if jail::is_root() {
            assert!(
                matches!(err, Err(ProbeError::OtherJailer { .. })),
                "{err:?}"
            );
        }
        program("jailer", "1.15.0");
        assert_eq!(usable(&driver).unwrap().1, firecracker);
    }
}
