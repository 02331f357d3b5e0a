//! The proxy's side of a request: render once, then the prefill leg here and the decode leg there.
//!
//! A leg carries the client's body as it came; both workers read the same parameters out of it again, and the same token ids beside it.

use super::body::{LEG_BYTES_MAX, RENDER_BYTES_MAX, RESUME_BYTES_MAX, read_internal};
use super::openai::{Task, tokenise};
use super::{Worker, trace_id};
use crate::error::ApiError;
use crate::generate::Rendered;
use crate::metrics::{Kind, Outcome, Served};
use crate::openai::Request;
use crate::openai::limits::BODY_BYTES_MAX;
use crate::prefill;
use crate::serving::Serving;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use baton_engine::prefix_hash;
use baton_wire::leg::{LegRequest, PrefillDone, Resume, ResumedChoice};
use baton_wire::names::{headers, paths};
use baton_wire::render::{RenderRequest, RenderResponse, RenderedPrompt};
use baton_wire::{BlockHash, Path, Traceparent};
use http::HeaderMap;
use std::sync::Arc;
use tracing::Instrument;

/// `/internal/render`: everything that can be a client's mistake is found here, before any leg is sent.
pub(super) async fn render(State(worker): State<Arc<Worker>>, body: Body) -> Result<Json<RenderResponse>, ApiError> {
    let RenderRequest { endpoint, body, tenant_salt } = read_internal(body, RENDER_BYTES_MAX, "render request").await?;
    if body.get().len() > BODY_BYTES_MAX {
        return Err(ApiError::BodyTooLarge { max: BODY_BYTES_MAX });
    }
    let (serving, _in_flight) = worker.admit()?;
    let (request, prompts) = tokenise(&serving, endpoint, body.get().to_owned()).await?;
    let request = request.of_tenant(tenant_salt);
    let hashes: Vec<_> = prompts.iter().map(|tokens| prefix_hash::block_hashes(request.salt, tokens)).collect();
    let cached = match worker.identity.role.decodes() {
        true => serving.engine.cached_tokens(hashes.clone()).await,
        false => None,
    };
    let cached = cached.unwrap_or_else(|| vec![0; prompts.len()]);
    let prompts = prompts.into_iter().zip(hashes).zip(cached).map(|((token_ids, hashes), cached)| RenderedPrompt {
        token_ids,
        block_hashes: hashes.into_iter().map(|hash| BlockHash(hash.0)).collect(),
        cached_tokens: u32::try_from(cached).expect("no prompt has as many tokens"),
    });
    Ok(Json(RenderResponse {
        prompts: prompts.collect(),
        choices: request.choices,
        stream: request.stream.is_some(),
        seed: request.seed,
    }))
}

/// `/internal/prefill`: answers when the KV of every prompt has been fetched, or at the first failure.
pub(super) async fn prefill(
    State(worker): State<Arc<Worker>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<PrefillDone>, ApiError> {
    let role = worker.identity.role;
    if !role.prefills_for_others() {
        return Err(ApiError::WrongRole { role, path: paths::PREFILL_LEG });
    }
    let mut leg: LegRequest = read_internal(body, LEG_BYTES_MAX, PREFILL_LEG).await?;
    let (serving, _in_flight) = worker.admit()?;
    let rendered = rendered(&mut leg, &serving, PREFILL_LEG)?;
    if leg.transfers.is_empty() {
        return Err(malformed(PREFILL_LEG, "it has no transfers"));
    }
    if leg.resume.is_some() {
        return Err(malformed(PREFILL_LEG, "only a decode leg can be resumed"));
    }
    let Some(producer) = &serving.producer else {
        return Err(ApiError::TransferRefused { reason: "this worker has no KV port".to_owned() });
    };
    let mut served = Served::begin(serving.metrics.clone(), Kind::Prefill);
    let trace = trace_id::of(&headers);
    let trace_id = trace.as_ref().map(Traceparent::trace_id);
    let span = tracing::info_span!("request", id = leg.request_id, trace_id);
    let outcome = async {
        let done = prefill::prefill(&serving, producer, &rendered, &leg.transfers).await?;
        // The one line of a request in this pod: the proxies' own is in the pod that generates.
        tracing::info!(
            prompt_tokens = done.prompt_tokens,
            cached_tokens = done.cached_tokens,
            compute_ms = done.compute_ms,
            kv_bytes = done.kv_bytes,
            "prefilled"
        );
        Ok(done)
    };
    let outcome = outcome.instrument(span).await;
    served.end(if outcome.is_ok() { Outcome::Completed } else { Outcome::Failed });
    outcome.map(Json)
}

/// `/internal/decode`: the client's answer.
pub(super) async fn decode(
    State(worker): State<Arc<Worker>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let role = worker.identity.role;
    if !role.decodes() {
        return Err(ApiError::WrongRole { role, path: paths::DECODE_LEG });
    }
    let mut leg: LegRequest = read_internal(body, LEG_BYTES_MAX + RESUME_BYTES_MAX, DECODE_LEG).await?;
    let (serving, in_flight) = worker.admit()?;
    let rendered = rendered(&mut leg, &serving, DECODE_LEG)?;
    let is_remote = match leg.planned {
        Path::RemotePrefill => true,
        Path::LocalPrefill(_) | Path::Fallback(_) => false,
    };
    if is_remote == leg.transfers.is_empty() {
        return Err(malformed(DECODE_LEG, "its planned path and its transfers contradict each other"));
    }
    if let Some(resume) = &leg.resume {
        check_resume(resume, &leg, &rendered, &serving)?;
    }
    let trace = trace_id::of(&headers);
    let trace_id = trace.as_ref().map(Traceparent::trace_id);
    let span = tracing::info_span!("request", id = leg.request_id, trace_id);
    let task = Task {
        serving,
        in_flight,
        token_ids: headers.get(headers::TOKEN_IDS).is_some_and(|value| value == "1"),
        path: leg.planned,
        transfers: &leg.transfers,
        created: leg.created,
        resume: leg.resume.as_ref(),
        request_id: leg.request_id,
    };
    task.run(&rendered).instrument(span).await
}

const PREFILL_LEG: &str = "prefill leg";
const DECODE_LEG: &str = "decode leg";

/// A leg's request as it was rendered elsewhere, its prompts taken out of it; checked again, because nothing that comes over the wire is
/// believed.
fn rendered(leg: &mut LegRequest, serving: &Serving, what: &'static str) -> Result<Rendered, ApiError> {
    let request = Request::parse(leg.endpoint, leg.body.get(), &serving.facts)?.of_tenant(leg.tenant_salt);
    let prompts = std::mem::take(&mut leg.prompts);
    if prompts.len() != request.num_prompts() {
        return Err(malformed(what, "its prompts are not as many as the client's"));
    }
    if !leg.transfers.is_empty() && leg.transfers.len() != prompts.len() {
        return Err(malformed(what, "it has not one transfer for each prompt"));
    }
    for prompt in &prompts {
        if prompt.is_empty() || prompt.iter().any(|token| *token >= serving.facts.vocab_size) {
            return Err(malformed(what, "a prompt is empty or has tokens that the model does not have"));
        }
        request.completion_tokens_max(prompt.len(), &serving.facts)?;
    }
    Ok(Rendered { request, prompts, seed: leg.seed })
}

/// What can be told of a resumed leg before its tokens are replayed.
fn check_resume(resume: &Resume, leg: &LegRequest, rendered: &Rendered, serving: &Serving) -> Result<(), ApiError> {
    let Rendered { request, prompts, .. } = rendered;
    if request.stream.is_none() {
        return Err(malformed(DECODE_LEG, "only a stream can be resumed: of any other answer the client has nothing"));
    }
    if !leg.transfers.is_empty() {
        return Err(malformed(DECODE_LEG, "a resumed stream takes no KV: its prompts are computed with what followed"));
    }
    if resume.choices.len() != prompts.len() * request.choices as usize {
        return Err(malformed(DECODE_LEG, "its resumed choices are not as many as the client's"));
    }
    for ResumedChoice { events, token_ids, cached_tokens: _ } in &resume.choices {
        if token_ids.iter().any(|token| *token >= serving.facts.vocab_size) {
            return Err(malformed(DECODE_LEG, "a resumed choice has tokens that the model does not have"));
        }
        if *events == 0 && !token_ids.is_empty() {
            return Err(ApiError::ResumeContradiction);
        }
    }
    Ok(())
}

fn malformed(what: &'static str, reason: &str) -> ApiError {
    ApiError::MalformedInternal { what, reason: reason.to_owned() }
}
