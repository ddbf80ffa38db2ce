//! What the host's time-stamp counter ticks in a millisecond, measured: a guest's clock is built on it, and a snapshot
//! carries what the guest found.
use crate::kept;
use camino::Utf8Path;
use rustix::time::{ClockId, clock_gettime};
use std::{sync::OnceLock, time::Duration};

/// Two readings are first so far apart, and then further, until what they may be off by is little enough.
const SPAN: Duration = Duration::from_millis(20);
/// A measurement may be off by so many parts in a million: a tenth of what a snapshot's host may differ by from this one.
const PPM: i128 = 50;
/// Nobody waits longer for a better one.
const LONGEST_NS: i128 = 1_000_000_000;
/// A reading between two looks at the clock is good when these are no further apart. On an emulated processor they never are.
const CLOSE_NS: i128 = 1_000;
const ATTEMPTS: u32 = 200;

/// In the directory for what was found out.
const KEPT: &str = "tsc.json";

/// What [`prepare`] found, in a process that waits for its VM.
static FOUND: OnceLock<u64> = OnceLock::new();

/// Finds out what the counter ticks, for the VM that this process will have. Blocks as [`khz`] does.
pub(crate) fn prepare(cache_dir: Option<&Utf8Path>) {
    FOUND.get_or_init(|| found(cache_dir));
}

/// What the counter ticks, as it was measured before since this host was booted and is kept in `cache_dir`, or else is measured
/// now: a kernel measures it once, too. Blocks for about 20 ms then, and on an emulated processor for some hundred.
pub fn khz(cache_dir: Option<&Utf8Path>) -> u64 {
    FOUND.get().copied().unwrap_or_else(|| found(cache_dir))
}

fn found(cache_dir: Option<&Utf8Path>) -> u64 {
    let boot = kept::boot_id().ok();
    kept::find(cache_dir, KEPT, boot.as_ref(), measure).unwrap_or_else(|rough| rough)
}

/// An error is a measurement into whose readings something came: good enough for once, not to be kept.
fn measure() -> Result<u64, u64> {
    let begin = reading();
    let mut span = SPAN;
    loop {
        std::thread::sleep(span);
        let end = reading();
        let ns = (end.ns - begin.ns).max(1);
        let ticks = i128::from(end.ticks.wrapping_sub(begin.ticks));
        let khz = u64::try_from(ticks * 1_000_000 / ns).unwrap_or(0);
        // Each is off by half of that at most.
        let off_ns = i128::midpoint(begin.apart_ns, end.apart_ns);
        if off_ns * 1_000_000 <= ns * PPM {
            return Ok(khz);
        }
        if ns >= LONGEST_NS {
            return Err(khz);
        }
        span *= 2;
    }
}

/// The clock and the counter at the same moment, but for `apart_ns`.
struct Reading {
    apart_ns: i128,
    ns: i128,
    ticks: u64,
}

fn reading() -> Reading {
    let mut best = Reading {
        apart_ns: i128::MAX,
        ns: 0,
        ticks: 0,
    };
    for _ in 0..ATTEMPTS {
        let before = raw_ns();
        let ticks = counter();
        let after = raw_ns();
        if after - before < best.apart_ns {
            best = Reading {
                apart_ns: after - before,
                ns: i128::midpoint(before, after),
                ticks,
            };
        }
        if best.apart_ns <= CLOSE_NS {
            break;
        }
    }
    best
}

/// A clock that nobody slews.
fn raw_ns() -> i128 {
    let now = clock_gettime(ClockId::MonotonicRaw);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

#[expect(unsafe_code, reason = "the instruction has no safe function")]
fn counter() -> u64 {
    // SAFETY: every 64-bit x86 has `rdtsc`, and Linux lets programs use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_measurements_agree() {
        let (a, b) = (super::khz(None), super::khz(None));
        println!("{a} kHz, {b} kHz");
        assert!(a > 100_000 && a.abs_diff(b) * 5_000 < a, "{a} {b}");
    }

    #[test]
    fn it_is_measured_once_since_a_boot() {
        let home = camino_tempfile::tempdir().unwrap();
        // A rough one is not kept.
        let kept = |_: &u64| home.path().join(super::KEPT).exists();
        let mut measured = (0..50).map(|_| super::khz(Some(home.path())));
        let first = measured.find(kept).unwrap();
        assert_eq!(super::khz(Some(home.path())), first);
    }
}
