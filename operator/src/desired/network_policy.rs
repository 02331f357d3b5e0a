//! Who may dial a worker: the KV port and a prefill worker's HTTP port are for the model's own pods.
//!
//! The client port (a decode worker's 8000) and the admin port (9090: metrics, progress) stay open to all: a policy that the
//! operator makes can't know which namespaces clients and scrapers live in, and one that guessed would cut them off. The
//! engine's 8200 is bound to loopback beside a proxy, so no rule opens it. Nothing is said about what pods may dial: models
//! come from wherever the manifest says. A pod that is selected has only the ports that some policy opens; a port that a
//! podTemplate adds needs a NetworkPolicy of its own, and policies add up.

use super::scope::{Scope, child, selector};
use super::{labels, names, settings};
use crate::RoleSettings;
use crate::child::{Child, Kind};
use crate::plan::WorkloadRole;
use baton_wire::names::ports;
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A role's policy. The front door has one too, although both of its ports are open to all: in a namespace that denies what no
/// policy opens it would be closed.
pub(super) fn of_role(scope: &Scope<'_>, role: WorkloadRole) -> Option<Child> {
    if !scope.model.network_policy {
        return None;
    }
    let settings = settings(scope.model, role);
    let metadata = scope.of_role(names::role(&scope.model.name, role), role);
    let policy = NetworkPolicy {
        metadata: metadata.clone(),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(selector(labels::select_role(&scope.model.name, role))),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress(scope, role, settings)),
            ..Default::default()
        }),
    };
    Some(child(Kind::NetworkPolicy, &metadata, &policy))
}

fn ingress(scope: &Scope<'_>, role: WorkloadRole, settings: Option<&RoleSettings>) -> Vec<NetworkPolicyIngressRule> {
    let (open, own): (&[u16], &[u16]) = match (scope.connector, role) {
        // Without a proxy, whoever routes to these engines is the user's own, and dials both roles.
        (None, _) => (&[ports::ENGINE, ports::ADMIN], &[ports::KV]),
        (Some(_), WorkloadRole::Prefill) => (&[ports::ADMIN], &[ports::PROXY, ports::KV]),
        (Some(_), WorkloadRole::Decode) => (&[ports::PROXY, ports::ADMIN], &[ports::KV]),
        (Some(_), WorkloadRole::Proxy) => (&[ports::PROXY, ports::ADMIN], &[]),
    };
    let everybody = NetworkPolicyIngressRule { from: None, ports: Some(open.iter().map(|port| tcp(*port)).collect()) };
    // A rule without ports would open all of them.
    let own_pods = (!own.is_empty()).then(|| NetworkPolicyIngressRule {
        from: Some(vec![peer(labels::select_model(&scope.model.name))]),
        ports: Some(own.iter().map(|port| tcp(*port)).collect()),
    });
    // The pods of a group compute together over ports that their engine draws.
    let group = settings.is_some_and(|settings| settings.nodes_per_replica.get() > 1).then(|| {
        NetworkPolicyIngressRule { from: Some(vec![peer(labels::select_role(&scope.model.name, role))]), ports: None }
    });
    [everybody].into_iter().chain(own_pods).chain(group).collect()
}

fn peer(labels: labels::Labels) -> NetworkPolicyPeer {
    NetworkPolicyPeer { pod_selector: Some(selector(labels)), ..Default::default() }
}

fn tcp(port: u16) -> NetworkPolicyPort {
    NetworkPolicyPort {
        port: Some(IntOrString::Int(i32::from(port))),
        protocol: Some("TCP".to_owned()),
        ..Default::default()
    }
}
