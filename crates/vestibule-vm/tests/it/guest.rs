//! A real guest: the image in `VESTIBULE_TEST_IMAGE` boots under the runner, its agent answers, and what it tries on its
//! way out is what the proxy permits.
use crate::support::{Place, Running, soon};
use camino::Utf8PathBuf;
use http_body_util::Full;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::time::{Duration, Instant};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use vestibule_api::{
    agent::{ExecReply, ExecRequest, ExecUser, Health, Report},
    egress::{EgressMode, EgressPolicy, EgressReason, Pin},
    image::Manifest,
    machine::{MachineState, Phase, RunnerEventKind},
};

fn image() -> Utf8PathBuf {
    let image = std::env::var("VESTIBULE_TEST_IMAGE");
    image
        .expect("VESTIBULE_TEST_IMAGE names an image's directory")
        .into()
}

pub(crate) fn manifest_of() -> Manifest {
    let manifest = std::fs::read(image().join("manifest.json")).unwrap();
    serde_json::from_slice(&manifest).unwrap()
}

/// A place with the image that the environment names.
pub(crate) fn place(egress: EgressPolicy) -> Place {
    let home = camino_tempfile::tempdir().unwrap();
    let mut place = Place::new(home, &image(), manifest_of().default_memory_mib);
    place.spec.vcpus = 2;
    place.spec.egress = egress;
    place.spec.boot_deadline_s = 240;
    place.spec.console_keep_bytes = 256 << 10;
    place
}

pub(crate) async fn exec(runner: &Running, script: &str) -> ExecReply {
    run_in(runner, ExecUser::Root, script, 50).await
}

pub(crate) async fn run_in(
    runner: &Running,
    user: ExecUser,
    script: &str,
    timeout_s: u32,
) -> ExecReply {
    let request = ExecRequest {
        argv: ["bash", "-c", script].map(str::to_owned).into(),
        user,
        stdin: String::new(),
        timeout_s,
    };
    let call = runner
        .client
        .call(Method::POST, "/agent/exec", Some(&request));
    tokio::time::timeout(Duration::from_secs(u64::from(timeout_s) + 10), call)
        .await
        .expect("it took too long")
        .unwrap()
}

/// What the proxy answers to one raw request from inside the guest: the status line.
async fn ask(runner: &Running, request: &str) -> String {
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/3128; printf '{request}\\r\\n\\r\\n' >&3; IFS= read -r -t 30 line <&3; echo \"$line\""
    );
    let reply = exec(runner, &script).await;
    format!("{}{}", reply.stdout, reply.stderr)
        .trim()
        .to_owned()
}

/// A server on the host's loopback that sends so many zeros to whoever connects.
async fn source(bytes: usize) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                let chunk = vec![0; 64 << 10];
                for _ in 0..bytes / chunk.len() {
                    if stream.write_all(&chunk).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "boots a real image: set VESTIBULE_TEST_IMAGE, run with --ignored"]
async fn a_guest_boots_answers_and_leaves_by_the_proxy_only() {
    const BYTES: usize = 64 << 20;
    let to = source(BYTES).await;
    let pin = Pin {
        host: "source.test".into(),
        port: Some(80),
        to,
    };
    let policy = EgressPolicy {
        mode: EgressMode::Open,
        pins: vec![pin],
        ..Default::default()
    };
    let place = place(policy);
    let begun = Instant::now();
    let runner = place.start().await;
    runner.state(MachineState::Up).await;
    println!("start to up: {:.1} s", begun.elapsed().as_secs_f64());
    let view = runner.view().await;
    assert!(view.health.is_some() && view.ready_at.is_some(), "{view:?}");
    let health: Health = soon(runner.client.get("/agent/health")).await.unwrap();
    assert_eq!(Some(&health.build), view.health.as_ref().map(|h| &h.build));

    refusals(&runner, &to.to_string()).await;
    isolation(&runner).await;
    throughput(&runner, BYTES).await;
    terminal(&runner).await;
    screen(&runner).await;
    agent_restarts(&runner).await;

    runner.stop().await;
    runner.ended().await;
    let report: Report = serde_json::from_str(&place.evidence("report.json")).unwrap();
    assert!(!report.kernel.is_empty(), "{report:?}");
    let phases: Vec<_> = place
        .events()
        .iter()
        .filter_map(|e| match e.event {
            RunnerEventKind::Phase { phase } => Some(phase),
            _ => None,
        })
        .collect();
    let ready = phases.iter().position(|p| *p == Phase::Ready).unwrap();
    assert!(phases[..=ready].is_sorted(), "{phases:?}");
}

async fn refusals(runner: &Running, server: &str) {
    for (target, reason) in [
        (server, "loopback"),
        ("localhost:22", "loopback"),
        ("[::1]:80", "loopback"),
        ("[::ffff:127.0.0.1]:80", "loopback"),
        ("2130706433:80", "loopback"),
        ("169.254.169.254:80", "link-local"),
        ("[::ffff:a9fe:a9fe]:80", "link-local"),
        ("10.0.0.1:80", "private"),
        ("192.168.1.1:80", "private"),
        ("[fd00::1]:80", "private"),
        ("[fe80::1]:80", "link-local"),
    ] {
        let line = ask(
            runner,
            &format!("CONNECT {target} HTTP/1.1\\r\\nHost: {target}"),
        )
        .await;
        assert!(
            line.contains(" 403 ") && line.contains(reason),
            "{target}: {line}"
        );
        let line = ask(
            runner,
            &format!("GET http://{target}/ HTTP/1.1\\r\\nHost: {target}"),
        )
        .await;
        assert!(
            line.contains(" 403 ") && line.contains(reason),
            "{target}: {line}"
        );
    }
    runner
        .event(|event| match event {
            RunnerEventKind::Egress {
                host,
                reason: EgressReason::LinkLocal,
                ..
            } => (host == "169.254.169.254").then_some(()),
            _ => None,
        })
        .await;
    assert!(runner.view().await.egress.refused >= 22);
}

/// The guest has no card, and no way but the proxy.
async fn isolation(runner: &Running) {
    let links = exec(runner, "ls /sys/class/net; cat /proc/net/route")
        .await
        .stdout;
    let cards: Vec<_> = links
        .lines()
        .take_while(|l| !l.starts_with("Iface"))
        .collect();
    assert!(
        cards.iter().all(|card| ["lo", "dummy0"].contains(card)),
        "{links}"
    );
    let direct = exec(
        runner,
        "timeout 5 bash -c 'exec 3<>/dev/tcp/1.1.1.1/443' && echo reached",
    )
    .await;
    assert!(!direct.stdout.contains("reached"), "{direct:?}");
}

async fn throughput(runner: &Running, bytes: usize) {
    let script = "exec 3<>/dev/tcp/127.0.0.1/3128; printf 'CONNECT source.test:80 HTTP/1.1\\r\\n\\r\\n' >&3; \
                  IFS= read -r line <&3; IFS= read -r line <&3; echo go >&3; dd bs=64k <&3 2>/dev/null | wc -c";
    let begun = Instant::now();
    let reply = exec(runner, script).await;
    let took = begun.elapsed();
    let got: usize = reply
        .stdout
        .trim()
        .parse()
        .unwrap_or_else(|_| panic!("{reply:?}"));
    assert!(got >= bytes, "{got}");
    println!(
        "host to guest through proxy and stream: {:.1} MiB/s",
        (bytes >> 20) as f64 / took.as_secs_f64()
    );
}

/// An upgrade through the runner: the agent's terminal is a WebSocket.
async fn terminal(runner: &Running) {
    let request = Request::builder()
        .uri("/agent/terminal?right=view")
        .header("host", "vestibule")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .body(Full::default())
        .unwrap();
    let reply = soon(runner.client.open(request)).await.unwrap();
    assert_eq!(reply.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(
        reply.headers()["sec-websocket-accept"],
        "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    );
    let upgraded = TokioIo::new(hyper::upgrade::on(reply).await.unwrap());
    let mut socket = tokio_tungstenite::WebSocketStream::from_raw_socket(
        upgraded,
        tokio_tungstenite::tungstenite::protocol::Role::Client,
        None,
    )
    .await;
    // It closes in both directions.
    tokio::time::timeout(Duration::from_secs(20), socket.close(None))
        .await
        .unwrap()
        .unwrap();
}

/// A view counts as a viewer for as long as it is open. An image without a screen closes it at once.
async fn screen(runner: &Running) {
    let request = Request::builder()
        .uri("/view")
        .header("host", "vestibule")
        .header("connection", "Upgrade")
        .header("upgrade", "rfb")
        .body(Full::default())
        .unwrap();
    let reply = soon(runner.client.open(request)).await.unwrap();
    assert_eq!(reply.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut upgraded = TokioIo::new(hyper::upgrade::on(reply).await.unwrap());
    let mut banner = Vec::new();
    let mut first = [0; 12];
    if let Ok(n @ 1..) = soon(upgraded.read(&mut first)).await {
        banner.extend_from_slice(&first[..n]);
        assert!(banner.starts_with(b"RFB "), "{banner:?}");
    }
    drop(upgraded);
    let viewers = |wanted| {
        runner.event(move |event| match event {
            RunnerEventKind::Viewers { count } if *count == wanted => Some(()),
            _ => None,
        })
    };
    viewers(1).await;
    viewers(0).await;
}

/// An agent that dies is started again by systemd, and the runner finds it again.
async fn agent_restarts(runner: &Running) {
    let request = ExecRequest {
        argv: ["bash", "-c", "kill -9 $PPID"].map(str::to_owned).into(),
        user: ExecUser::Root,
        stdin: String::new(),
        timeout_s: 5,
    };
    let begun = Instant::now();
    // The reply dies with the agent.
    let _ = soon(
        runner
            .client
            .call::<_, ExecReply>(Method::POST, "/agent/exec", Some(&request)),
    )
    .await;
    let ups = std::cell::Cell::new(0);
    runner
        .event(|event| match event {
            RunnerEventKind::Phase {
                phase: Phase::AgentUp,
            } => {
                ups.set(ups.get() + 1);
                (ups.get() == 2).then_some(())
            }
            _ => None,
        })
        .await;
    println!(
        "a killed agent was back after {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let health: Health = soon(runner.client.get("/agent/health")).await.unwrap();
    assert!(!health.build.is_empty());
    assert_eq!(runner.view().await.state, MachineState::Up);
}
