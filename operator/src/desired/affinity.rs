//! How near each other the workers of both roles are put.

use super::scope::Scope;
use crate::plan::WorkloadRole;
use baton_crds::labels::WORKLOAD_ROLE;
use k8s_openapi::api::core::v1::{Affinity, PodAffinity, PodAffinityTerm, WeightedPodAffinityTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// The weight of the only preference that we state: the most that Kubernetes takes.
const WEIGHT: i32 = 100;

/// Draws a worker to where workers of its own revision, of either role, run already. Both roles and not the other alone: a pod
/// that matches its own term may go first, so that where it is required the first pod does not wait for a second.
pub(super) fn near_other_roles(scope: &Scope<'_>) -> Option<Affinity> {
    let colocation = scope.model.colocation.as_ref()?;
    let mut selector = super::scope::selector(super::labels::select_model(&scope.model.name));
    if let LabelSelector { match_labels: Some(labels), .. } = &mut selector {
        labels.insert(baton_crds::labels::REVISION.to_owned(), scope.revision.to_owned());
    }
    let workers = [WorkloadRole::Prefill, WorkloadRole::Decode].map(|role| role.as_str().to_owned());
    selector.match_expressions = Some(vec![LabelSelectorRequirement {
        key: WORKLOAD_ROLE.to_owned(),
        operator: "In".to_owned(),
        values: Some(workers.to_vec()),
    }]);
    let term = PodAffinityTerm {
        topology_key: colocation.topology_key.clone(),
        label_selector: Some(selector),
        ..PodAffinityTerm::default()
    };
    let pod_affinity = if colocation.required {
        PodAffinity { required_during_scheduling_ignored_during_execution: Some(vec![term]), ..PodAffinity::default() }
    } else {
        PodAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![WeightedPodAffinityTerm {
                weight: WEIGHT,
                pod_affinity_term: term,
            }]),
            ..PodAffinity::default()
        }
    };
    Some(Affinity { pod_affinity: Some(pod_affinity), ..Affinity::default() })
}
