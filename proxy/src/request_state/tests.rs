//! Rules by example, every reachable state by exhaustion, and long histories by chance.

use super::*;
use baton_wire::{Path, PathReason};
use proptest::prelude::*;
use std::collections::{BTreeSet, HashSet};

const LEASE: Duration = Duration::from_secs(30);
const RETRY_AFTER: Duration = Duration::from_secs(1);
const POLICY: Policy = Policy {
    prefill_attempts_max: 2,
    decode_attempts_max: 2,
    fallback: Fallback::Short { tokens_max: 100 },
    enforce_disagg: false,
    retry_after: RETRY_AFTER,
};
const SHORT: u64 = 100;
const LONG: u64 = 101;
const UNAVAILABLE: Action = Action::Unavailable { retry_after: RETRY_AFTER };
const H: HandleId = HandleId(7);

use Action::*;
use Event::{ClientLeft, Deadline, DecodeAnswered, LeaseExpired, NoDecode, PrefillChosen, StreamBroken, StreamEnded};

fn prefill_failed(class: LegFailure) -> Event {
    Event::PrefillFailed { class }
}

fn decode_failed(class: LegFailure) -> Event {
    Event::DecodeFailed { class, reached: class != LegFailure::Refused }
}

/// Each step: when, what happened, what follows.
fn check(order: Order, policy: Policy, prompt_tokens: u64, steps: &[(u64, Event, &[Action])]) {
    let start = Instant::now();
    let mut machine = Machine::new(order, policy, prompt_tokens);
    for (step, (seconds, event, expect)) in steps.iter().enumerate() {
        let event = match *event {
            // The examples' handles have a lease from the start on.
            Event::PrefillAnswered { handle: Some(handle) } => {
                Event::PrefillAnswered { handle: Some(Handle { deadline: start + LEASE, ..handle }) }
            }
            event => event,
        };
        let actions = machine.on(event, start + Duration::from_secs(*seconds));
        assert_eq!(actions.iter().collect::<Vec<_>>(), *expect, "step {step}, {event:?}, {machine:?}");
    }
    assert!(machine.is_done(), "{machine:?}");
}

fn sequential(steps: &[(u64, Event, &[Action])]) {
    check(Order::Sequential, POLICY, LONG, steps);
}

fn concurrent(steps: &[(u64, Event, &[Action])]) {
    check(Order::Concurrent, POLICY, LONG, steps);
}

fn held() -> Event {
    Event::PrefillAnswered { handle: Some(Handle { id: H, deadline: Instant::now() }) }
}

const DONE: Event = Event::PrefillAnswered { handle: None };

#[test]
fn a_request_runs_in_sequence() {
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (2, DecodeAnswered, &[Consumed { handle: H }, Answer]),
        (3, StreamEnded, &[]),
    ]);
}

#[test]
fn a_request_runs_on_both_workers_at_once() {
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, DecodeAnswered, &[Answer]),
        (2, DONE, &[]),
        (3, StreamEnded, &[]),
    ]);
}

#[test]
fn a_decode_worker_that_fails_is_replaced_with_one_prefill() {
    for class in [LegFailure::Refused, LegFailure::ServerError, LegFailure::Busy] {
        sequential(&[
            (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
            (1, held(), &[SendDecode { handle: H }]),
            (2, decode_failed(class), &[RetryDecodeElsewhere { handle: Some(H) }]),
            (3, DecodeAnswered, &[Consumed { handle: H }, Answer]),
            (4, StreamEnded, &[]),
        ]);
    }
}

#[test]
fn held_kv_that_no_decode_worker_takes_is_released() {
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (2, decode_failed(LegFailure::Refused), &[RetryDecodeElsewhere { handle: Some(H) }]),
        (3, decode_failed(LegFailure::ServerError), &[Release { handle: H }, UNAVAILABLE]),
    ]);
    let why = Why::Handover(LegFailure::ServerError);
    check(
        Order::Sequential,
        POLICY,
        SHORT,
        &[
            (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
            (1, held(), &[SendDecode { handle: H }]),
            (2, decode_failed(LegFailure::Refused), &[RetryDecodeElsewhere { handle: Some(H) }]),
            (3, decode_failed(LegFailure::ServerError), &[Release { handle: H }, DecodeLocally(why)]),
            (4, decode_failed(LegFailure::Refused), &[RetryDecodeElsewhere { handle: None }]),
            (5, DecodeAnswered, &[Answer]),
            (6, StreamEnded, &[]),
        ],
    );
}

#[test]
fn no_decode_is_retried_at_the_end_of_the_lease() {
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (28, decode_failed(LegFailure::Refused), &[Release { handle: H }, UNAVAILABLE]),
    ]);
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (27, decode_failed(LegFailure::Refused), &[RetryDecodeElsewhere { handle: Some(H) }]),
        (28, NoDecode, &[Release { handle: H }, UNAVAILABLE]),
    ]);
}

#[test]
fn a_lease_that_ends_under_a_decode_leg_is_judged_by_that_leg() {
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (30, LeaseExpired, &[]),
        (31, DecodeAnswered, &[Consumed { handle: H }, Answer]),
        (32, StreamEnded, &[]),
    ]);
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (30, LeaseExpired, &[]),
        (31, decode_failed(LegFailure::ServerError), &[Expired { handle: H }, UNAVAILABLE]),
    ]);
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (30, held(), &[Expired { handle: H }, UNAVAILABLE]),
    ]);
}

#[test]
fn a_client_that_leaves_strands_nothing() {
    // During prefill: asked to stop, and what still comes is released.
    for (answer, expect) in
        [(held(), &[Release { handle: H }][..]), (DONE, &[]), (prefill_failed(LegFailure::Timeout), &[])]
    {
        sequential(&[
            (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
            (1, ClientLeft, &[CancelPrefill]),
            (2, answer, expect),
        ]);
    }
    // While decode has not answered: as far as its headers.
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (2, ClientLeft, &[]),
        (3, DecodeAnswered, &[Consumed { handle: H }, AbortDecode]),
    ]);
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (2, ClientLeft, &[]),
        (3, decode_failed(LegFailure::Refused), &[Release { handle: H }]),
    ]);
    // In the stream.
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (2, DecodeAnswered, &[Consumed { handle: H }, Answer]),
        (3, ClientLeft, &[AbortDecode]),
    ]);
    concurrent(&[(0, PrefillChosen, &[SendBoth { attempt: 1 }]), (1, ClientLeft, &[AbortPrefill, AbortDecode])]);
    sequential(&[(0, ClientLeft, &[])]);
}

#[test]
fn a_request_that_is_too_old_is_told_so_once_and_its_kv_is_collected() {
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (2, Deadline, &[TimedOut]),
        (3, Deadline, &[AbortDecode, Release { handle: H }]),
    ]);
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, Deadline, &[TimedOut, CancelPrefill]),
        (2, Deadline, &[AbortPrefill]),
        (3, held(), &[Release { handle: H }]),
    ]);
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, DecodeAnswered, &[Answer]),
        (2, Deadline, &[AbortDecode, AbortPrefill, EndWithTypedError]),
    ]);
}

#[test]
fn a_failed_prefill_is_tried_once_more_and_then_the_policy_decides() {
    let class = LegFailure::Busy;
    let tried: [(u64, Event, &[Action]); 2] = [
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, prefill_failed(LegFailure::Refused), &[SendPrefill { attempt: 2 }]),
    ];
    let local: [(u64, Event, &[Action]); 3] = [
        (2, prefill_failed(class), &[DecodeLocally(Why::Prefill(class))]),
        (3, DecodeAnswered, &[Answer]),
        (4, StreamEnded, &[]),
    ];
    let refused: [(u64, Event, &[Action]); 1] = [(2, prefill_failed(class), &[UNAVAILABLE])];
    for (fallback, prompt_tokens, enforce_disagg, is_local) in [
        (Fallback::Always, LONG, false, true),
        (Fallback::Always, LONG, true, false),
        (Fallback::Short { tokens_max: SHORT }, SHORT, false, true),
        (Fallback::Short { tokens_max: SHORT }, LONG, false, false),
        (Fallback::Never, SHORT, false, false),
    ] {
        let policy = Policy { fallback, enforce_disagg, ..POLICY };
        let end: &[(u64, Event, &[Action])] = if is_local { &local } else { &refused };
        check(Order::Sequential, policy, prompt_tokens, &[&tried, end].concat());
    }
    // Another attempt that finds no other worker.
    let reason = PathReason::NoPrefillWorker;
    let none = Event::NoPrefill(NoPrefill::NoneAvailable(reason));
    sequential(&[&tried[..], &[(2, none, &[UNAVAILABLE])]].concat());
}

#[test]
fn a_clients_error_is_passed_on_and_not_tried_again() {
    let class = LegFailure::ClientError;
    sequential(&[(0, PrefillChosen, &[SendPrefill { attempt: 1 }]), (1, prefill_failed(class), &[PassThroughError])]);
    sequential(&[
        (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
        (1, held(), &[SendDecode { handle: H }]),
        (2, decode_failed(class), &[Release { handle: H }, PassThroughError]),
    ]);
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, prefill_failed(class), &[AbortDecode, PassThroughError]),
    ]);
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, decode_failed(class), &[AbortPrefill, PassThroughError]),
    ]);
}

#[test]
fn either_legs_failure_ends_the_other_and_begins_a_whole_new_attempt() {
    let class = LegFailure::ServerError;
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, prefill_failed(class), &[AbortDecode, SendBoth { attempt: 2 }]),
        (2, decode_failed(class), &[AbortPrefill, SendBoth { attempt: 3 }]),
        (3, decode_failed(class), &[AbortPrefill, UNAVAILABLE]),
    ]);
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, prefill_failed(class), &[AbortDecode, SendBoth { attempt: 2 }]),
        (2, prefill_failed(class), &[AbortDecode, UNAVAILABLE]),
    ]);
}

#[test]
fn a_prefill_that_fails_after_the_first_byte_is_no_error() {
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, DecodeAnswered, &[Answer]),
        (2, prefill_failed(LegFailure::Refused), &[]),
        (3, StreamEnded, &[]),
    ]);
}

#[test]
fn a_stream_that_breaks_is_ended_with_an_error_and_not_begun_again() {
    concurrent(&[
        (0, PrefillChosen, &[SendBoth { attempt: 1 }]),
        (1, DecodeAnswered, &[Answer]),
        (2, StreamBroken, &[AbortPrefill, EndWithTypedError]),
    ]);
}

#[test]
fn what_is_planned_local_is_no_fallback() {
    let planned = NoPrefill::Planned(PathReason::ShortPrompt);
    let local = |why| -> Vec<Action> { vec![DecodeLocally(why)] };
    let never = Policy { fallback: Fallback::Never, ..POLICY };
    let enforced = Policy { enforce_disagg: true, ..POLICY };
    for (policy, why, expect) in [
        (never, planned, local(Why::Planned(PathReason::ShortPrompt))),
        (enforced, planned, local(Why::Planned(PathReason::ShortPrompt))),
        (never, NoPrefill::NotActivated, local(Why::NotActivated)),
        (enforced, NoPrefill::NotActivated, vec![UNAVAILABLE]),
        (never, NoPrefill::NoneAvailable(PathReason::NoPrefillWorker), vec![UNAVAILABLE]),
    ] {
        let mut machine = Machine::new(Order::Sequential, policy, LONG);
        let actions = machine.on(Event::NoPrefill(why), Instant::now());
        assert_eq!(actions.iter().collect::<Vec<_>>(), expect, "{policy:?} {why:?}");
    }
}

#[test]
fn a_prefill_that_holds_nothing_goes_on_at_the_decode_worker() {
    check(
        Order::Sequential,
        Policy { fallback: Fallback::Never, ..POLICY },
        LONG,
        &[
            (0, PrefillChosen, &[SendPrefill { attempt: 1 }]),
            (1, DONE, &[DecodeLocally(Why::NothingHeld)]),
            (2, decode_failed(LegFailure::Timeout), &[TimedOut]),
        ],
    );
}

#[test]
fn a_handle_that_nobody_asked_for_is_released() {
    let mut machine = Machine::new(Order::Sequential, POLICY, LONG);
    let actions = machine.on(held(), Instant::now());
    assert_eq!(actions.iter().collect::<Vec<_>>(), [Release { handle: H }]);
    assert!(!machine.is_done());
}

#[test]
fn every_reason_is_a_path() {
    for class in LegFailure::ALL {
        assert!(matches!(Why::Prefill(class).path(), Path::Fallback(_)));
        assert!(matches!(Why::Handover(class).path(), Path::Fallback(_)));
    }
    assert_eq!(Why::Planned(PathReason::ShortPrompt).path(), Path::LocalPrefill(PathReason::ShortPrompt));
}

/// Looks over the machine's shoulder, and knows only what it said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Auditor {
    held: BTreeSet<HandleId>,
    answers: u32,
    first_byte: bool,
    ended_with_error: bool,
    prefills: u32,
    decodes: u32,
}

impl Auditor {
    fn audit(&mut self, policy: &Policy, event: Event, actions: Actions) {
        if let Event::PrefillAnswered { handle: Some(handle) } = event {
            assert!(self.held.insert(handle.id), "the test gives each handle once");
        }
        for action in actions.iter() {
            match action {
                SendPrefill { .. } | SendBoth { .. } => {
                    self.may_send();
                    self.prefills += 1;
                    self.decodes += u32::from(matches!(action, SendBoth { .. }));
                }
                SendDecode { handle } | RetryDecodeElsewhere { handle: Some(handle) } => {
                    assert!(self.held.contains(&handle), "{handle:?} is not held");
                    self.may_send();
                    self.decodes += 1;
                }
                RetryDecodeElsewhere { handle: None } | DecodeLocally(_) => {
                    assert!(self.held.is_empty(), "held KV is left behind");
                    self.may_send();
                    self.decodes += 1;
                }
                Release { handle } | Consumed { handle } | Expired { handle } => {
                    assert!(self.held.remove(&handle), "{handle:?} ended twice, or was never held");
                }
                Answer => {
                    self.answers += 1;
                    self.first_byte = true;
                }
                PassThroughError | Unavailable { .. } | TimedOut => self.answers += 1,
                EndWithTypedError => {
                    assert!(self.first_byte && !self.ended_with_error);
                    self.ended_with_error = true;
                }
                CancelPrefill | AbortPrefill | AbortDecode => {}
            }
        }
        assert!(self.answers <= 1, "two answers");
        let (prefills_max, decodes_max) = (policy.prefill_attempts_max.max(1), policy.decode_attempts_max.max(1));
        assert!(self.prefills < prefills_max + decodes_max, "{} prefills", self.prefills);
        assert!(self.decodes < prefills_max + 2 * decodes_max + 1, "{} decodes", self.decodes);
    }

    fn may_send(&self) {
        assert_eq!(self.answers, 0, "sent after an answer");
    }
}

/// The last things that happen to every request: whoever waits leaves, and what still runs ends.
fn ends(mut machine: Machine, mut auditor: Auditor, policy: &Policy, now: Instant) {
    let failed = Event::DecodeFailed { class: LegFailure::Refused, reached: false };
    for event in [ClientLeft, failed, prefill_failed(LegFailure::Refused)] {
        let actions = machine.on(event, now);
        auditor.audit(policy, event, actions);
    }
    assert!(machine.is_done(), "{machine:?}");
    assert!(auditor.held.is_empty(), "{auditor:?} {machine:?}");
}

fn events(handle: Handle) -> Vec<Event> {
    let mut events = vec![
        PrefillChosen,
        NoDecode,
        DecodeAnswered,
        StreamEnded,
        StreamBroken,
        ClientLeft,
        Deadline,
        LeaseExpired,
        DONE,
        Event::PrefillAnswered { handle: Some(handle) },
        Event::NoPrefill(NoPrefill::Planned(PathReason::ShortPrompt)),
        Event::NoPrefill(NoPrefill::NotActivated),
        Event::NoPrefill(NoPrefill::NoneAvailable(PathReason::NoPrefillWorker)),
    ];
    for class in LegFailure::ALL {
        events.push(prefill_failed(class));
        events.extend([true, false].map(|reached| Event::DecodeFailed { class, reached }));
    }
    events
}

fn policies() -> impl Iterator<Item = Policy> {
    let fallbacks = [Fallback::Never, Fallback::Short { tokens_max: SHORT }, Fallback::Always];
    fallbacks.into_iter().flat_map(|fallback| {
        [false, true].into_iter().flat_map(move |enforce_disagg| {
            [(0, 1), (1, 2), (2, 1), (2, 2), (3, 3)].map(|(prefill_attempts_max, decode_attempts_max)| Policy {
                prefill_attempts_max,
                decode_attempts_max,
                fallback,
                enforce_disagg,
                retry_after: RETRY_AFTER,
            })
        })
    })
}

/// Every state that any history of any length leads to, with every event in it at every time that matters, impossible
/// events included. It ends because attempts are bounded.
#[test]
fn the_rules_hold_in_every_reachable_state() {
    let start = Instant::now();
    let handle = Handle { id: H, deadline: start + LEASE };
    let stray = Handle { id: HandleId(8), ..handle };
    let times = [start, handle.deadline - LEASE_MARGIN, handle.deadline];
    let mut states = 0;
    for policy in policies() {
        for order in [Order::Sequential, Order::Concurrent] {
            let first = (Machine::new(order, policy, SHORT), Auditor::default());
            let mut seen = HashSet::from([first.clone()]);
            let mut open = vec![first];
            while let Some((machine, auditor)) = open.pop() {
                let arriving = if auditor.held.contains(&H) { stray } else { handle };
                for now in times {
                    ends(machine.clone(), auditor.clone(), &policy, now);
                    for event in events(arriving) {
                        let (mut machine, mut auditor) = (machine.clone(), auditor.clone());
                        let was_done = machine.is_done();
                        let actions = machine.on(event, now);
                        auditor.audit(&policy, event, actions);
                        assert!(!was_done || machine.is_done(), "{event:?} revived a request");
                        let state = (machine, auditor);
                        if seen.insert(state.clone()) {
                            open.push(state);
                        }
                    }
                }
            }
            states += seen.len();
        }
    }
    assert!(states > 1_000, "{states} states: the search did not get far");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn no_history_strands_kv_or_answers_twice(
        order in prop_oneof![Just(Order::Sequential), Just(Order::Concurrent)],
        policy in prop::sample::select(policies().collect::<Vec<_>>()),
        prompt_tokens in SHORT..=LONG,
        history in prop::collection::vec((0_usize..28, 0_u64..4), 0..40),
    ) {
        let mut now = Instant::now();
        let mut machine = Machine::new(order, policy, prompt_tokens);
        let mut auditor = Auditor::default();
        for (step, (index, seconds)) in history.into_iter().enumerate() {
            now += Duration::from_secs(seconds);
            let handle = Handle { id: HandleId(step as u64), deadline: now + LEASE / 3 };
            let event = events(handle)[index];
            let actions = machine.on(event, now);
            auditor.audit(&policy, event, actions);
            if let Some(deadline) = machine.lease_deadline().filter(|deadline| *deadline <= now) {
                let actions = machine.on(LeaseExpired, deadline);
                auditor.audit(&policy, LeaseExpired, actions);
            }
        }
        ends(machine, auditor, &policy, now);
    }
}
