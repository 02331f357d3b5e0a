//! What every builder is given: the manifest, the installation, the owner and the revision.

use super::{connector, labels, names, settings};
use crate::Validated;
use crate::child::{Child, Kind};
use crate::plan::WorkloadRole;
use crate::site::{Owner, Site};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use serde::Serialize;

/// What every builder is given.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) model: &'a Validated,
    pub(super) site: &'a Site,
    pub(super) owner: &'a Owner,
    pub(super) revision: &'a str,
    /// The routing proxy's `--connector`; none where pods get no proxy.
    pub(super) connector: Option<&'static str>,
}

impl<'a> Scope<'a> {
    pub(super) fn new(model: &'a Validated, site: &'a Site, owner: &'a Owner, revision: &'a str) -> Self {
        Scope { model, site, owner, revision, connector: Some(connector(model.engine.kind)) }
    }

    /// The name of a role's workload.
    pub(super) fn workload(&self, role: WorkloadRole) -> String {
        names::workload(&self.model.name, role, self.revision)
    }

    /// Roles that have workers, and so proxies that know of work.
    pub(super) fn worker_roles(&self) -> impl Iterator<Item = WorkloadRole> + 'a {
        let model = self.model;
        WorkloadRole::ALL.into_iter().filter(move |role| settings(model, *role).is_some())
    }

    /// Metadata of an object that belongs to the model as a whole.
    pub(super) fn of_model(&self, name: String) -> ObjectMeta {
        self.metadata(name, labels::of_model(&self.model.name))
    }

    /// Metadata of an object that belongs to a role, whatever the revision.
    pub(super) fn of_role(&self, name: String, role: WorkloadRole) -> ObjectMeta {
        self.metadata(name, labels::of_role(&self.model.name, role))
    }

    /// Metadata of an object that belongs to one revision of a role.
    pub(super) fn of_revision(&self, name: String, role: WorkloadRole) -> ObjectMeta {
        self.metadata(name, labels::of_revision(&self.model.name, role, self.revision))
    }

    fn metadata(&self, name: String, labels: labels::Labels) -> ObjectMeta {
        let owner = self.owner.uid.clone().map(|uid| OwnerReference {
            api_version: baton_crds::API_VERSION.to_owned(),
            kind: baton_crds::KIND.to_owned(),
            name: self.model.name.clone(),
            uid,
            controller: Some(true),
            block_owner_deletion: Some(true),
        });
        ObjectMeta {
            name: Some(name),
            namespace: Some(self.owner.namespace.clone()).filter(|namespace| !namespace.is_empty()),
            labels: Some(labels),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        }
    }
}

/// A selector of labels.
pub(super) fn selector(labels: labels::Labels) -> LabelSelector {
    LabelSelector { match_labels: Some(labels), match_expressions: None }
}

/// An object as it is applied.
pub(super) fn child(kind: Kind, metadata: &ObjectMeta, body: &impl Serialize) -> Child {
    Child { kind, name: metadata.name.clone().unwrap_or_default(), body: json(body) }
}

/// A typed object as JSON.
pub(super) fn json(body: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(body).expect("Kubernetes types are strings, numbers, lists and maps with text keys")
}
