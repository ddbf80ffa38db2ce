//! What must hold of every world, once it has settled.
use super::{people::TAKEN_EARLY, site::Site, world::World};
use crate::{
    config::Config,
    state::Effect,
    store::{SessionRow, Store},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};
use vestibule_api::{
    cause::Cause,
    ids::CredentialId,
    machine::Disposal,
    session::{SessionEventKind, SessionState},
};
use vestibule_vault::{Access, Content, KeySource, Vault};

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
        for row in core.store.machines().await.unwrap() {
            left.push(format!("a machine's row is {:?}", row.state));
        }
        let far = std::time::Duration::from_secs(1_000_000);
        for site in &self.sites {
            if site.lost {
                if !site.forgotten {
                    left.push("a host that is lost is not forgotten".to_owned());
                }
                continue;
            }
            let own = site.core();
            let effects = own.store.due_effects(self.clock.now().plus(far));
            for effect in effects.await.unwrap() {
                left.push(format!("`{}` is open", effect.kind.id()));
            }
            for runner in site.host.all().iter().filter(|runner| runner.is_alive()) {
                left.push(format!("a runner lives: {:?}", runner.spec.session_id));
            }
            for entry in site.home.join("vms").read_dir_utf8().unwrap() {
                left.push(format!("`{}` is there", entry.unwrap().path()));
            }
        }
        left.join("; ")
    }

    /// # Errors
    /// The invariant that does not hold.
    pub(super) async fn check(&self) -> Result<(), String> {
        let core = self.core();
        let vaults: Vec<_> = self.sites.iter().map(|site| (site, vault(site))).collect();
        if let Some(first) = self.broken.first() {
            return Err(first.clone());
        }
        let mut stored = HashSet::new();
        for site in &self.sites {
            stored.extend(stored_in(site)?.into_keys());
        }
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
            if (row.state == SessionState::Cancelled) != self.cancelled.contains(id)
                && !self.perhaps_cancelled.contains(id)
            {
                return said("it is not what its person was told");
            }
            let machines = core.store.all_machines(10_000).await.unwrap();
            let own: Vec<_> = machines
                .iter()
                .filter(|machine| machine.session_id == Some(*id))
                .filter_map(|machine| self.runner(machine.id))
                .collect();
            let was_stored = stored.contains(&row.credential_id);
            if let Err(what) = self.check_confirmed(&row, &states, was_stored) {
                return said(what);
            }
            if let Err(what) = self.check_credential(&row, &vaults).await {
                return said(&what);
            }
            // Who goes on without a gap is not given up.
            let last = machines.iter().find(|m| Some(m.id) == row.machine_id);
            let last = last.and_then(|machine| machine.host_id);
            let mut there = self
                .sites
                .iter()
                .filter(|site| !site.lost && !site.was_away);
            if is_for(&row, Cause::HostLost) && there.any(|site| site.id == last) {
                return said("its host was there all the time");
            }
            // Captured, and nobody ended it or killed its VM: nothing else may lose it, but that it is another account's than was
            // confirmed, and that its host is lost while nobody has confirmed it.
            let alive_to_the_end = row
                .machine_id
                .and_then(|id| self.runner(id))
                .is_some_and(|runner| runner.was_asked_to_stop());
            if row.captured_at.is_some()
                && row.state == SessionState::Failed
                && alive_to_the_end
                && row.deadline_at.is_none()
                && !is_for(&row, Cause::Deadline)
                && !is_for(&row, Cause::CredentialInvalid)
                && (!is_for(&row, Cause::HostLost) || states.contains(&SessionState::Capturing))
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
        for (site, _) in vaults {
            let twice = site.host.twice.lock().unwrap().len();
            if twice > 0 {
                return Err(format!("{twice} runners were started twice"));
            }
            if site.repeated {
                return Err(format!(
                    "{}: a process is not fenced from the one before",
                    site.name
                ));
            }
            check_audit(site)?;
            check_receipts(site)?;
            if site.lost {
                self.check_forgotten(site).await?;
            }
        }
        Ok(())
    }

    /// Where an owner has to confirm the account, nothing is taken before that, and no other account's ever. `stored`: a vault
    /// has or had its credential.
    fn check_confirmed(
        &self,
        row: &SessionRow,
        states: &[SessionState],
        stored: bool,
    ) -> Result<(), &'static str> {
        let at = |wanted| states.iter().position(|state| *state == wanted);
        let (asked, taken) = (at(SessionState::Confirming), at(SessionState::Capturing));
        let person = &self.people[&row.id];
        let runner = row.machine_id.and_then(|id| self.runner(id));
        let handed_over = runner.and_then(|runner| runner.vm.lock().unwrap().hands_over.clone());
        let refused = is_for(row, Cause::CredentialInvalid);
        if !person.confirms {
            return match (asked, refused) {
                (None, false) => Ok(()),
                (Some(_), _) => Err("nobody had to confirm its account"),
                (None, true) => Err("its credential was refused"),
            };
        }
        let taken_early = match (asked, taken) {
            (Some(asked), Some(taken)) => taken < asked || !person.said_yes,
            (None, Some(_)) => true,
            (_, None) => stored,
        };
        if taken_early {
            return Err(TAKEN_EARLY);
        }
        let confirmed = person.shown.as_ref().map(|shown| &shown.account);
        match confirmed == Some(&handed_over) {
            false if stored => Err("another account than its owner confirmed was sealed"),
            true if refused => Err("the account that its owner confirmed was refused"),
            true | false => Ok(()),
        }
    }

    /// Whether a vault has or had this credential.
    pub(super) fn was_sealed(&self, id: CredentialId) -> bool {
        let mut sites = self.sites.iter();
        sites.any(|site| stored_in(site).is_ok_and(|stored| stored.contains_key(&id)))
    }

    /// The credential is in one vault exactly where the session completed, to the byte. A host that never comes back may have
    /// sealed one and told nobody.
    async fn check_credential(
        &self,
        row: &SessionRow,
        vaults: &[(&Site, Arc<Vault>)],
    ) -> Result<(), String> {
        let access = Access {
            actor: "simulation".to_owned(),
            purpose: "check".to_owned(),
        };
        let completed = row.state == SessionState::Completed;
        let asked = vaults.iter().filter(|(site, _)| completed || !site.lost);
        let kept = asked.map(|(site, vault)| (site, vault, vault.get(row.credential_id, &access)));
        let kept: Vec<(_, _, Content)> = kept
            .filter_map(|(site, vault, content)| Some((site, vault, content.ok()?)))
            .collect();
        match kept.as_slice() {
            [] if completed => Err("its credential is lost".to_owned()),
            [] => Ok(()),
            _ if !completed => Err("its credential is kept all the same".to_owned()),
            [(site, vault, content)] => {
                let last = row.machine_id.and_then(|id| site.host.get(id));
                let last = last.ok_or("its credential is on another host")?;
                let (wrote, whose) = {
                    let vm = last.vm.lock().unwrap();
                    (vm.secret.clone(), vm.hands_over.clone())
                };
                let sealed = vault.show(row.credential_id);
                if sealed.map_err(|err| err.to_string())?.account != whose {
                    return Err("its credential is said to be another account's".to_owned());
                }
                if wrote.as_deref() != Some(content.files[0].bytes.expose().as_slice()) {
                    return Err("its credential is not what the tool wrote".to_owned());
                }
                let core = self.core();
                let known = core.store.host_of_credential(row.credential_id);
                let known = known.await.unwrap();
                if known != site.id && !site.was_forgotten {
                    return Err(format!("its credential is said to be on {known:?}"));
                }
                Ok(())
            }
            [_, ..] => Err("its credential is in two vaults".to_owned()),
        }
    }

    /// Of a host that was forgotten, no row is left that speaks of something there.
    async fn check_forgotten(&self, site: &Site) -> Result<(), String> {
        let deadlines = Config::default().deadlines();
        let store = Store::open("sqlite", &site.home, deadlines).await.unwrap();
        let far = self
            .clock
            .now()
            .plus(std::time::Duration::from_secs(1_000_000));
        // Discards stay, for should it come back all the same.
        let mut effects = store.due_effects(far).await.unwrap();
        effects.retain(|effect| effect.kind != Effect::Discard);
        let effects = effects.len();
        let machines = store.own_machines().await.unwrap().len();
        let hosts = store.hosts().await.unwrap();
        store.close().await;
        if effects > 0 || machines > 0 || hosts.iter().any(|host| Some(host.id) == site.id) {
            return Err(format!(
                "a host is forgotten, with {effects} effects and {machines} machines"
            ));
        }
        Ok(())
    }
}

fn vault(site: &Site) -> Arc<Vault> {
    match &site.process {
        Some(process) => Arc::clone(&process.core.vault),
        None => Arc::new(Vault::open(&site.home.join("vault"), &KeySource::Own).unwrap()),
    }
}

/// How often each credential was stored, as the log says.
fn stored_in(site: &Site) -> Result<HashMap<CredentialId, u32>, String> {
    let mut stored = HashMap::new();
    let dir = site.home.join("vault");
    let read = Vault::read(&dir, &KeySource::Own, &mut |line, _| {
        if line.action == vestibule_vault::Action::Stored {
            let id = line.credential.expect("what is stored has an id");
            *stored.entry(id).or_insert(0) += 1;
        }
    });
    match read {
        Ok(vault) if vault.missing().is_empty() => Ok(stored),
        Ok(_) => Err("records of the vault are missing".to_owned()),
        Err(err) => Err(err.to_string()),
    }
}

/// Each credential was stored once; the log is whole.
fn check_audit(site: &Site) -> Result<(), String> {
    match stored_in(site)?.values().max() {
        Some(most) if *most > 1 => Err(format!("a credential was stored {most} times")),
        _ => Ok(()),
    }
}

/// Of every VM of which evidence is left, a receipt says that it is gone, however its runner ended.
fn check_receipts(site: &Site) -> Result<(), String> {
    for runner in site.host.all() {
        let id = runner.spec.machine_id;
        let dir = site.home.join("evidence").join(id.to_string());
        if site.lost || !dir.exists() {
            continue;
        }
        let bytes = std::fs::read(dir.join("disposal.json"));
        let bytes = bytes.map_err(|err| format!("a VM has no receipt: {err}"))?;
        let receipt: Disposal = serde_json::from_slice(&bytes).map_err(|err| err.to_string())?;
        if !receipt.complete || receipt.machine_id != id {
            return Err(format!("not all of a VM is gone: {receipt:?}"));
        }
    }
    Ok(())
}

fn is_for(row: &SessionRow, cause: Cause) -> bool {
    let finding = row.failure.as_ref().and_then(|v| v.finding.as_ref());
    finding.is_some_and(|finding| finding.cause == cause)
}
