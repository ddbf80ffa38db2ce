//! The screen: RFB from the runner, byte for byte, in binary WebSocket frames.
use super::{Close, PING, SLOW, filter::ViewOnly};
use crate::{
    core::{Shared, stopped},
    metrics::Direction,
};
use axum::extract::ws::{Message, WebSocket};
use bytes::{Bytes, BytesMut};
use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use http_body_util::Full;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use prometheus_client::metrics::counter::Counter;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};
use vestibule_api::{
    client::{self, CallError},
    ids::MachineId,
    session::{CloseCode, Right},
};

/// Bytes read from the guest at once: a frame each. Large, because each costs a turn of the loop.
const CHUNK: usize = 256 << 10;

/// Relays until one side ends; why.
pub(crate) async fn run(
    core: &Shared,
    machine: MachineId,
    right: Right,
    socket: &mut WebSocket,
) -> Close {
    let (mut guest, first) = match dial(core, machine).await {
        Ok(dialled) => dialled,
        Err(close) => return close,
    };
    let (viewer_out, viewer_in) = socket.split();
    let to_viewer = core.metrics.relayed(Direction::ToViewer);
    let to_guest = core.metrics.relayed(Direction::ToGuest);
    let (from_guest, into_guest) = match guest.take() {
        Some(stream) => stream.into_split(),
        None => {
            return Close::new(
                CloseCode::NobodyListens,
                "the runner's connection can't be used",
            );
        }
    };
    tokio::select! {
        close = download(from_guest, first, viewer_out, &to_viewer) => close,
        close = upload(viewer_in, into_guest, right, &to_guest) => close,
        () = stopped(core.stopping.clone()) => Close::new(CloseCode::GoingAway, "the controller stops"),
    }
}

/// Asks the runner for the view. The bytes that came with its reply belong before everything else.
async fn dial(core: &Shared, machine: MachineId) -> Result<(Option<UnixStream>, Bytes), Close> {
    let request = Request::get("/view")
        .header(header::HOST, "vestibule")
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, "rfb")
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
    let upgraded = hyper::upgrade::on(&mut reply).await.map_err(|err| {
        Close::of(&CallError::Http {
            what: "GET /view".to_owned(),
            err,
        })
    })?;
    // The connection itself, without hyper in between: one copy fewer for each byte of the screen.
    Ok(match upgraded.downcast::<TokioIo<UnixStream>>() {
        Ok(parts) => (Some(parts.io.into_inner()), parts.read_buf),
        Err(_) => (None, Bytes::new()),
    })
}

/// Guest to viewer. A viewer that is slower than the guest slows the guest down: nothing is read while a frame is under way.
async fn download(
    mut guest: OwnedReadHalf,
    first: Bytes,
    mut viewer: impl Sink<Message, Error = axum::Error> + Unpin,
    counter: &Counter,
) -> Close {
    let mut ping = tokio::time::interval(PING);
    ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut buffer = BytesMut::from(first.as_ref());
    let mut silent = buffer.is_empty();
    loop {
        let message = if buffer.is_empty() {
            buffer.reserve(CHUNK);
            tokio::select! {
                read = guest.read_buf(&mut buffer) => match read {
                    Ok(0) | Err(_) if silent => {
                        return Close::new(CloseCode::NobodyListens, "nobody in the guest answers for the screen");
                    }
                    Ok(0) | Err(_) => return Close::new(CloseCode::MachineGone, "the guest ended the view"),
                    Ok(_) => continue,
                },
                _ = ping.tick() => Message::Ping(Bytes::new()),
            }
        } else {
            silent = false;
            counter.inc_by(u64::try_from(buffer.len()).unwrap_or(0));
            Message::Binary(buffer.split().freeze())
        };
        match tokio::time::timeout(SLOW, viewer.send(message)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Close::new(CloseCode::Protocol, "the viewer is gone"),
            Err(_) => {
                return Close::new(CloseCode::TooSlow, "the viewer took nothing for 30 seconds");
            }
        }
    }
}

/// Viewer to guest. Without control, input is left out.
async fn upload(
    mut viewer: impl Stream<Item = Result<Message, axum::Error>> + Unpin,
    mut guest: OwnedWriteHalf,
    right: Right,
    counter: &Counter,
) -> Close {
    let mut filter = ViewOnly::new();
    let mut passed = Vec::new();
    while let Some(message) = viewer.next().await {
        let bytes = match message {
            Ok(Message::Binary(bytes)) => bytes,
            Ok(Message::Ping(_) | Message::Pong(_)) => continue,
            Ok(Message::Close(_)) => {
                return Close::new(CloseCode::SessionEnded, "the viewer closed the view");
            }
            Ok(Message::Text(_)) => {
                return Close::new(
                    CloseCode::Protocol,
                    "the screen speaks RFB in binary frames",
                );
            }
            Err(err) => {
                return Close::new(CloseCode::Protocol, format!("the viewer broke off: {err}"));
            }
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
        if guest.write_all(bytes).await.is_err() {
            return Close::new(CloseCode::MachineGone, "the guest ended the view");
        }
    }
    Close::new(CloseCode::Protocol, "the viewer is gone")
}
