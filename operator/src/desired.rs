//! A manifest to the objects that it means: pure and total, the same input gives the same bytes.
//!
//! One file per kind of object. Nothing in here fails (everything that could was checked by `validate`), reads a clock or
//! draws a number: keys and certificates come in with the arguments. docs/objects.md tells the same to people.

mod affinity;
mod config_map;
mod deployment;
mod engine;
pub mod labels;
mod leader_worker_set;
mod model_volume;
pub mod names;
mod network_policy;
mod overlay;
mod pod;
mod pod_disruption_budget;
mod pod_monitor;
mod proxy;
mod resources;
mod scope;
mod secret;
mod service;
mod service_account;
mod standing;
#[cfg(test)]
mod tests;
mod workload;

pub use standing::{Standing, standing_objects, standing_workload};

use crate::child::{Objects, Planned};
use crate::credentials::Credentials;
use crate::plan::{Plan, WorkloadRole};
use crate::site::{OptionalKind, Owner, Site};
use crate::validated::{EngineKind, Monitor, Routing};
use crate::{RoleSettings, Validated};
use scope::Scope;
use std::collections::BTreeSet;

/// The objects of the plan's target revision, and the ones that all revisions share.
///
/// A kind that the cluster lacks is left out: [`needs`] tells which were wanted. Replicas are left out of workloads that
/// somebody else scales.
pub fn desired(
    model: &Validated,
    site: &Site,
    owner: &Owner,
    plan: &Plan,
    credentials: &Credentials,
) -> Objects<Planned> {
    let scope = Scope::new(model, site, owner, &plan.target);
    let mut children = Vec::new();
    for role in roles(model) {
        children.push(service_account::of_role(&scope, role));
        children.push(pod_disruption_budget::of_role(&scope, role));
        children.extend(workload::of_role(&scope, role));
        children.extend(network_policy::of_role(&scope, role));
        children.extend(service::peers(&scope, role));
        children.extend(secret::certificate(&scope, role, credentials));
    }
    children.push(config_map::routing(&scope));
    children.push(secret::signing_key(&scope, credentials));
    children.push(secret::signing_public(&scope, credentials));
    children.push(secret::authority(&scope, credentials));
    children.push(service::client(&scope, plan.entrance, &plan.serving));
    children.extend(pod_monitor::of_model(&scope));
    Objects::new(children)
}

/// Roles for which a manifest means a workload.
pub fn roles(model: &Validated) -> Vec<WorkloadRole> {
    let prefill = model.disaggregation.prefill().map(|_| WorkloadRole::Prefill);
    let proxy = front_door(model).map(|_| WorkloadRole::Proxy);
    prefill.into_iter().chain([WorkloadRole::Decode]).chain(proxy).collect()
}

/// The settings of a role of workers; the front door has none of its own.
pub fn settings(model: &Validated, role: WorkloadRole) -> Option<&RoleSettings> {
    match role {
        WorkloadRole::Prefill => model.disaggregation.prefill(),
        WorkloadRole::Decode => Some(&model.decode),
        WorkloadRole::Proxy => None,
    }
}

/// The role whose pods a new model's clients reach.
pub fn entrance(model: &Validated) -> WorkloadRole {
    if front_door(model).is_some() { WorkloadRole::Proxy } else { WorkloadRole::Decode }
}

/// Kinds that a cluster may lack, and without which the manifest can't be followed in full.
pub fn needs(model: &Validated) -> BTreeSet<OptionalKind> {
    let spans_nodes = |settings: &RoleSettings| settings.nodes_per_replica.get() > 1;
    let mut kinds = BTreeSet::new();
    if WorkloadRole::ALL.into_iter().filter_map(|role| settings(model, role)).any(spans_nodes) {
        kinds.insert(OptionalKind::LeaderWorkerSet);
    }
    match model.monitor {
        Monitor::Required => _ = kinds.insert(OptionalKind::PodMonitor),
        Monitor::Auto | Monitor::None => {}
    }
    kinds
}

/// What the routing proxy's `--connector` is for an engine: the protocol by which KV is handed over.
fn connector(engine: EngineKind) -> &'static str {
    match engine {
        EngineKind::Baton => "baton",
        EngineKind::Vllm => "vllm-nixl",
        EngineKind::Sglang => "sglang",
    }
}

/// Replicas of the front door, where there is one.
fn front_door(model: &Validated) -> Option<std::num::NonZeroU32> {
    match model.routing {
        Routing::Standalone { replicas } => Some(replicas),
        Routing::Sidecar => None,
    }
}
