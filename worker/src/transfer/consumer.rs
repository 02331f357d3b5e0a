//! The decode side: fetches a prompt's KV into this worker's own blocks.
//!
//! Writes its own pool and nothing else. Blocks are written as frames arrive and are for the caller to use only after
//! [`Consumer::fetch`] has returned `Ok`: by then every checksum, the digest and the prompt hash have been compared. Dropping
//! the fetch ends the transfer at once, and nothing is written after the drop.

mod incoming;
mod peers;
mod session;

pub use super::commit::{Commit, FirstToken};
pub use super::error::{BlockTooLarge, FetchError, SessionError};
pub use super::limits::Timing;
pub use super::stats::ConsumerStats;

use super::assembly::{Assembly, Expected};
use super::limits::CREDIT_BYTES;
use super::stats::ConsumerCounters;
use baton_engine::kv_pool::{BLOCK_TOKENS, BlockId, KvPool};
use baton_wire::kv::{self, Codec, Credit, Kind, Subscribe};
use baton_wire::leg::Transfer;
use baton_wire::{Epoch, Fingerprint, PromptHash};
use incoming::{Incoming, Received, Signals};
use peers::Peers;
use session::Session;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::time::Instant;

/// How a consumer is set up.
#[derive(Clone, Debug)]
pub struct ConsumerConfig {
    /// This life of this process.
    pub epoch: Epoch,
    /// Of the model and its KV layout.
    pub fingerprint: Fingerprint,
    /// How long each step may take.
    pub timing: Timing,
}

/// A prompt's KV to be fetched.
#[derive(Clone, Debug)]
pub struct Fetch {
    /// Which handover, from where, and the right to it.
    pub transfer: Transfer,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Hash of the prompt.
    pub prompt_hash: PromptHash,
}

/// Where a prompt's KV is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Destination blocks of the prompt, in order, with their generations. Further ones are left alone.
    pub blocks: Vec<(BlockId, u64)>,
    /// Leading blocks that hold the right KV already; not fetched.
    pub cached_blocks: usize,
}

/// A prompt's KV that is here, verified.
#[derive(Clone, Debug, PartialEq)]
pub struct Fetched {
    /// What the prefill found besides.
    pub commit: Commit,
    /// Payload bytes that arrived.
    pub kv_bytes: u64,
    /// From the producer's last computed layer to everything here and verified: the part of the transfer that computing did not
    /// hide, waiting for a destination included. It is the producer's time from that layer to its COMMIT plus our time from the COMMIT's arrival, so no clocks are
    /// compared; the COMMIT's own way here, half a round trip, is left out.
    pub exposed: Duration,
    /// From the call to the end.
    pub total: Duration,
}

/// The decode side of handovers. Clones share everything.
#[derive(Clone)]
pub struct Consumer {
    shared: Arc<Shared>,
}

struct Shared {
    config: ConsumerConfig,
    pool: Arc<dyn KvPool>,
    peers: Peers,
    counters: Arc<ConsumerCounters>,
}

impl Consumer {
    /// A consumer that fills `pool`.
    ///
    /// # Errors
    /// [`BlockTooLarge`] when one layer of a block does not fit into a frame.
    pub fn new(config: ConsumerConfig, pool: Arc<dyn KvPool>) -> Result<Self, BlockTooLarge> {
        BlockTooLarge::check(pool.layout().block_bytes())?;
        let counters = Arc::new(ConsumerCounters::default());
        let peers = Peers::new(config.clone(), Arc::clone(&counters));
        Ok(Consumer { shared: Arc::new(Shared { config, pool, peers, counters }) })
    }

    /// Fetches a prompt's KV. Dropping the future cancels. The producer keeps the KV for us from the start; `destination` is asked for,
    /// by being polled for the first time, when the producer has begun to compute: blocks that are taken then are sure to be filled.
    ///
    /// # Errors
    /// See [`FetchError`]. The destination blocks then hold nothing of use.
    pub fn fetch<D>(
        &self,
        fetch: Fetch,
        destination: D,
    ) -> impl Future<Output = Result<Fetched, FetchError>> + Send + use<D>
    where
        D: Future<Output = Destination> + Send,
    {
        let shared = Arc::clone(&self.shared);
        async move {
            let counted = Counted::new(&shared.counters);
            let result = shared.fetch(fetch, destination).await;
            counted.end(&result);
            result
        }
    }

    /// What it has done so far, and has now.
    pub fn stats(&self) -> ConsumerStats {
        self.shared.counters.snapshot()
    }
}

impl Shared {
    async fn fetch(&self, fetch: Fetch, destination: impl Future<Output = Destination>) -> Result<Fetched, FetchError> {
        let started = Instant::now();
        let Transfer { id, attempt, ref source, .. } = fetch.transfer;
        let session = self.peers.session(source, started).await?;
        let (incoming, signals) = Incoming::new(id, attempt, Arc::clone(&self.pool));
        let mut active = Active::begin(&session, incoming)?;
        let result = self.receive(&active, signals, fetch, destination).await;
        active.conclude(&result);
        let Received { commit: kv::Commit { cached_tokens, choices, .. }, kv_bytes, exposed } = result?;
        let commit = Commit { cached_tokens: cached_tokens as usize, choices };
        Ok(Fetched { commit, kv_bytes, exposed, total: started.elapsed() })
    }

    /// Subscribes, waits for the producer to begin, then for a destination, then for all to arrive.
    async fn receive(
        &self,
        active: &Active,
        signals: Signals,
        fetch: Fetch,
        destination: impl Future<Output = Destination>,
    ) -> Result<Received, FetchError> {
        let Fetch { transfer: Transfer { id, attempt, token, .. }, prompt_tokens, prompt_hash } = fetch;
        let Signals { begun, mut outcome } = signals;
        let link = &active.session.link;
        let send_failed = |error: kv::BodyError| FetchError::Session(error.into());
        let asked = Subscribe {
            token,
            prompt_tokens: number(prompt_tokens),
            prompt_hash,
            have_prefix_blocks: 0,
            head_start: 0,
            head_count: u16::try_from(self.pool.layout().kv_heads).expect("a model has few heads"),
            codec: Codec::None,
            credit_bytes: 0,
        };
        link.send(id, attempt, &asked).map_err(send_failed)?;
        let destination = async {
            begun.await.expect(KEPT);
            destination.await
        };
        let idle = self.config.timing.fetch_idle;
        let destination = tokio::select! {
            biased;
            ended = &mut outcome => {
                return ended.expect(KEPT);
            }
            error = active.lost(idle) => return Err(error),
            destination = destination => destination,
        };
        let cached_blocks = destination.cached_blocks;
        let assembly = self.assembly(prompt_tokens, prompt_hash, &destination)?;
        active.incoming.open(destination.blocks, assembly);
        let credit = Credit { bytes: CREDIT_BYTES, have_prefix_blocks: number(cached_blocks) };
        link.send(id, attempt, &credit).map_err(send_failed)?;
        tokio::select! {
            biased;
            received = outcome => received.expect(KEPT),
            error = active.lost(idle) => Err(error),
        }
    }

    /// What is waited for, sized by what this side knows.
    fn assembly(
        &self,
        prompt_tokens: usize,
        prompt_hash: PromptHash,
        destination: &Destination,
    ) -> Result<Assembly, FetchError> {
        let (blocks, cached_blocks) = (destination.blocks.len(), destination.cached_blocks);
        let prompt_blocks = prompt_tokens.div_ceil(BLOCK_TOKENS);
        if cached_blocks > prompt_blocks || prompt_blocks > blocks {
            return Err(FetchError::BadDestination { blocks, cached_blocks, prompt_tokens });
        }
        let layout = self.pool.layout();
        Ok(Assembly::new(Expected {
            layers: layout.layers,
            kv_heads: layout.kv_heads,
            block_bytes: layout.block_bytes(),
            blocks: number(cached_blocks)..number(prompt_blocks),
            prompt_tokens,
            prompt_hash,
        }))
    }
}

const KEPT: &str = "the sender is kept by the incoming transfer until it is used";

fn number(n: usize) -> u32 {
    u32::try_from(n).expect("a prompt's tokens and blocks are counted in 32 bits")
}

/// A transfer that is entered in a session. Dropping it takes it out, after which nothing of it is written, and tells the
/// producer unless that knows.
struct Active {
    session: Arc<Session>,
    incoming: Arc<Incoming>,
    producer_knows: bool,
}

impl Active {
    fn begin(session: &Arc<Session>, incoming: Incoming) -> Result<Self, FetchError> {
        let incoming = Arc::new(incoming);
        session.enter(&incoming)?;
        Ok(Active { session: Arc::clone(session), incoming, producer_knows: false })
    }

    /// Resolves when the session has ended, or nothing of this transfer has come for `idle`.
    async fn lost(&self, idle: Duration) -> FetchError {
        let link = &self.session.link;
        loop {
            let deadline = self.incoming.last_progress() + idle;
            if deadline <= Instant::now() {
                return FetchError::Idle(idle);
            }
            tokio::select! {
                () = link.ended() => return FetchError::Session(link.cause()),
                () = tokio::time::sleep_until(deadline) => {}
            }
        }
    }

    /// Tells the producer how it ended, unless it knows.
    fn conclude(&mut self, result: &Result<Received, FetchError>) {
        let Incoming { transfer, attempt, .. } = *self.incoming;
        let link = &self.session.link;
        self.producer_knows = match result {
            Ok(_) => {
                link.send_bare(Kind::CommitAck, transfer, attempt);
                true
            }
            Err(FetchError::Refused(_)) => true,
            Err(error) => {
                let report = error.report();
                report.inspect(|code| link.send_error(transfer, attempt, *code)).is_some()
            }
        };
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.incoming.close();
        self.session.leave(&self.incoming);
        if !self.producer_knows {
            self.session.link.send_bare(Kind::Cancel, self.incoming.transfer, self.incoming.attempt);
        }
    }
}

/// Counts one fetch, also when it is dropped.
struct Counted<'a> {
    counters: &'a ConsumerCounters,
    ended: bool,
}

impl<'a> Counted<'a> {
    fn new(counters: &'a ConsumerCounters) -> Self {
        counters.active.fetch_add(1, Relaxed);
        Counted { counters, ended: false }
    }

    fn end(mut self, result: &Result<Fetched, FetchError>) {
        self.ended = true;
        match result {
            Ok(_) => {
                self.counters.completed.fetch_add(1, Relaxed);
            }
            Err(error) => {
                self.counters.failed.add(error.path_reason() as usize);
                if matches!(error, FetchError::Assembly(error) if error.is_corruption()) {
                    self.counters.checksum_failures.fetch_add(1, Relaxed);
                }
            }
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.counters.active.fetch_sub(1, Relaxed);
        if !self.ended {
            self.counters.cancelled.fetch_add(1, Relaxed);
        }
    }
}
