//! The clients' API, served by this worker alone: prompt computed and continued here.
//!
//! In a cluster clients come through the proxy and its legs; this is for a single worker, and for looking at one directly.

use super::answer::Delivery;
use super::body::read_client;
use super::{Worker, request_id, trace_id};
use crate::error::ApiError;
use crate::generate::{Generation, Rendered};
use crate::lifecycle::InFlight;
use crate::metrics::{Kind, Outcome, Served};
use crate::openai::answer::{Answer, Head};
use crate::openai::{Request, RequestError};
use crate::render;
use crate::serving::Serving;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::response::Response;
use baton_wire::leg::{Resume, ResumedChoice, Transfer};
use baton_wire::names::paths;
use baton_wire::render::Endpoint;
use baton_wire::{Path, PathReason, Traceparent};
use http::HeaderMap;
use serde::Serialize;
use std::sync::Arc;
use std::time::SystemTime;
use tracing::Instrument;

/// `/v1/chat/completions`.
pub(super) async fn chat(
    State(worker): State<Arc<Worker>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    complete(&worker, Endpoint::Chat, paths::CHAT_COMPLETIONS, &headers, body).await
}

/// `/v1/completions`.
pub(super) async fn completions(
    State(worker): State<Arc<Worker>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    complete(&worker, Endpoint::Completions, paths::COMPLETIONS, &headers, body).await
}

async fn complete(
    worker: &Worker,
    endpoint: Endpoint,
    path: &'static str,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let role = worker.identity.role;
    if !role.decodes() {
        return Err(ApiError::WrongRole { role, path });
    }
    let body = read_client(body).await?;
    let (serving, in_flight) = worker.admit()?;
    let (request, prompts) = tokenise(&serving, endpoint, body).await?;
    let seed = request.seed.unwrap_or_else(random_seed);
    let rendered = Rendered { request, prompts, seed };
    let request_id = request_id::of(headers);
    let trace = trace_id::of(headers);
    let trace_id = trace.as_ref().map(Traceparent::trace_id);
    let span = tracing::info_span!("request", id = request_id, trace_id);
    let task = Task {
        serving,
        in_flight,
        request_id,
        token_ids: false,
        path: Path::LocalPrefill(PathReason::Aggregated),
        transfers: &[],
        created: None,
        resume: None,
    };
    task.run(&rendered).instrument(span).await
}

/// Parses, checks and renders a client's request, on a thread that may take its time.
pub(super) async fn tokenise(
    serving: &Arc<Serving>,
    endpoint: Endpoint,
    body: String,
) -> Result<(Request, Vec<Vec<u32>>), ApiError> {
    let permit = serving.renders.clone().acquire_owned().await.expect("the semaphore is never closed");
    let serving = serving.clone();
    let rendering = tokio::task::spawn_blocking(move || {
        // Held by the thread rather than by the request: a client that hangs up does not stop the thread.
        let _permit = permit;
        let request = Request::parse(endpoint, &body, &serving.facts)?;
        let prompts = render::render(&request, &serving.tokenizer, &serving.facts, SystemTime::now())?;
        Ok::<_, RequestError>((request, prompts))
    });
    Ok(rendering.await.map_err(|_| ApiError::RenderPanicked)??)
}

/// A rendered request to be generated and answered.
pub(super) struct Task<'a> {
    pub(super) serving: Arc<Serving>,
    pub(super) in_flight: InFlight,
    pub(super) request_id: String,
    pub(super) token_ids: bool,
    pub(super) path: Path,
    /// One for each prompt, or none where prompts are computed here.
    pub(super) transfers: &'a [Transfer],
    /// When the proxy took the request.
    pub(super) created: Option<u64>,
    /// What the client has of the stream already.
    pub(super) resume: Option<&'a Resume>,
}

impl Task<'_> {
    pub(super) async fn run(self, rendered: &Rendered) -> Result<Response, ApiError> {
        let Task { serving, in_flight, request_id, token_ids, path, transfers, created, resume } = self;
        let mut served = Served::begin(serving.metrics.clone(), Kind::Generate);
        let prompt_tokens: usize = rendered.prompts.iter().map(Vec::len).sum();
        tracing::debug!(prompts = rendered.prompts.len(), prompt_tokens, choices = rendered.request.choices, planned = %path, "generating");
        let resumed = resume.map(|resume| resume.choices.as_slice());
        let generation = generation(&serving, rendered, transfers, resumed, path).await;
        let generation = generation.inspect_err(|_| served.end(Outcome::Failed))?;
        let (endpoint, stream) = (rendered.request.endpoint(), rendered.request.stream);
        let delivery = Delivery {
            generation,
            answer: Answer {
                head: head(&serving, endpoint, &request_id, created.unwrap_or_else(now)),
                endpoint,
                include_usage: stream.is_some_and(|options| options.include_usage),
            },
            token_ids,
            num_choices: rendered.prompts.len() * rendered.request.choices as usize,
            request_id,
            prefill_worker: transfers.first().map(|transfer| host(&transfer.source).to_owned()),
            served,
            _in_flight: in_flight,
        };
        match stream {
            Some(_) => delivery.stream(resume).await,
            None => delivery.whole().await,
        }
    }
}

/// Submits every prompt, and sees to its KV where another worker has it.
async fn generation(
    serving: &Arc<Serving>,
    rendered: &Rendered,
    transfers: &[Transfer],
    resumed: Option<&[ResumedChoice]>,
    path: Path,
) -> Result<Generation, ApiError> {
    let mut generation = Generation::submit(serving.clone(), rendered, !transfers.is_empty(), resumed, path).await?;
    if !transfers.is_empty() {
        generation.import(transfers).await?;
    }
    Ok(generation)
}

fn head(serving: &Serving, endpoint: Endpoint, request_id: &str, created: u64) -> Head {
    let prefix = match endpoint {
        Endpoint::Chat => "chatcmpl",
        Endpoint::Completions => "cmpl",
    };
    Head {
        id: format!("{prefix}-{request_id}"),
        created,
        model: serving.facts.name.clone(),
        system_fingerprint: serving.system_fingerprint(),
    }
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The address without its port: a pod has one address and several ports.
fn host(source: &str) -> &str {
    source.rsplit_once(':').map_or(source, |(host, _)| host)
}

fn random_seed() -> u64 {
    getrandom::u64().expect("the system has random numbers once it has started")
}

#[derive(Serialize)]
pub(super) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: usize,
}

fn model_object(serving: &Serving) -> Model {
    Model {
        id: serving.facts.name.clone(),
        object: "model",
        // When the publisher made it is not in its files, and a time that differs between workers would be worse than none.
        created: 0,
        owned_by: "baton",
        max_model_len: serving.facts.max_model_length,
    }
}

/// `/v1/models`.
pub(super) async fn models(State(worker): State<Arc<Worker>>) -> Result<Json<ModelList>, ApiError> {
    let serving = worker.serving.get().ok_or(ApiError::Loading)?;
    Ok(Json(ModelList { object: "list", data: vec![model_object(serving)] }))
}

/// `/v1/models/{id}`; names of models may have slashes.
pub(super) async fn model(
    State(worker): State<Arc<Worker>>,
    UrlPath(id): UrlPath<String>,
) -> Result<Json<Model>, ApiError> {
    let serving = worker.serving.get().ok_or(ApiError::Loading)?;
    if id == serving.facts.name {
        return Ok(Json(model_object(serving)));
    }
    Err(RequestError::model_not_found(&id, &serving.facts.name).into())
}
