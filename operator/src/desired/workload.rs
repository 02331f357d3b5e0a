//! A role's workload: which kind it is, and how many replicas it has.

use super::deployment::Deployed;
use super::scope::Scope;
use super::{deployment, front_door, leader_worker_set, settings};
use crate::child::Child;
use crate::plan::WorkloadRole;
use crate::site::OptionalKind;

/// A role's workload in the target revision; none where it would be of a kind that the cluster lacks.
pub(super) fn of_role(scope: &Scope<'_>, role: WorkloadRole) -> Option<Child> {
    let (replicas, nodes) = match settings(scope.model, role) {
        Some(settings) => (settings.replicas.fixed(), settings.nodes_per_replica.get()),
        None => (front_door(scope.model), 1),
    };
    let deployed = Deployed { name: scope.workload(role), role, replicas: replicas.map(|count| count.get()) };
    if nodes == 1 {
        return Some(deployment::deployment(scope, deployed));
    }
    let known = scope.site.kinds.contains(&OptionalKind::LeaderWorkerSet);
    known.then(|| leader_worker_set::leader_worker_set(scope, deployed, nodes))
}
