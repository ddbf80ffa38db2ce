//! The runner: one process that owns one VM. It starts the VMM, keeps its console, relays screen and agent, is the guest's
//! way out, and writes the evidence bundle when the VM ends. It knows nothing of other VMs or of providers.
//!
//! Entry points: [`run`] (the role `run-vm`) and [`doctor`].
//!
//! ```text
//! VmSpec ─▶ runner::run ─▶ driver ─▶ VMM ─▶ guest
//!              │  ▲                            │ one virtio-serial port, or a vsock
//!   runner.sock│  └── link: handshake, yamux ◀─┘
//!              ▼            │ Open::Proxy
//!          controller       ▼
//!                        egress ─▶ the world
//! ```
pub mod config_drive;
pub mod core_dump;
mod cpu;
pub mod doctor;
pub mod driver;
pub mod egress;
pub mod events;
pub mod evidence;
mod faults;
mod file;
pub mod firecracker;
pub mod image;
pub mod jail;
mod kept;
pub mod kvm;
pub mod log;
pub mod memory;
pub mod process;
mod processes;
pub mod qemu;
mod runner;
pub mod snapshot;
mod socket;
pub mod tsc;
mod until;

pub use doctor::doctor;
pub use runner::{Prepared, RunError, SOCKET, prepare, run};
