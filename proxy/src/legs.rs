//! Sends the calls of a request's legs and watches over them: what is dispatched together, which failure ends what.
//!
//! The prefill leg runs in a task of its own, because nobody waits for it: its answer comes after its KV was released. The
//! task ends with the [`PrefillLeg`] that stands for it, so a request that is dropped takes both legs along.

use crate::connector::Call;
use crate::entropy;
use crate::metrics::LegOutcome;
use crate::proxy::Proxy;
use crate::upstream::{Answer, Request, UpstreamError, by};
use crate::workers::{Link, Report, Reservation, Worker};
use baton_wire::PathReason;
use baton_wire::leg::PrefillDone;
use baton_wire::names::headers;
use baton_wire::signing::{self, LegClaims};
use http::{HeaderMap, HeaderValue, Method, header};
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
    deadline: Instant,
) -> Result<Answer, UpstreamError> {
    let mut request =
        Request { method: Method::POST, path: call.path, headers: HeaderMap::new(), body: call.body.clone() };
    let value = |text: &str| HeaderValue::from_str(text).expect("tokens and checked request ids are header values");
    request.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    request.headers.insert(headers::REQUEST_ID, value(request_id));
    request.headers.insert(headers::TOKEN_IDS, HeaderValue::from_static("1"));
    match worker.link {
        Link::Own => {}
        Link::Peer => {
            let claims = LegClaims {
                path: call.path.to_owned(),
                body_blake3: signing::body_blake3(&call.body),
                expires_unix_ms: entropy::now_unix_ms() + LEG_TTL_MS,
            };
            request.headers.insert(headers::LEG, value(&signing::sign(&proxy.key, &claims)));
        }
    }
    let answer = by(deadline, worker.address(), worker.upstream.send(&request)).await;
    if let Err(UpstreamError::Connect { .. }) = &answer {
        proxy.workers.report(worker.link, worker.address(), Report::Unreachable);
    }
    answer
}

/// A prefill leg under way. Dropping it aborts it, here and at the worker.
#[derive(Debug)]
#[must_use = "dropping the leg aborts it"]
pub(crate) struct PrefillLeg(AbortOnDropHandle<Result<(), PathReason>>);

impl PrefillLeg {
    /// Dispatches the leg. What is reserved at its worker is returned when it ends.
    pub(crate) fn dispatch(
        proxy: &Arc<Proxy>,
        worker: Arc<Worker>,
        reservation: Reservation,
        call: Call,
        request_id: String,
        deadline: Instant,
    ) -> Self {
        let work = {
            let proxy = Arc::clone(proxy);
            async move {
                let _reservation = reservation;
                let started = Instant::now();
                let result = prefill(&proxy, &worker, &call, &request_id, deadline).await;
                let outcome = match &result {
                    Ok(_) => LegOutcome::Done,
                    Err(reason) => LegOutcome::Failed(*reason),
                };
                proxy.metrics.prefill_leg(outcome, started.elapsed());
                let done = result?;
                proxy.metrics.prefill_kv_bytes.inc_by(done.kv_bytes);
                Ok(())
            }
        };
        PrefillLeg(AbortOnDropHandle::new(proxy.drain.spawn(work)))
    }

    /// Lets the leg end by itself: its KV is where it was wanted, and the worker is about to say so.
    pub(crate) fn leave(self) {
        drop(self.0.detach());
    }
}

async fn prefill(
    proxy: &Proxy,
    worker: &Worker,
    call: &Call,
    request_id: &str,
    deadline: Instant,
) -> Result<PrefillDone, PathReason> {
    let exchange = async {
        let answer = send(proxy, worker, call, request_id, deadline).await?;
        let status = answer.status;
        Ok::<_, UpstreamError>((status, answer.body.collect(PREFILL_DONE_BYTES_MAX).await?))
    };
    let failed = |reason: PathReason, cause: &dyn std::fmt::Display| {
        tracing::warn!(request_id, worker = %worker.address(), reason = %reason, "prefill leg failed: {cause}");
        reason
    };
    match by(deadline, worker.address(), exchange).await {
        Ok((status, body)) if status.is_success() => {
            serde_json::from_slice(&body).map_err(|error| failed(PathReason::Protocol, &error))
        }
        Ok((status, _)) => Err(failed(PathReason::PrefillFailed, &status)),
        Err(error @ UpstreamError::Timeout { .. }) => Err(failed(PathReason::Timeout, &error)),
        Err(error @ UpstreamError::TooLong { .. }) => Err(failed(PathReason::Protocol, &error)),
        Err(error @ (UpstreamError::Connect { .. } | UpstreamError::Broken { .. })) => {
            Err(failed(PathReason::PrefillUnreachable, &error))
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
