//! The program as people and scripts call it: exit statuses, and what it prints. No VM, and a controller only to die.
#![expect(clippy::unwrap_used, reason = "a test that cannot start fails")]
use camino_tempfile::Utf8TempDir;
use std::{
    fs,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt as _},
    },
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};
use vestibule_api::{
    machine::{DriverChoice, JailSpec},
    standby::{self, Preparation},
};

const VM: &str = "01a217bf-41e1-73c3-8388-a46dcaf71bf1";

fn home() -> Utf8TempDir {
    camino_tempfile::tempdir().unwrap()
}

fn vestibule(home: &Utf8TempDir, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vestibule"))
        .arg("--home")
        .arg(home.path())
        .args(words)
        .output()
        .unwrap()
}

fn status(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn arguments_that_are_not_understood_end_with_64() {
    let home = home();
    for words in [
        &["diagnose", "--nonsense"][..],
        &["diagnose"],
        &["diagnose", "--explain", "nonsense"],
        &["vm", "why", "no-id"],
        &["nonsense"],
        &[],
    ] {
        let output = vestibule(&home, words);
        assert_eq!(status(&output), 64, "{words:?}");
        assert!(!output.stderr.is_empty(), "{words:?}");
    }
    for words in [&["--help"][..], &["--version"], &["vm", "why", "--help"]] {
        let output = vestibule(&home, words);
        assert_eq!(status(&output), 0, "{words:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let home = home();
    for words in [&["completion", "bash"][..], &["man"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vestibule"))
            .arg("--home")
            .arg(home.path())
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(status(&output), 0, "{words:?}");
        assert_eq!(text(&output.stderr), "", "{words:?}");
    }
}

#[test]
fn every_manual_page_that_is_named_exists() {
    let home = home();
    let dir = home.path().join("man1");
    assert_eq!(status(&vestibule(&home, &["man", dir.as_str()])), 0);
    let page = fs::read_to_string(dir.join("vestibule.1")).unwrap();
    let mut named = 0;
    for reference in page.split_whitespace().filter(|word| word.ends_with("(1)")) {
        let name = reference.trim_end_matches("(1)").replace('\\', "");
        assert!(dir.join(format!("{name}.1")).exists(), "{reference}");
        named += 1;
    }
    assert!(named > 5, "{page}");
    assert!(dir.join("vestibule-vm-why.1").exists());
}

#[test]
fn why_judges_the_evidence_of_a_vm_without_a_session() {
    let home = home();
    let why = || vestibule(&home, &["--json", "vm", "why", VM]);
    assert_eq!(status(&why()), 1);
    // What a runner leaves that was killed; then the bundle of one that was not.
    for (place, name) in [("vms", "serial.log"), ("evidence", "serial.log")] {
        let dir = home.path().join(place).join(VM);
        fs::create_dir_all(&dir).unwrap();
        let console = "[ 1.0] VFS: Cannot open root device \"vda\" or unknown-block(0,0): error -6\n\
                       [ 1.1] Kernel panic - not syncing: VFS: Unable to mount root fs\n";
        fs::write(dir.join(name), console).unwrap();
        let output = why();
        assert_eq!(status(&output), 1, "{}", text(&output.stderr));
        let verdict: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(verdict["verdict"], "cause", "{verdict}");
        fs::remove_file(dir.join(name)).unwrap();
    }
    // The controller's verdict counts where there is one.
    let verdict = r#"{"verdict":"unknown","finding":null,"also":[],"notes":[],"lookedAt":[],"collectNext":[],"elapsedMs":0}"#;
    let dir = home.path().join("evidence").join(VM);
    fs::write(dir.join("verdict.json"), verdict).unwrap();
    let output = why();
    assert_eq!(status(&output), 2, "{}", text(&output.stderr));
}

#[test]
fn packs_are_checked_by_id_by_file_and_all_together() {
    let home = home();
    let all = vestibule(&home, &["provider", "check"]);
    assert_eq!(status(&all), 0, "{}", text(&all.stderr));
    let said = text(&all.stdout);
    assert!(said.contains("codex: ok (built-in)"), "{said}");
    assert!(said.contains("oidc: not configured"), "{said}");
    assert_eq!(status(&vestibule(&home, &["provider", "check", "gh"])), 0);
    assert_eq!(status(&vestibule(&home, &["provider", "check", "oidc"])), 1);
    let unknown = vestibule(&home, &["provider", "check", "acme"]);
    assert_eq!(status(&unknown), 1);
    assert!(text(&unknown.stderr).contains("no pack `acme`"));
    let file = home.path().join("acme.toml");
    fs::write(&file, "schema = 9\n").unwrap();
    let bad = vestibule(&home, &["provider", "check", "gh", file.as_str()]);
    assert_eq!(status(&bad), 1);
    assert!(
        text(&bad.stderr).contains("acme.toml"),
        "{}",
        text(&bad.stderr)
    );
    assert!(text(&bad.stdout).contains("gh: ok"));
    let shown = vestibule(&home, &["provider", "show", "codex"]);
    assert!(text(&shown.stdout).contains("hand-off: same-person"));
}

#[test]
fn the_manifest_beside_a_disk_says_which_units_must_run() {
    let home = home();
    let manifest = serde_json::json!({
        "schema": 1, "recipe": "x", "recipeDigest": "", "artifacts": { "root.ext4": { "sha256": "", "bytes": 1 } },
        "kernelRelease": "", "cmdline": "", "drivers": [], "minMemoryMib": 1, "defaultMemoryMib": 1,
        "defaultVcpus": 1, "requiredUnits": ["wanted.service"], "features": [], "agentBuild": "", "packages": [],
        "tools": [], "files": {},
    });
    fs::write(home.path().join("manifest.json"), manifest.to_string()).unwrap();
    let disk = home.path().join("root.ext4");
    let tree = home.path().join("tree/etc/systemd/system");
    fs::create_dir_all(&tree).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-d", home.path().join("tree").as_str()])
        .args([disk.as_str(), "4M"])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdout(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let output = vestibule(&home, &["--json", "diagnose", "--disk", disk.as_str()]);
    let said = text(&output.stdout);
    assert!(said.contains("wanted.service"), "{said}");
}

/// A sparse file costs nobody but who reads all of it.
#[test]
fn evidence_without_an_end_is_refused() {
    let home = camino_tempfile::tempdir().unwrap();
    let path = home.path().join("endless");
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    for option in ["--serial", "--journal"] {
        let output = vestibule(&home, &["diagnose", option, path.as_str()]);
        assert_eq!(output.status.code(), Some(66), "{option}");
        let said = text(&output.stderr);
        assert!(said.contains("has more than 128 MiB"), "{said}");
    }
}

/// A vault in the home with one credential, which left once. The credential's id.
fn vault(home: &Utf8TempDir) -> String {
    use vestibule_vault::{Access, ContentFile, KeySource, NewCredential, Vault};
    let vault = Vault::open(&home.path().join("vault"), &KeySource::Own).unwrap();
    let access = Access {
        actor: "test".to_owned(),
        purpose: "proof".to_owned(),
    };
    let file = ContentFile {
        path: ".tool/auth.json".to_owned(),
        mode: 0o600,
        bytes: vestibule_api::secret::Secret::new(b"sk-secret".to_vec()),
    };
    let new = NewCredential {
        credential_id: vestibule_api::ids::CredentialId::generate(),
        provider: "codex".parse().unwrap(),
        user_id: "ada".to_owned(),
        session_id: vestibule_api::ids::SessionId::generate(),
        account: None,
        expires_at: None,
        files: vec![file],
    };
    let id = vault.put(&new, &access).unwrap().credential_id;
    drop(vault.get(id, &access).unwrap());
    id.to_string()
}

#[test]
fn the_audit_log_is_checked_without_a_controller() {
    let home = home();
    let none = vestibule(&home, &["audit", "verify"]);
    assert_eq!(status(&none), 1);
    assert!(text(&none.stderr).contains("there is no vault in"));
    let id = vault(&home);
    let log = home.path().join("vault/audit.log");
    let good = fs::read_to_string(&log).unwrap();
    let report = || -> serde_json::Value {
        let output = vestibule(&home, &["--json", "audit", "verify"]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let sound = report();
    assert_eq!(
        (&sound["lines"], &sound["released"], &sound["credentials"]),
        (&3.into(), &1.into(), &1.into())
    );
    let head = sound["head"].as_str().unwrap();
    let held = || vestibule(&home, &["audit", "verify", "--head", head]);
    assert_eq!(status(&held()), 0);
    let lines = vestibule(&home, &["--json", "audit", "list", "--credential", &id]);
    let lines: serde_json::Value = serde_json::from_slice(&lines.stdout).unwrap();
    assert_eq!(lines[0]["action"], "stored");
    assert_eq!(
        (&lines[1]["action"], &lines[1]["seq"]),
        (&"released".into(), &3.into())
    );
    let last = vestibule(&home, &["audit", "list", "--last", "1"]);
    assert_eq!(
        text(&last.stdout).lines().count(),
        2,
        "{}",
        text(&last.stdout)
    );

    // A line that was cut off the end leaves a log that follows; only who kept the head sees it.
    let cut: String = good.split_inclusive('\n').take(2).collect();
    fs::write(&log, &cut).unwrap();
    assert_eq!(report()["lines"], 2);
    assert_eq!(status(&held()), 1);
    fs::write(&log, good.replacen("proof", "prowl", 1)).unwrap();
    let broken = vestibule(&home, &["audit", "verify"]);
    let said = text(&broken.stderr);
    assert_eq!(status(&broken), 1);
    assert!(
        said.contains("line 2 of the audit log does not follow"),
        "{said}"
    );
    let listed = vestibule(&home, &["audit", "list"]);
    assert_eq!(status(&listed), 1);
    assert!(
        text(&listed.stdout).contains("first start"),
        "what follows is shown"
    );

    fs::write(&log, &good).unwrap();
    fs::remove_file(home.path().join("vault/records").join(&id)).unwrap();
    let output = vestibule(&home, &["--json", "audit", "verify"]);
    assert_eq!(status(&output), 1);
    assert_eq!(report()["missing"][0], id.as_str());
    fs::remove_file(home.path().join("vault/master.key")).unwrap();
    let keyless = vestibule(&home, &["audit", "verify"]);
    assert!(
        text(&keyless.stderr).contains("master key"),
        "{}",
        text(&keyless.stderr)
    );
    assert!(!home.path().join("vault/master.key").exists());
}

#[test]
fn systemd_hears_that_it_serves_lives_and_stops() {
    use std::os::unix::net::UnixDatagram;
    let home = home();
    let socket = home.path().join("notify");
    let systemd = UnixDatagram::bind(&socket).unwrap();
    systemd
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let served = home.path().join("home");
    let mut child = Command::new(env!("CARGO_BIN_EXE_vestibule"))
        .args([
            "--home",
            served.as_str(),
            "serve",
            "--listen",
            "127.0.0.1:0",
        ])
        .env("NOTIFY_SOCKET", &socket)
        .env("WATCHDOG_USEC", "300000")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let heard = |word: &str| {
        let mut buffer = [0; 1024];
        loop {
            let count = systemd.recv(&mut buffer).unwrap();
            let said = text(&buffer[..count]).to_owned();
            if said.lines().any(|line| line == word) {
                return said;
            }
        }
    };
    let ready = heard("READY=1");
    assert!(
        ready.contains("STATUS=serving on http://127.0.0.1:"),
        "{ready}"
    );
    for _ in 0..3 {
        heard("WATCHDOG=1");
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    heard("STOPPING=1");
    assert!(child.wait().unwrap().success());
}

/// The specification of a VM whose image is not there.
fn of_no_image(home: &Utf8TempDir) -> String {
    let below = |name: &str| home.path().join(name).join(VM);
    let spec = serde_json::json!({
        "machineId": VM, "imageDigest": "b".repeat(64), "imageDir": home.path().join("none"), "memoryMib": 256, "vcpus": 1,
        "driver": "qemu", "vmDir": below("vms"), "evidenceDir": below("evidence"),
        "egress": { "mode": "closed" },
        "bootDeadlineS": 1, "consoleKeepBytes": 1024,
    });
    spec.to_string()
}

/// As an engine starts it: nobody hands it an open file.
#[test]
fn a_runner_of_an_engine_takes_its_lock_and_writes_its_own_log() {
    let home = home();
    let vm_dir = home.path().join("vms").join(VM);
    fs::create_dir_all(&vm_dir).unwrap();
    let spec = vm_dir.join("spec.json");
    let run = || vestibule(&home, &["run-vm", "--spec", spec.as_str()]);
    let output = run();
    assert_ne!(status(&output), 0);
    assert!(
        text(&output.stderr).contains("spec.json"),
        "{}",
        text(&output.stderr)
    );
    fs::write(&spec, of_no_image(&home)).unwrap();
    let log = vm_dir.join("runner.stderr");
    let held = fs::File::options()
        .create(true)
        .append(true)
        .open(&log)
        .unwrap();
    held.try_lock().unwrap();
    let output = run();
    assert_ne!(status(&output), 0);
    assert!(
        text(&output.stderr).contains("another runner has it"),
        "{}",
        text(&output.stderr)
    );
    drop(held);
    let output = run();
    assert_eq!(text(&output.stderr), "", "what it says is in its log");
    assert!(!fs::read_to_string(&log).unwrap_or_default().is_empty() || !vm_dir.exists());
}

/// As the controller has one: started before there is a VM for it.
#[test]
fn a_runner_that_stands_by_is_given_its_vm_or_ends() {
    let home = home();
    let output = Command::new(env!("CARGO_BIN_EXE_vestibule"))
        .args(["run-vm", "--standby"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_ne!(status(&output), 0);
    let said = text(&output.stderr);
    assert!(said.contains("which is to be a Unix socket"), "{said}");

    let stand_by = || {
        let (controller, runner) = UnixStream::pair().unwrap();
        let runner = Command::new(env!("CARGO_BIN_EXE_vestibule"))
            .args(["run-vm", "--standby"])
            .stdin(OwnedFd::from(runner))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        (controller, runner)
    };
    let (controller, mut runner) = stand_by();
    drop(controller);
    assert!(runner.wait().unwrap().success(), "nobody needs it");

    let preparation = Preparation {
        directory: home.path().join("standby").into_string(),
        driver: DriverChoice::Auto,
        jail: JailSpec::default(),
        cache_dir: None,
    };
    let (controller, mut runner) = stand_by();
    standby::prepare(&controller, &preparation).unwrap();
    drop(controller);
    assert!(runner.wait().unwrap().success(), "nor does it now");

    let (controller, mut runner) = stand_by();
    standby::prepare(&controller, &preparation).unwrap();
    let evidence = home.path().join("evidence").join(VM);
    let log = home.path().join("stderr");
    let stderr = fs::File::create(&log).unwrap();
    stderr.try_lock().unwrap();
    let spec = vestibule_api::descriptor::in_memory(of_no_image(&home).as_bytes()).unwrap();
    standby::give(&controller, stderr.as_fd(), spec.as_fd()).unwrap();
    drop((controller, stderr));
    let alive = || fs::File::open(&log).unwrap().try_lock().is_err();
    assert!(alive(), "it has the lock that it was given, read or not");
    assert!(runner.wait().unwrap().success());
    assert!(!alive());
    let said = fs::read_to_string(&log).unwrap();
    assert!(said.contains("\"state\":\"Gone\""), "{said}");
    assert!(evidence.join("machine.json").exists());
}

/// Starts the program in `dir` where dumps of any size are allowed. Its standard input stays open.
fn with_dumps_allowed(dir: &Utf8TempDir, words: &[&str]) -> Child {
    Command::new("bash")
        .args(["-c", "ulimit -c \"$(ulimit -H -c)\"; exec \"$@\"", "bash"])
        .arg(env!("CARGO_BIN_EXE_vestibule"))
        .args(words)
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ready() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Soft and hard limit of a process's dumps, in bytes.
fn dump_limits(pid: u32) -> [String; 2] {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max core"));
    let mut words = line.unwrap().split_whitespace().skip(4);
    [(); 2].map(|()| words.next().unwrap().to_owned())
}

#[test]
fn a_controller_or_runner_that_aborts_leaves_no_core_dump() {
    let (home, dir) = (home(), home());
    let config = home.path().join("vestibule.toml");
    fs::write(&config, "listen = \"127.0.0.1:0\"\n").unwrap();
    let serve = [
        "--home",
        home.path().as_str(),
        "serve",
        "--config",
        config.as_str(),
    ];
    let controller = with_dumps_allowed(&dir, &serve);
    until("the controller serves", || {
        home.path().join("address").exists()
    });
    // It waits for a specification on its standard input.
    let runner = with_dumps_allowed(&dir, &["run-vm"]);
    let is = |pid, name: &str| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
    };
    until("the runner's limit is lowered", || {
        is(runner.id(), "vestibule") && dump_limits(runner.id())[0].len() == 1
    });
    for mut child in [controller, runner] {
        for limit in dump_limits(child.id()) {
            assert!(["0", "1"].contains(&limit.as_str()), "{limit}");
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::ABORT).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(6), "{status}");
        assert!(!status.core_dumped(), "{status}");
    }
    assert_eq!(dir.path().read_dir_utf8().unwrap().count(), 0);
}

/// A build that fails says so as every failure does: a cause, with the error that proves it.
#[test]
fn a_build_that_fails_has_a_verdict() {
    let home = home();
    let recipe = home.path().join("none");
    let words = ["image", "build", recipe.as_str(), "--agent", "/bin/sh"];
    let output = vestibule(&home, &words);
    assert_eq!(status(&output), 1);
    assert!(output.stdout.is_empty());
    assert!(
        text(&output.stderr).contains("build-failed"),
        "{}",
        text(&output.stderr)
    );
    let said = text(&output.stderr);
    assert_eq!(said.matches("read the recipe").count(), 1, "{said}");
    let output = vestibule(&home, &[&["--json"], &words[..]].concat());
    assert_eq!(status(&output), 1);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&said["verdict"], &said["cause"], &said["stage"]),
        (
            &"cause".into(),
            &"build-failed".into(),
            &"image-not-built".into()
        )
    );
    let message = said["error"]["message"].as_str().unwrap();
    assert!(
        message.contains(recipe.as_str()) && said["evidence"][0]["text"] == message,
        "{said}"
    );
}
