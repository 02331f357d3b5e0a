//! The two legs of a request between a proxy and the workers that it chose.
//!
//! Both legs carry the same token ids and the same seed, so that what the prefill worker samples first is what the
//! decode worker would have sampled, and a lost leg can be repeated anywhere with the same outcome.

use crate::render::Endpoint;
use crate::{Path, TransferId};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// One leg of a client's request.
#[derive(Debug, Serialize, Deserialize)]
pub struct LegRequest {
    /// Same in both legs and all log lines.
    pub request_id: String,
    /// Where the client sent the request.
    pub endpoint: Endpoint,
    /// The client's JSON, as it came: sampling parameters are read from it by the worker.
    pub body: Box<RawValue>,
    /// The rendered prompts.
    pub prompts: Vec<Vec<u32>>,
    /// The client's seed, or the one that the proxy minted.
    pub seed: u64,
    /// One for each prompt where KV is to be handed over; empty where the decode worker prefills.
    pub transfers: Vec<Transfer>,
    /// What the proxy planned; the decode worker answers with what really happened.
    pub planned: Path,
}

/// One handover of one prompt's KV.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Which handover.
    pub id: TransferId,
    /// Counts from 1; a higher attempt cancels the lower ones of the same id.
    pub attempt: u32,
    /// Where the prefill worker's KV port is (`address:port`), for the decode leg.
    pub source: String,
    /// Signed [`crate::signing::TransferClaims`]: the right to fetch this KV.
    pub token: String,
}

/// The prefill leg's answer, after the KV has been released. The client's answer never waits for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrefillDone {
    /// Prompt tokens in all prompts.
    pub prompt_tokens: u64,
    /// Of those, found in the prefix cache.
    pub cached_tokens: u64,
    /// KV bytes that left.
    pub kv_bytes: u64,
    /// Milliseconds from admission to the last computed layer.
    pub compute_ms: f64,
}
