//! Sealed credentials and the audit log.
//!
//! ```text
//! vault/
//!   lock                 held while one process changes the vault
//!   master.key           32 bytes, base64, mode 0600 (unless the key comes from elsewhere)
//!   records/<id>         one sealed credential each
//!   audit.log            one line for everything that was stored, released or removed; append-only, chained
//! ```
//!
//! **Sealing.** A record's files are encrypted with XChaCha20-Poly1305 under a data key of the record's own; the data key
//! is encrypted under the master key. Both carry the record's header (version, credential, provider, user, session, dates,
//! the files' paths, modes and lengths) as associated data, so neither can be used in another record.
//!
//! **Audit.** Each line carries an HMAC-SHA256, under a key derived from the master key, of the line before it and itself.
//! The line that says that a record was stored holds the SHA-256 of the record's file; a record is only read while the
//! newest line about it says the same. An older or removed record that somebody puts back is therefore refused. A line is
//! on disk, synced, before what it speaks of happens: where it can't be written, no secret leaves.
//!
//! What this can't see: somebody who can write to the directory and puts back records *and* log together, both as they
//! were at one moment, while no vault is open.
//!
//! Everything here is synchronous and does file I/O; call it off the async runtime. Nothing here speaks HTTP or prints.
#![forbid(unsafe_code)]
#![deny(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic,
    clippy::expect_used,
    clippy::unwrap_used
)]
#![cfg_attr(
    test,
    expect(clippy::indexing_slicing, reason = "tests cut bytes at known places")
)]
mod audit;
mod file;
mod key;
mod record;
mod seal;
mod vault;

pub use audit::{Action, AuditError, AuditLine, AuditSummary, Fault};
pub use file::FileError;
pub use key::{KeyError, KeySource};
pub use record::{Content, ContentFile, CredentialMeta, FileMeta, NewCredential, RecordError};
pub use vault::{Access, CopyError, Listing, OpenError, PutError, ReadError, RemoveError, Vault};
