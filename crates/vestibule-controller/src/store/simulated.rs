//! A database that several controllers of a simulation share: one SQLite file by the simulation's clock, and for each
//! controller a way there that can be cut.
use super::{Store, StoreError};
use crate::clock::Clock;
use sqlx::{AnyPool, any::AnyPoolOptions};
use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

/// A controller's way to the database.
#[derive(Debug)]
pub(crate) struct Wire(AtomicI64);

impl Default for Wire {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MAX))
    }
}

impl Wire {
    /// Cuts the way after so many more calls. Where the last of them is a commit, it is done and nobody hears so.
    pub(crate) fn cut_after(&self, calls: i64) {
        self.0.store(calls, Ordering::Relaxed);
    }

    pub(crate) fn mend(&self) {
        self.cut_after(i64::MAX);
    }

    /// Whether one more call gets through.
    fn passes(&self) -> bool {
        self.0.load(Ordering::Relaxed) == i64::MAX || self.0.fetch_sub(1, Ordering::Relaxed) > 0
    }
}

/// What a store needs to know to be shared.
#[derive(Debug)]
pub(super) struct Simulated {
    pub(super) clock: Clock,
    wire: Arc<Wire>,
    /// Instead of the pool while the way is cut.
    closed: AnyPool,
}

impl Simulated {
    pub(super) fn pool<'a>(&'a self, pool: &'a AnyPool) -> &'a AnyPool {
        if self.wire.passes() {
            pool
        } else {
            &self.closed
        }
    }

    /// Whether somebody hears that a transaction was committed.
    pub(super) fn heard(&self) -> Result<(), StoreError> {
        if self.wire.passes() {
            return Ok(());
        }
        let err = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        Err(StoreError::query("commit a transaction")(err))
    }
}

impl Store {
    /// The same file as a database that is shared.
    pub(crate) async fn simulate(mut self, clock: Clock, wire: Arc<Wire>) -> Self {
        let closed = AnyPoolOptions::new();
        let closed = closed.connect_lazy("sqlite::memory:").unwrap();
        closed.close().await;
        self.simulated = Some(Simulated {
            clock,
            wire,
            closed,
        });
        self
    }
}
