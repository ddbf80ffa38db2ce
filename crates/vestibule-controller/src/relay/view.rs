//! The screen: RFB from the guest, byte for byte, in binary WebSocket frames. The runner writes them on the viewer's own
//! connection (see [`vestibule_api::view`]); a viewer with TLS, or a runner that is too old for that, is relayed here. What
//! the viewer says is read here in every case.
use super::{
    Close,
    filter::ViewOnly,
    socket::{Socket, Writer},
};
use crate::{
    core::{Shared, stopped},
    live::Revocation,
    metrics::Direction,
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::Full;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use prometheus_client::metrics::counter::Counter;
use std::{io, os::fd::AsFd as _, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{mpsc, oneshot},
};
use tokio_tungstenite::tungstenite::Message;
use vestibule_api::{
    client::{self, CallError},
    ids::MachineId,
    session::{CloseCode, Right},
    view::{self, End},
};

/// A frame that is under way has so long to end when a view ends.
const LAST_FRAME: Duration = Duration::from_secs(2);
/// And so long where the view is taken away: then the connection is cut.
const LAST_FRAME_REVOKED: Duration = Duration::from_millis(300);

/// A view as the runner opened it.
struct Dialled {
    runner: UnixStream,
    /// Bytes that came with the reply: they belong before everything else.
    first: Bytes,
    /// Whether the runner takes the viewer's connection.
    frames: bool,
}

/// Where the viewer's words go.
struct Guest {
    write: OwnedWriteHalf,
    /// Control frames for the runner to write; none: the bytes for the guest are all that goes there.
    controls: Option<mpsc::Receiver<Bytes>>,
}

/// Relays until one side ends; why.
pub(crate) async fn run(
    core: &Shared,
    machine: MachineId,
    right: Right,
    revocation: &mut Revocation,
    socket: &mut Socket,
) -> Close {
    let (queue, controls) = mpsc::channel(view::CONTROLS);
    let Some(mut viewer) = socket.get_mut().take(queue) else {
        return Close::new(CloseCode::Protocol, "the view is open already");
    };
    let close = match dial(core, machine, viewer.tcp().is_some()).await {
        Ok(dialled) => {
            relay(
                core,
                dialled,
                right,
                revocation,
                socket,
                &mut viewer,
                controls,
            )
            .await
        }
        Err(close) => close,
    };
    socket.get_mut().put(viewer);
    close
}

async fn relay(
    core: &Shared,
    mut dialled: Dialled,
    right: Right,
    revocation: &mut Revocation,
    socket: &mut Socket,
    viewer: &mut Writer,
    controls: mpsc::Receiver<Bytes>,
) -> Close {
    let to_viewer = core.metrics.relayed(Direction::ToViewer);
    let to_guest = core.metrics.relayed(Direction::ToGuest);
    let sent = |bytes| {
        to_viewer.inc_by(bytes);
    };
    if dialled.frames
        && let Some(tcp) = viewer.tcp()
    {
        let fd = tcp.as_fd();
        if let Err(err) = view::hand_over(&mut dialled.runner, &dialled.first, fd).await {
            tracing::warn!(error = %err, "a view could not be handed over");
            return Close::new(CloseCode::MachineGone, "the VM's runner is gone");
        }
        let (read, write) = dialled.runner.into_split();
        let guest = Guest {
            write,
            controls: Some(controls),
        };
        let upload = upload(socket, guest, right, &to_guest);
        // The end of the upload drops its half of the connection, which tells the runner.
        let ended = both(core, view::follow(read, sent), upload, revocation, ()).await;
        if ended.cut {
            // Whoever writes a frame there stops.
            let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
        }
        ended.close
    } else {
        let (read, write) = dialled.runner.into_split();
        let (tell, told) = oneshot::channel::<()>();
        let guest = Guest {
            write,
            controls: None,
        };
        let upload = upload(socket, guest, right, &to_guest);
        let read = io::Cursor::new(dialled.first).chain(read);
        let sent = |payload: &[u8]| sent(payload.len() as u64);
        let download = async { Some(view::pump(read, viewer, controls, told, sent).await) };
        both(core, download, upload, revocation, tell).await.close
    }
}

/// Why a view ended, and whether in the middle of a frame.
struct Ended {
    close: Close,
    cut: bool,
}

/// Until one direction ends, or the view is taken away. The download ends between two frames, so that the good-bye is
/// understood; to drop `tell` and the upload asks for that.
async fn both<T>(
    core: &Shared,
    download: impl Future<Output = Option<End>>,
    upload: impl Future<Output = Close>,
    revocation: &mut Revocation,
    tell: T,
) -> Ended {
    let mut download = std::pin::pin!(download);
    let (close, last) = {
        let upload = std::pin::pin!(upload);
        tokio::select! {
            end = &mut download => return Ended { close: of_end(end), cut: false },
            close = upload => (close, LAST_FRAME),
            () = stopped(core.stopping.clone()) => {
                (Close::new(CloseCode::GoingAway, "the controller stops"), LAST_FRAME)
            }
            () = revocation.revoked() => (Close::revoked(), LAST_FRAME_REVOKED),
        }
    };
    drop(tell);
    let cut = tokio::time::timeout(last, download).await.is_err();
    Ended { close, cut }
}

fn of_end(end: Option<End>) -> Close {
    match end {
        Some(End::Silent) => Close::new(
            CloseCode::NobodyListens,
            "nobody in the guest answers for the screen",
        ),
        Some(End::Viewer) => Close::new(CloseCode::Protocol, "the viewer is gone"),
        Some(End::Slow) => Close::new(CloseCode::TooSlow, "the viewer took nothing for 30 seconds"),
        Some(End::Guest | End::Told) => {
            Close::new(CloseCode::MachineGone, "the guest ended the view")
        }
        None => Close::new(CloseCode::MachineGone, "the VM's runner is gone"),
    }
}

/// Asks the runner for the view; as frames where the viewer's connection can be handed over.
async fn dial(core: &Shared, machine: MachineId, frames: bool) -> Result<Dialled, Close> {
    // In order of preference (RFC 9110 section 7.8); the reply names the one that the runner chose.
    let upgrade = if frames {
        format!("{}, {}", view::FRAMES, view::RAW)
    } else {
        view::RAW.to_owned()
    };
    let request = Request::get("/view")
        .header(header::HOST, "vestibule")
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, upgrade)
        .body(Full::new(Bytes::new()))
        .map_err(|err| {
            Close::of(&CallError::Request {
                what: "GET /view".to_owned(),
                err,
            })
        })?;
    let mut reply = core
        .runner(machine)
        .open(request)
        .await
        .map_err(|err| Close::of(&err))?;
    if reply.status() != StatusCode::SWITCHING_PROTOCOLS {
        let refused = client::body("GET /view", reply).await;
        return Err(refused.map_or_else(
            |err| Close::of(&err),
            |_| Close::new(CloseCode::NobodyListens, "the runner did not open the view"),
        ));
    }
    let frames = reply
        .headers()
        .get(header::UPGRADE)
        .is_some_and(|chosen| chosen == view::FRAMES);
    let upgraded = hyper::upgrade::on(&mut reply).await.map_err(|err| {
        Close::of(&CallError::Http {
            what: "GET /view".to_owned(),
            err,
        })
    })?;
    // The connection itself, without hyper in between.
    match upgraded.downcast::<TokioIo<UnixStream>>() {
        Ok(parts) => Ok(Dialled {
            runner: parts.io.into_inner(),
            first: parts.read_buf,
            frames,
        }),
        Err(_) => Err(Close::new(
            CloseCode::NobodyListens,
            "the runner's connection can't be used",
        )),
    }
}

impl Guest {
    async fn hear(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.controls {
            Some(_) => view::send(&mut self.write, bytes).await,
            None => self.write.write_all(bytes).await,
        }
    }

    /// The next control frame for the runner to write. Never resolves where there is none.
    async fn control(&mut self) -> Bytes {
        let next = match &mut self.controls {
            Some(controls) => controls.recv().await,
            None => None,
        };
        match next {
            Some(frame) => frame,
            None => std::future::pending().await,
        }
    }
}

/// Viewer to guest. Without control, input is left out.
async fn upload(socket: &mut Socket, mut guest: Guest, right: Right, counter: &Counter) -> Close {
    let mut filter = ViewOnly::new();
    let mut passed = Vec::new();
    let gone = || Close::new(CloseCode::MachineGone, "the guest ended the view");
    loop {
        let message = tokio::select! {
            message = socket.next() => message,
            frame = guest.control() => {
                if view::send_control(&mut guest.write, &frame).await.is_err() {
                    return gone();
                }
                continue;
            }
        };
        let bytes = match message {
            Some(Ok(Message::Binary(bytes))) => bytes,
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
            Some(Ok(Message::Close(_))) => {
                return Close::new(CloseCode::SessionEnded, "the viewer closed the view");
            }
            Some(Ok(Message::Text(_))) => {
                return Close::new(
                    CloseCode::Protocol,
                    "the screen speaks RFB in binary frames",
                );
            }
            Some(Err(err)) => {
                return Close::new(CloseCode::Protocol, format!("the viewer broke off: {err}"));
            }
            None => return Close::new(CloseCode::Protocol, "the viewer is gone"),
        };
        let bytes = match right {
            Right::Control => &bytes[..],
            Right::View => {
                passed.clear();
                if let Err(err) = filter.pass(&bytes, &mut passed) {
                    return Close::new(CloseCode::Protocol, err.to_string());
                }
                &passed
            }
        };
        counter.inc_by(u64::try_from(bytes.len()).unwrap_or(0));
        if guest.hear(bytes).await.is_err() {
            return gone();
        }
    }
}
