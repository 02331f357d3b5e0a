//! The objects that a model owns: their kinds, in the order in which they are written, and one object as it is wanted.

use serde_json::Value;
use std::marker::PhantomData;

/// A kind of object that a model may own, in the order of writing: what others refer to comes first, and what makes clients
/// see a new revision comes after the workloads. Pruning goes the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// What pods run as.
    ServiceAccount,
    /// Keys and certificates.
    Secret,
    /// What proxies read while they run.
    ConfigMap,
    /// Who may dial whom.
    NetworkPolicy,
    /// How many pods a drained node may take.
    PodDisruptionBudget,
    /// A role whose replicas are single pods.
    Deployment,
    /// A role whose replicas span nodes.
    LeaderWorkerSet,
    /// Names for pods.
    Service,
    /// Who is scraped.
    PodMonitor,
}

impl Kind {
    /// Every kind, in the order of writing.
    pub const ALL: [Kind; 9] = [
        Kind::ServiceAccount,
        Kind::Secret,
        Kind::ConfigMap,
        Kind::NetworkPolicy,
        Kind::PodDisruptionBudget,
        Kind::Deployment,
        Kind::LeaderWorkerSet,
        Kind::Service,
        Kind::PodMonitor,
    ];

    /// `kind` as Kubernetes spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::ServiceAccount => "ServiceAccount",
            Kind::Secret => "Secret",
            Kind::ConfigMap => "ConfigMap",
            Kind::NetworkPolicy => "NetworkPolicy",
            Kind::PodDisruptionBudget => "PodDisruptionBudget",
            Kind::Deployment => "Deployment",
            Kind::LeaderWorkerSet => "LeaderWorkerSet",
            Kind::Service => "Service",
            Kind::PodMonitor => "PodMonitor",
        }
    }

    /// API group; empty for the core group.
    pub const fn group(self) -> &'static str {
        match self {
            Kind::ServiceAccount | Kind::Secret | Kind::ConfigMap | Kind::Service => "",
            Kind::NetworkPolicy => "networking.k8s.io",
            Kind::PodDisruptionBudget => "policy",
            Kind::Deployment => "apps",
            Kind::LeaderWorkerSet => "leaderworkerset.x-k8s.io",
            Kind::PodMonitor => "monitoring.coreos.com",
        }
    }

    /// `apiVersion`.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => "v1".to_owned(),
            group => format!("{group}/v1"),
        }
    }

    /// Name of the resource in URLs.
    pub const fn plural(self) -> &'static str {
        match self {
            Kind::ServiceAccount => "serviceaccounts",
            Kind::Secret => "secrets",
            Kind::ConfigMap => "configmaps",
            Kind::NetworkPolicy => "networkpolicies",
            Kind::PodDisruptionBudget => "poddisruptionbudgets",
            Kind::Deployment => "deployments",
            Kind::LeaderWorkerSet => "leaderworkersets",
            Kind::Service => "services",
            Kind::PodMonitor => "podmonitors",
        }
    }

    /// Whether a cluster may lack the kind.
    pub const fn is_optional(self) -> bool {
        match self {
            Kind::LeaderWorkerSet | Kind::PodMonitor => true,
            Kind::ServiceAccount
            | Kind::Secret
            | Kind::ConfigMap
            | Kind::NetworkPolicy
            | Kind::PodDisruptionBudget
            | Kind::Deployment
            | Kind::Service => false,
        }
    }
}

/// One object that a model owns, as it is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Child {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// The whole object for server-side apply: exactly the fields that are ours.
    pub body: Value,
}

/// Objects that are wanted but not written yet.
#[derive(Clone, Copy, Debug)]
pub struct Planned;

/// Objects of which each was written, or stood as wanted already.
#[derive(Clone, Copy, Debug)]
pub struct Applied;

/// A model's objects, by kind and name. A status is computed from `Objects<Applied>` alone, so that none speaks of objects
/// that were not written.
#[derive(Clone, Debug, PartialEq)]
pub struct Objects<State> {
    children: Vec<Child>,
    state: PhantomData<State>,
}

impl<State> Objects<State> {
    /// The objects, by kind (in the order of writing) and name.
    pub fn children(&self) -> &[Child] {
        &self.children
    }

    /// Whether an object of this kind and name is among them.
    pub fn contains(&self, kind: Kind, name: &str) -> bool {
        self.children.iter().any(|child| child.kind == kind && child.name == name)
    }
}

impl Objects<Planned> {
    /// Sorts objects into the order of writing.
    pub fn new(mut children: Vec<Child>) -> Self {
        children.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        Objects { children, state: PhantomData }
    }

    /// Says which of them stand in the cluster; `apply` alone says so.
    pub(crate) fn applied(mut self, stands: impl Fn(&Child) -> bool) -> Objects<Applied> {
        self.children.retain(stands);
        Objects { children: self.children, state: PhantomData }
    }
}
