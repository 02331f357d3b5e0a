//! The smallest loop that drives a runner: batches by hand, no scheduler.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_engine::backend::reference::Reference;
use baton_engine::batch::Batch;
use baton_engine::config::Dtype;
use baton_engine::kv_pool::{BLOCK_TOKENS, BlockId, HeapPool};
use baton_engine::loader::{self, LoadOptions, LoadedModel};
use baton_engine::model_runner::ModelRunner;
use baton_engine::runner::Runner;
use baton_engine::sampling::{SampleRow, SamplingParams};
use safetensors::SafeTensors;

/// Every model fixture.
pub(crate) const MODELS: [&str; 12] = [
    "llama2",
    "llama3",
    "llama-linear",
    "llama-dynamic",
    "llama-yarn",
    "llama-bias",
    "mistral",
    "mistral-window",
    "qwen2-tied",
    "qwen2-window",
    "qwen3",
    "qwen3-tied",
];

pub(crate) fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub(crate) fn load(name: &str, dtype: Option<Dtype>) -> LoadedModel {
    let options = LoadOptions { dtype, shard: None };
    loader::load(&directory(name), options, &mut |_, _| {}).expect("the fixture loads")
}

/// What transformers computed for one prompt.
pub(crate) struct Expected {
    pub(crate) prompt: Vec<u32>,
    /// `[prompt, vocab]`
    pub(crate) logits: Vec<f32>,
    pub(crate) greedy: Vec<u32>,
}

pub(crate) fn expected(name: &str) -> Vec<Expected> {
    let bytes = std::fs::read(directory(name).join("expected.safetensors")).expect("the fixture has expectations");
    let tensors = SafeTensors::deserialize(&bytes).expect("the file is intact");
    let words = |name: String| -> Vec<u32> {
        let data = tensors.tensor(&name).expect("the file has it").data();
        data.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
    };
    (0..2)
        .map(|i| Expected {
            prompt: words(format!("prompt_{i}")),
            logits: words(format!("logits_{i}")).into_iter().map(f32::from_bits).collect(),
            greedy: words(format!("greedy_{i}")),
        })
        .collect()
}

/// A sequence with room in the cache.
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<BlockId>,
}

/// A runner over a small pool whose blocks are handed out in an order that is neither ascending nor contiguous.
pub(crate) struct Driver {
    pub(crate) runner: ModelRunner<Reference>,
    pub(crate) vocab: usize,
    free: Vec<BlockId>,
}

impl Driver {
    pub(crate) fn new(model: LoadedModel) -> Self {
        const BLOCKS: u32 = 61;
        let pool = Arc::new(HeapPool::new(model.kv_layout(BLOCKS as usize)));
        let vocab = model.config.vocab_size;
        let free = (0..BLOCKS).map(|i| BlockId(i * 23 % BLOCKS)).collect();
        Driver { runner: model.into_runner(pool).expect("the pool has the model's shape"), vocab, free }
    }

    pub(crate) fn sequence(&mut self, tokens: &[u32]) -> Sequence {
        // Room for the longest continuation of the fixtures.
        let blocks = (tokens.len() + 64).div_ceil(BLOCK_TOKENS);
        Sequence { tokens: tokens.to_vec(), computed: 0, blocks: self.free.split_off(self.free.len() - blocks) }
    }

    /// Computes the next tokens of each sequence; `-> [all of them, vocab]`
    pub(crate) fn compute(&mut self, work: &mut [(&mut Sequence, usize)]) -> Vec<f32> {
        let mut batch = batch(work);
        batch.logit_rows = (0..batch.tokens.len() as u32).collect();
        let logits = self.runner.logits(&batch, &mut ()).expect("the batch is consistent");
        work.iter_mut().for_each(|(sequence, count)| sequence.computed += *count);
        logits
    }

    /// Extends a sequence greedily by `count` tokens, one decode step each, and returns them.
    pub(crate) fn greedy(&mut self, sequence: &mut Sequence, count: usize) -> Vec<u32> {
        let start = sequence.tokens.len();
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        for _ in 0..count {
            let rest = sequence.tokens.len() - sequence.computed;
            let mut batch = batch(&[(&mut *sequence, rest)]);
            batch.logit_rows = vec![rest as u32 - 1];
            let row = SampleRow {
                params: &params,
                prompt: &sequence.tokens[..start],
                generated: &sequence.tokens[start..],
                seed: 0,
                choice: 0,
            };
            let sampled = self.runner.run(&batch, &[row], &mut ()).expect("the batch is consistent");
            sequence.computed += rest;
            sequence.tokens.push(sampled[0].id);
        }
        sequence.tokens[start..].to_vec()
    }
}

/// The next `count` tokens of each sequence, no logits asked for.
pub(crate) fn batch(work: &[(&mut Sequence, usize)]) -> Batch {
    let mut batch = Batch { cu_seqlens_q: vec![0], ..Batch::default() };
    for (sequence, count) in work {
        for position in sequence.computed..sequence.computed + count {
            let block = sequence.blocks[position / BLOCK_TOKENS].0 as usize;
            batch.tokens.push(sequence.tokens[position]);
            batch.positions.push(position as u32);
            batch.slot_mapping.push((block * BLOCK_TOKENS + position % BLOCK_TOKENS) as u64);
        }
        batch.cu_seqlens_q.push(batch.tokens.len() as u32);
        batch.context_lens.push((sequence.computed + count) as u32);
        batch.block_tables.push(sequence.blocks.clone());
    }
    batch
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}
