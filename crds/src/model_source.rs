//! `spec.model`: which model is served, where it comes from, and under which name.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use crate::scalar::Amount;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which model is served, where it comes from, and under which name.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::REVISION_WITH_HF)]
#[x_kube(validation = rules::CREDENTIALS_NOT_WITH_CLAIM)]
#[x_kube(validation = rules::ENDPOINT_WITH_DOWNLOAD)]
#[x_kube(validation = rules::REGION_WITH_S3)]
#[x_kube(validation = rules::CACHE_WITH_DOWNLOAD)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Where the model directory is (config.json, safetensors, tokenizer.json), as model hubs publish it. `pvc://CLAIM/PATH` is
    /// a path on a PersistentVolumeClaim in the same namespace; `baton up` looks for a directory named like the claim
    /// beside the manifest, or where `--volume CLAIM=DIR` says. `hf://ORG/REPO` and `s3://BUCKET/PREFIX` are downloaded before
    /// the engine starts. `oci://IMAGE:TAG` or `oci://IMAGE@DIGEST` is mounted as an image volume. The scheme can't be changed.
    /// Required. Example: `pvc://models/tiny`.
    #[schemars(length(min = 7, max = 512))]
    #[x_kube(validation = rules::MODEL_URI)]
    #[x_kube(validation = rules::MODEL_SCHEME_STAYS)]
    pub uri: String,
    /// With hf://: the branch, tag or commit that is downloaded. Pin a commit: a branch moves, and pods that start later would
    /// then serve another model than those beside them. Default: the repository's default branch.
    /// Example: `9c925d64d72725edaf899c6cb9c377fd0709d9c5`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(validation = rules::REVISION)]
    pub revision: Option<String>,
    /// The model's name towards clients: `model` in their requests, and what `/v1/models` lists.
    /// Default: metadata.name. Example: `Qwen/Qwen3-0.6B`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(validation = rules::SERVED_NAME)]
    pub served_name: Option<String>,
    /// Secret in the same namespace with which the model is fetched. hf://: key `HF_TOKEN`. s3://: keys `AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY` and, if there is one, `AWS_SESSION_TOKEN`. oci://: a Secret of type
    /// kubernetes.io/dockerconfigjson. Refused with pvc://. Default: none, so the model is public. Example: `{name: hf-token}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretRef>,
    /// With hf:// and s3://: address of the service, where it is not the public one. Default: the public service.
    /// Example: `https://minio.storage.svc:9000`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 512))]
    #[x_kube(validation = rules::ENDPOINT)]
    pub endpoint: Option<String>,
    /// With s3://: region of the bucket. Default: us-east-1, which the download says. Example: `eu-central-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = rules::LABEL_PATTERN))]
    pub region: Option<String>,
    /// With hf:// and s3://: where the downloaded files are kept. Default: with each pod, in an emptyDir.
    /// Example: `{type: PersistentVolumeClaim, claimName: model-cache}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheSpec>,
}

/// A Secret in the model's namespace.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Name of the Secret. Required. Example: `hf-token`.
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SUBDOMAIN_PATTERN))]
    pub name: String,
}

/// Where downloaded files are kept.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::CLAIM_NAME_WITH_CLAIM)]
#[x_kube(validation = rules::SIZE_LIMIT_WITH_EMPTY_DIR)]
#[serde(rename_all = "camelCase")]
pub struct CacheSpec {
    /// `EmptyDir`: with the pod, so each pod downloads. `PersistentVolumeClaim`: on a volume that pods share, so the second
    /// pod finds what the first has downloaded. Default: `EmptyDir`. Example: `PersistentVolumeClaim`.
    #[serde(default, rename = "type")]
    pub type_: CacheType,
    /// Claim of the volume, in the same namespace; ReadWriteMany where pods run on several nodes. Required with
    /// PersistentVolumeClaim, refused otherwise. Default: none. Example: `model-cache`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = rules::SUBDOMAIN_PATTERN))]
    pub claim_name: Option<String>,
    /// With EmptyDir: most that the files may take; a pod that takes more is evicted. Default: none, so the node's disk.
    /// Example: `40Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<Amount>,
}

/// Where downloaded files are kept.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// With the pod.
    #[default]
    EmptyDir,
    /// On a volume that pods share.
    PersistentVolumeClaim,
}
