//! Where exports and subscriptions meet, in either order, each at most once.
//!
//! Holds no sockets. Its lock is never held while an export's is taken by somebody who wants the registry's: exports are
//! ended outside of it.

use super::{ProducerConfig, connection::Peer};
use crate::transfer::error::{OpenError, SessionError};
use crate::transfer::export::{ExportSpec, ExportState};
use crate::transfer::limits::{ENDED_REMEMBERED_MAX, REFUSALS_MAX};
use crate::transfer::session::Link;
use crate::transfer::stats::{ExportReason, ProducerCounters, ProducerGauges, ProducerStats};
use baton_engine::kv_pool::KvPool;
use baton_wire::kv::{ErrorCode, Subscribe};
use baton_wire::{SessionId, TransferId};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

/// Everything that a producer knows.
pub(in crate::transfer) struct Registry {
    pub(super) config: ProducerConfig,
    pub(super) pool: Arc<dyn KvPool>,
    pub(super) counters: ProducerCounters,
    /// One permit for each connection that is served.
    pub(super) connections: Arc<Semaphore>,
    /// One permit for each connection that is being told why it is not.
    pub(super) refusals: Arc<Semaphore>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    exports: HashMap<TransferId, Arc<ExportState>>,
    parked: HashMap<TransferId, Parked>,
    ended: Ended,
    sessions: HashMap<SessionId, Arc<Peer>>,
    shut_down: bool,
}

/// A subscription that waits for its export. Dropping the sender tells it that its consumer has given up.
struct Parked {
    attempt: u32,
    link: Arc<Link>,
    asked: Subscribe,
    opened: oneshot::Sender<Result<Arc<ExportState>, ErrorCode>>,
}

impl Parked {
    /// Ends the waiting. A subscription that has just given up does not hear it: an export then waits for another, within its lease.
    fn tell(self, met: Result<Arc<ExportState>, ErrorCode>) {
        let _ = self.opened.send(met);
    }
}

/// What a subscription gets.
pub(super) enum Meeting {
    /// The export is open, and has taken it.
    Open(Arc<ExportState>),
    /// The export may be opened soon, and then takes it or says why not.
    Parked(oneshot::Receiver<Result<Arc<ExportState>, ErrorCode>>),
}

/// The last transfers that ended, with their highest attempt.
#[derive(Default)]
struct Ended {
    attempts: HashMap<TransferId, u32>,
    order: VecDeque<TransferId>,
}

impl Ended {
    fn note(&mut self, transfer: TransferId, attempt: u32) {
        let highest = self.attempts.entry(transfer).or_insert_with(|| {
            self.order.push_back(transfer);
            attempt
        });
        *highest = attempt.max(*highest);
        if self.order.len() > ENDED_REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.attempts.remove(&oldest);
        }
    }
}

impl Registry {
    pub(super) fn new(config: ProducerConfig, pool: Arc<dyn KvPool>) -> Self {
        Registry {
            connections: Arc::new(Semaphore::new(config.limits.connections)),
            refusals: Arc::new(Semaphore::new(REFUSALS_MAX)),
            config,
            pool,
            counters: ProducerCounters::default(),
            inner: Mutex::default(),
        }
    }

    pub(super) fn open(&self, spec: ExportSpec, now: Instant) -> Result<Arc<ExportState>, OpenError> {
        let ExportSpec { transfer, attempt, prompt_tokens, .. } = spec;
        if prompt_tokens == 0 {
            return Err(OpenError::EmptyPrompt);
        }
        let mut inner = self.lock();
        if inner.shut_down {
            return Err(OpenError::ShuttingDown);
        }
        let known = [
            inner.ended.attempts.get(&transfer).copied(),
            inner.exports.get(&transfer).map(|export| export.spec.attempt),
            // A parked subscription of the same attempt is what this export is for.
            inner.parked.get(&transfer).and_then(|parked| parked.attempt.checked_sub(1)),
        ];
        if let Some(by) = known.into_iter().flatten().max().filter(|&by| by >= attempt) {
            return Err(OpenError::Superseded { transfer, attempt, by });
        }
        let open = inner.exports.len();
        if open >= self.config.limits.exports_open && !inner.exports.contains_key(&transfer) {
            return Err(OpenError::TooManyOpen { open });
        }
        let state = Arc::new(ExportState::new(spec, self.pool.layout().layers, now, self.config.timing));
        let lower = inner.exports.insert(transfer, Arc::clone(&state));
        if let Some(parked) = inner.parked.remove(&transfer) {
            let met = if parked.attempt == attempt {
                state.subscribe(&parked.link, &parked.asked, now).map(|()| Arc::clone(&state))
            } else {
                Err(ErrorCode::Superseded)
            };
            parked.tell(met);
        }
        drop(inner);
        if let Some(lower) = lower {
            self.finish(&lower, ExportReason::Superseded);
        }
        Ok(state)
    }

    /// Subscribes the consumer on `link` to its export, or parks it until that is opened.
    ///
    /// # Errors
    /// With the code that the consumer is told.
    pub(super) fn meet(
        &self,
        (transfer, attempt): (TransferId, u32),
        link: &Arc<Link>,
        asked: Subscribe,
        now: Instant,
    ) -> Result<Meeting, ErrorCode> {
        let mut inner = self.lock();
        if inner.shut_down {
            return Err(ErrorCode::ShuttingDown);
        }
        let ended = inner.ended.attempts.get(&transfer).copied();
        let open = inner.exports.get(&transfer).cloned();
        let parked = inner.parked.get(&transfer).map(|parked| parked.attempt);
        let open_attempt = open.as_ref().map(|export| export.spec.attempt);
        if [ended, open_attempt, parked].into_iter().flatten().any(|known| known > attempt) {
            return Err(ErrorCode::Superseded);
        }
        if [ended, parked].contains(&Some(attempt)) {
            return Err(ErrorCode::AlreadyTaken);
        }
        // What is left of the open export's attempt is this one or a lower one, which is over.
        let lower = match open {
            Some(export) if export.spec.attempt == attempt => {
                return export.subscribe(link, &asked, now).map(|()| Meeting::Open(export));
            }
            lower => lower,
        };
        if parked.is_none() && inner.parked.len() >= self.config.limits.subscriptions_parked {
            return Err(ErrorCode::TooManySubscriptions);
        }
        let (opened, export) = oneshot::channel();
        if let Some(lower) = inner.parked.insert(transfer, Parked { attempt, link: Arc::clone(link), asked, opened }) {
            lower.tell(Err(ErrorCode::Superseded));
        }
        drop(inner);
        if let Some(lower) = lower {
            self.finish(&lower, ExportReason::Superseded);
        }
        Ok(Meeting::Parked(export))
    }

    /// Gives up the parked subscription of the consumer on `link`; false when it is not, or no longer, parked.
    pub(super) fn unpark(&self, transfer: TransferId, attempt: u32, link: &Arc<Link>) -> bool {
        let mut inner = self.lock();
        let is_it = |parked: &Parked| parked.attempt == attempt && Arc::ptr_eq(&parked.link, link);
        inner.parked.get(&transfer).is_some_and(is_it) && inner.parked.remove(&transfer).is_some()
    }

    /// The open export of a transfer's attempt.
    pub(super) fn find(&self, transfer: TransferId, attempt: u32) -> Option<Arc<ExportState>> {
        self.lock().exports.get(&transfer).filter(|export| export.spec.attempt == attempt).cloned()
    }

    /// Ends an export, once.
    pub(in crate::transfer) fn finish(&self, export: &Arc<ExportState>, reason: ExportReason) {
        if !export.finish(reason) {
            return;
        }
        self.counters.ended.add(reason as usize);
        let ExportSpec { transfer, attempt, .. } = export.spec;
        tracing::debug!(%transfer, attempt, reason = reason.as_str(), "export ended");
        let mut inner = self.lock();
        if inner.exports.get(&transfer).is_some_and(|known| Arc::ptr_eq(known, export)) {
            inner.exports.remove(&transfer);
        }
        inner.ended.note(transfer, attempt);
    }

    /// Ends exports that nobody subscribed to in time.
    pub(super) fn sweep(&self, now: Instant) {
        let exports: Vec<_> = self.lock().exports.values().cloned().collect();
        for export in exports.iter().filter(|export| export.abandoned(now)) {
            self.finish(export, ExportReason::LeaseExpired);
        }
    }

    /// Ends everything; nothing begins any more.
    pub(super) fn shut_down(&self) {
        let mut inner = self.lock();
        inner.shut_down = true;
        let exports: Vec<_> = inner.exports.values().cloned().collect();
        let sessions: Vec<_> = inner.sessions.values().cloned().collect();
        inner.parked.drain().for_each(|(_, parked)| parked.tell(Err(ErrorCode::ShuttingDown)));
        drop(inner);
        exports.iter().for_each(|export| self.finish(export, ExportReason::ShuttingDown));
        sessions.iter().for_each(|peer| peer.link.end(SessionError::ClosedHere));
    }

    /// Takes a session in; its bulk connection is then attached by its id.
    ///
    /// # Errors
    /// When the id is taken, or the process is going away.
    pub(super) fn add_session(&self, session: SessionId, peer: Arc<Peer>) -> Result<(), SessionError> {
        let mut inner = self.lock();
        if inner.shut_down || inner.sessions.contains_key(&session) {
            return Err(SessionError::ClosedHere);
        }
        inner.sessions.insert(session, peer);
        Ok(())
    }

    pub(super) fn session(&self, session: SessionId) -> Option<Arc<Peer>> {
        self.lock().sessions.get(&session).cloned()
    }

    pub(super) fn remove_session(&self, session: SessionId) {
        self.lock().sessions.remove(&session);
    }

    pub(super) fn stats(&self, now: Instant) -> ProducerStats {
        let inner = self.lock();
        let ages = inner.exports.values().map(|export| now.saturating_duration_since(export.opened));
        let gauges = ProducerGauges {
            exports_open: inner.exports.len(),
            oldest_export_age: ages.max().unwrap_or_default(),
            subscriptions_parked: inner.parked.len(),
            sessions: inner.sessions.len(),
        };
        drop(inner);
        self.counters.snapshot(gauges)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing under this lock panics")
    }
}
