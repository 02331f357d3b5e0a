//! A request to the Kubernetes API as access rules see it: verb, resource, namespace and name, read from method, path and query.

use http::{Method, Uri};

/// What a request does, in the words of access rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// Reads one object, or a path that is no resource.
    Get,
    /// Reads all objects of a kind.
    List,
    /// Follows changes.
    Watch,
    /// Makes an object.
    Create,
    /// Replaces an object.
    Update,
    /// Changes an object; also how server-side apply makes one.
    Patch,
    /// Deletes one object.
    Delete,
    /// Deletes all objects of a kind.
    DeleteCollection,
}

impl Verb {
    /// As access rules spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Verb::Get => "get",
            Verb::List => "list",
            Verb::Watch => "watch",
            Verb::Create => "create",
            Verb::Update => "update",
            Verb::Patch => "patch",
            Verb::Delete => "delete",
            Verb::DeleteCollection => "deletecollection",
        }
    }

    const fn is_write(self) -> bool {
        match self {
            Verb::Create | Verb::Update | Verb::Patch | Verb::Delete | Verb::DeleteCollection => true,
            Verb::Get | Verb::List | Verb::Watch => false,
        }
    }
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ApiRequest {
    /// What it does.
    pub verb: Verb,
    /// API group; empty for the core group.
    pub group: String,
    /// Plural of the kind; empty for a path that is no resource, such as discovery.
    pub resource: String,
    /// `status`, `scale`, ...; empty for the object itself.
    pub subresource: String,
    /// Empty for what lies in no namespace, and for all namespaces at once.
    pub namespace: String,
    /// Empty for all objects of a kind.
    pub name: String,
    /// Path and query as they were sent.
    pub target: String,
}

impl ApiRequest {
    /// Reads a request's line.
    pub fn read(method: &Method, uri: &Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        let parts: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
        let (group, rest) = match parts.as_slice() {
            ["api", _version, rest @ ..] => ("", rest),
            ["apis", group, _version, rest @ ..] => (*group, rest),
            _ => ("", [].as_slice()),
        };
        let (namespace, rest) = match rest {
            // A namespace is an object itself where nothing, or a subresource of its own, follows.
            ["namespaces", _, "status" | "finalize"] => ("", rest),
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let at = |index: usize| (*rest.get(index).unwrap_or(&"")).to_owned();
        let (resource, name) = (at(0), at(1));
        let asks = |key: &str| query.split('&').any(|pair| pair == format!("{key}=true") || pair == format!("{key}=1"));
        let verb = match (method.as_str(), name.is_empty()) {
            ("POST", _) => Verb::Create,
            ("PUT", _) => Verb::Update,
            ("PATCH", _) => Verb::Patch,
            ("DELETE", false) => Verb::Delete,
            ("DELETE", true) => Verb::DeleteCollection,
            (_, _) if !resource.is_empty() && asks("watch") => Verb::Watch,
            (_, true) if !resource.is_empty() => Verb::List,
            (_, _) => Verb::Get,
        };
        ApiRequest {
            verb,
            group: group.to_owned(),
            resource,
            subresource: at(2),
            namespace: namespace.to_owned(),
            name,
            target: uri.path_and_query().map_or_else(|| uri.path().to_owned(), ToString::to_string),
        }
    }

    /// Whether it changes what is stored. A dry run does not.
    pub fn is_write(&self) -> bool {
        self.verb.is_write() && !self.target.contains("dryRun=")
    }

    /// Whether it is about a Lease: writes there are made by the clock and say nothing of what is reconciled.
    pub fn is_lease(&self) -> bool {
        self.resource == "leases"
    }

    /// Whether it records an event.
    pub fn is_event(&self) -> bool {
        self.resource == "events"
    }

    /// The resource as access rules spell it: `pods`, `pods/status`.
    pub fn resource_and_subresource(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.clone()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }

    /// What tells one list from another: the path and the selectors, not the version or the page.
    pub(crate) fn list_key(&self) -> String {
        let (path, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
        let selectors = query.split('&').filter(|pair| pair.contains("Selector="));
        std::iter::once(path).chain(selectors).collect::<Vec<_>>().join("?")
    }

    /// Whether it asks for the next page of a list.
    pub(crate) fn continues(&self) -> bool {
        self.target.contains("continue=")
    }
}

impl std::fmt::Display for ApiRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.resource.is_empty() {
            return write!(f, "{} {}", self.verb.as_str(), self.target);
        }
        write!(f, "{} {}", self.verb.as_str(), self.resource_and_subresource())?;
        match (self.namespace.as_str(), self.name.as_str()) {
            ("", "") => Ok(()),
            ("", name) => write!(f, " {name}"),
            (namespace, name) => write!(f, " {namespace}/{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(method: &str, target: &str) -> String {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        ApiRequest::read(&method, &target.parse().expect("a target")).to_string()
    }

    #[test]
    fn requests_are_read_as_access_rules_name_them() {
        for (method, target, means) in [
            ("GET", "/api/v1/namespaces/a/pods", "list pods a/"),
            ("GET", "/api/v1/pods?watch=true&x=1", "watch pods"),
            ("GET", "/api/v1/namespaces/a/pods/p", "get pods a/p"),
            ("PATCH", "/apis/apps/v1/namespaces/a/deployments/d?fieldManager=m", "patch deployments a/d"),
            (
                "PATCH",
                "/apis/baton.dev/v1alpha1/namespaces/a/disaggregatedmodels/m/status",
                "patch disaggregatedmodels/status a/m",
            ),
            ("POST", "/apis/events.k8s.io/v1/namespaces/a/events", "create events a/"),
            ("PUT", "/apis/coordination.k8s.io/v1/namespaces/a/leases/l", "update leases a/l"),
            ("DELETE", "/api/v1/namespaces/a/services/s", "delete services a/s"),
            ("DELETE", "/api/v1/namespaces/a/services", "deletecollection services a/"),
            ("GET", "/api/v1/namespaces/a", "get namespaces a"),
            ("GET", "/api/v1/namespaces", "list namespaces"),
            ("GET", "/apis", "get /apis"),
            ("GET", "/apis/apps/v1", "get /apis/apps/v1"),
            ("GET", "/version", "get /version"),
        ] {
            assert_eq!(read(method, target), means, "{method} {target}");
        }
    }

    #[test]
    fn a_dry_run_is_no_write() {
        let of = |target: &str| ApiRequest::read(&Method::PATCH, &target.parse().expect("a target")).is_write();
        assert!(of("/api/v1/namespaces/a/services/s?fieldManager=m"));
        assert!(!of("/api/v1/namespaces/a/services/s?dryRun=All"));
    }
}
