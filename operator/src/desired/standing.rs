//! The same objects for manifests that stand in a repository: without an operator, an owner and a namespace.

use super::deployment::Deployed;
use super::scope::Scope;
use super::{
    config_map, deployment, entrance, leader_worker_set, network_policy, pod_disruption_budget, pod_monitor, roles,
    service, service_account,
};
use crate::child::{Child, Objects, Planned};
use crate::plan::WorkloadRole;
use crate::site::{Owner, Site};
use crate::{Validated, revision};

/// How a workload in a repository departs from the one that an operator makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Its name.
    pub name: String,
    /// What its pods are for.
    pub role: WorkloadRole,
    /// How many replicas; a base has none, and components raise it.
    pub replicas: u32,
    /// Pods of a replica, for a LeaderWorkerSet (1 will do: a leader alone); none for a Deployment.
    pub group_size: Option<u32>,
    /// Whether pods have the routing proxy. Without it the engine listens to all, under the same port name.
    pub routing_proxy: bool,
}

/// A workload for a repository. Its Secrets (`<name>-signing-key`, `<name>-signing-public`) are the user's to make.
pub fn standing_workload(model: &Validated, site: &Site, standing: &Standing) -> Child {
    let revision = revision(model, &site.worker_image);
    let owner = nobody();
    let mut scope = Scope::new(model, site, &owner, &revision);
    if !standing.routing_proxy {
        scope.connector = None;
    }
    let deployed = Deployed { name: standing.name.clone(), role: standing.role, replicas: Some(standing.replicas) };
    match standing.group_size {
        None => deployment::deployment(&scope, deployed),
        Some(size) => leader_worker_set::leader_worker_set(&scope, deployed, size),
    }
}

/// Everything around the workloads, Secrets left out: accounts, budgets, policies, Services, configuration, and a PodMonitor
/// where `site.kinds` has that kind. With the routing proxy in the pods, or without it.
pub fn standing_objects(model: &Validated, site: &Site, routing_proxy: bool) -> Objects<Planned> {
    let revision = revision(model, &site.worker_image);
    let owner = nobody();
    let mut scope = Scope::new(model, site, &owner, &revision);
    if !routing_proxy {
        scope.connector = None;
    }
    let mut children = vec![config_map::routing(&scope), service::client(&scope, entrance(model), &revision)];
    children.extend(pod_monitor::of_model(&scope));
    for role in roles(model) {
        children.push(service_account::of_role(&scope, role));
        children.push(pod_disruption_budget::of_role(&scope, role));
        children.extend(network_policy::of_role(&scope, role));
        children.extend(service::peers(&scope, role));
    }
    Objects::new(children)
}

fn nobody() -> Owner {
    Owner { namespace: String::new(), uid: None }
}
