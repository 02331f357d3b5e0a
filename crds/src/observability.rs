//! `spec.observability`: how the pods are watched.

// KubeSchema copies each type into a function's body, where `pub` reaches nobody.
#![allow(unreachable_pub)]

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the pods are watched.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObservabilitySpec {
    /// Whether a PodMonitor has Prometheus scrape the pods. `Auto`: where the cluster knows PodMonitors. `PodMonitor`: in any
    /// case; where the cluster does not know them, the condition Accepted says CRDNotInstalled. `None`: no.
    /// Default: `Auto`. Example: `PodMonitor`.
    #[serde(default)]
    pub monitor: MonitorMode,
}

/// Whether a PodMonitor is made.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MonitorMode {
    /// Where the cluster knows PodMonitors.
    #[default]
    Auto,
    /// In any case.
    PodMonitor,
    /// No.
    None,
}
