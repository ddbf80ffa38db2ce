//! What goes wrong with controllers: they are killed, stand still, can't reach the database, lose their home to another
//! process, or never come back.
use super::{
    site::{Away, End, THIRD},
    world::World,
};
use crate::{lease, store::Forgotten};
use rand::Rng as _;
use std::time::Duration;

impl World {
    /// What happens with every step: time in which a controller is away, renewals, and other faults.
    pub(super) async fn tick(&mut self) {
        for at in 0..self.sites.len() {
            let Some(away) = &mut self.sites[at].away else {
                continue;
            };
            let each = away.each;
            away.steps -= 1;
            if away.steps == 0 {
                self.comes_back(at);
            }
            self.pass(each).await;
        }
        self.renew().await;
        if !self.sites[0].shared {
            return;
        }
        if self.calm && self.rng.random_bool(0.6) {
            return;
        }
        let at = self.rng.random_range(0..self.sites.len());
        let there = self.sites.iter().filter(|site| !site.lost).count();
        match self.rng.random_range(0..6000) {
            0..100 => self.forget(at).await,
            _ if self.sites[at].lost => {}
            100..120 => self.goes_away(at, true),
            120..140 => self.goes_away(at, false),
            140..160 => self.is_taken_over(at).await,
            160..166 if there > 1 => self.is_lost(at).await,
            200..900 if self.sites[at].acts() => self.begin_hosts(at),
            _ => {}
        }
    }

    /// As SIGKILL, and another one comes up.
    pub(super) async fn crash(&mut self, at: usize) {
        let site = &mut self.sites[at];
        let Some(process) = site.process.take() else {
            return;
        };
        self.tally.crashes += 1;
        self.tally.killed_mid_action += process.die().await;
        site.come_up().await;
        let words = format!("{}: the controller is killed", site.name);
        self.people_wait_on();
        self.say(words);
    }

    /// For a while its whole process stands still, or only its way to the database is cut.
    fn goes_away(&mut self, at: usize, stands: bool) {
        let steps = self.rng.random_range(10..50);
        let all = Duration::from_secs(self.rng.random_range(5..300));
        let calls = self.rng.random_range(0..6);
        let site = &mut self.sites[at];
        if site.away.is_some() {
            return;
        }
        site.away = Some(Away {
            stands,
            steps,
            each: all / steps,
        });
        site.was_away = true;
        let what = if stands {
            self.tally.stood_still += 1;
            "stands still".to_owned()
        } else {
            self.tally.partitions += 1;
            site.process.as_ref().unwrap().wire.cut_after(calls);
            format!("is cut off after {calls} calls")
        };
        let words = format!("{}: the controller {what}, for {all:?}", site.name);
        self.say(words);
    }

    fn comes_back(&mut self, at: usize) {
        let site = &mut self.sites[at];
        site.away = None;
        if let Some(process) = &site.process {
            process.wire.mend();
        }
        let words = format!("{}: the controller is back", site.name);
        self.say(words);
    }

    /// Another process takes home and lease, and nobody ended the one before: it goes on with what it has under way.
    async fn is_taken_over(&mut self, at: usize) {
        // One that sealed what its session has given up removes it; killed in between, it would not, and nobody knows of it. The lock
        // of the home, which is not simulated, lets no second process live at all.
        self.finish_former(at).await;
        let site = &mut self.sites[at];
        site.former = site.process.take();
        site.come_up().await;
        self.tally.taken_over += 1;
        let words = format!("{}: another process takes the home", self.sites[at].name);
        self.say(words);
    }

    /// Its controller never comes back; its VMs may go on.
    async fn is_lost(&mut self, at: usize) {
        let die = self.rng.random_bool(0.5);
        let site = &mut self.sites[at];
        self.tally.killed_mid_action += site.die().await;
        if die {
            for runner in site.host.all() {
                runner.die();
            }
        }
        site.away = None;
        site.lost = true;
        site.forgotten = false;
        self.tally.hosts_gone += 1;
        let words = format!("{}: the host is lost", site.name);
        self.say(words);
    }

    /// An admin removes a host of which nothing was heard for a while.
    pub(super) async fn forget(&mut self, at: usize) {
        let mut others = self.sites.iter().enumerate();
        let other = others.find(|(other, site)| *other != at && site.acts());
        let Some((_, other)) = other else {
            return;
        };
        let (id, core) = (self.sites[at].id.unwrap(), other.core());
        let forgotten = core.store.forget_host(id, self.clock.now()).await;
        let site = &mut self.sites[at];
        let words = match forgotten {
            Ok(Forgotten::Yes) => {
                (site.forgotten, site.was_forgotten) = (true, true);
                self.tally.forgotten += 1;
                format!("{}: the host is forgotten", site.name)
            }
            Ok(Forgotten::Missing) if site.lost => {
                site.forgotten = true;
                return;
            }
            Ok(Forgotten::Missing | Forgotten::Live | Forgotten::InUse) => return,
            Err(err) => {
                // Where its commit was not heard of.
                site.was_forgotten = true;
                self.tally.ended(End::of(&err));
                format!("{}: the host is perhaps forgotten", site.name)
            }
        };
        self.say(words);
    }

    /// Time goes on, and leases are renewed meanwhile.
    pub(super) async fn pass(&mut self, length: Duration) {
        let end = self.clock.now().plus(length);
        while self.clock.now() < end {
            let next = self.clock.now().plus(THIRD);
            self.clock.advance_to(next.min(end));
            self.renew().await;
        }
    }

    /// Renews the leases for which it is time, as `lease::keep` does.
    async fn renew(&mut self) {
        let now = self.clock.now();
        for site in &mut self.sites {
            let stands = site.away.is_some_and(|away| away.stands);
            let Some(process) = site.process.as_mut().filter(|_| site.shared && !stands) else {
                continue;
            };
            if now < process.renewed_at.plus(THIRD) && process.core.lease.is_held() {
                continue;
            }
            process.renewed_at = now;
            let held = process.core.lease.is_held();
            lease::once(&process.core).await;
            self.tally.leases_lost += u64::from(!held && process.core.lease.is_held());
        }
    }
}
