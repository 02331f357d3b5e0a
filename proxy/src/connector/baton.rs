//! The protocol of our own worker: both legs leave together with the same body, the KV finds its way by a transfer's id, and
//! a signed token lets exactly the chosen decode worker fetch it.

use crate::connector::{Call, Legs};
use baton_wire::leg::{LegRequest, Resume, Transfer};
use baton_wire::names::paths;
use baton_wire::render::{Endpoint, RenderRequest};
use baton_wire::signing::{self, TransferClaims};
use baton_wire::{Epoch, Fingerprint, Path, PathReason, TransferId};
use bytes::Bytes;
use ed25519_dalek::SigningKey;
use serde_json::value::RawValue;

/// KV bytes a token that a transfer may carry at most: the token's budget is a bound on damage, not an allocation, so it is
/// set above every published model. The largest without grouped queries (Llama 65B: 80 layers, 64 heads of 128) takes 5 MiB
/// in f32; frame headers are 64 bytes in 256 KiB.
const KV_BYTES_PER_TOKEN_MAX: u64 = 8 << 20;

/// How long a transfer's token holds. No lease on KV lives longer than 120 s, so a later SUBSCRIBE would find nothing.
const TRANSFER_TOKEN_TTL_MS: u64 = 120_000;

/// The two ends of a handover.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Handover<'a> {
    /// Where the prefill worker's KV is fetched.
    pub(crate) source: &'a str,
    /// The decode worker's process.
    pub(crate) consumer: Epoch,
    /// Of both.
    pub(crate) fingerprint: Fingerprint,
    /// Tokens a KV block.
    pub(crate) block_tokens: u32,
    /// Counts from 1; a higher attempt cancels the lower ones of the same transfer.
    pub(crate) attempt: u32,
}

/// The call that turns a client's request into token ids.
pub(crate) fn render(endpoint: Endpoint, body: Box<RawValue>, tenant_salt: Option<u64>) -> (Call, Box<RawValue>) {
    let request = RenderRequest { endpoint, body, tenant_salt };
    (Call { path: paths::RENDER, body: json(&request) }, request.body)
}

/// Both legs of a remote prefill. `ids` has one id for each prompt.
pub(crate) fn remote(
    leg: &mut LegRequest,
    key: &SigningKey,
    handover: Handover<'_>,
    ids: &[TransferId],
    now_unix_ms: u64,
) -> Legs {
    leg.planned = Path::RemotePrefill;
    leg.transfers = leg
        .prompts
        .iter()
        .zip(ids)
        .map(|(prompt, id)| transfer(key, handover, *id, prompt.len(), now_unix_ms))
        .collect();
    let body = json(leg);
    Legs {
        prefill: Some(Call { path: paths::PREFILL_LEG, body: body.clone() }),
        decode: Call { path: paths::DECODE_LEG, body },
    }
}

/// The decode leg alone, where its worker computes the prompt; `planned` says why.
pub(crate) fn local(leg: &mut LegRequest, planned: Path) -> Legs {
    leg.planned = planned;
    leg.transfers.clear();
    Legs { prefill: None, decode: Call { path: paths::DECODE_LEG, body: json(leg) } }
}

/// The decode leg of a stream that another worker goes on with.
pub(crate) fn resumed(leg: &mut LegRequest, resume: Resume) -> Call {
    leg.planned = Path::Fallback(PathReason::DecodeWorkerLost);
    leg.transfers.clear();
    leg.resume = Some(resume);
    let call = Call { path: paths::DECODE_LEG, body: json(leg) };
    leg.resume = None;
    call
}

fn transfer(
    key: &SigningKey,
    handover: Handover<'_>,
    id: TransferId,
    prompt_tokens: usize,
    now_unix_ms: u64,
) -> Transfer {
    let Handover { source, consumer, fingerprint, block_tokens, attempt } = handover;
    let claims = TransferClaims {
        transfer: id,
        attempt,
        consumer,
        fingerprint,
        byte_budget: byte_budget(prompt_tokens as u64, block_tokens),
        expires_unix_ms: now_unix_ms + TRANSFER_TOKEN_TTL_MS,
    };
    Transfer { id, attempt, source: source.to_owned(), token: signing::sign(key, &claims) }
}

/// KV leaves in whole blocks, so the last one counts in full.
fn byte_budget(prompt_tokens: u64, block_tokens: u32) -> u64 {
    let block_tokens = u64::from(block_tokens.max(1));
    prompt_tokens.div_ceil(block_tokens).saturating_mul(block_tokens).saturating_mul(KV_BYTES_PER_TOKEN_MAX)
}

fn json(value: &impl serde::Serialize) -> Bytes {
    serde_json::to_vec(value).expect("requests are strings, numbers and valid JSON, which always serialise").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg() -> LegRequest {
        LegRequest {
            request_id: "r".into(),
            endpoint: Endpoint::Completions,
            body: RawValue::from_string(r#"{"b": 1,  "a":[2.50]}"#.into()).expect("JSON"),
            prompts: vec![vec![1; 33], vec![2]],
            seed: u64::MAX,
            transfers: Vec::new(),
            planned: Path::LocalPrefill(PathReason::PolicyNever),
            created: None,
            tenant_salt: None,
            resume: None,
        }
    }

    const HANDOVER: Handover<'static> = Handover {
        source: "10.0.0.1:5600",
        consumer: Epoch([2; 16]),
        fingerprint: Fingerprint([3; 32]),
        block_tokens: 32,
        attempt: 2,
    };

    #[test]
    fn each_prompt_has_a_transfer_that_only_the_decode_worker_may_fetch() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let ids = [TransferId([4; 16]), TransferId([5; 16])];
        let legs = remote(&mut leg(), &key, HANDOVER, &ids, 1000);
        let prefill = legs.prefill.expect("planned remote");
        assert_eq!(prefill.body, legs.decode.body);
        let sent: LegRequest = serde_json::from_slice(&legs.decode.body).expect("a leg");
        assert_eq!((sent.seed, sent.planned), (u64::MAX, Path::RemotePrefill));
        for ((transfer, id), blocks) in sent.transfers.iter().zip(ids).zip([2, 1]) {
            let claims: TransferClaims =
                signing::verify(&key.verifying_key(), &transfer.token, 1000).expect("signed and fresh");
            assert_eq!((transfer.id, claims.transfer, claims.attempt), (id, id, 2));
            assert_eq!(claims.consumer, HANDOVER.consumer);
            assert_eq!(claims.byte_budget, blocks * 32 * KV_BYTES_PER_TOKEN_MAX);
        }
    }

    #[test]
    fn the_clients_json_arrives_byte_for_byte() {
        let legs = local(&mut leg(), Path::Fallback(PathReason::PrefillFailed));
        let sent: LegRequest = serde_json::from_slice(&legs.decode.body).expect("a leg");
        assert_eq!(sent.body.get(), r#"{"b": 1,  "a":[2.50]}"#);
        assert!(sent.transfers.is_empty() && legs.prefill.is_none());
        assert_eq!(sent.planned, Path::Fallback(PathReason::PrefillFailed));
    }

    #[test]
    fn a_resumed_leg_is_the_same_request_without_a_handover() {
        let mut leg = leg();
        let handed_over =
            remote(&mut leg, &SigningKey::from_bytes(&[7; 32]), HANDOVER, &[TransferId([4; 16]); 2], 1000);
        let resume = Resume { choices: Vec::new(), usage_sent: true };
        let sent: LegRequest = serde_json::from_slice(&resumed(&mut leg, resume.clone()).body).expect("a leg");
        let first: LegRequest = serde_json::from_slice(&handed_over.decode.body).expect("a leg");
        assert_eq!((sent.seed, &sent.prompts, sent.body.get()), (first.seed, &first.prompts, first.body.get()));
        assert_eq!((sent.request_id, sent.created), (first.request_id, first.created));
        assert!(sent.transfers.is_empty());
        assert_eq!((sent.planned, sent.resume), (Path::Fallback(PathReason::DecodeWorkerLost), Some(resume)));
    }

    #[test]
    fn a_budget_never_overflows() {
        assert_eq!(byte_budget(u64::MAX, 0), u64::MAX);
    }
}
