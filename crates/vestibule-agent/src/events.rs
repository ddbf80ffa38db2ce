//! The agent's events, numbered from 1. A bounded part is kept, so that a host that connects late, or again, misses none.
use futures_util::stream::{self, Stream};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::watch;
use vestibule_api::{
    agent::{AgentEvent, AgentEventLine, LoginEvent},
    time::Timestamp,
};

/// So many events are kept. A sign-in has some tens.
const KEPT: usize = 4096;

/// The log of events.
#[derive(Debug)]
pub(crate) struct EventLog {
    kept: Mutex<VecDeque<AgentEventLine>>,
    last: watch::Sender<u64>,
}

impl EventLog {
    pub(crate) fn new() -> Self {
        Self {
            kept: Mutex::new(VecDeque::new()),
            last: watch::Sender::new(0),
        }
    }

    /// Appends `event`.
    pub(crate) fn push(&self, event: AgentEvent) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = *self.last.borrow() + 1;
        // The host may set the clock back a little; readers tell by time what is new to them.
        let after = kept.back().map_or(0, |line| line.at.as_micros() + 1);
        let at = Timestamp::now().max(Timestamp::from_micros(after));
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(AgentEventLine { seq, at, event });
        drop(kept);
        self.last.send_replace(seq);
    }

    /// Forgets everything and begins with 1 again: this is another VM.
    pub(crate) fn forget(&self) {
        self.kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.last.send_replace(0);
    }

    /// Appends a step of the sign-in.
    pub(crate) fn login(&self, event: LoginEvent) {
        self.push(AgentEvent::Login { event });
    }

    fn after(&self, seq: u64) -> Vec<AgentEventLine> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().filter(|line| line.seq > seq).cloned().collect()
    }

    /// Every event after `seq`: those kept, then each as it happens, in batches. Never ends by itself.
    pub(crate) fn follow(self: Arc<Self>, seq: u64) -> impl Stream<Item = Vec<AgentEventLine>> {
        let changes = self.last.subscribe();
        stream::unfold((self, changes, seq), |(log, mut changes, seq)| async move {
            changes.wait_for(|last| *last > seq).await.ok()?;
            let lines = log.after(seq);
            let last = lines.last().map_or(seq, |line| line.seq);
            Some((lines, (log, changes, last)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;

    #[tokio::test]
    async fn followers_get_what_was_and_what_comes() {
        let log = Arc::new(EventLog::new());
        log.push(AgentEvent::BrowserRestarted);
        log.login(LoginEvent::BrowserOpened);
        let mut follower = Box::pin(Arc::clone(&log).follow(1));
        assert_eq!(follower.next().await.unwrap()[0].seq, 2);
        let next = tokio::spawn(async move { follower.next().await.unwrap() });
        log.login(LoginEvent::Cancelled);
        assert_eq!(
            next.await.unwrap()[0].event,
            AgentEvent::Login {
                event: LoginEvent::Cancelled
            }
        );
    }

    #[test]
    fn the_log_is_bounded_and_keeps_counting() {
        let log = EventLog::new();
        for _ in 0..KEPT + 10 {
            log.push(AgentEvent::BrowserRestarted);
        }
        let kept = log.after(0);
        assert_eq!((kept.len(), kept[0].seq), (KEPT, 11));
    }
}
