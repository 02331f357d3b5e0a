//! What a stream of our own workers goes on with when its decode worker is lost: the request as it was rendered, and who has had
//! it. Which worker goes on is the pipeline's choice as for any request; what the client has by then, `sse/record.rs` knows.
//!
//! The next worker computes the prompts and the token ids that the client has as one prompt, and draws what follows as the lost
//! worker would have. That holds between workers of one fingerprint, so no other one is asked.

use super::Reading;
use super::engines::Says;
use crate::address::Address;
use crate::choose::{Asked, Choice, Chosen, Prefix, Way};
use crate::connector::baton;
use crate::forward::Hints;
use crate::legs;
use crate::metrics::Continuation as Outcome;
use crate::proxy::Proxy;
use crate::trace::Trace;
use crate::upstream::{self, UpstreamError};
use crate::workers::{Reservation, Worker};
use baton_wire::leg::{LegRequest, Resume};
use baton_wire::{Epoch, Fingerprint};
use http::header;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Workers that one stream is given after the first. In the hour that a long answer takes two nodes may be lost for reasons of
/// their own, and the worker beside one of them; a request that ends its workers takes no more than four along.
const CONTINUATIONS_MAX: u32 = 3;

/// KiB of requests that all streams keep together. A request of 8,000 tokens is about 64 KiB, so there is room for those of 4,000
/// streams; a stream for which there is none ends with its decode worker.
const KEPT_KIB_MAX: usize = 256 << 10;

/// Room for requests that are kept while they are streamed.
#[derive(Debug)]
pub(crate) struct Room(Arc<Semaphore>);

impl Default for Room {
    fn default() -> Self {
        Room(Arc::new(Semaphore::new(KEPT_KIB_MAX)))
    }
}

impl Room {
    /// Room for a request, if there is any.
    fn take(&self, leg: &LegRequest) -> Option<OwnedSemaphorePermit> {
        let tokens: usize = leg.prompts.iter().map(Vec::len).sum();
        let bytes = leg.body.get().len() + tokens * size_of::<u32>();
        Arc::clone(&self.0).try_acquire_many_owned(u32::try_from(bytes.div_ceil(1024)).ok()?).ok()
    }
}

/// What a stream goes on with.
#[derive(Debug)]
pub(crate) struct Continuation {
    proxy: Arc<Proxy>,
    /// Absent where there was no room to keep it.
    kept: Option<Kept>,
    trace: Option<Arc<Trace>>,
    num_choices: usize,
    fingerprint: Option<Fingerprint>,
    /// Whoever has had the request, by address and, since a pod's engine has two, by process.
    others: Others,
    processes: Vec<Epoch>,
    left: u32,
    deadline: Instant,
}

#[derive(Debug)]
struct Kept {
    leg: LegRequest,
    _room: OwnedSemaphorePermit,
}

/// How another decode worker is chosen, and which were tried.
#[derive(Debug)]
pub(super) struct Others {
    pub(super) choice: Choice,
    pub(super) says: Says,
    pub(super) hints: Hints,
}

/// A stream that goes on.
#[derive(Debug)]
pub(crate) struct Continued {
    pub(crate) source: upstream::Body,
    pub(crate) decode_worker: Address,
    /// The worker's address as other pods know it.
    pub(crate) public_address: Address,
    pub(crate) reservation: Reservation,
    /// Should this worker be lost, too.
    pub(crate) continuation: Box<Continuation>,
}

/// A stream between two workers. Dropped, it ends what is under way.
pub(crate) struct GoingOn(Pin<Box<dyn Future<Output = Option<Continued>> + Send>>);

impl std::fmt::Debug for GoingOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GoingOn")
    }
}

impl Future for GoingOn {
    type Output = Option<Continued>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Continued>> {
        self.0.as_mut().poll(cx)
    }
}

impl Continuation {
    /// For a stream that `decode` has begun, the last of those that were tried.
    pub(super) fn new(
        proxy: &Arc<Proxy>,
        leg: LegRequest,
        trace: Option<Arc<Trace>>,
        num_choices: usize,
        decode: &Worker,
        others: Others,
        deadline: Instant,
    ) -> Box<Self> {
        let status = decode.status();
        Box::new(Continuation {
            kept: proxy.kept.take(&leg).map(|room| Kept { leg, _room: room }),
            trace,
            proxy: Arc::clone(proxy),
            num_choices,
            fingerprint: status.and_then(|status| status.fingerprint),
            others,
            processes: status.map(|status| status.epoch).into_iter().collect(),
            left: CONTINUATIONS_MAX,
            deadline,
        })
    }

    /// The worker is lost: begins to go on elsewhere, if it is known what the client has.
    pub(crate) fn go_on(self: Box<Self>, reading: &mut Reading) -> Option<GoingOn> {
        let resume = self.kept.as_ref().and_then(|_| reading.resume(self.num_choices));
        if resume.is_none() {
            self.proxy.metrics.continuation(Outcome::Unrecorded);
        }
        Some(GoingOn(Box::pin(self.elsewhere(resume?))))
    }

    async fn elsewhere(mut self: Box<Self>, resume: Resume) -> Option<Continued> {
        let call = baton::resumed(&mut self.kept.as_mut()?.leg, resume);
        let request_id = self.kept.as_ref()?.leg.request_id.clone();
        let outcome = loop {
            if self.left == 0 || Instant::now() >= self.deadline {
                break Outcome::Failed;
            }
            let Some((chosen, public_address)) = self.choose() else { break Outcome::NoWorker };
            let Chosen { worker, reservation, trial, .. } = chosen;
            let deadline = self.deadline.min(Instant::now() + self.proxy.limits.first_token_timeout);
            let failed = match legs::send(&self.proxy, &worker, &call, &request_id, self.trace.as_deref(), deadline)
                .await
            {
                Ok(answer) if answer.status.is_success() && is_events(&answer) => {
                    tracing::warn!(request_id, worker = %worker.address(), "the stream of a lost decode worker goes on");
                    self.left -= 1;
                    trial.ended_well();
                    self.proxy.metrics.continuation(Outcome::Continued);
                    return Some(Continued {
                        source: answer.body,
                        decode_worker: worker.address().clone(),
                        public_address,
                        reservation,
                        continuation: self,
                    });
                }
                Ok(answer) => format!("it answered {}", answer.status),
                Err(error) => {
                    // Who could not be reached has not had the request, so it can't be the request's fault.
                    self.left += u32::from(matches!(error, UpstreamError::Connect { .. }));
                    error.to_string()
                }
            };
            self.left -= 1;
            tracing::warn!(request_id, worker = %worker.address(), "can't go on with the stream of a lost worker: {failed}");
        };
        self.proxy.metrics.continuation(outcome);
        None
    }

    /// A decode worker that has not had the request and computes the same, with a reservation there.
    fn choose(&mut self) -> Option<(Chosen, Address)> {
        // By load alone: what a worker has cached of the prompt counts little against what all others wait for.
        let prefix = Prefix::default();
        loop {
            let table = self.proxy.workers.table();
            let Others { choice, says, hints } = &mut self.others;
            let id = self.kept.as_ref().map_or("", |kept| &kept.leg.request_id);
            let asked = Asked { id, says: *says, hints, prefix: &prefix };
            let chosen = choice.decode(&self.proxy, asked, Way::Remote).ok()?;
            let status = chosen.worker.status().expect("only workers whose status is known are chosen");
            if status.fingerprint == self.fingerprint && !self.processes.contains(&status.epoch) {
                self.processes.push(status.epoch);
                let public_address = table.public_address(&chosen.worker).clone();
                return Some((chosen, public_address));
            }
        }
    }
}

fn is_events(answer: &upstream::Answer) -> bool {
    let kind = answer.headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/event-stream"))
}
