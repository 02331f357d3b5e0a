//! The prefill leg: each prompt computed once, its KV handed over while it is computed, its blocks held until the other side has it.
//!
//! Who owns what: the engine holds the blocks until [`Submitted`] is dropped; the export may read them until then. Both live in the
//! future of [`prefill`], so that a proxy that hangs up ends computing, handover and hold together. The engine's thread shares the
//! export, to tell it of progress, but does not keep it open.
//!
//! [`Submitted`]: crate::engine_thread::Submitted

use crate::engine_thread::{EVENTS_BESIDE_TOKENS, Events};
use crate::error::ApiError;
use crate::generate::Rendered;
use crate::serving::Serving;
use crate::transfer::producer::{Export, ExportOutcome, ExportReason, ExportSpec, Producer};
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
        let export = OpenExport(Arc::new(export));
        let finished = export.0.finished();
        fetched.push(async move { (prompt, finished.await) });
        let events = Events { sender: sender.clone(), prompt };
        submitted.push(Some(serving.engine.submit(request, events, Some(export.0.clone())).await?));
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

/// An export that ends with this leg, though the engine's thread may have it until its present step is over.
struct OpenExport(Arc<Export>);

impl Drop for OpenExport {
    fn drop(&mut self) {
        self.0.fail();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine_thread::{self, tests::Gate};
    use crate::metrics::Metrics;
    use crate::openai::{ModelFacts, Request};
    use crate::transfer::consumer::{Consumer, ConsumerConfig};
    use crate::transfer::producer::{Limits, ProducerConfig, Timing};
    use baton_engine::engine::{Engine, EngineConfig};
    use baton_engine::kv_pool::{HeapPool, KvDtype, KvLayout};
    use baton_engine::tokenizer::Tokenizer;
    use baton_wire::render::Endpoint;
    use baton_wire::{Epoch, Fingerprint, Role, TransferId};
    use std::path::Path;
    use tokio::sync::Semaphore;
    use tokio_util::sync::CancellationToken;

    #[tokio::test]
    async fn a_leg_that_is_dropped_in_the_middle_of_a_step_ends_its_export_at_once() {
        let layout = KvLayout { layers: 1, kv_heads: 1, head_dim: 2, dtype: KvDtype::F32, num_blocks: 8 };
        let pool = Arc::new(HeapPool::new(layout));
        let (entered, is_busy) = std::sync::mpsc::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let config = EngineConfig { num_blocks: 8, ..EngineConfig::default() };
        let engine = Engine::new(Gate { entered, wait }, pool.clone(), config, 128).expect("fitting limits");
        let metrics = Arc::new(Metrics::new(Role::Prefill, "r", "m"));
        let (engine, _end) = engine_thread::start(engine, 1, metrics.clone()).expect("a thread");
        let (epoch, fingerprint, timing) = (Epoch([1; 16]), Fingerprint([2; 32]), Timing::default());
        let verifying_key = ed25519_dalek::SigningKey::from_bytes(&[3; 32]).verifying_key();
        let config = ProducerConfig { epoch, fingerprint, verifying_key, timing, limits: Limits::default() };
        let producer = Producer::new(config, pool.clone()).expect("blocks fit frames");
        let facts =
            ModelFacts { name: "m".to_owned(), vocab_size: 9, max_model_length: 128, defaults: Default::default() };
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/models/tiny");
        let request = Request::parse(Endpoint::Completions, r#"{"model": "m", "prompt": [1, 2]}"#, &facts);
        let serving = Serving {
            facts,
            eos: Vec::new(),
            tokenizer: Tokenizer::load(&model).expect("the demo model's"),
            renders: Arc::new(Semaphore::new(1)),
            engine,
            fingerprint,
            producer: None,
            consumer: Consumer::new(ConsumerConfig { epoch, fingerprint, timing }, pool).expect("blocks fit frames"),
            metrics,
            cut_off: CancellationToken::new(),
        };
        let rendered = Rendered { request: request.expect("valid"), prompts: vec![vec![1, 2]], seed: 0 };
        let transfer = Transfer { id: TransferId([5; 16]), attempt: 1, source: String::new(), token: String::new() };

        let transfers = [transfer];
        let leg = prefill(&serving, &producer, &rendered, &transfers);
        let busy = tokio::task::spawn_blocking(move || is_busy.recv());
        tokio::select! {
            done = leg => panic!("its step does not end: {done:?}"),
            busy = busy => busy.expect("no panic").expect("the step begins"),
        }
        assert_eq!(producer.stats().now.exports_open, 0, "though the step goes on");
        assert_eq!(producer.stats().ended(ExportReason::PrefillFailed), 1);
        drop(go);
    }
}
