//! Tests of the runner against real parts: QEMU, sockets, servers. The guests of `bare.rs` are a few bytes of machine code
//! of our own, so they need no image; `guest.rs` boots the image that `VESTIBULE_TEST_IMAGE` names, and is ignored unless
//! asked for.
#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test looks for one event among all"
)]
#![expect(
    clippy::print_stdout,
    reason = "figures are for whoever runs the tests"
)]
mod bare;
mod copies;
mod egress;
mod firecracker;
mod guest;
mod inherited;
mod memory;
mod profile;
mod qmp;
mod runner;
mod snapshot;
mod support;
