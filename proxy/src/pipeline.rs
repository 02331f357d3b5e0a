//! One client's request, in order: render, plan, pick, both legs, answer. The order and the `if`s stand here; the decisions
//! are `plan.rs` and `pick.rs` (pure), the protocol is `connector/`, the sending `legs.rs`.
//!
//! Everything that a request holds (reservations, connections, the prefill leg) is owned by this future and then by the
//! answer that it returns, so a client that leaves drops all of it, and the abort travels forward to both workers.
//! Nothing is sent twice once the decode worker has answered: its headers leave with its first token.

use crate::account::Account;
use crate::address::Address;
use crate::connector::{Call, baton};
use crate::decisions::{Candidate, Decision};
use crate::eligible::{Phase, eligible};
use crate::entropy;
use crate::failure::{Failure, Hop};
use crate::legs::{self, Joined, PrefillLeg};
use crate::pick::{self, DecodeCandidate, PrefillCandidate};
use crate::plan::{Facts, Plan, plan};
use crate::proxy::Proxy;
use crate::upstream::{self, UpstreamError, by};
use crate::workers::{Reservation, Table, Worker};
use baton_wire::leg::LegRequest;
use baton_wire::names::headers;
use baton_wire::render::{Endpoint, RenderResponse, RenderedPrompt};
use baton_wire::status::Status;
use baton_wire::{Path, PathReason, TransferId};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde_json::value::RawValue;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Decode workers that one request is tried on. A second one serves when the first has just died; a third would mean that
/// the request or the whole pool is at fault.
const DECODE_ATTEMPTS_MAX: u32 = 2;

/// Prompts in one request: each is a handover of its own, with a token of about half a kilobyte in both legs.
const PROMPTS_MAX: usize = 1024;

/// How long rendering may take: the longest body is tokenised in a few seconds, on a core that is busy with the engine.
const RENDER_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of a rendered prompt: each byte of the largest body could be a token of 7 digits with its comma, and a block hash
/// takes 35 bytes for each 32 tokens.
const RENDERED_BYTES_PER_BODY_BYTE: usize = 10;

/// What a chat template may add to a prompt, on top.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// Bytes of an answer that is not streamed: 128 choices of 4,096 tokens with 20 alternatives each would be cut; every answer
/// that a model's length allows without alternatives fits many times over.
const WHOLE_ANSWER_BYTES_MAX: usize = 64 << 20;

/// Bytes of a worker's error: a sentence or two.
const ERROR_BYTES_MAX: usize = 64 << 10;

/// A client's request, read and within its limits.
#[derive(Debug)]
pub(crate) struct ClientRequest {
    pub(crate) id: String,
    pub(crate) endpoint: Endpoint,
    pub(crate) body: Box<RawValue>,
    pub(crate) arrived: Instant,
}

/// What the client is answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: AnswerBody,
}

/// The answer's body.
#[derive(Debug)]
pub(crate) enum AnswerBody {
    /// All of it.
    Whole(Bytes),
    /// A stream of events that has begun.
    Events(Events),
}

/// A stream of events with all that must live as long as it does.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) source: upstream::Body,
    pub(crate) decode_worker: Address,
    /// Under way still where the prompt was computed remotely.
    pub(crate) prefill: Option<PrefillLeg>,
    pub(crate) _reservation: Reservation,
    pub(crate) deadline: Instant,
}

/// A request while it is served: what every attempt has in common.
struct Serving<'a> {
    proxy: &'a Arc<Proxy>,
    leg: LegRequest,
    rendered: bool,
    transfers: Vec<TransferId>,
    /// Prompt tokens that the worker which rendered has in its prefix cache.
    cached: Option<(Address, u64)>,
    deadline: Instant,
    account: &'a mut Account,
}

/// Serves one request on a decode worker, and on a second one if the first does not answer.
///
/// # Errors
/// See [`Failure`]; the first byte of an answer has not been sent then.
pub(crate) async fn run(proxy: &Arc<Proxy>, request: ClientRequest, account: &mut Account) -> Result<Answer, Failure> {
    let ClientRequest { id, endpoint, body, arrived } = request;
    let leg = LegRequest {
        request_id: id,
        endpoint,
        body,
        prompts: Vec::new(),
        seed: 0,
        transfers: Vec::new(),
        planned: Path::RemotePrefill,
    };
    let deadline = arrived + proxy.limits.request_timeout;
    let mut serving = Serving { proxy, leg, rendered: false, transfers: Vec::new(), cached: None, deadline, account };
    let mut tried: Vec<Address> = Vec::new();
    let mut failure = Failure::NoDecodeWorker;
    for attempt in 1..=DECODE_ATTEMPTS_MAX {
        let table = proxy.workers.table();
        let Some((decode, reservation)) = choose_decode(proxy, &table, &tried) else { break };
        if attempt > 1 {
            let hop = if serving.rendered { Hop::Decode } else { Hop::Render };
            tracing::warn!(request_id = serving.leg.request_id, worker = %decode.address(), "trying another: {failure}");
            proxy.metrics.retry(hop);
        }
        tried.push(decode.address().clone());
        match serving.attempt(&table, &decode, reservation, attempt).await {
            Err(error) if error.another_may_serve() => failure = error,
            result => return result,
        }
    }
    Err(failure)
}

impl Serving<'_> {
    /// One attempt, on one decode worker.
    async fn attempt(
        &mut self,
        table: &Table,
        decode: &Arc<Worker>,
        reservation: Reservation,
        attempt: u32,
    ) -> Result<Answer, Failure> {
        if !self.rendered {
            self.render(decode).await?;
        }
        let status = decode.status().expect("only workers whose status is known are chosen");
        let prefill = self.choose_prefill(table, decode, status, attempt);
        self.account.prefill_worker = None;
        self.account.decode_worker = Some(table.public_address(decode).clone());
        self.proxy.metrics.overhead.observe(self.account_age().as_secs_f64());

        let (answer, prefill) = match prefill {
            Err(reason) => (self.decode_alone(decode, Path::LocalPrefill(reason)).await?, None),
            Ok((worker, reserved)) => match self.both_legs(decode, status, &worker, reserved, attempt).await {
                Ok(Joined { answer, prefill }) => {
                    (answer.map_err(|error| self.unanswered(decode, error))?, Some((worker, prefill)))
                }
                Err(reason) => (self.decode_alone(decode, Path::Fallback(reason)).await?, None),
            },
        };
        self.answer(table, decode, reservation, answer, prefill).await
    }

    /// The prompt to token ids, once: a second decode worker of the same revision has the same tokenizer.
    async fn render(&mut self, decode: &Worker) -> Result<(), Failure> {
        let worker = decode.address();
        // The body is moved into the call and back, since it may be megabytes.
        let body = std::mem::replace(&mut self.leg.body, RawValue::NULL.to_owned());
        let bytes_max = body.get().len() * RENDERED_BYTES_PER_BODY_BYTE + TEMPLATE_BYTES_MAX;
        let (call, body) = baton::render(self.leg.endpoint, body);
        self.leg.body = body;
        let deadline = self.deadline.min(Instant::now() + RENDER_TIMEOUT);
        let exchange = async {
            let answer = legs::send(self.proxy, decode, &call, &self.leg.request_id, deadline).await?;
            let bytes_max = if answer.status.is_success() { bytes_max } else { ERROR_BYTES_MAX };
            Ok((answer.status, answer.headers, answer.body.collect(bytes_max).await?))
        };
        let unanswered = |source| match source {
            UpstreamError::Timeout { .. } if Instant::now() >= self.deadline => Failure::DeadlineExceeded,
            source => Failure::Unanswered { hop: Hop::Render, worker: worker.clone(), source },
        };
        let (status, headers, body) = by(deadline, worker, exchange).await.map_err(unanswered)?;
        if !status.is_success() {
            return Err(Failure::Answered { hop: Hop::Render, worker: worker.clone(), status, headers, body });
        }
        let misrendered = |source| Failure::Misrendered { worker: worker.clone(), source };
        let RenderResponse { prompts, choices: _, stream: _, seed } =
            serde_json::from_slice(&body).map_err(misrendered)?;
        if prompts.len() > PROMPTS_MAX {
            return Err(Failure::TooManyPrompts { found: prompts.len(), max: PROMPTS_MAX });
        }
        let cached = |prompt: &RenderedPrompt| u64::from(prompt.cached_tokens).min(prompt.token_ids.len() as u64);
        self.cached = Some((worker.clone(), prompts.iter().map(cached).sum()));
        self.leg.prompts = prompts.into_iter().map(|prompt| prompt.token_ids).collect();
        self.leg.seed = seed.unwrap_or_else(entropy::draw);
        self.transfers = self.leg.prompts.iter().map(|_| entropy::transfer_id()).collect();
        self.account.prompt_tokens = Some(self.prompt_tokens());
        self.rendered = true;
        Ok(())
    }

    /// The prefill worker with a reservation there, or why the decode worker computes the prompt.
    fn choose_prefill(
        &self,
        table: &Table,
        decode: &Worker,
        status: &Status,
        attempt: u32,
    ) -> Result<(Arc<Worker>, Reservation), PathReason> {
        let prompt_tokens = self.prompt_tokens();
        let policy = self.proxy.policy();
        let own = self.proxy.own(table);
        let workers: Vec<&Arc<Worker>> =
            table.workers.iter().filter(|worker| eligible(own, worker, Phase::Prefill).is_ok()).collect();
        // Another worker than the one that rendered has its own cache, of which nothing is known.
        let cached = self.cached.as_ref().filter(|(rendered_by, _)| rendered_by == decode.address());
        let cached_prompt_tokens = cached.map_or(0, |(_, tokens)| *tokens);
        let facts = Facts { decode_role: status.role, uncached_prompt_tokens: prompt_tokens - cached_prompt_tokens };

        let choosing = self.proxy.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let candidates: Vec<PrefillCandidate> = workers.iter().map(|worker| prefill_candidate(worker)).collect();
        let chosen = match plan(policy, facts) {
            Plan::Local(reason) => Err(reason),
            Plan::Remote => pick::prefill(&candidates, status.fingerprint, entropy::draw()).map(|index| {
                let worker = Arc::clone(workers[index]);
                let reservation = worker.reserved.reserve(prompt_tokens, 0);
                (worker, reservation)
            }),
        };
        drop(choosing);

        self.proxy.decisions.push(Decision {
            unix_ms: entropy::now_unix_ms(),
            request_id: self.leg.request_id.clone(),
            attempt,
            policy,
            prompts: self.leg.prompts.len(),
            prompt_tokens,
            cached_prompt_tokens,
            decode_worker: table.public_address(decode).to_string(),
            prefill_candidates: (workers.iter().zip(&candidates))
                .map(|(worker, candidate)| Candidate {
                    worker: worker.address().to_string(),
                    queued_prompt_tokens: candidate.queued_prompt_tokens,
                    reserved_prompt_tokens: candidate.reserved_prompt_tokens,
                    unpaired: (candidate.fingerprint != status.fingerprint).then_some(PathReason::FingerprintMismatch),
                })
                .collect(),
            prefill_worker: chosen.as_ref().ok().map(|(worker, _)| worker.address().to_string()),
            planned: chosen.as_ref().map_or_else(|reason| Path::LocalPrefill(*reason), |_| Path::RemotePrefill),
        });
        chosen
    }

    /// Dispatches both legs together and waits for the decode worker's headers.
    async fn both_legs(
        &mut self,
        decode: &Worker,
        status: &Status,
        prefill: &Arc<Worker>,
        reserved: Reservation,
        attempt: u32,
    ) -> Result<Joined, PathReason> {
        let proxy = self.proxy;
        let handover = baton::Handover {
            source: prefill.status().and_then(|status| status.kv_address.as_deref()).unwrap_or_default(),
            consumer: status.epoch,
            fingerprint: status.fingerprint.expect("a decode worker without fingerprint pairs with nobody"),
            block_tokens: status.block_tokens,
            attempt,
        };
        let now = entropy::now_unix_ms();
        let calls = baton::remote(&mut self.leg, &proxy.key, handover, &self.transfers, now);
        self.account.path = Some(Path::RemotePrefill);
        let request_id = self.leg.request_id.clone();
        let call = calls.prefill.expect("a remote prefill has a prefill leg");
        let leg = PrefillLeg::dispatch(proxy, Arc::clone(prefill), reserved, call, request_id, self.deadline);
        legs::join(leg, self.decode_leg(decode, &calls.decode)).await
    }

    /// The decode leg without a handover.
    async fn decode_alone(&mut self, decode: &Worker, planned: Path) -> Result<upstream::Answer, Failure> {
        let calls = baton::local(&mut self.leg, planned);
        self.account.path = Some(planned);
        self.decode_leg(decode, &calls.decode).await.map_err(|error| self.unanswered(decode, error))
    }

    async fn decode_leg(&self, decode: &Worker, call: &Call) -> Result<upstream::Answer, UpstreamError> {
        let deadline = self.deadline.min(Instant::now() + self.proxy.limits.first_token_timeout);
        legs::send(self.proxy, decode, call, &self.leg.request_id, deadline).await
    }

    /// The decode worker's answer as the client's: its error as a failure, its JSON whole, its events as they come.
    async fn answer(
        &mut self,
        table: &Table,
        decode: &Worker,
        reservation: Reservation,
        answer: upstream::Answer,
        prefill: Option<(Arc<Worker>, PrefillLeg)>,
    ) -> Result<Answer, Failure> {
        let worker = decode.address();
        let upstream::Answer { status, headers, body } = answer;
        let within = self.deadline;
        let lost = |source| match source {
            UpstreamError::Timeout { .. } => Failure::DeadlineExceeded,
            source => Failure::Lost { worker: worker.clone(), source },
        };
        if !status.is_success() {
            let body = by(within, worker, body.collect(ERROR_BYTES_MAX)).await.map_err(lost)?;
            return Err(Failure::Answered { hop: Hop::Decode, worker: worker.clone(), status, headers, body });
        }
        let said = headers.get(headers::PATH).and_then(|path| path.to_str().ok()).and_then(|path| path.parse().ok());
        if let Some(path) = said {
            self.account.path = Some(path);
        }
        // Only a worker that did take the KV needs the prefill leg any longer; otherwise it ends here, and frees its worker.
        let prefill = prefill.filter(|_| self.account.path == Some(Path::RemotePrefill));
        self.account.prefill_worker = prefill.as_ref().map(|(worker, _)| table.public_address(worker).clone());
        self.account.first_token();
        let is_events = headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/event-stream"));
        let prefill = prefill.map(|(_, leg)| leg);
        let body = if is_events {
            let (source, decode_worker, deadline) = (body, worker.clone(), self.deadline);
            AnswerBody::Events(Events { source, decode_worker, prefill, _reservation: reservation, deadline })
        } else {
            let body = by(within, worker, body.collect(WHOLE_ANSWER_BYTES_MAX)).await.map_err(lost)?;
            self.account.generated_tokens = generated_tokens(&body);
            if let Some(leg) = prefill {
                leg.leave();
            }
            AnswerBody::Whole(body)
        };
        Ok(Answer { status, headers, body })
    }

    fn unanswered(&self, decode: &Worker, source: UpstreamError) -> Failure {
        let worker = decode.address().clone();
        match source {
            UpstreamError::Timeout { .. } if Instant::now() >= self.deadline => Failure::DeadlineExceeded,
            UpstreamError::Timeout { .. } => Failure::FirstTokenTimeout { worker },
            source @ (UpstreamError::Connect { .. } | UpstreamError::Broken { .. } | UpstreamError::TooLong { .. }) => {
                Failure::Unanswered { hop: Hop::Decode, worker, source }
            }
        }
    }

    fn prompt_tokens(&self) -> u64 {
        self.leg.prompts.iter().map(|prompt| prompt.len() as u64).sum()
    }

    fn account_age(&self) -> Duration {
        (self.proxy.limits.request_timeout).saturating_sub(self.deadline.saturating_duration_since(Instant::now()))
    }
}

/// The decode worker with a reservation there: this pod's engine, or another where that can't.
fn choose_decode(proxy: &Proxy, table: &Table, tried: &[Address]) -> Option<(Arc<Worker>, Reservation)> {
    let own = proxy.own(table);
    let (workers, loads): (Vec<&Arc<Worker>>, Vec<_>) = (table.workers.iter())
        .filter(|worker| !tried.contains(worker.address()))
        .filter_map(|worker| Some((worker, eligible(own, worker, Phase::Decode).ok()?.load)))
        .unzip();
    let _choosing = proxy.choosing.lock().unwrap_or_else(PoisonError::into_inner);
    let candidates: Vec<DecodeCandidate> = (workers.iter().zip(loads))
        .map(|(worker, load)| DecodeCandidate {
            own: worker.link == crate::workers::Link::Own,
            load,
            reserved_requests: worker.reserved.requests(),
        })
        .collect();
    let worker = workers[pick::decode(&candidates, entropy::draw())?];
    Some((Arc::clone(worker), worker.reserved.reserve(0, 1)))
}

fn prefill_candidate(worker: &Worker) -> PrefillCandidate {
    let status = worker.status();
    PrefillCandidate {
        fingerprint: status.and_then(|status| status.fingerprint),
        queued_prompt_tokens: status.map_or(0, |status| status.load.queued_prompt_tokens),
        reserved_prompt_tokens: worker.reserved.prompt_tokens(),
    }
}

/// `usage.completion_tokens` of an answer that was not streamed.
fn generated_tokens(answer: &[u8]) -> Option<u64> {
    #[derive(serde::Deserialize)]
    struct Usage {
        completion_tokens: u64,
    }
    #[derive(serde::Deserialize)]
    struct Completion {
        usage: Usage,
    }
    serde_json::from_slice::<Completion>(answer).ok().map(|completion| completion.usage.completion_tokens)
}
