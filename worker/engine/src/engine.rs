//! The loop: decide, run, book. Turns requests into events by way of one scheduler and one runner.
//!
//! Single-threaded and synchronous: the worker owns an engine on a thread of its own, passes it commands between steps and gets
//! events out of each. What is computed is the scheduler's decision, how is the runner's; here is only what a request has been told.

mod config;
mod event;

pub use config::{ConfigError, EngineConfig};
pub use event::{Counters, Event, ExportProgress, HeldBlocks, Load, StepHook};

use crate::batch::Batch;
use crate::block_manager::CacheChange;
use crate::kv_pool::{BLOCK_TOKENS, BlockId, KvPool};
use crate::prefix_hash::BlockHash;
use crate::request::{Request, RequestId, RequestKind, SubmitError};
use crate::runner::{LayerHook, RunError, Runner};
use crate::sampling::{SampleRow, SampledToken};
use crate::scheduler::{Chunk, Plan, Scheduler};
use crate::sequence::SequenceId;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Failed forward passes in a row after which the device is taken for lost. One may be the batch's own fault (memory), and its
/// requests are gone with it; three different batches in a row are not.
pub const FAILED_STEPS_MAX: u32 = 3;

/// One model's engine.
pub struct Engine<R: Runner> {
    runner: R,
    pool: Arc<dyn KvPool>,
    config: EngineConfig,
    max_model_length: usize,
    scheduler: Scheduler,
    /// Open requests in the order in which they came.
    requests: BTreeMap<u64, Open>,
    arrivals: HashMap<RequestId, u64>,
    next_arrival: u64,
    /// The last plan had nothing to do; only a command can change that.
    stuck: bool,
    failures_in_a_row: u32,
    counters: Counters,
}

/// A request between submission and its last event.
struct Open {
    /// As it was submitted; its `max_tokens` are cut to what the context holds.
    request: Request,
    /// Choices that neither finished nor were stopped.
    going: Vec<bool>,
}

/// An import's end that doesn't match what is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// There is no such import that waits for its KV (any more): it was aborted, ended, or never announced.
    #[error("request {} is not an import that waits for its KV", .0.0)]
    NotImporting(RequestId),
    /// Each choice needs its first token.
    #[error("{found} first tokens came for {expected} choices")]
    WrongChoiceCount {
        /// The request's choices.
        expected: usize,
        /// First tokens.
        found: usize,
    },
}

/// The engine can't go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// Forward passes fail again and again; every request of theirs was told. The process had better be restarted.
    #[error("{failures} forward passes in a row failed")]
    DeviceLost {
        /// How many.
        failures: u32,
    },
}

impl<R: Runner> Engine<R> {
    /// An engine over `runner`, whose K and V live in `pool`, for contexts of up to `max_model_length` tokens.
    ///
    /// # Errors
    /// When the limits contradict each other or the pool.
    pub fn new(
        runner: R,
        pool: Arc<dyn KvPool>,
        config: EngineConfig,
        max_model_length: usize,
    ) -> Result<Self, ConfigError> {
        config.check(pool.layout().num_blocks)?;
        Ok(Engine {
            runner,
            pool,
            config,
            max_model_length,
            scheduler: Scheduler::new(config),
            requests: BTreeMap::new(),
            arrivals: HashMap::new(),
            next_arrival: 0,
            stuck: false,
            failures_in_a_row: 0,
            counters: Counters::default(),
        })
    }

    /// Tokens of prompt plus completion that fit: the model's length, or the pool's where that is less.
    pub fn max_context(&self) -> usize {
        self.max_model_length.min(self.config.num_blocks * BLOCK_TOKENS)
    }

    /// Takes a request; it is admitted in a later step.
    ///
    /// # Errors
    /// When it can never be served, or too many wait. Nothing of it is kept then.
    pub fn submit(&mut self, mut request: Request) -> Result<(), SubmitError> {
        let begun = request.resumed.iter().flatten().map(Vec::len).max().unwrap_or(0);
        let tokens = request.prompt.len() + begun;
        let blocks = (tokens + 1).div_ceil(BLOCK_TOKENS);
        let (choices, seats) = (request.choices, self.config.max_num_seqs);
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if tokens >= self.max_model_length {
            return Err(SubmitError::PromptTooLong { tokens, max_model_length: self.max_model_length });
        }
        if blocks > self.config.num_blocks {
            return Err(SubmitError::PromptNeverFits { blocks, blocks_total: self.config.num_blocks });
        }
        if choices == 0 || choices as usize > seats {
            return Err(SubmitError::ChoicesOutOfRange { choices, max: seats });
        }
        if request.max_tokens == 0 {
            return Err(SubmitError::NoTokensWanted);
        }
        if self.arrivals.contains_key(&request.id) {
            return Err(SubmitError::DuplicateId(request.id));
        }
        let waiting = self.scheduler.num_waiting();
        if waiting >= self.config.max_waiting {
            return Err(SubmitError::QueueFull { waiting });
        }

        request.max_tokens = request.max_tokens.min(self.max_context() - request.prompt.len());
        if !request.resumed.is_empty() && !request.resumed_fits(begun) {
            return Err(SubmitError::ResumedMisfit);
        }

        let arrival = self.next_arrival;
        self.next_arrival += 1;
        self.stuck = false;
        let prompt: Arc<[u32]> = request.prompt.as_slice().into();
        let going = if request.resumed.is_empty() {
            self.scheduler.add(arrival, prompt, request.salt, request.kind, choices);
            vec![true; choices as usize]
        } else {
            for (choice, generated) in (0..).zip(&request.resumed) {
                if let Some(generated) = generated {
                    let id = SequenceId { arrival, choice };
                    self.scheduler.resume(id, prompt.clone(), generated.clone(), request.salt);
                }
            }
            request.resumed.iter().map(Option::is_some).collect()
        };
        self.arrivals.insert(request.id, arrival);
        self.requests.insert(arrival, Open { request, going });
        Ok(())
    }

    /// Ends a request in any state; its blocks are free at once and no event follows. An unknown id is no error: the request may just
    /// have ended. Whoever writes or reads an import's or prefill's blocks from outside finds them stale from their next owner on.
    pub fn abort(&mut self, id: RequestId) {
        if let Some(&arrival) = self.arrivals.get(&id) {
            self.close(arrival);
        }
    }

    /// Ends a prefill's hold on its blocks, or the prefill itself where it is not complete.
    pub fn release(&mut self, id: RequestId) {
        self.abort(id);
    }

    /// Ends one choice, the others go on; no event of it follows.
    pub fn stop_choice(&mut self, id: RequestId, choice: u32) {
        let Some(&arrival) = self.arrivals.get(&id) else { return };
        let open = self.requests.get_mut(&arrival).expect("every arrival is a request");
        if open.going.get(choice as usize) == Some(&true) {
            self.stuck = false;
            // Before the prompt is computed one sequence stands for all choices; it leaves this one out when it splits. Resumed choices
            // have split elsewhere.
            let trunk = SequenceId { arrival, choice: 0 };
            let is_resumed = !open.request.resumed.is_empty();
            if is_resumed || self.scheduler.sequence(trunk).is_none_or(|trunk| !trunk.generated().is_empty()) {
                self.scheduler.remove(SequenceId { arrival, choice });
            }
            self.end_choice(arrival, choice);
        }
    }

    /// Starts generation of an import whose KV is complete in its blocks, verified and final: the caller has made sure that it was
    /// computed from this very prompt. `first` has each choice's first token as the prefill worker sampled it, `cached_tokens` what
    /// its prefix cache had. Returns the first tokens' events, so that they leave before the next forward pass.
    ///
    /// # Errors
    /// When nothing waits for this commit, or it doesn't fit the request, which then goes on waiting.
    pub fn commit_import(
        &mut self,
        id: RequestId,
        first: Vec<SampledToken>,
        cached_tokens: usize,
    ) -> Result<Vec<Event>, ImportError> {
        let arrival = self.importing(id)?;
        let expected = self.requests[&arrival].going.len();
        if first.len() != expected {
            return Err(ImportError::WrongChoiceCount { expected, found: first.len() });
        }
        self.stuck = false;
        self.scheduler.import_committed(arrival);
        let mut events = Vec::with_capacity(first.len());
        self.first_tokens(arrival, first, cached_tokens, &mut events);
        Ok(events)
    }

    /// Gives up on an import's KV: the request goes on as one whose prompt is computed here, at its place in the order.
    ///
    /// # Errors
    /// When it is no import (any more).
    pub fn fail_import(&mut self, id: RequestId) -> Result<(), ImportError> {
        let &arrival = self.arrivals.get(&id).ok_or(ImportError::NotImporting(id))?;
        let trunk = self.scheduler.sequence(SequenceId { arrival, choice: 0 });
        if trunk.is_none_or(|trunk| trunk.kind != RequestKind::Import) {
            return Err(ImportError::NotImporting(id));
        }
        self.stuck = false;
        self.scheduler.import_failed(arrival);
        Ok(())
    }

    /// Runs one step: at most one forward pass. Returns early, without one, where blocks were reserved that somebody waits for.
    ///
    /// # Errors
    /// When the device is taken for lost. A single failed pass is no error: the requests in it end with [`Event::Failed`].
    pub fn step(&mut self, hook: &mut dyn StepHook) -> Result<Vec<Event>, EngineError> {
        let plan = self.schedule()?;
        let outcome = self.run(&plan, hook);
        Ok(self.postprocess(&plan, outcome))
    }

    /// Whether [`Engine::step`] has anything to do. False also where all depends on a commit, a release or a new request.
    pub fn has_work(&self) -> bool {
        self.is_lost() || (!self.stuck && self.scheduler.has_work())
    }

    /// Whether a request has left the queue: a step has given it blocks, or it is over.
    pub fn is_admitted(&self, id: RequestId) -> bool {
        let Some(&arrival) = self.arrivals.get(&id) else { return true };
        // After the split the first choice may have ended before the others.
        let trunk = self.scheduler.sequence(SequenceId { arrival, choice: 0 });
        trunk.is_none_or(|trunk| trunk.num_cached.is_some())
    }

    /// Tokens of the longest beginning of a prompt with these block hashes that the prefix cache holds now. Holds nothing and changes
    /// nothing: by the time of a request it may be more or less.
    pub fn cached_tokens(&self, hashes: &[BlockHash]) -> usize {
        self.scheduler.blocks().cached_prefix(hashes).len() * BLOCK_TOKENS
    }

    /// From now on [`Engine::take_cache_changes`] has what changes in the prefix cache; whoever asks for this takes it after each step.
    pub fn record_cache_changes(&mut self) {
        self.scheduler.record_cache_changes();
    }

    /// What has changed in the prefix cache since this was last called, in order.
    pub fn take_cache_changes(&mut self) -> Vec<CacheChange> {
        self.scheduler.take_cache_changes()
    }

    /// The names of all blocks that the prefix cache holds now, in no order.
    pub fn cached_hashes(&self) -> Vec<BlockHash> {
        self.scheduler.blocks().cached_hashes().collect()
    }

    /// What there is to do now.
    pub fn load(&self) -> Load {
        let blocks = self.scheduler.blocks();
        Load {
            running: self.scheduler.num_running(),
            waiting: self.scheduler.num_waiting() + self.scheduler.num_importing(),
            queued_prompt_tokens: self.scheduler.num_queued_prompt_tokens(),
            blocks_used: blocks.num_blocks() - blocks.num_free(),
            blocks_total: blocks.num_blocks(),
        }
    }

    /// Totals so far.
    pub fn counters(&self) -> Counters {
        let totals = self.scheduler.totals();
        Counters {
            preemptions: totals.preemptions,
            prefix_query_tokens: totals.prefix_query_tokens,
            prefix_hit_tokens: totals.prefix_hit_tokens,
            ..self.counters
        }
    }

    // === the three calls of a step ===

    fn schedule(&mut self) -> Result<Plan, EngineError> {
        if self.is_lost() {
            return Err(EngineError::DeviceLost { failures: self.failures_in_a_row });
        }
        let plan = self.scheduler.schedule();
        self.stuck = plan.is_stuck();
        Ok(plan)
    }

    fn run(&mut self, plan: &Plan, hook: &mut dyn StepHook) -> Result<Vec<SampledToken>, RunError> {
        for &block in &plan.fresh {
            self.pool.begin_generation(block);
        }
        for copy in &plan.copies {
            self.pool.copy_block(copy.from, copy.to);
        }
        if plan.chunks.is_empty() {
            return Ok(Vec::new());
        }

        let batch = self.batch(&plan.chunks);
        let mut rows = Vec::with_capacity(batch.logit_rows.len());
        let mut prefills = Vec::new();
        for chunk in &plan.chunks {
            let sequence = self.scheduler.sequence(chunk.sequence).expect("a planned sequence is known");
            let request = &self.requests[&chunk.sequence.arrival].request;
            rows.extend((0..chunk.samples).map(|choice| SampleRow {
                params: &request.sampling,
                prompt: sequence.prompt(),
                generated: sequence.generated(),
                seed: request.seed,
                choice: chunk.sequence.choice + choice,
            }));
            if sequence.kind == RequestKind::Prefill {
                let tokens = chunk.start + chunk.len;
                prefills.push((request.id, self.held_blocks(&sequence.block_table, tokens), tokens));
            }
        }
        let exports = prefills.iter().map(|(id, blocks, tokens)| ExportProgress { id: *id, blocks, tokens: *tokens });
        let sampled = self.runner.run(&batch, &rows, &mut LayerExports { hook, exports: exports.collect() })?;
        if sampled.len() == rows.len() {
            Ok(sampled)
        } else {
            Err(RunError(format!("{} tokens came for {} rows", sampled.len(), rows.len())))
        }
    }

    fn postprocess(&mut self, plan: &Plan, outcome: Result<Vec<SampledToken>, RunError>) -> Vec<Event> {
        let mut events: Vec<Event> = plan.announced.iter().map(|&id| self.announcement(id)).collect();
        if plan.chunks.is_empty() {
            return events;
        }
        self.counters.steps += 1;
        match outcome {
            Ok(sampled) => {
                self.failures_in_a_row = 0;
                let mut sampled = sampled.into_iter();
                for chunk in &plan.chunks {
                    let tokens: Vec<_> = sampled.by_ref().take(chunk.samples as usize).collect();
                    self.book(chunk, tokens, &mut events);
                }
            }
            Err(error) => {
                self.failures_in_a_row += 1;
                self.counters.failed_steps += 1;
                for arrival in plan.chunks.iter().map(|chunk| chunk.sequence.arrival) {
                    // Several choices of one request may be in the batch; it fails once.
                    if let Some(open) = self.requests.get(&arrival) {
                        events.push(Event::Failed { id: open.request.id, error: error.clone() });
                        self.close(arrival);
                    }
                }
            }
        }
        events
    }

    // === what they are made of ===

    fn batch(&self, chunks: &[Chunk]) -> Batch {
        let mut batch = Batch { cu_seqlens_q: vec![0], ..Batch::default() };
        for chunk in chunks {
            let sequence = self.scheduler.sequence(chunk.sequence).expect("a planned sequence is known");
            let end = chunk.start + chunk.len;
            for index in chunk.start..end {
                let block = sequence.block_table[index / BLOCK_TOKENS];
                batch.tokens.push(sequence.token(index));
                batch.positions.push(index as u32);
                batch.slot_mapping.push(u64::from(block.0) * BLOCK_TOKENS as u64 + (index % BLOCK_TOKENS) as u64);
            }
            batch.cu_seqlens_q.push(batch.tokens.len() as u32);
            batch.context_lens.push(end as u32);
            batch.block_tables.push(sequence.block_table[..end.div_ceil(BLOCK_TOKENS)].to_vec());
            let last = batch.tokens.len() as u32 - 1;
            batch.logit_rows.extend((0..chunk.samples).map(|_| last));
        }
        batch
    }

    /// Books one chunk: its KV is in the pool, and `sampled` are the tokens that followed, if any.
    fn book(&mut self, chunk: &Chunk, sampled: Vec<SampledToken>, events: &mut Vec<Event>) {
        let SequenceId { arrival, choice } = chunk.sequence;
        self.scheduler.computed(chunk);
        let sequence = self.scheduler.sequence(chunk.sequence).expect("a planned sequence is known");
        let is_first = sequence.generated().is_empty();
        let cached_tokens = sequence.num_cached.expect("a running sequence was admitted");
        if is_first || chunk.len > 1 {
            self.counters.computed_prompt_tokens += chunk.len as u64;
        }
        self.counters.generated_tokens += sampled.len() as u64;

        let request = &self.requests[&arrival].request;
        let (id, is_resumed) = (request.id, !request.resumed.is_empty());
        match sequence.kind {
            RequestKind::Prefill => {
                let tokens = sequence.num_computed;
                let blocks = self.held_blocks(&sequence.block_table, tokens);
                events.push(Event::Computed { id, blocks, tokens });
                if !sampled.is_empty() {
                    self.scheduler.hold(arrival);
                    events.push(Event::PrefillDone { id, cached_tokens, first: sampled });
                }
            }
            RequestKind::Generate | RequestKind::Import if sampled.is_empty() => {}
            RequestKind::Generate | RequestKind::Import if is_first && !is_resumed => {
                self.first_tokens(arrival, sampled, cached_tokens, events);
            }
            RequestKind::Generate | RequestKind::Import => {
                let generated = sequence.generated().len() + 1;
                let begun = request.resumed.get(choice as usize).and_then(Option::as_ref).map(Vec::len);
                // The prompt's part of what a resumed choice found, with the first token that it gets here.
                let cached_tokens = (begun == Some(generated - 1)).then(|| cached_tokens.min(request.prompt.len()));
                for token in sampled {
                    let finish = self.requests[&arrival].request.finish_after(token.id, generated);
                    self.scheduler.push(chunk.sequence, token.id);
                    events.push(Event::Token { id, choice, token, finish, cached_tokens });
                    if finish.is_some() {
                        self.scheduler.remove(chunk.sequence);
                        self.end_choice(arrival, choice);
                    }
                }
            }
        }
    }

    /// Reports each choice's first token and splits the request into the choices that go on.
    fn first_tokens(&mut self, arrival: u64, first: Vec<SampledToken>, cached_tokens: usize, events: &mut Vec<Event>) {
        let open = &self.requests[&arrival];
        let mut going_on = Vec::with_capacity(first.len());
        let mut finished = Vec::new();
        for (choice, token) in (0..).zip(first) {
            if !open.going[choice as usize] {
                continue; // Stopped before it began.
            }
            let finish = open.request.finish_after(token.id, 1);
            match finish {
                None => going_on.push((choice, token.id)),
                Some(_) => finished.push(choice),
            }
            let id = open.request.id;
            events.push(Event::Token { id, choice, token, finish, cached_tokens: Some(cached_tokens) });
        }
        self.scheduler.split(arrival, &going_on);
        finished.into_iter().for_each(|choice| self.end_choice(arrival, choice));
    }

    fn announcement(&self, id: SequenceId) -> Event {
        let sequence = self.scheduler.sequence(id).expect("an admitted sequence is known");
        let request = self.requests[&id.arrival].request.id;
        match sequence.kind {
            RequestKind::Import => Event::ImportReady {
                id: request,
                blocks: self.held_blocks(&sequence.block_table, sequence.num_tokens()),
                cached_blocks: sequence.num_computed / BLOCK_TOKENS,
            },
            RequestKind::Prefill | RequestKind::Generate => Event::Computed {
                id: request,
                blocks: self.held_blocks(&sequence.block_table, sequence.num_computed),
                tokens: sequence.num_computed,
            },
        }
    }

    fn held_blocks(&self, block_table: &[BlockId], tokens: usize) -> HeldBlocks {
        let blocks = &block_table[..tokens.div_ceil(BLOCK_TOKENS)];
        blocks.iter().map(|&block| (block, self.pool.generation(block))).collect()
    }

    fn importing(&self, id: RequestId) -> Result<u64, ImportError> {
        let arrival = self.arrivals.get(&id).copied();
        arrival.filter(|&arrival| self.scheduler.is_importing(arrival)).ok_or(ImportError::NotImporting(id))
    }

    /// Books that a choice is over, and the request with its last one.
    fn end_choice(&mut self, arrival: u64, choice: u32) {
        let open = self.requests.get_mut(&arrival).expect("a request is open until its last choice ends");
        open.going[choice as usize] = false;
        if !open.going.contains(&true) {
            self.close(arrival);
        }
    }

    fn close(&mut self, arrival: u64) {
        self.stuck = false;
        self.scheduler.remove_request(arrival);
        if let Some(open) = self.requests.remove(&arrival) {
            self.arrivals.remove(&open.request.id);
        }
    }

    fn is_lost(&self) -> bool {
        self.failures_in_a_row >= FAILED_STEPS_MAX
    }
}

/// Tells the step's hook of a layer with the requests whose KV can leave.
struct LayerExports<'a> {
    hook: &'a mut dyn StepHook,
    exports: Vec<ExportProgress<'a>>,
}

impl LayerHook for LayerExports<'_> {
    fn layer_done(&mut self, layer: usize) {
        if !self.exports.is_empty() {
            self.hook.layer_done(layer, &self.exports);
        }
    }
}
