//! `spec.security`: who may reach the pods.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Who may reach the pods.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecuritySpec {
    /// `Restricted`: a NetworkPolicy lets everyone reach the decode pods' (or the front door's) port 8000 and all pods' port 9090, and only pods of the same model the KV
    /// port. `Disabled`: no NetworkPolicy. Default: `Restricted`. Example: `Disabled`.
    #[serde(default)]
    pub network_policy: NetworkPolicyMode,
}

/// Whether traffic to the pods is restricted.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkPolicyMode {
    /// By a NetworkPolicy.
    #[default]
    Restricted,
    /// Not by us.
    Disabled,
}
