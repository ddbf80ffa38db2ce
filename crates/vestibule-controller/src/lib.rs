//! The controller: what somebody asked for, and everything that is done about it.
//!
//! | module | what it knows and owns |
//! |---|---|
//! | [`config`] | what an operator can set |
//! | `state` | the session's state machine, pure |
//! | `store` | rows: sessions, their events, machines, the outbox |
//! | `reconcile` | makes the host what the rows say |
//! | `machine` | runners: launch, follow, login, collect, teardown, evidence |
//! | `scheduler` | where runners run |
//! | `outbound` | requests of its own to servers that an operator names |
//! | `peers` | other controllers: requests are relayed to the one that can answer |
//! | `notices` | what controllers that share a database tell each other |
//! | `lease` | whether this controller may act for its host, where several share a database |
//! | `relay` | viewers' WebSockets to guests |
//! | `http`, `auth`, `oidc` | the one port, and who may use it |
//! | `packs`, `images` | what can be signed in to, and in what |
//! | `warm` | what a VM is made from: which image, which size, which snapshot or none |
//! | `backup` | database and vault in one file, and back |
//! | `live` | tickets, codes, viewers: memory only |
//!
//! The database is the truth. An HTTP handler changes a row and returns; what follows is carried out by reconcilers, so
//! the controller can be killed at any instruction and goes on from the rows. It never links VMM code and never mounts or
//! reads a disk: each VM belongs to a runner, a process that outlives the controller.
mod auth;
mod backup;
mod clock;
mod config;
mod core;
mod crash;
mod descriptors;
mod file;
mod http;
mod images;
mod lease;
mod listen;
mod live;
mod machine;
mod metrics;
mod notices;
mod oidc;
mod outbound;
mod packs;
mod peers;
mod people;
mod reconcile;
mod relay;
mod rights;
mod scheduler;
mod serve;
mod state;
mod store;
mod warm;

pub use auth::TokenError;
pub use backup::{
    BackupError, BackupFile, BackupManifest, BackupOptions, KeyPlace, Mismatch, RestoreError,
    RestoreOptions, backup, restore,
};
pub use config::{
    ClusterConfig, Config, ConfigError, ConfirmAccount, DeadlineConfig, EgressConfig, EngineKind,
    Limits, OidcConfig, SchedulerConfig, TlsConfig, VaultConfig, VmConfig,
};
pub use file::FileError;
pub use http::openapi;
pub use lease::LeaseError;
pub use listen::TlsError;
#[cfg(any(test, fuzzing))]
pub use machine::hostile;
pub use oidc::OidcSetupError;
pub use outbound::{ClientError, ReplyError};
pub use packs::{PackCheck, PacksError, check_packs, packs};
pub use peers::KeyError;
pub use rights::{Access, Reach, Right, rights, rights_table};
pub use scheduler::{EngineError, HostMemory, LaunchError, Scheduler};
pub use serve::{LockError, ServeError, Serving, serve, serve_with};
pub use store::StoreError;
