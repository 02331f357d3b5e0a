//! A leg under way to an engine that is not ours: the exchange as one future that owns all it needs, so that whoever waits for it
//! can be replaced. Sends and reads; decides nothing.

use super::Ask;
use crate::choose::Trial;
use crate::connector::{Connector, vllm_nixl};
use crate::entropy;
use crate::legs;
use crate::payload::Payload;
use crate::proxy::Proxy;
use crate::request_state::LegFailure;
use crate::upstream::{Answer, HalfClose, Request, UpstreamError, by};
use crate::workers::{Report, Reservation, Worker};
use baton_wire::names::headers;
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Instant;

/// Bytes of a prefill leg's answer: one token with its alternatives, and where the KV is: with a block id of 7 digits for each 16
/// tokens, a million tokens take half a megabyte.
const PREFILL_ANSWER_BYTES_MAX: usize = 16 << 20;

/// An error that a worker answered with, to be passed on as it is.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Why a leg has failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) class: LegFailure,
    /// Whether some of the request was written to the worker.
    pub(super) reached: bool,
    /// What it answered, where it answered.
    pub(super) told: Option<Told>,
}

/// A leg under way. Dropping it closes its connection.
pub(super) struct Flight<T> {
    work: Pin<Box<dyn Future<Output = Result<T, Failed>> + Send>>,
    half_close: HalfClose,
    pub(super) worker: Arc<Worker>,
    pub(super) since: Instant,
    /// Prompt tokens that this proxy had there when it was sent.
    pub(super) ahead: u64,
    /// Of the worker's time, for as long as the leg runs.
    pub(super) reservation: Reservation,
    pub(super) trial: Trial,
    pub(super) is_half_closed: bool,
}

impl<T> Flight<T> {
    /// Waits for its end.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, Failed>> {
        self.work.as_mut().poll(cx)
    }

    /// Asks the engine to stop, and reads on: an answer may be on its way.
    pub(super) fn half_close(&mut self) {
        self.is_half_closed = true;
        self.half_close.now();
    }
}

impl Flight<PrefillAnswer> {
    /// The end of it as a future of its own.
    pub(super) async fn ended(self) -> Result<PrefillAnswer, Failed> {
        // What is reserved stays so until then.
        let Flight { work, reservation: _reservation, trial: _trial, .. } = self;
        work.await
    }
}

/// What a prefill leg answered.
#[derive(Debug)]
pub(super) struct PrefillAnswer {
    pub(super) body: Bytes,
}

/// Sends a prefill leg and reads its answer to the end.
pub(super) fn prefill(
    proxy: &Arc<Proxy>,
    ask: &Arc<Ask>,
    worker: Arc<Worker>,
    reservation: Reservation,
    trial: Trial,
    body: Payload,
) -> Flight<PrefillAnswer> {
    let (proxy, asking) = (Arc::clone(proxy), Arc::clone(ask));
    let (deadline, rank) = (ask.deadline.min(Instant::now() + proxy.limits.first_token_timeout), reservation.rank());
    launched(ask, worker, reservation, trial, |worker, half_close| async move {
        let answer = send(&proxy, &asking, &worker, rank, body, &half_close, deadline).await?;
        let body = collected(&worker, answer.body, PREFILL_ANSWER_BYTES_MAX, deadline).await?;
        Ok(PrefillAnswer { body })
    })
}

/// Sends a decode leg and waits for its headers.
pub(super) fn decode(
    proxy: &Arc<Proxy>,
    ask: &Arc<Ask>,
    worker: Arc<Worker>,
    reservation: Reservation,
    trial: Trial,
    body: Payload,
) -> Flight<Answer> {
    let (proxy, asking) = (Arc::clone(proxy), Arc::clone(ask));
    // Headers of an answer that is not streamed come with its last token.
    let patience = if ask.says.stream { proxy.limits.first_token_timeout } else { proxy.limits.request_timeout };
    let (deadline, rank) = (ask.deadline.min(Instant::now() + patience), reservation.rank());
    launched(ask, worker, reservation, trial, |worker, half_close| async move {
        send(&proxy, &asking, &worker, rank, body, &half_close, deadline).await
    })
}

/// A leg whose exchange is that future; it begins when it is first waited for.
fn launched<T, F: Future<Output = Result<T, Failed>> + Send + 'static>(
    ask: &Ask,
    worker: Arc<Worker>,
    reservation: Reservation,
    trial: Trial,
    exchange: impl FnOnce(Arc<Worker>, HalfClose) -> F,
) -> Flight<T> {
    let half_close = HalfClose::default();
    Flight {
        work: Box::pin(exchange(Arc::clone(&worker), half_close.clone())),
        half_close,
        since: Instant::now(),
        ahead: worker.reserved.prompt_tokens_at(reservation.rank()).saturating_sub(ask.says.prompt_tokens),
        worker,
        reservation,
        trial,
        is_half_closed: false,
    }
}

/// Sends a request that frees held KV, and reads no more of its answer than whether it was taken.
pub(super) async fn release(
    proxy: &Proxy,
    ask: &Ask,
    worker: &Worker,
    handle: &vllm_nixl::Handle,
    within: Duration,
) -> Result<(), Failed> {
    let body = vllm_nixl::release(&ask.object, ask.api, handle);
    // Whichever rank takes it: the handle says where the KV is.
    send(proxy, ask, worker, None, body, &HalfClose::default(), Instant::now() + within).await.map(drop)
}

async fn send(
    proxy: &Proxy,
    ask: &Ask,
    worker: &Worker,
    rank: Option<u32>,
    body: Payload,
    half_close: &HalfClose,
    deadline: Instant,
) -> Result<Answer, Failed> {
    let path = ask.api.path();
    let mut request =
        Request { method: Method::POST, path: PathAndQuery::from_static(path), headers: ask.headers.clone(), body };
    if let Some(trace) = &ask.trace {
        trace.put(entropy::quick(), &mut request.headers);
    }
    match (proxy.connector, rank) {
        // Where there is no header the engine spreads requests over its ranks by itself. SGLang is told in the body.
        (Connector::VllmNixl, Some(rank)) => {
            request.headers.insert(headers::DATA_PARALLEL_RANK, HeaderValue::from(rank));
        }
        (Connector::VllmNixl, None) | (Connector::Sglang | Connector::Baton, _) => {}
    }
    legs::sign(proxy, worker, path, &mut request);
    match by(deadline, worker.address(), worker.upstream.send_with(&request, half_close)).await {
        Ok(answer) if answer.status.is_success() => Ok(answer),
        Ok(answer) => {
            let Answer { status, headers, body } = answer;
            let class = class(status);
            // What an error says is for the client, and is not worth more than the leg.
            let body =
                by(deadline, worker.address(), body.collect(super::super::ERROR_BYTES_MAX)).await.unwrap_or_default();
            Err(Failed { class, reached: true, told: Some(Told { status, headers, body }) })
        }
        Err(error) => Err(broken(proxy, ask, worker, &error)),
    }
}

async fn collected(
    worker: &Worker,
    body: crate::upstream::Body,
    bytes_max: usize,
    deadline: Instant,
) -> Result<Bytes, Failed> {
    by(deadline, worker.address(), body.collect(bytes_max)).await.map_err(|error| {
        let class = match error {
            UpstreamError::Timeout { .. } => LegFailure::Timeout,
            UpstreamError::Connect { .. } | UpstreamError::Broken { .. } | UpstreamError::GivenUp { .. } => {
                LegFailure::Refused
            }
            UpstreamError::TooLong { .. } => LegFailure::ServerError,
        };
        Failed { class, reached: true, told: None }
    })
}

fn broken(proxy: &Proxy, ask: &Ask, worker: &Worker, error: &UpstreamError) -> Failed {
    tracing::debug!(request_id = ask.id, worker = %worker.address(), cause = std::error::Error::source(error), "{error}");
    let (class, reached) = match error {
        UpstreamError::Connect { .. } => {
            proxy.workers.report(worker.link, worker.address(), Report::Unreachable);
            (LegFailure::Refused, false)
        }
        UpstreamError::Broken { .. } => (LegFailure::Refused, true),
        UpstreamError::GivenUp { .. } => (LegFailure::Refused, false),
        UpstreamError::Timeout { .. } => (LegFailure::Timeout, true),
        UpstreamError::TooLong { .. } => (LegFailure::ServerError, true),
    };
    Failed { class, reached, told: None }
}

/// What an engine's status code says of a leg. 408 and 425 are about the leg's own connection; 401 and 403 are the client's, whose
/// key goes on to the engine.
fn class(status: StatusCode) -> LegFailure {
    match status {
        StatusCode::TOO_MANY_REQUESTS => LegFailure::Busy,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY => LegFailure::ServerError,
        status if status.is_client_error() => LegFailure::ClientError,
        _ => LegFailure::ServerError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_code_says_whose_fault_it_is() {
        for (status, expect) in [
            (400, LegFailure::ClientError),
            (401, LegFailure::ClientError),
            (404, LegFailure::ClientError),
            (408, LegFailure::ServerError),
            (425, LegFailure::ServerError),
            (429, LegFailure::Busy),
            (500, LegFailure::ServerError),
            (503, LegFailure::ServerError),
            (302, LegFailure::ServerError),
        ] {
            assert_eq!(class(StatusCode::from_u16(status).expect("a status")), expect, "{status}");
        }
    }
}
