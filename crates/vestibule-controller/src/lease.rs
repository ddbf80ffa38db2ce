//! The lease by which this controller acts for its host, where controllers share a database.
//!
//! It is renewed three times before it would run out. From the moment at which a renewal was asked for, it holds as long as
//! was asked, by this process's steady clock; the database's row holds a little longer. When it ran out, because the database
//! could not be reached or the process stood still, no reconciler begins anything until it is taken again.
use crate::{
    core::{Shared, stopped},
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
        let begun = Instant::now();
        loop {
            let asked = Instant::now();
            if store.take_lease(&own, length).await? {
                let held = if store.is_shared() {
                    Held::Until(asked + length)
                } else {
                    Held::Always
                };
                let held = watch::channel(held).0;
                return Ok(Self { own, length, held });
            }
            if begun.elapsed() > length + AGAIN {
                return Err(LeaseError::Elsewhere);
            }
            tracing::info!("waiting for the lease of this host, which another controller holds");
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// One that nobody can take.
    #[cfg(test)]
    pub(crate) fn always() -> Self {
        let own = OwnHost {
            name: "test".to_owned(),
            address: None,
            home: String::new(),
        };
        let (length, held) = (Duration::ZERO, watch::channel(Held::Always).0);
        Self { own, length, held }
    }

    /// Whether this controller may act for its host now.
    pub(crate) fn is_held(&self) -> bool {
        match *self.held.borrow() {
            Held::Always => true,
            Held::Until(until) => Instant::now() < until,
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
        let asked = Instant::now();
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
    let third = core.lease.length / 3;
    let mut stop = std::pin::pin!(stopped(core.stopping.clone()));
    let mut pause = third;
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = &mut stop => return,
        }
        let held = core.lease.is_held();
        let renewed = tokio::time::timeout(third, core.lease.renew(&core.store)).await;
        pause = match renewed {
            Ok(Ok(true)) => third,
            Ok(Ok(false)) => {
                if held {
                    tracing::error!(
                        "the lease of this host ran out, or another controller took it: nothing is done until it is taken again"
                    );
                }
                // What is over is not renewed but taken.
                core.lease.held.send_if_modified(|held| {
                    *held = Held::Until(Instant::now());
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
        };
    }
}
