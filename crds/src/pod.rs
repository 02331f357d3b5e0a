//! Where and as what a role's pods run: resources, placement, environment, volumes and the overlay.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use crate::scalar::Amount;
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What a container asks of its node.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourcesSpec {
    /// What is set aside for it on its node, by name of the resource. Default: none. Example: `{cpu: 8, memory: 32Gi}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    #[x_kube(validation = rules::RESOURCE_NAMES)]
    pub requests: BTreeMap<String, Amount>,
    /// What it may take at most, by name of the resource. Default: none. Example: `{memory: 48Gi, nvidia.com/gpu: 1}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    #[x_kube(validation = rules::RESOURCE_NAMES)]
    pub limits: BTreeMap<String, Amount>,
}

/// GPUs in short.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = rules::GPU_CLASS_IS_NVIDIA)]
#[serde(rename_all = "camelCase")]
pub struct GpuSpec {
    /// GPUs of one pod. Required. Example: `1`.
    #[schemars(range(min = 0, max = 16))]
    pub count: i32,
    /// Model of the GPU, as GPU feature discovery labels nodes (`nvidia.com/gpu.product`). Default: any.
    /// Example: `NVIDIA-H100-80GB-HBM3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = rules::LABEL_VALUE_PATTERN))]
    pub class: Option<String>,
    /// Resource under which nodes offer them. Default: `nvidia.com/gpu`. Example: `amd.com/gpu`.
    #[serde(default = "default_gpu_resource_name")]
    #[schemars(length(min = 3, max = 316), regex(pattern = rules::EXTENDED_RESOURCE_PATTERN))]
    pub resource_name: String,
}

fn default_gpu_resource_name() -> String {
    rules::GPU_RESOURCE_NAME.to_owned()
}

/// A device claim of each pod.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = rules::CLAIM_HAS_ONE_SOURCE)]
#[serde(rename_all = "camelCase")]
pub struct ResourceClaimSpec {
    /// The claim's name within the pod. Required. Example: `gpu`.
    #[schemars(length(min = 1, max = 63), regex(pattern = rules::LABEL_PATTERN))]
    pub name: String,
    /// A ResourceClaim that all pods of the role share. This or resourceClaimTemplateName. Default: none. Example: `shared-gpu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SUBDOMAIN_PATTERN))]
    pub resource_claim_name: Option<String>,
    /// A ResourceClaimTemplate from which each pod gets a claim of its own. Default: none. Example: `one-gpu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SUBDOMAIN_PATTERN))]
    pub resource_claim_template_name: Option<String>,
}

/// A taint that pods put up with.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = rules::TOLERATION_HAS_KEY)]
#[x_kube(validation = rules::TOLERATION_VALUE_WITH_EQUAL)]
#[x_kube(validation = rules::TOLERATION_SECONDS_WITH_NO_EXECUTE)]
#[serde(rename_all = "camelCase")]
pub struct TolerationSpec {
    /// The taint's key. Default: none, which with operator Exists is every key. Example: `nvidia.com/gpu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 316), regex(pattern = rules::LABEL_KEY_PATTERN))]
    pub key: Option<String>,
    /// `Equal`: the taint has this value. `Exists`: whatever its value. Default: `Equal`. Example: `Exists`.
    #[serde(default)]
    pub operator: TolerationOperator,
    /// The taint's value, with operator Equal. Default: none, the empty value. Example: `"true"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63), regex(pattern = rules::LABEL_VALUE_PATTERN))]
    pub value: Option<String>,
    /// The taint's effect.
    // Of an optional enum, the schema keeps the type's own words: what the user reads stands there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
    /// With effect NoExecute: how long a pod stays on a node that gets the taint. Default: for ever. Example: `300`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub toleration_seconds: Option<i64>,
}

/// How a toleration compares a taint's value.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TolerationOperator {
    /// Whatever the value.
    Exists,
    /// This value.
    #[default]
    Equal,
}

impl TolerationOperator {
    /// Kubernetes' word.
    pub fn as_str(self) -> &'static str {
        match self {
            TolerationOperator::Exists => "Exists",
            TolerationOperator::Equal => "Equal",
        }
    }
}

/// The taint's effect. Default: every effect. Example: `NoSchedule`.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaintEffect {
    /// No new pods.
    NoSchedule,
    /// No new pods where there is another node.
    PreferNoSchedule,
    /// No pods.
    NoExecute,
}

impl TaintEffect {
    /// Kubernetes' word.
    pub fn as_str(self) -> &'static str {
        match self {
            TaintEffect::NoSchedule => "NoSchedule",
            TaintEffect::PreferNoSchedule => "PreferNoSchedule",
            TaintEffect::NoExecute => "NoExecute",
        }
    }
}

/// How the role's pods are spread over one kind of place.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TopologySpreadSpec {
    /// Label of nodes that names the place. Required. Example: `kubernetes.io/hostname`.
    #[schemars(length(min = 1, max = 316), regex(pattern = rules::LABEL_KEY_PATTERN))]
    pub topology_key: String,
    /// Largest difference between the pods of two places. Default: `1`. Example: `2`.
    #[serde(default = "default_max_skew")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_skew: i32,
    /// `ScheduleAnyway`: a pod that would break it is placed all the same. `DoNotSchedule`: it waits.
    /// Default: `ScheduleAnyway`. Example: `DoNotSchedule`.
    #[serde(default)]
    pub when_unsatisfiable: WhenUnsatisfiable,
}

fn default_max_skew() -> i32 {
    1
}

/// What becomes of a pod that would break the spread.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhenUnsatisfiable {
    /// It waits.
    DoNotSchedule,
    /// It is placed all the same.
    #[default]
    ScheduleAnyway,
}

/// A variable of the engine container's environment.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(validation = rules::ENV_HAS_ONE_SOURCE)]
#[serde(rename_all = "camelCase")]
pub struct EnvSpec {
    /// The variable's name. Required. Example: `RUST_LOG`.
    #[schemars(length(min = 1, max = 256), regex(pattern = rules::ENV_NAME_PATTERN))]
    #[x_kube(validation = rules::ENV_NOT_OURS)]
    pub name: String,
    /// Its value. This or secretKeyRef. Default: none. Example: `info`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8192))]
    pub value: Option<String>,
    /// A key of a Secret that has its value. Default: none. Example: `{name: tokens, key: license}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<SecretKeyRef>,
}

/// A key of a Secret in the model's namespace.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// Name of the Secret. Required. Example: `tokens`.
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SUBDOMAIN_PATTERN))]
    pub name: String,
    /// Key in it. Required. Example: `license`.
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SECRET_KEY_PATTERN))]
    pub key: String,
}

/// A volume of the pod: its name here, its source as in a Pod.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
#[serde(rename_all = "camelCase")]
pub struct VolumeSpec {
    /// The volume's name. Names that start with baton- are the operator's. Required. Example: `scratch`.
    #[schemars(length(min = 1, max = 63), regex(pattern = rules::LABEL_PATTERN))]
    #[x_kube(validation = rules::VOLUME_NOT_OURS)]
    pub name: String,
    /// Everything else, as in a Pod.
    #[serde(flatten)]
    pub source: Map<String, Value>,
}

/// Where the engine container mounts a volume.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[schemars(extend("x-kubernetes-map-type" = "atomic"))]
#[serde(rename_all = "camelCase")]
pub struct VolumeMountSpec {
    /// The volume: one of volumes above. Required. Example: `scratch`.
    #[schemars(length(min = 1, max = 63), regex(pattern = rules::LABEL_PATTERN))]
    pub name: String,
    /// Where it is mounted. Nowhere in /models, /etc/baton and /tmp, which are the operator's. Required. Example: `/scratch`.
    #[schemars(length(min = 2, max = 512))]
    #[x_kube(validation = rules::MOUNT_PATH)]
    pub mount_path: String,
    /// Everything else, as in a Pod.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Laid over the pod template last.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplateOverlay {
    /// Labels and annotations of the pods. Default: none. Example: `{annotations: {example.com/team: serving}}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<OverlayMetadata>,
    /// A piece of a PodSpec. Lists of named things (containers, volumes) merge by name: `engine`, `routing-proxy` and
    /// `model-download` are the operator's, whose image, command, args and ports stay. Default: none.
    /// Example: `{schedulerName: volcano, containers: [{name: engine, securityContext: {runAsUser: 1000}}]}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "open_object")]
    pub spec: Option<Map<String, Value>>,
}

fn open_object(_: &mut SchemaGenerator) -> Schema {
    // Atomic, so that its depth does not enter managedFields, which everybody who lists the models has to parse.
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "x-kubernetes-map-type": "atomic"})
}

/// Labels and annotations of the pods.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OverlayMetadata {
    /// Further labels of the pods; none of the operator's. Default: none. Example: `{example.com/team: serving}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16), extend("additionalProperties" = {"type": "string", "maxLength": 63, "pattern": rules::LABEL_VALUE_PATTERN}))]
    #[x_kube(validation = rules::LABEL_KEYS)]
    #[x_kube(validation = rules::LABELS_NOT_OURS)]
    pub labels: BTreeMap<String, String>,
    /// Further annotations of the pods; none of the operator's. Default: none. Example: `{example.com/owner: serving-team}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16), extend("additionalProperties" = {"type": "string", "maxLength": 4096}))]
    #[x_kube(validation = rules::LABEL_KEYS)]
    #[x_kube(validation = rules::LABELS_NOT_OURS)]
    pub annotations: BTreeMap<String, String>,
}
