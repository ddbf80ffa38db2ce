//! What each required unit waits for, in words, and since when.
use std::collections::BTreeMap;
use vestibule_api::{
    agent::{JobReport, UnitReport},
    time::Timestamp,
};

/// Units named in one line; a job may wait for half of the boot.
const NAMED: usize = 4;

/// The words for each unit that is not active, with the moment at which they were first true.
#[derive(Debug, Default)]
pub(super) struct Waits(BTreeMap<String, (String, Timestamp)>);

impl Waits {
    /// The words for what PID 1 says now. A unit whose words are the same as the last time keeps their moment.
    pub(super) fn words(
        &mut self,
        units: &[UnitReport],
        jobs: &[JobReport],
        now: Timestamp,
    ) -> Vec<String> {
        let last = std::mem::take(&mut self.0);
        for unit in units.iter().filter(|unit| unit.active != "active") {
            let job = jobs.iter().find(|job| job.unit == unit.name);
            let words = describe(unit, job);
            let since = match last.get(&unit.name) {
                Some((before, since)) if *before == words => *since,
                _ => now,
            };
            self.0.insert(unit.name.clone(), (words, since));
        }
        self.0
            .values()
            .map(|(words, since)| format!("{words} since {}", since.to_second()))
            .collect()
    }
}

fn describe(unit: &UnitReport, job: Option<&JobReport>) -> String {
    let UnitReport {
        name,
        load,
        active,
        sub,
        ..
    } = unit;
    let before = job.map_or(&[][..], |job| &job.waits_for);
    if load != "loaded" {
        format!("{name} is {load}")
    } else if before.is_empty() {
        format!("{name} is {active} ({sub})")
    } else {
        let more = match before.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named: Vec<_> = before.iter().take(NAMED).map(String::as_str).collect();
        format!("{name} waits for {}{more}", named.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(active: &str, sub: &str) -> UnitReport {
        let json = serde_json::json!({ "name": "x.service", "load": "loaded", "active": active, "sub": sub });
        serde_json::from_value(json).unwrap()
    }

    fn job(waits_for: &[&str]) -> JobReport {
        let json = serde_json::json!({
            "id": 7, "unit": "x.service", "kind": "start", "state": "waiting", "waitsFor": waits_for,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn words_keep_the_moment_at_which_they_became_true() {
        let mut waits = Waits::default();
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000 + 250);
        let queued = [unit("inactive", "dead")];
        let first = waits.words(&queued, &[job(&["network-online.target"])], at(5));
        let expected = "x.service waits for network-online.target since 1970-01-01T00:00:05Z";
        assert_eq!(first, [expected]);
        let again = waits.words(&queued, &[job(&["network-online.target"])], at(65));
        assert_eq!(again, [expected], "still the same wait");
        let begun = waits.words(&[unit("activating", "start")], &[job(&[])], at(66));
        assert_eq!(
            begun,
            ["x.service is activating (start) since 1970-01-01T00:01:06Z"]
        );
        assert!(
            waits
                .words(&[unit("active", "running")], &[], at(67))
                .is_empty()
        );
        let down = waits.words(&[unit("failed", "failed")], &[], at(68));
        assert_eq!(
            down,
            ["x.service is failed (failed) since 1970-01-01T00:01:08Z"]
        );
    }

    #[test]
    fn a_job_that_waits_for_many_names_a_few() {
        let words = Waits::default().words(
            &[unit("inactive", "dead")],
            &[job(&["a", "b", "c", "d", "e", "f"])],
            Timestamp::from_micros(0),
        );
        let expected = "x.service waits for a, b, c, d and 2 more since 1970-01-01T00:00:00Z";
        assert_eq!(words, [expected]);
    }
}
