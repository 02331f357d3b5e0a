//! Tokens in, tokens out: models, KV cache and scheduler.
//!
//! Knows tensors and tokens; knows nothing of HTTP, async runtimes or Kubernetes. The flow of one step is three calls:
//! the scheduler decides (integers only), the runner computes (tensors only), the engine books the outcome.
//!
//! ```text
//!  submit ─> [ scheduler + block_manager ] ── Batch ──> [ runner: model on a Backend, KvPool ] ── SampledToken ──> events
//! ```

pub mod backend;
pub mod batch;
pub mod block_manager;
pub mod chat_template;
pub mod config;
pub mod engine;
mod fingerprint;
pub mod kv_pool;
pub mod layers;
pub mod loader;
pub mod model_runner;
pub mod models;
pub mod prefix_hash;
pub mod request;
pub mod rope;
pub mod runner;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod text;
pub mod tokenizer;
