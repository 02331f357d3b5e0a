//! Clients of the API server: requests counted, and behind the fence down to the socket.
//!
//! kube's own default stack is not used, for two reasons: it retries by itself, out of sight of the fence, and its fence would
//! stand before the wait for a token and a connection instead of behind. Retrying is the controller's, object by object.

use crate::child::Kind;
use crate::fence::{Fence, NotLeading};
use crate::metrics::Metrics;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, TryFutureExt as _};
use http::{Method, Request, Response, Uri};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt as _;
use kube::{Client, Config};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tower::{BoxError, Layer, Service, ServiceBuilder};

/// How long a connection may take to come about: the API server is near.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Silence after which a connection is asked whether the other side lives, and how many questions may stay unanswered: a watch on a
/// node that went without a word is over within half a minute.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVES_LOST: u32 = 2;

/// Who we are in the API server's logs.
pub const USER_AGENT: &str = concat!("baton-operator/", env!("CARGO_PKG_VERSION"));

/// A client that writes only while the fence is open.
///
/// # Errors
/// When the configuration names a proxy, which is not supported, or certificates or credentials that can't be read.
pub fn connect(config: &Config, fence: &Fence, metrics: &Arc<Metrics>) -> kube::Result<Client> {
    if let Some(proxy_url) = &config.proxy_url {
        return Err(kube::Error::ProxyProtocolUnsupported { proxy_url: Box::new(proxy_url.clone()) });
    }
    let mut config = config.clone();
    config.headers.push((http::header::USER_AGENT, http::HeaderValue::from_static(USER_AGENT)));
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_keepalive(Some(KEEPALIVE));
    connector.set_keepalive_interval(Some(KEEPALIVE));
    connector.set_keepalive_retries(Some(KEEPALIVES_LOST));
    let connector = FencedConnector { inner: connector, fence: fence.clone() };
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .layer(Count { metrics: metrics.clone() })
        .layer(fence.clone())
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// Connections over which nothing is sent while the fence is closed.
#[derive(Clone, Debug)]
struct FencedConnector<C> {
    inner: C,
    fence: Fence,
}

impl<C> Service<Uri> for FencedConnector<C>
where
    C: Service<Uri>,
    C::Future: Send + 'static,
{
    type Response = FencedStream<C::Response>;
    type Error = C::Error;
    type Future = BoxFuture<'static, Result<Self::Response, C::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), C::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let fence = self.fence.clone();
        self.inner.call(uri).map_ok(|inner| FencedStream { inner, fence }).boxed()
    }
}

/// A connection over which nothing is sent while the fence is closed.
#[derive(Debug)]
struct FencedStream<T> {
    inner: T,
    fence: Fence,
}

impl<T> FencedStream<T> {
    fn check(&self) -> io::Result<()> {
        if self.fence.is_open() { Ok(()) } else { Err(io::Error::other(NotLeading)) }
    }
}

impl<T: Connection> Connection for FencedStream<T> {
    fn connected(&self) -> Connected {
        self.inner.connected()
    }
}

impl<T: hyper::rt::Read + Unpin> hyper::rt::Read for FencedStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<T: hyper::rt::Write + Unpin> hyper::rt::Write for FencedStream<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.inner).poll_write_vectored(context, pieces)
    }
}

/// Counts requests.
#[derive(Clone, Debug)]
struct Count {
    metrics: Arc<Metrics>,
}

impl<S> Layer<S> for Count {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, metrics: self.metrics.clone() }
    }
}

/// A client whose requests are counted.
#[derive(Clone, Debug)]
struct Counted<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<R>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (verb, resource) = classify(request.method(), request.uri());
        let metrics = self.metrics.clone();
        let answer = self.inner.call(request);
        async move {
            let answer = answer.await;
            let code = match answer.as_ref().map(|response| response.status().as_u16()) {
                Ok(200..=299) => "2xx",
                Ok(400..=499) => "4xx",
                Ok(500..=599) => "5xx",
                Ok(_) => "other",
                Err(_) => "error",
            };
            metrics.requested(verb, resource, code);
            answer
        }
        .boxed()
    }
}

/// Resources besides the owned kinds that requests may be about.
const RESOURCES: [&str; 5] = ["disaggregatedmodels", "pods", "persistentvolumeclaims", "events", "leases"];

/// A request's verb and resource in the words of RBAC; `discovery` where it is about no objects.
fn classify(method: &Method, uri: &Uri) -> (&'static str, &'static str) {
    let mut steps = uri.path().split('/').filter(|step| !step.is_empty());
    let skipped = match steps.next() {
        Some("api") => 1,
        Some("apis") => 2,
        Some(_) | None => 0,
    };
    let mut steps = steps.skip(skipped);
    let mut resource = steps.next();
    if resource == Some("namespaces") {
        steps.next();
        resource = steps.next();
    }
    let known = Kind::ALL.iter().map(|kind| kind.plural()).chain(RESOURCES);
    let known = resource.map(|resource| known.into_iter().find(|known| *known == resource).unwrap_or("other"));
    let named = steps.next().is_some();
    let watched = uri.query().is_some_and(|query| query.split('&').any(|pair| pair.starts_with("watch=")));
    let verb = match (method.as_str(), named, watched) {
        ("GET", true, _) => "get",
        ("GET", false, true) => "watch",
        ("GET", false, false) => "list",
        ("POST", ..) => "create",
        ("PATCH", ..) => "patch",
        ("PUT", ..) => "update",
        ("DELETE", ..) => "delete",
        _ => "other",
    };
    match known {
        Some(resource) if skipped > 0 => (verb, resource),
        _ => ("get", "discovery"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_under_the_words_of_its_right() {
        for (method, uri, expect) in [
            ("GET", "/apis/apps/v1/namespaces/a/deployments?labelSelector=x", ("list", "deployments")),
            ("GET", "/apis/apps/v1/deployments?watch=true&x=y", ("watch", "deployments")),
            ("GET", "/api/v1/namespaces/a/secrets/b", ("get", "secrets")),
            (
                "PATCH",
                "/apis/baton.dev/v1alpha1/namespaces/a/disaggregatedmodels/b/status",
                ("patch", "disaggregatedmodels"),
            ),
            ("PUT", "/apis/coordination.k8s.io/v1/namespaces/a/leases/b", ("update", "leases")),
            ("POST", "/apis/events.k8s.io/v1/namespaces/a/events", ("create", "events")),
            ("DELETE", "/api/v1/namespaces/a/services/b", ("delete", "services")),
            ("GET", "/apis", ("get", "discovery")),
            ("GET", "/apis/baton.dev/v1alpha1", ("get", "discovery")),
            ("GET", "/api/v1/namespaces/a/widgets", ("list", "other")),
        ] {
            let method: Method = method.parse().expect("a method");
            assert_eq!(classify(&method, &Uri::from_static(uri)), expect, "{method} {uri}");
        }
    }
}
