//! Who may dial a worker: the KV port and a prefill worker's HTTP port are for the model's own pods.
//!
//! The client port (a decode worker's 8000) and the admin port (9090: metrics, progress) stay open to all: a policy that the
//! operator makes can't know which namespaces clients and scrapers live in, and one that guessed would cut them off. The
//! engine's 8200 is open to nobody outside the model: Baton's engine listens on loopback, and another engine, which has to
//! answer the kubelet at the pod's address, would take anybody's requests around the proxy. The kubelet of the pod's own node
//! gets through every policy.
//!
//! With another engine the model's own pods may dial each other at every port. vLLM's side channel (5600 and one more for each
//! data-parallel rank) and SGLang's bootstrap server (8998) have fixed ones, but what follows has not: UCX over TCP, SGLang's
//! ranks and the processes of a group listen on ports that the system draws, Mooncake draws its own, and a decode engine of
//! SGLang's may ask a prefill engine's HTTP port. Ranges around 8200 (`endPort`) were rejected: a network plugin that does not
//! know them opens their first port alone, and the handover would fail without a word.
//!
//! Nothing is said about what pods may dial: models come from wherever the manifest says. A pod that is selected has only the
//! ports that some policy opens; a port that a podTemplate adds needs a NetworkPolicy of its own, and policies add up.

use super::scope::{Scope, child, selector};
use super::{labels, names};
use crate::child::{Child, Kind};
use crate::plan::WorkloadRole;
use crate::validated::EngineKind;
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
    let metadata = scope.of_role(names::role(&scope.model.name, role), role);
    let policy = NetworkPolicy {
        metadata: metadata.clone(),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(selector(labels::select_role(&scope.model.name, role))),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress(scope, role)),
            ..Default::default()
        }),
    };
    Some(child(Kind::NetworkPolicy, &metadata, &policy))
}

fn ingress(scope: &Scope<'_>, role: WorkloadRole) -> Vec<NetworkPolicyIngressRule> {
    let (open, own): (&[u16], &[u16]) = match (scope.connector, role) {
        // Without a proxy, whoever routes to these engines is the user's own, and dials both roles.
        (None, _) => (&[ports::ENGINE, ports::ADMIN], &[ports::KV]),
        (Some(_), WorkloadRole::Prefill) => (&[ports::ADMIN], &[ports::PROXY, ports::KV]),
        (Some(_), WorkloadRole::Decode) => (&[ports::PROXY, ports::ADMIN], &[ports::KV]),
        (Some(_), WorkloadRole::Proxy) => (&[ports::PROXY, ports::ADMIN], &[]),
    };
    let everybody = NetworkPolicyIngressRule { from: None, ports: Some(open.iter().map(|port| tcp(*port)).collect()) };
    // A rule without ports opens all of them.
    let own = match (role, scope.model.engine.kind) {
        (WorkloadRole::Proxy, _) => None,
        (WorkloadRole::Prefill | WorkloadRole::Decode, EngineKind::Baton) => {
            Some(Some(own.iter().map(|port| tcp(*port)).collect()))
        }
        (WorkloadRole::Prefill | WorkloadRole::Decode, EngineKind::Vllm | EngineKind::Sglang) => Some(None),
    };
    let own_pods = own.map(|ports| NetworkPolicyIngressRule {
        from: Some(vec![peer(labels::select_model(&scope.model.name))]),
        ports,
    });
    [everybody].into_iter().chain(own_pods).collect()
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
