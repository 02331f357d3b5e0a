//! What a worker has once its model is loaded: everything that a request needs to be served.

use crate::engine_thread::EngineHandle;
use crate::metrics::Metrics;
use crate::openai::ModelFacts;
use crate::transfer::consumer::Consumer;
use crate::transfer::producer::Producer;
use baton_engine::tokenizer::Tokenizer;
use baton_wire::Fingerprint;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Digits of the fingerprint that answers carry as `system_fingerprint`: enough to tell models apart at a glance.
const SYSTEM_FINGERPRINT_DIGITS: usize = 12;

/// What requests are served with.
pub struct Serving {
    /// What requests are checked against.
    pub facts: ModelFacts,
    /// Tokens that end a completion unless the client ignores them.
    pub eos: Vec<u32>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Tokenisations at once; each takes a CPU for as long as a prompt is long.
    pub renders: Arc<Semaphore>,
    /// The engine.
    pub engine: EngineHandle,
    /// Model and KV layout.
    pub fingerprint: Fingerprint,
    /// Hands KV to other workers, where this one does.
    pub producer: Option<Producer>,
    /// Takes KV from other workers.
    pub consumer: Consumer,
    /// Counts what happens.
    pub metrics: Arc<Metrics>,
    /// Cancelled when draining has taken too long: whoever still waits for tokens gives up.
    pub cut_off: CancellationToken,
}

/// Names the model; there is no more to it that a log could use.
impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Serving({}, {})", self.facts.name, self.fingerprint)
    }
}

impl Serving {
    /// The short form of the fingerprint that clients see.
    pub fn system_fingerprint(&self) -> String {
        let digits: String = self.fingerprint.to_string().chars().take(SYSTEM_FINGERPRINT_DIGITS).collect();
        format!("fp_{digits}")
    }
}
