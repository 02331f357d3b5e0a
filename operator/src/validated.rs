//! A manifest after validation: types that cannot be wrong, so that nothing after them checks again.

use baton_crds::{Dtype, RoutingMode};
use serde::Serialize;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

/// A manifest after validation.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// `metadata.name`: at most 30 characters, a DNS label.
    pub name: String,
    /// The model's name towards clients.
    pub served_name: String,
    /// Where the model directory is.
    pub source: ModelSource,
    /// Number format; the model's own where absent.
    pub dtype: Option<Dtype>,
    /// Longest sequence in tokens; the model's own limit where absent.
    pub max_model_length: Option<NonZeroU32>,
    /// Which prompts are handed over, with the role that computes them.
    pub disaggregation: Disaggregation,
    /// The role that generates; without disaggregation it serves both phases.
    pub decode: RoleSettings,
    /// Where clients' requests enter.
    pub routing: RoutingMode,
}

/// Where a model directory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum ModelSource {
    /// A path on a PersistentVolumeClaim of the same namespace.
    Claim {
        /// The claim's name.
        claim: String,
        /// Path below the volume's root, without a leading slash; empty for the root itself.
        path: String,
    },
}

/// Which prompts are handed over. The prefill role exists only where there is something for it to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Disaggregation {
    /// Every prompt.
    Always {
        /// The role that reads prompts.
        prefill: RoleSettings,
    },
    /// Prompts with enough uncached tokens.
    Conditional {
        /// The role that reads prompts.
        prefill: RoleSettings,
        /// From how many uncached tokens on.
        min_uncached_prompt_tokens: NonZeroU32,
    },
    /// None: decode workers serve both phases.
    Never,
}

impl Disaggregation {
    /// The role that reads prompts, where there is one.
    pub fn prefill(&self) -> Option<&RoleSettings> {
        match self {
            Disaggregation::Always { prefill } | Disaggregation::Conditional { prefill, .. } => Some(prefill),
            Disaggregation::Never => None,
        }
    }
}

/// One role's workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleSettings {
    /// How many.
    pub replicas: NonZeroU32,
    /// Memory of one worker's KV cache.
    pub kv_cache_bytes: NonZeroU64,
    /// Most tokens in one step.
    pub max_batch_tokens: NonZeroU32,
    /// Most sequences that run at once.
    pub max_sequences: NonZeroU32,
    /// Longest piece of a prompt in one step; a multiple of a KV block.
    pub prefill_chunk_tokens: NonZeroU32,
    /// How long a worker may take to finish what it has.
    pub drain_timeout: Duration,
}
