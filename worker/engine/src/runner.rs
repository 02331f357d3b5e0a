//! The seam between policy and arithmetic: a batch in, sampled tokens out.

use crate::batch::Batch;
use crate::sampling::{SampleRow, SampledToken};

/// Computes one step. The model on a backend is one; tests have others.
pub trait Runner: Send {
    /// Runs the model over `batch`, writing each token's K and V to its slot before attention reads them, and samples one
    /// token for each of `rows` (`rows[i]` from the logits of `batch.logit_rows[i]`). `hook` is called on the same thread as
    /// soon as a layer's K and V of this batch are all in the pool.
    ///
    /// # Errors
    /// When the device fails; the batch then has no effect that the scheduler may rely on.
    fn run(
        &mut self,
        batch: &Batch,
        rows: &[SampleRow<'_>],
        hook: &mut dyn LayerHook,
    ) -> Result<Vec<SampledToken>, RunError>;
}

/// Told as each layer completes, so that its KV can leave while the next layer computes.
pub trait LayerHook {
    /// K and V of all the batch's tokens are in the pool for `layer`.
    fn layer_done(&mut self, layer: usize);
}

/// A hook for those who don't care.
impl LayerHook for () {
    fn layer_done(&mut self, _layer: usize) {}
}

/// The device failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("forward pass failed: {0}")]
pub struct RunError(pub String);
