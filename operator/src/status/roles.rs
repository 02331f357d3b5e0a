//! How many replicas of each role there are.
//!
//! Counted over the revision that the manifest means and the one that serves, as a Deployment counts over its ReplicaSets: only
//! `updatedReplicas` is about the former alone. What is wanted is said of the former too.

use super::Seen;
use crate::child::Kind;
use crate::desired::{self, labels};
use crate::plan::{self, Workload, WorkloadRole};
use baton_crds::{RoleStatus, StatusSummary, WorkloadRef};

/// The label by which a LeaderWorkerSet numbers the pods of a replica; 0 is the leader, which stands for the replica.
const WORKER_INDEX: &str = "leaderworkerset.sigs.k8s.io/worker-index";

/// One entry for each role that is wanted or still there.
pub(super) fn roles(seen: &Seen<'_>) -> Vec<RoleStatus> {
    let wanted = desired::roles(seen.model);
    let there = |role: WorkloadRole| counted(seen, role).next().is_some();
    WorkloadRole::ALL
        .into_iter()
        .filter(|role| wanted.contains(role) || there(*role))
        .map(|role| role_status(seen, role))
        .collect()
}

/// Ready of wanted replicas, for the columns of `kubectl get`.
pub(super) fn summary(seen: &Seen<'_>) -> StatusSummary {
    let of = |role| {
        let present = plan::replicas(seen.model, role).is_some();
        let status = role_status(seen, role);
        present.then(|| format!("{}/{}", status.ready_replicas, status.desired_replicas))
    };
    StatusSummary { prefill: of(WorkloadRole::Prefill), decode: of(WorkloadRole::Decode) }
}

/// The same as a sentence.
pub(super) fn in_words(seen: &Seen<'_>) -> String {
    let words: Vec<_> = roles(seen)
        .iter()
        .map(|role| format!("{} {}/{}", role.name, role.ready_replicas, role.desired_replicas))
        .collect();
    words.join(", ")
}

fn role_status(seen: &Seen<'_>, role: WorkloadRole) -> RoleStatus {
    let sum = |count: fn(&Workload) -> u32| whole(counted(seen, role).map(count).fold(0, u32::saturating_add));
    let target = seen.of_target(role);
    let serving = seen.of_revision(&seen.plan.serving).find(|workload| workload.role == role).or(target);
    let wanted = plan::replicas(seen.model, role).map_or(0, |replicas| plan::wanted(replicas, target));
    RoleStatus {
        name: role.as_str().to_owned(),
        desired_replicas: whole(wanted),
        replicas: sum(|workload| workload.replicas),
        updated_replicas: whole(target.map_or(0, |workload| workload.updated)),
        ready_replicas: sum(|workload| workload.ready),
        available_replicas: sum(|workload| workload.available),
        selector: serving.map(|workload| selector(seen, workload)),
        workload_ref: serving.map(|workload| WorkloadRef {
            api_version: workload.kind.api_version(),
            kind: workload.kind.as_str().to_owned(),
            name: workload.name.clone(),
        }),
    }
}

fn counted<'a>(seen: &Seen<'a>, role: WorkloadRole) -> impl Iterator<Item = &'a Workload> + use<'a> {
    let plan = seen.plan;
    let counts = move |revision: &String| *revision == plan.target || *revision == plan.serving;
    seen.workloads.iter().filter(move |workload| workload.role == role && counts(&workload.revision))
}

fn selector(seen: &Seen<'_>, workload: &Workload) -> String {
    let labels = labels::select_revision(&seen.model.name, workload.role, &workload.revision);
    let leader = (workload.kind == Kind::LeaderWorkerSet).then(|| (WORKER_INDEX.to_owned(), "0".to_owned()));
    let pairs: Vec<_> = labels.into_iter().chain(leader).map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(",")
}

fn whole(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
