//! Sends the calls of a request's legs and watches over them: what is dispatched together, which failure ends what.
//!
//! The prefill leg runs in a task of its own, because nobody waits for it: its answer comes after its KV was released. The
//! task ends with the [`PrefillLeg`] that stands for it, so a request that is dropped takes both legs along.

use crate::choose::Chosen;
use crate::choose::ours::Timing;
use crate::connector::Call;
use crate::entropy;
use crate::metrics::LegOutcome;
use crate::proxy::Proxy;
use crate::request_state::LegFailure;
use crate::trace::Trace;
use crate::upstream::{Answer, Request, UpstreamError, by};
use crate::workers::{Link, Report, Worker};
use baton_wire::PathReason;
use baton_wire::leg::PrefillDone;
use baton_wire::names::headers;
use baton_wire::signing::{self, LegClaims};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use std::sync::Arc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How long a leg's signature holds: a connection attempt, the upload of the largest body, and 20 s by which two nodes'
/// clocks may differ.
const LEG_TTL_MS: u64 = 30_000;

/// Bytes of a prefill leg's answer: it is four numbers.
const PREFILL_DONE_BYTES_MAX: usize = 16 << 10;

/// Sends one call to a worker: directly to our own engine, signed to another pod's proxy. A worker that can't be connected
/// to leaves the choice until it has answered a poll again.
pub(crate) async fn send(
    proxy: &Proxy,
    worker: &Worker,
    call: &Call,
    request_id: &str,
    trace: Option<&Trace>,
    deadline: Instant,
) -> Result<Answer, UpstreamError> {
    let mut request = Request {
        method: Method::POST,
        path: PathAndQuery::from_static(call.path),
        headers: HeaderMap::new(),
        body: call.body.clone().into(),
    };
    let value = |text: &str| HeaderValue::from_str(text).expect("tokens and checked request ids are header values");
    request.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    request.headers.insert(headers::REQUEST_ID, value(request_id));
    request.headers.insert(headers::TOKEN_IDS, HeaderValue::from_static("1"));
    if let Some(trace) = trace {
        trace.put(entropy::quick(), &mut request.headers);
    }
    sign(proxy, worker, call.path, &mut request);
    let answer = by(deadline, worker.address(), worker.upstream.send(&request)).await;
    if let Err(UpstreamError::Connect { .. }) = &answer {
        proxy.workers.report(worker.link, worker.address(), Report::Unreachable);
    }
    answer
}

/// Signs a leg to another pod's proxy: that it is for the engine there, and that its body is ours.
pub(crate) fn sign(proxy: &Proxy, worker: &Worker, path: &str, request: &mut Request) {
    match worker.link {
        Link::Own | Link::Direct => {}
        Link::Peer => {
            let claims = LegClaims {
                path: path.to_owned(),
                body_blake3: signing::pieces_blake3(request.body.pieces().map(AsRef::as_ref)),
                expires_unix_ms: entropy::now_unix_ms() + LEG_TTL_MS,
            };
            let token =
                HeaderValue::from_str(&signing::sign(&proxy.key, &claims)).expect("base64url is a header value");
            request.headers.insert(headers::LEG, token);
        }
    }
}

/// A prefill leg under way. Dropping it aborts it, here and at the worker.
#[derive(Debug)]
#[must_use = "dropping the leg aborts it"]
pub(crate) struct PrefillLeg(AbortOnDropHandle<Result<(), PathReason>>);

impl PrefillLeg {
    /// A leg that is a task already.
    pub(crate) fn of(task: tokio::task::JoinHandle<Result<(), PathReason>>) -> Self {
        PrefillLeg(AbortOnDropHandle::new(task))
    }

    /// Dispatches the leg. What is reserved at its worker is returned when it ends.
    pub(crate) fn dispatch(
        proxy: &Arc<Proxy>,
        chosen: Chosen,
        timing: Arc<Timing>,
        call: Call,
        request_id: String,
        trace: Option<Arc<Trace>>,
        deadline: Instant,
    ) -> Self {
        let work = {
            let proxy = Arc::clone(proxy);
            async move {
                let Chosen { worker, reservation: _reservation, trial, .. } = chosen;
                let started = Instant::now();
                match prefill(&proxy, &worker, &call, &request_id, trace.as_deref(), deadline).await {
                    Ok(done) => {
                        proxy.metrics.prefill_leg(LegOutcome::Done, started.elapsed());
                        proxy.metrics.prefill_kv_bytes.inc_by(done.kv_bytes);
                        trial.ended_well();
                        timing.prefilled(done);
                        Ok(())
                    }
                    Err(Failed { reason, class }) => {
                        proxy.metrics.prefill_leg(LegOutcome::Failed(reason), started.elapsed());
                        trial.failed(class);
                        Err(reason)
                    }
                }
            }
        };
        PrefillLeg(AbortOnDropHandle::new(proxy.drain.spawn(work)))
    }

    /// Lets the leg end by itself: its KV is where it was wanted, and the worker is about to say so.
    pub(crate) fn leave(self) {
        drop(self.0.detach());
    }
}

/// Why a prefill leg failed: for the path, and for the breaker.
struct Failed {
    reason: PathReason,
    class: LegFailure,
}

/// What a prefill worker's error says of it. That it takes nothing more, or that nobody fetched its KV in time, is not its fault.
fn class(status: StatusCode) -> LegFailure {
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
            LegFailure::Busy
        }
        status if status.is_server_error() => LegFailure::ServerError,
        _ => LegFailure::ClientError,
    }
}

async fn prefill(
    proxy: &Proxy,
    worker: &Worker,
    call: &Call,
    request_id: &str,
    trace: Option<&Trace>,
    deadline: Instant,
) -> Result<PrefillDone, Failed> {
    let exchange = async {
        let answer = send(proxy, worker, call, request_id, trace, deadline).await?;
        let status = answer.status;
        Ok::<_, UpstreamError>((status, answer.body.collect(PREFILL_DONE_BYTES_MAX).await?))
    };
    let failed = |reason: PathReason, class: LegFailure, cause: &dyn std::fmt::Display| {
        tracing::warn!(request_id, worker = %worker.address(), reason = %reason, "prefill leg failed: {cause}");
        Failed { reason, class }
    };
    match by(deadline, worker.address(), exchange).await {
        Ok((status, body)) if status.is_success() => {
            serde_json::from_slice(&body).map_err(|error| failed(PathReason::Protocol, LegFailure::ServerError, &error))
        }
        Ok((status, _)) => Err(failed(PathReason::PrefillFailed, class(status), &status)),
        Err(error @ UpstreamError::Timeout { .. }) => Err(failed(PathReason::Timeout, LegFailure::Timeout, &error)),
        Err(error @ UpstreamError::TooLong { .. }) => {
            Err(failed(PathReason::Protocol, LegFailure::ServerError, &error))
        }
        Err(error @ (UpstreamError::Connect { .. } | UpstreamError::Broken { .. } | UpstreamError::GivenUp { .. })) => {
            Err(failed(PathReason::PrefillUnreachable, LegFailure::Refused, &error))
        }
    }
}

/// The decode worker has answered, with its first token or with an error, or could not be reached.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) answer: Result<Answer, UpstreamError>,
    /// Ended or still under way.
    pub(crate) prefill: PrefillLeg,
}

/// Waits for the decode leg while it watches the prefill leg.
///
/// # Errors
/// Why the prefill leg failed, where it did so before the decode worker had anything to say. That ends the wait, and the
/// decode leg with it: the prefill worker may have refused before a transfer could exist, and then the decode worker would
/// wait for KV that nobody computes.
pub(crate) async fn join(
    mut prefill: PrefillLeg,
    decode: impl Future<Output = Result<Answer, UpstreamError>>,
) -> Result<Joined, PathReason> {
    let mut decode = std::pin::pin!(decode);
    tokio::select! {
        biased;
        answer = &mut decode => Ok(Joined { answer, prefill }),
        ended = &mut prefill.0 => match ended {
            Ok(Ok(())) => Ok(Joined { answer: decode.await, prefill }),
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(PathReason::PrefillFailed),
        },
    }
}
