//! What happened in the worlds of a run.

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
    }

    pub(super) fn named(&self) -> [(&'static str, u64); 12] {
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
        ]
    }
}
