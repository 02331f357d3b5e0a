//! What all requests of one proxy share: limits, key, table of workers, metrics. Holds them together and decides nothing.

use crate::config::Limits;
use crate::decisions::Decisions;
use crate::drain::{Drain, Work};
use crate::eligible::Own;
use crate::metrics::Metrics;
use crate::plan::Policy;
use crate::workers::{Table, Workers};
use ed25519_dalek::SigningKey;
use std::sync::{Arc, Mutex};
use tokio::sync::{Semaphore, watch};

/// The shared state of one proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) revision: String,
    policy: watch::Receiver<Policy>,
    pub(crate) limits: Limits,
    pub(crate) key: SigningKey,
    pub(crate) workers: Arc<Workers>,
    pub(crate) metrics: Metrics,
    pub(crate) decisions: Decisions,
    pub(crate) drain: Drain,
    /// Held from looking at the loads to reserving, so that two requests at once don't both see the same worker idle.
    pub(crate) choosing: Mutex<()>,
    pub(crate) client_slots: Arc<Semaphore>,
    pub(crate) leg_slots: Arc<Semaphore>,
}

impl Proxy {
    pub(crate) fn new(
        revision: String,
        policy: watch::Receiver<Policy>,
        limits: Limits,
        key: SigningKey,
        workers: Arc<Workers>,
    ) -> Self {
        Proxy {
            revision,
            policy,
            limits,
            key,
            workers,
            metrics: Metrics::new(),
            decisions: Decisions::default(),
            drain: Drain::default(),
            choosing: Mutex::new(()),
            client_slots: Arc::new(Semaphore::new(limits.in_flight_max)),
            leg_slots: Arc::new(Semaphore::new(limits.in_flight_max)),
        }
    }

    /// Which prompts go to a prefill worker, as of now.
    pub(crate) fn policy(&self) -> Policy {
        *self.policy.borrow()
    }

    /// What workers of this table are compared with.
    pub(crate) fn own<'a>(&'a self, table: &Table) -> Own<'a> {
        Own { revision: &self.revision, epoch: table.own_epoch() }
    }

    /// Room for one more client's request, if there is any.
    pub(crate) fn admit_client(&self) -> Option<Work> {
        let permit = Arc::clone(&self.client_slots).try_acquire_owned().ok()?;
        Some(self.drain.work(permit, self.metrics.in_flight.clone()))
    }

    /// Room for one more leg of another pod's proxy, if there is any.
    pub(crate) fn admit_leg(&self) -> Option<Work> {
        let permit = Arc::clone(&self.leg_slots).try_acquire_owned().ok()?;
        Some(self.drain.work(permit, self.metrics.legs_in_flight.clone()))
    }
}
