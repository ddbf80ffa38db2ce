//! The controller over real HTTP, with runners that are real HTTP servers on Unix sockets.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test looks for one event among all"
)]
#![expect(clippy::unwrap_used, reason = "a test's helpers end the test")]
mod audit;
mod auth;
mod backup;
mod causes;
mod cluster;
mod cluster_people;
mod cluster_tls;
mod collection;
mod confirm;
mod deploy;
mod disks;
mod failures;
mod lifecycle;
mod oidc;
mod openapi;
mod people;
mod pool;
mod requests;
mod restart;
mod rights;
mod schemathesis;
mod support;
mod tls;
mod views;
mod warm;
