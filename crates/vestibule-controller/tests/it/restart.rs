//! Controllers that are killed or stopped, and those that come after them on the same home directory.
use crate::{
    lifecycle::{FILE, SECRET, nothing_left, signing_in},
    support::{home::Home, wait_for},
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use vestibule_api::{
    agent::LoginEvent,
    egress::EgressPolicy,
    ids::{MachineId, SessionId},
    machine::{DriverChoice, JailSpec, MemoryBackend, VmSpec},
    session::SessionState,
};

fn spec(home: &Home, session_id: Option<SessionId>) -> VmSpec {
    let machine_id = MachineId::generate();
    std::fs::create_dir_all(home.evidence(machine_id)).unwrap();
    VmSpec {
        machine_id,
        session_id,
        image_digest: "c".repeat(64).parse().unwrap(),
        image_dir: String::new(),
        driver: DriverChoice::Auto,
        memory_mib: 256,
        vcpus: 1,
        vm_dir: home
            .path()
            .join("vms")
            .join(machine_id.to_string())
            .into_string(),
        evidence_dir: home.evidence(machine_id).into_string(),
        egress: EgressPolicy::default(),
        boot_deadline_s: 60,
        console_keep_bytes: 1 << 16,
        idle_deadline_s: None,
        restore: None,
        save_to: None,
        jail: JailSpec::default(),
        cache_dir: None,
        memory_backend: MemoryBackend::default(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_every_step_the_sign_in_still_completes() {
    let home = Home::new();
    let controller = home.serve().await;
    let id = controller.api.start("codex").await;
    controller.kill().await;

    let controller = home.serve().await;
    let runner = home.runner(controller.api.machine(id).await).await;
    controller.kill().await;
    runner.up();

    let controller = home.serve().await;
    controller.api.until(id, SessionState::AwaitingUser).await;
    controller.kill().await;
    runner.login(LoginEvent::UserCode {
        code: "ABCD-1234".to_owned(),
    });

    let controller = home.serve().await;
    let code = wait_for("the code", || async {
        controller.api.session(id).await.user_code
    })
    .await;
    assert_eq!(
        code, "ABCD-1234",
        "from the runner's events, not from a disk"
    );
    controller.kill().await;
    runner.capture(FILE, SECRET);

    let controller = home.serve().await;
    controller.api.until(id, SessionState::Completed).await;
    controller.kill().await;

    let controller = home.serve().await;
    nothing_left(&home).await;
    let events = controller.api.events(id, 0, |_| false).await;
    assert!(
        events.iter().zip(1..).all(|(event, seq)| event.seq == seq),
        "no gap, no repeat: {events:?}"
    );
    assert_eq!(*home.runners.launches.lock().unwrap(), 1);
    assert_eq!(runner.logins.lock().unwrap().len(), 1);
    assert_eq!(
        controller
            .api
            .json("/api/credentials")
            .await
            .as_array()
            .unwrap()
            .len(),
        1
    );
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_moments_nothing_is_lost_or_done_twice() {
    for delay_ms in [0, 3, 7, 12, 20, 35, 60, 90] {
        let home = Home::new();
        let controller = home.serve().await;
        let id = controller.api.start("codex").await;
        tokio::time::sleep(std::time::Duration::from_millis(delay_ms)).await;
        controller.kill().await;
        let controller = home.serve().await;
        let runner = home.runner(controller.api.machine(id).await).await;
        runner.up();
        runner.capture(FILE, SECRET);
        tokio::time::sleep(std::time::Duration::from_millis(delay_ms)).await;
        controller.kill().await;
        let controller = home.serve().await;
        let view = controller.api.until(id, SessionState::Completed).await;
        assert!(view.credential_id.is_some());
        nothing_left(&home).await;
        assert_eq!(
            *home.runners.launches.lock().unwrap(),
            1,
            "after {delay_ms} ms"
        );
        let audit = std::fs::read_to_string(home.path().join("vault/audit.log")).unwrap();
        assert_eq!(
            audit.matches("\"stored\"").count(),
            1,
            "after {delay_ms} ms"
        );
        controller.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_died_while_no_controller_ran() {
    let home = Home::new();
    let controller = home.serve().await;
    let (id, runner) = signing_in(&home, &controller.api).await;
    controller.stop().await;
    assert!(runner.is_alive(), "a stop leaves VMs alone");
    runner.die();
    let controller = home.serve().await;
    let view = controller.api.until(id, SessionState::Failed).await;
    assert_eq!(
        view.failure.unwrap().finding.unwrap().cause.id(),
        "runner-lost"
    );
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_shown_and_orphans_are_ended() {
    let home = Home::new();
    std::fs::create_dir_all(home.path().join("vms")).unwrap();
    let by_hand = home.runners.start(spec(&home, None));
    let orphan = home.runners.start(spec(&home, Some(SessionId::generate())));
    let dead = home.runners.start(spec(&home, None));
    dead.die();
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::open(&dead.spec.vm_dir)
        .unwrap()
        .set_modified(old)
        .unwrap();

    let controller = home.serve().await;
    wait_for("the orphan's end", || async {
        (!orphan.is_alive()).then_some(())
    })
    .await;
    wait_for("the leftover's end", || async {
        (!std::fs::exists(&dead.spec.vm_dir).unwrap()).then_some(())
    })
    .await;
    assert_eq!(*orphan.stops.lock().unwrap(), ["no session owns it"]);
    let vms = wait_for("the stranger", || async {
        let vms = controller.api.json("/api/vms").await;
        let alone = vms.as_array().unwrap().len() == 1;
        let stranger = vms[0]["machineId"] == json!(by_hand.spec.machine_id);
        (alone && stranger).then_some(vms)
    })
    .await;
    assert_eq!(vms[0]["sessionId"], json!(null));
    assert!(by_hand.is_alive());
    let path = format!("/api/vms/{}", by_hand.spec.machine_id);
    let reply = controller
        .api
        .request(reqwest::Method::DELETE, &path)
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), 204);
    nothing_left(&home).await;
    controller.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_controller_for_one_home() {
    let home = Home::new();
    let controller = home.serve().await;
    let address = std::fs::read_to_string(home.path().join("address")).unwrap();
    assert_eq!(address.trim(), controller.serving.address.to_string());
    let mut config = vestibule_controller::Config::load(None, home.path()).unwrap();
    config.listen = "127.0.0.1:0".parse().unwrap();
    let second = vestibule_controller::serve(config.clone(), async {}, |_| {})
        .await
        .unwrap_err();
    assert!(
        second.to_string().contains("another controller"),
        "{second}"
    );
    controller.stop().await;
    assert!(!home.path().join("address").exists());
    config.listen = "0.0.0.0:0".parse().unwrap();
    let refused = vestibule_controller::serve(config, async {}, |_| {})
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("without TLS"), "{refused}");
}

/// A request whose body is still on its way when the controller is told to stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_under_way_when_it_stops_is_answered() {
    let home = Home::with("[pool]\nbrowser = 0\n");
    let controller = home.serve().await;
    let (address, token) = (controller.serving.address, controller.api.token.clone());
    let body = json!({ "name": "late" }).to_string();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /api/organisations HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // Said when somebody reads the body (RFC 9110 section 10.1.1): the request is with its handler.
    let go_on = b"HTTP/1.1 100 Continue\r\n\r\n";
    let mut said = vec![0; go_on.len()];
    stream.read_exact(&mut said).await.unwrap();
    assert_eq!(said, go_on);
    let finish = async {
        wait_for("the end of listening", || async {
            TcpStream::connect(address).await.err()
        })
        .await;
        stream.write_all(body.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    };
    let (reply, ()) = tokio::join!(finish, controller.stop());
    assert!(reply.starts_with("HTTP/1.1 201 "), "{reply}");
    assert!(reply.contains("connection: close"), "{reply}");

    // And it was carried out.
    let controller = home.serve().await;
    let organisations = controller.api.json("/api/organisations").await;
    assert_eq!(organisations[0]["name"], "late", "{organisations}");
    controller.stop().await;
}
