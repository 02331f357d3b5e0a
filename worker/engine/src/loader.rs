//! From a published model directory to a model on a backend.
//!
//! Knows the directory's files and the order of loading; the checkpoint's format is [`checkpoint`]'s, the weights'
//! names are those of the layers that ask for them. Every tensor is checked for presence, shape and type before it is
//! used.

mod checkpoint;
mod reader;
mod shard;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use checkpoint::MappedFile;
pub use reader::{Cut, WeightReader};
pub use shard::{Shard, ShardError};

use crate::backend::reference::Reference;
use crate::backend::{Backend, BackendError};
use crate::config::{ConfigError, Dtype, ModelConfig};
use crate::fingerprint;
use crate::kv_pool::{KvLayout, KvPool};
use crate::model_runner::{ModelRunner, ModelRunnerError};
use crate::models::decoder::Decoder;
use checkpoint::Checkpoint;

/// What to load, and as what.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Type of activations and KV cache; the checkpoint's own where `None`.
    pub dtype: Option<Dtype>,
    /// Which part of the model; all of it where `None`.
    pub shard: Option<Shard>,
}

/// A model on a backend, not yet joined with a KV cache.
pub struct LoadedModel<B: Backend = Reference> {
    /// Its configuration.
    pub config: ModelConfig,
    /// Type of activations and KV cache.
    pub dtype: Dtype,
    /// The part that was loaded.
    pub shard: Shard,
    backend: B,
    decoder: Decoder<B>,
    fingerprint: [u8; 32],
}

impl<B: Backend> LoadedModel<B> {
    /// Identity of weights, configuration and KV layout: equal exactly where KV blocks may be exchanged.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// Shape of a KV pool of `num_blocks` for this model.
    pub fn kv_layout(&self, num_blocks: usize) -> KvLayout {
        let heads = self.shard.heads(&self.config);
        KvLayout {
            layers: self.shard.layers.len(),
            kv_heads: heads.kv,
            head_dim: heads.dim,
            dtype: self.dtype,
            num_blocks,
        }
    }

    /// Joins the model with its KV cache.
    ///
    /// # Errors
    /// When the pool has another shape than [`LoadedModel::kv_layout`], or the model is only a part of one.
    pub fn into_runner(self, pool: Arc<dyn KvPool>) -> Result<ModelRunner<B>, ModelRunnerError> {
        let expected = self.kv_layout(pool.layout().num_blocks);
        if *pool.layout() != expected {
            return Err(ModelRunnerError::PoolShape { expected, found: *pool.layout() });
        }
        if self.shard != Shard::whole(&self.config) {
            return Err(ModelRunnerError::PartOfModel { shard: self.shard });
        }
        Ok(ModelRunner::new(self.backend, self.decoder, pool))
    }

    /// The backend and the decoder, for those who drive the stages of a split model themselves.
    pub fn into_parts(self) -> (B, Decoder<B>) {
        (self.backend, self.decoder)
    }
}

/// Loads `dir` onto the reference backend. `progress` is told bytes of weights taken and bytes of weights in all.
///
/// # Errors
/// [`LoadError`] names the file and the tensor or field.
pub fn load(
    dir: &Path,
    options: LoadOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<LoadedModel<Reference>, LoadError> {
    load_on(dir, options, Reference::new, progress)
}

/// Loads `dir` onto a backend that `backend` makes for the type of activations.
///
/// # Errors
/// [`LoadError`] names the file and the tensor or field.
pub fn load_on<B: Backend>(
    dir: &Path,
    options: LoadOptions,
    backend: impl FnOnce(Dtype) -> B,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<LoadedModel<B>, LoadError> {
    let config = ModelConfig::load(dir)?;
    let shard = options.shard.unwrap_or_else(|| Shard::whole(&config));
    shard.validate(&config)?;
    let checkpoint = Checkpoint::open(dir)?;
    let dtype = match options.dtype.or(config.dtype) {
        Some(dtype) => dtype,
        None => checkpoint.dtype_of("model.embed_tokens.weight")?,
    };
    let backend = backend(dtype);
    let mut reader = WeightReader::new(&checkpoint, &backend, &config, &shard, progress);
    let decoder = Decoder::load(&mut reader)?;
    let unexpected = reader.finish();
    if let Some(first) = unexpected.first() {
        tracing::warn!(
            count = unexpected.len(),
            first,
            "the checkpoint has tensors that this architecture does not use"
        );
    }
    let fingerprint = fingerprint::fingerprint(&config, dtype, &shard, checkpoint.files());
    Ok(LoadedModel { config, dtype, shard, backend, decoder, fingerprint })
}

/// A model can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its configuration can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The part asked for can't be cut out of it.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The directory has no weights in a known form.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// Which directory.
        dir: PathBuf,
    },
    /// A file can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The index of a sharded checkpoint is broken.
    #[error("{} is not a valid index", path.display())]
    Index {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// The index names a file outside the directory.
    #[error("{} names {file:?}, which is not a file of the directory", path.display())]
    IndexEscapes {
        /// The index.
        path: PathBuf,
        /// The name in it.
        file: String,
    },
    /// A safetensors header is broken.
    #[error("{}: {problem}", path.display())]
    Header {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor's data lies beyond the end of its file.
    #[error("{}: truncated: tensor {tensor} ends at byte {end}, the file at {len}: copy it again", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Where it would end.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// A tensor that the architecture needs is absent.
    #[error("{}: tensor {tensor} of shape {expected:?} is missing: config.json and weights must be of one model", path.display())]
    MissingTensor {
        /// Where it was looked for.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The shape that the configuration gives it.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration gives it.
    #[error("{}: tensor {tensor}: expected shape {expected:?}, found {found:?}: config.json and weights must be of one model", path.display())]
    TensorShape {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// The shape that the configuration gives it.
        expected: Vec<usize>,
        /// Its own.
        found: Vec<usize>,
    },
    /// A tensor is of a type that weights can't be read from.
    #[error("{}: tensor {tensor}: expected type BF16, F16 or F32, found {found}", path.display())]
    TensorDtype {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
