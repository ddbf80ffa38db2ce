//! What must hold of every world, once it has settled.
use super::world::World;
use vestibule_api::session::{SessionEventKind, SessionState};
use vestibule_vault::Access;

impl World {
    /// Whether nothing is left to be done.
    pub(super) async fn has_settled(&self) -> bool {
        self.unsettled().await.is_empty()
    }

    /// What is left to be done, in words.
    pub(super) async fn unsettled(&self) -> String {
        let core = self.core();
        let mut left = Vec::new();
        for id in &self.sessions {
            let row = core.store.session(*id).await.unwrap().unwrap();
            if !row.state.is_terminal() {
                left.push(format!("a session is {}", row.state.id()));
            }
        }
        let far = self
            .clock
            .now()
            .plus(std::time::Duration::from_secs(1_000_000));
        for effect in core.store.due_effects(far).await.unwrap() {
            left.push(format!("`{}` is open", effect.kind.id()));
        }
        for row in core.store.machines().await.unwrap() {
            left.push(format!("a machine's row is {:?}", row.state));
        }
        for runner in self.host.all().iter().filter(|runner| runner.is_alive()) {
            left.push(format!("a runner lives: {:?}", runner.spec.session_id));
        }
        for entry in self.home.path().join("vms").read_dir_utf8().unwrap() {
            left.push(format!("`{}` is there", entry.unwrap().path()));
        }
        left.join("; ")
    }

    /// # Errors
    /// The invariant that does not hold.
    pub(super) async fn check(&self) -> Result<(), String> {
        let core = self.core();
        for (number, id) in self.sessions.iter().enumerate() {
            let row = core.store.session(*id).await.unwrap().unwrap();
            let said = |what: &str| Err(format!("s{number}, {}: {what}", row.state.id()));
            // One terminal state, the last thing that its events say, numbered without gap.
            let events = core.store.events(*id, 0, 100_000).await.unwrap();
            let states: Vec<_> = events
                .iter()
                .filter_map(|event| {
                    let SessionEventKind::State { state } = event.event else {
                        return None;
                    };
                    Some(state)
                })
                .collect();
            let ends = states.iter().filter(|state| state.is_terminal()).count();
            if ends != 1 || states.last() != Some(&row.state) {
                return said(&format!("its states were {states:?}"));
            }
            if !events.iter().zip(1..).all(|(event, seq)| event.seq == seq) {
                return said("its events have a gap or a repeat");
            }
            if (row.state == SessionState::Cancelled) != self.cancelled.contains(id) {
                return said("it is not what its person was told");
            }
            // The credential is in the vault exactly where the session completed, to the byte.
            let machines = core.store.all_machines(10_000).await.unwrap();
            let own: Vec<_> = machines
                .iter()
                .filter(|machine| machine.session_id == Some(*id))
                .filter_map(|machine| self.host.get(machine.id))
                .collect();
            let access = Access {
                actor: "simulation".to_owned(),
                purpose: "check".to_owned(),
            };
            let kept = core.vault.get(row.credential_id, &access);
            match (row.state, kept) {
                (SessionState::Completed, Ok(content)) => {
                    let last = row.machine_id.and_then(|id| self.host.get(id)).unwrap();
                    let wrote = last.vm.lock().unwrap().secret.clone();
                    if wrote.as_deref() != Some(content.files[0].bytes.expose().as_slice()) {
                        return said("its credential is not what the tool wrote");
                    }
                }
                (SessionState::Completed, Err(err)) => {
                    return said(&format!("its credential is lost: {err}"));
                }
                (_, Ok(_)) => return said("its credential is kept all the same"),
                (_, Err(_)) => {}
            }
            // Captured, and nobody ended it or killed its VM: nothing else may lose it.
            let alive_to_the_end = row
                .machine_id
                .and_then(|id| self.host.get(id))
                .is_some_and(|runner| runner.was_asked_to_stop());
            if row.captured_at.is_some()
                && row.state == SessionState::Failed
                && alive_to_the_end
                && row.deadline_at.is_none()
                && !is_deadline(&row)
            {
                return said(&format!(
                    "a captured credential was lost: {:?}",
                    row.failure
                ));
            }
            // What may be done once was done at most once.
            let logins: u32 = own
                .iter()
                .map(|runner| runner.vm.lock().unwrap().logins)
                .sum();
            if logins > 1 {
                return said(&format!("its tool was started {logins} times"));
            }
            for runner in own {
                let claimed = runner.vm.lock().unwrap().claimed.clone();
                if claimed.iter().any(|by| by != id) {
                    return said("its VM was somebody else's, too");
                }
            }
        }
        let twice = self.host.twice.lock().unwrap().len();
        if twice > 0 {
            return Err(format!("{twice} runners were started twice"));
        }
        self.check_audit()
    }

    /// Each credential was stored once; the log is whole.
    fn check_audit(&self) -> Result<(), String> {
        let mut stored = std::collections::HashMap::new();
        let dir = self.home.path().join("vault");
        let read =
            vestibule_vault::Vault::read(&dir, &vestibule_vault::KeySource::Own, &mut |line, _| {
                if line.action == vestibule_vault::Action::Stored {
                    *stored.entry(line.credential).or_insert(0) += 1;
                }
            });
        let vault = read.map_err(|err| err.to_string())?;
        if !vault.missing().is_empty() {
            return Err("records of the vault are missing".to_owned());
        }
        match stored.values().max() {
            Some(most) if *most > 1 => Err(format!("a credential was stored {most} times")),
            _ => Ok(()),
        }
    }
}

fn is_deadline(row: &crate::store::SessionRow) -> bool {
    let finding = row.failure.as_ref().and_then(|v| v.finding.as_ref());
    finding.is_some_and(|finding| finding.cause == vestibule_api::cause::Cause::Deadline)
}
