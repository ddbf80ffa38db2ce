//! Disposal receipts where no runner came to write a whole one: what there was of the VM, and whether it is gone.
//!
//! The first is written before anything is removed, and says that all of it is there. A controller that is killed meanwhile is
//! followed by one that reads it and looks again.
use super::evidence::{create, is_it, read_mark};
use crate::file::{FileError, failed};
use camino::{Utf8Path, Utf8PathBuf};
use std::{io::Write as _, time::Duration};
use vestibule_api::{
    ids::MachineId,
    machine::{
        CGROUP_MARK, CgroupMark, Disposal, DisposedItem, Disposer, PROCESSES_MARK, ProcessMark,
        ProcessesMark,
    },
    time::Timestamp,
};

const FILE: &str = "disposal.json";
/// A process that the kernel is ending is gone after so many looks, so far apart.
const TRIES: u32 = 100;
const AGAIN: Duration = Duration::from_millis(20);
/// Sockets that are named. A VM has a handful; what its VMM made besides goes with the directory.
const SOCKETS: usize = 64;

/// A receipt that is being made.
#[derive(Debug)]
pub(super) struct Receipt {
    path: Utf8PathBuf,
    disposal: Disposal,
    marks: Marks,
}

/// What a runner left to tell by what was its VM's.
#[derive(Debug)]
struct Marks {
    cgroup: Option<CgroupMark>,
    processes: Option<ProcessesMark>,
    /// The numbers of processes mean something here.
    here: bool,
}

/// Of proc_pid_stat(5).
struct Process {
    number: u32,
    state: char,
    group: u32,
    started: u64,
}

impl Receipt {
    /// Of a VM whose runner does not live any more. None where a whole receipt is there and nothing else, or nothing at all.
    pub(super) fn begin(id: MachineId, vm_dir: &Utf8Path, evidence_dir: &Utf8Path) -> Option<Self> {
        let path = evidence_dir.join(FILE);
        let earlier = std::fs::read(&path).ok();
        let earlier = earlier.map(|bytes| serde_json::from_slice::<Disposal>(&bytes).ok());
        let is_there = vm_dir.symlink_metadata().is_ok();
        let mut items = match earlier {
            None if !is_there => return None,
            Some(Some(whole)) if whole.complete && !is_there => return None,
            Some(Some(earlier)) if !earlier.complete => earlier.items,
            // What is whole is of a life before this one.
            None | Some(_) => Vec::new(),
        };
        let marks = Marks::read(vm_dir, evidence_dir);
        for (kind, name) in marks.names(vm_dir) {
            if !items
                .iter()
                .any(|item| item.kind == kind && item.name == name)
            {
                let kind = kind.to_owned();
                items.push(DisposedItem {
                    kind,
                    name,
                    gone: false,
                });
            }
        }
        let disposal = Disposal {
            machine_id: id,
            at: Timestamp::now(),
            items,
            complete: false,
            by: Disposer::Controller,
        };
        Some(Self {
            path,
            disposal,
            marks,
        })
    }

    /// Writes it as it is, whole or not at all.
    pub(super) fn write(&self) -> Result<(), FileError> {
        let path = &self.path;
        let mut bytes = serde_json::to_vec_pretty(&self.disposal)
            .map_err(|err| failed("write", path)(err.into()))?;
        bytes.push(b'\n');
        let partial = path.with_file_name(format!(".{FILE}.partial"));
        create(&partial)?
            .write_all(&bytes)
            .map_err(failed("write", &partial))?;
        std::fs::rename(&partial, path).map_err(failed("write", path))
    }

    /// Looks whether all of it is gone, and says so; that something is left is said in the log, too.
    pub(super) fn end(mut self) -> Result<Disposal, FileError> {
        for _ in 0..TRIES {
            self.look();
            let ends = |item: &DisposedItem| item.kind == "process" && !item.gone;
            if !self.disposal.items.iter().any(ends) {
                break;
            }
            std::thread::sleep(AGAIN);
        }
        if !self.disposal.complete {
            let left = self.disposal.items.iter().filter(|item| !item.gone);
            let left: Vec<_> = left
                .map(|item| format!("{} {}", item.kind, item.name))
                .collect();
            tracing::error!(machine.id = %self.disposal.machine_id, left = left.join(", "), "something of the VM is left");
        }
        self.write()?;
        Ok(self.disposal)
    }

    fn look(&mut self) {
        let processes = processes();
        for item in &mut self.disposal.items {
            item.gone = self.marks.is_gone(item, &processes);
        }
        // Nobody but the VM's processes had any of its memory.
        let items = &mut self.disposal.items;
        let ended = items.iter().all(|item| item.kind != "process" || item.gone);
        for item in items.iter_mut().filter(|item| item.kind == "memory") {
            item.gone = ended;
        }
        self.disposal.complete = items.iter().all(|item| item.gone);
        self.disposal.at = Timestamp::now();
    }
}

impl Marks {
    /// From the VM's directory; where that was removed before, from what was saved of it.
    fn read(vm_dir: &Utf8Path, evidence_dir: &Utf8Path) -> Self {
        let processes = read_mark(vm_dir, PROCESSES_MARK);
        let processes: Option<ProcessesMark> =
            processes.or_else(|| read_mark(evidence_dir, PROCESSES_MARK));
        let cgroup = read_mark(vm_dir, CGROUP_MARK);
        let own = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let here = |mark: &ProcessesMark| own.as_os_str() == mark.namespace.as_str();
        Self {
            cgroup: cgroup.or_else(|| read_mark(evidence_dir, CGROUP_MARK)),
            here: processes.as_ref().is_none_or(here),
            processes,
        }
    }

    /// What there is of a VM, by kind and name.
    fn names(&self, vm_dir: &Utf8Path) -> Vec<(&'static str, String)> {
        let mut names = Vec::new();
        match self.processes.as_ref().filter(|_| self.here) {
            Some(mark) => {
                names.push(("process", format!("runner {}", mark.runner.pid)));
                names.extend(
                    mark.vmm
                        .map(|vmm| ("process", format!("process group {}", vmm.pid))),
                );
            }
            None => names.push(("process", "runner".to_owned())),
        }
        if let Some(group) = &self.cgroup {
            names.push(("cgroup", group.path.clone()));
        }
        let sockets = sockets(vm_dir).into_iter();
        names.extend(sockets.map(|path| ("socket", path.into_string())));
        names.push(("directory", vm_dir.to_string()));
        names.push(("memory", "config drive".to_owned()));
        names
    }

    fn is_gone(&self, item: &DisposedItem, processes: &[Process]) -> bool {
        match item.kind.as_str() {
            "process" => match item.name.rsplit(' ').next().map(str::parse) {
                Some(Ok(number)) if self.here => !lives(number, self.started(number), processes),
                Some(Ok(_)) => item.gone,
                // The lock that it held is free, or nobody would look.
                Some(Err(_)) | None => true,
            },
            "cgroup" => match &self.cgroup {
                Some(group) if group.path == item.name => !is_it(group),
                Some(_) | None => is_absent(&item.name),
            },
            "socket" | "directory" => is_absent(&item.name),
            _ => item.gone,
        }
    }

    fn started(&self, number: u32) -> Option<u64> {
        let mark = self.processes.as_ref()?;
        let mut known = std::iter::once(mark.runner).chain(mark.vmm);
        let is = |known: &ProcessMark| known.pid == number;
        known.find(is).map(|known| known.started)
    }
}

fn is_absent(path: &str) -> bool {
    let found = Utf8Path::new(path).symlink_metadata();
    found.is_err_and(|err| err.kind() == std::io::ErrorKind::NotFound)
}

/// Whether the process `number`, or one of its group, is more than a name that nobody has asked for yet. One that began at
/// another time has only got the number since.
fn lives(number: u32, started: Option<u64>, processes: &[Process]) -> bool {
    let same = processes.iter().find(|process| process.number == number);
    if same.is_some_and(|same| started.is_some_and(|started| started != same.started)) {
        return false;
    }
    processes.iter().any(|process| {
        (process.number == number || process.group == number) && !matches!(process.state, 'Z' | 'X')
    })
}

fn processes() -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read(entry.path().join("stat")).ok()?;
            let stat = String::from_utf8_lossy(&stat);
            // After the name, which may hold anything, comes the third field.
            let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
            Some(Process {
                number,
                state: fields.first()?.chars().next()?,
                group: fields.get(5 - 3)?.parse().ok()?,
                started: fields.get(22 - 3)?.parse().ok()?,
            })
        })
        .collect()
}

fn sockets(directory: &Utf8Path) -> Vec<Utf8PathBuf> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut sockets = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in next.read_dir_utf8().into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => todo.push(entry.into_path()),
                Ok(kind) if kind.is_socket() && sockets.len() < SOCKETS => {
                    sockets.push(entry.into_path());
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
    sockets
}

#[cfg(test)]
mod tests {
    use super::super::evidence::salvage;
    use super::*;
    use camino_tempfile::Utf8TempDir;
    use std::{
        os::unix::{net::UnixListener, process::CommandExt as _},
        process::{Child, Command},
    };

    /// A directory with those of a VM and of its evidence.
    struct Place {
        _home: Utf8TempDir,
        id: MachineId,
        vm: Utf8PathBuf,
        evidence: Utf8PathBuf,
    }

    impl Place {
        fn new() -> Self {
            let home = camino_tempfile::tempdir().unwrap();
            let place = Self {
                id: MachineId::generate(),
                vm: home.path().join("vm"),
                evidence: home.path().join("evidence"),
                _home: home,
            };
            std::fs::create_dir(&place.vm).unwrap();
            drop(UnixListener::bind(place.vm.join("runner.sock")).unwrap());
            place
        }

        fn mark(&self, mark: &ProcessesMark) {
            let bytes = serde_json::to_vec(mark).unwrap();
            std::fs::write(self.vm.join(PROCESSES_MARK), bytes).unwrap();
        }

        fn salvage(&self) -> Option<Disposal> {
            let receipt = salvage(self.id, &self.vm, &self.evidence).unwrap();
            if let Some(receipt) = &receipt {
                assert_eq!(&self.read(), receipt);
                assert_eq!(receipt.machine_id, self.id);
            }
            assert!(!self.vm.exists());
            receipt
        }

        fn read(&self) -> Disposal {
            serde_json::from_slice(&std::fs::read(self.evidence.join(FILE)).unwrap()).unwrap()
        }

        fn begin(&self) -> Option<Receipt> {
            Receipt::begin(self.id, &self.vm, &self.evidence)
        }
    }

    fn left(receipt: &Disposal) -> Vec<String> {
        let left = receipt.items.iter().filter(|item| !item.gone);
        left.map(|item| format!("{} {}", item.kind, item.name))
            .collect()
    }

    fn kinds(receipt: &Disposal) -> Vec<&str> {
        receipt
            .items
            .iter()
            .map(|item| item.kind.as_str())
            .collect()
    }

    fn child() -> (Child, ProcessMark) {
        let child = Command::new("sleep")
            .arg("60")
            .process_group(0)
            .spawn()
            .unwrap();
        let all = processes();
        let own = all
            .iter()
            .find(|process| process.number == child.id())
            .unwrap();
        let mark = ProcessMark {
            pid: child.id(),
            started: own.started,
        };
        (child, mark)
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn mark(runner: ProcessMark, vmm: Option<ProcessMark>) -> ProcessesMark {
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap();
        ProcessesMark {
            namespace: namespace.to_str().unwrap().to_owned(),
            runner,
            vmm,
        }
    }

    #[test]
    fn a_vmm_that_outlives_its_runner_is_on_the_receipt_until_it_is_gone() {
        let place = Place::new();
        let ((runner, runner_mark), (vmm, vmm_mark)) = (child(), child());
        place.mark(&mark(runner_mark, Some(vmm_mark)));
        end(runner);
        let receipt = place.salvage().unwrap();
        let group = format!("process process group {}", vmm_mark.pid);
        assert_eq!(left(&receipt), [group.as_str(), "memory config drive"]);
        assert!(!receipt.complete && receipt.by == Disposer::Controller);
        let all = ["process", "process", "socket", "directory", "memory"];
        assert_eq!(kinds(&receipt), all);
        end(vmm);
        let receipt = place.salvage().unwrap();
        assert!(receipt.complete, "{receipt:?}");
        assert_eq!(kinds(&receipt), all);
        assert_eq!(place.salvage(), None, "a whole one is not written again");
    }

    #[test]
    fn a_number_that_another_process_has_now_is_not_the_vms() {
        let place = Place::new();
        let (other, own) = child();
        let before = ProcessMark {
            started: own.started - 1,
            ..own
        };
        place.mark(&mark(before, Some(before)));
        let receipt = place.salvage().unwrap();
        assert!(receipt.complete, "{receipt:?}");

        // In another pid namespace the number says nothing at all.
        let place = Place::new();
        let elsewhere = ProcessesMark {
            namespace: "pid:[1]".to_owned(),
            ..mark(own, Some(own))
        };
        place.mark(&elsewhere);
        let receipt = place.salvage().unwrap();
        assert!(receipt.complete, "{receipt:?}");
        assert_eq!(receipt.items[0].name, "runner");
        end(other);
    }

    #[test]
    fn a_controller_that_is_killed_meanwhile_is_followed_by_one_that_knows() {
        let place = Place::new();
        std::fs::create_dir(&place.evidence).unwrap();
        place.begin().unwrap().write().unwrap();
        let receipt = place.read();
        assert!(!receipt.complete && left(&receipt).len() == receipt.items.len());
        std::fs::remove_dir_all(&place.vm).unwrap();
        let after = place.salvage().unwrap();
        assert_eq!(kinds(&after), kinds(&receipt));
        assert!(after.complete, "{after:?}");
        // Of what was cut short nothing is known but that there was something.
        std::fs::write(place.evidence.join(FILE), "{").unwrap();
        assert!(place.salvage().unwrap().complete);
    }

    #[test]
    fn a_receipt_of_the_runners_stands_unless_something_was_left() {
        let place = Place::new();
        std::fs::create_dir(&place.evidence).unwrap();
        let item = |kind: &str, name: &str, gone| DisposedItem {
            kind: kind.to_owned(),
            name: name.to_owned(),
            gone,
        };
        let mut runners = Disposal {
            machine_id: place.id,
            at: Timestamp::now(),
            items: vec![item("directory", place.vm.as_str(), true)],
            complete: true,
            by: Disposer::Runner,
        };
        let write = |receipt: &Disposal| {
            std::fs::write(
                place.evidence.join(FILE),
                serde_json::to_vec(receipt).unwrap(),
            )
        };
        std::fs::remove_dir_all(&place.vm).unwrap();
        write(&runners).unwrap();
        assert_eq!(place.salvage(), None);
        runners.items = vec![
            item("directory", place.vm.as_str(), false),
            item("directory", place.evidence.as_str(), false),
        ];
        runners.complete = false;
        write(&runners).unwrap();
        let receipt = place.salvage().unwrap();
        assert_eq!(left(&receipt), [format!("directory {}", place.evidence)]);
        assert_eq!(receipt.by, Disposer::Controller);
        // Another life of the VM after one that left nothing.
        std::fs::create_dir(&place.vm).unwrap();
        runners.complete = true;
        write(&runners).unwrap();
        assert_eq!(
            kinds(&place.salvage().unwrap()),
            ["process", "directory", "memory"]
        );
    }

    #[test]
    fn where_nothing_was_there_is_no_receipt() {
        let place = Place::new();
        std::fs::remove_dir_all(&place.vm).unwrap();
        assert_eq!(place.salvage(), None);
        assert!(!place.evidence.exists());
    }

    #[test]
    fn what_a_vmm_put_in_the_marks_place_does_no_harm() {
        let place = Place::new();
        for (name, other) in [(PROCESSES_MARK, CGROUP_MARK), (CGROUP_MARK, PROCESSES_MARK)] {
            std::fs::create_dir_all(&place.vm).unwrap();
            // Whoever opens it as a file waits for ever.
            let fifo = Command::new("mkfifo").arg(place.vm.join(name)).status();
            assert!(fifo.unwrap().success());
            std::fs::write(place.vm.join(other), vec![b'['; 1 << 20]).unwrap();
            assert!(place.salvage().unwrap().complete);
            std::fs::remove_dir_all(&place.evidence).unwrap();
        }
    }
}
