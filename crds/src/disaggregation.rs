//! `spec.disaggregation`: which prompts are handed over.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// When a prompt's KV cache is computed by a prefill worker and handed over.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::THRESHOLD_WITH_CONDITIONAL)]
#[serde(rename_all = "camelCase")]
pub struct DisaggregationSpec {
    /// `Always` hands every prompt to a prefill worker. `Conditional` does so for prompts of which at least
    /// minUncachedPromptTokens tokens are not in the decode worker's prefix cache. `Never` lets decode workers serve both
    /// phases: spec.prefill then makes no pods. Whatever is planned, a prompt whose prefill worker fails is recomputed by the
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
