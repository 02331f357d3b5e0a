//! Does what the state machine of one request asks for, and tells it what happened. All that the request holds is in here: legs under
//! way, reservations, held KV.

use super::flight::{self, Failed, Flight, PrefillAnswer, Told};
use super::{Ask, Prefiller, release};
use crate::account::Account;
use crate::address::Address;
use crate::api;
use crate::choose::first_piece::FirstPiece;
use crate::choose::{self, Choice, Chosen, Way};
use crate::connector::{Connector, sglang, vllm_nixl};
use crate::eligible::Phase;
use crate::failure::{Failure, Hop};
use crate::legs::PrefillLeg;
use crate::payload::Payload;
use crate::pipeline::Reading;
use crate::proxy::Proxy;
use crate::pulse::Watch;
use crate::request_state::{Action, Actions, Event, Handle, HandleId, Machine, NoPrefill, Order, Why};
use crate::upstream;
use crate::workers::{Reservation, Worker};
use baton_wire::{Path, PathReason};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// After a client has left: how long a decode leg with a handle gets for its headers before its half of the connection is closed. By
/// then the engine has read the request, and taking note of the end is what frees the KV; the headers of a stream come sooner.
const LEFT_PATIENCE: Duration = Duration::from_millis(250);

/// After a client has left: how long its legs may take in all to come to an end.
const COLLECT_TIMEOUT: Duration = Duration::from_secs(30);

/// KV that a prefill engine holds.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) hold: crate::ledger::Hold,
    pub(super) handle: vllm_nixl::Handle,
    pub(super) deadline: Instant,
    pub(super) worker: Arc<Worker>,
}

/// What a step came to.
pub(super) enum Step {
    On,
    Answer(Box<Answered>),
    Fail(Failure),
}

/// A decode engine has answered.
pub(super) struct Answered {
    pub(super) path: Path,
    pub(super) prefill_worker: Option<Address>,
    pub(super) decode_worker: Address,
    pub(super) answer: upstream::Answer,
    pub(super) reservation: Reservation,
    pub(super) first_piece: Option<FirstPiece>,
    /// Under way still, with SGLang.
    pub(super) prefill: Option<PrefillLeg>,
    pub(super) reading: Reading,
}

/// One request under way.
pub(super) struct Driver {
    proxy: Arc<Proxy>,
    ask: Arc<Ask>,
    machine: Machine,
    choice: Choice,
    /// Chosen and reserved, not sent.
    next_prefill: Result<Chosen, NoPrefill>,
    next_decode: Option<Chosen>,
    /// The decode worker that was chosen last.
    decode_worker: Option<Arc<Worker>>,
    prefill: Option<Flight<PrefillAnswer>>,
    decode: Option<Flight<upstream::Answer>>,
    held: Option<Held>,
    /// Whose KV the decode leg under way continues from.
    prefilled_by: Option<Arc<Worker>>,
    /// Of the prompt, in the prefill engine's prefix cache: what the client is to be told.
    cached_tokens: Option<u64>,
    why: Option<Why>,
    /// What happened while something else was done.
    happened: VecDeque<Event>,
    outcome: Option<Step>,
    /// What the last leg that failed was answered.
    told: Option<(Hop, Told)>,
    failed_at: Option<(Hop, Address)>,
    /// A decode engine's headers are there.
    answered: Option<(upstream::Answer, Arc<Worker>, Reservation, Option<FirstPiece>)>,
    /// The decode engine under way computes the prompt: what its other streams do meanwhile.
    watch: Option<Watch>,
    /// What SGLang's prefill engine answered before its decode engine did.
    prefill_said: Option<PrefillAnswer>,
    /// SGLang's prefill engine, read beside its decode engine because the client's answer has a part of what it answers.
    merging: Option<AbortOnDropHandle<Result<PrefillAnswer, Failed>>>,
}

impl Driver {
    /// Chooses the workers; nothing is sent.
    ///
    /// # Errors
    /// When no decode worker takes work, or the request names one that can't serve it.
    #[allow(clippy::result_large_err)] // A failure ends its request, and is made once.
    pub(super) fn new(proxy: Arc<Proxy>, ask: Ask) -> Result<Self, Failure> {
        let ask = Arc::new(ask);
        let mut choice = Choice::default();
        let decode = match choice.decode(&proxy, ask.asked(), Way::Remote) {
            Err(Failure::NoDecodeWorker) => choice.decode(&proxy, ask.asked(), Way::Local)?,
            decode => decode?,
        };
        let prefill = prefill(&mut choice, &proxy, &ask, &decode.worker)?;
        let order = match proxy.connector {
            Connector::Sglang => Order::Concurrent,
            Connector::VllmNixl | Connector::Baton => Order::Sequential,
        };
        let machine = Machine::new(order, proxy.request_policy(), ask.says.prompt_tokens);
        Ok(Driver {
            proxy,
            ask,
            machine,
            choice,
            next_prefill: prefill,
            decode_worker: Some(Arc::clone(&decode.worker)),
            next_decode: Some(decode),
            prefill: None,
            decode: None,
            held: None,
            prefilled_by: None,
            cached_tokens: None,
            why: None,
            happened: VecDeque::new(),
            outcome: None,
            told: None,
            failed_at: None,
            answered: None,
            watch: None,
            prefill_said: None,
            merging: None,
        })
    }

    pub(super) fn proxy(&self) -> Arc<Proxy> {
        Arc::clone(&self.proxy)
    }

    pub(super) fn prompt_tokens(&self) -> u64 {
        self.ask.says.prompt_tokens
    }

    pub(super) fn deadline(&self) -> Instant {
        self.ask.deadline
    }

    /// Whether nothing is left for anybody to do.
    pub(super) fn is_done(&self) -> bool {
        self.prefill.is_none() && self.decode.is_none() && self.held.is_none()
    }

    /// Sends what is sent first.
    pub(super) fn begin(&mut self) {
        let event = match &self.next_prefill {
            Ok(_) => Event::PrefillChosen,
            Err(why) => Event::NoPrefill(*why),
        };
        self.happen(event);
    }

    /// Waits for what happens next and does what follows.
    pub(super) async fn step(&mut self) -> Step {
        if let Some(outcome) = self.outcome.take() {
            return outcome;
        }
        let event = self.next().await;
        self.happen(event);
        self.outcome.take().unwrap_or(Step::On)
    }

    /// Goes on without a client until nothing is held.
    pub(super) async fn leave(mut self: Box<Self>) {
        self.happen(Event::ClientLeft);
        let over = Instant::now() + COLLECT_TIMEOUT;
        let half_close = Instant::now() + LEFT_PATIENCE;
        while !self.is_done() {
            let until = if self.decode.as_ref().is_some_and(|leg| !leg.is_half_closed) { half_close } else { over };
            match tokio::time::timeout_at(until, self.next()).await {
                Ok(event) => self.happen(event),
                Err(_) if Instant::now() < over => {
                    if let Some(decode) = &mut self.decode {
                        decode.half_close();
                    }
                }
                Err(_) => {
                    self.happen(Event::Deadline);
                    break;
                }
            }
            // There is nobody to hear it.
            self.outcome = None;
        }
    }

    fn happen(&mut self, event: Event) {
        let actions = self.machine.on(event, Instant::now());
        self.act(actions);
        while let Some(event) = self.happened.pop_front() {
            let actions = self.machine.on(event, Instant::now());
            self.act(actions);
        }
    }

    async fn next(&mut self) -> Event {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if let Some(leg) = &mut self.decode
            && let Poll::Ready(ended) = leg.poll(cx)
        {
            let leg = self.decode.take().expect("it was just polled");
            return Poll::Ready(self.decode_ended(leg, ended));
        }
        if let Some(leg) = &mut self.prefill
            && let Poll::Ready(ended) = leg.poll(cx)
        {
            let leg = self.prefill.take().expect("it was just polled");
            return Poll::Ready(self.prefill_ended(leg, ended));
        }
        Poll::Pending
    }

    fn prefill_ended(&mut self, leg: Flight<PrefillAnswer>, ended: Result<PrefillAnswer, Failed>) -> Event {
        let now = Instant::now();
        match ended {
            Ok(answer) => {
                if self.proxy.connector == Connector::Sglang {
                    // It ends once the decode engine has the KV, so its time is not that of computing alone.
                    leg.trial.ended_well();
                    self.prefill_said = Some(answer);
                    return Event::PrefillAnswered { handle: None };
                }
                let said = vllm_nixl::Handle::read(self.ask.api, &answer.body);
                let done = choose::Done {
                    trial: leg.trial,
                    took: now - leg.since,
                    tokens: said.as_ref().ok().and_then(vllm_nixl::Handle::prompt_tokens),
                    cached: said.as_ref().map_or(0, vllm_nixl::Handle::cached_tokens),
                    ahead: leg.ahead,
                    rank: leg.reservation.rank(),
                };
                choose::prefill_done(&self.proxy, &self.ask, &leg.worker, done);
                let handle = match said {
                    Ok(handle) => Some(self.enter(handle, &leg.worker, now)),
                    Err(error) => {
                        tracing::debug!(request_id = self.ask.id, worker = %leg.worker.address(), "nothing is held: {error}");
                        None
                    }
                };
                Event::PrefillAnswered { handle }
            }
            Err(failed) => {
                let class = failed.class;
                choose::prefill_failed(&self.proxy, leg.trial, class, now - leg.since);
                self.failed(Hop::Prefill, &leg.worker, failed);
                self.or_deadline(Event::PrefillFailed { class }, now)
            }
        }
    }

    /// Enters held KV into the ledger.
    fn enter(&mut self, handle: vllm_nixl::Handle, worker: &Arc<Worker>, now: Instant) -> Handle {
        let deadline = now + self.proxy.resilience.lease;
        let tokens = handle.prompt_tokens().unwrap_or(self.ask.says.prompt_tokens);
        let tenant = Arc::clone(&self.ask.tenant.name);
        let hold = self.proxy.ledger.hold(worker.address().name(), tenant, tokens, deadline, now);
        let id = HandleId(hold.id());
        self.cached_tokens = Some(handle.cached_tokens());
        self.held = Some(Held { hold, handle, deadline, worker: Arc::clone(worker) });
        Handle { id, deadline }
    }

    fn decode_ended(&mut self, leg: Flight<upstream::Answer>, ended: Result<upstream::Answer, Failed>) -> Event {
        let now = Instant::now();
        match ended {
            Ok(answer) => {
                let Flight { worker, reservation, trial, since, .. } = leg;
                let answered = choose::Answered {
                    trial,
                    held_by: self.held.as_ref().map(|held| &*held.worker),
                    watch: self.watch.take(),
                    since,
                    rank: reservation.rank(),
                };
                let first_piece = choose::decode_answered(&self.proxy, &self.ask, &worker, answered);
                self.answered = Some((answer, worker, reservation, first_piece));
                Event::DecodeAnswered
            }
            // The engine read the request, saw that nobody waits, and ended it: which frees the KV as an answer would.
            Err(failed) if leg.is_half_closed && failed.reached && failed.told.is_none() => Event::DecodeAnswered,
            Err(failed) => {
                let (class, reached) = (failed.class, failed.reached);
                choose::decode_failed(leg.trial, class);
                self.failed(Hop::Decode, &leg.worker, failed);
                self.or_deadline(Event::DecodeFailed { class, reached }, now)
            }
        }
    }

    /// A leg that fails because the request is too old is no reason to try another: the end comes first, and then the leg's.
    fn or_deadline(&mut self, event: Event, now: Instant) -> Event {
        if now < self.ask.deadline {
            return event;
        }
        self.happened.push_back(event);
        Event::Deadline
    }

    fn failed(&mut self, hop: Hop, worker: &Worker, failed: Failed) {
        tracing::debug!(request_id = self.ask.id, worker = %worker.address(), leg = hop.as_str(), class = ?failed.class, "leg failed");
        self.failed_at = Some((hop, worker.address().clone()));
        if let Some(told) = failed.told {
            self.told = Some((hop, told));
        }
    }

    fn act(&mut self, actions: Actions) {
        for action in actions.iter() {
            match action {
                Action::SendPrefill { attempt } => self.send_prefill(attempt),
                Action::SendBoth { attempt } => self.send_both(attempt),
                Action::SendDecode { .. } => self.send_decode_with_handle(),
                Action::RetryDecodeElsewhere { handle } => {
                    self.proxy.metrics.retry(Hop::Decode);
                    match handle {
                        Some(_) => {
                            self.choose_decode(Way::Remote);
                            self.send_decode_with_handle();
                        }
                        None => {
                            self.choose_decode(Way::Local);
                            self.send_decode_locally();
                        }
                    }
                }
                Action::CancelPrefill => {
                    if let Some(leg) = &mut self.prefill {
                        leg.half_close();
                    }
                }
                Action::AbortPrefill => self.prefill = None,
                Action::AbortDecode => {
                    self.decode = None;
                    self.answered = None;
                }
                Action::Release { .. } => {
                    if let Some(held) = self.held.take() {
                        drop(self.proxy.drain.spawn(release::release(self.proxy(), Arc::clone(&self.ask), held)));
                    }
                }
                Action::Consumed { .. } => {
                    if let Some(Held { hold, worker, .. }) = self.held.take() {
                        self.prefilled_by = Some(worker);
                        hold.consumed();
                    }
                }
                Action::Expired { .. } => {
                    if let Some(Held { hold, .. }) = self.held.take() {
                        hold.expired();
                    }
                }
                Action::DecodeLocally(why) => {
                    self.why = Some(why);
                    self.send_decode_locally();
                }
                Action::Answer => self.outcome = self.answer(),
                Action::PassThroughError => self.outcome = Some(Step::Fail(self.passed_through())),
                Action::Unavailable { .. } => self.outcome = Some(Step::Fail(self.unavailable())),
                Action::TimedOut => self.outcome = Some(Step::Fail(self.timed_out())),
                // The stream's own (`http/stream.rs`), which is where the answer is by then.
                Action::EndWithTypedError => {}
            }
        }
    }

    /// The prefill worker of this attempt: the one that was chosen at first, then others.
    fn prefill_worker(&mut self, attempt: u32) -> Option<Chosen> {
        let first =
            std::mem::replace(&mut self.next_prefill, Err(NoPrefill::NoneAvailable(PathReason::NoPrefillWorker)));
        if attempt == 1 {
            return first.ok();
        }
        self.proxy.metrics.retry(Hop::Prefill);
        let decode = Arc::clone(self.decode_worker.as_ref()?);
        match prefill(&mut self.choice, &self.proxy, &self.ask, &decode) {
            Ok(Ok(chosen)) => Some(chosen),
            Ok(Err(why)) => {
                self.happened.push_back(Event::NoPrefill(why));
                None
            }
            Err(_) => None,
        }
    }

    fn no_prefill(&mut self) {
        if self.happened.is_empty() {
            let reason = match self.failed_at {
                Some((Hop::Prefill, _)) => PathReason::PrefillFailed,
                _ => PathReason::NoPrefillWorker,
            };
            self.happened.push_back(Event::NoPrefill(NoPrefill::NoneAvailable(reason)));
        }
    }

    fn send_prefill(&mut self, attempt: u32) {
        let Some(Chosen { worker, reservation, trial, .. }) = self.prefill_worker(attempt) else {
            return self.no_prefill();
        };
        let body = vllm_nixl::prefill(&self.ask.object, self.ask.api, None);
        self.prefill = Some(flight::prefill(&self.proxy, &self.ask, worker, reservation, trial, body));
    }

    fn send_both(&mut self, attempt: u32) {
        // Who was not at fault may have the request again, in another room.
        match (&self.failed_at, &self.decode_worker, &self.prefilled_by) {
            (Some((Hop::Prefill, _)), Some(decode), _) => self.choice.again(Phase::Decode, decode),
            (Some((Hop::Decode, _)), _, Some(prefill)) => self.choice.again(Phase::Prefill, prefill),
            _ => {}
        }
        if self.next_decode.is_none() {
            let last = self.decode_worker.clone();
            self.choose_decode(Way::Remote);
            // Where there is no other, the same again: which of the two failed first says little of who is at fault.
            if let (None, Some(last)) = (&self.next_decode, last) {
                self.choice.again(Phase::Decode, &last);
                self.choose_decode(Way::Remote);
            }
        }
        let Some(Chosen { worker, reservation, trial, .. }) = self.prefill_worker(attempt) else {
            return self.no_prefill();
        };
        let Some(decode) = self.next_decode.take() else { return self.happened.push_back(Event::NoDecode) };
        let bootstrap = sglang::Bootstrap {
            host: worker.address().host(),
            port: worker.status().and_then(|status| status.bootstrap_port),
            rooms: crate::entropy::room,
        };
        let of = u32::try_from(worker.rank_loads().len()).ok().filter(|ranks| *ranks > 1);
        let ranks = sglang::Ranks {
            prefill: reservation.rank().map(|rank| sglang::PrefillRank { rank, of }),
            decode: decode.reservation.rank(),
        };
        let hints = api::Hints::read(self.ask.api, &self.ask.object);
        let legs = match sglang::legs(&self.ask.object, &hints, bootstrap, ranks) {
            Ok(legs) => legs,
            Err(error) => {
                self.outcome = Some(Step::Fail(Failure::TooManyPrompts {
                    found: usize::try_from(error.prompts.saturating_mul(error.choices)).unwrap_or(usize::MAX),
                    max: sglang::ROOMS_MAX as usize,
                }));
                return;
            }
        };
        self.watch = None;
        self.prefilled_by = Some(Arc::clone(&worker));
        self.prefill = Some(flight::prefill(&self.proxy, &self.ask, worker, reservation, trial, legs.prefill));
        self.decode =
            Some(flight::decode(&self.proxy, &self.ask, decode.worker, decode.reservation, decode.trial, legs.decode));
    }

    fn send_decode_with_handle(&mut self) {
        self.watch = None;
        let Some(Held { handle, .. }) = &self.held else { return self.happened.push_back(Event::NoDecode) };
        let body = vllm_nixl::decode(&self.ask.object, handle);
        self.send_decode(body);
    }

    fn send_decode_locally(&mut self) {
        self.prefilled_by = None;
        self.cached_tokens = None;
        // SGLang's decode engines compute no prompts.
        let can = |chosen: &Chosen| choose::may_decode(&self.proxy, &chosen.worker, Way::Local);
        if !self.next_decode.as_ref().is_some_and(can) {
            self.choose_decode(Way::Local);
        }
        let rank = self.next_decode.as_ref().and_then(|chosen| chosen.reservation.rank());
        let watched = self.next_decode.as_ref().filter(|_| self.ask.says.stream);
        // The one before ends first, or it would be taken for another prompt's.
        self.watch = None;
        self.watch = watched.map(|chosen| chosen.worker.reserved.pulse().watch(rank, Instant::now()));
        let body = match self.proxy.connector {
            Connector::Sglang => sglang::local(&self.ask.object, rank),
            Connector::VllmNixl | Connector::Baton => vllm_nixl::local(&self.ask.object),
        };
        self.send_decode(body);
    }

    fn choose_decode(&mut self, way: Way) {
        self.next_decode = self.choice.decode(&self.proxy, self.ask.asked(), way).ok();
        if let Some(chosen) = &self.next_decode {
            self.decode_worker = Some(Arc::clone(&chosen.worker));
        }
    }

    fn send_decode(&mut self, body: Payload) {
        match self.next_decode.take() {
            Some(Chosen { worker, reservation, trial, .. }) => {
                self.decode = Some(flight::decode(&self.proxy, &self.ask, worker, reservation, trial, body));
            }
            None => self.happened.push_back(Event::NoDecode),
        }
    }
}

/// The prefill worker: the one that a header names where that is how this proxy is told, else one of its own choice.
#[allow(clippy::result_large_err)] // A failure ends its request, and is made once.
fn prefill(
    choice: &mut Choice,
    proxy: &Arc<Proxy>,
    ask: &Ask,
    decode: &Worker,
) -> Result<Result<Chosen, NoPrefill>, Failure> {
    match &ask.prefiller {
        Prefiller::Chosen => choice.prefill(proxy, ask.asked(), decode),
        Prefiller::None => Ok(Err(NoPrefill::Planned(PathReason::NoPrefillWorker))),
        Prefiller::At(_) if ask.says.handover.is_err() => choice.prefill(proxy, ask.asked(), decode),
        Prefiller::At(address) => Ok(choice.named(proxy, ask.asked(), address)),
    }
}

/// What a client is answered.
impl Driver {
    fn answer(&mut self) -> Option<Step> {
        let (answer, worker, reservation, first_piece) = self.answered.take()?;
        let path = self.why.map_or(Path::RemotePrefill, Why::path);
        let remote = path == Path::RemotePrefill;
        let reading = Reading::engine(self.ask.api, self.cached_tokens.filter(|_| remote));
        // What the prefill engine answers in SGLang's protocol is read to its end, beside the stream.
        let prefill = self.prefill.take().filter(|_| remote);
        let prefill = if self.merges_logprobs() {
            // Its request may not all be sent, and it has to be for the decode engine to answer.
            self.merging = prefill.map(|leg| AbortOnDropHandle::new(self.proxy.drain.spawn(leg.ended())));
            None
        } else {
            prefill.map(|leg| {
                PrefillLeg::of(self.proxy.drain.spawn(async move {
                    drop(leg.ended().await);
                    Ok(())
                }))
            })
        };
        let table = self.proxy.workers.table();
        let prefilled_by = self.prefilled_by.take().filter(|_| remote);
        Some(Step::Answer(Box::new(Answered {
            path,
            prefill_worker: prefilled_by.map(|worker| table.public_address(&worker).clone()),
            decode_worker: table.public_address(&worker).clone(),
            answer,
            reservation,
            first_piece,
            prefill,
            reading,
        })))
    }

    /// Whether the prefill engine's answer has a part of the client's.
    fn merges_logprobs(&self) -> bool {
        self.proxy.connector == Connector::Sglang && !self.ask.says.stream && self.ask.says.prompt_logprobs
    }

    /// An answer that is whole, with what the prefill engine alone knows put in.
    pub(super) async fn finished(
        &mut self,
        prefill: Option<PrefillLeg>,
        reading: Reading,
        whole: Bytes,
        account: &mut Account,
    ) -> Bytes {
        if let Some(leg) = prefill {
            leg.leave();
        }
        let said = match (self.merging.take(), self.prefill_said.take()) {
            (Some(leg), _) => leg.await.ok().and_then(Result::ok),
            (None, said) => said,
        };
        let whole = match said.filter(|_| self.merges_logprobs()) {
            Some(PrefillAnswer { body }) => sglang::merge_logprobs(&whole, &body),
            None => whole,
        };
        let (whole, seen) = reading.whole(whole);
        account.generated_tokens = seen;
        whole
    }

    /// An engine's error as it is: its words are what the client needs, and it would have got them without us.
    fn passed_through(&mut self) -> Failure {
        match self.told.take() {
            Some((_, Told { status, headers, body })) => Failure::PassedThrough { status, headers, body },
            None => self.unavailable(),
        }
    }

    fn unavailable(&mut self) -> Failure {
        match &self.failed_at {
            None => Failure::NoDecodeWorker,
            Some((hop, worker)) => Failure::Unavailable { hop: *hop, worker: worker.clone() },
        }
    }

    fn timed_out(&mut self) -> Failure {
        match &self.failed_at {
            Some((Hop::Decode, worker)) if Instant::now() < self.ask.deadline => {
                Failure::FirstTokenTimeout { worker: worker.clone() }
            }
            _ => Failure::DeadlineExceeded,
        }
    }
}
