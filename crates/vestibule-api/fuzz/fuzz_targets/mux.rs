//! The stream behind the handshake: yamux' frames and the words that open a stream, from a peer that has the key. The first byte
//! says which side the peer is, and what both do besides.
#![no_main]
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/property/peers.rs"]
mod peers;

fuzz_target!(|input: &[u8]| {
    let Some((habits, bytes)) = input.split_first() else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(peers::withstand(peers::Habits::of(*habits), bytes));
});
