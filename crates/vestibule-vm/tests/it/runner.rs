//! The runner as a process, with a real QEMU and a guest of a few bytes: every way in which a VM ends leaves its evidence
//! and nothing else.
use crate::{
    bare::Then,
    support::{Place, Running, alive, gone, qemu_program, soon, tree},
};
use camino::Utf8Path;
use hyper::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use std::{os::unix::fs::PermissionsExt as _, time::Duration};
use vestibule_api::{
    cause::Cause,
    client::CallError,
    egress::{EgressMode, EgressPolicy},
    finding::Finding,
    ids::SessionId,
    machine::{Claim, Disposal, MachineState, MachineView, RunnerEventKind},
};

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// What every ended VM has in common: the whole bundle, and nothing beside it.
fn nothing_is_left(place: &Place, vmm: Option<u32>) {
    assert!(!Utf8Path::new(&place.spec.vm_dir).exists());
    assert!(vmm.is_none_or(|pid| !alive(pid)));
    let disposal: Disposal = serde_json::from_str(&place.evidence("disposal.json")).unwrap();
    assert!(disposal.complete, "{disposal:?}");
    for name in ["machine.json", "serial.log", "vmm.log", "exit.json"] {
        place.evidence(name);
    }
    let events = place.events();
    let kinds: Vec<_> = events.iter().map(|e| &e.event).collect();
    assert!(
        events
            .iter()
            .enumerate()
            .all(|(n, e)| e.seq == n as u64 + 1),
        "{kinds:?}"
    );
    assert!(
        matches!(kinds.last(), Some(RunnerEventKind::Ended { .. })),
        "{kinds:?}"
    );
    let states: Vec<_> = events
        .iter()
        .filter_map(|e| match &e.event {
            RunnerEventKind::State { state, .. } => Some(*state),
            _ => None,
        })
        .collect();
    assert!(
        states.ends_with(&[MachineState::Stopping, MachineState::Gone]),
        "{states:?}"
    );
}

async fn failure(runner: &Running) -> Finding {
    runner
        .event(|event| match event {
            RunnerEventKind::Failed { finding } => Some(finding.clone()),
            _ => None,
        })
        .await
}

/// Runs a VM to its end by itself.
async fn fails(place: &Place) -> Finding {
    let runner = place.start().await;
    let finding = failure(&runner).await;
    runner.ended().await;
    nothing_is_left(place, None);
    finding
}

#[tokio::test]
async fn the_console_is_there_from_the_first_byte_and_a_guest_that_powers_off_is_a_finding() {
    let place = Place::bare("hello from the guest\r\n", Then::PowerOff);
    let finding = fails(&place).await;
    assert_eq!(finding.cause, Cause::VmmExited, "{finding:?}");
    assert!(
        finding
            .evidence
            .iter()
            .any(|q| q.text.ends_with("hello from the guest")),
        "{finding:?}"
    );
    assert!(
        place
            .evidence("serial.log")
            .contains("hello from the guest\r\n")
    );
    let machine = place.evidence("machine.json");
    assert!(machine.contains("qemu-system-x86_64") && machine.contains("vestibule.stream"));
    // What the manifest declares is there for the diagnosis, which does not see the image.
    let declared: serde_json::Value = serde_json::from_str(&machine).unwrap();
    assert_eq!(declared["agentBuild"], "0".repeat(64));
    assert!(declared["requiredUnits"].is_array());
    let exit: vestibule_api::machine::Exit =
        serde_json::from_str(&place.evidence("exit.json")).unwrap();
    assert_eq!((exit.code, exit.asked), (Some(0), false));
}

#[tokio::test]
async fn a_kernel_panic_is_quoted() {
    let words = "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[    1.3] Rebooting\r\n";
    let finding = fails(&Place::bare(words, Then::PowerOff)).await;
    assert_eq!(finding.cause, Cause::KernelPanic);
    assert!(
        finding.evidence[0]
            .text
            .ends_with("Unable to mount root fs"),
        "{finding:?}"
    );
}

#[tokio::test]
async fn asked_to_stop_it_stops_and_tells_everybody_who_asked() {
    let place = Place::bare("up\n", Then::Halt);
    let runner = place.start().await;
    runner.state(MachineState::Booting).await;
    let view = runner.view().await;
    assert!(
        view.driver.starts_with("qemu/") && view.vmm_pid.is_some_and(alive),
        "{view:?}"
    );
    let (one, two) = tokio::join!(runner.stop(), runner.stop());
    assert!(one.complete && one == two, "{one:?}");
    let kinds: Vec<_> = one.items.iter().map(|i| i.kind.as_str()).collect();
    assert_eq!(
        kinds,
        ["process", "socket", "socket", "directory", "memory"]
    );
    runner.ended().await;
    nothing_is_left(&place, view.vmm_pid);
    assert!(place.evidence("machine.json").contains("the test is over"));
}

#[tokio::test]
async fn sigterm_is_a_stop_with_evidence() {
    let place = Place::bare("up\n", Then::Halt);
    let runner = place.start().await;
    runner.state(MachineState::Booting).await;
    signal(runner.process.id().unwrap(), Signal::TERM);
    runner.ended().await;
    nothing_is_left(&place, None);
    assert!(place.evidence("machine.json").contains("SIGTERM"));
}

#[tokio::test]
async fn a_stop_before_the_vmm_is_up_is_a_stop_too() {
    let place = Place::bare("up\n", Then::Halt);
    let runner = place.start().await;
    assert!(runner.stop().await.complete);
    runner.ended().await;
    nothing_is_left(&place, None);
}

/// A QEMU that says what it can do, and hangs when it is to run a VM.
#[tokio::test]
async fn a_stop_of_a_vmm_that_hangs_as_it_starts_names_it_and_waits_for_its_end() {
    let place = Place::bare("up\n", Then::Halt);
    let bin = place.home.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let hangs = bin.join(vestibule_vm::qemu::PROGRAM);
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *{}*) echo hangs >&2; exec sleep 600;; esac\nexec {} \"$@\"\n",
        place.spec.machine_id,
        qemu_program()
    );
    std::fs::write(&hangs, script).unwrap();
    std::fs::set_permissions(&hangs, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
    let runner = place
        .start_with(|command| {
            command.env("PATH", path);
        })
        .await;
    let log = Utf8Path::new(&place.spec.vm_dir).join("vmm.log");
    soon(async {
        // It has no other way to say that it runs.
        while !std::fs::read_to_string(&log).unwrap().contains("hangs") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let disposal = runner.stop().await;
    assert!(disposal.complete, "{disposal:?}");
    println!("{disposal:?} {}", place.evidence("vmm.log"));
    println!("{}", place.evidence("events.ndjson"));
    let first = &disposal.items[0];
    assert_eq!((first.kind.as_str(), first.gone), ("process", true));
    let vmm = first.name.strip_prefix("process group ").unwrap();
    let vmm = vmm.parse().unwrap();
    runner.ended().await;
    nothing_is_left(&place, Some(vmm));
    let machine: serde_json::Value = serde_json::from_str(&place.evidence("machine.json")).unwrap();
    assert!(machine["jail"].is_object(), "{machine}");
}

#[tokio::test]
async fn a_killed_vmm_is_named_with_its_signal() {
    let place = Place::bare("up\n", Then::Halt);
    let runner = place.start().await;
    runner.state(MachineState::Booting).await;
    let vmm = runner.view().await.vmm_pid.unwrap();
    signal(vmm, Signal::KILL);
    let finding = failure(&runner).await;
    assert_eq!((finding.cause, finding.retryable), (Cause::VmmExited, true));
    assert!(finding.why.contains("signal 9"), "{finding:?}");
    runner.ended().await;
    nothing_is_left(&place, Some(vmm));
}

#[tokio::test]
async fn a_killed_runner_takes_its_vmm_along() {
    let place = Place::bare("up\n", Then::Halt);
    let mut runner = place.start().await;
    runner.state(MachineState::Booting).await;
    let vmm = runner.view().await.vmm_pid.unwrap();
    runner.process.kill().await.unwrap();
    gone(vmm).await;
}

#[tokio::test]
async fn a_guest_without_an_agent_meets_the_boot_deadline() {
    let mut place = Place::bare("still booting\n", Then::Halt);
    place.spec.boot_deadline_s = 2;
    let finding = fails(&place).await;
    assert_eq!(finding.cause, Cause::StreamRefused, "{finding:?}");
    assert!(
        finding.evidence[0].text.ends_with("still booting"),
        "{finding:?}"
    );
}

#[tokio::test]
async fn a_vm_that_nobody_asks_for_ends_and_one_that_is_watched_does_not() {
    let mut place = Place::bare("up\n", Then::Halt);
    place.spec.idle_deadline_s = Some(1);
    let runner = place.start().await;
    let watching = runner.open("/events?after=0").await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(runner.view().await.state, MachineState::Booting);
    drop(watching);
    runner.ended().await;
    nothing_is_left(&place, None);
    assert!(place.evidence("machine.json").contains("idle"));
}

#[tokio::test]
async fn a_guest_that_talks_without_end_fills_no_disk() {
    let place = Place::bare(
        "the quick brown fox jumps over the lazy dog\r\n",
        Then::Repeat,
    );
    let runner = place.start().await;
    soon(async {
        while !runner.console().await.contains("bytes dropped here") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let on_disk: u64 = tree(Utf8Path::new(&place.spec.vm_dir))
        .iter()
        .map(|path| std::fs::metadata(path).unwrap().len())
        .sum();
    assert!(on_disk <= 3 * place.spec.console_keep_bytes, "{on_disk}");
    runner.stop().await;
    runner.ended().await;
    let serial = place.evidence("serial.log");
    assert!(
        serial.contains("bytes dropped here") && serial.len() < 16_000,
        "{}",
        serial.len()
    );
}

#[tokio::test]
async fn the_api_refuses_what_it_must() {
    let place = Place::bare("up\n", Then::Halt);
    let runner = place.start().await;
    let status = |err: Result<serde_json::Value, CallError>| err.unwrap_err().status().unwrap();
    let claim = |mode| Claim {
        session_id: SessionId::generate(),
        egress: EgressPolicy {
            mode,
            ..Default::default()
        },
    };
    let mut bad = claim(EgressMode::Open);
    bad.egress.upstream = Some("http://user:secret@proxy:1".into());
    let refused = soon(runner.client.call::<_, serde_json::Value>(
        Method::POST,
        "/claim",
        Some(&bad),
    ))
    .await;
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("400") && !refused.contains("secret"),
        "{refused}"
    );
    let view: MachineView = soon(runner.client.call(
        Method::POST,
        "/claim",
        Some(&claim(EgressMode::Open)),
    ))
    .await
    .unwrap();
    assert!(view.session_id.is_some());
    // The same session claims again, as a controller does that was killed in between; another one is refused.
    let again = Claim {
        session_id: view.session_id.unwrap(),
        ..claim(EgressMode::Open)
    };
    let repeated: MachineView = soon(runner.client.call(Method::POST, "/claim", Some(&again)))
        .await
        .unwrap();
    assert_eq!(repeated.session_id, view.session_id);
    let second = soon(
        runner
            .client
            .call(Method::POST, "/claim", Some(&claim(EgressMode::Open))),
    )
    .await;
    assert_eq!(status(second), StatusCode::CONFLICT);
    let exec = serde_json::json!({"argv": ["id"], "timeoutS": 1});
    let exec = soon(runner.client.call(Method::POST, "/agent/exec", Some(&exec))).await;
    assert_eq!(status(exec), StatusCode::FORBIDDEN);
    for (path, expected) in [
        ("/nope", StatusCode::NOT_FOUND),
        ("/stop", StatusCode::METHOD_NOT_ALLOWED),
        ("/events?after=x", StatusCode::BAD_REQUEST),
        ("/console?tail=-1", StatusCode::BAD_REQUEST),
        ("/view", StatusCode::UPGRADE_REQUIRED),
        ("/agent/health", StatusCode::SERVICE_UNAVAILABLE),
    ] {
        assert_eq!(
            status(soon(runner.client.get(path)).await),
            expected,
            "{path}"
        );
    }
    runner.stop().await;
    runner.ended().await;
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    // The kernel is none.
    let place = Place::bare("", Then::Halt);
    std::fs::write(
        Utf8Path::new(&place.spec.image_dir).join("vmlinuz"),
        b"not a kernel",
    )
    .unwrap();
    let finding = fails(&place).await;
    assert_eq!(finding.cause, Cause::VmmExited);
    assert!(finding.evidence[0].text.contains("kernel"), "{finding:?}");
    assert!(place.evidence("machine.json").contains("-nodefaults"));
    // An artifact is missing; the VM is too small; there is no VMM.
    let place = Place::bare("", Then::Halt);
    std::fs::remove_file(Utf8Path::new(&place.spec.image_dir).join("root.ext4")).unwrap();
    assert_eq!(fails(&place).await.cause, Cause::ImageMissing);
    let mut place = Place::bare("", Then::Halt);
    place.spec.memory_mib = 8;
    assert_eq!(fails(&place).await.cause, Cause::OutOfMemoryGuest);
    place.spec.driver = vestibule_api::machine::DriverChoice::Firecracker;
    place.spec.memory_mib = 32;
    assert_eq!(fails(&place).await.cause, Cause::VmmMissing);
}

#[tokio::test]
async fn a_home_deeper_than_a_socket_address_works() {
    let mut place = Place::bare("up\n", Then::Halt);
    let deep = place
        .home
        .path()
        .join("d".repeat(100))
        .join("e".repeat(100));
    place.spec.vm_dir = deep.into();
    place.spec.boot_deadline_s = 1;
    // The client's own path is too long as well, so the runner's evidence must tell.
    let runner = place.start_with(|_| ()).await;
    runner.ended().await;
    nothing_is_left(&place, None);
}

#[tokio::test]
async fn ten_lives_leave_nothing() {
    let place = Place::bare("up\n", Then::Halt);
    let before = tree(place.home.path());
    for _ in 0..10 {
        let runner = place.start().await;
        runner.state(MachineState::Booting).await;
        let vmm = runner.view().await.vmm_pid.unwrap();
        runner.stop().await;
        runner.ended().await;
        nothing_is_left(&place, Some(vmm));
    }
    let evidence = Utf8Path::new(&place.spec.evidence_dir);
    let beside: Vec<_> = tree(place.home.path())
        .into_iter()
        .filter(|path| !before.contains(path) && !path.starts_with(evidence.as_str()))
        .filter(|path| !evidence.as_str().starts_with(path.as_str()))
        .filter(|path| *path != place.home.path().join("vms"))
        .collect();
    assert!(beside.is_empty(), "{beside:?}");
}
