//! `spec.engine`: what computes, and what both roles must agree on because KV cache goes from one to the other.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What computes, the same in both roles.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::IMAGE_WITH_FOREIGN)]
#[x_kube(validation = rules::DTYPE_WITH_BATON)]
#[x_kube(validation = rules::LENGTH_WITH_BATON)]
#[x_kube(validation = rules::ARGS_NOT_OURS)]
#[serde(rename_all = "camelCase")]
pub struct EngineSpec {
    /// Which program computes. `Baton` is our own worker. `VLLM` and `SGLang` run the image and arguments that are given here,
    /// listening on port 8200. Can't be changed: make a new DisaggregatedModel. Default: `Baton`. Example: `VLLM`.
    #[serde(default, rename = "type")]
    #[x_kube(validation = rules::ENGINE_STAYS)]
    pub type_: EngineType,
    /// Image of the engine, by digest where it must not change under you. Required with VLLM and SGLang.
    /// Default: the installation's image of Baton's worker. Example: `registry.example.com/vllm-openai:v0.11.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = rules::IMAGE_PATTERN))]
    pub image: Option<String>,
    /// Further arguments of the engine, after the operator's own. With Baton none of those that this manifest has a field for.
    /// Default: none. Example: `[--tensor-parallel-size, "8"]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 1024)))]
    pub args: Vec<String>,
    /// Number format of weights and KV cache.
    // Of an optional enum, the schema keeps the type's own words: what the user reads stands there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Longest sequence, prompt and completion together, in tokens. A lower limit bounds what one request can take of the
    /// KV cache; a limit above the model's own, or one that a role's kvCacheMemory can't hold, is refused by the worker.
    /// With engine type Baton only. Default: the model's own limit, or what kvCacheMemory holds where that is less.
    /// Example: `8192`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 32, max = 16_777_216))]
    pub max_model_length: Option<i32>,
}

/// Which program computes.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineType {
    /// Baton's own worker.
    #[default]
    Baton,
    /// vLLM.
    #[serde(rename = "VLLM")]
    Vllm,
    /// SGLang.
    #[serde(rename = "SGLang")]
    Sglang,
}

impl EngineType {
    /// The value of [`crate::labels::ENGINE_TYPE`].
    pub fn label(self) -> &'static str {
        match self {
            EngineType::Baton => "baton",
            EngineType::Vllm => "vllm",
            EngineType::Sglang => "sglang",
        }
    }
}

/// Number format of weights and KV cache. F32 is exact and slow, F16 and BF16 take half the memory. With engine type Baton only.
/// Default: the format that the model was published in. Example: `BF16`.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dtype {
    /// bfloat16.
    BF16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}
