//! VMs that die at each step, hosts that refuse, people who leave: each ends in its own cause and leaves nothing.
use crate::{
    lifecycle::{FILE, SECRET, nothing_left, signing_in},
    pool::metrics,
    support::{
        api::{Api, bytes},
        home::Home,
        wait_for,
    },
};
use axum::http::StatusCode;
use serde_json::json;
use vestibule_api::{
    agent::LoginEvent,
    cause::Cause,
    egress::{EgressMode, EgressPolicy},
    finding::{Finding, Quote},
    ids::{MachineId, SessionId},
    machine::{
        Disposal, DisposedItem, Disposer, Exit, PROCESSES_MARK, ProcessMark, ProcessesMark,
        RunnerEventKind,
    },
    session::{Right, SessionEventKind, SessionState, SessionView},
};

fn cause(view: &SessionView) -> Cause {
    view.failure
        .as_ref()
        .unwrap()
        .finding
        .as_ref()
        .unwrap()
        .cause
}

fn finding(cause: Cause) -> Finding {
    let quote = Quote {
        source: "terminal".to_owned(),
        line: None,
        text: "access_denied".to_owned(),
    };
    Finding::new(cause, quote, "the page said so", "try again")
}

/// The receipt that the controller writes of a VM whose runner was killed, once it is whole.
async fn receipt(home: &Home, machine: MachineId) -> Disposal {
    let path = home.evidence(machine).join("disposal.json");
    let receipt = wait_for("a whole receipt", || async {
        let receipt: Disposal = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
        receipt.complete.then_some(receipt)
    })
    .await;
    assert_eq!(
        (receipt.machine_id, receipt.by),
        (machine, Disposer::Controller)
    );
    let directory = machine.to_string();
    for (kind, ends) in [("socket", "runner.sock"), ("directory", &directory)] {
        let is = |item: &DisposedItem| item.kind == kind && item.name.ends_with(ends);
        assert!(receipt.items.iter().any(is), "{kind}: {receipt:?}");
    }
    receipt
}

async fn failed(api: &Api, id: SessionId) -> SessionView {
    let view = api.until(id, SessionState::Failed).await;
    let events = api.events(id, 0, |_| false).await;
    let told = events
        .iter()
        .any(|event| matches!(event.event, SessionEventKind::Failure { .. }));
    assert!(told, "the timeline says why: {events:?}");
    view
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runner_that_dies_at_each_step() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;

    let id = api.start("codex").await;
    let runner = home.runner(api.machine(id).await).await;
    std::fs::write(
        format!("{}/runner.stderr", runner.spec.vm_dir),
        "booted\nqemu: out of luck\n",
    )
    .unwrap();
    let mut vmm = std::process::Command::new("true").spawn().unwrap();
    vmm.wait().unwrap();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap();
    let was = |pid| ProcessMark { pid, started: 1 };
    let mark = ProcessesMark {
        namespace: namespace.to_str().unwrap().to_owned(),
        runner: was(std::process::id()),
        vmm: Some(was(vmm.id())),
    };
    let path = format!("{}/{PROCESSES_MARK}", runner.spec.vm_dir);
    std::fs::write(path, serde_json::to_vec(&mark).unwrap()).unwrap();
    runner.die();
    let view = failed(api, id).await;
    let finding = view.failure.as_ref().unwrap().finding.clone().unwrap();
    assert_eq!(
        (finding.cause, finding.evidence[0].text.as_str()),
        (Cause::RunnerLost, "qemu: out of luck"),
        "starting"
    );
    nothing_left(&home).await;
    let saved = std::fs::read_to_string(
        home.evidence(view.machine_id.unwrap())
            .join("runner.stderr"),
    )
    .unwrap();
    assert!(saved.contains("out of luck"), "what it left was saved");
    let processes = receipt(&home, view.machine_id.unwrap()).await.items;
    let mut processes = processes.iter().filter(|item| item.kind == "process");
    for name in [
        format!("runner {}", std::process::id()),
        format!("process group {}", vmm.id()),
    ] {
        assert_eq!(processes.next().unwrap().name, name);
    }

    let (id, runner) = signing_in(&home, api).await;
    runner.die();
    assert_eq!(
        cause(&failed(api, id).await),
        Cause::RunnerLost,
        "awaiting the user"
    );
    nothing_left(&home).await;
    receipt(&home, runner.spec.machine_id).await;

    let (id, runner) = signing_in(&home, api).await;
    runner.login(LoginEvent::Captured {
        account: None,
        expires_at: None,
    });
    api.until(id, SessionState::Capturing).await;
    runner.die();
    assert_eq!(
        cause(&failed(api, id).await),
        Cause::RunnerLost,
        "capturing, nothing fetched"
    );
    nothing_left(&home).await;
    receipt(&home, runner.spec.machine_id).await;
    let vms = api.json("/api/vms?all=1").await;
    assert!(
        vms.as_array()
            .unwrap()
            .iter()
            .all(|vm| vm["state"] == "lost"),
        "{vms}"
    );
    let stage = Cause::RunnerLost.stage().id();
    let line = format!("vestibule_failures_total{{stage=\"{stage}\",cause=\"runner-lost\"}} ");
    let counted = || async {
        let all = metrics(api).await;
        let mut counts = all
            .lines()
            .filter(|l| l.starts_with("vestibule_failures_total{"));
        let sum = counts
            .clone()
            .filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok())
            .sum::<u64>();
        (sum >= 3).then(|| counts.next().map(str::to_owned))
    };
    assert_eq!(
        wait_for("three failures", counted).await,
        Some(format!("{line}3")),
        "each once"
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_runner_and_the_agent_find_is_the_sessions_verdict() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;

    let id = api.start("codex").await;
    let runner = home.runner(api.machine(id).await).await;
    runner.fail(finding(Cause::DisplayNotReady));
    assert_eq!(cause(&failed(api, id).await), Cause::DisplayNotReady);

    let (id, runner) = signing_in(&home, api).await;
    runner.login(LoginEvent::Failed {
        finding: finding(Cause::ConsentDenied),
    });
    let view = failed(api, id).await;
    assert_eq!(cause(&view), Cause::ConsentDenied);
    nothing_left(&home).await;
    let path = format!("/api/vms/{}/verdict", view.machine_id.unwrap());
    let verdict = wait_for("the verdict", || async {
        let reply = api.get(&path).await;
        let verdict: serde_json::Value = reply.json().await.unwrap();
        (verdict["finding"]["cause"] == "consent-denied").then_some(verdict)
    });
    assert!(
        verdict.await["lookedAt"].as_array().unwrap().len() > 1,
        "the bundle was looked at, too"
    );

    let (id, runner) = signing_in(&home, api).await;
    runner.say(RunnerEventKind::Ended {
        exit: Exit {
            signal: Some(9),
            ..Exit::default()
        },
    });
    assert_eq!(cause(&failed(api, id).await), Cause::VmmExited);
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_refuses_names_its_cause() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let id = api.start("codex").await;
    let runner = home.runner(api.machine(id).await).await;
    *runner.login_status.lock().unwrap() = StatusCode::UNPROCESSABLE_ENTITY;
    runner.up();
    assert_eq!(cause(&failed(api, id).await), Cause::ToolFailed);
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_that_is_none_is_not_sealed() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    for path in ["../../etc/passwd", "/etc/passwd"] {
        let (id, runner) = signing_in(&home, api).await;
        runner.capture(path, SECRET);
        let view = failed(api, id).await;
        assert_eq!(
            (cause(&view), view.credential_id),
            (Cause::CredentialInvalid, None),
            "{path}"
        );
    }
    assert_eq!(api.json("/api/credentials").await, json!([]));
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_refuses_says_what() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    for (kind, expected) in [
        (std::io::ErrorKind::StorageFull, Cause::HostDiskFull),
        (std::io::ErrorKind::PermissionDenied, Cause::LaunchRefused),
    ] {
        *home.runners.refuse.lock().unwrap() = Some(kind);
        let id = api.start("codex").await;
        assert_eq!(cause(&failed(api, id).await), expected);
        nothing_left(&home).await;
    }
    // A file where the evidence should go: not even root can write below it.
    std::fs::remove_dir_all(home.path().join("evidence")).unwrap();
    std::fs::write(home.path().join("evidence"), "").unwrap();
    let id = api.start("codex").await;
    assert_eq!(cause(&failed(api, id).await), Cause::LaunchRefused);
    wait_for("its place to be free", || async {
        (api.json("/api/vms").await == json!([])).then_some(())
    })
    .await;
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evidence_that_can_not_be_written_keeps_no_vm() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    let evidence = home.evidence(runner.spec.machine_id);
    std::fs::create_dir(evidence.join("session.json")).unwrap();
    runner.capture(FILE, SECRET);
    api.until(id, SessionState::Completed).await;
    nothing_left(&home).await;
    wait_for("the place to be free", || async {
        (api.json("/api/vms").await == json!([])).then_some(())
    })
    .await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_little_disk_and_no_image_start_nothing() {
    let home = Home::with("[limits]\nmin_free_mib = 999999999\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let id = api.start("codex").await;
    assert_eq!(cause(&failed(api, id).await), Cause::HostDiskFull);
    let ready = api.get("/ready").await;
    assert_eq!(ready.status(), 503);
    let ready: serde_json::Value = ready.json().await.unwrap();
    let checks = ready["checks"].as_array().unwrap();
    let disk = checks
        .iter()
        .find(|check| check["name"] == "disk-space")
        .unwrap();
    assert!(
        disk["ok"] == false && disk["fix"].as_str().unwrap().contains("make room"),
        "{disk}"
    );

    home.remove_alias();
    let reply = api
        .post("/api/auth/start", &json!({ "provider": "codex" }))
        .await;
    assert_eq!(reply.status(), 503);
    let error: serde_json::Value = reply.json().await.unwrap();
    assert_eq!(error["error"]["code"], "image_missing");
    assert_eq!(error["error"]["finding"]["cause"], "image-missing");
    assert!(
        error["error"]["fix"]
            .as_str()
            .unwrap()
            .contains("vestibule image build")
    );
    assert_eq!(*home.runners.launches.lock().unwrap(), 0);
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_end_what_nobody_ends() {
    let home = Home::with("[limits]\nvms = 1\n[deadlines]\nplacing_s = 1\nlogin_start_s = 1\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let blocker = api.start("codex").await;
    let runner = home.runner(api.machine(blocker).await).await;
    let waiting = api.start("codex").await;
    let view = failed(api, waiting).await;
    assert_eq!(cause(&view), Cause::Deadline, "no place in time");
    let why = view.failure.unwrap().finding.unwrap().evidence[0]
        .text
        .clone();
    assert!(why.contains("waiting for a free place"), "{why}");

    *runner.login_status.lock().unwrap() = StatusCode::SERVICE_UNAVAILABLE;
    runner.up();
    assert_eq!(
        cause(&failed(api, blocker).await),
        Cause::Deadline,
        "the tool did not start"
    );
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_who_leaves() {
    let home = Home::new();
    // A pack of the operator's own, with the shortest time for a sign-in.
    std::fs::create_dir(home.path().join("providers")).unwrap();
    let pack = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../providers/codex.toml"
    ))
    .unwrap();
    let mut lines: Vec<String> = pack.lines().map(str::to_owned).collect();
    for line in &mut lines {
        if line.starts_with("timeout_s") {
            *line = "timeout_s = 10".to_owned();
        }
        if line.starts_with("for_s") {
            *line = "for_s = 5".to_owned();
        }
    }
    std::fs::write(home.path().join("providers/codex.toml"), lines.join("\n")).unwrap();
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, _) = signing_in(&home, api).await;
    let view = api.until(id, SessionState::Expired).await;
    assert_eq!(cause(&view), Cause::PersonLeft);
    nothing_left(&home).await;
    controller.stop().await;
}

/// The agent's clock is the first to end a sign-in; who was there decides what that means.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_with_and_without_a_viewer() {
    let home = Home::new();
    let controller = home.serve().await;
    let api = &controller.api;
    for (watched, expected) in [(false, Cause::PersonLeft), (true, Cause::Deadline)] {
        let (id, runner) = signing_in(&home, api).await;
        let viewer = if watched {
            let mut view = api.view(id, Right::View).await;
            assert!(bytes(&mut view).await.is_some());
            Some(view)
        } else {
            None
        };
        let quote = Quote {
            source: "terminal".to_owned(),
            line: None,
            text: "Waiting for the browser".to_owned(),
        };
        let finding = Finding::new(Cause::Deadline, quote, "too late", "again");
        runner.login(LoginEvent::Failed { finding });
        let view = failed(api, id).await;
        assert_eq!(cause(&view), expected);
        drop(viewer);
    }
    nothing_left(&home).await;
    controller.stop().await;
}

/// Nothing leaves a VM before its session claims it, and the claim brings what the flow may reach.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_way_out_opens_with_the_claim() {
    let home = Home::with("[egress]\nmode = 'allow-list'\n");
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    assert_eq!(runner.spec.egress, EgressPolicy::default());
    let claims = runner.claims.lock().unwrap().clone();
    assert_eq!((claims.len(), claims[0].session_id), (1, id));
    assert_eq!(claims[0].egress.mode, EgressMode::AllowList);
    assert!(
        claims[0]
            .egress
            .hosts
            .iter()
            .any(|h| h == "auth.openai.com")
    );
    controller.stop().await;

    // A way out that the runner refuses ends the sign-in with its words.
    let home =
        Home::with("[egress]\nmode = 'allow-list'\n[providers.codex]\nhosts = ['refused.test']\n");
    let controller = home.serve().await;
    let id = controller.api.start("codex").await;
    let runner = home.runner(controller.api.machine(id).await).await;
    runner.up();
    let view = failed(&controller.api, id).await;
    assert_eq!(cause(&view), Cause::LaunchRefused);
    assert!(runner.logins.lock().unwrap().is_empty());
    nothing_left(&home).await;
    controller.stop().await;
}

/// Another program that holds the database: whoever asks hears so by name, and nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_held_is_named() {
    use sqlx::{Connection as _, Executor as _};
    let home = Home::on("sqlite", "");
    let controller = home.serve().await;
    let api = &controller.api;
    let (id, runner) = signing_in(&home, api).await;
    sqlx::any::install_default_drivers();
    let url = format!("sqlite://{}", home.path().join("vestibule.db"));
    let mut other = sqlx::AnyConnection::connect(&url).await.unwrap();
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    runner.capture(FILE, SECRET);
    let reply = api
        .post("/api/auth/start", &json!({ "provider": "codex" }))
        .await;
    assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(reply.headers()["retry-after"], "5");
    let body: serde_json::Value = reply.json().await.unwrap();
    assert_eq!(body["error"]["code"], "unavailable");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.contains("database is busy"), "{message}");
    // What only reads goes on.
    assert_eq!(api.session(id).await.state, SessionState::AwaitingUser);
    other.execute("ROLLBACK").await.unwrap();
    let view = api.until(id, SessionState::Completed).await;
    assert!(view.credential_id.is_some());
    nothing_left(&home).await;
    controller.stop().await;
}

/// A host without descriptors, as the kernel says it: the session's cause names them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_descriptors_is_named() {
    let home = Home::new();
    let controller = home.serve().await;
    *home.runners.refuse_os.lock().unwrap() = Some(24);
    let id = controller.api.start("codex").await;
    let view = failed(&controller.api, id).await;
    let finding = view.failure.unwrap().finding.unwrap();
    assert_eq!(finding.cause, Cause::LaunchRefused);
    assert!(finding.why.contains("file descriptor"), "{}", finding.why);
    assert!(finding.retryable && finding.fix.contains("LimitNOFILE"));
    assert!(finding.evidence[0].text.contains("Too many open files"));
    nothing_left(&home).await;
    controller.stop().await;
}
