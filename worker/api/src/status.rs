//! What a worker says of itself on `/status`: all that a proxy needs to know of it beyond its address.

use crate::{Epoch, Fingerprint, Role};
use serde::{Deserialize, Serialize};

/// What a worker says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Which phases it serves now.
    pub role: Role,
    /// The revision of the manifest that it was started for; proxies pair equal revisions only.
    pub revision: String,
    /// This life of this process.
    pub epoch: Epoch,
    /// The model's name towards clients.
    pub model: String,
    /// Known once the model is loaded.
    pub fingerprint: Option<Fingerprint>,
    /// Where its KV port is reached by peers (`address:port`); absent where it neither gives nor takes KV.
    pub kv_address: Option<String>,
    /// Loading, ready, draining or failed.
    pub state: State,
    /// How far loading is, while it is.
    pub progress: Option<Progress>,
    /// Prompt plus completion, in tokens; known once the model is loaded.
    pub max_model_length: Option<u32>,
    /// Tokens a KV block.
    pub block_tokens: u32,
    /// What it has to do.
    pub load: Load,
    /// Totals since start that a person wants to see without a metrics stack.
    pub totals: Totals,
    /// Where its bootstrap server listens, of an engine that has one (SGLang, where it prefills).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap_port: Option<u16>,
    /// Sequences of each data-parallel rank, running and waiting, of an engine in which a rank can be asked for; empty where there is
    /// but one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rank_loads: Vec<u32>,
    /// Names of the adapters (LoRA) that requests there use or wait for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<String>,
}

/// Where a worker is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Loading the model.
    Loading,
    /// Takes work.
    Ready,
    /// Finishes what it has and takes nothing new.
    Draining,
}

/// How far loading is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, in a word or two.
    pub stage: String,
    /// Done so far, in the stage's unit (bytes of weights).
    pub done: u64,
    /// All there is to do.
    pub total: u64,
}

/// What a worker has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Sequences being computed.
    pub running: u32,
    /// Sequences waiting for room.
    pub waiting: u32,
    /// Prompt tokens that still have to be computed, waiting and running.
    pub queued_prompt_tokens: u64,
    /// KV blocks in use (prefix-cached blocks that nobody holds count as free).
    pub kv_blocks_used: u32,
    /// KV blocks in all.
    pub kv_blocks_total: u32,
}

/// Totals since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Prompt tokens computed here.
    pub prefill_tokens: u64,
    /// Tokens generated here.
    pub decode_tokens: u64,
    /// KV bytes sent to other workers.
    pub kv_bytes_sent: u64,
    /// KV bytes received from other workers.
    pub kv_bytes_received: u64,
    /// Handovers that ended in an acknowledged COMMIT.
    pub transfers_completed: u64,
    /// Handovers that did not.
    pub transfers_failed: u64,
    /// Of the last completed handover into this worker: milliseconds from the end of the prompt's computation to all of
    /// its KV here and verified. COMMIT says how long ago the end was, so no clocks are compared; its own way is left out.
    pub last_exposed_transfer_ms: Option<f64>,
}
