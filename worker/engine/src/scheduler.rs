//! Decides, on integers alone, what each step computes, who gets blocks and who gives them back.
//!
//! A step has a budget of tokens. Running decodes come first, one token each; the rest goes to prompts in chunks that end where
//! blocks end (the last chunk ends where the prompt ends). Sequences are served in the order in which their requests came:
//!
//! * **Admission** takes the first waiting sequence when there are seats for all its choices and blocks for all its tokens; nobody
//!   overtakes it. Beyond the very first, one free block is left for each running sequence, so that admission does not cause the
//!   next preemption.
//! * **Preemption**: a decode that needs a block takes it from the youngest running sequence, which loses all its blocks, waits at
//!   its old place in the order, and computes prompt and completion again. Only younger sequences are preempted, so the oldest always
//!   advances and there is no livelock. With none left to preempt, the sequence keeps what it has and stalls.
//! * **Holds**: a prefill holds its whole prompt's blocks from admission to release, an import from admission to commit, since
//!   somebody outside reads or writes them. They are never preempted; the deadline of such a hold is its owner's business.
//!
//! **Fairness.** With `S` seats and a budget of `T` tokens, `T >= S + BLOCK_TOKENS` (checked in [`EngineConfig::check`]): every
//! running decode that is not stalled advances by one token in every step, and the oldest running prompt by at least one whole block,
//! up to `min(prefill_chunk_tokens, T - S + 1)` rounded down to blocks. A waiting request is admitted once all that came before it
//! are done, at the latest.
//!
//! Terms and the uniform view of prefill and decode (tokens minus computed tokens) are those of vLLM V1
//! (`vllm/v1/core/sched/scheduler.py`); unlike there, all blocks of a prompt are taken at admission, so that a prompt once begun is
//! never stopped by its own need for blocks.

mod plan;
#[cfg(test)]
mod tests;

pub use plan::{BlockCopy, Chunk, Plan};

use crate::block_manager::{BlockManager, CacheChange};
use crate::engine::EngineConfig;
use crate::kv_pool::{BLOCK_TOKENS, BlockId};
use crate::request::RequestKind;
use crate::sequence::{Sequence, SequenceId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

/// All sequences, and the books of their blocks.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    blocks: BlockManager,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Want blocks and seats.
    waiting: BTreeSet<SequenceId>,
    /// Have blocks and are computed.
    running: BTreeSet<SequenceId>,
    /// Imports that have blocks and wait for their KV.
    importing: BTreeSet<SequenceId>,
    /// Given out since the last plan.
    fresh: Vec<BlockId>,
    totals: Totals,
}

/// What the scheduler counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Sequences preempted.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_query_tokens: u64,
    /// Of those, found.
    pub prefix_hit_tokens: u64,
}

impl Scheduler {
    /// A scheduler with nothing to do. `config` has been checked.
    pub fn new(config: EngineConfig) -> Self {
        Scheduler {
            config,
            blocks: BlockManager::new(config.num_blocks, config.prefix_cache),
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            importing: BTreeSet::new(),
            fresh: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Adds a request. `arrival` must be higher than all before; prompt and one token must fit the pool, and `choices` the seats.
    pub fn add(&mut self, arrival: u64, prompt: Arc<[u32]>, salt: u64, kind: RequestKind, choices: u32) {
        let id = SequenceId { arrival, choice: 0 };
        self.sequences.insert(id, Sequence::new(prompt, salt, kind, choices));
        self.waiting.insert(id);
    }

    /// Adds one choice of a request whose completion was begun elsewhere. It is computed like one that was preempted: prompt and
    /// completion in chunks, then token by token.
    pub fn resume(&mut self, id: SequenceId, prompt: Arc<[u32]>, generated: Vec<u32>, salt: u64) {
        self.sequences.insert(id, Sequence::resumed(prompt, generated, salt));
        self.waiting.insert(id);
    }

    /// Decides the next step.
    pub fn schedule(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.admit(&mut plan);
        if plan.announced.is_empty() {
            self.schedule_decodes(&mut plan);
            self.schedule_prefills(&mut plan);
        }
        plan.fresh = std::mem::take(&mut self.fresh);
        plan
    }

    /// Books that a chunk's KV is in the pool: blocks that are now full get their names.
    pub fn computed(&mut self, chunk: &Chunk) {
        let sequence = self.sequences.get_mut(&chunk.sequence).expect("a chunk in flight keeps its sequence");
        let named = sequence.num_computed / BLOCK_TOKENS;
        sequence.num_computed = chunk.start + chunk.len;
        publish(&mut self.blocks, sequence, named);
    }

    /// Adds the token that was sampled for a sequence that has split already.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        self.sequences.get_mut(&id).expect("a token is sampled for a known sequence").push(token);
    }

    /// Splits the sequence that stands for a request into the choices that go on, each with its first token. All share its blocks;
    /// whoever first writes to the partly filled last one gets a copy.
    pub fn split(&mut self, arrival: u64, firsts: &[(u32, u32)]) {
        let trunk_id = SequenceId { arrival, choice: 0 };
        let trunk = self.sequences.remove(&trunk_id).expect("a computed prompt is known");
        self.running.remove(&trunk_id);
        for &(choice, token) in firsts {
            let mut sequence = trunk.clone();
            sequence.forks = 1;
            sequence.push(token);
            sequence.block_table.iter().for_each(|&block| self.blocks.share(block));
            let id = SequenceId { arrival, choice };
            self.sequences.insert(id, sequence);
            self.running.insert(id);
        }
        self.blocks.release_all(trunk.block_table);
    }

    /// Takes a complete prefill out of the running ones; it keeps its blocks.
    pub fn hold(&mut self, arrival: u64) {
        self.running.remove(&SequenceId { arrival, choice: 0 });
    }

    /// Whether the request is an import that has blocks and waits for their content.
    pub fn is_importing(&self, arrival: u64) -> bool {
        self.importing.contains(&SequenceId { arrival, choice: 0 })
    }

    /// Books that an import's blocks hold the prompt's KV; [`Scheduler::split`] comes next.
    pub fn import_committed(&mut self, arrival: u64) {
        let sequence = self.end_import(arrival);
        sequence.num_computed = sequence.prompt().len();
        let id = SequenceId { arrival, choice: 0 };
        let sequence = self.sequences.get_mut(&id).expect("an import is known");
        publish(&mut self.blocks, sequence, 0);
    }

    /// Turns an import, admitted or not, into a request whose prompt is computed here. It keeps its place in the order; its blocks are
    /// free at once, since the cached ones are found again and the others hold nothing of use.
    pub fn import_failed(&mut self, arrival: u64) {
        let sequence = self.end_import(arrival);
        let block_table = std::mem::take(&mut sequence.block_table);
        // An import may use a known prompt as a whole, a computed one all but its last token's block: what is told is what is used.
        let reusable = (sequence.num_tokens() - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
        sequence.num_cached = sequence.num_cached.map(|cached| cached.min(reusable));
        self.blocks.release_all(block_table);
        self.waiting.insert(SequenceId { arrival, choice: 0 });
    }

    /// Forgets one choice (the whole request before it has split) and frees its blocks.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.blocks.release_all(sequence.block_table);
            self.waiting.remove(&id);
            self.running.remove(&id);
            self.importing.remove(&id);
        }
    }

    /// Forgets all choices of a request and frees their blocks.
    pub fn remove_request(&mut self, arrival: u64) {
        let range = SequenceId { arrival, choice: 0 }..=SequenceId { arrival, choice: u32::MAX };
        let ids: Vec<_> = self.sequences.range(range).map(|(&id, _)| id).collect();
        ids.into_iter().for_each(|id| self.remove(id));
    }

    /// A sequence by its name.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Whether a step could be due.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// Sequences that are computed.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for admission, those preempted included.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Imports that wait for their KV.
    pub fn num_importing(&self) -> usize {
        self.importing.len()
    }

    /// Tokens of prompts (and of completions lost to preemption) that are to be computed here, one a running decode not counted.
    pub fn num_queued_prompt_tokens(&self) -> usize {
        let to_compute = |id: &SequenceId| match self.sequences[id].kind {
            RequestKind::Generate | RequestKind::Prefill => self.sequences[id].num_uncomputed(),
            RequestKind::Import => 0,
        };
        let waiting: usize = self.waiting.iter().map(to_compute).sum();
        let running: usize = self.running.iter().map(to_compute).filter(|&tokens| tokens > 1).sum();
        waiting + running
    }

    /// The books of the blocks, to look at.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// See [`BlockManager::record_changes`].
    pub fn record_cache_changes(&mut self) {
        self.blocks.record_changes();
    }

    /// See [`BlockManager::take_changes`].
    pub fn take_cache_changes(&mut self) -> Vec<CacheChange> {
        self.blocks.take_changes()
    }

    /// What was counted so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    fn admit(&mut self, plan: &mut Plan) {
        while let Some(&id) = self.waiting.first() {
            let seats = self.sequences[&id].forks as usize;
            let has_room = self.seats_taken() + seats <= self.config.max_num_seqs;
            if !has_room || self.is_prompt_underway(id) || !self.take_blocks(id) {
                break;
            }
            self.waiting.remove(&id);
            let sequence = &self.sequences[&id];
            match sequence.kind {
                RequestKind::Generate => {}
                RequestKind::Prefill => plan.announced.extend((sequence.num_computed > 0).then_some(id)),
                RequestKind::Import => plan.announced.push(id),
            }
            match sequence.kind {
                RequestKind::Generate | RequestKind::Prefill => self.running.insert(id),
                RequestKind::Import => self.importing.insert(id),
            };
        }
    }

    /// Whether the prompt of a resumed choice is being computed for an earlier choice: a moment later it is in the prefix cache, and
    /// need not be computed for each. There is always an end to it, since a running prompt advances in every step.
    fn is_prompt_underway(&self, id: SequenceId) -> bool {
        let is_new = self.sequences[&id].num_cached.is_none();
        let mut earlier = self.running.range(SequenceId { choice: 0, ..id }..id).map(|id| &self.sequences[id]);
        self.config.prefix_cache && is_new && earlier.any(|earlier| earlier.num_computed < earlier.prompt().len())
    }

    fn seats_taken(&self) -> usize {
        self.running.iter().chain(&self.importing).map(|id| self.sequences[id].forks as usize).sum()
    }

    /// Gives a sequence blocks for all its tokens, those of a known prefix as they are. All or nothing.
    fn take_blocks(&mut self, id: SequenceId) -> bool {
        let sequence = self.sequences.get_mut(&id).expect("only known sequences wait");
        let num_tokens = sequence.num_tokens();
        // The last token is computed even when its KV is known, since its logits are wanted; an import brings what it led to.
        let reusable = match sequence.kind {
            RequestKind::Generate | RequestKind::Prefill => num_tokens - 1,
            RequestKind::Import => num_tokens,
        } / BLOCK_TOKENS;
        let cached = match self.config.prefix_cache {
            true => self.blocks.cached_prefix(sequence.hashes(reusable)),
            false => Vec::new(),
        };
        let new = num_tokens.div_ceil(BLOCK_TOKENS) - cached.len();
        let revived = cached.iter().filter(|&&block| self.blocks.ref_count(block) == 0).count();
        if new + revived + self.running.len() > self.blocks.num_free() {
            return false;
        }

        cached.iter().for_each(|&block| self.blocks.share(block));
        sequence.num_computed = cached.len() * BLOCK_TOKENS;
        sequence.block_table = cached;
        for _ in 0..new {
            let block = self.blocks.allocate().expect("enough free blocks were counted");
            self.fresh.push(block);
            sequence.block_table.push(block);
        }
        if sequence.num_cached.is_none() {
            sequence.num_cached = Some(sequence.num_computed);
            self.totals.prefix_query_tokens += num_tokens as u64;
            self.totals.prefix_hit_tokens += sequence.num_computed as u64;
        }
        true
    }

    fn schedule_decodes(&mut self, plan: &mut Plan) {
        let running: Vec<_> = self.running.iter().copied().collect();
        for id in running {
            // An older sequence may have preempted this one a moment ago.
            if self.running.contains(&id) && self.sequences[&id].num_uncomputed() == 1 && self.make_writable(id, plan) {
                let sequence = &self.sequences[&id];
                let start = sequence.num_computed;
                plan.chunks.push(Chunk { sequence: id, start, len: 1, samples: sequence.forks });
            }
        }
    }

    fn schedule_prefills(&mut self, plan: &mut Plan) {
        let mut budget = self.config.max_batch_tokens - plan.num_tokens();
        for &id in &self.running {
            let sequence = &self.sequences[&id];
            let remaining = sequence.num_uncomputed();
            if remaining == 1 {
                continue; // A decode: scheduled above, or stalled.
            }
            let start = sequence.num_computed;
            let most = remaining.min(budget).min(self.config.prefill_chunk_tokens);
            let len = if most == remaining { most } else { most.saturating_sub((start + most) % BLOCK_TOKENS) };
            if len > 0 {
                let samples = if len == remaining { sequence.forks } else { 0 };
                plan.chunks.push(Chunk { sequence: id, start, len, samples });
                budget -= len;
            }
        }
    }

    /// Makes sure that the sequence's next token has a slot of its own, at the cost of younger sequences. False when it has to wait.
    fn make_writable(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        loop {
            let sequence = &self.sequences[&id];
            let index = sequence.num_computed / BLOCK_TOKENS;
            let shared = match sequence.block_table.get(index) {
                Some(&block) if self.blocks.ref_count(block) == 1 => return true,
                Some(&block) => Some(block),
                None => None,
            };
            if let Some(block) = self.blocks.allocate() {
                self.fresh.push(block);
                let sequence = self.sequences.get_mut(&id).expect("looked up above");
                sequence.block_table.truncate(index);
                sequence.block_table.push(block);
                if let Some(shared) = shared {
                    plan.copies.push(BlockCopy { from: shared, to: block });
                    self.blocks.release(shared);
                }
                return true;
            }
            let mut younger = self.running.range((Bound::Excluded(id), Bound::Unbounded)).rev();
            match younger.find(|id| self.sequences[id].kind != RequestKind::Prefill).copied() {
                Some(victim) => self.preempt(victim),
                None => return false,
            }
        }
    }

    fn preempt(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is known");
        self.blocks.release_all(std::mem::take(&mut sequence.block_table));
        sequence.num_computed = 0;
        self.running.remove(&id);
        self.waiting.insert(id);
        self.totals.preemptions += 1;
    }

    fn end_import(&mut self, arrival: u64) -> &mut Sequence {
        let id = SequenceId { arrival, choice: 0 };
        self.importing.remove(&id);
        let sequence = self.sequences.get_mut(&id).expect("an import is known");
        sequence.kind = RequestKind::Generate;
        sequence.num_computed = 0;
        sequence
    }
}

/// Names the full blocks of a sequence from block `from` on.
fn publish(blocks: &mut BlockManager, sequence: &mut Sequence, from: usize) {
    let full = sequence.num_computed / BLOCK_TOKENS;
    if from < full {
        let hashes = sequence.hashes(full)[from..].to_vec();
        for (&block, hash) in sequence.block_table[from..full].iter().zip(hashes) {
            blocks.publish(block, hash);
        }
    }
}
