//! A request without a decode phase (embeddings, scores, tokens of a text): to one decode engine as it came, and its answer back.

use crate::account::Account;
use crate::eligible::{Phase, eligible};
use crate::entropy;
use crate::failure::{Failure, Hop};
use crate::legs;
use crate::pipeline::{Answer, AnswerBody, WHOLE_ANSWER_BYTES_MAX};
use crate::proxy::Proxy;
use crate::upstream::{Request, UpstreamError, by};
use crate::workers::Worker;
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method};
use std::sync::Arc;
use tokio::time::Instant;

/// Sends it to the decode engine with the least to do, and where that can't be connected to, to others: nothing was sent then.
///
/// # Errors
/// See [`Failure`].
pub(crate) async fn run(
    proxy: &Arc<Proxy>,
    path: &'static str,
    id: &str,
    headers: HeaderMap,
    body: Bytes,
    arrived: Instant,
    account: &mut Account,
) -> Result<Answer, Failure> {
    let deadline = arrived + proxy.limits.request_timeout;
    let table = proxy.workers.table();
    let own = proxy.own(&table);
    let mut workers: Vec<&Arc<Worker>> =
        table.workers.iter().filter(|worker| eligible(own, worker, Phase::Decode).is_ok()).collect();
    let draw = entropy::quick() as usize;
    let count = workers.len().max(1);
    workers.rotate_left(draw % count);
    workers.sort_by_key(|worker| worker.reserved.requests());
    let mut failure = Failure::NoDecodeWorker;
    for worker in workers {
        let _reservation = worker.reserved.reserve(0, 1);
        account.decode_worker = Some(table.public_address(worker).clone());
        let mut request = Request {
            method: Method::POST,
            path: PathAndQuery::from_static(path),
            headers: headers.clone(),
            body: body.clone().into(),
        };
        if let Some(trace) = &account.trace {
            trace.put(entropy::quick(), &mut request.headers);
        }
        legs::sign(proxy, worker, path, &mut request);
        let exchange = async {
            let answer = worker.upstream.send(&request).await?;
            Ok((answer.status, answer.headers, answer.body.collect(WHOLE_ANSWER_BYTES_MAX).await?))
        };
        match by(deadline, worker.address(), exchange).await {
            Ok((status, headers, body)) => return Ok(Answer { status, headers, body: AnswerBody::Whole(body) }),
            Err(UpstreamError::Timeout { .. }) => return Err(Failure::DeadlineExceeded),
            Err(source) => {
                tracing::debug!(request_id = id, worker = %worker.address(), "{source}");
                let is_unsent = matches!(source, UpstreamError::Connect { .. });
                failure = Failure::Unanswered { hop: Hop::Decode, worker: worker.address().clone(), source };
                if !is_unsent {
                    break;
                }
            }
        }
    }
    Err(failure)
}
