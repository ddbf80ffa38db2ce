//! What anybody sends the agent in an HTTP connection; the first byte says who: its host, or a program in the guest.
#![no_main]
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use tempfile::TempDir;
use vestibule_agent::hostile::{Asker, answer};

static DIR: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

fuzz_target!(|input: &[u8]| {
    let Some((who, bytes)) = input.split_first() else {
        return;
    };
    let asker = if *who == b'g' {
        Asker::Guest
    } else {
        Asker::Host
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let answer = runtime.block_on(answer(DIR.path(), asker, bytes));
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."));
});
