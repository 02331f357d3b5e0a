//! The arithmetic that a decoder needs, as a dozen fused operations on buffers of the backend's own.
//!
//! Knows the operations and their exact meaning; the model is written against this alone, so a faster kernel replaces
//! one operation and is checked against [`reference`]. Must not know layers, checkpoints or the scheduler. All
//! operations work on rows: row `i` of an output depends on row `i` of the input (and on the KV cache), never on the
//! rows beside it, and its bits are the same whatever batch it is in.

pub mod reference;

use crate::batch::Batch;
use crate::config::Dtype;
use crate::kv_pool::{KvLayout, KvPool};
use crate::rope::Rope;
use crate::sampling::{SampleRow, SampledToken};

/// A device that computes.
///
/// Shapes are row-major. `T` is the tokens of the batch, `H`, `K` and `D` are query heads, KV heads and head size of
/// the shard. "Rounded" means to [`Backend::dtype`]; sums are kept wider.
pub trait Backend: Send {
    /// Activations on the device.
    type Buffer;
    /// A parameter on the device, in whatever layout the kernels want.
    type Weight: Send;
    /// A point in the device's order of work.
    type Event;
    /// What all layers of a step share: derived from the batch once instead of once a layer.
    type Plan;

    /// Type of activations and of the KV cache.
    fn dtype(&self) -> Dtype;

    /// Takes a matrix `[rows, cols]`, one output feature (or one token's embedding) a row, and rounds it.
    ///
    /// # Errors
    /// When the device has no room.
    fn matrix(&self, rows: usize, cols: usize, values: Vec<f32>) -> Result<Self::Weight, BackendError>;

    /// Takes a vector (a norm's weight or a bias) and rounds it.
    ///
    /// # Errors
    /// When the device has no room.
    fn vector(&self, values: Vec<f32>) -> Result<Self::Weight, BackendError>;

    /// Prepares a step. Checks that every slot and block of the batch lies in the pool, so that the operations need
    /// not.
    ///
    /// # Errors
    /// [`BackendError::Batch`] when the batch contradicts itself or the pool.
    fn plan(&self, batch: &Batch, rope: &Rope, layout: &KvLayout) -> Result<Self::Plan, BackendError>;

    /// Rows `tokens` of `embedding`. `-> [T, hidden]`
    ///
    /// # Errors
    /// [`BackendError::Batch`] when a token is not in the vocabulary.
    fn embed(&self, embedding: &Self::Weight, tokens: &[u32]) -> Result<Self::Buffer, BackendError>;

    /// `input * weight^T + bias`, rounded after the product and after the sum. `[T, in] -> [T, out]`; fused projections
    /// (q, k and v; gate and up) are one weight.
    ///
    /// # Errors
    /// When the device fails.
    fn linear(
        &self,
        input: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
    ) -> Result<Self::Buffer, BackendError>;

    /// Adds `input` to `residual` where given (rounded), then RMSNorm of the sum: normalised in f32, rounded, times
    /// `weight`, rounded. `[T, hidden] -> [T, hidden]`
    ///
    /// # Errors
    /// When the device fails.
    fn rms_norm(
        &self,
        residual: &mut Self::Buffer,
        input: Option<&Self::Buffer>,
        weight: &Self::Weight,
        eps: f32,
    ) -> Result<Self::Buffer, BackendError>;

    /// `residual += input`, rounded. `[T, hidden]`
    ///
    /// # Errors
    /// When the device fails.
    fn add(&self, residual: &mut Self::Buffer, input: &Self::Buffer) -> Result<(), BackendError>;

    /// Splits `qkv` (`[T, (H + 2 K) D]`), normalises each head of q and k where `norm` says so, rotates them by their
    /// positions, rounds, writes k and v to their slots and returns q. `-> [T, H D]`
    ///
    /// # Errors
    /// When the device fails.
    fn rope_write_kv(
        &self,
        qkv: Self::Buffer,
        norm: Option<QkNorm<'_, Self::Weight>>,
        heads: Heads,
        kv: KvLayer<'_>,
        plan: &Self::Plan,
    ) -> Result<Self::Buffer, BackendError>;

    /// Causal attention of each token over its sequence's blocks, K and V read as stored, over the last `window`
    /// positions where given. `[T, H D] -> [T, H D]`
    ///
    /// # Errors
    /// When the device fails.
    fn paged_attention(
        &self,
        q: &Self::Buffer,
        heads: Heads,
        window: Option<usize>,
        kv: KvLayer<'_>,
        plan: &Self::Plan,
    ) -> Result<Self::Buffer, BackendError>;

    /// `silu(gate) * up` of a fused `[T, 2 inner]`, rounded after each. `-> [T, inner]`
    ///
    /// # Errors
    /// When the device fails.
    fn silu_mul(&self, gate_up: Self::Buffer) -> Result<Self::Buffer, BackendError>;

    /// Logits of chosen rows: final norm, then the head's product, rounded. `[T, hidden] -> [rows, vocab]`
    ///
    /// # Errors
    /// When the device fails.
    fn head(
        &self,
        hidden: &Self::Buffer,
        rows: &[u32],
        head: Head<'_, Self::Weight>,
    ) -> Result<Self::Buffer, BackendError>;

    /// Samples one token for each draw. Only ids and what was asked for beside them leave the device.
    ///
    /// # Errors
    /// When the device fails.
    fn sample(&self, logits: &Self::Buffer, draws: &[Draw<'_>]) -> Result<Vec<SampledToken>, BackendError>;

    /// Copies a buffer out, row after row: for reference checks, not for serving.
    ///
    /// # Errors
    /// When the device fails.
    fn read(&self, buffer: &Self::Buffer) -> Result<Vec<f32>, BackendError>;

    /// Marks the work submitted so far.
    ///
    /// # Errors
    /// When the device fails.
    fn record(&self) -> Result<Self::Event, BackendError>;

    /// Whether all work before `event` is done; never blocks.
    ///
    /// # Errors
    /// When the device fails.
    fn is_done(&self, event: &Self::Event) -> Result<bool, BackendError>;

    /// Blocks until all work before `event` is done.
    ///
    /// # Errors
    /// When the device fails.
    fn wait(&self, event: &Self::Event) -> Result<(), BackendError>;
}

/// Heads of one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; a multiple of `kv`.
    pub query: usize,
    /// KV heads.
    pub kv: usize,
    /// Elements a head.
    pub dim: usize,
}

/// One layer of the KV cache.
#[derive(Clone, Copy)]
pub struct KvLayer<'a> {
    /// The cache.
    pub pool: &'a dyn KvPool,
    /// Which of its layers.
    pub layer: usize,
}

/// Weights of the norms over q and k heads.
#[derive(Clone, Copy, Debug)]
pub struct QkNorm<'a, W> {
    /// For q. `[D]`
    pub q: &'a W,
    /// For k. `[D]`
    pub k: &'a W,
    /// Added to the mean square.
    pub eps: f32,
}

/// What turns hidden states into logits.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a, W> {
    /// Weight of the final norm. `[hidden]`
    pub norm: &'a W,
    /// Added to the mean square.
    pub eps: f32,
    /// Output embedding. `[vocab, hidden]`
    pub weight: &'a W,
}

/// One token to sample.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// Which row of the logits.
    pub logits_row: usize,
    /// Parameters and history.
    pub row: &'a SampleRow<'a>,
    /// Absolute position that the sampled token will have.
    pub position: u32,
}

/// An operation can't be done.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The batch contradicts itself, the pool or the vocabulary.
    #[error("inconsistent batch: {0}")]
    Batch(String),
    /// An operand has another shape than the operation needs.
    #[error("{operation}: expected {expected}, found {found}")]
    Shape {
        /// Name of the operation.
        operation: &'static str,
        /// What it needs.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// The tensor library failed.
    #[error("tensor operation failed")]
    Tensor(#[from] candle_core::Error),
}
