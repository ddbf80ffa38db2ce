//! What a viewer who may only look says: the relay's filter, from its own source. However the bytes are cut, the same passes;
//! what passed is the client's half of RFB without input, and the filter lets it pass again as it is.
#![no_main]
use libfuzzer_sys::fuzz_target;

#[path = "../../../vestibule-controller/src/relay/filter.rs"]
mod filter;
#[path = "../../../vestibule-controller/src/relay/filter/oracle.rs"]
mod oracle;

use filter::ViewOnly;

fuzz_target!(|bytes: &[u8]| {
    let mut whole = Vec::new();
    let passed = ViewOnly::new().pass(bytes, &mut whole);
    let (mut cut, mut filter) = (Vec::new(), ViewOnly::new());
    let broken = bytes
        .chunks(1)
        .any(|byte| filter.pass(byte, &mut cut).is_err());
    assert_eq!(passed.is_err(), broken);
    assert_eq!(whole, cut);
    assert!(whole.len() <= bytes.len());
    assert_eq!(oracle::more_than_looking(&whole), None);
    let mut again = Vec::new();
    ViewOnly::new().pass(&whole, &mut again).unwrap();
    assert_eq!(again, whole);
});
