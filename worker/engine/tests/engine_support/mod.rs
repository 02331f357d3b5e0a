//! What the engine's tests share: a committed model, a fake one that notices every misplaced byte of KV, random requests,
//! and drivers that run them in one engine or in a prefill and a decode engine with a transfer between.
#![allow(dead_code, unreachable_pub)] // Each test file is a crate of its own and uses its part.

use baton_engine::backend::reference::Reference;
use baton_engine::batch::Batch;
use baton_engine::config::Dtype;
use baton_engine::engine::{Counters, Engine, EngineConfig, Event, ExportProgress, HeldBlocks, StepHook};
use baton_engine::kv_pool::{BLOCK_TOKENS, BlockId, HeapPool, KvDtype, KvLayout, KvPool};
use baton_engine::loader::{self, LoadOptions};
use baton_engine::model_runner::ModelRunner;
use baton_engine::request::{FinishReason, Request, RequestId, RequestKind};
use baton_engine::runner::{LayerHook, RunError, Runner};
use baton_engine::sampling::{SampleRow, SampledToken, SamplingParams, sample};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Something to run engines on: each call of `rig` is another worker with the same weights.
pub trait Model {
    type Runner: Runner;
    fn rig(&self, num_blocks: usize) -> (Self::Runner, Arc<dyn KvPool>);
    fn vocab(&self) -> u32;
    fn max_length(&self) -> usize;
}

/// An engine of `model`.
pub fn engine<M: Model>(model: &M, config: EngineConfig) -> (Engine<M::Runner>, Arc<dyn KvPool>) {
    let (runner, pool) = model.rig(config.num_blocks);
    let engine = Engine::new(runner, pool.clone(), config, model.max_length()).expect("the limits fit");
    (engine, pool)
}

// === a real model ===

/// A committed fixture, loaded anew for each worker.
pub struct Fixture {
    pub directory: &'static str,
    pub vocab: u32,
    pub dtype: Dtype,
}

impl Model for Fixture {
    type Runner = ModelRunner<Reference>;

    fn rig(&self, num_blocks: usize) -> (ModelRunner<Reference>, Arc<dyn KvPool>) {
        let options = LoadOptions { dtype: Some(self.dtype), shard: None };
        let model = loader::load(Path::new(self.directory), options, &mut |_, _| {}).expect("the fixture loads");
        let pool = Arc::new(HeapPool::new(model.kv_layout(num_blocks)));
        (model.into_runner(pool.clone()).expect("the pool is made for the model"), pool)
    }

    fn vocab(&self) -> u32 {
        self.vocab
    }

    fn max_length(&self) -> usize {
        256
    }
}

// === a fake model ===

/// Two layers of "attention" by hashing: K and V of a token are a hash of the layer's input, a layer's output is a hash of all K and V
/// up to the token, read back through the block table, and logits are a hash of the last output. So one wrong slot, table, position
/// or stale block changes every later token, while each row's outcome depends on its own sequence alone, as in a real model.
pub struct FakeModel;

pub const FAKE_VOCAB: u32 = 61;

impl Model for FakeModel {
    type Runner = FakeRunner;

    fn rig(&self, num_blocks: usize) -> (FakeRunner, Arc<dyn KvPool>) {
        let layout = KvLayout { layers: 2, kv_heads: 1, head_dim: 2, dtype: KvDtype::F32, num_blocks };
        let pool = Arc::new(HeapPool::new(layout));
        (FakeRunner { pool: pool.clone(), fail: Failing::default() }, pool)
    }

    fn vocab(&self) -> u32 {
        FAKE_VOCAB
    }

    fn max_length(&self) -> usize {
        512
    }
}

pub struct FakeRunner {
    pool: Arc<HeapPool>,
    pub fail: Failing,
}

/// How many steps from now on fail, after having written their KV. Clones share the number.
#[derive(Clone, Default)]
pub struct Failing(Arc<AtomicUsize>);

impl Failing {
    pub fn set(&self, steps: usize) {
        self.0.store(steps, Ordering::Relaxed);
    }

    fn next(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |steps| steps.checked_sub(1)).is_ok()
    }
}

impl FakeRunner {
    fn write(&self, layer: usize, slot: u64, value: u64) {
        let (block, offset) = (BlockId((slot / BLOCK_TOKENS as u64) as u32), slot as usize % BLOCK_TOKENS);
        let mut bytes = self.read_block(layer, block);
        let keys = bytes.len() / 2;
        bytes[offset * 8..][..8].copy_from_slice(&value.to_le_bytes());
        bytes[keys + offset * 8..][..8].copy_from_slice(&mix(value, 1).to_le_bytes());
        self.pool.import(layer, block, self.pool.generation(block), &bytes).expect("nobody else writes");
    }

    fn read_block(&self, layer: usize, block: BlockId) -> Vec<u8> {
        let mut bytes = vec![0; self.pool.layout().block_bytes()];
        self.pool.export(layer, block, self.pool.generation(block), &mut bytes).expect("nobody else writes");
        bytes
    }

    /// For each of the sequence's new tokens: a hash of K and V of all tokens up to it.
    fn attend(&self, layer: usize, table: &[BlockId], new: std::ops::Range<usize>) -> Vec<u64> {
        let mut state = 0;
        let mut outputs = Vec::with_capacity(new.len());
        for (index, &block) in table.iter().enumerate() {
            let bytes = self.read_block(layer, block);
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
            for offset in 0..BLOCK_TOKENS {
                let position = index * BLOCK_TOKENS + offset;
                if position >= new.end {
                    break;
                }
                state = mix(mix(state, word(offset * 8)), word(bytes.len() / 2 + offset * 8));
                if position >= new.start {
                    outputs.push(state);
                }
            }
        }
        outputs
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let mut x = (a ^ b.rotate_left(23)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Runner for FakeRunner {
    fn run(
        &mut self,
        batch: &Batch,
        rows: &[SampleRow<'_>],
        hook: &mut dyn LayerHook,
    ) -> Result<Vec<SampledToken>, RunError> {
        assert_eq!(batch.cu_seqlens_q.len(), batch.num_sequences() + 1);
        assert_eq!(batch.logit_rows.len(), rows.len());
        let inputs = batch.tokens.iter().zip(&batch.positions);
        let mut hidden: Vec<u64> =
            inputs.map(|(&token, &position)| mix(u64::from(token), u64::from(position))).collect();
        for layer in 0..2 {
            for (&slot, &value) in batch.slot_mapping.iter().zip(&hidden) {
                self.write(layer, slot, value);
            }
            hook.layer_done(layer);
            hidden.clear();
            for (sequence, table) in batch.block_tables.iter().enumerate() {
                let end = batch.context_lens[sequence] as usize;
                let count = (batch.cu_seqlens_q[sequence + 1] - batch.cu_seqlens_q[sequence]) as usize;
                hidden.extend(self.attend(layer, table, end - count..end));
            }
        }
        if self.fail.next() {
            return Err(RunError("the fake was told to fail".to_owned()));
        }
        let sampled = batch.logit_rows.iter().zip(rows).map(|(&token, row)| {
            let state = hidden[token as usize];
            let logit = |id: u32| (mix(state, u64::from(id)) >> 40) as f32 / (1u64 << 24) as f32 * 8.0 - 4.0;
            let logits: Vec<f32> = (0..FAKE_VOCAB).map(logit).collect();
            sample(&logits, row, (row.prompt.len() + row.generated.len()) as u32)
        });
        Ok(sampled.collect())
    }
}

// === requests ===

/// A request, and when it comes.
#[derive(Clone, Debug)]
pub struct Arriving {
    /// Steps after the request before it.
    pub after_steps: usize,
    pub request: Request,
    pub route: Route,
}

/// Where a request's prompt is computed, if there is a prefill engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// In the prefill engine, its KV transferred.
    Remote,
    /// In the decode engine.
    Local,
    /// In the decode engine after all, garbage having been transferred.
    Fallback,
}

pub fn request(id: u64, prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        id: RequestId(id),
        prompt,
        sampling: SamplingParams { logits_hash: true, ..SamplingParams::default() },
        choices: 1,
        seed: id,
        max_tokens,
        stop_tokens: Vec::new(),
        salt: 0,
        kind: RequestKind::Generate,
        resumed: Vec::new(),
    }
}

/// A prompt without a pattern.
pub fn prompt(seed: u64, tokens: usize, vocab: u32) -> Vec<u32> {
    (0..tokens as u64).map(|index| (mix(seed, index) % u64::from(vocab)) as u32).collect()
}

/// A float out of a range given in hundredths. Proptest's own float ranges fail an assertion of theirs once in a million draws
/// (1.12, `float_samplers.rs`).
fn hundredths(range: std::ops::Range<i32>) -> impl Strategy<Value = f32> {
    range.prop_map(|hundredths| hundredths as f32 / 100.0)
}

fn sampling(vocab: u32) -> impl Strategy<Value = SamplingParams> {
    let truncation = (
        prop_oneof![Just(0.0f32), hundredths(20..150)],
        prop_oneof![Just(0u32), 1u32..20],
        prop_oneof![Just(1.0f32), hundredths(30..100)],
        prop_oneof![Just(0.0f32), hundredths(1..30)],
    );
    let penalties = (
        prop_oneof![Just(1.0f32), hundredths(80..150)],
        prop_oneof![Just(0.0f32), hundredths(-100..100)],
        prop_oneof![Just(0.0f32), hundredths(-100..100)],
        prop::collection::btree_map(0..vocab, hundredths(-500..500), 0..3),
    );
    (truncation, penalties, prop::option::of(0u32..4)).prop_map(
        |((temperature, top_k, top_p, min_p), (repetition, presence, frequency, bias), logprobs)| SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            logit_bias: bias.into_iter().collect(),
            logprobs,
            logits_hash: true,
        },
    )
}

/// Up to `count` requests of prompts up to `prompt_tokens` that often begin alike.
pub fn requests(
    vocab: u32,
    count: std::ops::Range<usize>,
    prompt_tokens: usize,
    max_tokens: usize,
) -> impl Strategy<Value = Vec<Arriving>> {
    let prompts = (0u64..3, 1..=prompt_tokens, 0u64..3);
    let route = prop_oneof![4 => Just(Route::Remote), 1 => Just(Route::Local), 1 => Just(Route::Fallback)];
    let rest = (1u32..4, any::<u64>(), 1..=max_tokens, prop::collection::vec(0..vocab, 0..3), 0u64..2);
    let one = (0usize..12, prompts, sampling(vocab), rest, route);
    prop::collection::vec(one, count).prop_map(move |all| {
        let numbered = all.into_iter().enumerate();
        numbered
            .map(|(index, (after_steps, (family, tokens, tail), sampling, rest, route))| {
                let (choices, seed, max_tokens, stop_tokens, salt) = rest;
                let mut prompt = prompt(family, tokens, vocab);
                *prompt.last_mut().expect("a prompt has a token") = (tail as u32) % vocab;
                let id = RequestId(index as u64);
                let kind = RequestKind::Generate;
                let resumed = Vec::new();
                let request =
                    Request { id, prompt, sampling, choices, seed, max_tokens, stop_tokens, salt, kind, resumed };
                Arriving { after_steps, request, route }
            })
            .collect()
    })
}

/// Blocks that the largest of `requests` needs alone.
pub fn blocks_of_largest(requests: &[Arriving]) -> usize {
    let tokens = requests.iter().map(|arriving| arriving.request.prompt.len() + arriving.request.max_tokens);
    tokens.max().unwrap_or(0).div_ceil(BLOCK_TOKENS) + 1
}

/// Limits under which one request runs undisturbed, its prompt in one piece.
pub fn alone() -> EngineConfig {
    EngineConfig {
        num_blocks: 64,
        max_batch_tokens: 1024,
        max_num_seqs: 8,
        prefill_chunk_tokens: 1024,
        prefix_cache: false,
        max_waiting: 64,
    }
}

// === outcomes ===

/// A token as it must be equal: id, bits of the logits, reported log-probabilities, and whether it was the last.
pub type Told = (SampledToken, Option<FinishReason>);

/// What each choice of each request was told.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome(pub BTreeMap<(RequestId, u32), Vec<Told>>);

impl Outcome {
    pub fn add(&mut self, event: Event) {
        match event {
            Event::Token { id, choice, token, finish, cached_tokens } => {
                let told = self.0.entry((id, choice)).or_default();
                assert!(told.last().is_none_or(|(_, finish)| finish.is_none()), "a token after the last");
                assert_eq!(cached_tokens.is_some(), told.is_empty(), "cached tokens are told with the first token");
                told.push((token, finish));
            }
            Event::Failed { id, error } => panic!("{id:?} failed: {error}"),
            Event::ImportReady { .. } | Event::Computed { .. } | Event::PrefillDone { .. } => {
                unreachable!("transfers are handled by the driver: {event:?}")
            }
        }
    }

    /// Whether every choice has been told its last token.
    pub fn is_complete(&self, requests: &[Arriving]) -> bool {
        requests.iter().all(|Arriving { request, .. }| {
            let goes_on = |choice: &u32| request.resumed.get(*choice as usize).is_none_or(Option::is_some);
            (0..request.choices).filter(goes_on).all(|choice| {
                let told = self.0.get(&(request.id, choice));
                told.and_then(|told| told.last()).is_some_and(|(_, finish)| finish.is_some())
            })
        })
    }
}

/// Steps after which a run of a few small requests has hung.
const STEPS_MAX: usize = 20_000;

/// Each request alone, one after the other.
pub fn run_alone<M: Model>(model: &M, requests: &[Arriving]) -> Outcome {
    let (mut engine, _pool) = engine(model, alone());
    let mut outcome = Outcome::default();
    for arriving in requests {
        outcome.0.extend(run_in(&mut engine, std::slice::from_ref(arriving)).0);
    }
    outcome
}

/// All requests in one engine.
pub fn run<M: Model>(model: &M, config: EngineConfig, requests: &[Arriving]) -> (Outcome, Counters) {
    let (mut engine, _pool) = engine(model, config);
    let outcome = run_in(&mut engine, requests);
    assert_eq!(engine.load().blocks_used, 0, "blocks are held by nobody");
    (outcome, engine.counters())
}

/// All requests in this engine.
pub fn run_in<R: Runner>(engine: &mut Engine<R>, requests: &[Arriving]) -> Outcome {
    let mut outcome = Outcome::default();
    let mut coming = Coming::new(requests);
    for _ in 0..STEPS_MAX {
        for arriving in coming.due() {
            engine.submit(arriving.request.clone()).expect("the request fits");
        }
        if engine.has_work() {
            engine.step(&mut ()).expect("the device works").into_iter().for_each(|event| outcome.add(event));
        } else if coming.is_done() {
            assert!(outcome.is_complete(requests), "idle before all is done");
            return outcome;
        }
    }
    panic!("not done after {STEPS_MAX} steps");
}

/// Requests in the order in which they come, by the clock of one call a step.
struct Coming<'a> {
    rest: &'a [Arriving],
    waited: usize,
}

impl<'a> Coming<'a> {
    fn new(requests: &'a [Arriving]) -> Self {
        Coming { rest: requests, waited: 0 }
    }

    fn due(&mut self) -> Vec<&'a Arriving> {
        let mut due = Vec::new();
        while let Some((first, rest)) = self.rest.split_first().filter(|(first, _)| first.after_steps <= self.waited) {
            due.push(first);
            self.rest = rest;
            self.waited = 0;
        }
        self.waited += 1;
        due
    }

    fn is_done(&self) -> bool {
        self.rest.is_empty()
    }
}

// === prefill and decode apart ===

/// One prompt's KV on its way, block by block and layer by layer.
struct Transfer {
    prompt_tokens: usize,
    fails: bool,
    /// Of each layer: source blocks that are complete.
    ready: Vec<HeldBlocks>,
    destination: Option<(HeldBlocks, usize)>,
    /// Of each layer: blocks that have been copied, or needn't be.
    sent: Vec<usize>,
    first: Option<(Vec<SampledToken>, usize)>,
}

impl Transfer {
    fn new(request: &Request, layers: usize, fails: bool) -> Self {
        let prompt_tokens = request.prompt.len();
        let ready = vec![HeldBlocks::new(); layers];
        Transfer { prompt_tokens, fails, ready, destination: None, sent: vec![0; layers], first: None }
    }

    fn progress(&mut self, layer: usize, blocks: &[(BlockId, u64)], tokens: usize) {
        let whole = if tokens == self.prompt_tokens { blocks.len() } else { tokens / BLOCK_TOKENS };
        if whole > self.ready[layer].len() {
            self.ready[layer] = blocks[..whole].to_vec();
        }
    }

    /// Copies what is ready and has somewhere to go.
    fn pump(&mut self, from: &dyn KvPool, to: &dyn KvPool) {
        let Some((destination, cached_blocks)) = &self.destination else { return };
        for (layer, (ready, sent)) in self.ready.iter().zip(&mut self.sent).enumerate() {
            while *sent < ready.len() {
                let index = *sent;
                let mut bytes = vec![0; from.layout().block_bytes()];
                let (source, generation) = ready[index];
                from.export(layer, source, generation, &mut bytes).expect("the prefill engine holds the block");
                if self.fails {
                    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
                }
                let (block, generation) = destination[index];
                if index >= *cached_blocks {
                    to.import(layer, block, generation, &bytes).expect("the decode engine holds the block");
                }
                *sent += 1;
            }
        }
    }

    fn is_complete(&self) -> bool {
        let blocks = self.prompt_tokens.div_ceil(BLOCK_TOKENS);
        self.first.is_some() && self.destination.is_some() && self.sent.iter().all(|&sent| sent == blocks)
    }
}

struct Exports<'a> {
    transfers: &'a mut BTreeMap<RequestId, Transfer>,
    from: &'a dyn KvPool,
    to: &'a dyn KvPool,
}

impl StepHook for Exports<'_> {
    fn layer_done(&mut self, layer: usize, exports: &[ExportProgress<'_>]) {
        for export in exports {
            let transfer = self.transfers.get_mut(&export.id).expect("only transfers are prefilled");
            transfer.progress(layer, export.blocks, export.tokens);
            transfer.pump(self.from, self.to); // While later layers are not computed yet.
        }
    }
}

/// All requests, their prompts in a prefill engine, where so routed, and the rest in a decode engine.
pub fn run_apart<M: Model>(
    model: &M,
    prefill_config: EngineConfig,
    decode_config: EngineConfig,
    requests: &[Arriving],
) -> (Outcome, Counters) {
    let (mut prefill, from) = engine(model, prefill_config);
    let (mut decode, to) = engine(model, decode_config);
    let layers = from.layout().layers;
    let mut outcome = Outcome::default();
    let mut transfers: BTreeMap<RequestId, Transfer> = BTreeMap::new();
    let mut coming = Coming::new(requests);
    for _ in 0..STEPS_MAX {
        for Arriving { request, route, .. } in coming.due() {
            let as_kind = |kind| Request { kind, ..request.clone() };
            if *route == Route::Local {
                decode.submit(request.clone()).expect("the request fits");
                continue;
            }
            transfers.insert(request.id, Transfer::new(request, layers, *route == Route::Fallback));
            prefill.submit(as_kind(RequestKind::Prefill)).expect("the request fits");
            decode.submit(as_kind(RequestKind::Import)).expect("the request fits");
        }

        if prefill.has_work() {
            let mut exports = Exports { transfers: &mut transfers, from: &*from, to: &*to };
            for event in prefill.step(&mut exports).expect("the device works") {
                match event {
                    Event::Computed { id, blocks, tokens } => {
                        let transfer = transfers.get_mut(&id).expect("only transfers are prefilled");
                        (0..layers).for_each(|layer| transfer.progress(layer, &blocks, tokens));
                    }
                    Event::PrefillDone { id, cached_tokens, first } => {
                        transfers.get_mut(&id).expect("only transfers are prefilled").first =
                            Some((first, cached_tokens));
                    }
                    Event::ImportReady { .. } | Event::Token { .. } | Event::Failed { .. } => {
                        panic!("unexpected {event:?}")
                    }
                }
            }
        }
        if decode.has_work() {
            for event in decode.step(&mut ()).expect("the device works") {
                match event {
                    Event::ImportReady { id, blocks, cached_blocks } => {
                        transfers.get_mut(&id).expect("only transfers are imported").destination =
                            Some((blocks, cached_blocks));
                    }
                    Event::Token { .. } => outcome.add(event),
                    Event::Computed { .. } | Event::PrefillDone { .. } | Event::Failed { .. } => {
                        panic!("unexpected {event:?}")
                    }
                }
            }
        }

        transfers.values_mut().for_each(|transfer| transfer.pump(&*from, &*to));
        let complete: Vec<_> =
            transfers.iter().filter(|(_, transfer)| transfer.is_complete()).map(|(&id, _)| id).collect();
        for id in complete {
            let transfer = transfers.remove(&id).expect("it was there a moment ago");
            let (first, cached_tokens) = transfer.first.expect("a complete transfer has first tokens");
            if transfer.fails {
                decode.fail_import(id).expect("it is importing");
            } else {
                let events = decode.commit_import(id, first, cached_tokens).expect("it is importing");
                events.into_iter().for_each(|event| outcome.add(event));
            }
            prefill.release(id);
        }
        if coming.is_done() && transfers.is_empty() && outcome.is_complete(requests) {
            assert_eq!(prefill.load().blocks_used, 0, "blocks of the prefill engine are held by nobody");
            assert_eq!(decode.load().blocks_used, 0, "blocks of the decode engine are held by nobody");
            return (outcome, decode.counters());
        }
    }
    panic!("not done after {STEPS_MAX} steps");
}
