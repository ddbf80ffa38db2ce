//! A serial console.
#![no_main]
use libfuzzer_sys::fuzz_target;
use vestibule_diagnose::{Evidence, diagnose};

fuzz_target!(|bytes: &[u8]| {
    let evidence = Evidence::new().serial(bytes.to_vec());
    let _ = diagnose(&evidence.cmdline("console=ttyS0 root=/dev/vda"));
});
