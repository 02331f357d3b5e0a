//! Names for pods: the one that clients dial, and those by which proxies find workers.

use super::pod::HTTP_PORT;
use super::scope::{Scope, child};
use super::{labels, names, settings};
use crate::child::{Child, Kind};
use crate::plan::WorkloadRole;
use baton_wire::names::ports;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// The label by which LeaderWorkerSet tells a group's pods apart; its leader has [`LEADER`].
const WORKER_INDEX: &str = "leaderworkerset.sigs.k8s.io/worker-index";
/// The index of a leader.
const LEADER: &str = "0";

/// The Service that clients dial: `entrance`'s pods of the revision that serves, which may be older than the manifest's.
pub(super) fn client(scope: &Scope<'_>, entrance: WorkloadRole, serving: &str) -> Child {
    let metadata = scope.of_model(scope.model.name.clone());
    let service = Service {
        metadata: metadata.clone(),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            selector: Some(labels::select_revision(&scope.model.name, entrance, serving)),
            ports: Some(vec![port()]),
            ..Default::default()
        }),
        ..Default::default()
    };
    child(Kind::Service, &metadata, &service)
}

/// The headless Service of a role of workers. Its pods are found before they are ready, because a proxy is ready only
/// once it has found the workers that it needs, and because a draining worker's KV cache is still fetched.
pub(super) fn peers(scope: &Scope<'_>, role: WorkloadRole) -> Option<Child> {
    let settings = settings(scope.model, role)?;
    let metadata = scope.of_revision(names::peers(&scope.workload(role)), role);
    let mut selector = labels::select_revision(&scope.model.name, role, scope.revision);
    if settings.nodes_per_replica.get() > 1 {
        // Leaders alone have a proxy; without this the name would resolve to all pods of a group.
        selector.insert(WORKER_INDEX.to_owned(), LEADER.to_owned());
    }
    let service = Service {
        metadata: metadata.clone(),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            cluster_ip: Some("None".to_owned()),
            publish_not_ready_addresses: Some(true),
            selector: Some(selector),
            ports: Some(vec![port()]),
            ..Default::default()
        }),
        ..Default::default()
    };
    Some(child(Kind::Service, &metadata, &service))
}

fn port() -> ServicePort {
    ServicePort {
        name: Some(HTTP_PORT.to_owned()),
        port: i32::from(ports::PROXY),
        target_port: Some(IntOrString::String(HTTP_PORT.to_owned())),
        protocol: Some("TCP".to_owned()),
        ..Default::default()
    }
}
