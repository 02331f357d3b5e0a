//! A live workload, as far as decisions look at it.
//!
//! Read without Kubernetes' own types: a Deployment and a LeaderWorkerSet tell the same under different names, and a field
//! that has another type than expected counts as absent instead of stopping everything.

use crate::child::Kind;
use crate::plan::WorkloadRole;
use baton_crds::labels::{REVISION, SERVING_ROLE, WORKLOAD_ROLE};
use serde_json::Value;

/// A live workload, as far as decisions look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Deployment or LeaderWorkerSet.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// What its pods are for.
    pub role: WorkloadRole,
    /// The revision on its label.
    pub revision: String,
    /// Whether its workers need the other role: false where they serve both phases. It tells of an older revision, whose
    /// manifest is gone, which of its roles belong together.
    pub hands_over: bool,
    /// Replicas that are asked for.
    pub desired: u32,
    /// Replicas that are there.
    pub replicas: u32,
    /// Of those, the ones of its newest template.
    pub updated: u32,
    /// Replicas that are ready.
    pub ready: u32,
    /// Replicas that were ready for long enough.
    pub available: u32,
    /// Whether these counts are about the newest spec. Where they are not, they may speak of pods that are about to go.
    pub current: bool,
    /// Whether all replicas were available at once before: a revision that never came up deserves no patience.
    pub proven: bool,
    /// Why its controller can't make pods (quota, admission), in the API server's words.
    pub replica_failure: Option<String>,
}

impl Workload {
    /// Reads a workload; none where the object is of another kind or does not say whose pods it makes.
    pub fn read(kind: Kind, object: &Value) -> Option<Workload> {
        let (template, available) = match kind {
            Kind::Deployment => ("/spec/template", "/status/availableReplicas"),
            Kind::LeaderWorkerSet => ("/spec/leaderWorkerTemplate/workerTemplate", "/status/readyReplicas"),
            Kind::ServiceAccount
            | Kind::Secret
            | Kind::ConfigMap
            | Kind::NetworkPolicy
            | Kind::PodDisruptionBudget
            | Kind::Service
            | Kind::PodMonitor => return None,
        };
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        let serving =
            object.pointer(template).and_then(|template| template["metadata"]["labels"][SERVING_ROLE].as_str());
        let generation = |path: &str| object.pointer(path).and_then(Value::as_i64);
        let generations = (generation("/status/observedGeneration"), generation("/metadata/generation"));
        Some(Workload {
            kind,
            name: object["metadata"]["name"].as_str()?.to_owned(),
            role: WorkloadRole::from_word(label(WORKLOAD_ROLE)?)?,
            revision: label(REVISION)?.to_owned(),
            hands_over: serving != Some(baton_wire::Role::PrefillDecode.as_str()),
            // Kubernetes' own default, for objects that come from somewhere else than a live API.
            desired: count(object, "/spec/replicas").unwrap_or(1),
            replicas: count(object, "/status/replicas").unwrap_or(0),
            updated: count(object, "/status/updatedReplicas").unwrap_or(0),
            ready: count(object, "/status/readyReplicas").unwrap_or(0),
            available: count(object, available).unwrap_or(0),
            current: matches!(generations, (Some(observed), Some(written)) if observed >= written),
            proven: was_complete(kind, object),
            replica_failure: condition(object, "ReplicaFailure")
                .filter(|condition| condition["status"] == "True")
                .map(|condition| condition["message"].as_str().unwrap_or_default().to_owned()),
        })
    }

    /// Whether `wanted` replicas of the newest template, and of no other, take work. Counts that are about an older spec
    /// never say so, and neither do old pods in the place of new ones.
    pub fn is_complete(&self, wanted: u32) -> bool {
        self.current && self.replicas <= self.updated && self.updated >= wanted && self.available >= wanted
    }
}

/// Whether all replicas were available at once before, which both controllers leave behind in their conditions: a Deployment's
/// Progressing keeps its reason NewReplicaSetAvailable when pods stop being ready later, and a LeaderWorkerSet's Available is
/// absent until it is True for the first time.
/// (kubernetes v1.36.3: pkg/controller/deployment/progress.go; lws v0.9.0: pkg/controllers/leaderworkerset_controller.go)
fn was_complete(kind: Kind, object: &Value) -> bool {
    match kind {
        Kind::LeaderWorkerSet => condition(object, "Available").is_some(),
        _ => condition(object, "Progressing").is_some_and(|condition| condition["reason"] == "NewReplicaSetAvailable"),
    }
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object.pointer("/status/conditions")?.as_array()?.iter().find(|condition| condition["type"] == kind)
}

fn count(object: &Value, path: &str) -> Option<u32> {
    object.pointer(path)?.as_u64().map(|count| u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deployment() -> Value {
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": "tiny-decode-aaaaaaaa",
                "generation": 3,
                "labels": {WORKLOAD_ROLE: "decode", REVISION: "aaaaaaaa"},
            },
            "spec": {"replicas": 3, "template": {"metadata": {"labels": {SERVING_ROLE: "decode"}}}},
            "status": {
                "observedGeneration": 3, "replicas": 3, "updatedReplicas": 3, "readyReplicas": 3, "availableReplicas": 2,
                "unavailableReplicas": 1,
                "conditions": [
                    {"type": "Available", "status": "False", "reason": "MinimumReplicasUnavailable"},
                    {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
                ],
            },
        })
    }

    #[test]
    fn a_deployment_is_read() {
        let read = Workload::read(Kind::Deployment, &deployment()).expect("a workload of ours");
        assert_eq!(
            read,
            Workload {
                kind: Kind::Deployment,
                name: "tiny-decode-aaaaaaaa".to_owned(),
                role: WorkloadRole::Decode,
                revision: "aaaaaaaa".to_owned(),
                hands_over: true,
                desired: 3,
                replicas: 3,
                updated: 3,
                ready: 3,
                available: 2,
                current: true,
                proven: true,
                replica_failure: None,
            }
        );
    }

    #[test]
    fn a_leader_worker_set_is_read_by_its_own_names() {
        let object = json!({
            "metadata": {
                "name": "big-prefill-bbbbbbbb", "generation": 1,
                "labels": {WORKLOAD_ROLE: "prefill", REVISION: "bbbbbbbb"},
            },
            "spec": {"replicas": 2, "leaderWorkerTemplate": {"size": 2, "workerTemplate": {"metadata": {"labels": {SERVING_ROLE: "prefill"}}}}},
            "status": {
                "observedGeneration": 1, "replicas": 2, "readyReplicas": 1, "updatedReplicas": 2,
                "conditions": [{"type": "Progressing", "status": "True", "reason": "GroupsProgressing"}],
            },
        });
        let read = Workload::read(Kind::LeaderWorkerSet, &object).expect("a workload of ours");
        assert_eq!((read.desired, read.replicas, read.updated, read.ready, read.available), (2, 2, 2, 1, 1));
        assert!(read.current && read.hands_over && !read.proven);
        let mut later = object;
        later["status"]["conditions"] = json!([{"type": "Available", "status": "False", "reason": "AllGroupsReady"}]);
        assert!(Workload::read(Kind::LeaderWorkerSet, &later).expect("a workload of ours").proven);
    }

    #[test]
    fn counts_before_the_controller_has_seen_the_spec_are_not_current() {
        let mut object = deployment();
        object["metadata"]["generation"] = json!(4);
        assert!(!Workload::read(Kind::Deployment, &object).expect("still a workload").current);
        object["status"] = json!({});
        let fresh = Workload::read(Kind::Deployment, &object).expect("still a workload");
        assert!(!fresh.current && !fresh.proven);
        assert_eq!((fresh.replicas, fresh.available), (0, 0));
    }

    #[test]
    fn a_workload_without_our_labels_or_of_another_kind_is_none() {
        for (pointer, value) in [
            ("/metadata/labels", json!({REVISION: "aaaaaaaa"})),
            ("/metadata/labels", json!({WORKLOAD_ROLE: "decode"})),
            ("/metadata/labels", json!({WORKLOAD_ROLE: "prefill-decode", REVISION: "aaaaaaaa"})),
            ("/metadata/labels", json!(null)),
            ("/metadata/name", json!(7)),
        ] {
            let mut object = deployment();
            *object.pointer_mut(pointer).expect("it is there") = value;
            assert_eq!(Workload::read(Kind::Deployment, &object), None, "{pointer}");
        }
        assert_eq!(Workload::read(Kind::Service, &deployment()), None);
    }

    #[test]
    fn odd_values_count_as_absent() {
        let mut object = deployment();
        object["status"] = json!({"availableReplicas": "2", "replicas": -1, "updatedReplicas": 99_999_999_999u64, "conditions": {"type": "Progressing"}});
        let read = Workload::read(Kind::Deployment, &object).expect("still a workload");
        assert_eq!((read.available, read.replicas, read.updated, read.proven), (0, 0, u32::MAX, false));
    }

    #[test]
    fn a_replica_failure_is_told_only_while_it_lasts() {
        let mut object = deployment();
        let failure = |status: &str| json!([{"type": "ReplicaFailure", "status": status, "reason": "FailedCreate", "message": "pods \"x\" is forbidden: exceeded quota"}]);
        object["status"]["conditions"] = failure("True");
        let read = Workload::read(Kind::Deployment, &object).expect("a workload");
        assert_eq!(read.replica_failure.as_deref(), Some("pods \"x\" is forbidden: exceeded quota"));
        object["status"]["conditions"] = failure("False");
        assert_eq!(Workload::read(Kind::Deployment, &object).expect("a workload").replica_failure, None);
    }

    #[test]
    fn old_pods_and_stale_counts_never_make_a_workload_complete() {
        let complete =
            Workload { available: 3, ..Workload::read(Kind::Deployment, &deployment()).expect("a workload") };
        assert!(complete.is_complete(3));
        assert!(complete.is_complete(2), "more than wanted is being taken down");
        for (what, workload) in [
            ("wanted more", Workload { available: 3, updated: 3, replicas: 3, ..complete.clone() }),
            ("stale", Workload { current: false, available: 4, updated: 4, replicas: 4, ..complete.clone() }),
            ("old pods", Workload { replicas: 5, updated: 1, available: 4, ..complete.clone() }),
            ("old pods beside enough new ones", Workload { replicas: 5, updated: 4, available: 4, ..complete.clone() }),
            ("not available", Workload { replicas: 4, updated: 4, ready: 4, available: 3, ..complete.clone() }),
        ] {
            assert!(!workload.is_complete(4), "{what}");
        }
    }
}
