//! Prefill, transfer and decode tell a client exactly what one engine alone would: token for token, log-probability for
//! log-probability, and by a hash of the logits.
//!
//! Two engines with threads, pools and prefix caches of their own; between them the real producer and consumer over TCP. The engine's
//! own tests do the same with blocks that are copied in memory. Nothing here falls back: a handover that fails, fails the test.

use crate::engine_support::{self, Arriving, Fixture, Model, Outcome, Route, alone, run_in};
use baton_engine::config::Dtype;
use baton_engine::engine::{Engine, EngineConfig, Event};
use baton_engine::kv_pool::{BLOCK_TOKENS, KvPool};
use baton_engine::request::{Request, RequestKind};
use baton_wire::leg::Transfer;
use baton_wire::signing::{self, TransferClaims};
use baton_wire::{Epoch, Fingerprint, PromptHash, Role, TransferId};
use baton_worker::engine_thread::{self, EVENTS_BESIDE_TOKENS, EngineHandle, Events, PromptEvent, Submitted};
use baton_worker::metrics::Metrics;
use baton_worker::transfer::commit::sampled_token;
use baton_worker::transfer::consumer::{Consumer, ConsumerConfig, Destination, Fetch};
use baton_worker::transfer::limits::{Limits, Timing};
use baton_worker::transfer::producer::{ExportReason, ExportSpec, Producer, ProducerConfig};
use ed25519_dalek::SigningKey;
use futures_util::future::join_all;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Random cases for each type; each has one to three requests, the first and most others handed over.
const CASES: u32 = 256;
const PROMPT_TOKENS_MAX: usize = 100;
const COMPLETION_TOKENS_MAX: usize = 8;

/// Longest wait for one case: only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(60);

const DECODE: Epoch = Epoch([2; 16]);
const FINGERPRINT: Fingerprint = Fingerprint([3; 32]);

fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

/// How the two engines of a pair are set up.
#[derive(Clone, Copy, Debug)]
struct Setup {
    prefill_blocks: usize,
    prefill_chunk_blocks: usize,
    prefill_cache: bool,
    decode_blocks: usize,
    decode_cache: bool,
}

/// Roomy and cached; without caches; a decode pool in which sequences wait and are preempted; a prefill pool in which prompts wait for
/// others to be fetched.
const SETUPS: [Setup; 4] = [
    Setup { prefill_blocks: 64, prefill_chunk_blocks: 1, prefill_cache: true, decode_blocks: 64, decode_cache: true },
    Setup { prefill_blocks: 64, prefill_chunk_blocks: 3, prefill_cache: false, decode_blocks: 64, decode_cache: false },
    Setup { prefill_blocks: 64, prefill_chunk_blocks: 2, prefill_cache: true, decode_blocks: 5, decode_cache: true },
    Setup { prefill_blocks: 5, prefill_chunk_blocks: 1, prefill_cache: true, decode_blocks: 16, decode_cache: false },
];

fn engine_config(num_blocks: usize, chunk_blocks: usize, prefix_cache: bool) -> EngineConfig {
    EngineConfig {
        num_blocks,
        max_batch_tokens: 6 + chunk_blocks * BLOCK_TOKENS,
        max_num_seqs: 6,
        prefill_chunk_tokens: chunk_blocks * BLOCK_TOKENS,
        prefix_cache,
        max_waiting: 64,
    }
}

/// Two workers without HTTP.
struct Pair {
    prefill: EngineHandle,
    decode: EngineHandle,
    decode_metrics: Arc<Metrics>,
    producer: Producer,
    consumer: Consumer,
    address: SocketAddr,
    seen: Seen,
    _serving: DropGuard,
}

/// What the cases have met, so that none of it is met never.
#[derive(Default)]
struct Seen {
    handovers: AtomicUsize,
    cached_there: AtomicUsize,
    cached_here: AtomicUsize,
    chunks: AtomicUsize,
}

fn started<M: Model<Runner: 'static>>(
    model: &M,
    config: EngineConfig,
    role: Role,
) -> (EngineHandle, Arc<dyn KvPool>, Arc<Metrics>) {
    let (runner, pool) = model.rig(config.num_blocks);
    let engine = Engine::new(runner, pool.clone(), config, model.max_length()).expect("the limits fit");
    let metrics = Arc::new(Metrics::new(role, "r1", "fixture"));
    let (handle, _end) = engine_thread::start(engine, pool.layout().layers, metrics.clone()).expect("a thread");
    (handle, pool, metrics)
}

impl Pair {
    async fn start<M: Model<Runner: 'static>>(model: &M, setup: Setup) -> Pair {
        let Setup { prefill_blocks, prefill_chunk_blocks, prefill_cache, decode_blocks, decode_cache } = setup;
        let config = engine_config(prefill_blocks, prefill_chunk_blocks, prefill_cache);
        let (prefill, source, _) = started(model, config, Role::Prefill);
        let (decode, sink, decode_metrics) =
            started(model, engine_config(decode_blocks, 1, decode_cache), Role::Decode);
        let config = ProducerConfig {
            epoch: Epoch([1; 16]),
            fingerprint: FINGERPRINT,
            verifying_key: key().verifying_key(),
            timing: Timing::default(),
            limits: Limits::default(),
        };
        let producer = Producer::new(config, source).expect("blocks fit frames");
        let config = ConsumerConfig { epoch: DECODE, fingerprint: FINGERPRINT, timing: Timing::default() };
        let consumer = Consumer::new(config, sink).expect("blocks fit frames");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a loopback port is free");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shutdown = CancellationToken::new();
        let (serving, token) = (producer.clone(), shutdown.clone());
        tokio::spawn(async move { serving.serve(listener, token).await });
        let _serving = shutdown.drop_guard();
        Pair { prefill, decode, decode_metrics, producer, consumer, address, seen: Seen::default(), _serving }
    }

    /// All requests in company, but for those that come late: they find what was before them done, and cached.
    async fn run(&self, requests: &[Arriving]) -> Outcome {
        let mut outcome = Outcome::default();
        let late = |arriving: &Arriving| arriving.after_steps >= 8;
        for company in requests.chunk_by(|_, next| !late(next)) {
            for told in join_all(company.iter().map(|arriving| self.one(arriving))).await {
                told.into_iter().for_each(|event| outcome.add(event));
            }
        }
        assert!(outcome.is_complete(requests), "a choice has no end");
        while self.prefill.load().blocks_used + self.decode.load().blocks_used + self.producer.stats().now.exports_open
            > 0
        {
            tokio::task::yield_now().await;
        }
        outcome
    }

    async fn one(&self, Arriving { request, route, .. }: &Arriving) -> Vec<Event> {
        match route {
            Route::Local => {
                let (sender, mut events) = channel(request);
                let kind = RequestKind::Generate;
                let _submitted = submit(&self.decode, Request { kind, ..request.clone() }, sender).await;
                tokens(request, &mut events).await
            }
            Route::Remote | Route::Fallback => tokio::join!(self.prefill_leg(request), self.decode_leg(request)).1,
        }
    }

    /// As `baton_worker::prefill` does it.
    async fn prefill_leg(&self, request: &Request) {
        let spec = ExportSpec {
            transfer: transfer_id(request),
            attempt: 1,
            prompt_tokens: request.prompt.len(),
            prompt_hash: PromptHash::of(&request.prompt),
        };
        let export = Arc::new(self.producer.open(spec).expect("it is new"));
        let finished = export.finished();
        let (sender, mut events) = channel(request);
        let as_prefill = Request { kind: RequestKind::Prefill, ..request.clone() };
        let events_to = Events { sender, prompt: 0 };
        let _submitted = self.prefill.submit(as_prefill, events_to, Some(export)).await.expect("it fits");
        match events.recv().await {
            Some((_, Event::PrefillDone { cached_tokens, .. })) => {
                count(&self.seen.cached_there, cached_tokens > 0);
                count(&self.seen.chunks, request.prompt.len() - cached_tokens > 3 * BLOCK_TOKENS);
            }
            other => panic!("no prefill: {other:?}"),
        }
        assert_eq!(finished.await.reason, ExportReason::Acked);
    }

    /// As `baton_worker::generate` does it.
    async fn decode_leg(&self, request: &Request) -> Vec<Event> {
        let id = transfer_id(request);
        let claims = TransferClaims {
            transfer: id,
            attempt: 1,
            consumer: DECODE,
            fingerprint: FINGERPRINT,
            byte_budget: u64::MAX,
            expires_unix_ms: u64::MAX,
        };
        let token = signing::sign(&key(), &claims);
        let fetch = Fetch {
            transfer: Transfer { id, attempt: 1, source: self.address.to_string(), token },
            prompt_tokens: request.prompt.len(),
            prompt_hash: PromptHash::of(&request.prompt),
        };
        let (sender, mut events) = channel(request);
        let (entered, entry) = oneshot::channel();
        let destination = async {
            let as_import = Request { kind: RequestKind::Import, ..request.clone() };
            let submitted = submit(&self.decode, as_import, sender).await;
            let Some((_, Event::ImportReady { blocks, cached_blocks, .. })) = events.recv().await else {
                panic!("no blocks");
            };
            count(&self.seen.cached_here, cached_blocks > 0);
            entered.send(submitted).expect("it is waited for");
            Destination { blocks, cached_blocks }
        };
        let fetched = self.consumer.fetch(fetch, destination).await.expect("nothing goes wrong");
        let submitted = entry.await.expect("it has entered");
        let first = fetched.commit.choices.iter().map(sampled_token).collect();
        let committed = submitted.commit_import(first, fetched.commit.cached_tokens).await;
        assert_eq!(committed, Ok(true), "the commit fits the request");
        count(&self.seen.handovers, true);
        tokens(request, &mut events).await
    }
}

fn count(counter: &AtomicUsize, is_one: bool) {
    counter.fetch_add(usize::from(is_one), Ordering::Relaxed);
}

fn channel(request: &Request) -> (mpsc::Sender<PromptEvent>, mpsc::Receiver<PromptEvent>) {
    mpsc::channel(request.max_tokens * request.choices as usize + EVENTS_BESIDE_TOKENS)
}

async fn submit(engine: &EngineHandle, request: Request, sender: mpsc::Sender<PromptEvent>) -> Submitted {
    engine.submit(request, Events { sender, prompt: 0 }, None).await.expect("it fits")
}

/// All that the request is told, until its last choice ends.
async fn tokens(request: &Request, events: &mut mpsc::Receiver<PromptEvent>) -> Vec<Event> {
    let mut told = Vec::new();
    let mut num_open = request.choices;
    while num_open > 0 {
        let (_, event) = events.recv().await.expect("the engine lives");
        let Event::Token { choice, token, finish, cached_tokens, .. } = event else { panic!("not a token: {event:?}") };
        num_open -= u32::from(finish.is_some());
        told.push(Event::Token { id: request.id, choice, token, finish, cached_tokens });
    }
    told
}

/// Each request of a test has a seed of its own, which `unique` has made.
fn transfer_id(request: &Request) -> TransferId {
    let mut id = TransferId([0; 16]);
    id.0[..8].copy_from_slice(&request.seed.to_le_bytes());
    id.0[8..].copy_from_slice(&request.id.0.to_le_bytes());
    id
}

fn handed_over_equals_alone(model: &Fixture) {
    let runtime = Runtime::new().expect("threads and sockets are available");
    let pairs = SETUPS.map(|setup| runtime.block_on(Pair::start(model, setup)));
    let (mut alone, _pool) = engine_support::engine(model, alone());
    let alone = std::cell::RefCell::new(&mut alone);
    let case_number = AtomicUsize::new(0);

    let requests = engine_support::requests(model.vocab, 1..4, PROMPT_TOKENS_MAX, COMPLETION_TOKENS_MAX);
    let cases = (requests, 0..SETUPS.len(), any::<bool>());
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&cases, |(mut requests, setup, cold)| {
        let number = case_number.fetch_add(1, Ordering::Relaxed) as u64;
        requests[0].route = Route::Remote;
        for Arriving { request, .. } in &mut requests {
            // Seeds make transfers distinct; a salt of its own makes sure that nothing of a cold case is cached.
            request.seed = request.seed << 16 | number & 0xffff;
            request.salt += if cold { 2 + number } else { 0 };
        }
        let expected = run_in(*alone.borrow_mut(), &requests);
        let told = runtime.block_on(async { tokio::time::timeout(DEADLINE, pairs[setup].run(&requests)).await });
        prop_assert_eq!(told.expect("no case hangs"), expected, "{:?}", SETUPS[setup]);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }

    let sum =
        |of: fn(&Seen) -> &AtomicUsize| pairs.iter().map(|pair| of(&pair.seen).load(Ordering::Relaxed)).sum::<usize>();
    assert!(sum(|seen| &seen.handovers) >= CASES as usize, "each case has a handover");
    assert!(sum(|seen| &seen.cached_there) > 0, "no prefill met its prefix cache");
    assert!(sum(|seen| &seen.cached_here) > 0, "no import met its prefix cache");
    assert!(sum(|seen| &seen.chunks) > 0, "no prompt was computed in several chunks");
    let text = pairs[2].decode_metrics.text();
    assert!(
        !text.contains("baton_worker_preemptions_total{role=\"decode\"} 0"),
        "nothing was preempted after its handover"
    );
}

#[test]
fn in_f32_a_handed_over_request_is_told_what_it_is_told_alone() {
    handed_over_equals_alone(&Fixture {
        directory: concat!(env!("CARGO_MANIFEST_DIR"), "/engine/tests/fixtures/llama3"),
        vocab: 203,
        dtype: Dtype::F32,
    });
}

#[test]
fn in_bf16_a_handed_over_request_is_told_what_it_is_told_alone() {
    handed_over_equals_alone(&Fixture {
        directory: concat!(env!("CARGO_MANIFEST_DIR"), "/engine/tests/fixtures/qwen3"),
        vocab: 157,
        dtype: Dtype::Bf16,
    });
}

#[test]
fn two_workers_without_room_for_both_requests_never_wait_for_each_other() {
    // Each pool holds one request. The prefill worker begins with `a`, the decode worker hears of `b` first: were it to take its
    // blocks for `b` now, `b` could not be computed before `a` is fetched, nor `a` be fetched before `b` is done.
    let model = Fixture {
        directory: concat!(env!("CARGO_MANIFEST_DIR"), "/engine/tests/fixtures/llama3"),
        vocab: 203,
        dtype: Dtype::F32,
    };
    let [a, b] = [1, 2].map(|id| engine_support::request(id, engine_support::prompt(id, 100, model.vocab), 8));
    Runtime::new().expect("threads and sockets are available").block_on(async {
        let setup = Setup { prefill_blocks: 5, decode_blocks: 5, ..SETUPS[0] };
        let pair = Pair::start(&model, setup).await;
        let late = async {
            while pair.consumer.stats().fetches_active == 0 {
                tokio::task::yield_now().await;
            }
            pair.decode_leg(&a).await
        };
        let both = async { tokio::join!(pair.prefill_leg(&a), pair.prefill_leg(&b), pair.decode_leg(&b), late) };
        // Sooner than any lease could end it.
        let (.., of_b, of_a) = tokio::time::timeout(Timing::default().lease / 2, both).await.expect("nobody waits");
        assert_eq!((of_a.len(), of_b.len()), (8, 8));
    });
}
