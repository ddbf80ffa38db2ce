//! The stream against a peer that has the key and says what no honest one does.
#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]
#[path = "property/peers.rs"]
mod peers;

use peers::{Came, Habits, withstand};
use proptest::prelude::*;
use vestibule_api::{mux::STREAM_LIMIT, stream::OPEN_LIMIT};

const DATA: u8 = 0;
const WINDOW: u8 = 1;
const SYN: u16 = 1;
const FIN: u16 = 4;

fn run(habits: Habits, bytes: &[u8]) -> Came {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(withstand(habits, bytes))
}

fn frame(kind: u8, flags: u16, id: u32, length: u32, body: &[u8]) -> Vec<u8> {
    let head = [&[0, kind][..], &flags.to_be_bytes(), &id.to_be_bytes()];
    [&head.concat(), &length.to_be_bytes()[..], body].concat()
}

fn data(flags: u16, id: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    frame(DATA, flags, id, length, body)
}

/// The number of a peer's n-th stream: of a runner's peer, the agent, even; of an agent's odd.
fn id(habits: Habits, n: u32) -> u32 {
    2 * n + if habits.host { 2 } else { 1 }
}

fn every_habit() -> impl Iterator<Item = Habits> {
    (0..16).map(Habits::of)
}

/// So that the tests below begin at what is understood.
#[test]
fn what_an_honest_peer_opens_is_accepted() {
    for habits in every_habit() {
        let opens = [
            &b"{\"service\":\"proxy\"}\nGET"[..],
            b"{\"service\":\"http\"}\n",
        ];
        let said = (0..)
            .zip(opens)
            .map(|(n, said)| data(SYN | FIN, id(habits, n), said));
        let came = run(habits, &said.collect::<Vec<_>>().concat());
        let expected = Came {
            accepted: 2,
            refused: 0,
        };
        assert_eq!(came, expected, "{habits:?}");
    }
}

#[test]
fn streams_without_number_are_reset_beyond_the_limit() {
    let many = u32::try_from(3 * STREAM_LIMIT).unwrap();
    for habits in every_habit().filter(|habits| !habits.side_reads) {
        let said = (0..many).map(|n| data(SYN, id(habits, n), b"{\"service\":\"proxy\"}\n"));
        let came = run(habits, &said.collect::<Vec<_>>().concat());
        assert!(came.accepted <= STREAM_LIMIT, "{habits:?}: {came:?}");
        if habits.peer_reads {
            assert_eq!(came.accepted, STREAM_LIMIT, "{habits:?}");
        }
    }
}

#[test]
fn headers_that_are_none_cost_one_stream_each() {
    for habits in every_habit().filter(|habits| habits.peer_reads) {
        let said = [
            data(SYN, id(habits, 0), &vec![b' '; OPEN_LIMIT + 1]),
            data(SYN | FIN, id(habits, 1), b"{\"service\":"),
            data(SYN, id(habits, 2), b"{\"service\":\"shell\"}\n"),
            // Nothing: it is given up when its time is over, or with the connection.
            frame(WINDOW, SYN, id(habits, 3), 0, b""),
            data(SYN, id(habits, 4), b"{\"service\":\"proxy\"}\n"),
        ];
        let came = run(habits, &said.concat());
        assert_eq!(came.accepted, 1, "{habits:?}");
        assert!((3..=4).contains(&came.refused), "{habits:?}: {came:?}");
    }
}

#[test]
fn what_breaks_the_protocol_opens_nothing() {
    let open = b"{\"service\":\"proxy\"}\n";
    for habits in every_habit() {
        let (own, foreign) = (id(habits, 0), id(habits, 0) + 1);
        for (what, said) in [
            (
                "more than the window",
                data(SYN, own, &vec![b' '; (256 << 10) + 1]),
            ),
            (
                "more than a frame may",
                frame(DATA, SYN, own, u32::MAX, open),
            ),
            (
                "a window beyond all bounds",
                frame(WINDOW, SYN, own, u32::MAX, b""),
            ),
            ("a stream of the other side's", data(SYN, foreign, open)),
            ("a stream that nobody opened", data(0, own, open)),
            ("a type that is none", frame(9, SYN, own, 0, open)),
            (
                "another version",
                [&[7][..], &data(SYN, own, open)[1..]].concat(),
            ),
        ] {
            let came = run(habits, &said);
            assert_eq!(came, Came::default(), "{what}, {habits:?}");
        }
    }
}

/// Frames as a peer might write them that knows the protocol and does not keep to it.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let body = prop_oneof![
        Just(b"{\"service\":\"proxy\"}\n".to_vec()),
        Just(b"{\"service\":\"http\"}\nGET / HTTP/1.1\r\n\r\n".to_vec()),
        prop::collection::vec(any::<u8>(), 0..60),
        (0_usize..20_000).prop_map(|count| vec![b'x'; count]),
    ];
    let flags = prop_oneof![4 => 0_u16..16, 1 => any::<u16>()];
    let kind = prop_oneof![12 => 0_u8..4, 1 => any::<u8>()];
    let stated = prop_oneof![6 => Just(None), 1 => any::<u32>().prop_map(Some), 1 => (0_u32..64).prop_map(Some)];
    let one = (
        kind,
        flags,
        prop_oneof![20 => 0_u32..12, 1 => any::<u32>()],
        stated,
        body,
    );
    one.prop_map(|(kind, flags, id, stated, body)| {
        // Only data have a body.
        let body = if kind == DATA { body } else { Vec::new() };
        let length = stated.unwrap_or_else(|| u32::try_from(body.len()).unwrap());
        frame(kind, flags, id, length, &body)
    })
}

proptest! {
    #[test]
    fn any_frames_may_come(habits in 0_u8..16, frames in prop::collection::vec(hostile(), 0..60)) {
        run(Habits::of(habits), &frames.concat());
    }

    #[test]
    fn any_bytes_may_come(habits in 0_u8..16, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        run(Habits::of(habits), &bytes);
    }
}
