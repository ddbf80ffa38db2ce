//! Tests of the testkit's own servers and clients, and, where a VM is needed, of Vestibule as a whole. The latter are
//! ignored unless asked for (`script/test vendors egress failures snapshots`, or `cargo test -p vestibule-testkit --test it
//! -- --ignored`): they need built images and take minutes each under software emulation.
mod bench;
mod conformance;
mod crashes;
mod nested;
mod rfb;
mod vendor;
mod vm;
