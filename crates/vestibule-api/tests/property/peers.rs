//! What holds of the stream against a peer that has the key, shakes hands as it should, and then says anything: whichever side
//! this is, the connection ends with its peer's, holds no more than its limits let it, and answers no more than it was told.
use std::{sync::LazyLock, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::timeout,
};
use vestibule_api::{
    mux::{
        Incoming, Mux, MuxStream, STREAM_LIMIT, Side, StreamKey, guest_handshake, host_handshake,
        start,
    },
    stream::{OPEN_LIMIT, Open},
};

static KEY: LazyLock<StreamKey> = LazyLock::new(StreamKey::generate);

/// Longer than everything that a side waits for. Time that nobody needs is skipped.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes under way on the transport.
const TRANSPORT: usize = 64 << 10;
/// yamux' header, the least that a peer says before it gets an answer.
const FRAME: usize = 12;
/// To one frame of a peer's a stream is acknowledged, reset and its window raised.
const ANSWERS: usize = 3;
/// What a side says of itself: its own streams and their headers, a ping, the goodbye.
const OWN: usize = OPEN_LIMIT;

/// What peer and side do besides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    /// Whether the side is the runner's; else the agent's.
    pub(crate) host: bool,
    /// Whether the peer takes what it is answered.
    pub(crate) peer_reads: bool,
    /// Whether whoever accepts reads; else it holds every stream and waits.
    pub(crate) side_reads: bool,
    /// Whether the side has a stream of its own open, which it reads.
    pub(crate) opens: bool,
}

impl Habits {
    pub(crate) const fn of(byte: u8) -> Self {
        Self {
            host: byte & 1 != 0,
            peer_reads: byte & 2 != 0,
            side_reads: byte & 4 != 0,
            opens: byte & 8 != 0,
        }
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Came {
    /// Streams of the peer's with a header that says what they are.
    pub(crate) accepted: usize,
    /// Streams of the peer's without one.
    pub(crate) refused: usize,
}

/// One side against such a peer, in a runtime of one thread whose time is paused.
pub(crate) async fn withstand(habits: Habits, bytes: &[u8]) -> Came {
    let (mut near, mut far) = duplex(TRANSPORT);
    let side = if habits.host {
        let (near, far) = tokio::join!(
            host_handshake(&mut near, &KEY),
            guest_handshake(&mut far, &KEY)
        );
        near.and(far).expect("both have the key");
        Side::Host
    } else {
        let (near, far) = tokio::join!(
            guest_handshake(&mut near, &KEY),
            host_handshake(&mut far, &KEY)
        );
        near.and(far).expect("both have the key");
        Side::Guest
    };
    let (mux, incoming) = start(near, side);
    let serving = tokio::spawn(serve(incoming, habits.side_reads));
    let own = habits.opens.then(|| tokio::spawn(own(mux.clone())));
    let answered = say(far, bytes, habits.peer_reads).await;
    let most = ANSWERS * FRAME * (bytes.len() / FRAME) + OWN;
    assert!(answered <= most, "{answered} bytes to {}", bytes.len());
    let ended = async {
        drop(mux.ended().await);
        if let Some(own) = own {
            own.await.expect("a stream of its own ends");
        }
        serving.await.expect("whoever accepts ends")
    };
    let ended = timeout(PATIENCE, ended).await;
    ended.expect("it ends with its peer")
}

/// Says it all, as far as the side takes it, and goes away. Bytes that were answered.
async fn say(far: DuplexStream, bytes: &[u8], reads: bool) -> usize {
    let (mut read, mut write) = tokio::io::split(far);
    if !reads {
        // A side that can't answer takes no more; a peer does not wait for ever either.
        drop(timeout(PATIENCE, write.write_all(bytes)).await);
        // Paused: over as soon as the side has nothing left to do.
        tokio::time::sleep(PATIENCE).await;
        return 0;
    }
    let mut answered = 0;
    let hear = async {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = read.read(&mut buffer).await {
            answered += count;
        }
    };
    let talk = async {
        drop(write.write_all(bytes).await);
        drop(write.shutdown().await);
    };
    let both = async { tokio::join!(hear, talk) };
    let over = timeout(PATIENCE, both).await;
    over.expect("a side whose peer has said goodbye hangs up");
    answered
}

/// As the runner's and the agent's loops do: takes streams until the connection ends.
async fn serve(mut incoming: Incoming, reads: bool) -> Came {
    let mut came = Came::default();
    let mut held = Vec::new();
    while let Some(opened) = incoming.accept().await {
        match opened {
            Ok((_, stream)) if reads => {
                came.accepted += 1;
                drop(tokio::spawn(echo(stream)));
            }
            Ok((_, stream)) => {
                came.accepted += 1;
                held.push(stream);
                assert!(held.len() <= STREAM_LIMIT, "more than may be open");
            }
            Err(err) => {
                came.refused += 1;
                assert!(!err.to_string().is_empty());
            }
        }
    }
    came
}

/// Swallows what comes, and says one byte back.
async fn echo(mut stream: MuxStream) {
    let mut sink = tokio::io::sink();
    drop(tokio::io::copy(&mut stream, &mut sink).await);
    drop(stream.write_all(b"!").await);
    drop(stream.shutdown().await);
}

async fn own(mux: Mux) {
    if let Ok(stream) = mux.open(Open::Http).await {
        echo(stream).await;
    }
}
