//! One transfer on its way in: verifies frames, writes them to the destination blocks, and knows when it is whole.
//!
//! Fed by the session's two readers, closed by the fetch. One lock covers "is it still wanted" and the writing, so once
//! [`Incoming::close`] has returned, no block is written any more and the caller may give the blocks away.

use crate::transfer::assembly::Assembly;
use crate::transfer::error::{FetchError, SessionError};
use crate::transfer::limits::CREDIT_BYTES;
use baton_engine::kv_pool::{BlockId, KvPool};
use baton_wire::TransferId;
use baton_wire::kv::{Commit, Header, Kind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Credit is given back in pieces of this size: small enough that the sender never waits for it while we keep up, large
/// enough that small frames do not each cost a message.
const CREDIT_PIECE_BYTES: u64 = CREDIT_BYTES / 4;

/// A transfer on its way in.
pub(super) struct Incoming {
    pub(super) transfer: TransferId,
    pub(super) attempt: u32,
    pool: Arc<dyn KvPool>,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Gone once the producer has begun.
    begun: Option<oneshot::Sender<()>>,
    /// Once there are blocks for it: the destination of each of the prompt's, and what has arrived.
    destination: Option<(Vec<(BlockId, u64)>, Assembly)>,
    commit: Option<(Commit, Instant)>,
    kv_bytes: u64,
    /// Taken in, but not yet given back as credit.
    credit: u64,
    progress: Instant,
    /// Gone once the transfer is over.
    outcome: Option<oneshot::Sender<Result<Received, FetchError>>>,
}

/// What a fetch waits for, in this order.
pub(super) struct Signals {
    /// The producer has begun.
    pub(super) begun: oneshot::Receiver<()>,
    /// The transfer is over; also an earlier end.
    pub(super) outcome: oneshot::Receiver<Result<Received, FetchError>>,
}

/// A transfer that is whole and verified.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) commit: Commit,
    pub(super) kv_bytes: u64,
    pub(super) exposed: Duration,
}

/// What became of a frame.
pub(super) enum Taken {
    /// Written; the sender gets so much credit back now.
    Written {
        /// Payload bytes; often zero.
        credit: u64,
    },
    /// The transfer is over, or is by this frame.
    Dropped,
}

impl Incoming {
    pub(super) fn new(transfer: TransferId, attempt: u32, pool: Arc<dyn KvPool>) -> (Self, Signals) {
        let (begun_sender, begun) = oneshot::channel();
        let (outcome_sender, outcome) = oneshot::channel();
        let inner = Inner {
            begun: Some(begun_sender),
            destination: None,
            commit: None,
            kv_bytes: 0,
            credit: 0,
            progress: Instant::now(),
            outcome: Some(outcome_sender),
        };
        (Incoming { transfer, attempt, pool, inner: Mutex::new(inner) }, Signals { begun, outcome })
    }

    /// The producer has begun to compute.
    pub(super) fn started(&self, now: Instant) {
        let mut inner = self.lock();
        inner.progress = now;
        if let Some(begun) = inner.begun.take() {
            // A fetch that was dropped a moment ago has no use for it.
            let _ = begun.send(());
        }
    }

    /// From now on frames are taken, into these blocks.
    pub(super) fn open(&self, blocks: Vec<(BlockId, u64)>, assembly: Assembly) {
        let mut inner = self.lock();
        inner.progress = Instant::now();
        inner.destination = Some((blocks, assembly));
    }

    /// Takes a frame in: verified first, then written, all under the lock.
    pub(super) fn frame(&self, header: &Header, payload: &[u8], now: Instant) -> Taken {
        let mut inner = self.lock();
        if inner.outcome.is_none() {
            return Taken::Dropped;
        }
        if let Err(error) = inner.write(&*self.pool, header, payload) {
            inner.end(Err(error));
            return Taken::Dropped;
        }
        inner.progress = now;
        inner.kv_bytes += payload.len() as u64;
        inner.credit += payload.len() as u64;
        inner.check_complete(now);
        let credit = if inner.credit >= CREDIT_PIECE_BYTES { std::mem::take(&mut inner.credit) } else { 0 };
        Taken::Written { credit }
    }

    /// Takes the COMMIT in; frames may still be under way on the other connection.
    pub(super) fn commit(&self, commit: Commit, now: Instant) {
        let mut inner = self.lock();
        inner.progress = now;
        if inner.commit.is_some() {
            return inner.end(Err(FetchError::Assembly(crate::transfer::assembly::AssemblyError::SecondCommit)));
        }
        inner.commit = Some((commit, now));
        inner.check_complete(now);
    }

    /// Ends the transfer, unless it is over.
    pub(super) fn fail(&self, error: FetchError) {
        self.lock().end(Err(error));
    }

    /// Nothing is written from here on.
    pub(super) fn close(&self) {
        self.lock().outcome = None;
    }

    /// When something of this transfer arrived last.
    pub(super) fn last_progress(&self) -> Instant {
        self.lock().progress
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing under this lock panics")
    }
}

impl Inner {
    fn write(&mut self, pool: &dyn KvPool, header: &Header, payload: &[u8]) -> Result<(), FetchError> {
        // Without credit there are no frames.
        let unasked = FetchError::Session(SessionError::Unexpected(Kind::Frame));
        let (blocks, assembly) = self.destination.as_mut().ok_or(unasked)?;
        assembly.accept(header, payload).map_err(FetchError::Assembly)?;
        let blocks = &blocks[header.first_block as usize..];
        for (&(block, generation), bytes) in blocks.iter().zip(payload.chunks_exact(assembly.block_bytes())) {
            pool.import(header.layer as usize, block, generation, bytes).map_err(FetchError::StaleDestination)?;
        }
        Ok(())
    }

    fn check_complete(&mut self, now: Instant) {
        let Some((commit, arrived)) = &self.commit else { return };
        let Some((_, assembly)) = &self.destination else {
            return self.end(Err(FetchError::Session(SessionError::Unexpected(Kind::Commit))));
        };
        match assembly.complete(commit) {
            Ok(false) => {}
            Ok(true) => {
                let commit = commit.clone();
                let exposed =
                    now.saturating_duration_since(*arrived) + Duration::from_micros(commit.since_compute_end_us);
                let kv_bytes = self.kv_bytes;
                self.end(Ok(Received { commit, kv_bytes, exposed }));
            }
            Err(error) => self.end(Err(FetchError::Assembly(error))),
        }
    }

    fn end(&mut self, result: Result<Received, FetchError>) {
        if let Some(outcome) = self.outcome.take() {
            // A fetch that was dropped a moment ago has no use for it.
            let _ = outcome.send(result);
        }
    }
}
