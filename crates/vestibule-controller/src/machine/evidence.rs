//! Evidence bundles: what the controller adds to them, saves for them, and reads from them.
mod way_out;

use super::receipt::Receipt;
use crate::{
    file::{FileError, failed},
    store::{MachineRow, SessionRow},
};
use camino::Utf8Path;
use rustix::fs::OFlags;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
};
use vestibule_api::{
    cause::{Cause, Stage},
    control::EvidenceFile,
    error::Chain,
    finding::{Verdict, VerdictKind},
    ids::{ImageDigest, MachineId, ProviderId, SessionId},
    machine::{CGROUP_MARK, CGROUP_PARENT, CGROUP_PREFIX, CgroupMark, Disposal},
    session::{SessionEvent, SessionState},
    time::Timestamp,
};

/// Of a file that a dead runner left, so many bytes are saved: its beginning and its end, half each.
const SAVE_BYTES: u64 = 2 << 20;
/// What a runner leaves to name a cgroup or processes is shorter.
const MARK_LIMIT: u64 = 4096;
/// A cgroup is empty after so many looks, so far apart.
const GROUP_TRIES: u32 = 100;
const GROUP_AGAIN: std::time::Duration = std::time::Duration::from_millis(20);

/// `session.json`: what the controller knows of a session when its VM is gone. No secret is in it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Story {
    session_id: SessionId,
    machine_id: MachineId,
    provider: ProviderId,
    flow: String,
    state: SessionState,
    image_alias: String,
    image_digest: ImageDigest,
    created_at: Timestamp,
    captured_at: Option<Timestamp>,
    ended_at: Timestamp,
    machine_ready_at: Option<Timestamp>,
    failure: Option<Verdict>,
    events: Vec<SessionEvent>,
}

impl Story {
    pub(crate) fn new(
        session: &SessionRow,
        machine: &MachineRow,
        events: Vec<SessionEvent>,
    ) -> Self {
        Self {
            session_id: session.id,
            machine_id: machine.id,
            provider: session.provider.clone(),
            flow: session.flow.clone(),
            state: session.state,
            image_alias: session.image_alias.clone(),
            image_digest: machine.image_digest.clone(),
            created_at: session.created_at,
            captured_at: session.captured_at,
            ended_at: session.updated_at,
            machine_ready_at: machine.ready_at,
            // What failed a session is told of the VM that it had then; one that it gave up failed for itself.
            failure: match &machine.failure {
                Some(finding) if session.machine_id != Some(machine.id) => {
                    Some(Verdict::of(finding.clone(), vec!["events".to_owned()]))
                }
                Some(_) | None => session.failure.clone(),
            },
            events,
        }
    }
}

/// Saves the regular files of a runner's directory that are not in the evidence, then removes the directory. Gives the receipt
/// of what is gone by that; none where the runner's own says that nothing is left.
pub(crate) fn salvage(
    id: MachineId,
    vm_dir: &Utf8Path,
    evidence_dir: &Utf8Path,
) -> Result<Option<Disposal>, FileError> {
    let Some(receipt) = Receipt::begin(id, vm_dir, evidence_dir) else {
        return Ok(None);
    };
    make_dir(evidence_dir)?;
    receipt.write()?;
    save_all(vm_dir, evidence_dir)?;
    remove(vm_dir)?;
    receipt.end().map(Some)
}

/// As [`salvage`], of what can't be saved: the receipt is written if it can be.
pub(crate) fn abandon(
    id: MachineId,
    vm_dir: &Utf8Path,
    evidence_dir: &Utf8Path,
) -> Result<(), FileError> {
    let receipt = Receipt::begin(id, vm_dir, evidence_dir);
    remove(vm_dir)?;
    if let Some(Err(err)) = receipt.map(Receipt::end) {
        tracing::warn!(machine.id = %id, error = %Chain(&err), "there is no receipt of the VM's disposal");
    }
    Ok(())
}

fn save_all(vm_dir: &Utf8Path, evidence_dir: &Utf8Path) -> Result<(), FileError> {
    let entries = match vm_dir.read_dir_utf8() {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(err) => return Err(failed("list", vm_dir)(err)),
    };
    for entry in entries.flatten() {
        let target = evidence_dir.join(entry.file_name());
        if entry.file_type().is_ok_and(|kind| kind.is_file()) && !target.exists() {
            save(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Removes a runner's directory, and the cgroup that it left. One that is not there is fine.
pub(crate) fn remove(vm_dir: &Utf8Path) -> Result<(), FileError> {
    remove_group(vm_dir);
    match std::fs::remove_dir_all(vm_dir) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(failed("remove", vm_dir)(err)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes the cgroup of a VM whose runner was killed. What names it is not trusted: only a group of a VM that is empty goes.
fn remove_group(vm_dir: &Utf8Path) {
    let Some(mark) = read_mark::<CgroupMark>(vm_dir, CGROUP_MARK) else {
        return;
    };
    let path = Utf8Path::new(&mark.path);
    let of_vms = path.parent().and_then(Utf8Path::file_name) == Some(CGROUP_PARENT)
        && path
            .file_name()
            .is_some_and(|name| name.starts_with(CGROUP_PREFIX));
    for _ in 0..GROUP_TRIES {
        if !of_vms || !is_it(&mark) || std::fs::remove_dir(path).is_ok() {
            return;
        }
        // The kernel ends the VMM with its runner, and is not always done yet.
        std::thread::sleep(GROUP_AGAIN);
    }
    tracing::warn!(%path, "the cgroup of a VM can't be removed");
}

/// Whether the group is there, and not another one of its name.
pub(super) fn is_it(mark: &CgroupMark) -> bool {
    let group = Utf8Path::new(&mark.path).symlink_metadata();
    group.is_ok_and(|group| group.ino() == mark.inode)
}

/// A mark that a runner left. A VMM without a jail of its own can write there, too: what is no file, or too long for a mark, is none.
pub(super) fn read_mark<T: DeserializeOwned>(dir: &Utf8Path, name: &str) -> Option<T> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(dir.join(name))
        .ok()?;
    let mut text = String::new();
    let is_file = file.metadata().is_ok_and(|meta| meta.is_file());
    file.take(MARK_LIMIT).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok().filter(|_| is_file)
}

/// Writes `session.json` and `verdict.json`. `current` tells the image that an alias points to now. Returns the verdict.
pub(crate) fn complete(
    dir: &Utf8Path,
    mut story: Story,
    current: impl FnOnce(&str) -> Option<ImageDigest>,
) -> Result<Verdict, FileError> {
    make_dir(dir)?;
    let verdict = match (&story.failure, story.state) {
        // Reading a whole disk to hear that nothing is wrong would only keep the machine's place.
        (None, SessionState::Completed) => Verdict {
            verdict: VerdictKind::Healthy,
            ..unknown(vec!["events".to_owned()])
        },
        (_, _) => {
            let told = story.failure.take();
            story.failure = told.map(|told| way_out::explained(told, &story.events));
            weigh(&story, judge(dir, current(&story.image_alias)))
        }
    };
    let story = Story {
        failure: story.failure.is_some().then(|| verdict.clone()),
        ..story
    };
    write_json(&dir.join("session.json"), &story)?;
    write_json(&dir.join("verdict.json"), &verdict)?;
    Ok(verdict)
}

/// What the diagnosis reads from the bundle, and from the image that it names.
fn judge(dir: &Utf8Path, current: Option<ImageDigest>) -> Verdict {
    match vestibule_diagnose::Evidence::of_vm(dir.as_std_path()) {
        Ok(evidence) => {
            let current = current.map(|digest| digest.to_string());
            vestibule_diagnose::diagnose(&evidence.current_image(current))
        }
        Err(err) => {
            tracing::warn!(path = %dir, error = %Chain(&err), "the evidence can't be judged");
            unknown(Vec::new())
        }
    }
}

fn unknown(looked_at: Vec<String>) -> Verdict {
    Verdict {
        verdict: VerdictKind::Unknown,
        finding: None,
        also: Vec::new(),
        notes: Vec::new(),
        looked_at,
        collect_next: Vec::new(),
        elapsed_ms: 0,
    }
}

/// The session's own finding against the diagnosis of the bundle. The one that names less gives way: a VM that never
/// became ready has an earlier reason than "deadline" or "ended", and one that did has none of the earlier stages.
fn weigh(story: &Story, judged: Verdict) -> Verdict {
    let Some(own) = story.failure.clone() else {
        return judged;
    };
    let (Some(told), Some(found)) = (&own.finding, &judged.finding) else {
        return Verdict {
            looked_at: looked_at(&own, &judged),
            notes: judged.notes,
            elapsed_ms: judged.elapsed_ms,
            ..own
        };
    };
    let vague = matches!(
        told.cause,
        Cause::RunnerLost
            | Cause::VmmExited
            | Cause::Deadline
            | Cause::PersonLeft
            | Cause::StreamLost
    );
    let never_ready = story.machine_ready_at.is_none() && told.stage != Stage::ImageNotBuilt;
    let looked_at = looked_at(&own, &judged);
    let same = told.cause == found.cause;
    if !same
        && judged.verdict == VerdictKind::Cause
        && (vague || never_ready && (told.cause.is_missed_milestone() || found.stage <= told.stage))
    {
        let mut verdict = judged.clone();
        verdict.also.insert(0, told.clone());
        return Verdict {
            looked_at,
            ..verdict
        };
    }
    let mut also = own.also.clone();
    if !same && story.machine_ready_at.is_none() {
        also.push(found.clone());
    }
    Verdict {
        also,
        looked_at,
        notes: judged.notes,
        elapsed_ms: judged.elapsed_ms,
        ..own
    }
}

fn looked_at(own: &Verdict, judged: &Verdict) -> Vec<String> {
    let mut all = own.looked_at.clone();
    all.extend(judged.looked_at.iter().cloned());
    all.sort();
    all.dedup();
    all
}

/// The files of a bundle, by name; none where there is no bundle.
pub(crate) fn list(dir: &Utf8Path) -> io::Result<Option<Vec<EvidenceFile>>> {
    let entries = match dir.read_dir_utf8() {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(err),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_file() {
            files.push(EvidenceFile {
                name: entry.file_name().to_owned(),
                bytes: meta.len(),
            });
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Some(files))
}

fn make_dir(dir: &Utf8Path) -> Result<(), FileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("create directory", dir))
}

pub(super) fn create(path: &Utf8Path) -> Result<File, FileError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed("create", path))
}

fn write_json<T: Serialize>(path: &Utf8Path, value: &T) -> Result<(), FileError> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|err| failed("write", path)(err.into()))?;
    bytes.push(b'\n');
    create(path)?
        .write_all(&bytes)
        .map_err(failed("write", path))
}

fn save(from: &Utf8Path, to: &Utf8Path) -> Result<(), FileError> {
    let mut target = create(to)?;
    let mut copy = || -> io::Result<()> {
        let mut source = File::open(from)?;
        let length = source.metadata()?.len();
        if length <= SAVE_BYTES {
            return io::copy(&mut source, &mut target).map(drop);
        }
        let half = SAVE_BYTES / 2;
        io::copy(&mut (&source).take(half), &mut target)?;
        writeln!(target, "\n[{} bytes left out]", length - SAVE_BYTES)?;
        source.seek(SeekFrom::Start(length - half))?;
        io::copy(&mut source.take(half), &mut target).map(drop)
    };
    copy().map_err(failed("save", from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vestibule_api::finding::{Finding, Quote};

    fn finding(cause: Cause) -> Finding {
        let quote = Quote {
            source: "serial".to_owned(),
            line: None,
            text: "x".to_owned(),
        };
        Finding::new(cause, quote, "why", "fix")
    }

    #[test]
    fn the_cgroup_of_a_killed_runner_goes_with_its_directory() {
        let dir = camino_tempfile::tempdir().unwrap();
        let (vm_dir, vms) = (dir.path().join("vm"), dir.path().join("vestibule"));
        let group = |name: &str| {
            let path = vms.join(name);
            std::fs::create_dir_all(&path).unwrap();
            let inode = path.metadata().unwrap().ino();
            CgroupMark {
                path: path.into_string(),
                inode,
            }
        };
        let removed = |mark: &CgroupMark| {
            std::fs::create_dir_all(&vm_dir).unwrap();
            std::fs::write(vm_dir.join(CGROUP_MARK), serde_json::to_vec(mark).unwrap()).unwrap();
            remove(&vm_dir).unwrap();
            assert!(!vm_dir.exists());
            !Utf8Path::new(&mark.path).exists()
        };
        assert!(removed(&group("vm-470000")));
        let mut others = group("vm-470001");
        others.inode += 1;
        assert!(!removed(&others), "another VM has its name by now");
        assert!(!removed(&group("system")), "it is no VM's");
        let outside = dir.path().join("vm-1");
        std::fs::create_dir(&outside).unwrap();
        let inode = outside.metadata().unwrap().ino();
        assert!(!removed(&CgroupMark {
            path: outside.into_string(),
            inode
        }));
        std::fs::create_dir(&vm_dir).unwrap();
        std::fs::write(vm_dir.join(CGROUP_MARK), "nonsense").unwrap();
        remove(&vm_dir).unwrap();
        remove(&vm_dir).unwrap();
    }

    fn story(cause: Cause, ready: bool) -> Story {
        let session = SessionId::generate();
        let machine = MachineRow::new("browser".to_owned(), "a".repeat(64).parse().unwrap(), 1, 1);
        Story {
            session_id: session,
            machine_id: machine.id,
            provider: "gh".parse().unwrap(),
            flow: "web".to_owned(),
            state: SessionState::Failed,
            image_alias: "browser".to_owned(),
            image_digest: machine.image_digest,
            created_at: Timestamp::now(),
            captured_at: None,
            ended_at: Timestamp::now(),
            machine_ready_at: ready.then(Timestamp::now),
            failure: Some(Verdict::of(finding(cause), vec!["events".to_owned()])),
            events: Vec::new(),
        }
    }

    fn cause_of(told: Cause, ready: bool, found: Cause) -> Cause {
        let judged = Verdict::of(finding(found), vec!["serial".to_owned()]);
        let verdict = weigh(&story(told, ready), judged);
        assert_eq!(verdict.looked_at, ["events", "serial"]);
        verdict.finding.unwrap().cause
    }

    #[test]
    fn the_earlier_and_better_founded_cause_wins() {
        assert_eq!(
            cause_of(Cause::Deadline, false, Cause::KernelPanic),
            Cause::KernelPanic
        );
        assert_eq!(
            cause_of(Cause::RunnerLost, true, Cause::OutOfMemoryGuest),
            Cause::OutOfMemoryGuest
        );
        assert_eq!(
            cause_of(Cause::ConsentDenied, true, Cause::UnitMasked),
            Cause::ConsentDenied
        );
        assert_eq!(
            cause_of(Cause::DisplayNotReady, false, Cause::UnitMasked),
            Cause::UnitMasked
        );
        assert_eq!(
            cause_of(Cause::KernelPanic, false, Cause::KernelPanic),
            Cause::KernelPanic
        );
    }

    #[test]
    fn what_a_dead_runner_left_is_saved_before_it_is_removed() {
        let home = camino_tempfile::tempdir().unwrap();
        let (vm, evidence) = (home.path().join("vm"), home.path().join("evidence/x"));
        std::fs::create_dir(&vm).unwrap();
        let long = [vec![b'a'; 3 << 20], vec![b'z'; 10]].concat();
        std::fs::write(vm.join("serial.log"), &long).unwrap();
        std::fs::write(vm.join("report.json"), "{}").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(vm.join("runner.sock")).unwrap();
        std::fs::create_dir_all(&evidence).unwrap();
        std::fs::write(evidence.join("report.json"), "the runner's own").unwrap();
        let id = MachineId::generate();
        let receipt = salvage(id, &vm, &evidence).unwrap().unwrap();
        assert!(receipt.complete, "{receipt:?}");
        assert!(!vm.exists());
        let serial = std::fs::read(evidence.join("serial.log")).unwrap();
        assert!(serial.ends_with(b"zzzzzzzzzz") && serial.len() < long.len());
        assert_eq!(
            std::fs::read_to_string(evidence.join("report.json")).unwrap(),
            "the runner's own"
        );
        let names: Vec<_> = list(&evidence)
            .unwrap()
            .unwrap()
            .into_iter()
            .map(|f| f.name)
            .collect();
        let expected = ["disposal.json", "report.json", "serial.log"];
        assert_eq!(names, expected, "no socket");
        assert_eq!(salvage(id, &vm, &evidence).unwrap(), None);
        assert!(list(&vm).unwrap().is_none());
    }
}
