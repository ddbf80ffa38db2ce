//! Tests of the runner against real parts: QEMU, sockets, servers. The guests of `bare.rs` are a few bytes of machine code
//! of our own, so they need no image; `guest.rs` needs one (`VESTIBULE_TEST_IMAGE`, the directory of an image).
mod bare;
mod egress;
mod guest;
mod qmp;
mod runner;
mod support;
