//! What happened in the worlds of a run.
use super::site::End;

/// What happened, for people, and to see that the seeds reach what they should.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) lives: u64,
    pub(super) completed: u64,
    pub(super) failed: u64,
    pub(super) cancelled: u64,
    pub(super) expired: u64,
    pub(super) crashes: u64,
    pub(super) killed_mid_action: u64,
    pub(super) runners_killed: u64,
    pub(super) vms_broken: u64,
    pub(super) events_again: u64,
    pub(super) events_late: u64,
    pub(super) fell_back: u64,
    pub(super) from_pool: u64,
    /// Controllers that found that their lease had run out.
    pub(super) leases_lost: u64,
    /// Actions that were refused, because another process had the lease.
    pub(super) fenced: u64,
    pub(super) stood_still: u64,
    pub(super) partitions: u64,
    /// Actions that failed because the database was out of reach.
    pub(super) cut_off: u64,
    pub(super) taken_over: u64,
    /// Hosts that never come back.
    pub(super) hosts_gone: u64,
    pub(super) forgotten: u64,
    /// Sessions that ended with their host.
    pub(super) hosts_lost: u64,
    pub(super) confirmed: u64,
    pub(super) confirmed_again: u64,
    /// Confirmed after the session had ended.
    pub(super) confirmed_late: u64,
    /// Shown, and then the controller was killed.
    pub(super) confirmed_after_crash: u64,
    pub(super) refused: u64,
    pub(super) unconfirmed: u64,
    /// Guests that handed over another account than the confirmed one.
    pub(super) other_accounts: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        self.lives += other.lives;
        self.completed += other.completed;
        self.failed += other.failed;
        self.cancelled += other.cancelled;
        self.expired += other.expired;
        self.crashes += other.crashes;
        self.killed_mid_action += other.killed_mid_action;
        self.runners_killed += other.runners_killed;
        self.vms_broken += other.vms_broken;
        self.events_again += other.events_again;
        self.events_late += other.events_late;
        self.fell_back += other.fell_back;
        self.from_pool += other.from_pool;
        self.leases_lost += other.leases_lost;
        self.fenced += other.fenced;
        self.stood_still += other.stood_still;
        self.partitions += other.partitions;
        self.cut_off += other.cut_off;
        self.taken_over += other.taken_over;
        self.hosts_gone += other.hosts_gone;
        self.forgotten += other.forgotten;
        self.hosts_lost += other.hosts_lost;
        self.confirmed += other.confirmed;
        self.confirmed_again += other.confirmed_again;
        self.confirmed_late += other.confirmed_late;
        self.confirmed_after_crash += other.confirmed_after_crash;
        self.refused += other.refused;
        self.unconfirmed += other.unconfirmed;
        self.other_accounts += other.other_accounts;
    }

    /// An action is over.
    pub(super) fn ended(&mut self, end: End) {
        self.fenced += u64::from(end == End::Fenced);
        self.cut_off += u64::from(end == End::CutOff);
    }

    pub(super) fn named(&self) -> [(&'static str, u64); 28] {
        [
            ("a completed end", self.completed),
            ("a failed end", self.failed),
            ("a cancelled end", self.cancelled),
            ("an expired end", self.expired),
            ("a crash", self.crashes),
            ("a crash in an action's middle", self.killed_mid_action),
            ("a killed runner", self.runners_killed),
            ("a VM that broke", self.vms_broken),
            ("an event twice", self.events_again),
            ("an event too late", self.events_late),
            ("a start that fell back", self.fell_back),
            ("a start from the pool", self.from_pool),
            ("a lost lease", self.leases_lost),
            ("an action that was fenced", self.fenced),
            ("a controller that stood still", self.stood_still),
            ("a partition", self.partitions),
            ("an action without the database", self.cut_off),
            ("a home that another process took", self.taken_over),
            ("a host that never came back", self.hosts_gone),
            ("a host that was forgotten", self.forgotten),
            ("a session that ended with its host", self.hosts_lost),
            ("an account that its owner confirmed", self.confirmed),
            (
                "an account that was confirmed once more",
                self.confirmed_again,
            ),
            (
                "an account that was confirmed too late",
                self.confirmed_late,
            ),
            (
                "an account that was confirmed after a crash",
                self.confirmed_after_crash,
            ),
            ("an account that its owner refused", self.refused),
            ("an account that nobody confirmed in time", self.unconfirmed),
            (
                "a guest that handed over another account",
                self.other_accounts,
            ),
        ]
    }
}
