//! `spec.prefill` and `spec.decode`: one role's workers.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::pod::{
    EnvSpec, GpuSpec, PodTemplateOverlay, ResourceClaimSpec, ResourcesSpec, TolerationSpec, TopologySpreadSpec,
    VolumeMountSpec, VolumeSpec,
};
use crate::rules;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One role's workers. What stands here may differ between the roles and their machines.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::REPLICAS_OR_AUTOSCALING)]
#[x_kube(validation = rules::CHUNK_FITS_BATCH)]
#[x_kube(validation = rules::SEQUENCES_FIT_BATCH)]
#[x_kube(validation = rules::GPU_NOT_TWICE)]
#[x_kube(validation = rules::GPU_CLASS_NOT_TWICE)]
#[x_kube(validation = rules::MOUNTS_HAVE_VOLUMES)]
#[serde(rename_all = "camelCase")]
pub struct RoleSpec {
    /// How many replicas of this role run. Default: 1, or what the autoscaler has set. Example: `2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: Option<i32>,
    /// Who else says how many replicas run. Instead of replicas. Default: none. Example: `{provider: External}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingSpec>,
    /// Pods that make one replica together, each on a node of its own: above 1 the role is made of LeaderWorkerSets. Needs
    /// engine type VLLM or SGLang, which compute across pods. Default: `1`. Example: `2`.
    #[serde(default = "default_nodes_per_replica")]
    #[schemars(range(min = 1, max = 64))]
    pub nodes_per_replica: i32,
    /// Memory for one worker's KV cache. A token takes 2 x layers x KV heads x head size x bytes of the dtype: 112 KiB with
    /// Qwen3-0.6B in BF16. Prompts that can never fit are refused. This and the next three: with engine type Baton only.
    /// Default: `1Gi`. Example: `256Mi`.
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
    /// What a voluntary disruption, such as the drain of a node, may take away.
    /// Default: `{maxUnavailable: 1}`. Example: `{maxUnavailable: 2}`.
    #[serde(default)]
    pub disruption: DisruptionSpec,
    /// What the engine container asks of its node, as in a Pod. Default: one CPU, and kvCacheMemory and
    /// 1Gi of memory. Example: `{requests: {cpu: 8, memory: 32Gi}}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourcesSpec>,
    /// GPUs of the engine container, in short: a limit and, for a class, a node's label. Default: none.
    /// Example: `{count: 1, class: NVIDIA-H100-80GB-HBM3}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuSpec>,
    /// Devices by dynamic resource allocation: claims of the pod that the engine container uses. Default: none.
    /// Example: `[{name: gpu, resourceClaimTemplateName: one-gpu}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub resource_claims: Vec<ResourceClaimSpec>,
    /// Labels that a node must have. Default: none. Example: `{node.example.com/pool: gpu}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16), extend("additionalProperties" = {"type": "string", "maxLength": 63, "pattern": rules::LABEL_VALUE_PATTERN}))]
    #[x_kube(validation = rules::LABEL_KEYS)]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that the pods put up with. Default: none.
    /// Example: `[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tolerations: Vec<TolerationSpec>,
    /// How the role's pods are spread over nodes, zones or other places. Default: over nodes, where there is room.
    /// Example: `[{topologyKey: kubernetes.io/hostname}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["topologyKey".into()]))]
    pub topology_spread: Vec<TopologySpreadSpec>,
    /// PriorityClass of the pods. Default: the cluster's. Example: `serving`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SUBDOMAIN_PATTERN))]
    pub priority_class_name: Option<String>,
    /// RuntimeClass of the pods. Default: the cluster's. Example: `nvidia`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SUBDOMAIN_PATTERN))]
    pub runtime_class_name: Option<String>,
    /// Further environment of the engine container. Default: none. Example: `[{name: RUST_LOG, value: info}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Vec<EnvSpec>,
    /// Further volumes of the pods: a name, and a source as in a Pod. Default: none. Example: `[{name: scratch, emptyDir: {}}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub volumes: Vec<VolumeSpec>,
    /// Where the engine container mounts those volumes, as in a Pod. Default: none.
    /// Example: `[{name: scratch, mountPath: /scratch}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["mountPath".into()]))]
    pub volume_mounts: Vec<VolumeMountSpec>,
    /// Laid over the pods last, for what has no field here. Default: none.
    /// Example: `{metadata: {annotations: {example.com/team: serving}}, spec: {schedulerName: volcano}}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_template: Option<PodTemplateOverlay>,
}

impl Default for RoleSpec {
    fn default() -> Self {
        RoleSpec {
            replicas: None,
            autoscaling: None,
            nodes_per_replica: default_nodes_per_replica(),
            kv_cache_memory: default_kv_cache_memory(),
            max_batch_tokens: default_max_batch_tokens(),
            max_sequences: default_max_sequences(),
            prefill_chunk_tokens: default_prefill_chunk_tokens(),
            drain_timeout_seconds: default_drain_timeout_seconds(),
            disruption: DisruptionSpec::default(),
            resources: None,
            gpu: None,
            resource_claims: Vec::new(),
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            topology_spread: Vec::new(),
            priority_class_name: None,
            runtime_class_name: None,
            env: Vec::new(),
            volumes: Vec::new(),
            volume_mounts: Vec::new(),
            pod_template: None,
        }
    }
}

fn default_nodes_per_replica() -> i32 {
    1
}

fn default_kv_cache_memory() -> String {
    rules::DEFAULT_KV_CACHE_MEMORY.to_owned()
}

fn default_max_batch_tokens() -> i32 {
    rules::DEFAULT_MAX_BATCH_TOKENS
}

fn default_max_sequences() -> i32 {
    rules::DEFAULT_MAX_SEQUENCES
}

fn default_prefill_chunk_tokens() -> i32 {
    rules::DEFAULT_PREFILL_CHUNK_TOKENS
}

fn default_drain_timeout_seconds() -> i32 {
    120
}

/// Who else says how many replicas run.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalingSpec {
    /// `External`: whatever scales the role's workload (`status.roles[].workloadRef`), an autoscaler or a person with
    /// `kubectl scale`. The operator starts a new role with 1 replica, a new revision with
    /// as many as there were, and never writes the number again. Required. Example: `External`.
    pub provider: AutoscalingProvider,
}

/// Who scales.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AutoscalingProvider {
    /// Whatever scales the role's workload.
    #[default]
    External,
}

/// What a voluntary disruption may take away.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DisruptionSpec {
    /// Pods of the role that may be missing at once. With 0 no node with such a pod can be drained. Default: `1`. Example: `2`.
    #[serde(default = "default_max_unavailable")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_unavailable: i32,
}

impl Default for DisruptionSpec {
    fn default() -> Self {
        DisruptionSpec { max_unavailable: default_max_unavailable() }
    }
}

fn default_max_unavailable() -> i32 {
    1
}
