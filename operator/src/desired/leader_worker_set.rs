//! A role whose replicas span nodes: each is a group of pods, of which the leader has the proxy and is dialled.

use super::deployment::Deployed;
use super::pod::{Part, template};
use super::scope::{Scope, child, json};
use crate::child::{Child, Kind};
use serde_json::json;

/// A LeaderWorkerSet, by the names of its v1 API.
pub(super) fn leader_worker_set(scope: &Scope<'_>, deployed: Deployed, nodes: u32) -> Child {
    let role = deployed.role;
    let replicas = deployed.count();
    let metadata = scope.of_revision(deployed.name, role);
    let mut spec = json!({
        // As with a Deployment, capacity never falls.
        "rolloutStrategy": {
            "type": "RollingUpdate",
            "rollingUpdateConfiguration": {"maxUnavailable": 0, "maxSurge": 1},
        },
        "startupPolicy": "LeaderCreated",
        "leaderWorkerTemplate": {
            "size": nodes,
            // Pods that compute together can't go on with one of them new.
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": template(scope, role, Part::Leader),
            "workerTemplate": template(scope, role, Part::Follower),
        },
    });
    if let Some(replicas) = replicas {
        spec["replicas"] = replicas.into();
    }
    let set = json!({
        "apiVersion": Kind::LeaderWorkerSet.api_version(),
        "kind": Kind::LeaderWorkerSet.as_str(),
        "metadata": json(&metadata),
        "spec": spec,
    });
    child(Kind::LeaderWorkerSet, &metadata, &set)
}
