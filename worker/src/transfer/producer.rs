//! The prefill side: keeps exports, answers consumers on the KV port, sends what is computed.
//!
//! Reads its own pool and nothing else. A consumer proves its right to a transfer by the proxy's token; export and
//! subscription may come in either order, and meet in the [`Registry`].

mod connection;
mod registry;
mod subscription;

pub use super::commit::{Commit, FirstToken};
pub use super::error::{BlockTooLarge, OpenError};
pub use super::export::{Export, ExportOutcome, ExportSpec};
pub use super::limits::{Limits, Timing};
pub use super::stats::{ExportReason, ProducerStats};
pub(super) use registry::Registry;

use baton_engine::kv_pool::KvPool;
use baton_wire::{Epoch, Fingerprint};
use ed25519_dalek::VerifyingKey;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How a producer is set up.
#[derive(Clone, Debug)]
pub struct ProducerConfig {
    /// This life of this process.
    pub epoch: Epoch,
    /// Of the model and its KV layout.
    pub fingerprint: Fingerprint,
    /// The public half of the proxies' key.
    pub verifying_key: VerifyingKey,
    /// How long each step may take.
    pub timing: Timing,
    /// How much it takes on.
    pub limits: Limits,
}

/// The prefill side of handovers. Clones share everything.
#[derive(Clone)]
pub struct Producer {
    registry: Arc<Registry>,
}

impl Producer {
    /// A producer over `pool`.
    ///
    /// # Errors
    /// [`BlockTooLarge`] when one layer of a block does not fit into a frame.
    pub fn new(config: ProducerConfig, pool: Arc<dyn KvPool>) -> Result<Self, BlockTooLarge> {
        BlockTooLarge::check(pool.layout().block_bytes())?;
        Ok(Producer { registry: Arc::new(Registry::new(config, pool)) })
    }

    /// Opens an export: its KV may be told of by [`Export::progress`] and subscribed to from now on, for the time of a lease.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(&self, spec: ExportSpec) -> Result<Export, OpenError> {
        let state = self.registry.open(spec, Instant::now())?;
        Ok(Export::new(state, Arc::clone(&self.registry)))
    }

    /// Serves consumers until `shutdown`; then ends all exports and sessions, tells the consumers, and returns. A worker that drains
    /// waits for its exports before it cancels `shutdown`. Leases of exports that nobody subscribed to are ended from here, too.
    pub async fn serve(&self, listener: TcpListener, shutdown: CancellationToken) {
        let tasks = TaskTracker::new();
        let timing = self.registry.config.timing;
        let mut sweep = tokio::time::interval(timing.sweep);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = sweep.tick() => self.registry.sweep(Instant::now()),
                accepted = listener.accept() => match accepted {
                    Ok((stream, from)) => connection::spawn(&self.registry, &tasks, stream, from),
                    // Out of file descriptors or the like: the next sweep's tick comes before another try, so this cannot spin.
                    Err(error) => {
                        tracing::warn!(%error, "KV port cannot accept a connection");
                        sweep.tick().await;
                    }
                },
            }
        }
        self.registry.shut_down();
        tasks.close();
        // Writers get `flush` to tell the consumers; a peer that does not read cannot hold the process up.
        let _ = tokio::time::timeout(timing.flush * 2, tasks.wait()).await;
    }

    /// What it has done so far, and has now.
    pub fn stats(&self) -> ProducerStats {
        self.registry.stats(Instant::now())
    }
}
