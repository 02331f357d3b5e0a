//! Definitions of the kinds that a cluster may lack, for tests in which it has them, or gets them.

use crate::kube::ControlPlane;
use anyhow::{Context as _, Result};
use serde_json::json;
use std::path::Path;

/// LeaderWorkerSet's own definition, without its controller: objects are stored, and nothing acts on them.
///
/// # Errors
/// When it is not beside the test cluster's programs.
pub fn leader_worker_set(plane: &ControlPlane) -> Result<String> {
    let kubectl = plane.command("kubectl");
    let programs = Path::new(kubectl.get_program()).parent().context("programs lie in a folder")?;
    let path = programs.join("lws-manifests/leaderworkerset.x-k8s.io_leaderworkersets.yaml");
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// A definition of PodMonitor under its real name that takes any spec: what Prometheus Operator makes of one is not tested.
pub fn pod_monitor() -> String {
    let any = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "podmonitors.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": "PodMonitor", "listKind": "PodMonitorList", "plural": "podmonitors", "singular": "podmonitor"},
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": any}}},
            }],
        },
    })
    .to_string()
}
