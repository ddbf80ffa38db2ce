//! Firecracker's API, typed: 1.12 and newer.
pub mod api;
#[cfg(test)]
mod contract;
pub mod request;
pub mod version;
