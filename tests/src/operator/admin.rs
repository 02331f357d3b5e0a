//! An administrator's calls to the API server, one at a time, for threads that are in no runtime.

use crate::kube::{ControlPlane, client_of};
use anyhow::{Context, Result, bail};
use baton_operator::child::Kind;
use http::Request;
use http_body_util::BodyExt as _;
use serde_json::Value;
use std::path::Path;

/// A kind of object, as it is found in URLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Type {
    /// `/api/v1` or `/apis/<group>/<version>`.
    pub root: &'static str,
    /// Name of the resource in URLs.
    pub plural: &'static str,
    /// Whether its objects lie in namespaces.
    pub is_namespaced: bool,
}

const fn of(root: &'static str, plural: &'static str) -> Type {
    Type { root, plural, is_namespaced: true }
}

const fn global(root: &'static str, plural: &'static str) -> Type {
    Type { root, plural, is_namespaced: false }
}

impl Type {
    /// What the operator is about.
    pub const MODEL: Type = of("/apis/baton.dev/v1alpha1", "disaggregatedmodels");
    /// Pods.
    pub const POD: Type = of("/api/v1", "pods");
    /// Secrets.
    pub const SECRET: Type = of("/api/v1", "secrets");
    /// Services.
    pub const SERVICE: Type = of("/api/v1", "services");
    /// ConfigMaps.
    pub const CONFIG_MAP: Type = of("/api/v1", "configmaps");
    /// Claims of volumes.
    pub const CLAIM: Type = of("/api/v1", "persistentvolumeclaims");
    /// Volumes.
    pub const VOLUME: Type = global("/api/v1", "persistentvolumes");
    /// ServiceAccounts.
    pub const SERVICE_ACCOUNT: Type = of("/api/v1", "serviceaccounts");
    /// Limits of a namespace.
    pub const QUOTA: Type = of("/api/v1", "resourcequotas");
    /// What single pods of a namespace may ask for.
    pub const LIMIT_RANGE: Type = of("/api/v1", "limitranges");
    /// Nodes.
    pub const NODE: Type = global("/api/v1", "nodes");
    /// Classes of pods by importance.
    pub const PRIORITY_CLASS: Type = global("/apis/scheduling.k8s.io/v1", "priorityclasses");
    /// Classes of pods by how a node runs them.
    pub const RUNTIME_CLASS: Type = global("/apis/node.k8s.io/v1", "runtimeclasses");
    /// Namespaces.
    pub const NAMESPACE: Type = global("/api/v1", "namespaces");
    /// Events.
    pub const EVENT: Type = of("/apis/events.k8s.io/v1", "events");
    /// Deployments.
    pub const DEPLOYMENT: Type = of("/apis/apps/v1", "deployments");
    /// LeaderWorkerSets.
    pub const LEADER_WORKER_SET: Type = of("/apis/leaderworkerset.x-k8s.io/v1", "leaderworkersets");
    /// Leases.
    pub const LEASE: Type = of("/apis/coordination.k8s.io/v1", "leases");
    /// Rights in a namespace.
    pub const ROLE: Type = of("/apis/rbac.authorization.k8s.io/v1", "roles");
    /// Who has them.
    pub const ROLE_BINDING: Type = of("/apis/rbac.authorization.k8s.io/v1", "rolebindings");
    /// Rights everywhere.
    pub const CLUSTER_ROLE: Type = global("/apis/rbac.authorization.k8s.io/v1", "clusterroles");
    /// Who has them.
    pub const CLUSTER_ROLE_BINDING: Type = global("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings");
    /// Definitions of further kinds.
    pub const DEFINITION: Type = global("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions");

    /// A kind that the operator makes.
    pub const fn of_child(kind: Kind) -> Type {
        match kind {
            Kind::ServiceAccount => Type::SERVICE_ACCOUNT,
            Kind::Secret => Type::SECRET,
            Kind::ConfigMap => Type::CONFIG_MAP,
            Kind::NetworkPolicy => of("/apis/networking.k8s.io/v1", "networkpolicies"),
            Kind::PodDisruptionBudget => of("/apis/policy/v1", "poddisruptionbudgets"),
            Kind::Deployment => Type::DEPLOYMENT,
            Kind::LeaderWorkerSet => Type::LEADER_WORKER_SET,
            Kind::Service => Type::SERVICE,
            Kind::PodMonitor => of("/apis/monitoring.coreos.com/v1", "podmonitors"),
        }
    }

    fn path(self, namespace: &str, name: &str) -> String {
        let collection = if self.is_namespaced && !namespace.is_empty() {
            format!("{}/namespaces/{namespace}/{}", self.root, self.plural)
        } else {
            format!("{}/{}", self.root, self.plural)
        };
        if name.is_empty() { collection } else { format!("{collection}/{name}") }
    }
}

/// Server-side apply under a name of the tests' own.
const FIELD_MANAGER: &str = "tests";

/// Someone who may do everything.
pub struct Admin {
    client: kube::Client,
    runtime: tokio::runtime::Runtime,
}

impl Admin {
    /// The administrator of a cluster.
    ///
    /// # Errors
    /// When its kubeconfig can't be used.
    pub fn new(plane: &ControlPlane) -> Result<Self> {
        Self::with_kubeconfig(plane.kubeconfig())
    }

    /// Somebody else, who may do less.
    ///
    /// # Errors
    /// When the kubeconfig can't be used.
    pub fn with_kubeconfig(kubeconfig: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let client = runtime.block_on(client_of(kubeconfig))?;
        Ok(Admin { client, runtime })
    }

    fn call(&self, method: &str, content: &str, path: String, body: Option<&Value>) -> Result<Value, kube::Error> {
        let bytes = body.map_or_else(Vec::new, |body| body.to_string().into_bytes());
        let mut request = Request::builder().method(method).uri(path);
        if body.is_some() {
            request = request.header(http::header::CONTENT_TYPE, content);
        }
        let request = request.body(bytes).expect("method and path are ours");
        self.runtime.block_on(self.client.request::<Value>(request))
    }

    /// One object; none where there is none.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn get(&self, kind: Type, namespace: &str, name: &str) -> Result<Option<Value>> {
        match self.call("GET", "", kind.path(namespace, name), None) {
            Ok(object) => Ok(Some(object)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(error).with_context(|| format!("get {} {namespace}/{name}", kind.plural)),
        }
    }

    /// One object that is there.
    ///
    /// # Errors
    /// When it is not, or the API server refuses.
    pub fn need(&self, kind: Type, namespace: &str, name: &str) -> Result<Value> {
        self.get(kind, namespace, name)?.with_context(|| format!("no {} {namespace}/{name}", kind.plural))
    }

    /// Objects of a kind, of one namespace or (where it is empty) of all, with these labels.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn list(&self, kind: Type, namespace: &str, selector: &str) -> Result<Vec<Value>> {
        let selector = selector.replace('=', "%3D").replace(',', "%2C");
        let path = format!("{}?labelSelector={selector}", kind.path(namespace, ""));
        let mut list = self.call("GET", "", path, None).with_context(|| format!("list {}", kind.plural))?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Ok(Vec::new()),
        }
    }

    /// Makes an object.
    ///
    /// # Errors
    /// What the API server says.
    pub fn create(&self, kind: Type, namespace: &str, object: &Value) -> Result<Value, kube::Error> {
        self.call("POST", "application/json", kind.path(namespace, ""), Some(object))
    }

    /// Replaces an object.
    ///
    /// # Errors
    /// What the API server says.
    pub fn replace(&self, kind: Type, namespace: &str, object: &Value) -> Result<Value, kube::Error> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        self.call("PUT", "application/json", kind.path(namespace, name), Some(object))
    }

    /// Server-side apply, as a pipeline does it.
    ///
    /// # Errors
    /// What the API server says.
    pub fn apply(&self, kind: Type, namespace: &str, object: &Value) -> Result<Value, kube::Error> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let path = format!("{}?fieldManager={FIELD_MANAGER}&force=true", kind.path(namespace, name));
        self.call("PATCH", "application/apply-patch+yaml", path, Some(object))
    }

    /// A merge patch of an object, or of one of its subresources.
    ///
    /// # Errors
    /// What the API server says.
    pub fn merge(
        &self,
        kind: Type,
        namespace: &str,
        name: &str,
        subresource: &str,
        patch: &Value,
    ) -> Result<Value, kube::Error> {
        let mut path = kind.path(namespace, name);
        if !subresource.is_empty() {
            path = format!("{path}/{subresource}");
        }
        self.call("PATCH", "application/merge-patch+json", path, Some(patch))
    }

    /// Deletes an object; what it owns goes with it, later. That there is none is no error.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn delete(&self, kind: Type, namespace: &str, name: &str) -> Result<()> {
        match self.call("DELETE", "", kind.path(namespace, name), None) {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(error).with_context(|| format!("delete {} {namespace}/{name}", kind.plural)),
        }
    }

    /// Any request, by path.
    ///
    /// # Errors
    /// What the API server says.
    pub fn raw(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, kube::Error> {
        self.call(method, "application/json", path.to_owned(), body)
    }
    /// Asks what would become of a new object, without making it; the API server's warnings.
    ///
    /// # Errors
    /// When the API server would refuse it, with its words.
    pub fn try_create(&self, kind: Type, namespace: &str, object: &Value) -> Result<Vec<String>> {
        let path = format!("{}?dryRun=All&fieldValidation=Strict", kind.path(namespace, ""));
        let request = Request::post(path)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(kube::client::Body::from(object.to_string().into_bytes()))?;
        self.runtime.block_on(async {
            let answer = self.client.send(request).await?;
            let warnings = answer.headers().get_all(http::header::WARNING).iter();
            let warnings = warnings.map(|warning| String::from_utf8_lossy(warning.as_bytes()).into_owned()).collect();
            if answer.status().is_success() {
                return Ok(warnings);
            }
            let said = answer.into_body().collect().await?.to_bytes();
            bail!("{}", String::from_utf8_lossy(&said))
        })
    }
}
