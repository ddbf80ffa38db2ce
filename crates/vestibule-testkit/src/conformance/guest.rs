//! One VM from its boot to its snapshot: what is asked of it, and what it leaves.
use super::{
    Suite,
    copies::Saving,
    jail,
    vm::{CONSOLE_KEEP, Running, Vm, soon},
};
use anyhow::{Context, Result, ensure};
use http_body_util::Full;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::{
    cell::Cell,
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use vestibule_api::{
    agent::{Health, Report},
    egress::{EgressMode, EgressPolicy, EgressReason, Pin},
    machine::{Exit, MachineState, Phase, RestoreSpec, RunnerEventKind},
};

/// What one answer through the way out has at least.
const BYTES: usize = 4 << 20;
/// How far the clock is put back before the save.
const OLD_DAYS: u32 = 7;

/// Boots, asks, saves. None where there is no snapshot to go on with.
pub(super) async fn whole_life(suite: &mut Suite) -> Option<RestoreSpec> {
    let source = suite.case("a server of the host's", source()).await?.0;
    let mut vm = suite.vm().ok()?;
    vm.spec.egress = EgressPolicy {
        mode: EgressMode::Open,
        pins: vec![Pin {
            host: "source.test".into(),
            port: Some(80),
            to: source,
        }],
        ..EgressPolicy::default()
    };
    let saving = Saving::of(&mut vm);
    let running = suite.case("boot", boot(&vm)).await?;
    suite
        .case(
            "stream: health and build",
            stream(suite_build(suite), &running),
        )
        .await;
    suite.case("report", report(&running)).await;
    suite.case("no core dumps", jail::dumps(&running)).await;
    suite
        .case("screen", screen(&running, has_display(suite)))
        .await;
    suite.case("terminal, an upgrade", terminal(&running)).await;
    suite
        .case("way out: refused", refused(&running, source))
        .await;
    suite.case("way out: allowed", allowed(&running)).await;
    suite
        .case("way out: there is no other", no_other_way(&running))
        .await;
    suite
        .case("limits: a console that floods", floods(&vm, &running))
        .await;
    suite
        .case(
            "limits: a guest that fills its memory",
            fills(&vm, &running),
        )
        .await;
    suite
        .case("stream: the agent is killed", agent_killed(&running))
        .await;
    let vmm = running.vmm().await.ok();
    let old = running.exec(&format!("date -s '-{OLD_DAYS} days'")).await;
    let saved = suite.case("snapshot", saving.save(running)).await;
    suite
        .case("evidence and disposal after a save", evidence(&vm, vmm))
        .await;
    if old.is_err() {
        return None;
    }
    saved.map(|saved| saved.0)
}

fn suite_build(suite: &Suite) -> String {
    suite.manifest.agent_build.clone()
}

fn has_display(suite: &Suite) -> bool {
    suite.manifest.features.iter().any(|f| f == "display")
}

struct Source(SocketAddr);

impl super::Noted for Source {}

/// A server on the host's loopback that sends zeros to whoever asks.
async fn source() -> Result<Source> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                let chunk = vec![0; 64 << 10];
                for _ in 0..BYTES / chunk.len() {
                    if stream.write_all(&chunk).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(Source(address))
}

async fn boot(vm: &Vm) -> Result<Running> {
    let running = vm.up().await?;
    let view = running.view().await?;
    ensure!(view.health.is_some() && view.ready_at.is_some(), "{view:?}");
    ensure!(vm.spec.driver.takes(&view.driver), "{view:?}");
    Ok(running)
}

async fn stream(build: String, running: &Running) -> Result<()> {
    let health: Health = soon("the agent", running.client.get("/agent/health")).await??;
    ensure!(health.build == build, "{health:?}");
    Ok(())
}

async fn report(running: &Running) -> Result<String> {
    let report: Report = soon("the report", running.client.get("/agent/report")).await??;
    ensure!(
        !report.kernel.is_empty() && !report.units.is_empty(),
        "{report:?}"
    );
    Ok(format!("Linux {}", report.kernel))
}

/// A view counts as a viewer for as long as it is open. Without a screen in the image, it is closed at once.
async fn screen(running: &Running, display: bool) -> Result<String> {
    let request = Request::builder()
        .uri("/view")
        .header("host", "vestibule")
        .header("connection", "Upgrade")
        .header("upgrade", "rfb")
        .body(Full::default())?;
    let reply = soon("the view", running.client.open(request)).await??;
    ensure!(
        reply.status() == StatusCode::SWITCHING_PROTOCOLS,
        "{reply:?}"
    );
    let mut upgraded = TokioIo::new(hyper::upgrade::on(reply).await?);
    let mut first = [0; 12];
    let read = soon("the screen", upgraded.read_exact(&mut first)).await?;
    if display {
        read?;
        ensure!(first.starts_with(b"RFB 003."), "{first:?}");
    } else {
        ensure!(read.is_err(), "a screen that is not there says {first:?}");
    }
    drop(upgraded);
    for wanted in [1, 0] {
        running
            .event(|event| {
                matches!(event, RunnerEventKind::Viewers { count } if *count == wanted)
                    .then_some(())
            })
            .await?;
    }
    Ok(if display {
        String::from_utf8_lossy(&first).trim().to_owned()
    } else {
        String::from("the image has none: the view is opened, counted, and closed")
    })
}

/// The agent's terminal is a WebSocket: an upgrade through the runner, and bytes both ways.
async fn terminal(running: &Running) -> Result<()> {
    let request = Request::builder()
        .uri("/agent/terminal?right=view")
        .header("host", "vestibule")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .body(Full::default())?;
    let reply = soon("the terminal", running.client.open(request)).await??;
    ensure!(
        reply.status() == StatusCode::SWITCHING_PROTOCOLS,
        "{reply:?}"
    );
    let accept = reply.headers().get("sec-websocket-accept");
    ensure!(
        accept.is_some_and(|accept| accept == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "{reply:?}"
    );
    let upgraded = TokioIo::new(hyper::upgrade::on(reply).await?);
    let mut socket = tokio_tungstenite::WebSocketStream::from_raw_socket(
        upgraded,
        tokio_tungstenite::tungstenite::protocol::Role::Client,
        None,
    )
    .await;
    soon("the terminal to close", socket.close(None)).await??;
    Ok(())
}

/// The status lines that the proxy answers to these requests from inside the guest.
async fn ask(running: &Running, requests: &[String]) -> Result<Vec<String>> {
    use std::fmt::Write as _;
    let mut script = String::new();
    for request in requests {
        writeln!(
            script,
            "exec 3<>/dev/tcp/127.0.0.1/3128; printf '{request}\\r\\n\\r\\n' >&3; \
             IFS= read -r -t 30 line <&3; echo \"$line\"; exec 3>&-"
        )?;
    }
    let reply = running.exec(&script).await?;
    let lines: Vec<_> = reply.stdout.lines().map(str::to_owned).collect();
    ensure!(lines.len() == requests.len(), "{reply:?}");
    Ok(lines)
}

async fn refused(running: &Running, server: SocketAddr) -> Result<String> {
    let before = running.view().await?.egress.refused;
    let server = server.to_string();
    let targets = [
        (server.as_str(), "loopback"),
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
    ];
    let requests: Vec<_> = targets
        .iter()
        .flat_map(|(target, _)| {
            [
                format!("CONNECT {target} HTTP/1.1\\r\\nHost: {target}"),
                format!("GET http://{target}/ HTTP/1.1\\r\\nHost: {target}"),
            ]
        })
        .collect();
    let lines = ask(running, &requests).await?;
    for (line, (request, (_, reason))) in lines.iter().zip(
        requests
            .iter()
            .zip(targets.iter().flat_map(|target| [target, target])),
    ) {
        ensure!(
            line.contains(" 403 ") && line.contains(reason),
            "{request}: {line}"
        );
    }
    running
        .event(|event| {
            let told = matches!(event, RunnerEventKind::Egress { host, reason: EgressReason::LinkLocal, .. }
                if host == "169.254.169.254");
            told.then_some(())
        })
        .await?;
    let refused = running.view().await?.egress.refused - before;
    ensure!(refused >= requests.len() as u64, "{refused} were counted");
    Ok(format!("{refused} of {}", requests.len()))
}

async fn allowed(running: &Running) -> Result<String> {
    let script = "exec 3<>/dev/tcp/127.0.0.1/3128; printf 'CONNECT source.test:80 HTTP/1.1\\r\\n\\r\\n' >&3; \
                  IFS= read -r line <&3; IFS= read -r line <&3; echo go >&3; dd bs=64k <&3 2>/dev/null | wc -c";
    let begun = Instant::now();
    let reply = running.exec(script).await?;
    let rate = (BYTES >> 20) as f64 / begun.elapsed().as_secs_f64();
    let got: usize = reply
        .stdout
        .trim()
        .parse()
        .with_context(|| format!("{reply:?}"))?;
    ensure!(got >= BYTES, "{got} bytes came");
    Ok(format!("{rate:.1} MiB/s through stream and proxy"))
}

/// The guest has no card, and no way but the proxy.
async fn no_other_way(running: &Running) -> Result<()> {
    let links = running.exec("ls /sys/class/net").await?.stdout;
    ensure!(
        links
            .split_whitespace()
            .all(|card| ["lo", "dummy0"].contains(&card)),
        "{links}"
    );
    let direct = "timeout 5 bash -c 'exec 3<>/dev/tcp/1.1.1.1/443' && echo reached";
    let direct = running.exec(direct).await?;
    ensure!(!direct.stdout.contains("reached"), "{direct:?}");
    Ok(())
}

/// However much the guest says, the log stays as small as it was asked to be, and has the end.
async fn floods(vm: &Vm, running: &Running) -> Result<String> {
    let lines = 6 * CONSOLE_KEEP / 64;
    let script = format!(
        "for n in $(seq {lines}); do echo \"$n the quick brown fox jumps over the lazy dog, again and again\"; done >/dev/ttyS0; \
         echo the last words >/dev/ttyS0"
    );
    running.exec_within(&script, 300).await?;
    let console = soon("the console to end with it", async {
        loop {
            let console = running.console().await?;
            if console.contains("the last words") && console.contains("bytes dropped here") {
                return anyhow::Ok(console);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await??;
    ensure!(
        console.len() as u64 <= 3 * CONSOLE_KEEP,
        "{} bytes",
        console.len()
    );
    let path = camino::Utf8Path::new(&vm.spec.vm_dir).join("serial.log");
    let on_disk = std::fs::metadata(&path)?.len();
    ensure!(on_disk <= 3 * CONSOLE_KEEP, "{on_disk} bytes on disk");
    Ok(format!("{on_disk} bytes on disk"))
}

/// A guest that fills its memory has what it was given: its VMM does not grow beyond that, and the VM goes on. What lies further is
/// the guest's own affair; under emulation a Linux that is out of memory takes minutes to find out.
async fn fills(vm: &Vm, running: &Running) -> Result<String> {
    let mib = vm.spec.memory_mib * 2 / 5;
    // What comes through a pipe, `tail` keeps until it has all of it.
    let hog = format!("head -c {mib}M /dev/zero | tail -c {mib}M | wc -c");
    let reply = running.exec_within(&hog, 300).await?;
    let got: u64 = reply
        .stdout
        .trim()
        .parse()
        .with_context(|| format!("{reply:?}"))?;
    ensure!(got == u64::from(mib) << 20, "{reply:?}");
    ensure!(
        running.view().await?.state == MachineState::Up,
        "the VM is not up any more"
    );
    let health: Health = soon("the agent", running.client.get("/agent/health")).await??;
    ensure!(!health.build.is_empty(), "{health:?}");
    let rss = resident_mib(running.vmm().await?)?;
    // Of QEMU's emulation, its translated code besides.
    ensure!(
        rss < u64::from(vm.spec.memory_mib) + 900,
        "the VMM has {rss} MiB"
    );
    Ok(format!(
        "the VMM has {rss} MiB, the guest {}",
        vm.spec.memory_mib
    ))
}

fn resident_mib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("a process has a size")?.parse::<u64>()? >> 10)
}

/// An agent that dies is started again by systemd, and the runner finds it again.
async fn agent_killed(running: &Running) -> Result<()> {
    let ups = || async {
        let seen = Cell::new(0);
        // Every one so far, and then the end of the list is this call's own.
        running
            .event(|event| {
                if matches!(
                    event,
                    RunnerEventKind::Phase {
                        phase: Phase::AgentUp
                    }
                ) {
                    seen.set(seen.get() + 1);
                }
                (seen.get() == 2).then_some(())
            })
            .await
    };
    // The reply dies with the agent.
    let _ = running.exec_within("kill -9 $PPID", 5).await;
    ups().await?;
    let health: Health = soon("the agent", running.client.get("/agent/health")).await??;
    ensure!(!health.build.is_empty(), "{health:?}");
    ensure!(
        running.view().await?.state == MachineState::Up,
        "the VM is not up any more"
    );
    Ok(())
}

async fn evidence(vm: &Vm, vmm: Option<u32>) -> Result<()> {
    vm.nothing_left(vmm)?;
    ensure!(
        vm.evidence("serial.log")?.contains("the last words"),
        "the console is lost"
    );
    let machine: serde_json::Value = vm.json("machine.json")?;
    ensure!(
        machine["commandLine"]
            .as_array()
            .is_some_and(|words| !words.is_empty()),
        "{machine}"
    );
    ensure!(machine["capabilities"]["version"].is_string(), "{machine}");
    let exit: Exit = vm.json("exit.json")?;
    ensure!(exit.asked, "{exit:?}");
    let phases: Vec<_> = vm
        .events()?
        .iter()
        .filter_map(|line| {
            if let RunnerEventKind::Phase { phase } = line.event {
                Some(phase)
            } else {
                None
            }
        })
        .collect();
    let ready = phases.iter().position(|phase| *phase == Phase::Ready);
    let ready = ready.context("it was never ready")?;
    ensure!(phases[..=ready].is_sorted(), "{phases:?}");
    Ok(())
}
