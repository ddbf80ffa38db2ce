//! A line of a runner's events that a guest had a word in, and the body of an agent's refusal: what the controller keeps of them.
#![no_main]
use libfuzzer_sys::fuzz_target;
use vestibule_controller::hostile;

fuzz_target!(|text: &str| {
    for watched in [false, true] {
        hostile::take_in(text.as_bytes(), watched);
    }
    hostile::refuse(text);
});
