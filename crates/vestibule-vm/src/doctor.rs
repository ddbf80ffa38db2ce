//! What this host can run: VMM, acceleration, memory, and the programs that building an image needs.
//!
//! The report says what was observed; a program counts as found when it ran and named its version.
mod choice;
mod confined;

use crate::{
    driver::ProbeError,
    firecracker::{self, FirecrackerDriver},
    kvm::{self, KvmVerdict},
    qemu,
};
use camino::{Utf8Path, Utf8PathBuf};
pub use choice::{Chosen, choose, resolve};
pub use confined::{Confined, not_jailed};
use std::{fmt, path::Path, process::Stdio};

/// A VM with a browser needs so much, and the host something besides.
const MEMORY_WANTED_MIB: u64 = 2048;
/// Where programs are looked for besides `PATH`: `mke2fs` is not in an ordinary user's.
const ALSO: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/bin"];

/// What `vestibule doctor` prints.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The driver that a VM gets with `driver = "auto"`, and why; none: no VM can run.
    pub driver: Option<String>,
    pub because: String,
    pub kvm: KvmVerdict,
    pub programs: Vec<ProgramFound>,
    /// What keeps VMs apart.
    pub confined: Confined,
    pub memory_available_mib: Option<u64>,
    /// Free room where Vestibule keeps its files, in MiB.
    pub disk_free_mib: Option<u64>,
    /// What to do, most important first.
    pub advice: Vec<String>,
}

/// One program that Vestibule starts.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgramFound {
    pub name: &'static str,
    /// What it is for: `vm` or `image build`.
    pub needed_for: &'static str,
    pub path: Option<Utf8PathBuf>,
    pub version: Option<String>,
    /// Debian's package; none: there is none.
    pub package: Option<&'static str>,
}

impl Report {
    /// Whether a VM can run here.
    pub fn usable(&self) -> bool {
        self.driver.is_some()
    }
}

/// Looks at this host. Blocks for as long as the programs take to print their versions.
pub fn doctor(home: impl AsRef<Path>) -> Report {
    let kvm = kvm::probe();
    let programs: Vec<_> = [
        (qemu::PROGRAM, "vm", Some("qemu-system-x86")),
        (firecracker::PROGRAM, "vm, where KVM works", None),
        (firecracker::JAILER, "vm, where KVM works", None),
        ("mmdebstrap", "image build", Some("mmdebstrap")),
        ("mke2fs", "image build", Some("e2fsprogs")),
    ]
    .map(|(name, needed_for, package)| look(name, needed_for, package))
    .into();
    let Chosen {
        choice,
        driver,
        because,
    } = choose(&kvm);
    let memory_available_mib = memory_available_mib();
    let confined = Confined::look();
    let mut advice = advice(&programs, &kvm, memory_available_mib);
    advice.extend(confined.advice(choice));
    Report {
        confined,
        driver,
        because,
        kvm,
        programs,
        memory_available_mib,
        disk_free_mib: disk_free_mib(home.as_ref()),
        advice,
    }
}

fn advice(programs: &[ProgramFound], kvm: &KvmVerdict, memory: Option<u64>) -> Vec<String> {
    let mut advice: Vec<_> = programs
        .iter()
        .filter(|p| p.version.is_none())
        .filter_map(|p| match (&p.path, p.package) {
            (None, Some(package)) => Some(format!("install `{}`: apt-get install {package}", p.name)),
            (Some(path), Some(package)) => Some(format!(
                "`{path}` does not run; reinstall it: apt-get install --reinstall {package}"
            )),
            (Some(path), None) => Some(format!("`{path}` does not run; install it again")),
            // Without KVM it would be of no use.
            (None, None) if p.name == firecracker::PROGRAM && kvm.usable() => Some(String::from(
                "install Firecracker 1.15, or 1.17 and newer: `firecracker` and `jailer` of one official release into /usr/local/bin; VMs then begin faster, in a jail",
            )),
            (None, None) => None,
        })
        .collect();
    if let Some(mib) = memory.filter(|mib| *mib < MEMORY_WANTED_MIB) {
        advice.push(format!(
            "free some memory: {mib} MiB are available, a browser VM wants {MEMORY_WANTED_MIB} MiB"
        ));
    }
    advice.extend(kvm.fix().map(str::to_owned));
    advice
}

fn look(
    name: &'static str,
    needed_for: &'static str,
    package: Option<&'static str>,
) -> ProgramFound {
    let driver = || FirecrackerDriver::find().ok();
    let path = match name {
        firecracker::PROGRAM => driver().map(|driver| driver.program().to_owned()),
        firecracker::JAILER => driver()
            .and_then(|driver| driver.jailer().map(Utf8Path::to_owned))
            .or_else(|| find_program(name).ok()),
        _ => find_program(name).ok(),
    };
    let version = path.as_ref().and_then(|path| program_version(path).ok());
    ProgramFound {
        name,
        needed_for,
        path,
        version,
        package,
    }
}

/// Finds an executable by name in `PATH` and where system programs are.
///
/// # Errors
/// [`ProbeError::Missing`] with the directories that were searched.
pub fn find_program(name: &str) -> Result<Utf8PathBuf, ProbeError> {
    let path = std::env::var("PATH").unwrap_or_default();
    let directories: Vec<&str> = path
        .split(':')
        .filter(|d| !d.is_empty())
        .chain(ALSO)
        .collect();
    directories
        .iter()
        .map(|directory| Utf8Path::new(directory).join(name))
        .find(|path| {
            path.is_file()
                && rustix::fs::access(path.as_std_path(), rustix::fs::Access::EXEC_OK).is_ok()
        })
        .ok_or_else(|| ProbeError::Missing {
            program: name.to_owned(),
            searched: directories.join(":"),
        })
}

/// Runs `program --version` (`-V` for e2fsprogs) and takes the first word that looks like a version.
///
/// # Errors
/// When it does not run, or says nothing that looks like a version.
pub fn program_version(program: &Utf8Path) -> Result<String, ProbeError> {
    let flag = if program.file_name() == Some("mke2fs") {
        "-V"
    } else {
        "--version"
    };
    let said = ask(program, flag)?;
    said.split_whitespace()
        .map(|word| word.trim_start_matches('v').trim_end_matches([',', ')']))
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))
        .map(str::to_owned)
        .ok_or_else(|| ProbeError::NoVersion {
            program: program.to_owned(),
            said: crate::log::printable(said.lines().next().unwrap_or_default()),
        })
}

/// What `program` says to `flag`, on both of its outputs.
///
/// # Errors
/// When it does not run.
pub(crate) fn ask(program: &Utf8Path, flag: &str) -> Result<String, ProbeError> {
    let output = std::process::Command::new(program)
        .arg(flag)
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .stdin(Stdio::null())
        .output()
        .map_err(|err| ProbeError::Version {
            program: program.to_owned(),
            err,
        })?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// `MemAvailable` of proc(5).
fn memory_available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

/// Of the file system that `home` is on, or will be.
fn disk_free_mib(home: &Path) -> Option<u64> {
    let existing = home.ancestors().find(|path| path.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some((stat.f_bavail * stat.f_frsize) >> 20)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Some(driver) => writeln!(f, "driver        {driver}")?,
            None => writeln!(f, "driver        none: no VM can run here")?,
        }
        writeln!(f, "because       {}", self.because)?;
        for program in &self.programs {
            let found = match (&program.path, &program.version) {
                (Some(path), Some(version)) => format!("{version}  {path}"),
                (Some(path), None) => format!("does not run  {path}"),
                (None, _) => format!("not found (needed for: {})", program.needed_for),
            };
            writeln!(f, "{:<13} {found}", short(program.name))?;
        }
        let amount = |mib: Option<u64>| {
            mib.map_or_else(|| String::from("unknown"), |mib| format!("{mib} MiB"))
        };
        writeln!(f, "{}", self.confined)?;
        writeln!(f, "memory free   {}", amount(self.memory_available_mib))?;
        write!(f, "disk free     {}", amount(self.disk_free_mib))?;
        for advice in &self.advice {
            write!(f, "\n→ {advice}")?;
        }
        Ok(())
    }
}

fn short(name: &str) -> &str {
    name.strip_suffix("-system-x86_64").unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_said_with_where_it_was_looked_for() {
        let err = find_program("vestibule-no-such-program").unwrap_err();
        assert!(err.to_string().contains("/usr/sbin"), "{err}");
    }

    #[test]
    fn the_report_names_what_it_saw() {
        let report = doctor("/tmp/vestibule-no-such-home/deeper");
        println!("{report}");
        assert_eq!(report.usable(), report.driver.is_some());
        assert!(report.disk_free_mib.is_some());
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["programs"].as_array().unwrap().len() == 5, "{json}");
    }
}
