//! From logits to a token: a pure function of (logits, parameters, history, seed, choice, position).
//!
//! The order of operations and the meaning of each parameter are those of vLLM V1's sampler (`vllm/v1/sample/sampler.py` and
//! `vllm/v1/sample/ops/` at 3e342658b2e9c85a30a54d19e64e5ad77b8a26a6): logit bias, penalties (repetition, frequency, presence), then the
//! likeliest token or temperature, min-p, top-k, top-p and a draw; reported log-probabilities are those of the raw logits. Two things
//! differ. The draw is by inversion with a counter-based number ([`philox`]) instead of exponential noise from a stateful generator,
//! so it needs one number a token and repeats anywhere. And ties are broken by token id everywhere, so that equal logits give equal
//! tokens.
//!
//! NaN counts as minus infinity and plus infinity as the largest float. Where nothing is left, all logits being minus infinity, the
//! token is 0: a device that computes garbage gives a poor completion and not a panic.

mod philox;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::HashMap;

/// What one row of logits is sampled with.
#[derive(Clone, Debug)]
pub struct SampleRow<'a> {
    /// Parameters of the request.
    pub params: &'a SamplingParams,
    /// The prompt's tokens (repetition penalty counts them; presence and frequency penalties do not).
    pub prompt: &'a [u32],
    /// Tokens generated so far in this choice.
    pub generated: &'a [u32],
    /// The request's seed.
    pub seed: u64,
    /// Index of the choice (`n`).
    pub choice: u32,
}

/// How a request wants its tokens chosen. `Default` is greedy-free OpenAI defaults: temperature 1, no truncation.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the `top_k` likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) logits of tokens seen in prompt or completion; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the completion.
    pub presence_penalty: f32,
    /// Subtracted from logits of tokens in the completion, times their count.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; ascending by token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report the log-probability of the chosen token and of this many of the likeliest ones.
    pub logprobs: Option<u32>,
    /// Report a hash of the raw logits (tests of bitwise equality).
    pub logits_hash: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            logits_hash: false,
        }
    }
}

/// A sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The token.
    pub id: u32,
    /// Natural log of its probability under the raw logits (before temperature, penalties and truncation), where asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens with theirs, likeliest first, where asked for.
    pub top_logprobs: Vec<(u32, f32)>,
    /// Hash of the raw logits, where asked for.
    pub logits_hash: Option<u64>,
}

/// Below this a temperature is taken for 0, as in vLLM: logits divided by it would overflow.
const TEMPERATURE_MIN: f32 = 1e-5;

/// Reported in place of lower log-probabilities, as in vLLM: minus infinity has no JSON.
const LOGPROB_MIN: f32 = -9999.0;

/// Chooses the token at `position` (its index in prompt and completion) of one choice from its `logits`.
///
/// Only what `row` and `position` say enters the draw, so the outcome is the same in any batch, after preemption, and on another
/// worker.
///
/// # Panics
/// When there are no logits.
pub fn sample(logits: &[f32], row: &SampleRow<'_>, position: u32) -> SampledToken {
    assert!(!logits.is_empty(), "a model has a vocabulary");
    let id = choose(logits, row, position);
    let mut token = SampledToken { id, logprob: None, top_logprobs: Vec::new(), logits_hash: None };
    if let Some(count) = row.params.logprobs {
        let normaliser = log_sum_exp(logits);
        let logprob = |id: u32| ((f64::from(finite(logits[id as usize])) - normaliser) as f32).max(LOGPROB_MIN);
        token.logprob = Some(logprob(id));
        token.top_logprobs = likeliest(logits, count as usize).into_iter().map(|id| (id, logprob(id))).collect();
    }
    if row.params.logits_hash {
        token.logits_hash = Some(hash(logits));
    }
    token
}

fn choose(raw: &[f32], row: &SampleRow<'_>, position: u32) -> u32 {
    let adjusted = adjust(raw, row);
    let logit = |id: usize| adjusted.get(&(id as u32)).copied().unwrap_or_else(|| finite(raw[id]));
    if row.params.temperature < TEMPERATURE_MIN {
        let likelier = |best: (usize, f32), id: usize| if logit(id) > best.1 { (id, logit(id)) } else { best };
        return (1..raw.len()).fold((0, logit(0)), likelier).0 as u32;
    }
    let scaled = |id: usize| finite(logit(id) / row.params.temperature);
    let candidates = (0..raw.len()).map(|id| Candidate { id: id as u32, logit: scaled(id) }).collect();
    let kept = truncate(candidates, row.params);
    draw(&kept, philox::uniform(row.seed, row.choice, position))
}

/// The logits that bias and penalties change; all others are as they were. There are at most as many as tokens in the sequence, so
/// the row as a whole is not copied for them.
fn adjust(raw: &[f32], row: &SampleRow<'_>) -> HashMap<u32, f32> {
    let params = row.params;
    let mut adjusted = HashMap::new();
    let known = |id: &u32| (*id as usize) < raw.len();
    for &(id, bias) in params.logit_bias.iter().filter(|(id, _)| known(id)) {
        *adjusted.entry(id).or_insert_with(|| finite(raw[id as usize])) += bias;
    }
    if params.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = row.prompt.iter().chain(row.generated).copied().filter(known).collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = adjusted.entry(id).or_insert_with(|| finite(raw[id as usize]));
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        }
    }
    if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        row.generated.iter().filter(|id| known(id)).for_each(|&id| *counts.entry(id).or_default() += 1);
        for (id, count) in counts {
            let logit = adjusted.entry(id).or_insert_with(|| finite(raw[id as usize]));
            *logit -= params.frequency_penalty * count as f32;
            *logit -= params.presence_penalty;
        }
    }
    adjusted.values_mut().for_each(|logit| *logit = finite(*logit));
    adjusted
}

/// A token that may still be drawn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f32,
}

/// Likelier first, then by id: a total order, so that every truncation is unambiguous.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Leaves what min-p, top-k and top-p let through, in ascending order of ids. As in vLLM each sees what the one before has left, and
/// tokens as likely as the `top_k`th are kept with it.
fn truncate(mut candidates: Vec<Candidate>, params: &SamplingParams) -> Vec<Candidate> {
    let highest = candidates.iter().map(|candidate| candidate.logit).fold(f32::NEG_INFINITY, f32::max);
    if params.min_p > 0.0 {
        // p(x) >= min_p * p(best), said in logits.
        let least = highest + params.min_p.ln();
        candidates.retain(|candidate| candidate.logit >= least);
    }
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        let (_, kth, _) = candidates.select_nth_unstable_by(top_k - 1, by_rank);
        let least = kth.logit;
        candidates.retain(|candidate| candidate.logit >= least);
    }
    if params.top_p < 1.0 {
        let count = nucleus(&mut candidates, highest, f64::from(params.top_p));
        candidates.truncate(count);
    }
    candidates.sort_unstable_by_key(|candidate| candidate.id);
    candidates
}

/// Moves the smallest set of likeliest candidates whose probability reaches `top_p` to the front; returns its size, at least 1. Sorts
/// only as many as are needed: with a vocabulary of 150,000 the set is mostly a few dozen.
fn nucleus(candidates: &mut [Candidate], highest: f32, top_p: f64) -> usize {
    let total: f64 = candidates.iter().map(|candidate| weight(candidate, highest)).sum();
    let mut sorted = 0;
    let mut mass = 0.0;
    while sorted < candidates.len() {
        let end = candidates.len().min((sorted * 8).max(64));
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted, by_rank);
        }
        candidates[sorted..end].sort_unstable_by(by_rank);
        for (index, candidate) in candidates[..end].iter().enumerate().skip(sorted) {
            mass += weight(candidate, highest);
            if mass >= top_p * total {
                return index + 1;
            }
        }
        sorted = end;
    }
    candidates.len()
}

/// The candidate at which the running sum of probabilities passes `uniform`, which lies in [0, 1).
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
    let highest = candidates.iter().map(|candidate| candidate.logit).fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = candidates.iter().map(|candidate| weight(candidate, highest)).sum();
    let mut passed = 0.0;
    let mut last = 0;
    for candidate in candidates {
        let weight = weight(candidate, highest);
        passed += weight;
        if weight > 0.0 {
            last = candidate.id;
            if passed > uniform * total {
                break;
            }
        }
    }
    last
}

/// Probability up to a factor that is common to all; the likeliest has 1.
fn weight(candidate: &Candidate, highest: f32) -> f64 {
    if candidate.logit == f32::NEG_INFINITY { 0.0 } else { f64::from(candidate.logit - highest).exp() }
}

/// The logit without the values that have no order or make no sum.
fn finite(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let highest = logits.iter().copied().map(finite).fold(f32::NEG_INFINITY, f32::max);
    if highest == f32::NEG_INFINITY {
        return 0.0; // Every log-probability is then minus infinity.
    }
    let sum: f64 = logits.iter().map(|&logit| f64::from(finite(logit) - highest).exp()).sum();
    f64::from(highest) + sum.ln()
}

fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let mut candidates: Vec<_> =
        (0u32..).zip(logits).map(|(id, &logit)| Candidate { id, logit: finite(logit) }).collect();
    candidates.select_nth_unstable_by(count - 1, by_rank);
    candidates.truncate(count);
    candidates.sort_unstable_by(by_rank);
    candidates.into_iter().map(|candidate| candidate.id).collect()
}

fn hash(logits: &[f32]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    logits.iter().for_each(|logit| {
        hasher.update(&logit.to_bits().to_le_bytes());
    });
    let mut hash = [0; 8];
    hasher.finalize_xof().fill(&mut hash);
    u64::from_le_bytes(hash)
}
