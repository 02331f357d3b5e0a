//! What is to be done next with what is there: decided from the manifest and what was observed, without reading or writing.

pub mod rollout;
pub mod workload;

pub use baton_crds::labels::WorkloadRole;
pub use workload::Workload;

use crate::observed::Observed;
use crate::site::{Owner, Site};
use crate::validated::{Replicas, Routing};
use crate::{Validated, desired, revision};
use std::collections::{BTreeMap, BTreeSet};

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The revision that the manifest means: its objects are written.
    pub target: String,
    /// The revision whose pods clients reach: the target, or one of `keep`.
    pub serving: String,
    /// The role of that revision whose pods clients reach: `Proxy` once its front door is available, `Decode` until then and
    /// where it has none. Not read from the manifest, because the serving revision may be older and have no front door.
    pub entrance: WorkloadRole,
    /// Other revisions whose objects stay as they are: the serving one, and the one that clients still reach because the
    /// client Service was not moved yet. What is in neither is removed.
    pub keep: BTreeSet<String>,
    /// For each role that somebody else scales: the count at which a new workload starts, so that a new revision is not
    /// born smaller than the one it replaces.
    pub seed_replicas: BTreeMap<WorkloadRole, u32>,
}

impl Plan {
    /// The plan for a model of which nothing exists.
    pub fn first(model: &Validated, site: &Site) -> Plan {
        rollout::plan(model, &revision(model, &site.worker_image), &[], None)
    }
}

/// What to do next. What `owner` does not control counts for nothing.
pub fn plan(model: &Validated, site: &Site, owner: &Owner, observed: &Observed) -> Plan {
    let workloads = observed.workloads(&model.name, owner);
    rollout::plan(
        model,
        &revision(model, &site.worker_image),
        &workloads,
        observed.selected(&model.name, owner).as_ref(),
    )
}

/// Who says how many replicas a role has; none where the manifest means no such role.
pub fn replicas(model: &Validated, role: WorkloadRole) -> Option<Replicas> {
    if !desired::roles(model).contains(&role) {
        return None;
    }
    match (desired::settings(model, role), model.routing) {
        (Some(settings), _) => Some(settings.replicas),
        (None, Routing::Standalone { replicas }) => Some(Replicas::Fixed(replicas)),
        (None, Routing::Sidecar) => None,
    }
}

/// How many replicas of a role are wanted: the manifest's number, or what somebody else has set on the workload.
pub fn wanted(replicas: Replicas, workload: Option<&Workload>) -> u32 {
    match replicas {
        Replicas::Fixed(count) => count.get(),
        Replicas::External => workload.map_or(SEED_REPLICAS_MIN, |workload| workload.desired),
    }
}

/// Least count at which a workload starts that somebody else scales. Not 0, even where the revision before it is scaled to
/// zero: clients would be moved to a revision of which no pod ever ran, and a HorizontalPodAutoscaler stands still at 0.
pub const SEED_REPLICAS_MIN: u32 = 1;
