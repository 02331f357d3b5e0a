//! A role whose replicas are single pods.

use super::labels;
use super::pod::{Part, template};
use super::scope::{Scope, child, json, selector};
use crate::child::{Child, Kind};
use crate::plan::WorkloadRole;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A workload's name, role and size.
pub(super) struct Deployed {
    pub(super) name: String,
    pub(super) role: WorkloadRole,
    /// None where somebody else says: the field is then left out, and so never taken from them.
    pub(super) replicas: Option<u32>,
}

impl Deployed {
    /// Replicas as Kubernetes counts them.
    pub(super) fn count(&self) -> Option<i32> {
        self.replicas.map(|count| i32::try_from(count).unwrap_or(i32::MAX))
    }
}

/// A Deployment.
pub(super) fn deployment(scope: &Scope<'_>, deployed: Deployed) -> Child {
    let role = deployed.role;
    let replicas = deployed.count();
    let metadata = scope.of_revision(deployed.name, role);
    let deployment = Deployment {
        metadata: metadata.clone(),
        spec: DeploymentSpec {
            replicas,
            selector: selector(labels::select_revision(&scope.model.name, role, scope.revision)),
            // Within a revision pods change only when the proxy's image or a drain timeout do: capacity never falls.
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_unavailable: Some(IntOrString::Int(0)),
                    max_surge: Some(IntOrString::String("25%".to_owned())),
                }),
            }),
            // The way back is the manifest's: a ReplicaSet that the operator would undo again helps nobody.
            revision_history_limit: Some(0),
            ..DeploymentSpec::default()
        },
        ..Deployment::default()
    };
    let mut made = child(Kind::Deployment, &metadata, &json(&deployment));
    made.body["spec"]["template"] = template(scope, role, Part::Leader);
    made
}
