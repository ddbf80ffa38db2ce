//! The host as the controller's scheduler: it starts [`Runner`]s, and says what a test wants it to say.
use super::runner::Runner;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use vestibule_api::{cause::Cause, ids::MachineId, machine::VmSpec};
use vestibule_controller::{HostMemory, LaunchError, Scheduler};

/// Starts [`Runner`]s. What it started lives as long as the test, whatever happens to the controller.
#[derive(Debug, Default)]
pub(crate) struct Runners {
    all: Mutex<HashMap<MachineId, Arc<Runner>>>,
    /// Why the next launch is refused.
    pub(crate) refuse: Mutex<Option<std::io::ErrorKind>>,
    /// The operating system's error that the next launch comes to.
    pub(crate) refuse_os: Mutex<Option<i32>>,
    pub(crate) launches: Mutex<u32>,
    /// Memory of the host, MiB and percent; none: not known.
    pub(crate) memory: Mutex<Option<(u64, f64)>>,
    /// Restored VMs fail with this cause instead of coming up.
    pub(crate) restores_fail: Mutex<Option<Cause>>,
    /// Restored VMs come up by themselves; else the test leads them.
    pub(crate) restores_wait: AtomicBool,
    /// The host's driver pauses no VM.
    pub(crate) stay_up: AtomicBool,
}

impl Runners {
    pub(crate) fn get(&self, id: MachineId) -> Option<Arc<Runner>> {
        self.all.lock().unwrap().get(&id).cloned()
    }

    pub(crate) fn count_alive(&self) -> usize {
        self.all
            .lock()
            .unwrap()
            .values()
            .filter(|runner| runner.is_alive())
            .count()
    }

    /// Runners that live and were made for the pool.
    pub(crate) fn pool(&self) -> Vec<Arc<Runner>> {
        let all = self.all.lock().unwrap();
        let of_pool = |r: &&Arc<Runner>| r.spec.idle_deadline_s.is_some() && r.is_alive();
        all.values().filter(of_pool).cloned().collect()
    }

    /// A runner that the controller did not start.
    pub(crate) fn start(&self, spec: VmSpec) -> Arc<Runner> {
        let runner = Runner::start(spec);
        self.all
            .lock()
            .unwrap()
            .insert(runner.spec.machine_id, Arc::clone(&runner));
        runner
    }
}

impl Scheduler for Runners {
    fn launch(&self, spec: &VmSpec) -> Result<(), LaunchError> {
        if let Some(kind) = self.refuse.lock().unwrap().take() {
            return Err(LaunchError::Spawn {
                program: "fake".to_owned(),
                err: kind.into(),
            });
        }
        if let Some(code) = self.refuse_os.lock().unwrap().take() {
            return Err(LaunchError::Spawn {
                program: "fake".to_owned(),
                err: std::io::Error::from_raw_os_error(code),
            });
        }
        for dir in [&spec.vm_dir, &spec.evidence_dir] {
            std::fs::create_dir_all(dir).map_err(|err| LaunchError::File {
                operation: "create directory",
                path: dir.into(),
                err,
            })?;
        }
        if !self.alive(spec.machine_id) {
            *self.launches.lock().unwrap() += 1;
            let runner = self.start(spec.clone());
            let stays_up = self.stay_up.load(Ordering::Relaxed);
            runner.stays_up.store(stays_up, Ordering::Relaxed);
            if spec.restore.is_some() {
                match *self.restores_fail.lock().unwrap() {
                    Some(cause) => runner.refuse(cause),
                    None if self.restores_wait.load(Ordering::Relaxed) => {}
                    None => runner.up(),
                }
            }
        }
        Ok(())
    }

    fn memory(&self) -> Option<HostMemory> {
        let (available_mib, stalled) = (*self.memory.lock().unwrap())?;
        Some(HostMemory {
            available_mib,
            stalled_percent: Some(stalled),
        })
    }

    fn alive(&self, id: MachineId) -> bool {
        self.get(id).is_some_and(|runner| runner.is_alive())
    }

    fn kill(&self, id: MachineId) {
        if let Some(runner) = self.get(id) {
            runner.die();
        }
    }
}
