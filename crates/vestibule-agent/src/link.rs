//! The stream to the host: opened, authenticated, multiplexed, and opened again whenever it ends.
use crate::{
    agent::Agent,
    api, config_drive,
    config_drive::DriveError,
    port::{self, Port, PortError},
    readiness::Condition,
    renew::{self, RenewError},
    vsock::{self, VsockError},
};
use std::{io, os::unix::process::CommandExt as _, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::UnixStream,
    task::JoinError,
};
use tracing::{info, warn};
use vestibule_api::{
    error::Chain,
    mux::{
        BadKey, HandshakeError, Incoming, Mux, MuxStream, Side, StreamKey, guest_handshake, start,
    },
    stream::{Open, PORT_NAME},
};

/// How long devices may take to appear.
const DEVICE_WAIT: Duration = Duration::from_secs(60);
/// The host has so long to answer the hello.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// Between an attempt and the next, so that a host with the wrong key costs no processor. A port is one line to whoever holds its
/// other end: a host that was refused has gone by then, and is not taken for the next one.
const PAUSE: Duration = Duration::from_millis(500);
/// The first pause where each connection is one of its own, which is then doubled: a stream that ended before a word was said is
/// what a restore leaves of one (Firecracker fact 11), and the host is there already.
const PAUSE_VSOCK: Duration = Duration::from_millis(10);
/// Bytes in flight each way of one screen stream.
const RELAY_BUFFER: usize = 64 * 1024;

/// Why one attempt at the stream ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Drive(#[from] DriveError),
    #[error(transparent)]
    Key(#[from] BadKey),
    #[error(transparent)]
    Port(#[from] PortError),
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error("authenticate the host")]
    Handshake(#[source] HandshakeError),
    #[error("authenticate the host: no answer within {HANDSHAKE_LIMIT:?}")]
    Silent,
    #[error(transparent)]
    Renew(#[from] RenewError),
    #[error("look for devices")]
    Task(#[source] JoinError),
}

/// Keeps the stream up for as long as the agent runs.
pub(crate) async fn keep(agent: Arc<Agent>) {
    let first = if by_vsock().await { PAUSE_VSOCK } else { PAUSE };
    let mut pause = first;
    loop {
        match connect(&agent).await {
            Ok((mux, incoming)) => {
                pause = first;
                info!("the host is on the stream");
                agent.link.send_replace(Some(mux.clone()));
                agent.readiness.set(Condition::Stream, Vec::new());
                serve(&agent, incoming).await;
                agent.link.send_replace(None);
                agent
                    .readiness
                    .set(Condition::Stream, vec!["the host on the stream".to_owned()]);
                warn!(why = %Chain(&mux.ended().await), "the stream ended");
                if *agent.prepared.borrow() {
                    // Whoever copies this process must not copy what it has drawn, opened or remembered.
                    let err = begin_anew();
                    warn!(error = %err, "the agent could not begin anew");
                }
            }
            Err(err) => warn!(error = %Chain(&err), "no stream to the host"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE);
    }
}

/// Becomes a fresh process of the same program, number and unit. Returns only if it could not.
fn begin_anew() -> io::Error {
    std::process::Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .exec()
}

/// Waits for a host, sees who this VM is now, and authenticates. In this order: between the wait for one host and the
/// coming of the next, the VM may have become another one.
async fn connect(agent: &Arc<Agent>) -> Result<(Mux, Incoming), LinkError> {
    let mut io = host().await?;
    let guest = agent.guest.clone();
    let known = tokio::task::spawn_blocking(move || {
        let drive = config_drive::read(DEVICE_WAIT)?;
        let copy = renew::renew(&drive, &guest)?.then(|| drive.hostname.clone());
        Ok::<_, LinkError>((StreamKey::of(&drive)?, copy))
    });
    let (key, copy) = known.await.map_err(LinkError::Task)??;
    if let Some(hostname) = copy {
        info!("this is a copy of a VM, and has its own identity now");
        agent.events.forget();
        tokio::spawn(Arc::clone(agent).wake(hostname));
    }
    tokio::time::timeout(HANDSHAKE_LIMIT, guest_handshake(&mut io, &key))
        .await
        .map_err(|_| LinkError::Silent)?
        .map_err(LinkError::Handshake)?;
    Ok(start(io, Side::Guest))
}

/// What the stream is to this guest.
trait Transport: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Transport for T {}

/// Whether this machine's stream is a vsock.
async fn by_vsock() -> bool {
    // A kernel that does not show its command line is none of ours.
    let options = tokio::fs::read_to_string("/proc/cmdline").await;
    vsock::chosen(&options.unwrap_or_default())
}

/// Waits until a host is there, by the way that this machine has.
async fn host() -> Result<Box<dyn Transport>, LinkError> {
    if by_vsock().await {
        return Ok(Box::new(vsock::connected().await?));
    }
    let found = tokio::task::spawn_blocking(|| port::find(PORT_NAME, DEVICE_WAIT));
    let path = found.await.map_err(LinkError::Task)??;
    let port = Port::open(&path)?;
    port.connected().await?;
    Ok(Box::new(port))
}

/// Serves what the host opens until the stream ends.
pub(crate) async fn serve(agent: &Arc<Agent>, mut incoming: Incoming) {
    let api = api::for_host(agent);
    while let Some(opened) = incoming.accept().await {
        match opened {
            Ok((Open::Http, stream)) => {
                drop(tokio::spawn(api::serve_connection(stream, api.clone())));
            }
            Ok((Open::Rfb, stream)) => {
                drop(tokio::spawn(relay_screen(stream, agent.guest.rfb.clone())));
            }
            Ok((Open::Proxy, _)) => {
                warn!("the host opened a proxy stream; only the guest does that");
            }
            Err(err) => warn!(error = %Chain(&err), "a stream of the host's was dropped"),
        }
    }
}

async fn relay_screen(mut stream: MuxStream, socket: std::path::PathBuf) {
    if let Err(err) = try_relay(&mut stream, &socket).await {
        warn!(error = %err, socket = %socket.display(), "a view of the screen ended");
    }
    // End of file rather than a reset: the viewer tells "no screen" from "no guest".
    let _ = stream.shutdown().await;
}

async fn try_relay(stream: &mut MuxStream, socket: &std::path::Path) -> io::Result<()> {
    let mut screen = UnixStream::connect(socket).await?;
    tokio::io::copy_bidirectional_with_sizes(stream, &mut screen, RELAY_BUFFER, RELAY_BUFFER)
        .await?;
    Ok(())
}
