//! Named points at which a process can be made to die, to see what its death leaves. Release builds have none.
//!
//! `VESTIBULE_CRASH_AT=collect:sealed` ends a debug build the first time it passes that point, `…#2` the second time:
//! at once, without unwinding, as SIGKILL does.

/// Every point, in the order in which a sign-in passes them. Each lies between two things of which the second must also
/// happen, or not happen twice, when the process dies between them.
pub const POINTS: &[&str] = &[
    "place:planned",
    "launch:begin",
    "launch:started",
    "claim:done",
    "login:claimed",
    "login:asked",
    "follow:taken-in",
    "collect:begin",
    "collect:fetched",
    "vault:staged",
    "vault:written-down",
    "collect:sealed",
    "effect:carried-out",
    "teardown:ended",
    "teardown:cleaned",
    "teardown:told",
    "discard:begin",
    "vault:removed",
    "discard:removed",
];

/// The same in a runner, from its VMM's start to its VM's end.
pub const RUNNER_POINTS: &[&str] = &[
    "runner:begin",
    "runner:launched",
    "runner:evidence",
    "runner:ended",
    "runner:removed",
];

/// Dies here when the environment says so.
#[inline]
pub fn point(name: &'static str) {
    #[cfg(debug_assertions)]
    debug::pass(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
mod debug {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };

    static AT: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static PASSED: AtomicU32 = AtomicU32::new(0);

    pub(super) fn pass(name: &'static str) {
        let known = super::POINTS.contains(&name) || super::RUNNER_POINTS.contains(&name);
        debug_assert!(known, "{name} is in a list");
        let at = AT.get_or_init(|| {
            std::env::var("VESTIBULE_CRASH_AT")
                .ok()
                .map(|at| parse(&at))
        });
        let Some((wanted, times)) = at else { return };
        if wanted == name && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *times {
            std::process::abort();
        }
    }

    fn parse(at: &str) -> (String, u32) {
        match at.split_once('#') {
            Some((name, times)) => (name.to_owned(), times.parse().unwrap_or(1)),
            None => (at.to_owned(), 1),
        }
    }
}
