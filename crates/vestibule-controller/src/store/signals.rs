//! Who waits for a change of the rows is woken here, within this process. Level-triggered: whoever is woken looks at the rows.
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;
use vestibule_api::ids::SessionId;

/// Sessions that somebody listens to.
type Listened = Mutex<HashMap<SessionId, watch::Sender<()>>>;

fn locked(listened: &Listened) -> MutexGuard<'_, HashMap<SessionId, watch::Sender<()>>> {
    listened.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes those who wait.
#[derive(Debug)]
pub(crate) struct Signals {
    /// There may be work for reconcilers.
    pub(crate) work: watch::Sender<()>,
    sessions: Arc<Listened>,
}

/// Hears of one session's changes, of no other's: with thousands of listeners, each change wakes whom it concerns.
#[derive(Debug)]
pub(crate) struct Listener {
    id: SessionId,
    changes: watch::Receiver<()>,
    sessions: Arc<Listened>,
}

impl Signals {
    pub(super) fn new() -> Self {
        Self {
            work: watch::channel(()).0,
            sessions: Arc::default(),
        }
    }

    /// Makes every reconciler look at the rows.
    pub(crate) fn wake(&self) {
        self.work.send_replace(());
    }

    /// The session has new events.
    pub(crate) fn changed(&self, id: SessionId) {
        if let Some(changes) = locked(&self.sessions).get(&id) {
            changes.send_replace(());
        }
    }

    /// Listens to the session from now on.
    pub(crate) fn listen(&self, id: SessionId) -> Listener {
        let changes = locked(&self.sessions)
            .entry(id)
            .or_insert_with(|| watch::channel(()).0)
            .subscribe();
        Listener {
            id,
            changes,
            sessions: Arc::clone(&self.sessions),
        }
    }
}

impl Listener {
    /// Resolves when the session changed since the last call, or since the listener was made. May be dropped at any time.
    pub(crate) async fn changed(&mut self) {
        // The sender lives as long as somebody listens.
        drop(self.changes.changed().await);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut sessions = locked(&self.sessions);
        // This one goes while nobody else counts: of two that leave at once, one is the last.
        drop(std::mem::replace(&mut self.changes, watch::channel(()).1));
        if sessions
            .get(&self.id)
            .is_some_and(|changes| changes.receiver_count() == 0)
        {
            sessions.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    #[test]
    fn a_listener_hears_of_its_session_alone_and_leaves_nothing() {
        let signals = Signals::new();
        let (one, other) = (SessionId::generate(), SessionId::generate());
        let (mut first, mut second) = (signals.listen(one), signals.listen(one));
        signals.changed(other);
        assert!(first.changed().now_or_never().is_none());
        signals.changed(one);
        signals.changed(one);
        for listener in [&mut first, &mut second] {
            assert!(listener.changed().now_or_never().is_some());
            assert!(listener.changed().now_or_never().is_none(), "told once");
        }
        drop(first);
        signals.changed(one);
        assert!(second.changed().now_or_never().is_some());
        drop(second);
        assert!(locked(&signals.sessions).is_empty());
        signals.changed(one);
    }
}
