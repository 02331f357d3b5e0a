//! The worker's HTTP server: paths to handlers, and the answers that need no engine.
//!
//! Clients' API in `http/openai.rs`, the proxy's legs in `http/legs.rs`; every error's status in `http/error.rs`. Who may call is not
//! decided here: the port is reached from the proxy of the same pod alone, which checks clients and signatures.

mod answer;
mod body;
mod error;
mod kv_events;
mod legs;
mod openai;
mod request_id;
mod sse;
mod trace_id;

use crate::error::ApiError;
use crate::lifecycle::{InFlight, Lifecycle, Refusal};
use crate::metrics::Metrics;
use crate::serving::Serving;
use crate::transfer::producer::Producer;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::{Listener, ListenerExt};
use axum::{Json, Router};
use baton_engine::kv_pool::BLOCK_TOKENS;
use baton_wire::names::paths;
use baton_wire::status::{Load, State as LifeState, Status};
use baton_wire::{Epoch, Role};
use error::ErrorCode;
use http::{HeaderValue, StatusCode, Uri, header};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// What a worker is from its first moment on.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Which phases it serves.
    pub role: Role,
    /// The manifest's revision that it was started for.
    pub revision: String,
    /// This life of this process.
    pub epoch: Epoch,
    /// The model's name towards clients.
    pub model: String,
    /// Where peers fetch KV.
    pub kv_address: Option<String>,
}

/// A worker as its HTTP server sees it.
#[derive(Debug)]
pub struct Worker {
    /// Who it is.
    pub identity: Identity,
    /// Where it is in its life.
    pub lifecycle: Lifecycle,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// What it has once the model is loaded; set before the lifecycle is ready.
    pub serving: OnceLock<Arc<Serving>>,
}

impl Worker {
    /// Admits a request that has to be computed.
    fn admit(&self) -> Result<(Arc<Serving>, InFlight), ApiError> {
        let in_flight = self.lifecycle.admit().map_err(|refusal| match refusal {
            Refusal::Loading => ApiError::Loading,
            Refusal::Draining => ApiError::Draining,
        })?;
        let serving = self.serving.get().expect("set before the lifecycle is ready, which admission asks for");
        Ok((serving.clone(), in_flight))
    }

    /// Brings the metrics up to what transfer has counted.
    fn count_transfers(&self) {
        if let Some(serving) = self.serving.get() {
            let producer = serving.producer.as_ref().map(Producer::stats);
            self.metrics.transfers(producer.as_ref(), &serving.consumer.stats());
        }
    }

    fn status(&self) -> Status {
        self.count_transfers();
        let serving = self.serving.get();
        let load = serving.map(|serving| serving.engine.load()).unwrap_or_default();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Status {
            role: self.identity.role,
            revision: self.identity.revision.clone(),
            epoch: self.identity.epoch,
            model: self.identity.model.clone(),
            fingerprint: serving.map(|serving| serving.fingerprint),
            kv_address: self.identity.kv_address.clone(),
            state: self.lifecycle.state(),
            progress: self.lifecycle.progress(),
            max_model_length: serving.map(|serving| count(serving.facts.max_model_length)),
            block_tokens: BLOCK_TOKENS as u32,
            load: Load {
                running: count(load.running),
                waiting: count(load.waiting),
                queued_prompt_tokens: load.queued_prompt_tokens as u64,
                kv_blocks_used: count(load.blocks_used),
                kv_blocks_total: count(load.blocks_total),
            },
            totals: self.metrics.totals(),
            bootstrap_port: None,
            rank_loads: Vec::new(),
            adapters: Vec::new(),
        }
    }
}

/// Serves until `closing`; then answers what is under way and returns.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, worker: Arc<Worker>, closing: CancellationToken) -> std::io::Result<()> {
    axum::serve(undelayed(listener), router(worker)).with_graceful_shutdown(closing.cancelled_owned()).await
}

/// Or the kernel holds each token back until the one before it is acknowledged, which takes a peer up to 40 ms.
fn undelayed(listener: TcpListener) -> impl Listener<Io = TcpStream, Addr = SocketAddr> {
    listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection without TCP_NODELAY: its tokens may come late");
        }
    })
}

fn router(worker: Arc<Worker>) -> Router {
    Router::new()
        .route(paths::HEALTH, get(health))
        .route(paths::READY, get(ready))
        .route(paths::METRICS, get(metrics))
        .route(paths::STATUS, get(status))
        .route(paths::KV_EVENTS, get(kv_events::kv_events))
        .route(paths::RENDER, post(legs::render))
        .route(paths::PREFILL_LEG, post(legs::prefill))
        .route(paths::DECODE_LEG, post(legs::decode))
        .route(paths::CHAT_COMPLETIONS, post(openai::chat))
        .route(paths::COMPLETIONS, post(openai::completions))
        .route(paths::MODELS, get(openai::models))
        .route(&format!("{}/{{*id}}", paths::MODELS), get(openai::model))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(from_fn_with_state(worker.clone(), count_errors))
        .with_state(worker)
}

/// The process is alive: it answers.
async fn health() -> &'static str {
    "ok\n"
}

/// Whether new work is taken.
async fn ready(State(worker): State<Arc<Worker>>) -> Response {
    match worker.lifecycle.state() {
        LifeState::Ready => "ready\n".into_response(),
        LifeState::Loading => (StatusCode::SERVICE_UNAVAILABLE, "loading\n").into_response(),
        LifeState::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response(),
    }
}

async fn metrics(State(worker): State<Arc<Worker>>) -> Response {
    worker.count_transfers();
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, text)], worker.metrics.text()).into_response()
}

async fn status(State(worker): State<Arc<Worker>>) -> Json<Status> {
    Json(worker.status())
}

async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::NoSuchPath { path: uri.path().to_owned() }
}

async fn no_such_method(uri: Uri) -> ApiError {
    ApiError::NoSuchMethod { path: uri.path().to_owned() }
}

async fn count_errors(State(worker): State<Arc<Worker>>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    if let Some(ErrorCode(code)) = response.extensions().get() {
        worker.metrics.error(code);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_accepted_socket_holds_small_writes_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let mut listener = undelayed(listener);
        let (_client, (stream, _)) = tokio::join!(TcpStream::connect(address), listener.accept());
        assert!(stream.nodelay().expect("a socket option"));
    }
}
