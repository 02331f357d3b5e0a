//! `spec.routing`: where clients' requests enter, and how proxies find the workers.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where clients' requests enter, and how routing proxies find the workers.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(validation = rules::STANDALONE_WITH_MODE)]
#[serde(rename_all = "camelCase")]
pub struct RoutingSpec {
    /// `Sidecar`: clients reach the routing proxy beside each decode worker. `Standalone`: they reach a routing proxy of its
    /// own in front of all workers, which then decides for all of them. Default: `Sidecar`. Example: `Standalone`.
    #[serde(default)]
    pub mode: RoutingMode,
    /// With mode Standalone: the routing proxies in front. Refused with Sidecar. Default: 1 replica. Example: `{replicas: 2}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standalone: Option<StandaloneSpec>,
    /// How routing proxies find the model's pods. `DNS`: by the names of headless Services, looked up each second.
    /// `EndpointSlices`: also by watching those at the API server, which tells of new pods at once. For it each role's
    /// ServiceAccount must be given the right to list and watch endpointslices in the namespace, and the routing proxy's container
    /// alone gets a token of it. Default: `DNS`. Example: `EndpointSlices`.
    #[serde(default)]
    pub discovery: DiscoveryMode,
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

/// How routing proxies find the model's pods.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiscoveryMode {
    /// By the names of headless Services.
    #[default]
    #[serde(rename = "DNS")]
    Dns,
    /// By those, and by watching EndpointSlices at the API server.
    EndpointSlices,
}

/// The routing proxies in front of all workers.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StandaloneSpec {
    /// How many of them run. Default: `1`. Example: `2`.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 1, max = 100))]
    pub replicas: i32,
}

impl Default for StandaloneSpec {
    fn default() -> Self {
        StandaloneSpec { replicas: default_replicas() }
    }
}

fn default_replicas() -> i32 {
    1
}
