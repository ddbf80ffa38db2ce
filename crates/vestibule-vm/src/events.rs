//! The runner's events: numbered without gaps, kept in memory up to a bound, followed by any number of readers. What goes
//! to the evidence is without a device flow's user code, which the person needs and no disk.
use bytes::Bytes;
use futures_util::stream::{self, Stream};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;
use vestibule_api::{
    agent::{AgentEvent, LoginEvent},
    machine::{RunnerEvent, RunnerEventKind},
    time::Timestamp,
};

/// Bytes of events kept for replay. A reader that comes later than that sees a first number above the one it asked for.
const KEEP: usize = 4 << 20;

/// See the module.
#[derive(Debug)]
pub struct EventLog {
    kept: Mutex<Kept>,
    /// Number of the last event, and whether it is the last one ever.
    last: watch::Sender<(u64, bool)>,
}

#[derive(Debug, Default)]
struct Kept {
    /// The last one has number `last`.
    lines: VecDeque<Line>,
    bytes: usize,
    last: u64,
}

/// One event, with its newline.
#[derive(Debug)]
struct Line {
    text: Bytes,
    /// Where it differs from `text`.
    for_disk: Option<Bytes>,
}

impl Line {
    fn new(event: &RunnerEvent) -> Self {
        let for_disk = without_secret(&event.event).map(|kind| {
            encode(&RunnerEvent {
                event: kind,
                ..event.clone()
            })
        });
        Self {
            text: encode(event),
            for_disk,
        }
    }

    fn for_disk(&self) -> &Bytes {
        self.for_disk.as_ref().unwrap_or(&self.text)
    }

    fn len(&self) -> usize {
        self.text.len() + self.for_disk.as_ref().map_or(0, Bytes::len)
    }
}

fn encode(event: &RunnerEvent) -> Bytes {
    let mut line = serde_json::to_vec(event).expect("events hold nothing that JSON cannot express");
    line.push(b'\n');
    line.into()
}

/// The event as it may be written to a disk, where that is not as it is.
fn without_secret(event: &RunnerEventKind) -> Option<RunnerEventKind> {
    match event {
        RunnerEventKind::Agent {
            event:
                AgentEvent::Login {
                    event: LoginEvent::UserCode { .. },
                },
        } => Some(RunnerEventKind::Agent {
            event: AgentEvent::Login {
                event: LoginEvent::UserCode {
                    code: String::new(),
                },
            },
        }),
        // The agent makes findings and URLs without queries, codes and tokens.
        RunnerEventKind::State { .. }
        | RunnerEventKind::Phase { .. }
        | RunnerEventKind::Agent { .. }
        | RunnerEventKind::Egress { .. }
        | RunnerEventKind::Viewers { .. }
        | RunnerEventKind::FirstFrame
        | RunnerEventKind::Failed { .. }
        | RunnerEventKind::Ended { .. } => None,
    }
}

impl Default for EventLog {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            last: watch::Sender::new((0, false)),
        }
    }
}

impl EventLog {
    /// Adds one event.
    pub fn publish(&self, event: RunnerEventKind) {
        let last = self.lock().push(event);
        self.last.send_replace((last, false));
    }

    /// Says that no event will follow: readers that have seen the last one end.
    pub fn end(&self) {
        self.last.send_modify(|(_, ended)| *ended = true);
    }

    /// Every line that is kept, for the evidence.
    pub fn lines(&self) -> Vec<u8> {
        let kept = self.lock();
        let lines = kept.lines.iter().map(|line| line.for_disk());
        lines.flatten().copied().collect()
    }

    /// The lines after number `after`, then those to come, until the last.
    pub fn follow(self: &Arc<Self>, after: u64) -> impl Stream<Item = Bytes> + Send + use<> {
        let (log, news) = (Arc::clone(self), self.last.subscribe());
        stream::unfold((log, after, news), async move |(log, after, mut news)| {
            loop {
                let (last, ended) = *news.borrow_and_update();
                if last > after {
                    let (lines, last) = log.lock().after(after);
                    return Some((lines, (log, last, news)));
                }
                if ended || news.changed().await.is_err() {
                    return None;
                }
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn push(&mut self, event: RunnerEventKind) -> u64 {
        self.last += 1;
        let event = RunnerEvent {
            seq: self.last,
            at: Timestamp::now(),
            event,
        };
        let line = Line::new(&event);
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.bytes > KEEP && self.lines.len() > 1 {
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.len());
        }
        self.last
    }

    /// The lines after number `after`, and the number of the last of them.
    fn after(&self, after: u64) -> (Bytes, u64) {
        let wanted = usize::try_from(self.last.saturating_sub(after)).unwrap_or(usize::MAX);
        let skip = self.lines.len().saturating_sub(wanted);
        let lines = self.lines.iter().skip(skip).map(|line| &line.text);
        (lines.flatten().copied().collect(), self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;

    fn viewers(count: u32) -> RunnerEventKind {
        RunnerEventKind::Viewers { count }
    }

    async fn numbers(log: &Arc<EventLog>, after: u64) -> Vec<u64> {
        let all: Vec<Bytes> = log.follow(after).collect().await;
        all.concat()
            .split(|b| *b == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice::<RunnerEvent>(line).unwrap().seq)
            .collect()
    }

    #[tokio::test]
    async fn a_reader_gets_what_it_missed_and_what_comes() {
        let log = Arc::new(EventLog::default());
        log.publish(viewers(1));
        log.publish(viewers(2));
        let (seen, ()) = tokio::join!(numbers(&log, 1), async {
            log.publish(viewers(3));
            tokio::task::yield_now().await;
            log.publish(viewers(4));
            log.end();
        });
        assert_eq!(seen, [2, 3, 4]);
        assert_eq!(numbers(&log, 99).await, [0u64; 0]);
    }

    #[tokio::test]
    async fn a_user_code_reaches_readers_and_no_disk() {
        let log = Arc::new(EventLog::default());
        let code = "ABCD-1234".to_owned();
        let event = AgentEvent::Login {
            event: LoginEvent::UserCode { code },
        };
        log.publish(RunnerEventKind::Agent { event });
        log.end();
        let read: Vec<Bytes> = log.follow(0).collect().await;
        assert!(
            String::from_utf8(read.concat())
                .unwrap()
                .contains("ABCD-1234")
        );
        let disk = String::from_utf8(log.lines()).unwrap();
        assert!(
            disk.contains("user-code") && !disk.contains("ABCD"),
            "{disk}"
        );
    }

    #[tokio::test]
    async fn memory_is_bounded_and_the_newest_are_kept() {
        let log = Arc::new(EventLog::default());
        for count in 0..60_000 {
            log.publish(viewers(count));
        }
        log.end();
        assert!(log.lines().len() <= KEEP);
        let seen = numbers(&log, 0).await;
        assert_eq!(seen.last(), Some(&60_000));
        assert!(seen.windows(2).all(|w| w[1] == w[0] + 1));
    }
}
