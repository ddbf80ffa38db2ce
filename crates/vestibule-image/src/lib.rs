//! Golden images: recipe → build → lint → boot gate → publish → snapshot, in a content-addressed store.
//!
//! | module | what it knows |
//! |---|---|
//! | [`recipe`] | what an image is made of, as `recipe.toml` says it |
//! | `bootstrap`, `apt`, `kernel`, `npm` | where layers come from: Debian packages, kernel, provider tools |
//! | `tree`, `layers`, `archive` | a root in memory: layers laid over each other, written once as sorted tar |
//! | `units`, `accounts`, `authority`, `checks` | what is done to a root, and what is refused |
//! | `ext4`, `cpio`, `vmlinux` | the root image, the initrd, the kernel as Firecracker boots it; nothing is mounted |
//! | [`build`](mod@build), `cache`, `host` | the order of it all, what is kept between builds, commands of the host |
//! | [`store`] | images by digest, aliases, history, snapshots |
//! | [`verify`](mod@verify), [`lint`](mod@lint) | what an image must prove before an alias may point to it |
//! | [`diff`](mod@diff) | what changed from one image to another |
//! | [`snapshot`](mod@snapshot) | memory of a VM that is ready, from which others begin |
//! | `boot` | a VM of the store's own, for the last two |
//!
//! Two builds of one recipe from the same packages give the same digest: nothing that enters an image comes from the
//! clock, the order of a directory, or the building user.
mod accounts;
mod apt;
mod archive;
mod authority;
mod boot;
mod bootstrap;
pub mod build;
mod cache;
mod checks;
mod cpio;
pub mod diff;
mod digest;
mod elf;
mod ext4;
mod failed;
mod host;
mod kernel;
mod layers;
pub mod lint;
mod npm;
mod progress;
pub mod recipe;
pub mod snapshot;
mod sparse;
pub mod store;
mod tree;
mod units;
pub mod verify;
mod vmlinux;

pub use boot::{BootError, BootOptions, Timing};
pub use build::{BuildError, BuildOptions, Built, build};
pub use cache::CacheError;
pub use diff::{Change, Difference, diff};
pub use failed::failed;
pub use lint::{LintError, lint};
pub use progress::{Event, Phase, Progress, Silent};
pub use snapshot::{SnapshotError, SnapshotOptions, Taken, Trial, snapshot, try_snapshot};
pub use sparse::clone_image;
pub use store::{Gc, KEEP_UNPUBLISHED, Store, StoreError};
pub use verify::{SignIn, Verification, VerifyError, verify};

/// The latest time that an image shows: 2026-01-01T00:00:00Z, in seconds. Files that packages date earlier keep theirs.
pub(crate) const EPOCH: u64 = 1_767_225_600;
