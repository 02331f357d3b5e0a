//! A published model's `config.json` and `generation_config.json`, as types that can't be wrong.
//!
//! Knows how Hugging Face spells things, old style (`rope_scaling`, `rope_theta`, `torch_dtype`) and that of
//! transformers 5 (`rope_parameters`, `dtype`), and refuses what the decoder can't compute exactly. Must not know
//! tensors.

mod raw;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use crate::kv_pool::KvDtype as Dtype;

/// Decoder families that this engine computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3.x.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and 2.5.
    Qwen2,
    /// Qwen3 (dense).
    Qwen3,
}

impl Architecture {
    /// Every supported one.
    pub const ALL: [Architecture; 4] =
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];

    /// The class name that `architectures` in config.json carries.
    pub const fn class_name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// Shape and numerics of a model: what the decoder is built from.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP's inner layer.
    pub intermediate_size: usize,
    /// Rows of the embedding, and logits a position.
    pub vocab_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads of each layer.
    pub num_heads: usize,
    /// KV heads of each layer; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements a head; even. Not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Positions that the checkpoint was made for.
    pub max_position_embeddings: usize,
    /// Rotary embedding.
    pub rope: RopeParameters,
    /// The head reuses the embedding's matrix.
    pub tie_word_embeddings: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on the MLP's three projections.
    pub mlp_bias: bool,
    /// RMSNorm over each q and k head before the rotation.
    pub qk_norm: bool,
    /// For each layer, how many positions a query sees, itself included; `None` sees all before it.
    pub sliding_windows: Vec<Option<usize>>,
    /// Type that the checkpoint says it is published in.
    pub dtype: Option<Dtype>,
    /// Tokens that end a completion. generation_config.json has the last word.
    pub eos_token_ids: Vec<u32>,
    /// Sampling that the publisher recommends.
    pub generation: GenerationDefaults,
}

/// Sampling values of generation_config.json; `None` where it is silent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Temperature; 0 where `do_sample` is false.
    pub temperature: Option<f32>,
    /// Keep the `top_k` likeliest.
    pub top_k: Option<u32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Floor relative to the likeliest token.
    pub min_p: Option<f32>,
    /// Penalty on tokens already seen.
    pub repetition_penalty: Option<f32>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// Ways to stretch the rotary embedding over a longer context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, the ones between blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` count as low.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` count as high.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071): a ramp between interpolation and extrapolation, and a factor on cos and sin.
    Yarn {
        /// Divisor of the interpolated frequencies.
        factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated.
        beta_slow: f64,
        /// Round the ramp's ends to whole dimensions.
        truncate: bool,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// Dynamic NTK: the base grows with the sequence once that is longer than the model. Up to
    /// `max_position_embeddings` it changes nothing, and beyond it the keys already cached would be of another base, so
    /// the length limit is that.
    Dynamic,
}

impl ModelConfig {
    /// Longest sequence, prompt plus completion, that the model computes as it was published.
    pub fn max_model_length(&self) -> usize {
        match self.rope.scaling {
            RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
                self.max_position_embeddings.max((original_max_position_embeddings as f64 * factor) as usize)
            }
            RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } | RopeScaling::Dynamic => {
                self.max_position_embeddings
            }
        }
    }

    /// Reads `config.json` and, where present, `generation_config.json` of a model directory.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the field.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        let text = read(&path)?;
        let generation_path = dir.join("generation_config.json");
        let generation = if generation_path.exists() { Some(read(&generation_path)?) } else { None };
        let generation = generation
            .map(|text| {
                parse::<raw::RawGeneration>(&text).map_err(|source| ConfigError::Json { path: generation_path, source })
            })
            .transpose()?;
        let raw = parse(&text).map_err(|source| ConfigError::Json { path, source })?;
        raw::model_config(raw, generation.unwrap_or_default())
    }
}

/// A model's configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file isn't the JSON that it should be.
    #[error("{} is not a valid configuration", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A model of another kind.
    #[error("unsupported architecture {found:?}: supported are {}", supported_architectures())]
    UnsupportedArchitecture {
        /// What config.json says.
        found: String,
    },
    /// An option with a value that this engine doesn't compute.
    #[error("config.json: {field} {found:?} is not supported: supported: {supported}")]
    Unsupported {
        /// Name of the option.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be.
        supported: &'static str,
    },
    /// A required field is absent.
    #[error("config.json: {field} is missing")]
    Missing {
        /// Name of the field.
        field: &'static str,
    },
    /// A field contradicts itself or another.
    #[error("config.json: {field}: {problem}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

fn supported_architectures() -> String {
    Architecture::ALL.map(Architecture::class_name).join(", ")
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, serde_json::Error> {
    serde_json::from_str(text)
}
