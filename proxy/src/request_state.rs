//! The states of one request and of its two legs, and what follows from each event. Pure: it sends nothing and reads no
//! clock; the pipeline tells it what happened and does what it answers, in the order of the answer.
//!
//! A request and its legs have states of their own, because the legs run one after the other (vLLM: decode is sent with the
//! handle that prefill answered) or together (SGLang, ours), and one field for all would need a state for every pair.
//! Held belongs to the prefill leg: it is that worker's memory which waits.
//!
//! ```text
//! request   Choosing --PrefillChosen / NoPrefill--> Serving --DecodeAnswered--> Streaming --StreamEnded--> Done
//!              |                                       |                           |
//!              |                                       | ClientLeft, Deadline,     | StreamBroken, ClientLeft, Deadline
//!              |                                       | an error for the client   v
//!              +----------- ClientLeft, Deadline ------+----> Leaving -----------> Done
//!                                                             (nobody waits; until no leg runs and nothing is held)
//!
//! prefill   Idle --> InFlight --answered with a handle--> Held --decode answered-----------> Ended   Consumed
//!                      |  ^                                |-----given up in its lease----> Ended   Release
//!                      |  | failed, an attempt is left     +-----given up after its lease-> Ended   Expired
//!                      +--+--failed, or answered without a handle-------------------------> Ended
//!
//! decode    Idle --> InFlight --first byte--> Streaming --> Ended
//!                      |  ^
//!                      |  | failed before its first byte, an attempt is left: the next worker, the same held KV
//!                      +--+--failed----------------------------------> Ended
//! ```
//!
//! The rules, each where it is decided:
//! * One prefill serves every decode attempt in its lease ([`Machine::decode_failed`]).
//! * Nothing is sent again once the first byte is there, and nothing is answered twice.
//! * Each handle gets exactly one of Consumed, Release and Expired, also one that nobody asked for.
//! * With a handle, a client that leaves does not end the decode leg before its headers: the decode worker must have seen
//!   the request, because only that makes it free the prefill worker's blocks ([`Machine::leave`]).
//! * An event that cannot be in a state changes nothing.

mod action;
mod event;
#[cfg(test)]
mod tests;

pub(crate) use action::{Action, Actions, Why};
pub(crate) use event::{Event, Handle, HandleId, LegFailure, NoPrefill};

use std::time::Duration;
use tokio::time::Instant;

/// How much of a lease must be left for another decode attempt: a connection attempt to a worker that may be dead, and the
/// turn that the request waits for until its scheduler asks for the blocks. A fifteenth of vLLM's default lease of 30 s.
pub(crate) const LEASE_MARGIN: Duration = Duration::from_secs(2);

/// How a connector's legs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Order {
    /// Decode is sent with what prefill answered.
    Sequential,
    /// Both at once.
    Concurrent,
}

/// Which prompts a decode worker may compute itself when remote prefill has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// None.
    Never,
    /// Prompts of at most so many tokens: longer ones would delay everybody who is generating there.
    Short {
        /// The longest.
        tokens_max: u64,
    },
    /// Any.
    Always,
}

/// What is fixed for all requests of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Policy {
    /// Prefill workers that one request is tried on; 0 counts as 1.
    pub(crate) prefill_attempts_max: u32,
    /// Decode workers that one held KV is tried on, and as many again when the prompt is computed there; 0 counts as 1.
    pub(crate) decode_attempts_max: u32,
    pub(crate) fallback: Fallback,
    /// Fail rather than compute a prompt on a decode worker, unless that is where the plan wants it.
    pub(crate) enforce_disagg: bool,
    /// What a client is told to wait when no worker could serve.
    pub(crate) retry_after: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Request {
    /// Nothing is sent.
    Choosing,
    /// A leg is sent, the client has nothing.
    Serving,
    /// The client has the first byte.
    Streaming,
    /// The client has left or has its answer, and a leg runs or KV is held.
    Leaving,
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Prefill {
    Idle,
    InFlight,
    Held {
        handle: Handle,
        /// Its lease ended while a decode leg was under way. That decode worker may have had it prolonged, so only its
        /// failure says that the KV is gone.
        lease_over: bool,
    },
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Decode {
    Idle,
    InFlight,
    Streaming,
    Ended,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Machine {
    order: Order,
    policy: Policy,
    prompt_tokens: u64,
    request: Request,
    prefill: Prefill,
    decode: Decode,
    /// The decode worker computes the prompt.
    local: bool,
    /// Prefills sent: the number of the attempt.
    attempts: u32,
    prefill_failures: u32,
    /// Since remote or local prefill began.
    decode_failures: u32,
}

impl Machine {
    /// A request of which nothing is sent. The number of its tokens may be an estimate: it is compared with
    /// [`Fallback::Short`] only.
    pub(crate) fn new(order: Order, policy: Policy, prompt_tokens: u64) -> Self {
        Machine {
            order,
            policy,
            prompt_tokens,
            request: Request::Choosing,
            prefill: Prefill::Idle,
            decode: Decode::Idle,
            local: false,
            attempts: 0,
            prefill_failures: 0,
            decode_failures: 0,
        }
    }

    /// Whether nothing is left to do. A prefill leg that still runs after the whole answer was streamed ends by itself.
    #[cfg(test)]
    pub(crate) fn is_done(&self) -> bool {
        self.request == Request::Done
    }

    /// When to say [`Event::LeaseExpired`], if KV is held.
    #[cfg(test)]
    pub(crate) fn lease_deadline(&self) -> Option<Instant> {
        match self.prefill {
            Prefill::Held { handle, lease_over: false } => Some(handle.deadline),
            Prefill::Held { lease_over: true, .. } | Prefill::Idle | Prefill::InFlight | Prefill::Ended => None,
        }
    }

    /// What follows from an event. Legs that were aborted are expected to say nothing more; a late word does no harm.
    pub(crate) fn on(&mut self, event: Event, now: Instant) -> Actions {
        let mut actions = Actions::default();
        let then = &mut actions;
        match event {
            Event::PrefillChosen => self.prefill_chosen(then),
            Event::NoPrefill(why) => self.no_prefill(why, then),
            Event::NoDecode => self.no_decode(now, then),
            Event::PrefillAnswered { handle } => self.prefill_answered(handle, now, then),
            Event::PrefillFailed { class } => self.prefill_failed(class, then),
            Event::DecodeAnswered => self.decode_answered(then),
            Event::DecodeFailed { class, reached } => self.decode_failed(class, reached, now, then),
            Event::StreamEnded => self.stream_ended(then),
            Event::StreamBroken => self.stream_broken(then),
            Event::ClientLeft => self.client_left(then),
            Event::Deadline => self.deadline(now, then),
            Event::LeaseExpired => self.lease_expired(then),
        }
        let leg_runs = self.prefill == Prefill::InFlight || self.decode == Decode::InFlight;
        if self.request == Request::Leaving && !leg_runs && !matches!(self.prefill, Prefill::Held { .. }) {
            self.request = Request::Done;
        }
        actions
    }

    fn prefill_chosen(&mut self, then: &mut Actions) {
        if self.request == Request::Choosing {
            self.send_prefill(then);
        }
    }

    /// At first, or when another attempt found no other worker.
    fn no_prefill(&mut self, why: NoPrefill, then: &mut Actions) {
        match self.request {
            Request::Choosing => {}
            Request::Serving if self.prefill == Prefill::InFlight => {
                self.prefill = Prefill::Ended;
                self.decode = Decode::Ended;
            }
            Request::Serving | Request::Streaming | Request::Leaving | Request::Done => return,
        }
        match why {
            NoPrefill::Planned(reason) => self.decode_locally(Why::Planned(reason), then),
            NoPrefill::NotActivated if self.policy.enforce_disagg => self.unavailable(then),
            NoPrefill::NotActivated => self.decode_locally(Why::NotActivated, then),
            NoPrefill::NoneAvailable(reason) => self.fall_back(Why::NoneAvailable(reason), then),
        }
    }

    /// A decode leg was to be sent and there is no worker for it.
    fn no_decode(&mut self, now: Instant, then: &mut Actions) {
        if self.decode != Decode::InFlight {
            return;
        }
        self.decode = Decode::Ended;
        self.abort_prefill(then);
        self.give_back(now, then);
        match self.request {
            Request::Serving => self.unavailable(then),
            Request::Choosing | Request::Streaming | Request::Leaving | Request::Done => {}
        }
    }

    fn prefill_answered(&mut self, handle: Option<Handle>, now: Instant, then: &mut Actions) {
        if self.prefill != Prefill::InFlight {
            // Nobody waits for it, and still it is memory of a worker.
            if let Some(handle) = handle {
                then.push(Action::Release { handle: handle.id });
            }
            return;
        }
        self.prefill = handle.map_or(Prefill::Ended, |handle| Prefill::Held { handle, lease_over: false });
        match (self.request, self.order, handle) {
            (Request::Serving, Order::Sequential, Some(handle)) if now < handle.deadline => {
                self.decode = Decode::InFlight;
                then.push(Action::SendDecode { handle: handle.id });
            }
            (Request::Serving, Order::Sequential, Some(_)) => {
                self.give_back(now, then);
                self.fall_back(Why::LeaseExpired, then);
            }
            // No failure: vLLM holds nothing for a prompt whose first token is its last. Another prefill would answer the
            // same, so the policy for failures is not asked.
            (Request::Serving, Order::Sequential, None) if self.policy.enforce_disagg => self.unavailable(then),
            (Request::Serving, Order::Sequential, None) => self.decode_locally(Why::NothingHeld, then),
            (Request::Serving, Order::Concurrent, _) => {}
            (Request::Leaving, _, _) => self.give_back(now, then),
            // The decode leg that was sent together with it has answered.
            (Request::Choosing | Request::Streaming | Request::Done, _, _) => self.consumed(then),
        }
    }

    fn prefill_failed(&mut self, class: LegFailure, then: &mut Actions) {
        if self.prefill != Prefill::InFlight {
            return;
        }
        self.prefill = Prefill::Ended;
        match self.request {
            Request::Serving => {}
            // After the decode leg's first byte the KV is complete there, so this is no error of the request.
            Request::Streaming | Request::Done | Request::Choosing | Request::Leaving => return,
        }
        self.abort_decode(then);
        match class {
            LegFailure::ClientError => self.answer_error(Action::PassThroughError, then),
            LegFailure::Refused | LegFailure::ServerError | LegFailure::Busy | LegFailure::Timeout => {
                self.prefill_failures += 1;
                if self.prefill_failures < self.policy.prefill_attempts_max {
                    self.send_prefill(then);
                } else {
                    self.fall_back(Why::Prefill(class), then);
                }
            }
        }
    }

    fn decode_answered(&mut self, then: &mut Actions) {
        if self.decode != Decode::InFlight {
            return;
        }
        self.consumed(then);
        match self.request {
            Request::Serving => {
                self.request = Request::Streaming;
                self.decode = Decode::Streaming;
                then.push(Action::Answer);
            }
            Request::Choosing | Request::Streaming | Request::Leaving | Request::Done => self.abort_decode(then),
        }
    }

    /// Before its first byte.
    fn decode_failed(&mut self, class: LegFailure, reached: bool, now: Instant, then: &mut Actions) {
        if self.decode != Decode::InFlight {
            return;
        }
        self.decode = Decode::Ended;
        match self.request {
            Request::Serving => {}
            Request::Choosing | Request::Streaming | Request::Leaving | Request::Done => {
                self.give_back(now, then);
                return;
            }
        }
        let answer = match class {
            LegFailure::ClientError => Some(Action::PassThroughError),
            // A second worker would get what is left of the client's patience.
            LegFailure::Timeout if reached => Some(Action::TimedOut),
            LegFailure::Timeout | LegFailure::Refused | LegFailure::ServerError | LegFailure::Busy => None,
        };
        if let Some(answer) = answer {
            self.abort_prefill(then);
            self.give_back(now, then);
            self.answer_error(answer, then);
            return;
        }
        self.decode_failures += 1;
        let another = self.decode_failures < self.policy.decode_attempts_max;
        match (self.local, self.order, self.prefill) {
            (true, _, _) if another => self.retry_decode(None, then),
            (true, _, _) => match class {
                LegFailure::ServerError | LegFailure::Busy | LegFailure::ClientError => {
                    self.answer_error(Action::PassThroughError, then);
                }
                LegFailure::Refused | LegFailure::Timeout => self.unavailable(then),
            },
            (false, Order::Sequential, Prefill::Held { handle, lease_over }) => {
                let in_lease = !lease_over && now + LEASE_MARGIN < handle.deadline;
                if another && in_lease {
                    self.retry_decode(Some(handle.id), then);
                } else {
                    self.give_back(now, then);
                    self.fall_back(if in_lease { Why::Handover(class) } else { Why::LeaseExpired }, then);
                }
            }
            (false, _, _) => {
                self.abort_prefill(then);
                self.give_back(now, then);
                if another {
                    self.send_prefill(then);
                } else {
                    self.fall_back(Why::Handover(class), then);
                }
            }
        }
    }

    fn stream_ended(&mut self, _: &mut Actions) {
        if self.request == Request::Streaming {
            self.decode = Decode::Ended;
            self.request = Request::Done;
        }
    }

    fn stream_broken(&mut self, then: &mut Actions) {
        if self.request == Request::Streaming {
            self.decode = Decode::Ended;
            self.abort_prefill(then);
            then.push(Action::EndWithTypedError);
            self.request = Request::Done;
        }
    }

    fn client_left(&mut self, then: &mut Actions) {
        match self.request {
            Request::Choosing => self.request = Request::Done,
            Request::Serving => self.leave(then),
            Request::Streaming => {
                self.abort_decode(then);
                self.abort_prefill(then);
                self.request = Request::Done;
            }
            Request::Leaving | Request::Done => {}
        }
    }

    /// The request is older than it may get. A second time, it is the end of the patience with legs that are collected.
    fn deadline(&mut self, now: Instant, then: &mut Actions) {
        match self.request {
            Request::Choosing => self.answer_error(Action::TimedOut, then),
            Request::Serving => {
                then.push(Action::TimedOut);
                self.leave(then);
            }
            Request::Streaming => {
                self.abort_decode(then);
                self.abort_prefill(then);
                then.push(Action::EndWithTypedError);
                self.request = Request::Done;
            }
            Request::Leaving => {
                self.abort_prefill(then);
                self.abort_decode(then);
                self.give_back(now, then);
            }
            Request::Done => {}
        }
    }

    fn lease_expired(&mut self, then: &mut Actions) {
        let Prefill::Held { handle, .. } = self.prefill else { return };
        self.prefill = Prefill::Held { handle, lease_over: true };
        if self.decode != Decode::InFlight {
            self.prefill = Prefill::Ended;
            then.push(Action::Expired { handle: handle.id });
        }
    }

    /// Nobody waits for an answer any more: ends what may be ended at once. A prefill leg whose answer would be a handle is
    /// only asked to stop, and a decode leg with a handle gets as far as its headers.
    fn leave(&mut self, then: &mut Actions) {
        self.request = Request::Leaving;
        match (self.prefill, self.order) {
            (Prefill::InFlight, Order::Sequential) => then.push(Action::CancelPrefill),
            (Prefill::InFlight, Order::Concurrent) => {
                self.abort_prefill(then);
                self.abort_decode(then);
            }
            (Prefill::Held { .. }, _) => {}
            (Prefill::Idle | Prefill::Ended, _) => self.abort_decode(then),
        }
    }

    fn send_prefill(&mut self, then: &mut Actions) {
        self.request = Request::Serving;
        self.prefill = Prefill::InFlight;
        self.attempts += 1;
        let attempt = self.attempts;
        match self.order {
            Order::Sequential => then.push(Action::SendPrefill { attempt }),
            Order::Concurrent => {
                self.decode = Decode::InFlight;
                then.push(Action::SendBoth { attempt });
            }
        }
    }

    fn retry_decode(&mut self, handle: Option<HandleId>, then: &mut Actions) {
        self.decode = Decode::InFlight;
        then.push(Action::RetryDecodeElsewhere { handle });
    }

    fn fall_back(&mut self, why: Why, then: &mut Actions) {
        let allowed = match self.policy.fallback {
            Fallback::Never => false,
            Fallback::Short { tokens_max } => self.prompt_tokens <= tokens_max,
            Fallback::Always => true,
        };
        if allowed && !self.policy.enforce_disagg {
            self.decode_locally(why, then);
        } else {
            self.unavailable(then);
        }
    }

    fn decode_locally(&mut self, why: Why, then: &mut Actions) {
        self.request = Request::Serving;
        self.decode = Decode::InFlight;
        self.local = true;
        self.decode_failures = 0;
        then.push(Action::DecodeLocally(why));
    }

    fn unavailable(&mut self, then: &mut Actions) {
        let retry_after = self.policy.retry_after;
        self.answer_error(Action::Unavailable { retry_after }, then);
    }

    fn answer_error(&mut self, error: Action, then: &mut Actions) {
        self.request = Request::Leaving;
        then.push(error);
    }

    fn abort_prefill(&mut self, then: &mut Actions) {
        if self.prefill == Prefill::InFlight {
            self.prefill = Prefill::Ended;
            then.push(Action::AbortPrefill);
        }
    }

    fn abort_decode(&mut self, then: &mut Actions) {
        if matches!(self.decode, Decode::InFlight | Decode::Streaming) {
            self.decode = Decode::Ended;
            then.push(Action::AbortDecode);
        }
    }

    fn consumed(&mut self, then: &mut Actions) {
        if let Prefill::Held { handle, .. } = self.prefill {
            self.prefill = Prefill::Ended;
            then.push(Action::Consumed { handle: handle.id });
        }
    }

    /// Ends the hold without an answer. A worker that failed may have taken the KV before; one release too many costs one
    /// token, one too few costs the prefill worker its blocks for the whole lease.
    fn give_back(&mut self, now: Instant, then: &mut Actions) {
        if let Prefill::Held { handle, lease_over } = self.prefill {
            self.prefill = Prefill::Ended;
            let over = lease_over || now >= handle.deadline;
            let handle = handle.id;
            then.push(if over { Action::Expired { handle } } else { Action::Release { handle } });
        }
    }
}
