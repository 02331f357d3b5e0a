//! `DisaggregatedModel`: one model, served by prefill and decode roles of their own.
//!
//! Knows fields, defaults and ranges. A field's comment is what `kubectl explain` prints, so it speaks to the person who
//! writes the manifest and ends with default and example. Unknown fields are refused by the API server (strict field
//! validation, which kubectl asks for) and by the offline reader; not by these types, because an older operator must
//! still be able to read an object that a newer definition has let in.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::disaggregation::DisaggregationSpec;
use crate::engine::EngineSpec;
use crate::model_source::ModelSpec;
use crate::observability::ObservabilitySpec;
use crate::placement::PlacementSpec;
use crate::role::RoleSpec;
use crate::routing::RoutingSpec;
use crate::rules;
use crate::security::SecuritySpec;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// What is to be served, and how.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "baton.dev",
    version = "v1alpha1",
    kind = "DisaggregatedModel",
    plural = "disaggregatedmodels",
    shortname = "dm",
    category = "serving",
    namespaced,
    status = "crate::DisaggregatedModelStatus",
    derive = "PartialEq",
    doc = "One model served with its two phases apart: prefill workers read prompts and build the KV cache, decode workers take it over and generate.",
    validation = rules::NAME,
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status", description = "Whether the model serves as the manifest says."),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason", description = "Why, or why not."),
    printcolumn(name = "Prefill", type_ = "string", json_path = ".status.summary.prefill", description = "Prefill replicas: ready of desired."),
    printcolumn(name = "Decode", type_ = "string", json_path = ".status.summary.decode", description = "Decode replicas: ready of desired."),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Time since creation."),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url", description = "Where clients enter.", priority = 1),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.revision", description = "The revision that serves.", priority = 1),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.uri", description = "Where the weights come from.", priority = 1)
)]
#[x_kube(validation = rules::PREFILL_REPLICAS_FOLLOW_POLICY)]
#[x_kube(validation = rules::PREFILL_AUTOSCALING_FOLLOWS_POLICY)]
#[x_kube(validation = rules::PREFILL_NODES_NEED_FOREIGN)]
#[x_kube(validation = rules::DECODE_NODES_NEED_FOREIGN)]
#[x_kube(validation = rules::PREFILL_SIZES_NEED_BATON)]
#[x_kube(validation = rules::DECODE_SIZES_NEED_BATON)]
#[serde(rename_all = "camelCase")]
pub struct DisaggregatedModelSpec {
    /// Which model is served, where it comes from, and under which name. Required. Example: `{uri: pvc://models/tiny}`.
    pub model: ModelSpec,
    /// What computes, the same in both roles, because KV cache goes from one to the other.
    /// Default: `{type: Baton}`. Example: `{dtype: BF16}`.
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
    /// Where clients' requests enter, and how proxies find workers. Default: `{mode: Sidecar, discovery: DNS}`. Example: `{mode: Standalone}`.
    #[serde(default)]
    pub routing: RoutingSpec,
    /// How near each other the roles' pods are put. Default: wherever there is room.
    /// Example: `{colocation: {topologyKey: topology.kubernetes.io/zone}}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementSpec>,
    /// Who may reach the pods. Default: `{networkPolicy: Restricted}`. Example: `{networkPolicy: Disabled}`.
    #[serde(default)]
    pub security: SecuritySpec,
    /// How the pods are watched. Default: `{monitor: Auto}`. Example: `{monitor: None}`.
    #[serde(default)]
    pub observability: ObservabilitySpec,
}
