//! Ready or not, and what is missing. Each condition is a fact that one task reports; ready is when none is missing.
use crate::{agent::Agent, guest::ImageFacts};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;
use vestibule_api::agent::{AgentEvent, HealthStatus};

/// What must hold. The order is the order of `waitingFor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Condition {
    /// The host is on the stream.
    Stream,
    /// Every required unit of the image is active.
    Units,
    /// The browser's window is mapped and the screen shows it.
    Painted,
}

/// The conditions that do not hold, each with words for it.
#[derive(Debug)]
pub(crate) struct Readiness {
    missing: watch::Sender<BTreeMap<Condition, Vec<String>>>,
    was_ready: watch::Sender<bool>,
}

impl Readiness {
    /// Nothing holds yet of what an image with these facts needs.
    pub(crate) fn new(image: &ImageFacts) -> Self {
        let mut missing =
            BTreeMap::from([(Condition::Stream, vec!["the host on the stream".to_owned()])]);
        if !image.required_units.is_empty() {
            missing.insert(Condition::Units, image.required_units.clone());
        }
        if image.has("browser") {
            missing.insert(
                Condition::Painted,
                vec!["the browser on the screen".to_owned()],
            );
        }
        Self {
            missing: watch::Sender::new(missing),
            was_ready: watch::Sender::new(false),
        }
    }

    /// Says that `condition` lacks `what`; nothing lacking means that it holds.
    pub(crate) fn set(&self, condition: Condition, what: Vec<String>) {
        self.missing.send_if_modified(|missing| {
            let before = missing.get(&condition).map_or(&[][..], Vec::as_slice);
            if before == what {
                return false;
            }
            if what.is_empty() {
                missing.remove(&condition)
            } else {
                missing.insert(condition, what)
            };
            true
        });
    }

    /// Status and what is missing.
    pub(crate) fn now(&self) -> (HealthStatus, Vec<String>) {
        let waiting_for: Vec<_> = self.missing.borrow().values().flatten().cloned().collect();
        let status = match (waiting_for.is_empty(), *self.was_ready.borrow()) {
            (true, _) => HealthStatus::Ready,
            (false, true) => HealthStatus::Degraded,
            (false, false) => HealthStatus::Starting,
        };
        (status, waiting_for)
    }
}

impl Agent {
    /// Turns each change of what is missing into an event, and the first time that nothing is into `Ready`.
    pub(crate) async fn watch_readiness(self: Arc<Self>) {
        let mut changes = self.readiness.missing.subscribe();
        changes.mark_changed();
        while changes.changed().await.is_ok() {
            changes.borrow_and_update();
            let (status, waiting_for) = self.readiness.now();
            if status == HealthStatus::Ready {
                self.readiness.was_ready.send_replace(true);
                self.events.push(AgentEvent::Ready {
                    health: self.health(),
                });
            } else {
                self.events.push(AgentEvent::Starting { waiting_for });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_when_nothing_is_missing() {
        let facts = r#"{"requiredUnits": ["x.service"], "features": ["terminal"]}"#;
        let readiness = Readiness::new(&serde_json::from_str(facts).unwrap());
        assert_eq!(readiness.now().0, HealthStatus::Starting);
        readiness.set(Condition::Stream, Vec::new());
        assert_eq!(
            readiness.now(),
            (HealthStatus::Starting, vec!["x.service".to_owned()])
        );
        readiness.set(Condition::Units, Vec::new());
        assert_eq!(readiness.now(), (HealthStatus::Ready, Vec::new()));
        readiness.was_ready.send_replace(true);
        readiness.set(Condition::Painted, vec!["the browser's window".into()]);
        assert_eq!(readiness.now().0, HealthStatus::Degraded);
    }
}
