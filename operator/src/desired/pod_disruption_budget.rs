//! How many pods of a role a voluntary disruption may take at once.

use super::scope::{Scope, child, selector};
use super::{labels, names, settings};
use crate::child::{Child, Kind};
use crate::plan::WorkloadRole;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// Front doors that a drained node may take at once: they are alike and start within seconds.
const FRONT_DOORS_UNAVAILABLE_MAX: u32 = 1;

/// A role's budget, over all its revisions: while one takes another's place, the pods of both count.
pub(super) fn of_role(scope: &Scope<'_>, role: WorkloadRole) -> Child {
    let max_unavailable =
        settings(scope.model, role).map_or(FRONT_DOORS_UNAVAILABLE_MAX, |settings| settings.max_unavailable);
    let metadata = scope.of_role(names::role(&scope.model.name, role), role);
    let budget = PodDisruptionBudget {
        metadata: metadata.clone(),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(i32::try_from(max_unavailable).unwrap_or(i32::MAX))),
            selector: Some(selector(labels::select_role(&scope.model.name, role))),
            // A pod that never becomes ready serves nobody, so it may not keep a node from being drained.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..Default::default()
        }),
        ..Default::default()
    };
    child(Kind::PodDisruptionBudget, &metadata, &budget)
}
