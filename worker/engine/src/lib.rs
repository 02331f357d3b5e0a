//! Tokens in, tokens out: models, KV cache and scheduler.
//!
//! Knows tensors and tokens; knows nothing of HTTP, async runtimes or Kubernetes. The flow of one step is three calls:
//! the scheduler decides (integers only), the runner computes (tensors only), the engine books the outcome.
//!
//! ```text
//!  submit ─> [ scheduler + block_manager ] ── Batch ──> [ runner: model on a Backend, KvPool ] ── SampledToken ──> events
//! ```

pub mod batch;
pub mod kv_pool;
pub mod runner;
pub mod sampling;
