//! A unit file, or a drop-in.
#![no_main]
use libfuzzer_sys::fuzz_target;
use vestibule_diagnose::units::parse;

fuzz_target!(|bytes: &[u8]| {
    let parsed = parse::parse(bytes, "f.service");
    assert!(parsed.assignments.len() <= bytes.len());
});
