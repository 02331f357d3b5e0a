//! Sessions by address: dialled once, shared by many transfers, dialled again after they have ended.

use super::ConsumerConfig;
use super::session::Session;
use crate::transfer::error::FetchError;
use crate::transfer::limits::PEERS_MAX;
use crate::transfer::stats::ConsumerCounters;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// All producers that this consumer knows.
pub(super) struct Peers {
    config: ConsumerConfig,
    counters: Arc<ConsumerCounters>,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    /// Parent of all sessions' ends.
    over: CancellationToken,
    /// Dropping the peers ends their sessions.
    _end: DropGuard,
}

/// The lock is held while dialling, so that many fetches to one address make one session.
type Slot = tokio::sync::Mutex<Dialled>;

#[derive(Default)]
struct Dialled {
    session: Option<Arc<Session>>,
    /// The last failure and when it was known: also the answer to whoever has been waiting since before it.
    failed: Option<(Instant, FetchError)>,
}

impl Peers {
    pub(super) fn new(config: ConsumerConfig, counters: Arc<ConsumerCounters>) -> Self {
        let over = CancellationToken::new();
        let _end = over.clone().drop_guard();
        Peers { config, counters, slots: Mutex::default(), over, _end }
    }

    /// The session with the producer at `address`, for a fetch that began at `since`.
    pub(super) async fn session(&self, address: &str, since: Instant) -> Result<Arc<Session>, FetchError> {
        let slot = self.slot(address)?;
        let mut dialled = slot.lock().await;
        if let Some(session) = dialled.session.as_ref().filter(|session| session.is_usable()) {
            return Ok(Arc::clone(session));
        }
        if let Some((_, error)) = dialled.failed.as_ref().filter(|(at, _)| *at >= since) {
            return Err(error.clone());
        }
        let session = Session::dial(address, &self.config, &self.counters, self.over.child_token()).await;
        match &session {
            Ok(session) => *dialled = Dialled { session: Some(Arc::clone(session)), failed: None },
            Err(error) => *dialled = Dialled { session: None, failed: Some((Instant::now(), error.clone())) },
        }
        session
    }

    fn slot(&self, address: &str) -> Result<Arc<Slot>, FetchError> {
        let mut slots = self.slots.lock().expect("nothing under this lock panics");
        if let Some(slot) = slots.get(address) {
            return Ok(Arc::clone(slot));
        }
        if slots.len() >= PEERS_MAX {
            // Restarted pods leave addresses behind. A slot that somebody is dialling is locked or has a second owner, and stays.
            slots.retain(|_, slot| {
                let in_use = |dialled: &Dialled| dialled.session.as_ref().is_some_and(|session| session.is_usable());
                Arc::strong_count(slot) > 1 || slot.try_lock().map_or(true, |dialled| in_use(&dialled))
            });
        }
        if slots.len() >= PEERS_MAX {
            return Err(FetchError::TooMany { what: "prefill workers connected", max: PEERS_MAX });
        }
        let slot = Arc::default();
        slots.insert(address.to_owned(), Arc::clone(&slot));
        Ok(slot)
    }
}
