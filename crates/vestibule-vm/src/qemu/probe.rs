//! What an installed QEMU can do, asked of it: one that runs no guest is started, questioned and ended. The answer is kept for
//! as long as the program is the same file.
use crate::{driver::ProbeError, kept};
use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::{Command, Stdio},
};

/// The family of machine types that VMs have.
const FAMILY: &str = "q35";

/// What it said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Probed {
    pub(super) version: String,
    /// The versioned machine type that `q35` stands for: `pc-q35-7.2`. A snapshot taken with one version of it cannot be
    /// loaded into another.
    pub(super) machine: String,
    /// Whether memory that is shared with a file can be left out of a saved state.
    pub(super) snapshot: bool,
    /// Whether a file can be opened for reading only and still be the guest's memory, copied on write (QEMU 8.2).
    pub(super) read_only_memory: bool,
}

/// In the directory for such things.
const KEPT: &str = "qemu.json";

/// It ran and did not answer, or not what is understood. Memory that was short is such a reason: so it is not kept.
struct NoAnswer;

/// What `program` can do: what it said before and is kept in `cache_dir`, or else says now. Blocks, for about 50 ms where the
/// program is started.
pub(super) fn probe(
    program: &Utf8Path,
    cache_dir: Option<&Utf8Path>,
) -> Result<Probed, ProbeError> {
    let answered = kept::find(cache_dir, KEPT, kept::identity(program).as_ref(), || {
        let said = ask(program).ok_or(NoAnswer)?;
        understand(&said).ok_or(NoAnswer)
    });
    answered.or_else(|NoAnswer| {
        // What it says of its version is then all that is known, or why it does not run.
        Ok(Probed {
            version: crate::doctor::program_version(program)?,
            machine: FAMILY.to_owned(),
            snapshot: false,
            read_only_memory: false,
        })
    })
}

fn ask(program: &Utf8Path) -> Option<String> {
    let mut command = Command::new(program);
    command
        .args("-S -M none -nodefaults -no-user-config -display none -qmp stdio".split(' '))
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    // Without a guest, too, QEMU takes a buffer of 1 GiB for translated code, more than a runner may have.
    // SAFETY: the closure makes two system calls and allocates nothing.
    #[expect(unsafe_code, reason = "only pre_exec runs code in the child")]
    unsafe {
        command.pre_exec(|| {
            // A runner that is killed meanwhile leaves nothing: QEMU would go on after the end of its input.
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(crate::memory::lift()?)
        });
    }
    let mut child = command.spawn().ok()?;
    let questions = [
        json!({ "execute": "qmp_capabilities" }),
        json!({ "execute": "query-machines", "id": "machines" }),
        json!({ "execute": "query-migrate-capabilities", "id": "migrate" }),
        json!({ "execute": "qom-list-properties", "id": "memory", "arguments": { "typename": "memory-backend-file" } }),
        json!({ "execute": "quit" }),
    ];
    let mut stdin = child.stdin.take()?;
    for question in questions {
        // One that has ended answers nothing, which is seen below.
        let _ = writeln!(stdin, "{question}");
    }
    drop(stdin);
    let output = child.wait_with_output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn understand(said: &str) -> Option<Probed> {
    let lines: Vec<Value> = said
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let answer = |id: &str| {
        let line = lines.iter().find(|line| line["id"] == id)?;
        line["return"].as_array()
    };
    let has = |id: &str, key: &str, value: &str| {
        answer(id).is_some_and(|all| all.iter().any(|one| one[key] == value))
    };
    let machine = answer("machines")?
        .iter()
        .find(|machine| machine["alias"] == FAMILY)?;
    Some(Probed {
        version: super::qmp::version_of(lines.first()?)?,
        machine: machine["name"].as_str()?.to_owned(),
        snapshot: has("migrate", "capability", "x-ignore-shared"),
        read_only_memory: has("memory", "name", "rom"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}}}
{"return": {}}
{"return": [{"name": "pc-q35-9.2"}, {"name": "pc-q35-10.0", "alias": "q35"}], "id": "machines"}
{"return": [{"state": false, "capability": "x-ignore-shared"}], "id": "migrate"}
{"return": [{"name": "share"}, {"name": "rom"}], "id": "memory"}"#;

    /// A program that says what a QEMU of version `10.0.<micro>` says, and counts its starts.
    fn install(at: &Utf8Path, micro: u32) {
        let starts = at.with_extension("starts");
        let text = format!(
            "#!/bin/sh\necho start >> {starts}\ncat <<'END'\n{}\nEND\n",
            SAID.replace("\"micro\": 2", &format!("\"micro\": {micro}"))
        );
        put(at, &text);
    }

    /// A new file, as a package manager installs one.
    fn put(at: &Utf8Path, text: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        let new = at.with_extension("new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(&new, at).unwrap();
    }

    #[test]
    fn an_answer_is_kept_for_as_long_as_the_program_is_the_same() {
        let dir = camino_tempfile::tempdir().unwrap();
        let (program, cache) = (dir.path().join("qemu"), dir.path().join("home/cache"));
        let version = |expected: &str, starts: usize| {
            let probed = probe(&program, Some(&cache)).unwrap();
            assert_eq!(probed.version, expected);
            let said = std::fs::read_to_string(program.with_extension("starts")).unwrap();
            assert_eq!(said.lines().count(), starts);
        };
        install(&program, 2);
        version("10.0.2", 1);
        version("10.0.2", 1);
        install(&program, 3);
        version("10.0.3", 2);
        std::fs::write(cache.join(KEPT), "nonsense").unwrap();
        version("10.0.3", 3);
        version("10.0.3", 3);
        let left: Vec<_> = std::fs::read_dir(&cache).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn what_did_not_answer_is_asked_again() {
        let dir = camino_tempfile::tempdir().unwrap();
        let (program, said) = (dir.path().join("qemu"), dir.path().join("said"));
        let text = format!(
            "#!/bin/sh\n[ $1 = --version ] && echo QEMU emulator version 7.2.22 || cat {said}\n"
        );
        put(&program, &text);
        let snapshot = || probe(&program, Some(dir.path())).unwrap().snapshot;
        assert!(!snapshot() && !snapshot());
        std::fs::write(&said, SAID).unwrap();
        assert!(snapshot());
    }

    #[test]
    fn an_answer_is_understood_and_nonsense_is_not() {
        let said = SAID;
        let probed = understand(said).unwrap();
        assert_eq!(
            (probed.version.as_str(), probed.machine.as_str()),
            ("10.0.2", "pc-q35-10.0")
        );
        assert!(probed.snapshot && probed.read_only_memory);
        let old = said.replace("x-ignore-shared", "xbzrle");
        assert!(!understand(&old).unwrap().snapshot);
        assert!(understand("nonsense").is_none());
    }
}
