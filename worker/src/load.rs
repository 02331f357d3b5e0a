//! From a model directory to a running engine: everything that can be wrong with a model is found here, before the first request.

use crate::config::Config;
use crate::engine_thread::{self, EngineEnd, EngineHandle};
use crate::kv_sizing::{self, Demand, KvSizingError};
use crate::lifecycle::Lifecycle;
use crate::memory;
use crate::metrics::Metrics;
use crate::openai::ModelFacts;
use crate::transfer::producer::BlockTooLarge;
use baton_engine::engine::{ConfigError as EngineConfigError, Engine, EngineConfig};
use baton_engine::kv_pool::{HeapPool, KvPool};
use baton_engine::loader::{self, LoadError, LoadOptions};
use baton_engine::model_runner::ModelRunnerError;
use baton_engine::tokenizer::{Tokenizer, TokenizerError};
use baton_wire::Fingerprint;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;

/// Requests that wait in the engine at most. Each holds its prompt (at most `--max-model-length` ids of 4 bytes); who would wait
/// behind a thousand others is better told at once.
const WAITING_MAX: usize = 1024;

/// A model that can't be served. The causes name file, tensor or field.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Its text can't be read.
    #[error("the model's tokenizer can't be used")]
    Tokenizer(#[from] TokenizerError),
    /// Its weights or configuration can't be used.
    #[error("the model can't be loaded")]
    Load(#[from] LoadError),
    /// Tokenizer and weights are not of the same model.
    #[error(
        "the tokenizer has {tokenizer} tokens and the model logits for {model}: tokenizer.json and config.json are not of the same model"
    )]
    VocabularyMismatch {
        /// Tokens of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
    /// Longer than the model was made for.
    #[error("--max-model-length is {asked}, and the model was made for at most {max}")]
    TooLong {
        /// As asked for.
        asked: usize,
        /// What it was made for.
        max: usize,
    },
    /// No room for KV.
    #[error(transparent)]
    KvSizing(#[from] KvSizingError),
    /// The engine's limits contradict each other.
    #[error(transparent)]
    EngineConfig(#[from] EngineConfigError),
    /// Model and KV pool don't fit.
    #[error("the model can't run on its KV pool")]
    Runner(#[from] ModelRunnerError),
    /// Blocks that can't be handed over.
    #[error("the model's KV can't be handed over")]
    Transfer(#[from] BlockTooLarge),
    /// The engine's thread can't be started.
    #[error("the engine's thread can't be started")]
    Thread(#[from] std::io::Error),
}

/// A loaded model with its engine running.
pub struct LoadedEngine {
    /// What requests are checked against.
    pub facts: ModelFacts,
    /// Tokens that end a completion.
    pub eos: Vec<u32>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Model and KV layout.
    pub fingerprint: Fingerprint,
    /// Where K and V are.
    pub pool: Arc<dyn KvPool>,
    /// The engine.
    pub engine: EngineHandle,
    /// Hears how the engine ends, should it.
    pub end: oneshot::Receiver<Result<(), EngineEnd>>,
}

/// Loads the model and starts its engine; takes seconds to minutes and tells `lifecycle` how far it is.
///
/// # Errors
/// [`ModelError`] says what to change.
pub fn load(config: &Config, lifecycle: &Lifecycle, metrics: Arc<Metrics>) -> Result<LoadedEngine, ModelError> {
    let started = Instant::now();
    lifecycle.report("tokenizer", 0, 0);
    let tokenizer = Tokenizer::load(&config.model_dir)?;
    let options = LoadOptions { dtype: config.dtype, ..LoadOptions::default() };
    let mut progress = |done, total| lifecycle.report("weights", done, total);
    let model = loader::load(&config.model_dir, options, &mut progress)?;
    if tokenizer.vocab_size() > model.config.vocab_size {
        return Err(ModelError::VocabularyMismatch {
            tokenizer: tokenizer.vocab_size(),
            model: model.config.vocab_size,
        });
    }

    let block_bytes = model.kv_layout(1).block_bytes_all_layers() as u64;
    let held = kv_sizing::tokens_held(block_bytes, config.kv_cache_bytes);
    let max_model_length = max_model_length(config.max_model_length, model.config.max_model_length(), held)?;
    let demand = Demand { block_bytes, max_model_length, max_num_seqs: config.max_num_seqs };
    let num_blocks = kv_sizing::num_blocks(demand, config.kv_cache_bytes, memory::available_bytes())?;
    let layout = model.kv_layout(num_blocks);
    lifecycle.report("kv-cache", 0, layout.pool_bytes() as u64);
    let pool: Arc<dyn KvPool> = Arc::new(HeapPool::new(layout));

    let facts = ModelFacts {
        name: config.served_model_name.clone(),
        vocab_size: u32::try_from(model.config.vocab_size).unwrap_or(u32::MAX),
        max_model_length,
        defaults: model.config.generation.clone(),
    };
    let eos = match &model.config.eos_token_ids {
        ids if ids.is_empty() => tokenizer.eos_token_id().into_iter().collect(),
        ids => ids.clone(),
    };
    let fingerprint = Fingerprint(model.fingerprint());
    tracing::info!(
        model = facts.name,
        architecture = model.config.architecture.class_name(),
        dtype = model.dtype.as_str(),
        %fingerprint,
        max_model_length,
        kv_blocks = num_blocks,
        kv_cache_bytes = layout.pool_bytes(),
        seconds = started.elapsed().as_secs_f64(),
        "model loaded"
    );

    let engine_config = EngineConfig {
        num_blocks,
        max_batch_tokens: config.max_batch_tokens,
        max_num_seqs: config.max_num_seqs,
        prefill_chunk_tokens: config.prefill_chunk_tokens,
        prefix_cache: true,
        max_waiting: WAITING_MAX,
    };
    let runner = model.into_runner(pool.clone())?;
    let engine = Engine::new(runner, pool.clone(), engine_config, max_model_length)?;
    let (engine, end) = engine_thread::start(engine, layout.layers, metrics)?;
    Ok(LoadedEngine { facts, eos, tokenizer, fingerprint, pool, engine, end })
}

/// `held`: tokens that the KV cache holds. It bounds only what nobody has asked for: a model made for more than one's memory is
/// served with what there is, but no promise is broken in silence.
fn max_model_length(asked: Option<usize>, max: usize, held: usize) -> Result<usize, ModelError> {
    match asked {
        Some(asked) if asked > max => Err(ModelError::TooLong { asked, max }),
        Some(asked) => Ok(asked),
        None if held < max => {
            tracing::warn!(
                max_model_length = held,
                model = max,
                "sequences are limited to what --kv-cache-bytes holds"
            );
            Ok(held)
        }
        None => Ok(max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_length_that_nobody_asked_for_gives_way_to_memory() {
        let length = |asked, held| max_model_length(asked, 40_960, held).expect("a length within the model's own");
        assert_eq!(length(None, 9_344), 9_344);
        assert_eq!(length(None, usize::MAX), 40_960);
        assert_eq!(length(Some(20_000), 9_344), 20_000, "refused with numbers when blocks are counted");
        assert!(matches!(max_model_length(Some(50_000), 40_960, usize::MAX), Err(ModelError::TooLong { .. })));
    }
}
