//! How much memory a runner takes at most, whatever its guest does.
//!
//! A stream's window bounds bytes, not what keeping them costs: yamux keeps each frame by itself, so that a guest that sends
//! single bytes to streams that nobody reads takes some seventy times its window, 2 GiB of a host in all. A runner has one VM,
//! and it is this VM alone that ends with it; its session says so, with the allocation that failed.
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Heap and private mappings of one runner (`RLIMIT_DATA` of setrlimit(2)). One that works, with all streams in use, takes less
/// than a fifth: 128 windows of 256 KiB, and its threads' stacks.
pub const RUNNER_BYTES: u64 = 512 << 20;

/// This process has no more than `bytes` from now on, or is aborted (std's `handle_alloc_error`).
///
/// # Errors
/// When the kernel refuses the limit, as it does where the hard limit is lower.
pub fn limit(bytes: u64) -> rustix::io::Result<()> {
    set(Some(bytes))
}

/// For a VMM, whose memory is the guest's: between fork and exec, only system calls.
pub(crate) fn lift() -> rustix::io::Result<()> {
    set(getrlimit(Resource::Data).maximum)
}

fn set(current: Option<u64>) -> rustix::io::Result<()> {
    let maximum = getrlimit(Resource::Data).maximum;
    setrlimit(Resource::Data, Rlimit { current, maximum })
}
