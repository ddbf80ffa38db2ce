//! The lease by which this controller acts for its host, where controllers share a database.
//!
//! It is renewed three times before it would run out. From the moment at which a renewal was asked for, it holds as long as
//! was asked, by this process's steady clock; the database's row holds a little longer. When it ran out, because the database
//! could not be reached or the process stood still, no reconciler begins anything until it is taken again.
use crate::{
    clock::Clock,
    core::{Core, Shared, stopped},
    store::{OwnHost, Store, StoreError},
};
use camino::Utf8Path;
use std::{
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};
use tokio::sync::watch;
use vestibule_api::error::Chain;

/// After a try that failed, the next one.
const AGAIN: Duration = Duration::from_millis(500);

/// Until when the lease holds.
#[derive(Clone, Copy, Debug)]
enum Held {
    /// There is none: the home's lock is enough.
    Always,
    Until(Instant),
}

/// The lease of this process.
#[derive(Debug)]
pub(crate) struct Lease {
    own: OwnHost,
    clock: Clock,
    length: Duration,
    held: watch::Sender<Held>,
}

/// Why this controller does not act for its host.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("use the database")]
    Store(#[from] StoreError),
    #[error("look at the home directory")]
    Home(#[source] std::io::Error),
    #[error(
        "another controller acts for this host, from another copy of its home directory: give each machine a home of its own \
         (in the copy, remove `host-id`)"
    )]
    Elsewhere,
}

impl Lease {
    /// Takes the lease of the home's host. Where it is held by a controller on another copy of the home, waits until it has
    /// run out, and refuses if it is renewed meanwhile.
    ///
    /// # Errors
    /// When the database can't be used, or the lease is somebody else's.
    pub(crate) async fn take(
        store: &Store,
        clock: Clock,
        home: &Utf8Path,
        name: String,
        address: Option<String>,
        length: Duration,
    ) -> Result<Self, LeaseError> {
        let own = OwnHost {
            name,
            address,
            home: place(home).map_err(LeaseError::Home)?,
        };
        let begun = clock.steady();
        loop {
            let asked = clock.steady();
            if store.take_lease(&own, length).await? {
                let held = if store.is_shared() {
                    Held::Until(asked + length)
                } else {
                    Held::Always
                };
                let held = watch::channel(held).0;
                return Ok(Self {
                    own,
                    clock,
                    length,
                    held,
                });
            }
            if clock.steady() > begun + length + AGAIN {
                return Err(LeaseError::Elsewhere);
            }
            tracing::info!("waiting for the lease of this host, which another controller holds");
            clock.sleep(AGAIN).await;
        }
    }

    /// Whether this controller may act for its host now.
    pub(crate) fn is_held(&self) -> bool {
        match *self.held.borrow() {
            Held::Always => true,
            Held::Until(until) => self.clock.steady() < until,
        }
    }

    /// Resolves when it may.
    pub(crate) async fn held(&self) {
        let mut changes = self.held.subscribe();
        while !self.is_held() {
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn renew(&self, store: &Store) -> Result<bool, StoreError> {
        let asked = self.clock.steady();
        let renewed = if self.is_held() {
            store.renew_lease(self.length).await?
        } else {
            let taken = store.take_lease(&self.own, self.length).await?;
            if taken {
                tracing::warn!("this controller has the lease of its host again");
            }
            taken
        };
        if renewed {
            self.held.send_replace(Held::Until(asked + self.length));
        }
        Ok(renewed)
    }
}

/// Which directory of which running machine this is. The home's lock tells that no other process has it.
fn place(home: &Utf8Path) -> std::io::Result<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let meta = std::fs::metadata(home)?;
    Ok(format!("{}/{}/{}", boot.trim(), meta.dev(), meta.ino()))
}

/// Renews the lease until the controller stops. It is not given back then: the VMs stay, and the next controller comes.
pub(crate) async fn keep(core: Shared) {
    if matches!(*core.lease.held.borrow(), Held::Always) {
        return;
    }
    let mut stop = std::pin::pin!(stopped(core.stopping.clone()));
    let mut pause = core.lease.length / 3;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = &mut stop => return,
        }
        pause = once(&core).await;
    }
}

/// Renews the lease, or takes it where it ran out; when to do so again.
pub(crate) async fn once(core: &Core) -> Duration {
    let third = core.lease.length / 3;
    let held = core.lease.is_held();
    match tokio::time::timeout(third, core.lease.renew(&core.store)).await {
        Ok(Ok(true)) => third,
        Ok(Ok(false)) => {
            if held {
                tracing::error!(
                    "the lease of this host ran out, or another controller took it: nothing is done until it is taken again"
                );
            }
            // What is over is not renewed but taken.
            core.lease.held.send_if_modified(|held| {
                *held = Held::Until(core.lease.clock.steady());
                false
            });
            AGAIN
        }
        Ok(Err(err)) => {
            tracing::error!(error = %Chain(&err), "the lease of this host could not be renewed");
            AGAIN
        }
        Err(_) => {
            tracing::error!(
                "the lease of this host could not be renewed: the database does not answer"
            );
            AGAIN
        }
    }
}
