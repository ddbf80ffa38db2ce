//! The other end of a relay, as a process of its own: a runner (see `vestibule_api::machine`) whose VM is up at once and
//! whose screen is a [`Ring`], or the same screen on a plain socket, for a relay that knows no runners.
use super::stream::{self, Pattern, Ring, Screen};
use anyhow::{Context, Result};
use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use futures_util::StreamExt as _;
use hyper_util::{rt::TokioIo, server::conn::auto::upgrade::downcast};
use std::{
    io::{IoSlice, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
};
use tokio_util::sync::CancellationToken;
use vestibule_api::{
    machine::{
        Disposal, Disposer, EgressCounters, Exit, MachineState, MachineView, Phase, RunnerEvent,
        RunnerEventKind, VmSpec,
    },
    time::Timestamp,
    view,
};

/// What the routes share.
#[derive(Debug)]
struct Pourer {
    view: MachineView,
    vm_dir: Utf8PathBuf,
    ring: Arc<Ring>,
    over: CancellationToken,
}

/// Pours on a plain Unix socket at `path`, for every client that connects. Returns only with an error.
///
/// # Errors
/// When the socket cannot be had.
pub fn plain(path: &Utf8Path, pattern: Pattern) -> Result<()> {
    let ring = Arc::new(Ring::new(pattern));
    let listener = UnixListener::bind(path).with_context(|| format!("listen on `{path}`"))?;
    loop {
        let (client, _) = listener.accept().context("accept a client")?;
        pour(&ring, client);
    }
}

/// Pours in WebSocket frames on a TCP port of the loopback, which it writes into the file `path`: what is left of the way
/// when there is no relay. Returns only with an error.
///
/// # Errors
/// When the port cannot be had.
pub fn websocket(path: &Utf8Path, pattern: Pattern) -> Result<()> {
    let ring = Arc::new(Ring::new(pattern));
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr()?.to_string();
    std::fs::write(path, address).with_context(|| format!("write `{path}`"))?;
    loop {
        let (client, _) = listener.accept().context("accept a client")?;
        let ring = Arc::clone(&ring);
        std::thread::spawn(move || {
            if let Err(err) = frames(&ring, client) {
                tracing::warn!(error = %format!("{err:#}"), "a client was not served");
            }
        });
    }
}

/// Serves [`super::viewer::Viewer`], and no other WebSocket client.
fn frames(ring: &Ring, client: TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let mut read = client.try_clone()?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        read.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    (&client).write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")?;
    stream::serve(ring, &mut Unframed(read), &mut Framed(client), || {})
}

/// What the viewer says: short frames, masked with zeros, each read whole.
struct Unframed(TcpStream);

impl std::io::Read for Unframed {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        self.0.read_exact(&mut [0; 6])?;
        self.0.read(bytes)
    }
}

/// A frame for each write, header and payload in one call.
struct Framed(TcpStream);

impl std::io::Write for Framed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let length = (bytes.len() as u64).to_be_bytes();
        let head = [&[0x82, 127], &length[..]].concat();
        let mut slices = &mut [IoSlice::new(&head), IoSlice::new(bytes)][..];
        while !slices.is_empty() {
            let written = self.0.write_vectored(slices)?;
            if written == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut slices, written);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Plays the runner of `spec` until it is asked to stop.
///
/// # Errors
/// When the socket cannot be had, or served.
pub async fn runner(spec: VmSpec, pattern: Pattern) -> Result<()> {
    let ring = Arc::new(Ring::new(pattern));
    let vm_dir = Utf8PathBuf::from(&spec.vm_dir);
    let path = vm_dir.join("runner.sock");
    let listener =
        tokio::net::UnixListener::bind(&path).with_context(|| format!("listen on `{path}`"))?;
    let over = CancellationToken::new();
    let pourer = Arc::new(Pourer {
        view: view(spec),
        vm_dir,
        ring,
        over: over.clone(),
    });
    let app = Router::new()
        .route(
            "/machine",
            get(async |State(pourer): State<Arc<Pourer>>| Json(pourer.view.clone())),
        )
        .route("/events", get(events))
        .route("/view", get(screen))
        .route(
            "/agent/login",
            post(async || (StatusCode::ACCEPTED, Json(serde_json::json!({})))),
        )
        .route("/stop", post(stop))
        .with_state(pourer);
    axum::serve(listener, app)
        .with_graceful_shutdown(over.cancelled_owned())
        .await
        .context("serve the runner's socket")
}

fn view(spec: VmSpec) -> MachineView {
    let now = Timestamp::now();
    MachineView {
        machine_id: spec.machine_id,
        session_id: spec.session_id,
        state: MachineState::Up,
        generation: 3,
        image_digest: spec.image_digest,
        snapshot_id: None,
        driver: "none".to_owned(),
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
        runner_pid: std::process::id(),
        vmm_pid: None,
        started_at: now,
        ready_at: Some(now),
        health: None,
        viewers: 0,
        egress: EgressCounters::default(),
        failure: None,
    }
}

/// Up at once, then nothing until the end.
async fn events(State(pourer): State<Arc<Pourer>>) -> Response {
    let state = |state, generation| RunnerEventKind::State { state, generation };
    let begin = [
        state(MachineState::Creating, 1),
        state(MachineState::Booting, 2),
        RunnerEventKind::Phase {
            phase: Phase::Ready,
        },
        state(MachineState::Up, 3),
    ];
    let over = pourer.over.clone();
    let end = futures_util::stream::once(async move {
        over.cancelled().await;
        RunnerEventKind::Ended {
            exit: Exit {
                asked: true,
                ..Exit::default()
            },
        }
    });
    let mut seq = 0;
    let lines = futures_util::stream::iter(begin)
        .chain(end)
        .map(move |event| {
            seq += 1;
            let event = RunnerEvent {
                seq,
                at: Timestamp::now(),
                event,
            };
            serde_json::to_vec(&event).map(|line| Bytes::from([&line[..], b"\n"].concat()))
        });
    Body::from_stream(lines).into_response()
}

async fn screen(State(pourer): State<Arc<Pourer>>, request: Request) -> Response {
    let over = pourer.over.clone().cancelled_owned();
    take_over(Screen::new(Arc::clone(&pourer.ring)), over, || {}, request)
}

/// As a runner does it: the viewer's connection is taken over, until `over`. `shown` is called after the first frame.
pub(crate) fn take_over(
    screen: Screen,
    over: impl Future<Output = ()> + Send + 'static,
    shown: impl FnOnce() + Send + 'static,
    mut request: Request,
) -> Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let Ok(parts) = downcast::<TokioIo<tokio::net::UnixStream>>(upgraded) else {
            return;
        };
        if let Err(err) = view::take_over(parts.io.into_inner(), screen, over, shown).await {
            tracing::warn!(error = %err, "a view was not taken over");
        }
    });
    let headers = [
        (header::CONNECTION, "upgrade"),
        (header::UPGRADE, view::FRAMES),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn stop(State(pourer): State<Arc<Pourer>>) -> Json<Disposal> {
    let complete = tokio::fs::remove_dir_all(&pourer.vm_dir).await.is_ok();
    pourer.over.cancel();
    Json(Disposal {
        machine_id: pourer.view.machine_id,
        at: Timestamp::now(),
        items: Vec::new(),
        complete,
        by: Disposer::Runner,
    })
}

/// Serves one client from two threads that end with it: one pours, one takes what the client says.
fn pour(ring: &Arc<Ring>, client: UnixStream) {
    let ring = Arc::clone(ring);
    std::thread::spawn(move || {
        let served = (|| {
            let mut read = client.try_clone()?;
            let mut listening = client.try_clone()?;
            let mut write = client;
            stream::serve(&ring, &mut read, &mut write, move || {
                std::thread::spawn(move || std::io::copy(&mut listening, &mut std::io::sink()));
            })
        })();
        if let Err(err) = served {
            tracing::warn!(error = %format!("{err:#}"), "a client was not served");
        }
    });
}
