//! `spec.placement`: how near each other the roles' pods are put.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How near each other the roles' pods are put.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlacementSpec {
    /// Puts prefill and decode pods of the model near each other, because KV cache travels between them on every request.
    /// Default: none, so wherever there is room. Example: `{topologyKey: topology.kubernetes.io/zone, mode: Required}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub colocation: Option<ColocationSpec>,
}

/// How near prefill and decode pods of a model are put to each other.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ColocationSpec {
    /// Label of nodes that names the place: pods go to nodes of which it has one value. Required.
    /// Example: `topology.kubernetes.io/zone`.
    #[schemars(length(min = 1, max = 316), regex(pattern = rules::LABEL_KEY_PATTERN))]
    pub topology_key: String,
    /// `Preferred`: elsewhere, where there is no room. `Required`: not at all, then; the first pod to be placed decides for all.
    /// Default: `Preferred`. Example: `Required`.
    #[serde(default)]
    pub mode: ColocationMode,
}

/// What happens where there is no room near the others.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ColocationMode {
    /// The pod waits.
    Required,
    /// The pod goes elsewhere.
    #[default]
    Preferred,
}
