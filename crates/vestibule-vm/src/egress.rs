//! The guest's way out: an HTTP/1.1 proxy on each stream that the guest opens for one of its connections.
//!
//! | part | what it knows |
//! |---|---|
//! | [`target`] | what is asked for, in one spelling |
//! | [`policy`] | whether that may be reached, and at which checked addresses |
//! | [`address`] | which addresses are public |
//! | `dial` | TCP, the user's own proxy, TLS |
//! | `proxy` | HTTP on both sides |
//! | [`page`], [`report`] | what the client and the events say of a refusal |
pub mod address;
mod dial;
pub mod page;
pub mod policy;
mod proxy;
pub mod report;
pub mod target;

pub use policy::PolicyError;

use crate::events::EventLog;
use policy::Policy;
use report::Reporter;
use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
};
use vestibule_api::{
    egress::{EgressPolicy, EgressReason},
    machine::EgressCounters,
};

/// Connections that one VM may have open. Below the multiplexer's own limit, so that a client is told.
pub const CONNECTION_LIMIT: usize = 96;

/// The way out of one VM.
#[derive(Debug)]
pub struct Egress {
    policy: RwLock<Arc<Policy>>,
    counters: Arc<Counters>,
    connections: Arc<Semaphore>,
    reporter: Reporter,
}

/// See [`EgressCounters`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    connections: AtomicU64,
    refused: AtomicU64,
    bytes_out: AtomicU64,
    bytes_in: AtomicU64,
}

impl Egress {
    /// A way out with `policy`; refusals go to `events`.
    ///
    /// # Errors
    /// When the policy cannot be used.
    pub fn new(policy: &EgressPolicy, events: Arc<EventLog>) -> Result<Arc<Self>, PolicyError> {
        Ok(Arc::new(Self {
            policy: RwLock::new(Arc::new(Policy::new(policy)?)),
            counters: Arc::default(),
            connections: Arc::new(Semaphore::new(CONNECTION_LIMIT)),
            reporter: Reporter::new(events),
        }))
    }

    /// Changes the policy. Requests that are under way keep the one they began with.
    ///
    /// # Errors
    /// When the policy cannot be used; the old one stays.
    pub fn set_policy(&self, policy: &EgressPolicy) -> Result<(), PolicyError> {
        let policy = Arc::new(Policy::new(policy)?);
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = policy;
        Ok(())
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The counters as they are now.
    pub fn counters(&self) -> EgressCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EgressCounters {
            connections: read(&self.counters.connections),
            refused: read(&self.counters.refused),
            bytes_out: read(&self.counters.bytes_out),
            bytes_in: read(&self.counters.bytes_in),
        }
    }

    /// Serves one connection of the guest's until it ends.
    pub async fn serve<S>(self: Arc<Self>, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        let permit = Arc::clone(&self.connections).try_acquire_owned();
        proxy::serve(self, stream, permit.is_ok()).await;
    }

    fn refused(&self, host: &str, port: u16, reason: EgressReason, now: Instant) {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        // What a browser tries before a session claims its VM tells nothing about the session.
        if !(reason == EgressReason::Policy && self.policy().is_closed()) {
            self.reporter.refused(host, port, reason, now);
        }
    }

    /// Publishes refusals that were held back for a minute.
    pub fn tick(&self) {
        self.reporter.tick(Instant::now());
    }

    /// Publishes every refusal that is held back.
    pub fn flush(&self) {
        self.reporter.flush(Instant::now());
    }
}
