//! The last decisions with what they were made from, so that "why was this request not handed over?" has an answer after
//! the fact. Holds loads and lengths, never a prompt.

use crate::address::Address;
use crate::estimate::{self, Policy};
use baton_wire::{Path, PathReason};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// Decisions that are kept: under 1 KiB each, and some seconds' worth of a busy proxy.
const KEPT_MAX: usize = 256;

/// Candidates that are kept with each decision; a larger pool is shown by its first ones.
const CANDIDATES_MAX: usize = 16;

/// One decision: where the prompt is computed and by whom.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Decision {
    pub(crate) unix_ms: u64,
    pub(crate) request_id: String,
    /// Counts the decode workers tried.
    pub(crate) attempt: u32,
    pub(crate) policy: Policy,
    /// What was measured and estimated for it.
    pub(crate) estimate: Option<Box<estimate::Decision>>,
    pub(crate) prompts: usize,
    pub(crate) prompt_tokens: u64,
    /// Of those, in the decode worker's prefix cache, as far as is known.
    pub(crate) cached_prompt_tokens: u64,
    pub(crate) decode_worker: Address,
    pub(crate) prefill_candidates: Vec<Candidate>,
    pub(crate) prefill_worker: Option<Address>,
    /// The data-parallel rank of it that computes the prompt, where it has several.
    pub(crate) prefill_rank: Option<u32>,
    pub(crate) planned: Path,
}

/// A worker that could have served the prefill leg.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Candidate {
    pub(crate) worker: Address,
    pub(crate) queued_prompt_tokens: u64,
    pub(crate) reserved_prompt_tokens: u64,
    /// Of the request's, in its prefix cache, as far as is known.
    pub(crate) cached_prompt_tokens: u64,
    /// Why it could not be paired with the decode worker.
    pub(crate) unpaired: Option<PathReason>,
}

/// The last decisions, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Decisions(Mutex<VecDeque<Decision>>);

impl Decisions {
    pub(crate) fn push(&self, mut decision: Decision) {
        decision.prefill_candidates.truncate(CANDIDATES_MAX);
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back(decision);
    }

    pub(crate) fn all(&self) -> Vec<Decision> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_decision_leaves_first() {
        let decisions = Decisions::default();
        for attempt in 0..=KEPT_MAX as u32 {
            decisions.push(Decision {
                unix_ms: 0,
                request_id: String::new(),
                attempt,
                policy: Policy::Always,
                estimate: None,
                prompts: 1,
                prompt_tokens: 1,
                cached_prompt_tokens: 0,
                decode_worker: "10.0.0.1:8000".parse().expect("an address"),
                prefill_candidates: Vec::new(),
                prefill_worker: None,
                prefill_rank: None,
                planned: Path::LocalPrefill(PathReason::NoPrefillWorker),
            });
        }
        let all = decisions.all();
        assert_eq!((all.len(), all[0].attempt), (KEPT_MAX, 1));
    }
}
