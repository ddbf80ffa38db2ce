//! A provider pack, and after a line of dashes what its tool says and writes: what the agent does with both.
#![no_main]
use libfuzzer_sys::fuzz_target;
use vestibule_agent::hostile::sign_in;
use vestibule_api::pack::{Override, ProviderPack};

fuzz_target!(|input: &str| {
    let (pack, text) = input.split_once("\n---\n").unwrap_or((input, ""));
    let Ok(pack) = ProviderPack::parse("pack", pack) else {
        return;
    };
    // What waits for an operator's values is not for an agent.
    let Ok(pack) = pack.apply(&Override::default()) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    sign_in(dir.path(), &pack, text);
});
