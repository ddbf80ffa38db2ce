//! The view's frames: as a controller and a runner write them together on one viewer's connection.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as its body does")]

use bytes::Bytes;
use std::{os::fd::AsFd as _, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use vestibule_api::view::{End, follow, hand_over, pump, send, send_control, take_over};

/// Everything that `pump` writes for what the guest says in one go.
async fn framed(guest: &[u8]) -> (End, Vec<u8>) {
    let (_controls, controls) = mpsc::channel(1);
    let (_tell, told) = oneshot::channel();
    let mut viewer = Vec::new();
    let end = pump(guest, &mut viewer, controls, told, |_| {}).await;
    (end, viewer)
}

#[tokio::test]
async fn a_header_has_the_length_in_its_three_forms() {
    for (length, head) in [
        (1, vec![0x82, 1]),
        (125, vec![0x82, 125]),
        (126, vec![0x82, 126, 0, 126]),
        (0xffff, vec![0x82, 126, 0xff, 0xff]),
        (0x1_0000, vec![0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
    ] {
        let guest = vec![0x5a; length];
        let (end, viewer) = framed(&guest).await;
        assert_eq!(end, End::Guest);
        assert!(viewer == [head, guest].concat(), "{length}");
    }
    assert_eq!(framed(b"").await, (End::Silent, Vec::new()));
}

#[tokio::test]
async fn what_is_there_goes_in_one_frame() {
    let pieces = (&b"one, "[..]).chain(&b"two, "[..]).chain(&b"three"[..]);
    let (_controls, controls) = mpsc::channel(1);
    let (_tell, told) = oneshot::channel();
    let mut viewer = Vec::new();
    // An end between two pieces is no end of the whole.
    let end = pump(pieces, &mut viewer, controls, told, |_| {}).await;
    assert_eq!(end, End::Guest);
    assert_eq!(viewer, b"\x82\x0fone, two, three");
}

#[tokio::test(start_paused = true)]
async fn pings_go_out_and_a_viewer_that_takes_nothing_is_let_go() {
    let (_controls, controls) = mpsc::channel(1);
    let (_tell, told) = oneshot::channel();
    let (mut guest, far) = duplex(1 << 20);
    let (viewer, mut near) = duplex(1 << 10);
    let pumped = tokio::spawn(pump(far, viewer, controls, told, |_| {}));
    let mut ping = [0; 2];
    near.read_exact(&mut ping).await.unwrap();
    assert_eq!(ping, [0x89, 0]);
    guest.write_all(&[0; 4 << 10]).await.unwrap();
    assert_eq!(pumped.await.unwrap(), End::Slow);
}

/// A viewer, its connection on the controller's side, the controller's end of the runner, the guest, and the runner.
struct Handed {
    viewer: TcpStream,
    server: TcpStream,
    runner: UnixStream,
    guest: DuplexStream,
    taken: JoinHandle<std::io::Result<End>>,
    over: oneshot::Sender<()>,
}

async fn handed() -> Handed {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let viewer = TcpStream::connect(listener.local_addr().unwrap());
    let (viewer, server) = tokio::join!(viewer, listener.accept());
    let (viewer, (server, _)) = (viewer.unwrap(), server.unwrap());
    let (mut runner, controller) = UnixStream::pair().unwrap();
    let (guest, stream) = duplex(1 << 20);
    let (over, end) = oneshot::channel::<()>();
    let taken = tokio::spawn(take_over(
        controller,
        stream,
        async { drop(end.await) },
        || {},
    ));
    hand_over(&mut runner, b"", server.as_fd()).await.unwrap();
    Handed {
        viewer,
        server,
        runner,
        guest,
        taken,
        over,
    }
}

async fn read(from: &mut (impl AsyncReadExt + Unpin), count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let read = from.read_exact(&mut bytes);
    tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .unwrap()
        .unwrap();
    bytes
}

#[tokio::test]
async fn a_connection_is_handed_over_and_comes_back_between_two_frames() {
    let Handed {
        mut viewer,
        server,
        runner,
        mut guest,
        taken,
        over: _over,
    } = handed().await;
    let (from_runner, mut to_runner) = runner.into_split();
    guest.write_all(b"screen").await.unwrap();
    assert_eq!(read(&mut viewer, 8).await, b"\x82\x06screen");
    let keys = vec![7; 100_000];
    send(&mut to_runner, &keys).await.unwrap();
    assert!(read(&mut guest, keys.len()).await == keys);
    send_control(&mut to_runner, b"\x8a\x01p").await.unwrap();
    assert_eq!(read(&mut viewer, 3).await, b"\x8a\x01p");
    // The end is asked for; what was written is counted.
    drop(to_runner);
    let count = std::sync::atomic::AtomicU64::new(0);
    let end = follow(from_runner, |bytes| {
        count.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(end.await, Some(End::Told));
    assert_eq!(count.into_inner(), 6);
    assert_eq!(taken.await.unwrap().unwrap(), End::Told);
    // The runner's copy is closed, this one is not.
    server.try_write(b"\x88\0").unwrap();
    drop(server);
    let mut rest = Vec::new();
    viewer.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"\x88\0");
}

#[tokio::test]
async fn each_side_hears_why_it_ended() {
    let mut it = handed().await;
    drop(it.guest);
    assert_eq!(follow(&mut it.runner, |_| {}).await, Some(End::Silent));

    let mut it = handed().await;
    it.guest.write_all(b"x").await.unwrap();
    drop(it.guest);
    assert_eq!(follow(&mut it.runner, |_| {}).await, Some(End::Guest));

    let mut it = handed().await;
    it.over.send(()).unwrap();
    assert_eq!(follow(&mut it.runner, |_| {}).await, Some(End::Told));

    // A runner that dies says nothing; a controller that dies ends the relay.
    let mut it = handed().await;
    it.taken.abort();
    assert_eq!(follow(&mut it.runner, |_| {}).await, None);
    let it = handed().await;
    drop(it.runner);
    assert_eq!(it.taken.await.unwrap().unwrap(), End::Told);
}

#[tokio::test]
async fn what_is_no_runner_and_no_controller_is_refused() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut near, mut far) = UnixStream::pair().unwrap();
    far.write_all(b"RFB 003.008\n").await.unwrap();
    let err = hand_over(&mut near, b"", listener.as_fd()).await;
    assert_eq!(err.unwrap_err().kind(), std::io::ErrorKind::InvalidData);
    let err = hand_over(&mut near, &Bytes::from("RFB"), listener.as_fd()).await;
    assert_eq!(err.unwrap_err().kind(), std::io::ErrorKind::InvalidData);

    let (mut near, far) = UnixStream::pair().unwrap();
    near.write_all(b"no connection beside it").await.unwrap();
    let (_guest, stream) = duplex(1);
    let err = take_over(far, stream, std::future::pending(), || {}).await;
    assert_eq!(err.unwrap_err().kind(), std::io::ErrorKind::InvalidData);
}
