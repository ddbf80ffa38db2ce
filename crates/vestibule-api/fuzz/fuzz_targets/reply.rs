//! What an agent answers, as runner and controller read it: a reply's bytes, its JSON, a line of its events.
#![no_main]
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/property/replies.rs"]
mod replies;

fuzz_target!(|bytes: &[u8]| {
    replies::understand(bytes);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(replies::hear(bytes));
});
