//! What a selector chooses, over all its modes.

use super::candidate::fixtures::{candidate, idle, overloaded, queued};
use super::fixtures::REQUEST;
use super::*;
use baton_wire::PathReason;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn selector(phase: Phase, mode: Mode) -> Selector {
    Selector::new(Settings::new(phase, mode))
}

fn chosen(selector: &Selector, candidates: &[Candidate<'_>], request: Request<'_>) -> Option<(usize, Because)> {
    selector.peek(candidates, &request).chosen().map(|chosen| (chosen.index, chosen.because))
}

fn own(candidate: Candidate<'_>) -> Candidate<'_> {
    Candidate { own: true, ..candidate }
}

fn sequences(id: u32, running: u32, reserved_requests: u64) -> Candidate<'static> {
    candidate(id, LoadView { running, reserved_requests, ..LoadView::default() })
}

fn cached(device_blocks: u32, candidate: Candidate<'_>) -> Candidate<'_> {
    Candidate { overlap: Overlap { device_blocks, ..Overlap::default() }, ..candidate }
}

#[test]
fn prefill_goes_where_the_fewest_prompt_tokens_are_ahead() {
    let reserved = |id, tokens| candidate(id, LoadView { reserved_prompt_tokens: tokens, ..LoadView::default() });
    for mode in [Mode::KvAware, Mode::LeastLoaded] {
        let selector = selector(Phase::Prefill, mode);
        let check = |candidates: &[Candidate<'_>], expect| {
            assert_eq!(chosen(&selector, candidates, REQUEST).map(|chosen| chosen.0), expect, "{mode}");
        };
        check(&[queued(0, 10), queued(1, 9)], Some(1));
        check(&[reserved(0, 10), queued(1, 9)], Some(1));
        check(&[queued(0, 8), queued(1, 9)], Some(0));
        let unpaired = Candidate { pairs: Err(PathReason::FingerprintMismatch), ..idle(0) };
        check(&[unpaired, queued(1, u64::MAX)], Some(1));
    }
}

#[test]
fn the_own_engine_decodes_unless_it_is_overloaded_and_another_is_not() {
    for mode in Mode::ALL {
        let selector = selector(Phase::Decode, mode);
        let check = |candidates: &[Candidate<'_>], expect| {
            assert_eq!(chosen(&selector, candidates, REQUEST).map(|chosen| chosen.0), expect, "{mode}");
        };
        check(&[idle(0), own(sequences(1, 60, 67))], Some(1));
        check(&[sequences(0, 9, 0), own(overloaded(1))], Some(0));
        check(&[overloaded(0), own(overloaded(1))], Some(1));
        check(&[own(Candidate { breaker_open: true, ..idle(0) }), sequences(1, 9, 0)], Some(1));
    }
}

#[test]
fn the_own_engine_has_no_preference_for_prefill() {
    let selector = selector(Phase::Prefill, Mode::KvAware);
    assert_eq!(chosen(&selector, &[own(queued(0, 500)), idle(1)], REQUEST), Some((1, Because::Cost)));
}

#[test]
fn decode_goes_where_the_fewest_sequences_are() {
    let selector = selector(Phase::Decode, Mode::LeastLoaded);
    let candidates = [sequences(0, 3, 0), sequences(1, 1, 1)];
    assert_eq!(chosen(&selector, &candidates, REQUEST), Some((1, Because::LeastLoaded)));
}

#[test]
fn a_cached_prompt_attracts_until_the_queue_is_as_dear() {
    let selector = selector(Phase::Prefill, Mode::KvAware);
    let check = |queue: u64, expect| {
        let candidates = [idle(0), cached(64, queued(1, queue))];
        assert_eq!(chosen(&selector, &candidates, REQUEST), Some((expect, Because::Cost)), "{queue}");
    };
    check(0, 1);
    check(1024, 1);
    check(2048, 0);
    let hot = [idle(0), cached(64, overloaded(1))];
    assert_eq!(chosen(&selector, &hot, REQUEST), Some((0, Because::Cost)));
}

#[test]
fn reservations_spread_a_burst_of_the_same_prompt() {
    // sglang#27547: loads that counted only once decode had begun sent a whole burst to one worker.
    let mut selector = selector(Phase::Prefill, Mode::KvAware);
    let mut reserved = [0u64; 4];
    let mut hits = [0; 4];
    for draw in 0..400 {
        let candidates: Vec<_> = (0..4u32)
            .map(|id| {
                let load = LoadView { reserved_prompt_tokens: reserved[id as usize], ..LoadView::default() };
                // Only the first has the prompt cached.
                cached(if id == 0 { 64 } else { 0 }, candidate(id, load))
            })
            .collect();
        let chosen = selector.resolve(&candidates, &Request { draw, ..REQUEST }).chosen().expect("there are some");
        hits[chosen.index] += 1;
        // What a worker has cached costs it nothing, but the proxy that reserves the whole prompt is on the safe side.
        reserved[chosen.index] += REQUEST.job.prompt_tokens;
    }
    assert!(hits.iter().all(|count| (80..130).contains(count)), "{hits:?}");
}

#[test]
fn a_pool_that_was_never_there_is_not_activated() {
    let mut prefill = selector(Phase::Prefill, Mode::KvAware);
    assert!(!prefill.is_activated());
    assert_eq!(prefill.resolve(&[], &REQUEST), Resolution::NotActivated);
    assert!(prefill.peek(&[idle(0)], &REQUEST).chosen().is_some());
    assert!(!prefill.is_activated());
    assert!(prefill.resolve(&[idle(0)], &REQUEST).chosen().is_some());
    assert!(prefill.is_activated());
    assert_eq!(prefill.resolve(&[], &REQUEST), Resolution::Unavailable(Unavailable::NoWorker));

    let mut registered = selector(Phase::Prefill, Mode::KvAware);
    registered.register(&[], 0);
    assert!(!registered.is_activated());
    registered.register(&[(WorkerKey(1), LoadView::default())], 0);
    assert!(registered.is_activated());
}

#[test]
fn a_registered_worker_is_chosen_by_the_load_it_is_said_to_have() {
    let mut selector = selector(Phase::Prefill, Mode::KvAware);
    let silent = Candidate { reported: false, ..idle(0) };
    let candidates = [silent, queued(1, 100)];
    assert_eq!(chosen(&selector, &candidates, REQUEST), Some((0, Because::Cost)));
    selector.register(&[(silent.key, LoadView { queued_prompt_tokens: 200, ..LoadView::default() })], 0);
    assert_eq!(chosen(&selector, &candidates, REQUEST), Some((1, Because::Cost)));
    selector.forget(silent.key);
    assert_eq!(chosen(&selector, &candidates, REQUEST), Some((0, Because::Cost)));
}

#[test]
fn a_pinned_worker_is_taken_before_all_else() {
    let mut selector = selector(Phase::Decode, Mode::KvAware);
    let candidates = [own(idle(0)), overloaded(1)];
    let pins = Request { pinned: Some(WorkerId(1)), session: Some(5), ..REQUEST };
    assert_eq!(selector.resolve(&candidates, &pins).chosen().map(|c| c.because), Some(Because::Pinned));
    let absent = Request { pinned: Some(WorkerId(9)), ..REQUEST };
    let expect = Resolution::Unavailable(Unavailable::Pinned(PinError::Absent));
    assert_eq!(selector.resolve(&candidates, &absent), expect);
    // The session's KV is on the pinned worker now, but the veto holds for sessions.
    let follows = Request { session: Some(5), ..REQUEST };
    assert_eq!(chosen(&selector, &candidates, follows), Some((0, Because::OwnEngine)));
    assert_eq!(chosen(&selector, &[own(idle(0)), idle(1)], follows), Some((1, Because::Session)));
}

#[test]
fn a_session_stays_with_its_worker_while_that_one_is_well() {
    let mut selector = selector(Phase::Prefill, Mode::KvAware);
    let at = |now_ms| Request { session: Some(5), now_ms, ..REQUEST };
    assert_eq!(selector.resolve(&[idle(0), queued(1, 1)], &at(0)).chosen().map(|c| c.index), Some(0));
    let shifted = [queued(0, 4096), idle(1)];
    assert_eq!(chosen(&selector, &shifted, at(1)), Some((0, Because::Session)));
    assert_eq!(chosen(&selector, &shifted, at(SESSION_TTL_MS)), Some((1, Because::Cost)));
    assert_eq!(chosen(&selector, &shifted, Request { session: Some(6), ..at(1) }), Some((1, Because::Cost)));
    assert_eq!(chosen(&selector, &[idle(1)], at(1)), Some((0, Because::Cost)));
    assert_eq!(chosen(&selector, &[overloaded(0), idle(1)], at(1)), Some((1, Because::Cost)));
    // Once another has served it, the session is there.
    assert!(selector.resolve(&[overloaded(0), idle(1)], &at(1)).chosen().is_some());
    assert_eq!(chosen(&selector, &[idle(0), queued(1, 9)], at(2)), Some((1, Because::Session)));
}

#[test]
fn without_a_time_there_is_no_affinity() {
    let mut selector =
        Selector::new(Settings { session_ttl_ms: 0, ..Settings::new(Phase::Prefill, Mode::LeastLoaded) });
    let request = Request { session: Some(5), ..REQUEST };
    assert!(selector.resolve(&[idle(0)], &request).chosen().is_some());
    assert_eq!(selector.sessions(), 0);
}

#[test]
fn the_rank_comes_with_the_worker() {
    let selector = selector(Phase::Prefill, Mode::KvAware);
    let wide = [Candidate { dp_size: 4, rank_costs: &[3, 2, 0, 1], ..idle(0) }];
    let rank = |request: Request<'_>| selector.peek(&wide, &request).chosen().and_then(|chosen| chosen.dp_rank);
    assert_eq!(rank(REQUEST), Some(2));
    assert_eq!(rank(Request { dp_rank: Some(0), ..REQUEST }), Some(0));
    assert_eq!(rank(Request { pinned: Some(WorkerId(0)), dp_rank: Some(3), ..REQUEST }), Some(3));
    let beyond = Resolution::Unavailable(Unavailable::NoSuchRank(NoSuchRank { asked: 4, size: 4 }));
    assert_eq!(selector.peek(&wide, &Request { dp_rank: Some(4), ..REQUEST }), beyond);
}

#[test]
fn a_temperature_lets_dearer_workers_be_chosen_at_times() {
    let settings = Settings { temperature: 0.5, ..Settings::new(Phase::Prefill, Mode::KvAware) };
    let selector = Selector::new(settings);
    let candidates = [idle(0), queued(1, 3200)];
    let dearer = (0..1000u64)
        .map(|step| Request { draw: step * (u64::MAX / 1000), ..REQUEST })
        .filter(|request| chosen(&selector, &candidates, *request) == Some((1, Because::Cost)))
        .count();
    // exp(-2) of 1 + exp(-2).
    assert!((115..125).contains(&dearer), "{dearer}");
}

#[test]
fn a_jump_makes_queues_that_it_overtakes_equal() {
    let selector = selector(Phase::Prefill, Mode::KvAware);
    let candidates = [queued(0, 500), cached(4, queued(1, 900))];
    assert_eq!(chosen(&selector, &candidates, REQUEST), Some((0, Because::Cost)));
    let job = Job { overtakes_tokens: overtaken_tokens(500, 2000.0), ..REQUEST.job };
    assert_eq!(chosen(&selector, &candidates, Request { job, ..REQUEST }), Some((1, Because::Cost)));
}

#[test]
fn the_costs_of_all_are_explained() {
    let selector = selector(Phase::Prefill, Mode::KvAware);
    let unpaired = Candidate { pairs: Err(PathReason::FingerprintMismatch), ..idle(1) };
    let terms = selector.explain(&[cached(16, queued(0, 64)), unpaired], &REQUEST);
    assert_eq!((terms[0].ahead_blocks, terms[0].request_blocks, terms[1].cost), (2.0, 64.0, 64.0));
    assert!(terms[0].credit_blocks < 16.0 && terms[0].credit_blocks > 15.0);
    let json = serde_json::to_value(terms[1]).expect("it serialises");
    assert_eq!(json["cost"], 64.0);
}

/// Everything that a random candidate is made of, but for its place.
type Dice = (u32, u32, u64, u64, u32, bool, bool, u32, u32);

fn pool(dice: &[Dice]) -> Vec<Candidate<'static>> {
    let from = |(id, dice): (usize, &Dice)| {
        let (running, waiting, queued, reserved, kv_used, pairs, breaker_open, dp_size, device_blocks) = *dice;
        let load = LoadView {
            running,
            waiting,
            queued_prompt_tokens: queued,
            kv_used,
            kv_total: 100,
            reserved_prompt_tokens: reserved,
            ..LoadView::default()
        };
        Candidate {
            pairs: if pairs { Ok(()) } else { Err(PathReason::FingerprintMismatch) },
            breaker_open,
            dp_size,
            ..cached(device_blocks, candidate(id as u32, load))
        }
    };
    dice.iter().enumerate().map(from).collect()
}

fn any_pool() -> impl Strategy<Value = Vec<Dice>> {
    let dice = (
        0u32..9,
        prop_oneof![3 => 0u32..3, 1 => 6u32..10],
        0u64..4000,
        0u64..4000,
        prop_oneof![3 => 0u32..70, 1 => 78u32..100],
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.2),
        0u32..4,
        0u32..80,
    );
    prop::collection::vec(dice, 0..7)
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop::sample::select(Mode::ALL.to_vec())
}

fn any_phase() -> impl Strategy<Value = Phase> {
    prop_oneof![Just(Phase::Prefill), Just(Phase::Decode)]
}

proptest! {
    #[test]
    fn a_peek_says_what_the_next_choice_is_and_changes_nothing(
        pools in prop::collection::vec(
            (any_pool(), any::<u64>(), prop::option::of(0u64..3), prop::option::of(0u32..7), prop::option::of(0u32..3)),
            1..12,
        ),
        mode in any_mode(), phase in any_phase(), temperature in prop_oneof![Just(0.0), Just(0.7)],
    ) {
        let settings = Settings { temperature, session_ttl_ms: 40, ..Settings::new(phase, mode) };
        let mut peeked = Selector::new(settings);
        let mut alone = Selector::new(settings);
        for (step, (dice, draw, session, pinned, dp_rank)) in pools.iter().enumerate() {
            let candidates = pool(dice);
            let request = Request {
                draw: *draw,
                session: *session,
                pinned: pinned.map(WorkerId).filter(|_| step % 3 == 0),
                dp_rank: *dp_rank,
                now_ms: step as u64 * 10,
                ..REQUEST
            };
            let before = peeked.clone();
            let said = peeked.peek(&candidates, &request);
            peeked.explain(&candidates, &request);
            prop_assert_eq!(&before, &peeked);
            prop_assert_eq!(said, peeked.resolve(&candidates, &request));
            prop_assert_eq!(said, alone.resolve(&candidates, &request));
        }
        prop_assert_eq!(peeked, alone);
    }

    #[test]
    fn what_is_chosen_may_serve(
        dice in any_pool(), mode in any_mode(), phase in any_phase(), draw: u64, dp_rank in prop::option::of(0u32..4),
        allowed in prop::option::of(prop::collection::vec((0u32..7).prop_map(WorkerId), 0..5)),
        temperature in prop_oneof![Just(0.0), Just(0.7)],
    ) {
        let candidates = pool(&dice);
        let mut selector = Selector::new(Settings { temperature, ..Settings::new(phase, mode) });
        let request = Request { draw, dp_rank, allowed: allowed.as_deref(), ..REQUEST };
        let may = |c: &&Candidate<'_>| {
            c.pairs.is_ok()
                && !c.breaker_open
                && allowed.as_ref().is_none_or(|allowed| allowed.contains(&c.id))
                && dp_rank.is_none_or(|rank| rank < c.dp_size.max(1))
        };
        match selector.resolve(&candidates, &request) {
            Resolution::Chosen(chosen) => {
                let taken = &candidates[chosen.index];
                prop_assert_eq!(taken.id, chosen.id);
                prop_assert!(may(&taken));
                if taken.load.is_overloaded() {
                    prop_assert!(candidates.iter().filter(may).all(|other| other.load.is_overloaded()));
                }
                prop_assert!(dp_rank.is_none() || chosen.dp_rank == dp_rank);
                prop_assert!(chosen.dp_rank.is_none_or(|rank| rank < taken.dp_size.max(1)));
                prop_assert_eq!(chosen.dp_rank.is_none(), dp_rank.is_none() && taken.dp_size <= 1);
            }
            Resolution::NotActivated => prop_assert!(candidates.is_empty()),
            Resolution::Unavailable(_) => prop_assert_eq!(candidates.iter().filter(may).count(), 0),
        }
    }

    #[test]
    fn equal_workers_are_all_reached_by_some_draw(count in 1u32..8, mode in any_mode(), phase in any_phase()) {
        let candidates: Vec<_> = (0..count).map(idle).collect();
        let mut selector = selector(phase, mode);
        let reached: BTreeSet<_> = (0..2048u64)
            .map(|draw| Request { draw: draw.wrapping_mul(0x9E37_79B9_7F4A_7C15), ..REQUEST })
            .filter_map(|request| selector.resolve(&candidates, &request).chosen().map(|chosen| chosen.id))
            .collect();
        prop_assert_eq!(reached.len(), count as usize);
    }

    #[test]
    fn the_cheapest_is_chosen(dice in any_pool(), draw: u64) {
        let candidates: Vec<_> =
            pool(&dice).into_iter().filter(|c| !c.load.is_overloaded() && c.pairs.is_ok() && !c.breaker_open).collect();
        let selector = selector(Phase::Prefill, Mode::KvAware);
        let request = Request { draw, ..REQUEST };
        let costs = selector.explain(&candidates, &request);
        if let Some((index, _)) = chosen(&selector, &candidates, request) {
            prop_assert!(costs.iter().all(|terms| terms.cost >= costs[index].cost));
        }
    }
}
