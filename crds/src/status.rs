//! `status` of a [`DisaggregatedModel`](crate::DisaggregatedModel): what the operator last saw.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Most entries of `status.lastErrors`: one for each of the ways in which a rollout usually fails, within one screen.
pub const LAST_ERRORS_MAX: usize = 5;
/// Longest message of an entry of `status.lastErrors`, in characters: a panic's text or the end of a stack, not a log.
pub const LAST_ERROR_CHARS_MAX: usize = 1024;
/// Longest message of a condition, in characters, as `metav1.Condition` has it.
pub const CONDITION_CHARS_MAX: usize = 32_768;

/// What the operator last saw. Written by the operator alone.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DisaggregatedModelStatus {
    /// The generation of the manifest that the rest of the status is about. Smaller than metadata.generation: the operator has
    /// not come to the last change yet. Default: none. Example: `4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991i64))]
    pub observed_generation: Option<i64>,
    /// What is so and why, one entry a type: Accepted, ModelAvailable, PrefillReady, DecodeReady, RoutingReady, Progressing,
    /// Ready, and Stalled while nothing happens until a person acts. docs/conditions.md lists every reason with its remedy.
    /// Default: none. Example: `[{type: Ready, status: "False", reason: EngineStarting, ...}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,
    /// Where clients enter, within the cluster. Default: none. Example: `http://tiny.default.svc:8000`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub url: Option<String>,
    /// The revision that serves: 8 hexadecimal digits, the end of its workloads' names and the value of their label
    /// baton.dev/revision. Default: none. Example: `7f3a9c12`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub revision: Option<String>,
    /// The revision that the manifest asks for, while another one still serves. Default: none. Example: `1b2c3d4e`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub update_revision: Option<String>,
    /// The roles' workloads in numbers, one entry a role. Default: none.
    /// Example: `[{name: decode, desiredReplicas: 2, replicas: 2, readyReplicas: 1, ...}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub roles: Vec<RoleStatus>,
    /// The roles in words, for the columns of `kubectl get`. Default: none. Example: `{prefill: 1/1, decode: 2/2}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<StatusSummary>,
    /// How far the slowest download of the model is, while there is one. Default: none.
    /// Example: `{percent: 43, bytesDone: 461373440, bytesTotal: 1073741824, pod: qwen-decode-7f3a9c12-0}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download: Option<ModelDownload>,
    /// The last words of containers that failed, newest first, at most 5. Default: none.
    /// Example: `[{role: decode, container: engine, reason: EngineCrashLooping, message: "kvCacheMemory ...", ...}]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 5))]
    pub last_errors: Vec<LastError>,
}

/// One role's workloads in numbers. In a rollout they are counted over all revisions.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoleStatus {
    /// The role: prefill, decode or proxy. Required. Example: `decode`.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Replicas that are wanted: the manifest's number, or what an autoscaler has set. Default: `0`. Example: `2`.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub desired_replicas: i32,
    /// Replicas that exist. Default: `0`. Example: `2`.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub replicas: i32,
    /// Replicas of the wanted revision. Default: `0`. Example: `2`.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub updated_replicas: i32,
    /// Replicas that take work. Default: `0`. Example: `1`.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub ready_replicas: i32,
    /// Replicas that have taken work for as long as the workload asks. Default: `0`. Example: `1`.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub available_replicas: i32,
    /// The pods that count as replicas, as a label selector; of a replica of several pods, the first. Default: none.
    /// Example: `baton.dev/model=tiny,baton.dev/workload-role=decode,baton.dev/revision=7f3a9c12`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,
    /// The workload of the revision that serves. An autoscaler scales this one. Default: none.
    /// Example: `{apiVersion: apps/v1, kind: Deployment, name: tiny-decode-7f3a9c12}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload_ref: Option<WorkloadRef>,
}

/// A workload in the model's namespace.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadRef {
    /// Group and version of the workload's API. Required. Example: `apps/v1`.
    #[schemars(length(min = 1, max = 253))]
    pub api_version: String,
    /// Kind of the workload. Required. Example: `Deployment`.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// Name of the workload. Required. Example: `tiny-decode-7f3a9c12`.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// The roles in words: ready of desired replicas.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusSummary {
    /// Ready of desired prefill replicas; absent where none is needed. Default: none. Example: `1/1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub prefill: Option<String>,
    /// Ready of desired decode replicas. Default: none. Example: `2/2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub decode: Option<String>,
}

/// How far a download of the model is.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ModelDownload {
    /// Bytes that have arrived. Default: `0`. Example: `461373440`.
    #[serde(default)]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991i64))]
    pub bytes_done: i64,
    /// Bytes of the whole, once the source has told. Default: none. Example: `1073741824`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 9_007_199_254_740_991i64))]
    pub bytes_total: Option<i64>,
    /// The same as a share of a hundred. Default: none. Example: `43`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// The pod whose download this is. Required. Example: `qwen-decode-7f3a9c12-5d9f4-x2x7p`.
    #[schemars(length(min = 1, max = 253))]
    pub pod: String,
}

/// The last words of a container that failed.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastError {
    /// The role whose pod it was. Required. Example: `decode`.
    #[schemars(length(min = 1, max = 63))]
    pub role: String,
    /// The pod, if there was one. Default: none. Example: `tiny-decode-7f3a9c12-5d9f4-x2x7p`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pod: Option<String>,
    /// The container, if one had started. Default: none. Example: `engine`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub container: Option<String>,
    /// Why, as the conditions say it. Required. Example: `EngineCrashLooping`.
    #[schemars(length(min = 1, max = 63))]
    pub reason: String,
    /// What the container wrote last, or what Kubernetes says; at most 1024 characters. Required.
    /// Example: `engine: KV cache of 128 MiB holds no sequence of 8192 tokens: raise kvCacheMemory`.
    #[schemars(length(max = 1024))]
    pub message: String,
    /// When it was. Required. Example: `2026-01-30T08:15:00Z`.
    #[schemars(schema_with = "time_schema")]
    pub time: Time,
}

/// A moment, as Kubernetes writes it.
fn time_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "format": "date-time"})
}

/// `metav1.Condition` with its own limits; Kubernetes' type in Rust has none.
fn conditions_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "description": "One thing that is so or not, and why.",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": {
                    "type": "string", "maxLength": 316,
                    "description": "What it is about. Required. Example: `Ready`.",
                    "pattern": "^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$",
                },
                "status": {
                    "type": "string", "enum": ["True", "False", "Unknown"],
                    "description": "Whether it is so. Required. Example: `True`.",
                },
                "observedGeneration": {
                    "type": "integer", "format": "int64", "minimum": 0,
                    "description": "The generation of the manifest that it is about. Default: none. Example: `4`.",
                },
                "reason": {
                    "type": "string", "minLength": 1, "maxLength": 1024,
                    "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                    "description": "Why, in one word of a closed list. Required. Example: `AllRolesReady`.",
                },
                "message": {
                    "type": "string", "maxLength": CONDITION_CHARS_MAX,
                    "description": "Why, for people. Required. Example: `prefill 1/1, decode 2/2`.",
                },
                "lastTransitionTime": {
                    "type": "string", "format": "date-time",
                    "description": "Since when `status` is what it is. Required. Example: `2026-01-30T08:15:00Z`.",
                },
            },
        },
    })
}
