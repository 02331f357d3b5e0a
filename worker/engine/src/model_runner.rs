//! A model on a backend with its KV cache, as the runner that the engine drives.
//!
//! Knows how a step's rows of logits become sampled tokens. Must not know scheduling: it computes the batch that it is
//! given.

use std::sync::Arc;

use crate::backend::{Backend, BackendError, Draw};
use crate::batch::Batch;
use crate::kv_pool::{KvLayout, KvPool};
use crate::loader::Shard;
use crate::models::decoder::{Decoder, Output};
use crate::runner::{LayerHook, RunError, Runner};
use crate::sampling::{SampleRow, SampledToken};

/// A model and its cache.
pub struct ModelRunner<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    pool: Arc<dyn KvPool>,
}

impl<B: Backend> ModelRunner<B> {
    pub(crate) fn new(backend: B, decoder: Decoder<B>, pool: Arc<dyn KvPool>) -> Self {
        ModelRunner { backend, decoder, pool }
    }

    /// Runs a batch and copies out the logits of its `logit_rows`, `[R, vocab]` row after row: for reference checks.
    ///
    /// # Errors
    /// When the batch is inconsistent or the device fails.
    pub fn logits(&self, batch: &Batch, hook: &mut dyn LayerHook) -> Result<Vec<f32>, BackendError> {
        let logits = self.forward(batch, hook)?;
        self.backend.read(&logits)
    }

    fn forward(&self, batch: &Batch, hook: &mut dyn LayerHook) -> Result<B::Buffer, BackendError> {
        match self.decoder.forward(&self.backend, batch, None, self.pool.as_ref(), hook)? {
            Output::Logits(logits) => Ok(logits),
            Output::Hidden(_) => unreachable!("a runner is made of whole models only"),
        }
    }

    fn step(
        &self,
        batch: &Batch,
        rows: &[SampleRow<'_>],
        hook: &mut dyn LayerHook,
    ) -> Result<Vec<SampledToken>, BackendError> {
        if rows.len() != batch.logit_rows.len() {
            let (rows, wanted) = (rows.len(), batch.logit_rows.len());
            return Err(BackendError::Batch(format!("{rows} rows to sample for {wanted} rows of logits")));
        }
        // The choices of one request share a row of logits, which is then computed once.
        let mut distinct = batch.logit_rows.clone();
        distinct.dedup();
        let mut draws = Vec::with_capacity(rows.len());
        for (row, &token) in rows.iter().zip(&batch.logit_rows) {
            let logits_row = distinct
                .binary_search(&token)
                .map_err(|_| BackendError::Batch("logit rows are not ascending".into()))?;
            let position = *batch
                .positions
                .get(token as usize)
                .ok_or_else(|| BackendError::Batch("a logit row is beyond the tokens".into()))?;
            draws.push(Draw { logits_row, row, position: position + 1 });
        }
        let logits = if distinct == batch.logit_rows {
            self.forward(batch, hook)?
        } else {
            self.forward(&Batch { logit_rows: distinct, ..batch.clone() }, hook)?
        };
        self.backend.sample(&logits, &draws)
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn run(
        &mut self,
        batch: &Batch,
        rows: &[SampleRow<'_>],
        hook: &mut dyn LayerHook,
    ) -> Result<Vec<SampledToken>, RunError> {
        self.step(batch, rows, hook).map_err(|error| {
            // The seam carries text only; put the cause into it.
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            RunError(format!("{error}{cause}"))
        })
    }
}

/// A model can't be joined with a cache.
#[derive(Debug, thiserror::Error)]
pub enum ModelRunnerError {
    /// The cache has another shape.
    #[error("the KV pool is {found:?}, the model needs {expected:?}")]
    PoolShape {
        /// What the model needs.
        expected: KvLayout,
        /// What it was given.
        found: KvLayout,
    },
    /// Shards need an exchange of partial sums or hidden states between processes, which does not exist.
    #[error("share {} of {} with layers {:?} is a part of a model, which can't run by itself", shard.index, shard.count, shard.layers)]
    PartOfModel {
        /// The part.
        shard: Shard,
    },
}
