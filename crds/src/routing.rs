//! `spec.routing`: where clients' requests enter.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use crate::rules;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where clients' requests enter.
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
