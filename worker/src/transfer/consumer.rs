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
use baton_wire::kv::{self, Codec, Kind, Subscribe};
use baton_wire::leg::Transfer;
use baton_wire::{Epoch, Fingerprint, PromptHash};
use incoming::{Incoming, Received};
use peers::Peers;
use session::Session;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::oneshot;
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
    /// hide. It is the producer's time from that layer to its COMMIT plus our time from the COMMIT's arrival, so no clocks are
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

    /// Fetches a prompt's KV. Dropping the future cancels.
    ///
    /// # Errors
    /// See [`FetchError`]. The destination blocks then hold nothing of use.
    pub fn fetch(&self, fetch: Fetch) -> impl Future<Output = Result<Fetched, FetchError>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move {
            let counted = Counted::new(&shared.counters);
            let result = shared.fetch(fetch).await;
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
    async fn fetch(&self, fetch: Fetch) -> Result<Fetched, FetchError> {
        let started = Instant::now();
        let (incoming, outcome) = self.prepare(&fetch)?;
        let session = self.peers.session(&fetch.transfer.source, started).await?;
        let mut active = Active::begin(&session, incoming)?;
        let layout = self.pool.layout();
        let number = |n: usize| u32::try_from(n).expect("a prompt's tokens and blocks are counted in 32 bits");
        let asked = Subscribe {
            token: fetch.transfer.token,
            prompt_tokens: number(fetch.prompt_tokens),
            prompt_hash: fetch.prompt_hash,
            have_prefix_blocks: number(fetch.cached_blocks),
            head_start: 0,
            head_count: u16::try_from(layout.kv_heads).expect("a model has few heads"),
            codec: Codec::None,
            credit_bytes: CREDIT_BYTES,
        };
        let Transfer { id, attempt, .. } = fetch.transfer;
        session.link.send(id, attempt, &asked).map_err(|error| FetchError::Session(error.into()))?;
        let Received { commit, kv_bytes, exposed } = active.wait(outcome, self.config.timing.fetch_idle).await?;
        let kv::Commit { cached_tokens, choices, .. } = commit;
        let commit = Commit { cached_tokens: cached_tokens as usize, choices };
        Ok(Fetched { commit, kv_bytes, exposed, total: started.elapsed() })
    }

    /// What is waited for, sized by what this side knows.
    fn prepare(&self, fetch: &Fetch) -> Result<(Incoming, Outcome), FetchError> {
        let Fetch { prompt_tokens, cached_blocks, .. } = *fetch;
        let prompt_blocks = prompt_tokens.div_ceil(BLOCK_TOKENS);
        let fits = prompt_tokens > 0 && cached_blocks <= prompt_blocks && prompt_blocks <= fetch.blocks.len();
        let range = u32::try_from(cached_blocks).ok().zip(u32::try_from(prompt_blocks).ok()).filter(|_| fits);
        let Some((first, end)) = range else {
            return Err(FetchError::BadRequest { blocks: fetch.blocks.len(), cached_blocks, prompt_tokens });
        };
        let layout = self.pool.layout();
        let assembly = Assembly::new(Expected {
            layers: layout.layers,
            kv_heads: layout.kv_heads,
            block_bytes: layout.block_bytes(),
            blocks: first..end,
            prompt_tokens,
            prompt_hash: fetch.prompt_hash,
        });
        let Transfer { id, attempt, .. } = fetch.transfer;
        let blocks = fetch.blocks[..prompt_blocks].to_vec();
        Ok(Incoming::new(id, attempt, Arc::clone(&self.pool), blocks, assembly))
    }
}

type Outcome = oneshot::Receiver<Result<Received, FetchError>>;

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

    async fn wait(&mut self, mut outcome: Outcome, idle: Duration) -> Result<Received, FetchError> {
        let link = Arc::clone(&self.session.link);
        let result = loop {
            let deadline = self.incoming.last_progress() + idle;
            tokio::select! {
                biased;
                received = &mut outcome => {
                    break received.expect("the sender is kept by the incoming transfer until it is used");
                }
                () = link.ended() => break Err(FetchError::Session(link.cause())),
                () = tokio::time::sleep_until(deadline) => {
                    if self.incoming.last_progress() + idle <= Instant::now() {
                        break Err(FetchError::Idle(idle));
                    }
                }
            }
        };
        let Incoming { transfer, attempt, .. } = *self.incoming;
        match &result {
            Ok(_) => {
                link.send_bare(Kind::CommitAck, transfer, attempt);
                self.producer_knows = true;
            }
            Err(FetchError::Refused(_)) => self.producer_knows = true,
            Err(error) => {
                if let Some(code) = error.report() {
                    link.send_error(transfer, attempt, code);
                    self.producer_knows = true;
                }
            }
        }
        result
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
