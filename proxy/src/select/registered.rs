//! Workers that are known from outside the discovery, each with the load that it is said to have: a header named them, or
//! another router handed them over. What was said counts until the worker itself speaks, or for a short while.

use super::candidate::{Candidate, LoadView, WorkerKey};
use std::collections::HashMap;

/// How long a load that somebody else stated is believed: some dozens of polls, after which a worker that still has not
/// spoken is better judged by what this proxy has there.
const SEED_TTL_MS: u64 = 30_000;

/// Workers that are remembered; as many as one table is expected to hold. Beyond it the one registered first leaves.
#[cfg(test)]
const REGISTERED_MAX: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seed {
    load: LoadView,
    at_ms: u64,
}

/// The loads that were stated for workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Registered(HashMap<WorkerKey, Seed>);

impl Registered {
    #[cfg(test)]
    pub(super) fn register(&mut self, worker: WorkerKey, load: LoadView, now_ms: u64) {
        self.0.insert(worker, Seed { load, at_ms: now_ms });
        if self.0.len() > REGISTERED_MAX
            && let Some(oldest) = self.0.iter().min_by_key(|(key, seed)| (seed.at_ms, **key)).map(|(key, _)| *key)
        {
            self.0.remove(&oldest);
        }
    }

    #[cfg(test)]
    pub(super) fn forget(&mut self, worker: WorkerKey) {
        self.0.remove(&worker);
    }

    /// The load to choose by: the worker's own report, or until there is one what was stated, on top of this proxy's part.
    pub(super) fn load(&self, candidate: &Candidate<'_>, now_ms: u64) -> LoadView {
        if candidate.reported || self.0.is_empty() {
            return candidate.load;
        }
        match self.0.get(&candidate.key) {
            Some(seed) if now_ms.saturating_sub(seed.at_ms) < SEED_TTL_MS => candidate.load.plus(seed.load),
            Some(_) | None => candidate.load,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::candidate::fixtures::queued;
    use super::*;

    const BUSY: LoadView = LoadView {
        running: 3,
        waiting: 0,
        queued_prompt_tokens: 500,
        kv_used: 0,
        kv_total: 0,
        reserved_prompt_tokens: 0,
        reserved_requests: 0,
        active_blocks: 0,
    };

    #[test]
    fn what_was_stated_counts_until_the_worker_speaks() {
        let mut registered = Registered::default();
        let silent = Candidate { reported: false, ..queued(1, 20) };
        let check = |registered: &Registered, candidate, now, expect| {
            assert_eq!(registered.load(&candidate, now).tokens_ahead(), expect);
        };
        check(&registered, silent, 0, 20);
        registered.register(silent.key, BUSY, 0);
        check(&registered, silent, 0, 520);
        check(&registered, silent, SEED_TTL_MS, 20);
        check(&registered, Candidate { reported: true, ..silent }, 0, 20);
        registered.forget(silent.key);
        check(&registered, silent, 0, 20);
    }

    #[test]
    fn the_worker_registered_first_leaves_first() {
        let mut registered = Registered::default();
        for worker in 0..=REGISTERED_MAX as u64 {
            registered.register(WorkerKey(worker), BUSY, worker);
        }
        assert_eq!(registered.0.len(), REGISTERED_MAX);
        assert!(!registered.0.contains_key(&WorkerKey(0)) && registered.0.contains_key(&WorkerKey(1)));
    }
}
