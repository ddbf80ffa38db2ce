//! What the host's time-stamp counter ticks in a millisecond, measured: a guest's clock is built on it, and a snapshot
//! carries what the guest found.
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Two readings are so far apart: with their error of a microsecond this gives 50 parts in a million.
const SPAN: Duration = Duration::from_millis(20);
/// A reading between two looks at the clock is good when these are no further apart.
const CLOSE_NS: i128 = 1_000;
const ATTEMPTS: u32 = 200;

/// Blocks for about 20 ms.
pub fn khz() -> u64 {
    let (begin_ns, begin) = reading();
    std::thread::sleep(SPAN);
    let (end_ns, end) = reading();
    let ns = u128::try_from(end_ns - begin_ns).unwrap_or(1).max(1);
    let ticks = u128::from(end.wrapping_sub(begin));
    u64::try_from(ticks * 1_000_000 / ns).unwrap_or(0)
}

/// The clock in nanoseconds and the counter at the same moment.
fn reading() -> (i128, u64) {
    let mut best = (i128::MAX, 0, 0);
    for _ in 0..ATTEMPTS {
        let before = raw_ns();
        let ticks = counter();
        let after = raw_ns();
        if after - before < best.0 {
            best = (after - before, i128::midpoint(before, after), ticks);
        }
        if best.0 <= CLOSE_NS {
            break;
        }
    }
    (best.1, best.2)
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
        let (a, b) = (super::khz(), super::khz());
        println!("{a} kHz, {b} kHz");
        assert!(a > 100_000 && a.abs_diff(b) * 2000 < a, "{a} {b}");
    }
}
