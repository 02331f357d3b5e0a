//! What `--discover-endpoint-slices` says: the Services whose endpoints are asked for, and the API server that knows them.

use crate::address::Address;
use std::path::PathBuf;

/// Letters of a namespace, a Service or a port: a DNS label's.
const LABEL_CHARS_MAX: usize = 63;

/// Services whose EndpointSlices list the model's proxies.
#[derive(Clone, Debug)]
pub struct EndpointSlices {
    /// Each is watched by itself.
    pub services: Vec<ServicePort>,
    /// Who is asked.
    pub api: ApiServer,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The Service's namespace; the pod's own where nothing was given.
    pub namespace: Option<String>,
    /// Its name.
    pub service: String,
    /// Its port's name; where nothing was given, the Service has one port.
    pub port: Option<String>,
}

/// The API server, and the service account that asks it.
#[derive(Clone, Debug)]
pub struct ApiServer {
    /// Where it is.
    pub address: Address,
    /// Folder with `token`, `ca.crt` and `namespace`.
    pub account: PathBuf,
}

/// Flags that name no Service, or nobody who knows it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointSlicesError {
    /// A Service that is none.
    #[error("--discover-endpoint-slices is [NAMESPACE/]SERVICE[:PORT_NAME], found {found:?}")]
    Service {
        /// What was given.
        found: String,
    },
    /// A process outside of a cluster.
    #[error(
        "--discover-endpoint-slices needs KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT, which every container of a pod has"
    )]
    NoApiServer,
    /// The variables say no address.
    #[error("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are no address: {found:?}")]
    ApiServer {
        /// Both together.
        found: String,
    },
}

impl EndpointSlices {
    /// Nothing where no Service was given: then nothing else of it matters.
    ///
    /// # Errors
    /// See [`EndpointSlicesError`].
    pub(super) fn of(
        services: Vec<String>,
        account: PathBuf,
        host: Option<String>,
        port: Option<String>,
    ) -> Result<Option<Self>, EndpointSlicesError> {
        if services.is_empty() {
            return Ok(None);
        }
        let services = services.iter().map(|service| service.parse()).collect::<Result<_, _>>()?;
        let (host, port) = host.zip(port).ok_or(EndpointSlicesError::NoApiServer)?;
        // The variable has an IPv6 address without brackets.
        let found = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let address = found.parse().map_err(|_| EndpointSlicesError::ApiServer { found })?;
        Ok(Some(EndpointSlices { services, api: ApiServer { address, account } }))
    }
}

impl std::str::FromStr for ServicePort {
    type Err = EndpointSlicesError;

    fn from_str(text: &str) -> Result<Self, EndpointSlicesError> {
        let (namespace, rest) = match text.split_once('/') {
            Some((namespace, rest)) => (Some(namespace), rest),
            None => (None, text),
        };
        let (service, port) = match rest.split_once(':') {
            Some((service, port)) => (service, Some(port)),
            None => (rest, None),
        };
        // Checked, because the Service's name becomes part of a selector, and the namespace part of a path.
        if ![namespace, Some(service), port].into_iter().flatten().all(is_label) {
            return Err(EndpointSlicesError::Service { found: text.to_owned() });
        }
        Ok(ServicePort {
            namespace: namespace.map(str::to_owned),
            service: service.to_owned(),
            port: port.map(str::to_owned),
        })
    }
}

impl std::fmt::Display for ServicePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.service)?;
        self.port.as_ref().map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

fn is_label(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let ends = |c: char| c != '-';
    (1..=LABEL_CHARS_MAX).contains(&text.len())
        && text.chars().all(plain)
        && text.starts_with(ends)
        && text.ends_with(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_may_come_with_a_namespace_and_a_port() {
        let check = |text: &str, expect: (Option<&str>, &str, Option<&str>)| {
            let found: ServicePort = text.parse().expect("a Service");
            assert_eq!((found.namespace.as_deref(), found.service.as_str(), found.port.as_deref()), expect, "{text}");
            assert_eq!(found.to_string(), text);
        };
        check("tiny-peers", (None, "tiny-peers", None));
        check("tiny-peers:http", (None, "tiny-peers", Some("http")));
        check("team/tiny-peers", (Some("team"), "tiny-peers", None));
        check("team/tiny-peers:http", (Some("team"), "tiny-peers", Some("http")));
        let long = "a".repeat(64);
        for text in
            ["", "/", "a/", "/a", "a:", ":a", "a/b/c", "a:b:c", "A", "a,b", "a=b", "-a", "a-", "a b", "..", &long]
        {
            let wrong = EndpointSlicesError::Service { found: text.to_owned() };
            assert_eq!(text.parse::<ServicePort>(), Err(wrong), "{text:?}");
        }
    }

    #[test]
    fn the_api_server_is_where_the_pods_variables_say() {
        let of = |host: Option<&str>, port: Option<&str>| {
            let services = vec!["peers".to_owned()];
            let found = EndpointSlices::of(services, PathBuf::new(), host.map(str::to_owned), port.map(str::to_owned));
            found.map(|found| found.expect("a Service was given").api.address.to_string())
        };
        assert_eq!(of(Some("10.96.0.1"), Some("443")).as_deref(), Ok("10.96.0.1:443"));
        assert_eq!(of(Some("fd00::1"), Some("6443")).as_deref(), Ok("[fd00::1]:6443"));
        assert_eq!(of(Some("10.96.0.1"), None), Err(EndpointSlicesError::NoApiServer));
        assert_eq!(of(None, Some("443")), Err(EndpointSlicesError::NoApiServer));
        let found = "10.96.0.1:https".to_owned();
        assert_eq!(of(Some("10.96.0.1"), Some("https")), Err(EndpointSlicesError::ApiServer { found }));
        // Every pod has the variables, whatever they say: without the flag nobody minds them.
        let unasked = EndpointSlices::of(Vec::new(), PathBuf::new(), Some("?".to_owned()), Some("?".to_owned()));
        assert!(unasked.expect("nothing is wrong").is_none());
    }
}
