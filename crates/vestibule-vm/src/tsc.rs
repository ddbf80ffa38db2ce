//! What the host's time-stamp counter ticks in a millisecond, measured: a guest's clock is built on it, and a snapshot
//! carries what the guest found.
use crate::kept;
use camino::Utf8Path;
use rustix::time::{ClockId, clock_gettime};
use std::{sync::OnceLock, time::Duration};

/// Two readings are so far apart: with their error of a microsecond this gives 50 parts in a million.
const SPAN: Duration = Duration::from_millis(20);
/// A reading between two looks at the clock is good when these are no further apart.
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
/// now: a kernel measures it once, too. Blocks for about 20 ms then.
pub fn khz(cache_dir: Option<&Utf8Path>) -> u64 {
    FOUND.get().copied().unwrap_or_else(|| found(cache_dir))
}

fn found(cache_dir: Option<&Utf8Path>) -> u64 {
    let boot = kept::boot_id().ok();
    kept::find(cache_dir, KEPT, boot.as_ref(), measure).unwrap_or_else(|rough| rough)
}

/// An error is a measurement between whose readings something came: good enough for once, not to be kept.
fn measure() -> Result<u64, u64> {
    let begin = reading();
    std::thread::sleep(SPAN);
    let end = reading();
    let ns = u128::try_from(end.ns - begin.ns).unwrap_or(1).max(1);
    let ticks = u128::from(end.ticks.wrapping_sub(begin.ticks));
    let khz = u64::try_from(ticks * 1_000_000 / ns).unwrap_or(0);
    if begin.apart_ns.max(end.apart_ns) <= CLOSE_NS {
        Ok(khz)
    } else {
        Err(khz)
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
        assert!(a > 100_000 && a.abs_diff(b) * 2000 < a, "{a} {b}");
    }

    #[test]
    fn it_is_measured_once_since_a_boot() {
        let home = camino_tempfile::tempdir().unwrap();
        // A rough one is not kept.
        let kept = |_: &u32| home.path().join(super::KEPT).exists();
        let first = (0..50).map(|_| super::khz(Some(home.path())));
        let first = first.zip(0..).find(|(_, n)| kept(n)).unwrap().0;
        assert_eq!(super::khz(Some(home.path())), first);
    }
}
