//! The machine and the state of it that figures were measured in.
use crate::process::workspace;
use serde::Serialize;
use vestibule_api::time::Timestamp;

/// What has to stand beside every figure.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    pub at: Timestamp,
    /// Model of the first processor.
    pub processor: String,
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
    /// Load averages over 1, 5 and 15 minutes, before the bench began (proc_loadavg(5)).
    pub load: String,
    /// Whether `/dev/kvm` can be opened; otherwise QEMU translates the guest's instructions.
    pub kvm_device: bool,
    /// The commit that is checked out, with `+` where files differ from it.
    pub commit: String,
    /// The program that was measured.
    pub program: String,
}

impl Host {
    /// As it is now. What cannot be read is `unknown`: a figure is not refused for that.
    pub fn now() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let meminfo = read("/proc/meminfo");
        Self {
            at: Timestamp::now(),
            processor: value(&cpuinfo, "model name")
                .unwrap_or("unknown")
                .to_owned(),
            cores: std::thread::available_parallelism().map_or(0, Into::into),
            memory_mib: value(&meminfo, "MemTotal")
                .and_then(|text| text.strip_suffix(" kB")?.parse::<u64>().ok())
                .unwrap_or(0)
                >> 10,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg")
                .split(' ')
                .take(3)
                .collect::<Vec<_>>()
                .join(" "),
            kvm_device: std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_ok(),
            commit: commit(),
            program: crate::stage::binary().map_or_else(|_| "unknown".to_owned(), Into::into),
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|_| "unknown".to_owned())
}

/// The value of the first line `key : value`.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

fn commit() -> String {
    let git = |args: &[&str]| -> Option<String> {
        let output = std::process::Command::new("git")
            .current_dir(workspace())
            .args(args)
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let mark = if changed.is_some_and(|text| !text.is_empty()) {
        "+"
    } else {
        ""
    };
    format!("{head}{mark}")
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{}: {} cores of {}, {} MiB, Linux {}, {}",
            self.at,
            self.cores,
            self.processor,
            self.memory_mib,
            self.kernel,
            if self.kvm_device {
                "/dev/kvm"
            } else {
                "no /dev/kvm"
            },
        )?;
        write!(
            f,
            "load average {}; commit {}; {}",
            self.load, self.commit, self.program
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_beside_a_figure_can_be_read() {
        let host = Host::now();
        assert!(host.cores > 0 && host.memory_mib > 0);
        assert_eq!(host.load.split(' ').count(), 3, "{host}");
        assert_eq!(
            value("model name\t: X Y\nmodel name: Z", "model name"),
            Some("X Y")
        );
    }
}
