//! A journal, native or exported.
#![no_main]
use libfuzzer_sys::fuzz_target;
use vestibule_diagnose::{Evidence, diagnose};

fuzz_target!(|bytes: &[u8]| {
    let _ = diagnose(&Evidence::new().journal(bytes, "journal"));
});
