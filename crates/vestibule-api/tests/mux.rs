//! The handshake and the multiplexer over in-memory transports: what they accept, what they refuse, and that they end.
#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]
use proptest::prelude::*;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::timeout,
};
use vestibule_api::{
    mux::{
        HandshakeError, Incoming, Mux, OpenError, STREAM_LIMIT, Side, StreamKey, guest_handshake,
        host_handshake, start,
    },
    stream::{MAGIC, OPEN_LIMIT, Open, RESYNC_LIMIT},
};

const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<F: Future>(what: F) -> F::Output {
    timeout(PATIENCE, what).await.expect("it took too long")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn pair() -> ((Mux, Incoming), (Mux, Incoming)) {
    let (host, guest) = duplex(64 * 1024);
    (start(host, Side::Host), start(guest, Side::Guest))
}

async fn both_shake(host: &mut DuplexStream, guest: &mut DuplexStream, key: &StreamKey) {
    let (h, g) =
        soon(async { tokio::join!(host_handshake(host, key), guest_handshake(guest, key)) }).await;
    h.unwrap();
    g.unwrap();
}

/// Not a byte of the handshake is left, and none of what follows was taken.
async fn nothing_is_left(from: &mut DuplexStream, to: &mut DuplexStream) {
    from.write_all(b"after").await.unwrap();
    let mut rest = [0; 5];
    soon(to.read_exact(&mut rest)).await.unwrap();
    assert_eq!(&rest, b"after");
}

#[tokio::test]
async fn both_sides_prove_the_key() {
    let key = StreamKey::generate();
    let (mut host, mut guest) = duplex(4096);
    both_shake(&mut host, &mut guest, &key).await;
    nothing_is_left(&mut guest, &mut host).await;
}

#[tokio::test]
async fn another_key_is_refused_by_the_guest_before_it_proves_anything() {
    let (mut host, mut guest) = duplex(4096);
    let host_key = StreamKey::generate();
    let serve = tokio::spawn(async move { host_handshake(&mut host, &host_key).await });
    let refused = soon(guest_handshake(&mut guest, &StreamKey::generate())).await;
    assert!(matches!(refused, Err(HandshakeError::WrongKey)));
    drop(guest);
    // The host never got a proof.
    assert!(matches!(
        soon(serve).await.unwrap(),
        Err(HandshakeError::Io { .. })
    ));
}

#[tokio::test]
async fn a_reflected_answer_is_refused() {
    let (mut host, mut guest) = duplex(4096);
    let key = StreamKey::generate();
    let serve = tokio::spawn(async move { host_handshake(&mut host, &key).await });
    // A guest without the key sends the host's own tag back to it.
    guest.write_all(&MAGIC).await.unwrap();
    guest.write_all(&[7; 32]).await.unwrap();
    let mut answer = [0; 104];
    soon(guest.read_exact(&mut answer)).await.unwrap();
    guest.write_all(&answer[72..]).await.unwrap();
    assert!(matches!(
        soon(serve).await.unwrap(),
        Err(HandshakeError::WrongKey)
    ));
}

/// A guest whose hello was read by whoever held the port before, as a virtio-serial port has no connections.
#[tokio::test(start_paused = true)]
async fn a_hello_that_is_lost_is_asked_for() {
    let key = StreamKey::generate();
    let (mut host, mut guest) = duplex(4096);
    let theirs = key.clone();
    let shaken = tokio::spawn(async move {
        let shaken = guest_handshake(&mut guest, &theirs).await;
        (shaken, guest)
    });
    let mut lost = [0; 40];
    soon(host.read_exact(&mut lost)).await.unwrap();
    soon(host_handshake(&mut host, &key)).await.unwrap();
    let (shaken, mut guest) = soon(shaken).await.unwrap();
    shaken.unwrap();
    nothing_is_left(&mut guest, &mut host).await;
}

/// A guest that comes late finds several questions, and says its hello once for each.
#[tokio::test(start_paused = true)]
async fn questions_that_waited_do_no_harm() {
    let key = StreamKey::generate();
    let (mut host, mut guest) = duplex(4096);
    let ours = key.clone();
    let serve = tokio::spawn(async move {
        let shaken = host_handshake(&mut host, &ours).await;
        (shaken, host)
    });
    tokio::time::sleep(Duration::from_secs(16)).await;
    soon(guest_handshake(&mut guest, &key)).await.unwrap();
    let (shaken, mut host) = soon(serve).await.unwrap();
    shaken.unwrap();
    nothing_is_left(&mut host, &mut guest).await;
}

/// The agent is started anew between its hello and its proof; what was the first one's is still in the port.
#[tokio::test]
async fn a_guest_that_begins_anew_is_answered_anew() {
    let key = StreamKey::generate();
    let (mut host, mut guest) = duplex(4096);
    guest.write_all(&MAGIC).await.unwrap();
    guest.write_all(&[7; 32]).await.unwrap();
    both_shake(&mut host, &mut guest, &key).await;
    nothing_is_left(&mut guest, &mut host).await;
}

#[tokio::test]
async fn a_guest_of_another_version_is_told_apart() {
    let (mut host, mut guest) = duplex(4096);
    guest.write_all(b"\xf5VST\xf5VSTBL1\n").await.unwrap();
    guest.write_all(&[7; 32]).await.unwrap();
    let refused = soon(host_handshake(&mut host, &StreamKey::generate())).await;
    assert!(matches!(refused, Err(HandshakeError::Version('1'))));
}

#[tokio::test]
async fn a_truncated_hello_is_an_error_and_not_a_wait() {
    let (mut host, mut guest) = duplex(4096);
    guest.write_all(&MAGIC).await.unwrap();
    guest.write_all(&[1; 31]).await.unwrap();
    drop(guest);
    let refused = soon(host_handshake(&mut host, &StreamKey::generate())).await;
    let Err(HandshakeError::Io { err, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(err.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn endless_garbage_is_given_up() {
    let (mut host, mut guest) = duplex(64 * 1024);
    let flood = tokio::spawn(async move {
        let junk = [b'x'; 4096];
        while guest.write_all(&junk).await.is_ok() {}
    });
    let refused = soon(host_handshake(&mut host, &StreamKey::generate())).await;
    assert!(matches!(refused, Err(HandshakeError::NoHello)));
    drop(host);
    soon(flood).await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever stale bytes stand in the port, as long as they hold no hello of their own, the two sides still meet.
    #[test]
    fn garbage_before_the_hello_is_skipped(
        junk in prop::collection::vec(prop_oneof![Just(MAGIC[0]), Just(MAGIC[1]), any::<u8>()], 0..2000),
        partial in 0..MAGIC.len(),
    ) {
        prop_assume!(!junk.windows(MAGIC.len()).any(|w| w == MAGIC));
        prop_assert!(junk.len() < RESYNC_LIMIT);
        let met = runtime().block_on(async {
            let key = StreamKey::generate();
            let (mut host, mut guest) = duplex(8192);
            guest.write_all(&junk).await.unwrap();
            guest.write_all(&MAGIC[..partial]).await.unwrap();
            let (h, g) = soon(async {
                tokio::join!(host_handshake(&mut host, &key), guest_handshake(&mut guest, &key))
            }).await;
            h.is_ok() && g.is_ok()
        });
        prop_assert!(met);
    }

    /// Any cut of any payload arrives whole, in both directions.
    #[test]
    fn bytes_arrive_as_sent(payload in prop::collection::vec(any::<u8>(), 0..100_000), chunk in 1usize..9000) {
        let echoed = runtime().block_on(soon(async {
            let ((mux, _host), (_guest_mux, mut guest)) = pair();
            tokio::spawn(async move {
                let (_, mut stream) = guest.accept().await.unwrap().unwrap();
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
                stream.shutdown().await.unwrap();
            });
            let mut stream = mux.open(Open::Http).await.unwrap();
            for part in payload.chunks(chunk) {
                stream.write_all(part).await.unwrap();
            }
            stream.shutdown().await.unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).await.unwrap();
            back
        }));
        prop_assert_eq!(echoed, payload);
    }
}

#[tokio::test]
async fn both_sides_open_and_each_header_arrives() {
    let ((host, mut from_guest), (guest, mut from_host)) = pair();
    for (mux, incoming, open) in [
        (&host, &mut from_host, Open::Rfb),
        (&guest, &mut from_guest, Open::Proxy),
    ] {
        let mut sent = mux.open(open.clone()).await.unwrap();
        let (got, mut received) = soon(incoming.accept()).await.unwrap().unwrap();
        assert_eq!(got, open);
        sent.write_all(b"\nGET").await.unwrap();
        let mut bytes = [0; 4];
        soon(received.read_exact(&mut bytes)).await.unwrap();
        assert_eq!(&bytes, b"\nGET");
    }
}

/// A peer that speaks yamux and nothing of ours: it can send any header.
async fn raw_header(bytes: &[u8]) -> (Result<Open, OpenError>, (Mux, Incoming)) {
    use futures_util::AsyncWriteExt as _;
    use tokio_util::compat::TokioAsyncReadCompatExt;
    let (host, guest): (DuplexStream, DuplexStream) = duplex(64 * 1024);
    let (mux, mut incoming) = start(host, Side::Host);
    let mut raw = yamux::Connection::new(
        guest.compat(),
        yamux::Config::default(),
        yamux::Mode::Server,
    );
    let mut stream = std::future::poll_fn(|cx| raw.poll_new_outbound(cx))
        .await
        .unwrap();
    tokio::spawn(async move {
        while std::future::poll_fn(|cx| raw.poll_next_inbound(cx))
            .await
            .is_some()
        {}
    });
    stream.write_all(bytes).await.unwrap();
    stream.close().await.unwrap();
    let got = soon(incoming.accept()).await.unwrap();
    (got.map(|(open, _)| open), (mux, incoming))
}

#[tokio::test]
async fn a_header_that_is_none_costs_one_stream_only() {
    let mut long = vec![b' '; OPEN_LIMIT];
    long.push(b'\n');
    let (got, _alive) = raw_header(&long).await;
    assert!(matches!(got, Err(OpenError::TooLong)));
    let (got, _alive) = raw_header(b"{\"service\":\"shell\"}\n").await;
    assert!(matches!(got, Err(OpenError::Unknown(_))));
    let (got, _alive) = raw_header(b"{\"service\":").await;
    assert!(matches!(got, Err(OpenError::Read(_))));
    let (got, _alive) = raw_header(b"{\"service\":\"proxy\"}\n").await;
    assert_eq!(got.unwrap(), Open::Proxy);
}

#[tokio::test]
async fn a_reader_that_stops_stops_its_writer_and_nobody_else() {
    let ((host, _from_guest), (_guest, mut from_host)) = pair();
    let mut stuck = host.open(Open::Rfb).await.unwrap();
    let (_, _unread) = soon(from_host.accept()).await.unwrap().unwrap();
    let mut sent = 0usize;
    let junk = vec![0u8; 16 * 1024];
    while let Ok(written) = timeout(Duration::from_millis(300), stuck.write(&junk)).await {
        sent += written.unwrap();
        assert!(sent < 2 << 20, "nothing stops the writer");
    }
    tokio::spawn(async move {
        while let Some(Ok((_, mut stream))) = from_host.accept().await {
            tokio::spawn(async move {
                let (mut r, mut w) = tokio::io::split(&mut stream);
                tokio::io::copy(&mut r, &mut w).await
            });
        }
    });
    let mut other = host.open(Open::Http).await.unwrap();
    other.write_all(b"alive").await.unwrap();
    let mut back = [0; 5];
    soon(other.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"alive");
}

#[tokio::test]
async fn many_streams_at_once_and_one_more_waits() {
    let ((host, _from_guest), (_guest, mut from_host)) = pair();
    let echo = tokio::spawn(async move {
        while let Some(Ok((_, mut stream))) = from_host.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
                stream.shutdown().await.unwrap();
            });
        }
    });
    let mut open = Vec::new();
    for _ in 0..STREAM_LIMIT {
        open.push(soon(host.open(Open::Http)).await.unwrap());
    }
    let one_more = host.open(Open::Http);
    tokio::pin!(one_more);
    assert!(
        timeout(Duration::from_millis(50), &mut one_more)
            .await
            .is_err()
    );
    let mut tasks = Vec::new();
    for (n, mut stream) in open.into_iter().enumerate() {
        tasks.push(tokio::spawn(async move {
            let text = vec![u8::try_from(n % 251).unwrap(); 40_000 + n];
            stream.write_all(&text).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).await.unwrap();
            assert_eq!(back, text);
        }));
    }
    soon(one_more).await.unwrap();
    for task in tasks {
        soon(task).await.unwrap();
    }
    host.close().await;
    soon(echo).await.unwrap();
}

#[tokio::test]
async fn when_the_transport_ends_everything_ends() {
    let (near, far) = duplex(4096);
    let (mux, mut incoming) = start(near, Side::Host);
    let mut stream = mux.open(Open::Http).await.unwrap();
    drop(far);
    let mut rest = Vec::new();
    assert!(soon(stream.read_to_end(&mut rest)).await.is_ok() && rest.is_empty());
    assert!(soon(incoming.accept()).await.is_none());
    soon(mux.ended()).await;
    assert!(soon(mux.open(Open::Http)).await.is_err());
}

#[tokio::test]
async fn the_last_handle_says_goodbye() {
    let ((mux, incoming), (_guest, mut guest)) = pair();
    let mut stream = mux.open(Open::Http).await.unwrap();
    drop((mux, incoming));
    let (_, mut far) = soon(guest.accept()).await.unwrap().unwrap();
    // A stream keeps its connection.
    stream.write_all(b"x").await.unwrap();
    assert_eq!(soon(far.read_u8()).await.unwrap(), b'x');
    drop(stream);
    assert!(soon(guest.accept()).await.is_none());
}
