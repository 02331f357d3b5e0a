//! The admin port: metrics of this proxy followed by its engine's, the debug pages, and what probes ask.

use super::{Request, Response, respond};
use crate::debug;
use crate::proxy::Proxy;
use crate::upstream::{Request as UpstreamRequest, by};
use baton_wire::names::paths;
use http::{HeaderValue, Method, StatusCode, header};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Every worker with why it may or may not serve.
const DEBUG_WORKERS: &str = "/debug/workers";

/// The last decisions.
const DEBUG_DECISIONS: &str = "/debug/decisions";

/// The ledger of KV that prefill engines hold for this proxy's requests.
const DEBUG_HOLDS: &str = "/debug/holds";

/// What is known of workers' prefix caches.
const DEBUG_PREFIX: &str = "/debug/prefix";

/// How long the engine may take for its metrics: a scraper waits 10 s by default, and ours must not be lost with them.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes of the engine's metrics: some hundred series of 200 bytes.
const ENGINE_METRICS_BYTES_MAX: usize = 4 << 20;

/// Serves the admin port.
pub(crate) async fn admin_port(proxy: Arc<Proxy>, request: Request) -> Response {
    let path = request.uri().path();
    let debug_pages = [DEBUG_WORKERS, DEBUG_DECISIONS, DEBUG_HOLDS, DEBUG_PREFIX];
    if ![paths::METRICS, paths::HEALTH, paths::READY].contains(&path) && !debug_pages.contains(&path) {
        return respond::no_such_path(request.method(), path);
    }
    if request.method() != Method::GET {
        return respond::wrong_method(request.method(), Method::GET);
    }
    match path {
        DEBUG_WORKERS => respond::json(StatusCode::OK, debug::workers(&proxy)),
        DEBUG_DECISIONS => respond::json(StatusCode::OK, debug::decisions(&proxy)),
        DEBUG_PREFIX => respond::json(StatusCode::OK, debug::prefix(&proxy)),
        DEBUG_HOLDS => respond::json(StatusCode::OK, debug::holds(&proxy)),
        paths::HEALTH => respond::text(StatusCode::OK, "ok\n"),
        paths::READY => super::ready(&proxy),
        _ => metrics(&proxy).await,
    }
}

async fn metrics(proxy: &Proxy) -> Response {
    let table = proxy.workers.table();
    let text = proxy.metrics.render(
        proxy.own(&table),
        &table,
        &proxy.workers,
        &proxy.ledger,
        &proxy.followed,
        &proxy.admission,
    );
    let mut text = text.into_bytes();
    if let Some(engine) = table.own().map(|own| &own.upstream) {
        let request = UpstreamRequest::get(paths::METRICS);
        let exchange = async {
            let answer = engine.send(&request).await?;
            Ok((answer.status, answer.body.collect(ENGINE_METRICS_BYTES_MAX).await?))
        };
        match by(Instant::now() + ENGINE_TIMEOUT, engine.address(), exchange).await {
            Ok((StatusCode::OK, metrics)) => text.extend_from_slice(&metrics),
            Ok((status, _)) => text.extend_from_slice(format!("# the engine answered {status}\n").as_bytes()),
            Err(error) => text.extend_from_slice(format!("# {error}\n").as_bytes()),
        }
    }
    let mut response = respond::text(StatusCode::OK, text);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
