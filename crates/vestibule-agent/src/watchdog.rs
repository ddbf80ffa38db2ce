//! Ends an agent that hangs, so that systemd begins it anew.
//!
//! systemd's own watchdog (`WatchdogSec=`) counts by the guest's monotonic clock, which goes on under Firecracker while a VM is
//! paused: after a pause that outlasts it, it kills an agent that is well (measured: 200 s of pause, and the agent was gone). A
//! thread that looks every few seconds takes a pause for one look that came late.
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// So many looks without a sign of life: it hangs.
const MOST: u32 = 12;

/// Watches the runtime that it is called from, which serves the requests.
///
/// # Panics
/// Where there is no memory for a thread.
pub(crate) fn watch() {
    watch_with(LOOK, || {
        let seconds = LOOK.as_secs() * u64::from(MOST);
        tracing::error!(seconds, "nothing is served; ending, to be started again");
        std::process::abort();
    });
}

fn watch_with(look: Duration, hangs: impl Fn() + Send + 'static) {
    let signs = Arc::new(AtomicU64::new(0));
    let seen = Arc::downgrade(&signs);
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(look);
        loop {
            tick.tick().await;
            signs.fetch_add(1, Ordering::Relaxed);
        }
    });
    thread::Builder::new()
        .name("watchdog".to_owned())
        .spawn(move || {
            let mut count = Count::default();
            // The runtime's end is the watchdog's.
            while let Some(signs) = seen.upgrade() {
                if count.hangs(signs.load(Ordering::Relaxed)) {
                    return hangs();
                }
                drop(signs);
                thread::sleep(look);
            }
        })
        .expect("the agent has few threads");
}

/// Looks in a row that found the same.
#[derive(Debug, Default)]
struct Count {
    last: u64,
    same: u32,
}

impl Count {
    fn hangs(&mut self, signs: u64) -> bool {
        self.same = if signs == self.last { self.same + 1 } else { 0 };
        self.last = signs;
        self.same >= MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_runtime_that_stands_still_is_noticed_and_one_that_goes_on_is_not() {
        let (told, hung) = mpsc::channel();
        let look = Duration::from_millis(20);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            watch_with(look, move || told.send(()).unwrap());
            tokio::time::sleep(look * 2 * MOST).await;
            assert!(hung.try_recv().is_err(), "it is served");
            hung.recv_timeout(Duration::from_secs(20)).unwrap();
        });
    }

    #[test]
    fn a_pause_is_one_look() {
        let mut count = Count::default();
        // Whatever the clock says: looks are counted, not time.
        for signs in [1, 2, 2, 3] {
            assert!(!count.hangs(signs));
        }
        let looks = (0..MOST).map(|_| count.hangs(3)).filter(|hangs| *hangs);
        assert_eq!(looks.count(), 1);
    }
}
