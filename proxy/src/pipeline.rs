//! One client's request, in order: choose, render, choose, both legs, answer. The order and the `if`s stand here; the decisions are
//! `choose.rs`, the protocol is `connector/`, the sending `legs.rs`.
//!
//! Everything that a request holds (reservations, connections, the prefill leg) is owned by this future and then by the
//! answer that it returns, so a client that leaves drops all of it, and the abort travels forward to both workers.
//! Nothing is sent twice once the decode worker has answered: its headers leave with its first token.

pub(crate) mod continuation;
pub(crate) mod engines;
mod reading;

pub(crate) use continuation::Continuation;
use continuation::Others;
pub(crate) use reading::Reading;

use crate::account::Account;
use crate::address::Address;
use crate::choose::first_piece::FirstPiece;
use crate::choose::ours::{self, Timing};
use crate::choose::{self, Asked, Choice, Chosen, Prefix, Way};
use crate::connector::{Call, baton};
use crate::entropy;
use crate::failure::{Failure, Hop};
use crate::followed::Blocks;
use crate::forward::Hints;
use crate::legs::{self, Joined, PrefillLeg};
use crate::proxy::Proxy;
use crate::upstream::{self, UpstreamError, by};
use crate::workers::{Reservation, Table, Worker};
use baton_wire::leg::LegRequest;
use baton_wire::names::headers;
use baton_wire::render::{Endpoint, RenderResponse, RenderedPrompt};
use baton_wire::status::Status;
use baton_wire::{Path, PathReason, TransferId};
use bytes::Bytes;
use engines::Says;
use http::{HeaderMap, StatusCode, header};
use serde_json::value::RawValue;
use std::sync::Arc;
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
    /// Keeps tenants' prefix caches apart; nothing where there is one tenant.
    pub(crate) tenant_salt: Option<u64>,
    /// Workers that it names.
    pub(crate) hints: Hints,
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
    Events(Box<Events>),
}

/// A stream of events with all that must live as long as it does.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) source: upstream::Body,
    pub(crate) decode_worker: Address,
    /// Under way still where the prompt was computed remotely.
    pub(crate) prefill: Option<PrefillLeg>,
    pub(crate) reading: Reading,
    pub(crate) reservation: Reservation,
    /// What its first piece is to tell, until that has come.
    pub(crate) first_piece: Option<FirstPiece>,
    pub(crate) deadline: Instant,
    /// What it goes on with elsewhere, where its engine can.
    pub(crate) continuation: Option<Box<Continuation>>,
}

/// A request while it is served: what every attempt has in common.
struct Serving<'a> {
    proxy: &'a Arc<Proxy>,
    leg: LegRequest,
    rendered: bool,
    /// Choices of all prompts.
    num_choices: usize,
    transfers: Vec<TransferId>,
    says: Says,
    hints: Hints,
    prefix: Prefix,
    deadline: Instant,
    account: &'a mut Account,
}

/// Serves one request on a decode worker, and on a second one if the first does not answer.
///
/// # Errors
/// See [`Failure`]; the first byte of an answer has not been sent then.
pub(crate) async fn run(proxy: &Arc<Proxy>, request: ClientRequest, account: &mut Account) -> Result<Answer, Failure> {
    let ClientRequest { id, endpoint, body, tenant_salt, hints, arrived } = request;
    let leg = LegRequest {
        request_id: id,
        endpoint,
        body,
        prompts: Vec::new(),
        seed: 0,
        transfers: Vec::new(),
        planned: Path::RemotePrefill,
        created: Some(entropy::now_unix_ms() / 1000),
        tenant_salt,
        resume: None,
    };
    let deadline = arrived + proxy.limits.request_timeout;
    let mut serving = Serving {
        proxy,
        leg,
        rendered: false,
        num_choices: 0,
        transfers: Vec::new(),
        says: NOTHING_SAID,
        hints,
        prefix: Prefix::default(),
        deadline,
        account,
    };
    let mut choice = Choice::default();
    let mut failure: Option<Failure> = None;
    for attempt in 1..=DECODE_ATTEMPTS_MAX {
        let Chosen { worker: decode, reservation, trial, .. } = match choice.decode(proxy, serving.asked(), Way::Remote)
        {
            Ok(chosen) => chosen,
            Err(none) => return Err(failure.unwrap_or(none)),
        };
        if let Some(failure) = &failure {
            choice.prefill_anew();
            let hop = if serving.rendered { Hop::Decode } else { Hop::Render };
            tracing::warn!(request_id = serving.leg.request_id, worker = %decode.address(), "trying another: {failure}");
            proxy.metrics.retry(hop);
        }
        let error = match serving.attempt(&mut choice, &decode, reservation, attempt).await {
            Ok(answer) => {
                trial.ended_well();
                return Ok(serving.kept_for_more(answer, &decode, choice));
            }
            Err(error) => error,
        };
        if let Some(class) = error.of_decode_worker() {
            choose::decode_failed(trial, class);
        }
        if !error.another_may_serve() {
            return Err(error);
        }
        failure = Some(error);
    }
    Err(failure.unwrap_or(Failure::NoDecodeWorker))
}

/// What is known of a request that is not rendered yet: that our workers can hand over whatever it asks for.
const NOTHING_SAID: Says = Says {
    stream: false,
    handover: Ok(()),
    prompts: 0,
    prompt_logprobs: false,
    prompt_tokens: 0,
    lora: None,
    session: None,
};

impl Serving<'_> {
    /// One attempt, on one decode worker.
    async fn attempt(
        &mut self,
        choice: &mut Choice,
        decode: &Arc<Worker>,
        reservation: Reservation,
        attempt: u32,
    ) -> Result<Answer, Failure> {
        if !self.rendered {
            self.render(decode).await?;
        }
        let status = decode.status().expect("only workers whose status is known are chosen");
        let prefill = choice.prefill(self.proxy, self.asked(), decode)?;
        let table = self.proxy.workers.table();
        self.account.prefill_worker = None;
        self.account.decode_worker = Some(table.public_address(decode).clone());
        self.proxy.metrics.overhead.observe(self.account_age().as_secs_f64());

        let (answer, prefill) = match prefill {
            Err(why) => {
                let path = choose::without_prefill(self.proxy.connector, why);
                (self.decode_alone(decode, path).await?, None)
            }
            Ok(chosen) => {
                let worker = Arc::clone(&chosen.worker);
                match self.both_legs(decode, status, chosen, attempt).await {
                    Ok(Joined { answer, prefill }) => {
                        (answer.map_err(|error| self.unanswered(decode, error))?, Some((worker, prefill)))
                    }
                    Err(reason) => (self.decode_alone(decode, Path::Fallback(reason)).await?, None),
                }
            }
        };
        self.answer(&table, decode, reservation, answer, prefill).await
    }

    /// The prompt to token ids, once: a second decode worker of the same revision has the same tokenizer.
    async fn render(&mut self, decode: &Worker) -> Result<(), Failure> {
        let worker = decode.address();
        // The body is moved into the call and back, since it may be megabytes.
        let body = std::mem::replace(&mut self.leg.body, RawValue::NULL.to_owned());
        let bytes_max = body.get().len() * RENDERED_BYTES_PER_BODY_BYTE + TEMPLATE_BYTES_MAX;
        let (call, body) = baton::render(self.leg.endpoint, body, self.leg.tenant_salt);
        self.leg.body = body;
        let deadline = self.deadline.min(Instant::now() + RENDER_TIMEOUT);
        let exchange = async {
            let (id, trace) = (&self.leg.request_id, self.account.trace.as_deref());
            let answer = legs::send(self.proxy, decode, &call, id, trace, deadline).await?;
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
        let RenderResponse { prompts, choices, stream, seed } = serde_json::from_slice(&body).map_err(misrendered)?;
        if prompts.len() > PROMPTS_MAX {
            return Err(Failure::TooManyPrompts { found: prompts.len(), max: PROMPTS_MAX });
        }
        let cached = |prompt: &RenderedPrompt| u64::from(prompt.cached_tokens).min(prompt.token_ids.len() as u64);
        self.num_choices = prompts.len() * choices as usize;
        let said = Some((decode.number, prompts.iter().map(cached).sum()));
        let block_tokens = decode.status().map_or(0, |status| status.block_tokens);
        let (token_ids, names): (Vec<_>, Vec<_>) =
            prompts.into_iter().map(|prompt| (prompt.token_ids, prompt.block_hashes)).unzip();
        self.prefix = Prefix { chunks: None, blocks: vec![Blocks { block_tokens, prompts: names }], said };
        self.leg.prompts = token_ids;
        self.leg.seed = seed.unwrap_or_else(entropy::draw);
        self.transfers = self.leg.prompts.iter().map(|_| entropy::transfer_id()).collect();
        let (prompts, prompt_tokens) = (self.leg.prompts.len(), self.prompt_tokens());
        self.says = Says { stream, prompts, prompt_tokens, ..NOTHING_SAID };
        self.account.prompt_tokens = Some(prompt_tokens);
        self.rendered = true;
        Ok(())
    }

    /// Dispatches both legs together and waits for the decode worker's headers.
    async fn both_legs(
        &mut self,
        decode: &Worker,
        status: &Status,
        prefill: Chosen,
        attempt: u32,
    ) -> Result<Joined, PathReason> {
        let proxy = self.proxy;
        let handover = baton::Handover {
            source: prefill.worker.status().and_then(|status| status.kv_address.as_deref()).unwrap_or_default(),
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
        let timing = Timing::begin(proxy, &prefill.worker, prefill.ahead);
        let (timed, trace) = (Arc::clone(&timing), self.account.trace.clone());
        let leg = PrefillLeg::dispatch(proxy, prefill, timed, call, request_id, trace, self.deadline);
        let joined = legs::join(leg, self.decode_leg(decode, &calls.decode)).await?;
        // Headers of an answer that is not streamed come with its end, which says nothing of its first token.
        if let Ok(answer) = joined.answer.as_ref()
            && self.says.stream
            && path_of(&answer.headers) == Some(Path::RemotePrefill)
        {
            timing.first_token();
        }
        Ok(joined)
    }

    /// The decode leg without a handover.
    async fn decode_alone(&mut self, decode: &Worker, planned: Path) -> Result<upstream::Answer, Failure> {
        let calls = baton::local(&mut self.leg, planned);
        self.account.path = Some(planned);
        let since = Instant::now();
        // An answer in one piece comes with its end, which says nothing of its prompt.
        let watch = self.says.stream.then(|| decode.reserved.pulse().watch(None, since));
        let answer = self.decode_leg(decode, &calls.decode).await.map_err(|error| self.unanswered(decode, error))?;
        if let Some(watch) = watch.filter(|_| answer.status.is_success()) {
            let uncached_tokens = choose::uncached_tokens(self.proxy, self.asked(), decode);
            ours::computed_locally(self.proxy, decode, uncached_tokens, since, watch);
        }
        Ok(answer)
    }

    async fn decode_leg(&self, decode: &Worker, call: &Call) -> Result<upstream::Answer, UpstreamError> {
        let deadline = self.deadline.min(Instant::now() + self.proxy.limits.first_token_timeout);
        let (id, trace) = (&self.leg.request_id, self.account.trace.as_deref());
        legs::send(self.proxy, decode, call, id, trace, deadline).await
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
        if let Some(path) = path_of(&headers) {
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
            let reading = Reading::ours();
            let continuation = None;
            AnswerBody::Events(Box::new(Events {
                source,
                decode_worker,
                prefill,
                reading,
                reservation,
                first_piece: None,
                deadline,
                continuation,
            }))
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

    /// The answer, which takes along what another decode worker would need where it is a stream.
    fn kept_for_more(self, mut answer: Answer, decode: &Worker, choice: Choice) -> Answer {
        let Serving { proxy, leg, num_choices, says, hints, deadline, account, .. } = self;
        match &mut answer.body {
            AnswerBody::Whole(_) => {}
            AnswerBody::Events(events) => {
                let (trace, others) = (account.trace.clone(), Others { choice, says, hints });
                events.continuation = Some(Continuation::new(proxy, leg, trace, num_choices, decode, others, deadline));
            }
        }
        answer
    }

    fn unanswered(&self, decode: &Worker, source: UpstreamError) -> Failure {
        let worker = decode.address().clone();
        match source {
            UpstreamError::Timeout { .. } if Instant::now() >= self.deadline => Failure::DeadlineExceeded,
            UpstreamError::Timeout { .. } => Failure::FirstTokenTimeout { worker },
            source @ (UpstreamError::Connect { .. }
            | UpstreamError::Broken { .. }
            | UpstreamError::GivenUp { .. }
            | UpstreamError::TooLong { .. }) => Failure::Unanswered { hop: Hop::Decode, worker, source },
        }
    }

    /// What the choice of workers depends on.
    fn asked(&self) -> Asked<'_> {
        Asked { id: &self.leg.request_id, says: self.says, hints: &self.hints, prefix: &self.prefix }
    }

    fn prompt_tokens(&self) -> u64 {
        self.leg.prompts.iter().map(|prompt| prompt.len() as u64).sum()
    }

    fn account_age(&self) -> Duration {
        (self.proxy.limits.request_timeout).saturating_sub(self.deadline.saturating_duration_since(Instant::now()))
    }
}

/// The path that a decode worker says it took.
fn path_of(headers: &HeaderMap) -> Option<Path> {
    headers.get(headers::PATH)?.to_str().ok()?.parse().ok()
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
