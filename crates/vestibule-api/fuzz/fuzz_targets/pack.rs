//! A provider pack: read, filled in, written and sent.
#![no_main]
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/property/packs.rs"]
mod packs;

fuzz_target!(|text: &str| {
    drop(packs::read(text));
});
