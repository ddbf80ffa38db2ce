//! Where runners run. On one machine: a process of its own for each VM, which outlives the controller.
//!
//! That a runner lives is a lock: the controller locks `vms/<id>/runner.stderr` and hands the open file to the runner as
//! its standard error. The kernel gives the lock back when the last holder is gone, whoever that was and however it ended,
//! so a controller that comes back knows at once, without process ids.
mod engine;
mod kubernetes;
mod nomad;
mod standby;

pub use engine::EngineError;

use crate::config::Config;
use camino::{Utf8Path, Utf8PathBuf};
use standby::Standby;
use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    process::Stdio,
    sync::Arc,
};
use vestibule_api::{descriptor, ids::MachineId, machine::VmSpec, standby::Preparation};

/// Why no runner was started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("{operation} `{path}`")]
    File {
        operation: &'static str,
        path: Utf8PathBuf,
        #[source]
        err: io::Error,
    },
    #[error("hand the VM's specification over")]
    Spec(#[source] io::Error),
    #[error("start the runner `{program}`")]
    Spawn {
        program: String,
        #[source]
        err: io::Error,
    },
    #[error("have the engine start the runner")]
    Engine(#[source] Box<EngineError>),
}

impl LaunchError {
    /// The operating system's own error, where it is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::File { err, .. } | Self::Spec(err) | Self::Spawn { err, .. } => Some(err),
            Self::Engine(_) => None,
        }
    }
}

/// Starts runners and says which live. The seam for other schedulers; nothing above it knows processes. Its methods may block:
/// they are called off the runtime's threads.
pub trait Scheduler: std::fmt::Debug + Send + Sync {
    /// Starts the runner of `spec`, once: where it lives already, nothing happens.
    ///
    /// # Errors
    /// When it could not be started.
    fn launch(&self, spec: &VmSpec) -> Result<(), LaunchError>;

    /// Whether the runner of this VM, or anything that it left running, lives.
    fn alive(&self, id: MachineId) -> bool;

    /// Ends a runner that does not answer any more. Nothing happens where it does not live.
    fn kill(&self, id: MachineId);

    /// Forgets a runner that is gone, where something still knows it.
    fn forget(&self, _: MachineId) {}

    /// The memory of where runners run; none: it is not known.
    fn memory(&self) -> Option<HostMemory>;
}

/// The scheduler of the configuration. Must be called in a runtime.
///
/// # Errors
/// When the engine that is named there can't be used.
pub(crate) fn of(config: &Config) -> Result<Arc<dyn Scheduler>, EngineError> {
    let home = config.home.clone();
    Ok(match engine::of(&config.scheduler)? {
        None => {
            let preparation = Preparation {
                directory: home.join(STANDBY).into_string(),
                driver: config.vm.driver,
                jail: config.vm.jail,
                cache_dir: Some(config.cache_dir().into_string()),
            };
            Arc::new(Local::new(home, config.runner.clone()).with_standby(preparation))
        }
        Some(engine) => {
            let runtime = tokio::runtime::Handle::current();
            Arc::new(engine::Engined::new(home, engine, runtime))
        }
    })
}

/// How much memory there is for VMs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostMemory {
    /// MiB that programs can still get without swapping (`MemAvailable`, proc_meminfo(5)).
    pub available_mib: u64,
    /// Share of the last ten seconds, in percent, in which some program waited for memory
    /// (`some avg10`, the kernel's Documentation/accounting/psi.rst); none: the kernel does not say.
    pub stalled_percent: Option<f64>,
}

/// Runners as processes of this host.
#[derive(Debug)]
pub(crate) struct Local {
    home: Utf8PathBuf,
    /// Empty: this program, as `run-vm`.
    command: Vec<String>,
    standby: Option<Standby>,
}

impl Local {
    pub(crate) fn new(home: Utf8PathBuf, command: Vec<String>) -> Self {
        Self {
            home,
            command,
            standby: None,
        }
    }

    /// Keeps a runner that stands by, where runners are this program. What one has left that was killed is removed.
    fn with_standby(mut self, preparation: Preparation) -> Self {
        match std::fs::remove_dir_all(&preparation.directory) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = preparation.directory, error = %err, "what a runner left that stood by stays");
            }
            Ok(()) | Err(_) => {}
        }
        self.standby = Some(Standby::new(preparation));
        self
    }

    fn stderr(&self, id: MachineId) -> Utf8PathBuf {
        self.home
            .join("vms")
            .join(id.to_string())
            .join("runner.stderr")
    }

    /// Of this program's own runners one stands by; another program is started for each VM.
    fn spawn(&self, spec: &VmSpec, stderr: File) -> Result<(), LaunchError> {
        let spec = serde_json::to_vec(spec)
            .map_err(io::Error::from)
            .and_then(|spec| descriptor::in_memory(&spec))
            .map_err(LaunchError::Spec)?;
        let (program, process) = match self.command.as_slice() {
            [] => {
                if let Some(standby) = &self.standby {
                    let given = standby.give(&stderr, &spec);
                    standby.refill();
                    if given {
                        return Ok(());
                    }
                }
                (OWN, own_runner())
            }
            [program, args @ ..] => {
                let mut process = tokio::process::Command::new(program);
                process.args(args);
                (program.as_str(), process)
            }
        };
        let spawned = start(process, spec.into(), stderr.into());
        spawned.map_err(|err| LaunchError::Spawn {
            program: program.to_owned(),
            err,
        })
    }
}

/// In the home directory: what runners make that stand by.
const STANDBY: &str = "standby";
/// The running program itself, also where its file was replaced meanwhile.
const OWN: &str = "/proc/self/exe";

fn own_runner() -> tokio::process::Command {
    let mut process = tokio::process::Command::new(OWN);
    process.arg0("vestibule").arg("run-vm");
    process
}

/// Starts a runner that outlives the controller.
fn start(mut process: tokio::process::Command, stdin: Stdio, stderr: Stdio) -> io::Result<()> {
    process
        .env_clear()
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(stderr);
    let kept = [
        "PATH",
        "HOME",
        "TMPDIR",
        "RUST_LOG",
        "VESTIBULE_FIRECRACKER",
        "VESTIBULE_JAILER",
        // Of tests, which have a runner die at a point of its own.
        #[cfg(debug_assertions)]
        "VESTIBULE_CRASH_AT",
    ];
    for name in kept {
        process.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    own_session(&mut process);
    // Dropping the handle leaves the process alone; tokio collects its status when it ends.
    process.spawn().map(drop)
}

impl Scheduler for Local {
    fn launch(&self, spec: &VmSpec) -> Result<(), LaunchError> {
        for dir in [&spec.vm_dir, &spec.evidence_dir] {
            private_dir(Utf8Path::new(dir))?;
        }
        let path = self.stderr(spec.machine_id);
        let failed = |operation| {
            let path = path.clone();
            move |err| LaunchError::File {
                operation,
                path,
                err,
            }
        };
        let stderr = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open"))?;
        match stderr.try_lock() {
            Ok(()) => self.spawn(spec, stderr),
            Err(TryLockError::WouldBlock) => Ok(()),
            Err(TryLockError::Error(err)) => Err(failed("lock")(err)),
        }
    }

    fn alive(&self, id: MachineId) -> bool {
        match File::open(self.stderr(id)).map(|file| file.try_lock()) {
            Ok(Err(TryLockError::WouldBlock)) => true,
            Ok(Ok(()) | Err(TryLockError::Error(_))) | Err(_) => false,
        }
    }

    fn kill(&self, id: MachineId) {
        let path = self.stderr(id);
        for pid in processes() {
            // The handle first, then the look: a process id that is given to another meanwhile can't be hit.
            let Ok(handle) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            else {
                continue;
            };
            let stderr = std::fs::read_link(format!("/proc/{}/fd/2", pid.as_raw_pid()));
            if stderr.is_ok_and(|target| target == path.as_std_path()) {
                tracing::warn!(machine.id = %id, pid = pid.as_raw_pid(), "ending a runner that does not answer");
                let _ = rustix::process::pidfd_send_signal(handle, rustix::process::Signal::KILL);
            }
        }
    }

    fn memory(&self) -> Option<HostMemory> {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        host_memory(&read("/proc/meminfo"), &read("/proc/pressure/memory"))
    }
}

fn host_memory(meminfo: &str, pressure: &str) -> Option<HostMemory> {
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = available.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    let some = pressure.lines().find_map(|line| line.strip_prefix("some "));
    let stalled_percent = some.and_then(|some| {
        let mut fields = some.split(' ');
        fields.find_map(|field| field.strip_prefix("avg10=")?.parse().ok())
    });
    Some(HostMemory {
        available_mib: kib >> 10,
        stalled_percent,
    })
}

fn processes() -> Vec<rustix::process::Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(rustix::process::Pid::from_raw)
        .collect()
}

fn private_dir(path: &Utf8Path) -> Result<(), LaunchError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|err| LaunchError::File {
            operation: "create directory",
            path: path.to_owned(),
            err,
        })
}

/// A session of its own: a signal to the controller's terminal or group is not for the runner.
#[expect(unsafe_code, reason = "setsid(2) has to run in the child")]
fn own_session(process: &mut tokio::process::Command) {
    // SAFETY: setsid is async-signal-safe, and the closure neither allocates nor touches memory of the parent.
    unsafe {
        process.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};
    use vestibule_api::{
        egress::EgressPolicy,
        machine::{DriverChoice, JailSpec, MemoryBackend},
    };

    /// Of a new VM whose directories are in `home`.
    pub(super) fn spec(home: &Utf8Path) -> VmSpec {
        let machine_id = MachineId::generate();
        let dir = |name: &str| home.join(name).join(machine_id.to_string()).into_string();
        VmSpec {
            machine_id,
            session_id: None,
            image_digest: "b".repeat(64).parse().unwrap(),
            image_dir: String::new(),
            driver: DriverChoice::Auto,
            memory_mib: 2048,
            vcpus: 2,
            vm_dir: dir("vms"),
            evidence_dir: dir("evidence"),
            egress: EgressPolicy::default(),
            boot_deadline_s: 1,
            console_keep_bytes: 1,
            idle_deadline_s: None,
            restore: None,
            save_to: None,
            jail: JailSpec::default(),
            cache_dir: None,
            memory_backend: MemoryBackend::default(),
        }
    }

    #[test]
    fn the_hosts_memory_is_what_the_kernel_says() {
        let meminfo = "MemTotal:       24684544 kB\nMemAvailable:   24122368 kB\n";
        let pressure = "some avg10=12.50 avg60=0.15 avg300=0.11 total=199746318\nfull avg10=3.00 avg60=0.12 avg300=0.09 total=4\n";
        let memory = host_memory(meminfo, pressure).unwrap();
        assert_eq!(
            (memory.available_mib, memory.stalled_percent),
            (23557, Some(12.5))
        );
        assert_eq!(host_memory(meminfo, "").unwrap().stalled_percent, None);
        assert_eq!(host_memory("MemTotal: 1 kB\n", pressure), None);
    }

    async fn wait(what: &str, mut ready: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !ready() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_runner_is_started_once_in_a_session_of_its_own_and_can_be_ended() {
        let home = camino_tempfile::tempdir().unwrap();
        let script = "cat > \"$0/spec.json\"; echo run >> \"$0/runs\"; echo $$ $(ps -o sid= $$) > \"$0/sid\"; exec sleep 60";
        let command = ["/bin/sh", "-c", script, home.path().as_str()]
            .map(str::to_owned)
            .to_vec();
        let local = Local::new(home.path().to_owned(), command);
        let mut spec = spec(home.path());
        // Larger than a pipe holds.
        spec.egress.extra_ca_pem = vec!["x".repeat(200_000)];
        assert!(!local.alive(spec.machine_id));
        local.launch(&spec).unwrap();
        assert!(local.alive(spec.machine_id));
        wait("the runner writes its session", || {
            std::fs::read_to_string(home.path().join("sid")).is_ok_and(|sid| sid.ends_with('\n'))
        })
        .await;
        local.launch(&spec).unwrap();
        let again = Local::new(home.path().to_owned(), Vec::new());
        assert!(
            again.alive(spec.machine_id),
            "a controller that comes back sees it"
        );
        assert_eq!(
            std::fs::read_to_string(home.path().join("runs")).unwrap(),
            "run\n",
            "started once"
        );
        let read: VmSpec =
            serde_json::from_slice(&std::fs::read(home.path().join("spec.json")).unwrap()).unwrap();
        assert_eq!(read, spec);
        let ids = std::fs::read_to_string(home.path().join("sid")).unwrap();
        let (pid, sid) = ids.trim().split_once(' ').unwrap();
        assert_eq!(pid, sid, "it leads its session");
        again.kill(spec.machine_id);
        wait("the runner ends", || !local.alive(spec.machine_id)).await;
    }

    #[test]
    fn what_a_killed_runner_left_that_stood_by_is_removed() {
        let home = camino_tempfile::tempdir().unwrap();
        let jail = home.path().join(STANDBY).join("one/jail");
        std::fs::create_dir_all(&jail).unwrap();
        for _ in 0..2 {
            let local = Local::new(home.path().to_owned(), Vec::new());
            local.with_standby(Preparation {
                directory: home.path().join(STANDBY).into_string(),
                driver: DriverChoice::Auto,
                jail: JailSpec::default(),
                cache_dir: None,
            });
            assert!(!jail.exists());
        }
    }

    #[tokio::test]
    async fn a_runner_that_can_not_be_started_is_named() {
        let home = camino_tempfile::tempdir().unwrap();
        let local = Local::new(
            home.path().to_owned(),
            vec!["/nonexistent/runner".to_owned()],
        );
        let err = local.launch(&spec(home.path())).unwrap_err();
        assert!(err.to_string().contains("/nonexistent/runner"), "{err}");
        std::fs::write(home.path().join("evidence2"), "").unwrap();
        let mut spec = spec(home.path());
        spec.evidence_dir = home.path().join("evidence2/x").into_string();
        assert!(matches!(
            local.launch(&spec),
            Err(LaunchError::File {
                operation: "create directory",
                ..
            })
        ));
    }
}
