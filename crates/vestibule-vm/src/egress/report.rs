//! What was refused, as events: at most one per host, port and reason a minute, each saying how many attempts it stands
//! for. A guest that hammers a thousand hosts fills neither memory nor log.
use crate::events::EventLog;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use vestibule_api::{egress::EgressReason, machine::RunnerEventKind};

/// At most one event of a kind in this time.
const WINDOW: Duration = Duration::from_secs(60);
/// So many kinds are told apart; the rest is counted together.
const KINDS: usize = 512;
/// The host under which the rest is counted.
const OTHERS: &str = "(others)";

type Kind = (String, u16, EgressReason);

/// See the module.
#[derive(Debug)]
pub struct Reporter {
    events: Arc<EventLog>,
    kinds: Mutex<HashMap<Kind, Window>>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    /// Attempts since the last event.
    held: u64,
}

impl Reporter {
    pub fn new(events: Arc<EventLog>) -> Self {
        Self {
            events,
            kinds: Mutex::default(),
        }
    }

    /// Counts one attempt; publishes it if it is the first of its kind in this minute.
    pub fn refused(&self, host: &str, port: u16, reason: EgressReason, now: Instant) {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kind = (host.chars().take(253).collect(), port, reason);
        if kinds.len() >= KINDS && !kinds.contains_key(&kind) {
            kind = (OTHERS.to_owned(), 0, reason);
        }
        let window = kinds.entry(kind.clone());
        let known = matches!(window, std::collections::hash_map::Entry::Occupied(_));
        let window = window.or_insert(Window {
            since: now,
            held: 0,
        });
        window.held += 1;
        if !known || now.duration_since(window.since) >= WINDOW {
            self.publish(&kind, window, now);
        }
    }

    /// Publishes what was held back for a minute, and forgets kinds that did not come again. Called now and then.
    pub fn tick(&self, now: Instant) {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        kinds.retain(|kind, window| {
            if now.duration_since(window.since) < WINDOW {
                return true;
            }
            let came_again = window.held > 0;
            if came_again {
                self.publish(kind, window, now);
            }
            came_again
        });
    }

    /// Publishes everything that is held back: the VM ends.
    pub fn flush(&self, now: Instant) {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        for (kind, window) in kinds.iter_mut().filter(|(_, window)| window.held > 0) {
            self.publish(kind, window, now);
        }
    }

    fn publish(&self, kind: &Kind, window: &mut Window, now: Instant) {
        let (host, port, reason) = kind.clone();
        let count = std::mem::take(&mut window.held);
        window.since = now;
        self.events.publish(RunnerEventKind::Egress {
            host,
            port,
            reason,
            count,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EgressReason::Private;
    use vestibule_api::machine::RunnerEvent;

    fn counts(events: &EventLog) -> Vec<(String, u64)> {
        let lines = events.lines();
        let lines = lines.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        lines
            .map(|line| {
                let event = serde_json::from_slice::<RunnerEvent>(line).unwrap().event;
                let RunnerEventKind::Egress { host, count, .. } = event else {
                    panic!("{event:?}")
                };
                (host, count)
            })
            .collect()
    }

    #[test]
    fn one_event_a_minute_and_nothing_is_lost() {
        let events = Arc::new(EventLog::default());
        let reporter = Reporter::new(Arc::clone(&events));
        let start = Instant::now();
        for n in 0..100 {
            reporter.refused("a", 1, Private, start + Duration::from_millis(n));
        }
        reporter.tick(start + Duration::from_secs(59));
        assert_eq!(counts(&events), [("a".into(), 1)]);
        reporter.tick(start + Duration::from_secs(60));
        assert_eq!(counts(&events)[1..], [("a".into(), 99)]);
        reporter.tick(start + Duration::from_secs(120));
        reporter.refused("a", 1, Private, start + Duration::from_secs(121));
        reporter.refused("a", 1, Private, start + Duration::from_secs(122));
        reporter.flush(start + Duration::from_secs(123));
        assert_eq!(counts(&events)[2..], [("a".into(), 1), ("a".into(), 1)]);
    }

    #[test]
    fn many_hosts_do_not_fill_memory() {
        let events = Arc::new(EventLog::default());
        let reporter = Reporter::new(Arc::clone(&events));
        let start = Instant::now();
        for n in 0..5_000 {
            reporter.refused(&format!("host{n}"), 1, Private, start);
        }
        reporter.flush(start);
        let counts = counts(&events);
        assert!(counts.len() <= KINDS + 2, "{}", counts.len());
        assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), 5_000);
    }
}
