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
    /// When the proxy took the request, in seconds since the Unix epoch: the answer's `created`, whichever worker gives it. The
    /// worker's own clock where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<u64>,
    /// Keeps tenants' prefix caches apart: mixed into the client's own salt. Absent where there is one tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_salt: Option<u64>,
    /// On the decode leg of a stream whose decode worker was lost: what the client has of it already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<Resume>,
}

/// What a client has of a stream that was cut, so that another decode worker goes on with the very next event.
///
/// It is what the marks ([`crate::names::sse::TOKEN_IDS_PREFIX`]) of the events said that were passed on whole, added up over all
/// workers that the stream has come from. The new worker computes prompts and token ids as one prompt, draws the next tokens as
/// the lost one would have, and leaves out the events that the client has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// One for each choice of all prompts, in the order of their numbers in the marks.
    pub choices: Vec<ResumedChoice>,
    /// Whether the event with the usage was passed on.
    #[serde(default)]
    pub usage_sent: bool,
}

/// What a client has of one choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumedChoice {
    /// Events with this choice's mark.
    pub events: u32,
    /// The token ids of those marks, in their order.
    pub token_ids: Vec<u32>,
    /// What the mark of the choice's first event said of the prefix cache; absent where there was no event yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_tokens: Option<u32>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leg_of_a_proxy_without_the_later_fields_is_read() {
        let text = r#"{"request_id":"r","endpoint":"chat","body":{},"prompts":[[1]],"seed":2,"transfers":[],
            "planned":{"path":"fallback","reason":"decode-worker-lost"}}"#;
        let leg: LegRequest = serde_json::from_str(text).expect("a leg");
        assert_eq!((leg.created, leg.tenant_salt, &leg.resume), (None, None, &None));
        let written = serde_json::to_string(&leg).expect("a leg serialises");
        assert!(!["created", "tenant_salt", "resume"].iter().any(|field| written.contains(field)), "{written}");
    }

    #[test]
    fn what_a_client_has_survives_the_wire() {
        let choices =
            vec![ResumedChoice { events: 3, token_ids: vec![7, 8], cached_tokens: Some(64) }, ResumedChoice::default()];
        let resume = Resume { choices, usage_sent: true };
        let text = serde_json::to_string(&resume).expect("it serialises");
        assert_eq!(serde_json::from_str::<Resume>(&text).expect("own text parses"), resume);
    }
}
