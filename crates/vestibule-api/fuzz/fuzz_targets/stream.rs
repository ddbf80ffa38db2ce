//! The stream before the multiplexer: what the other side says in a handshake (nobody without the key gets through), the
//! config drive, and the words that open a stream.
#![no_main]
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use vestibule_api::{
    mux::{StreamKey, guest_handshake, host_handshake},
    stream::{ConfigDrive, Open},
};

static KEY: LazyLock<StreamKey> = LazyLock::new(StreamKey::generate);

fuzz_target!(|bytes: &[u8]| {
    drop(ConfigDrive::from_bytes(bytes));
    drop(serde_json::from_slice::<Open>(bytes));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut io = tokio::io::join(bytes, tokio::io::sink());
        assert!(host_handshake(&mut io, &KEY).await.is_err());
        let mut io = tokio::io::join(bytes, tokio::io::sink());
        assert!(guest_handshake(&mut io, &KEY).await.is_err());
    });
});
