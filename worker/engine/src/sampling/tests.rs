//! Penalties, truncation and draws against their definitions, written down naively, and what any row of floats must not do.

use super::*;
use proptest::prelude::*;

const NOBODY: &[u32] = &[];

fn row(params: &SamplingParams) -> SampleRow<'_> {
    SampleRow { params, prompt: NOBODY, generated: NOBODY, seed: 7, choice: 0 }
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

/// Softmax without any care, in f64.
fn softmax(logits: &[f64]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
    logits.iter().map(|logit| logit.exp() / total).collect()
}

/// The ids that truncation leaves, from the definitions.
fn naive_kept(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let best = logits[ids[0]];
    ids.retain(|&id| params.min_p == 0.0 || logits[id] >= best + params.min_p.ln());
    if params.top_k > 0 && (params.top_k as usize) < ids.len() {
        let kth = logits[ids[params.top_k as usize - 1]];
        ids.retain(|&id| logits[id] >= kth);
    }
    if params.top_p < 1.0 {
        let kept: Vec<f64> = ids.iter().map(|&id| f64::from(logits[id] - best)).collect();
        let mut mass = 0.0;
        let full: Vec<f64> = softmax(&kept);
        let count = full.iter().take_while(|&&probability| {
            let wanted = mass < f64::from(params.top_p) - 1e-12;
            mass += probability;
            wanted
        });
        let count = count.count().max(1);
        ids.truncate(count);
    }
    ids.sort_unstable();
    ids.into_iter().map(|id| id as u32).collect()
}

fn kept(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let candidates = (0u32..).zip(logits).map(|(id, &logit)| Candidate { id, logit }).collect();
    truncate(candidates, params).into_iter().map(|candidate| candidate.id).collect()
}

/// Pearson's statistic of `counts` against `probabilities`.
fn chi_square(counts: &[u32], probabilities: &[f64]) -> f64 {
    let draws: u32 = counts.iter().sum();
    let terms = counts.iter().zip(probabilities).map(|(&count, &probability)| {
        let expected = probability * f64::from(draws);
        (f64::from(count) - expected).powi(2) / expected
    });
    terms.sum()
}

fn counts(draws: u32, classes: usize, draw: impl Fn(u32) -> u32) -> Vec<u32> {
    let mut counts = vec![0; classes];
    (0..draws).for_each(|index| counts[draw(index) as usize] += 1);
    counts
}

/// 99.99 % quantile for 7 degrees of freedom. The seeds are fixed, so the test passes always or never.
const CHI_SQUARE_7: f64 = 29.9;

#[test]
fn greedy_takes_the_likeliest_and_of_equal_ones_the_first() {
    let check = |logits: &[f32], expected| assert_eq!(sample(logits, &row(&greedy()), 0).id, expected, "{logits:?}");
    check(&[0.0, 3.0, 1.0], 1);
    check(&[0.0, 3.0, 3.0], 1);
    check(&[5.0], 0);
    check(&[f32::NEG_INFINITY, -1e30], 1);
}

#[test]
fn values_without_an_order_are_harmless() {
    let (nan, infinity) = (f32::NAN, f32::INFINITY);
    let random = SamplingParams { top_p: 0.9, top_k: 2, min_p: 0.01, logprobs: Some(2), ..SamplingParams::default() };
    for params in [greedy(), random] {
        let check = |logits: &[f32], expected| {
            let token = sample(logits, &row(&params), 3);
            assert_eq!(token.id, expected, "{logits:?}");
            assert!(token.logprob.is_none_or(|logprob| logprob.is_finite() && logprob <= 0.0), "{token:?}");
        };
        check(&[nan, 1.0, nan], 1);
        check(&[nan, nan], 0);
        check(&[f32::NEG_INFINITY; 3], 0);
        check(&[0.0, infinity, nan], 1);
    }
}

#[test]
fn draws_follow_the_softmax() {
    let logits: Vec<f32> = (0..8).map(|id| id as f32 * 0.3).collect();
    for temperature in [0.5, 1.0, 2.0] {
        let params = SamplingParams { temperature, ..SamplingParams::default() };
        let counts = counts(20_000, 8, |position| sample(&logits, &row(&params), position).id);
        let scaled: Vec<f64> = logits.iter().map(|&logit| f64::from(logit / temperature)).collect();
        let statistic = chi_square(&counts, &softmax(&scaled));
        assert!(statistic < CHI_SQUARE_7, "temperature {temperature}: {statistic}, {counts:?}");
    }
}

#[test]
fn draws_follow_the_softmax_over_seeds_and_over_choices_as_over_positions() {
    let logits: Vec<f32> = (0..8).map(|id| id as f32 * 0.3).collect();
    let params = SamplingParams::default();
    let probabilities = softmax(&logits.iter().map(|&logit| f64::from(logit)).collect::<Vec<_>>());
    let of_seed = |seed| sample(&logits, &SampleRow { seed: u64::from(seed), ..row(&params) }, 5).id;
    let of_choice = |choice| sample(&logits, &SampleRow { choice, ..row(&params) }, 5).id;
    for counts in [counts(20_000, 8, of_seed), counts(20_000, 8, of_choice)] {
        assert!(chi_square(&counts, &probabilities) < CHI_SQUARE_7, "{counts:?}");
    }
}

#[test]
fn choices_are_independent_of_each_other() {
    // Pairs of neighbouring choices' draws from two equal halves: four outcomes, equally likely if independent.
    let logits = [0.0, 0.0];
    let params = SamplingParams::default();
    let bit = |choice, position| sample(&logits, &SampleRow { choice, ..row(&params) }, position).id;
    for (a, b) in [(0, 1), (1, 2), (0, 127)] {
        let counts = counts(8_000, 4, |position| bit(a, position) * 2 + bit(b, position));
        assert!(chi_square(&counts, &[0.25; 4]) < 21.1, "choices {a} and {b}: {counts:?}"); // 3 degrees of freedom, 99.99 %
    }
}

#[test]
fn the_draw_is_named_by_seed_choice_and_position_alone() {
    let logits: Vec<f32> = (0..100).map(|id| (id as f32 * 0.7).sin()).collect();
    let params = SamplingParams::default();
    // Other history, same draw: only the penalties look at it.
    let bare = sample(&logits, &row(&params), 9);
    let (prompt, generated) = ([1, 2, 3], [4, 5]);
    let with_history = sample(&logits, &SampleRow { prompt: &prompt, generated: &generated, ..row(&params) }, 9);
    assert_eq!(bare, with_history);
}

#[test]
fn bias_comes_before_penalties_and_those_before_temperature() {
    let params = SamplingParams {
        temperature: 0.0,
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        logit_bias: vec![(0, 4.0), (3, -1.0), (900, 5.0)],
        ..SamplingParams::default()
    };
    let (prompt, generated) = ([0, 77], [1, 1, 3]);
    let row = SampleRow { prompt: &prompt, generated: &generated, ..row(&params) };
    let raw = [2.0, 6.0, f32::NAN, 1.0, -1.0];
    let adjusted = adjust(&raw, &row);
    // 0 is biased, then halved; 1 is halved, then pays for two uses; 3 is biased to zero and pays for one.
    assert_eq!(adjusted.get(&0), Some(&3.0));
    assert_eq!(adjusted.get(&1), Some(&(3.0 - 2.0 * 0.5 - 0.25)));
    assert_eq!(adjusted.get(&3), Some(&(0.0 - 0.5 - 0.25)));
    assert_eq!(adjusted.len(), 3, "tokens outside of the vocabulary and of history are left alone: {adjusted:?}");
    assert_eq!(sample(&raw, &row, 0).id, 0);
}

#[test]
fn a_repetition_penalty_makes_negative_logits_more_negative() {
    let params = SamplingParams { repetition_penalty: 2.0, ..greedy() };
    let row = SampleRow { prompt: &[0], ..row(&params) };
    assert_eq!(adjust(&[-1.0, -1.5], &row).get(&0), Some(&-2.0));
    assert_eq!(sample(&[-1.0, -1.5], &row, 0).id, 1);
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits = [1.0, 2.0, 3.0, 0.0];
    let params = SamplingParams {
        logprobs: Some(2),
        temperature: 0.0,
        logit_bias: vec![(0, 100.0)],
        ..SamplingParams::default()
    };
    let token = sample(&logits, &row(&params), 0);
    let expected = softmax(&[1.0, 2.0, 3.0, 0.0]).map_ln();
    assert_eq!(token.id, 0);
    assert!((f64::from(token.logprob.expect("asked for")) - expected[0]).abs() < 1e-6);
    let top: Vec<u32> = token.top_logprobs.iter().map(|&(id, _)| id).collect();
    assert_eq!(top, [2, 1]);
    assert!((f64::from(token.top_logprobs[0].1) - expected[2]).abs() < 1e-6);
}

#[test]
fn what_was_not_asked_for_is_not_reported() {
    let token = sample(&[1.0, 2.0], &row(&greedy()), 0);
    assert_eq!(token, SampledToken { id: 1, logprob: None, top_logprobs: Vec::new(), logits_hash: None });
    let params = SamplingParams { logprobs: Some(0), ..greedy() };
    let token = sample(&[1.0, 2.0], &row(&params), 0);
    assert!(token.logprob.is_some() && token.top_logprobs.is_empty());
    let params = SamplingParams { logprobs: Some(20), ..greedy() };
    assert_eq!(sample(&[1.0, 2.0], &row(&params), 0).top_logprobs.len(), 2, "there are no more");
}

#[test]
fn the_hash_sees_every_bit_of_the_logits() {
    let params = SamplingParams { logits_hash: true, ..greedy() };
    let hash = |logits: &[f32]| sample(logits, &row(&params), 0).logits_hash.expect("asked for");
    let base = [1.0, 2.0, 3.0];
    assert_eq!(hash(&base), hash(&base));
    for (index, logit) in base.iter().enumerate() {
        let mut changed = base;
        changed[index] = f32::from_bits(logit.to_bits() ^ 1);
        assert_ne!(hash(&base), hash(&changed), "lowest bit of logit {index}");
    }
}

trait MapLn {
    fn map_ln(self) -> Vec<f64>;
}

impl MapLn for Vec<f64> {
    fn map_ln(self) -> Vec<f64> {
        self.into_iter().map(f64::ln).collect()
    }
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // Quarters, so that ties happen; more than the first round of the partial sort, so that several rounds happen.
    prop::collection::vec((-40i32..40).prop_map(|quarters| quarters as f32 / 4.0), 1..300)
}

/// A float out of a range given in hundredths. Proptest's own float ranges fail an assertion of theirs once in a million draws
/// (1.12, `float_samplers.rs`).
fn hundredths(range: std::ops::Range<i32>) -> impl Strategy<Value = f32> {
    range.prop_map(|hundredths| hundredths as f32 / 100.0)
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let truncation = (
        prop_oneof![Just(0u32), 1u32..40],
        prop_oneof![Just(1.0f32), hundredths(1..100), Just(1e-9)],
        prop_oneof![Just(0.0f32), hundredths(1..100)],
        hundredths(10..300),
    );
    truncation.prop_map(|(top_k, top_p, min_p, temperature)| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        ..SamplingParams::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn truncation_leaves_what_the_definitions_say(logits in logits(), params in params()) {
        let (kept, naive) = (kept(&logits, &params), naive_kept(&logits, &params));
        // A sum of probabilities that meets top_p to the last bit may round to either side of it.
        let (shorter, longer) = if kept.len() < naive.len() { (&kept, &naive) } else { (&naive, &kept) };
        let extra: Vec<_> = longer.iter().filter(|id| !shorter.contains(id)).collect();
        let on_the_edge = params.top_p < 1.0 && extra.len() == 1 && {
            let mass = |ids: &[u32]| ids.iter().map(|&id| f64::from(logits[id as usize]).exp()).sum::<f64>();
            let before_top_p = SamplingParams { top_p: 1.0, ..params.clone() };
            let reached = mass(shorter) / mass(&naive_kept(&logits, &before_top_p));
            (reached - f64::from(params.top_p)).abs() < 1e-9
        };
        prop_assert!(kept == naive || on_the_edge, "{:?} against {:?}", kept, naive);
    }

    #[test]
    fn what_is_drawn_was_left_by_truncation(logits in logits(), params in params(), seed: u64, position: u32) {
        let scaled: Vec<f32> = logits.iter().map(|logit| logit / params.temperature).collect();
        let token = sample(&logits, &SampleRow { seed, ..row(&params) }, position);
        prop_assert!(kept(&scaled, &params).contains(&token.id));
    }

    #[test]
    fn any_row_of_floats_gives_a_token(
        bits in prop::collection::vec(any::<u32>(), 1..50),
        params in params(),
        bias in prop::collection::vec((0u32..60, any::<f32>()), 0..3),
    ) {
        let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let params = SamplingParams { logit_bias: bias, logprobs: Some(3), presence_penalty: 1.0, ..params };
        let token = sample(&logits, &SampleRow { generated: &[1, 2], ..row(&params) }, 1);
        prop_assert!((token.id as usize) < logits.len());
        prop_assert!(token.top_logprobs.iter().all(|(_, logprob)| logprob.is_finite()));
    }
}
