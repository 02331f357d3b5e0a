//! What is asked of the API server, as JSON: objects keep every field, also those that this version has no type for.

use crate::child::Kind;
use crate::site::OptionalKind;
use crate::watched::Watched;
use baton_crds::DisaggregatedModel;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta;
use kube::api::{DeleteParams, GetParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::{ApiResource, ObjectMeta, Request};
use kube::{Client, Error};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::Duration;

/// Who owns the fields that we apply.
pub const MANAGER: &str = "baton-operator";
/// Who owns the replicas of a workload that somebody else scales, until somebody does.
pub const SEED_MANAGER: &str = "baton-operator-seed";

/// Longest wait for an answer about which kinds there are: an API server whose node went silently never answers.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(10);

/// Objects of a page of a list. A model has fewer of each kind, so this bounds what a broken label costs.
const PAGE: u32 = 500;

/// A resource of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
}

impl Resource {
    /// The models themselves.
    pub const MODELS: Resource =
        Resource { group: "baton.dev", version: "v1alpha1", kind: baton_crds::KIND, plural: "disaggregatedmodels" };
    /// Pods.
    pub const PODS: Resource = Resource { group: "", version: "v1", kind: "Pod", plural: "pods" };
    /// Volumes' claims.
    pub const CLAIMS: Resource =
        Resource { group: "", version: "v1", kind: "PersistentVolumeClaim", plural: "persistentvolumeclaims" };

    /// An owned kind's.
    pub const fn of(kind: Kind) -> Resource {
        Resource { group: kind.group(), version: "v1", kind: kind.as_str(), plural: kind.plural() }
    }

    /// Its name in URLs.
    pub const fn plural(self) -> &'static str {
        self.plural
    }

    /// As kube names it.
    pub fn api_resource(self) -> ApiResource {
        ApiResource {
            group: self.group.to_owned(),
            version: self.version.to_owned(),
            api_version: self.api_version(),
            kind: self.kind.to_owned(),
            plural: self.plural.to_owned(),
        }
    }

    fn api_version(self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }

    fn request(self, namespace: &str) -> Request {
        let root = if self.group.is_empty() { "api" } else { "apis" };
        Request::new(format!("/{root}/{}/namespaces/{namespace}/{}", self.api_version(), self.plural))
    }
}

/// The cluster that is worked on.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Page<T> {
    #[serde(default)]
    metadata: ListMeta,
    items: Vec<T>,
}

impl Cluster {
    /// The cluster behind a client.
    pub fn new(client: Client) -> Self {
        Cluster { client }
    }

    /// The client.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// All objects with a label, as the API server has them now. Whole or an error: nobody may take a piece for the list.
    ///
    /// # Errors
    /// When a page can't be had.
    pub async fn list<T: DeserializeOwned>(
        &self,
        resource: Resource,
        namespace: &str,
        selector: &str,
    ) -> Result<Vec<T>, Error> {
        let mut items = Vec::new();
        let mut params = ListParams::default().labels(selector).limit(PAGE);
        loop {
            let request = resource.request(namespace).list(&params).map_err(Error::BuildRequest)?;
            let page: Page<T> = self.client.request(request).await?;
            items.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(items),
            }
        }
    }

    /// One object, if it is there.
    ///
    /// # Errors
    /// When the API server says neither.
    pub async fn get(&self, resource: Resource, namespace: &str, name: &str) -> Result<Option<Value>, Error> {
        let request = resource.request(namespace).get(name, &GetParams::default()).map_err(Error::BuildRequest)?;
        found(self.client.request(request).await)
    }

    /// Whether an object is there, without its contents.
    ///
    /// # Errors
    /// When the API server says neither.
    pub async fn exists(&self, resource: Resource, namespace: &str, name: &str) -> Result<bool, Error> {
        let request =
            resource.request(namespace).get_metadata(name, &GetParams::default()).map_err(Error::BuildRequest)?;
        found(self.client.request::<serde::de::IgnoredAny>(request).await).map(|found| found.is_some())
    }

    /// Applies an object's fields as a manager's, and returns the object as it then stands.
    ///
    /// # Errors
    /// When the API server refuses it, or does not answer.
    pub async fn apply(
        &self,
        resource: Resource,
        namespace: &str,
        name: &str,
        body: &Value,
        manager: &str,
    ) -> Result<Value, Error> {
        let params = PatchParams::apply(manager).force().validation_strict();
        let request =
            resource.request(namespace).patch(name, &params, &Patch::Apply(body)).map_err(Error::BuildRequest)?;
        self.client.request(request).await
    }

    /// Makes an object that is not there. Unlike an apply, it never lands on one that somebody else has made in between.
    ///
    /// # Errors
    /// When there is one of that name, or the API server refuses it, or does not answer.
    pub async fn create(
        &self,
        resource: Resource,
        namespace: &str,
        body: &Value,
        manager: &str,
    ) -> Result<Value, Error> {
        let params = PostParams { field_manager: Some(manager.to_owned()), ..PostParams::default() };
        let body = serde_json::to_vec(body).map_err(Error::SerdeError)?;
        let request = resource.request(namespace).create(&params, body).map_err(Error::BuildRequest)?;
        self.client.request(request).await
    }

    /// Applies a model's status, and returns the model's metadata as they then stand.
    ///
    /// # Errors
    /// When the API server refuses it, or does not answer.
    pub async fn apply_status(&self, namespace: &str, name: &str, body: &Value) -> Result<ObjectMeta, Error> {
        let params = PatchParams::apply(MANAGER).force().validation_strict();
        let request = Resource::MODELS
            .request(namespace)
            .patch_subresource("status", name, &params, &Patch::Apply(body))
            .map_err(Error::BuildRequest)?;
        // The answer is the whole model, of which a part may be what nobody can parse.
        self.client.request::<Watched<DisaggregatedModel>>(request).await.map(|model| model.metadata)
    }

    /// Merges a patch into a model's status, and returns the model's metadata as they then stand: for a model that server-side apply
    /// refuses, because some part of it is not as its definition wants it.
    ///
    /// # Errors
    /// When the API server refuses it, or does not answer.
    pub async fn merge_status(&self, namespace: &str, name: &str, patch: &Value) -> Result<ObjectMeta, Error> {
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let request = Resource::MODELS
            .request(namespace)
            .patch_subresource("status", name, &params, &Patch::Merge(patch))
            .map_err(Error::BuildRequest)?;
        self.client.request::<Watched<DisaggregatedModel>>(request).await.map(|model| model.metadata)
    }

    /// Deletes exactly that object in exactly that version; one that is gone already is fine.
    ///
    /// # Errors
    /// When it is another one by now, or the API server refuses or does not answer.
    pub async fn delete(
        &self,
        resource: Resource,
        namespace: &str,
        name: &str,
        only: Preconditions,
    ) -> Result<(), Error> {
        let params = DeleteParams { preconditions: Some(only), ..DeleteParams::background() };
        let request = resource.request(namespace).delete(name, &params).map_err(Error::BuildRequest)?;
        found(self.client.request::<Value>(request).await).map(|_| ())
    }

    /// The optional kinds that the cluster has now.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn optional_kinds(&self) -> Result<BTreeSet<OptionalKind>, Error> {
        let groups = bounded(self.client.list_api_groups()).await?;
        let served: BTreeSet<&str> = groups
            .groups
            .iter()
            .flat_map(|group| group.versions.iter().map(|version| version.group_version.as_str()))
            .collect();
        let mut kinds = BTreeSet::new();
        for kind in OptionalKind::ALL {
            let (_, group_version, plural) = kind.names();
            if served.contains(group_version) && self.serves(group_version, plural).await? {
                kinds.insert(kind);
            }
        }
        Ok(kinds)
    }

    /// Whether the cluster knows `DisaggregatedModel`.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn knows_models(&self) -> Result<bool, Error> {
        self.serves(baton_crds::API_VERSION, Resource::MODELS.plural).await
    }

    async fn serves(&self, group_version: &str, plural: &str) -> Result<bool, Error> {
        let resources = found(bounded(self.client.list_api_group_resources(group_version)).await)?;
        Ok(resources.is_some_and(|list| list.resources.iter().any(|resource| resource.name == plural)))
    }
}

/// An answer about the API itself, within a time: who asks waits for nothing else.
async fn bounded<T>(answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(DISCOVERY_TIMEOUT, answer).await.unwrap_or_else(|late| Err(Error::Service(late.into())))
}

/// An answer of which "not found" is one.
fn found<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(Error::Api(status)) if status.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}
