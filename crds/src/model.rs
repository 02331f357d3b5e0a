//! `DisaggregatedModel`: one model, served by prefill and decode roles of their own.
//!
//! Knows fields, defaults and ranges. A field's comment is what `kubectl explain` prints, so it speaks to the person who
//! writes the manifest and ends with default and example. Unknown fields are refused by the API server (strict field
//! validation, which kubectl asks for) and by the offline reader; not by these types, because an older operator must
//! still be able to read an object that a newer definition has let in.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is to be served, and how.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "baton.dev",
    version = "v1alpha1",
    kind = "DisaggregatedModel",
    plural = "disaggregatedmodels",
    shortname = "dm",
    category = "serving",
    namespaced,
    derive = "PartialEq",
    doc = "One model served with its two phases apart: prefill workers read prompts and build the KV cache, decode workers take it over and generate.",
    validation = rules::NAME,
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.uri", description = "Where the weights come from."),
    printcolumn(name = "Prefill", type_ = "integer", json_path = ".spec.prefill.replicas", description = "Prefill replicas wanted."),
    printcolumn(name = "Decode", type_ = "integer", json_path = ".spec.decode.replicas", description = "Decode replicas wanted."),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation.")
)]
#[x_kube(validation = rules::PREFILL_REPLICAS_FOLLOW_POLICY)]
#[serde(rename_all = "camelCase")]
pub struct DisaggregatedModelSpec {
    /// Which model is served, and under which name. Required. Example: `{uri: pvc://models/tiny}`.
    pub model: ModelSpec,
    /// What both roles must agree on, because KV cache goes from one to the other.
    /// Default: as the model was published. Example: `{dtype: BF16}`.
    #[serde(default)]
    pub engine: EngineSpec,
    /// When a prompt's KV cache is computed by a prefill worker and handed over, and when the decode worker computes it itself.
    /// Default: `{policy: Always}`. Example: `{policy: Conditional, minUncachedPromptTokens: 256}`.
    #[serde(default)]
    pub disaggregation: DisaggregationSpec,
    /// The workers that read prompts. They want compute: give them large batches.
    /// Default: 1 replica. Example: `{replicas: 2, maxBatchTokens: 2048}`.
    #[serde(default)]
    pub prefill: RoleSpec,
    /// The workers that generate. They want memory: give them a large KV cache. At least 1 replica.
    /// Default: 1 replica. Example: `{replicas: 4, kvCacheMemory: 8Gi}`.
    #[serde(default)]
    #[x_kube(validation = rules::DECODE_REPLICAS)]
    pub decode: RoleSpec,
    /// Where clients' requests enter. Default: `{mode: Sidecar}`. Example: `{mode: Standalone}`.
    #[serde(default)]
    pub routing: RoutingSpec,
}

/// Which model is served, and under which name.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Where the model directory is (config.json, safetensors, tokenizer.json), as model hubs publish it. `pvc://CLAIM/PATH` is
    /// a path on a PersistentVolumeClaim in the same namespace; `baton up` looks for a directory named like the claim
    /// beside the manifest, or where `--volume CLAIM=DIR` says. Required. Example: `pvc://models/tiny`.
    #[schemars(length(min = 7, max = 512))]
    #[x_kube(validation = rules::MODEL_URI)]
    pub uri: String,
    /// The model's name towards clients: `model` in their requests, and what `/v1/models` lists.
    /// Default: metadata.name. Example: `Qwen/Qwen3-0.6B`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = rules::SERVED_NAME)]
    pub served_name: Option<String>,
}

/// What both roles must agree on, because KV cache goes from one to the other.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineSpec {
    /// Number format of weights and KV cache.
    // Of an optional enum, the schema keeps the type's own words: what the user reads stands there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Longest sequence, prompt and completion together, in tokens. A lower limit bounds what one request can take of the
    /// KV cache; a limit above the model's own, or one that a role's kvCacheMemory can't hold, is refused by the worker.
    /// Default: the model's own limit, or what kvCacheMemory holds where that is less. Example: `8192`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 32, max = 16_777_216))]
    pub max_model_length: Option<i32>,
}

/// Number format of weights and KV cache. F32 is exact and slow, F16 and BF16 take half the memory.
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

/// When a prompt's KV cache is computed by a prefill worker and handed over.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::THRESHOLD_WITH_CONDITIONAL)]
#[serde(rename_all = "camelCase")]
pub struct DisaggregationSpec {
    /// `Always` hands every prompt to a prefill worker. `Conditional` does so for prompts of which at least
    /// minUncachedPromptTokens tokens are not in the decode worker's prefix cache. `Never` lets decode workers serve both
    /// phases, without prefill replicas. Whatever is planned, a prompt whose prefill worker fails is recomputed by the
    /// decode worker, and the response header `x-baton-path` says so. Default: `Always`. Example: `Conditional`.
    #[serde(default)]
    pub policy: DisaggregationPolicy,
    /// With policy `Conditional`: prompts with fewer uncached tokens than this are computed by the decode worker itself,
    /// because the handover would cost more than it saves. Required with `Conditional`, refused otherwise.
    /// Default: none. Example: `256`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub min_uncached_prompt_tokens: Option<i32>,
}

/// Which prompts are handed over.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DisaggregationPolicy {
    /// Every prompt.
    #[default]
    Always,
    /// Prompts with enough uncached tokens.
    Conditional,
    /// No prompt: decode workers serve both phases.
    Never,
}

/// One role's workers. What stands here may differ between the roles and their machines.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::CHUNK_FITS_BATCH)]
#[x_kube(validation = rules::SEQUENCES_FIT_BATCH)]
#[serde(rename_all = "camelCase")]
pub struct RoleSpec {
    /// How many workers of this role run. Default: `1`. Example: `2`.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Memory for one worker's KV cache. A token takes 2 x layers x KV heads x head size x bytes of the dtype: 112 KiB with
    /// Qwen3-0.6B in BF16. Prompts that can never fit are refused. Default: `1Gi`. Example: `256Mi`.
    #[serde(default = "default_kv_cache_memory")]
    #[schemars(length(min = 2, max = 9))]
    #[x_kube(validation = rules::MEMORY)]
    pub kv_cache_memory: String,
    /// Most tokens that one step computes, over all sequences: more is better throughput, fewer is a shorter pause between
    /// two tokens of a running sequence. Default: `512`. Example: `2048`.
    #[serde(default = "default_max_batch_tokens")]
    #[schemars(range(min = 64, max = 65_536))]
    pub max_batch_tokens: i32,
    /// Most sequences that run at once; further ones wait. At least 8, the choices (`n`) that one request may ask for; at most
    /// maxBatchTokens - 32. Default: `64`. Example: `128`.
    #[serde(default = "default_max_sequences")]
    #[schemars(range(min = 8, max = 4096))]
    pub max_sequences: i32,
    /// Longest piece of a prompt that one step computes. Each finished piece's KV cache leaves at once, so small pieces
    /// overlap transfer with compute better. A multiple of 32 (the tokens of a KV block), at most maxBatchTokens.
    /// Default: `256`. Example: `128`.
    #[serde(default = "default_prefill_chunk_tokens")]
    #[schemars(range(min = 32, max = 65_536), extend("multipleOf" = 32))]
    pub prefill_chunk_tokens: i32,
    /// How long a worker that is told to stop may take to finish what it has; after that it is killed.
    /// Default: `120`. Example: `300`.
    #[serde(default = "default_drain_timeout_seconds")]
    #[schemars(range(min = 1, max = 3600))]
    pub drain_timeout_seconds: i32,
}

impl Default for RoleSpec {
    fn default() -> Self {
        RoleSpec {
            replicas: default_replicas(),
            kv_cache_memory: default_kv_cache_memory(),
            max_batch_tokens: default_max_batch_tokens(),
            max_sequences: default_max_sequences(),
            prefill_chunk_tokens: default_prefill_chunk_tokens(),
            drain_timeout_seconds: default_drain_timeout_seconds(),
        }
    }
}

fn default_replicas() -> i32 {
    1
}

fn default_kv_cache_memory() -> String {
    "1Gi".to_owned()
}

fn default_max_batch_tokens() -> i32 {
    512
}

fn default_max_sequences() -> i32 {
    64
}

fn default_prefill_chunk_tokens() -> i32 {
    256
}

fn default_drain_timeout_seconds() -> i32 {
    120
}

/// Where clients' requests enter.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoutingSpec {
    /// `Sidecar`: clients reach the routing proxy beside each decode worker. `Standalone`: they reach a routing proxy of its
    /// own in front of all workers, which then decides for all of them. Default: `Sidecar`. Example: `Standalone`.
    #[serde(default)]
    pub mode: RoutingMode,
}

/// Where clients' requests enter.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RoutingMode {
    /// At the proxy beside each decode worker.
    #[default]
    Sidecar,
    /// At a proxy of its own, in front of all workers.
    Standalone,
}
