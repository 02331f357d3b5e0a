//! The prefill leg: each prompt computed once, its KV handed over while it is computed, its blocks held until the other side has it.
//!
//! Who owns what: the engine holds the blocks until [`Submitted`] is dropped; the export may read them until then. Both live in the
//! future of [`prefill`], so that a proxy that hangs up ends computing, handover and hold together.

use crate::engine_thread::{EVENTS_BESIDE_TOKENS, Events};
use crate::error::ApiError;
use crate::generate::Rendered;
use crate::serving::Serving;
use crate::transfer::producer::{ExportOutcome, ExportReason, ExportSpec, Producer};
use baton_engine::engine::Event;
use baton_engine::request::RequestKind;
use baton_wire::PromptHash;
use baton_wire::leg::{PrefillDone, Transfer};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;

/// Computes every prompt of a leg for the decode worker that fetches it; `transfers` has one handover for each.
///
/// # Errors
/// When a prompt can't be computed or its KV was not fetched; everything is released then.
pub async fn prefill(
    serving: &Serving,
    producer: &Producer,
    rendered: &Rendered,
    transfers: &[Transfer],
) -> Result<PrefillDone, ApiError> {
    let admitted = Instant::now();
    let (sender, mut events) = mpsc::channel(transfers.len() * EVENTS_BESIDE_TOKENS);
    let mut submitted = Vec::new();
    let mut exports = Vec::new();
    let mut fetched = FuturesUnordered::new();
    for (prompt, transfer) in transfers.iter().enumerate() {
        let request = rendered.engine_request(prompt, RequestKind::Prefill, serving)?;
        let spec = ExportSpec {
            transfer: transfer.id,
            attempt: transfer.attempt,
            prompt_tokens: request.prompt.len(),
            prompt_hash: PromptHash::of(&request.prompt),
        };
        let export = producer.open(spec).map_err(|error| ApiError::TransferRefused { reason: error.to_string() })?;
        let export = Arc::new(export);
        let finished = export.finished();
        fetched.push(async move { (prompt, finished.await) });
        let events = Events { sender: sender.clone(), prompt };
        submitted.push(Some(serving.engine.submit(request, events, Some(export.clone())).await?));
        exports.push(export);
    }
    drop(sender);

    let mut done = PrefillDone {
        prompt_tokens: rendered.prompts.iter().map(|prompt| prompt.len() as u64).sum(),
        ..PrefillDone::default()
    };
    loop {
        tokio::select! {
            // In this order: what an export's end makes superfluous has been heard before.
            biased;
            event = events.recv(), if submitted.iter().any(Option::is_some) => match event {
                Some((_, Event::PrefillDone { cached_tokens, .. })) => {
                    done.cached_tokens += cached_tokens as u64;
                    done.compute_ms = admitted.elapsed().as_secs_f64() * 1e3;
                }
                Some((_, Event::Failed { .. })) => return Err(ApiError::ForwardFailed),
                Some((_, Event::ImportReady { .. } | Event::Computed { .. } | Event::Token { .. })) => {
                    unreachable!("a prefill is no import, its progress goes to the export, and it generates nothing")
                }
                None => return Err(ApiError::EngineStopped),
            },
            Some((prompt, outcome)) = fetched.next() => {
                let ExportOutcome { reason, kv_bytes } = outcome;
                submitted[prompt] = None;
                done.kv_bytes += kv_bytes;
                if reason != ExportReason::Acked {
                    return Err(ApiError::KvNotFetched { reason: reason.as_str() });
                }
                if submitted.iter().all(Option::is_none) {
                    return Ok(done);
                }
            }
            () = serving.cut_off.cancelled() => return Err(ApiError::CutOff),
        }
    }
}
