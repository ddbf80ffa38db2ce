//! What a build, a verification or a snapshot says while it runs, for whoever draws it.
use std::time::{Duration, Instant};

/// Steps of a build, a verification or a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Debian packages, from nothing.
    Bootstrap,
    /// The providers' tools.
    Tools,
    /// The recipe's own files.
    Overlay,
    Units,
    /// Nothing missing, nothing a stub.
    Checks,
    /// The root file system.
    Root,
    Kernel,
    Agent,
    Manifest,
    Lint,
    Boot,
    Ready,
    Report,
    /// The guest prepares, the VMM saves, the files are trimmed and digested.
    Save,
    /// The VM ends, and what it saved is put into the store.
    Keep,
    /// Each claimed pack signs in at a test identity provider.
    SignIns,
}

impl Phase {
    /// Steps of a build.
    pub const BUILD: [Self; 10] = [
        Self::Bootstrap,
        Self::Tools,
        Self::Overlay,
        Self::Units,
        Self::Checks,
        Self::Root,
        Self::Kernel,
        Self::Agent,
        Self::Manifest,
        Self::Lint,
    ];
    /// Steps of a verification.
    pub const VERIFY: [Self; 4] = [Self::Lint, Self::Boot, Self::Ready, Self::Report];
    /// Steps of a snapshot.
    pub const SNAPSHOT: [Self; 4] = [Self::Boot, Self::Ready, Self::Save, Self::Keep];
    /// Steps of finding out whether a snapshot still fits.
    pub const TRIAL: [Self; 2] = [Self::Boot, Self::Ready];
    /// Steps of both with one VM.
    pub const VERIFY_AND_SNAPSHOT: [Self; 6] = [
        Self::Lint,
        Self::Boot,
        Self::Ready,
        Self::Report,
        Self::Save,
        Self::Keep,
    ];

    /// For people: what happens in it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Bootstrap => "packages",
            Self::Overlay => "overlay",
            Self::Units => "units",
            Self::Tools => "provider tools",
            Self::Checks => "checks",
            Self::Root => "root image",
            Self::Agent => "agent",
            Self::Kernel => "kernel and initrd",
            Self::Manifest => "manifest",
            Self::Lint => "lint",
            Self::Boot => "boot",
            Self::Ready => "ready",
            Self::Report => "report",
            Self::Save => "save",
            Self::Keep => "keep",
            Self::SignIns => "sign-ins",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.title())
    }
}

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// `index` counts from 1.
    PhaseStarted {
        phase: Phase,
        index: usize,
        total: usize,
    },
    /// One line about the running phase, for people.
    Detail(String),
    /// Bytes, so far and in all.
    Advance { done: u64, total: u64 },
    /// `cached`: nothing had to be done.
    PhaseDone {
        phase: Phase,
        cached: bool,
        took: Duration,
    },
}

/// Who is told.
pub trait Progress: Sync {
    /// Called from the building thread and from those that read what commands print; must not block for long.
    fn event(&self, event: &Event);
}

/// Tells nobody.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _: &Event) {}
}

/// Says of each phase of one piece of work when it begins and when it is done.
#[derive(Clone, Copy)]
pub(crate) struct Steps<'a> {
    pub(crate) progress: &'a dyn Progress,
    /// All there are, in order.
    pub(crate) phases: &'static [Phase],
}

/// A phase that runs.
pub(crate) struct Step<'a> {
    progress: &'a dyn Progress,
    phase: Phase,
    started: Instant,
}

impl<'a> Steps<'a> {
    pub(crate) fn begin(&self, phase: Phase) -> Step<'a> {
        let index = self.phases.iter().position(|one| *one == phase);
        self.progress.event(&Event::PhaseStarted {
            phase,
            index: index.map_or(0, |index| index + 1),
            total: self.phases.len(),
        });
        Step {
            progress: self.progress,
            phase,
            started: Instant::now(),
        }
    }
}

impl Step<'_> {
    /// Returns how long it took.
    pub(crate) fn done(self, cached: bool) -> Duration {
        let took = self.started.elapsed();
        self.progress.event(&Event::PhaseDone {
            phase: self.phase,
            cached,
            took,
        });
        took
    }
}
