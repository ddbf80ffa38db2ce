//! Wire types of Vestibule: what controller, runner, agent, image store and people's tools say to each other.
//!
//! One Rust type per wire type. JSON is camelCase. Requests refuse unknown fields; replies tolerate them, so that
//! a newer peer can add one. Nothing here does I/O except the thin HTTP client behind the feature `client`,
//! the one stream behind the feature `stream`, the view's frames behind the feature `view` and what passes open files
//! behind the feature `descriptor`.
//!
//! | module | who says it to whom |
//! |---|---|
//! | [`ids`] | everyone |
//! | [`session`] | controller ⇄ people: what somebody asked for |
//! | [`control`] | controller ⇄ people: VMs, evidence, readiness, sign-in to the dashboard |
//! | [`machine`] | runner ⇄ controller: one life of a VM, its specification and its events |
//! | [`agent`] | agent ⇄ runner and controller: health, report, sign-in |
//! | [`stream`] | host ⇄ guest: how each multiplexed stream begins, and the handshake before the first |
//! | `mux` | the handshake and the multiplexer themselves, behind the feature `stream` |
//! | `view` | runner and controller: the view's frames, behind the feature `view` |
//! | `descriptor`, `standby` | open files for another process, and a runner that waits for its VM; behind the feature `descriptor` |
//! | [`egress`] | runner: the policy of the way out and what it refused |
//! | [`pack`] | provider packs, one TOML file each |
//! | [`image`] | image store: manifest, views |
//! | [`snapshot`] | memory snapshots: manifest, and what one is bound to |
//! | [`cause`], [`finding`] | the vocabulary of verdicts |
//! | [`error`] | every HTTP error body |
//! | [`crash`] | tests: named points at which a process dies |
//! | [`secret`] | secrets, which have no wire form but a sealed one |
pub mod agent;
pub mod cause;
#[cfg(feature = "client")]
pub mod client;
pub mod control;
pub mod crash;
#[cfg(feature = "descriptor")]
pub mod descriptor;
pub mod egress;
pub mod error;
pub mod finding;
pub mod ids;
pub mod image;
pub mod machine;
#[cfg(feature = "stream")]
pub mod mux;
pub mod pack;
pub mod people;
pub mod secret;
pub mod session;
pub mod snapshot;
#[cfg(feature = "descriptor")]
pub mod standby;
pub mod stream;
pub mod time;
#[cfg(feature = "view")]
pub mod view;
