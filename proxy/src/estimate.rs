//! What this proxy's own legs have taken, by worker and leg, and the decision between remote and local prefill made from it.
//! Pure but for what it remembers: times come in as numbers, with the clock's reading; whoever calls holds the lock.
//!
//! ```text
//! a prefill leg ended          -> record_prefill         of that prefill worker: time against tokens computed
//! its KV was taken over        -> record_transfer        of the same worker: prefill complete to first token
//! a decode worker did both     -> record_local_prefill   of that decode worker: request to first token
//! other streams stood still    -> record_interference    of the same worker: their standstill for the prefill's time
//! a request is to be placed    -> decide                 (estimate/decision.rs)
//! ```
//!
//! All measures are this proxy's own, by one clock, so nothing depends on what workers say of their speed, nor on their
//! clocks. How a measure is kept, and why nothing wild in it counts, stands in `estimate/recent.rs`.

mod decision;
mod policy;
mod recent;

pub use policy::{Disaggregation, Fallback, LocalOr503, Policy, ThresholdError, UnknownPolicy};

#[cfg(test)]
pub(crate) use decision::{By, LocalReason};
pub(crate) use decision::{Decision, Inputs, Plan};
pub(crate) use recent::Line;

use crate::select::WorkerKey;
use recent::Recent;
use std::collections::HashMap;

/// Workers whose measures are kept: about 2 KiB each. Beyond it, the one unused for longest is forgotten.
const WORKERS_MAX: usize = 1024;

/// How long a leg waited before its own prompt was computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Wait {
    /// The worker said for how long, in milliseconds.
    #[cfg_attr(not(test), expect(dead_code, reason = "no worker says it yet"))]
    Said(f64),
    /// So many prompt tokens were ahead of it when it was sent, as selection counted them; 0 where that was not known. They
    /// are taken as computed one after another with the leg's own, which is what a queue of prompts is.
    Behind(u64),
}

/// A prefill that has ended well.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Prefill {
    /// Prompt tokens that were computed for it: without those that the worker had cached, by its own answer where it says.
    /// Less is known of a cold cache before the answer than after it, and the answer is what must be believed.
    pub(crate) computed_tokens: u64,
    /// Before it was its turn.
    pub(crate) wait: Wait,
    /// From sending it to its end, in milliseconds.
    pub(crate) elapsed_ms: f64,
}

/// What was measured of one worker.
#[derive(Clone, Debug, Default, PartialEq)]
struct Measured {
    prefill: Recent,
    transfer: Recent,
    wait: Recent,
    local_prefill: Recent,
    local_wait: Recent,
    standstill: Recent,
    used_ms: u64,
}

/// What is known of one worker, for the debug page. Absent is what was measured too rarely or too long ago.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Known {
    /// A prefill leg there.
    pub(crate) prefill: Option<Line>,
    /// Fetching its KV.
    pub(crate) transfer: Option<Line>,
    /// The wait before a prefill leg's turn, in milliseconds, where workers say it.
    pub(crate) wait_ms: Option<f64>,
    /// A prompt that the worker computes for its own decode.
    pub(crate) local_prefill: Option<Line>,
    /// The wait before such a prompt's turn.
    pub(crate) local_wait_ms: Option<f64>,
    /// The part of a local prefill's time for which each active decode stands still, 0 to 1.
    pub(crate) standstill: Option<f64>,
}

/// What this proxy's own legs have taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Estimates {
    workers: HashMap<WorkerKey, Measured>,
}

impl Estimates {
    /// A prefill leg has ended well.
    pub(crate) fn record_prefill(&mut self, prefill_worker: WorkerKey, leg: Prefill, now_ms: u64) {
        let measured = self.of(prefill_worker, now_ms);
        record(&mut measured.prefill, &mut measured.wait, leg, now_ms);
    }

    /// KV of so many tokens was taken over: from the prefill's end to the decode worker's first token. The prefill worker is
    /// the one it is kept for, because the decode worker is settled when this decides anything.
    pub(crate) fn record_transfer(&mut self, prefill_worker: WorkerKey, tokens: u64, elapsed_ms: f64, now_ms: u64) {
        self.of(prefill_worker, now_ms).transfer.record(tokens, elapsed_ms, now_ms);
    }

    /// A decode worker has computed a prompt itself and sent its first token.
    pub(crate) fn record_local_prefill(&mut self, decode_worker: WorkerKey, leg: Prefill, now_ms: u64) {
        let measured = self.of(decode_worker, now_ms);
        record(&mut measured.local_prefill, &mut measured.local_wait, leg, now_ms);
    }

    /// Another stream of that decode worker stood still for `standstill_ms` while a prompt was computed there for
    /// `prefill_ms`: by so much it came later than at its usual pace (`pulse.rs`).
    pub(crate) fn record_interference(
        &mut self,
        decode_worker: WorkerKey,
        prefill_ms: f64,
        standstill_ms: f64,
        now_ms: u64,
    ) {
        if prefill_ms > 0.0 && standstill_ms >= 0.0 {
            let part = (standstill_ms / prefill_ms).min(1.0);
            self.of(decode_worker, now_ms).standstill.record(1, part, now_ms);
        }
    }

    /// Forgets a worker: another process has taken its address, with a cold cache and perhaps other hardware.
    pub(crate) fn forget(&mut self, worker: WorkerKey) {
        self.workers.remove(&worker);
    }

    /// What is known of a worker.
    pub(crate) fn known(&self, worker: WorkerKey, now_ms: u64) -> Known {
        let of = |recent: fn(&Measured) -> &Recent| self.workers.get(&worker).and_then(|m| recent(m).line(now_ms));
        Known {
            prefill: of(|measured| &measured.prefill),
            transfer: of(|measured| &measured.transfer),
            wait_ms: of(|measured| &measured.wait).map(|line| line.at(1)),
            local_prefill: of(|measured| &measured.local_prefill),
            local_wait_ms: of(|measured| &measured.local_wait).map(|line| line.at(1)),
            standstill: of(|measured| &measured.standstill).map(|line| line.at(1)),
        }
    }

    /// Prompt tokens a second that a prefill worker computes, for what a priority jump overtakes there.
    pub(crate) fn prefill_tokens_per_second(&self, prefill_worker: WorkerKey, now_ms: u64) -> Option<f64> {
        let line = self.known(prefill_worker, now_ms).prefill?;
        (line.ms_per_token > 0.0).then(|| 1000.0 / line.ms_per_token)
    }

    /// Where a prompt is computed, and why.
    pub(crate) fn decide(&self, policy: Policy, inputs: Inputs, now_ms: u64) -> Decision {
        let prefill = self.known(inputs.prefill_worker, now_ms);
        let decode = self.known(inputs.decode_worker, now_ms);
        decision::decide(policy, inputs, prefill, decode)
    }

    fn of(&mut self, worker: WorkerKey, now_ms: u64) -> &mut Measured {
        if self.workers.len() >= WORKERS_MAX
            && !self.workers.contains_key(&worker)
            && let Some(unused) = self.workers.iter().min_by_key(|(key, m)| (m.used_ms, **key)).map(|(key, _)| *key)
        {
            self.workers.remove(&unused);
        }
        let measured = self.workers.entry(worker).or_default();
        measured.used_ms = now_ms;
        measured
    }
}

/// Tells computing from waiting: by the worker's word, or else by the tokens that were ahead.
fn record(prefill: &mut Recent, wait: &mut Recent, leg: Prefill, now_ms: u64) {
    match leg.wait {
        Wait::Said(waited_ms) => {
            prefill.record(leg.computed_tokens, leg.elapsed_ms - waited_ms, now_ms);
            wait.record(1, waited_ms, now_ms);
        }
        Wait::Behind(tokens_ahead) => {
            prefill.record(leg.computed_tokens.saturating_add(tokens_ahead), leg.elapsed_ms, now_ms);
        }
    }
}

#[cfg(test)]
mod tests;
