//! A worker as selection sees it: the numbers of one moment, and nothing that could be called.

use baton_wire::PathReason;

/// Sequences that wait for room from which on a worker counts as overloaded. The same number at which smg's overload veto
/// fires: a wait of eight admissions is past what the next poll (half a second) would cure.
pub(crate) const OVERLOAD_WAITING: u32 = 8;

/// Tenths of the KV blocks in use from which on a worker counts as overloaded, as in smg. Beyond it a prompt of ordinary
/// length finds no room without another sequence being preempted.
const OVERLOAD_KV_TENTHS: u64 = 8;

/// A worker's place in the table from which the candidates were made. It names a worker within one choice only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub(crate) struct WorkerId(pub(crate) u32);

/// A worker's name across tables: a hash of its address. What is remembered of a worker is remembered under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub(crate) struct WorkerKey(pub(crate) u64);

/// What a worker has to do: by its own last report, and by what this proxy has sent there since and not seen the end of.
///
/// What this proxy sent counts twice once the worker's own report includes it. That only makes a choice turn away from the
/// workers just used, which is the safe side of a report that is up to half a second old, or two and a half of engines that are not ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct LoadView {
    /// Sequences being computed, by its report.
    pub(crate) running: u32,
    /// Sequences waiting for room, by its report.
    pub(crate) waiting: u32,
    /// Prompt tokens that it has to compute, by its report.
    pub(crate) queued_prompt_tokens: u64,
    /// KV blocks in use, by its report.
    pub(crate) kv_used: u32,
    /// KV blocks in all; 0 where it does not say.
    pub(crate) kv_total: u32,
    /// Prompt tokens that this proxy has sent there.
    pub(crate) reserved_prompt_tokens: u64,
    /// Requests that this proxy has there.
    pub(crate) reserved_requests: u64,
    /// KV blocks of the sequences that this proxy has there.
    pub(crate) active_blocks: u64,
}

impl LoadView {
    /// Prompt tokens to be computed before those of a request that is sent now.
    pub(crate) fn tokens_ahead(self) -> u64 {
        self.queued_prompt_tokens.saturating_add(self.reserved_prompt_tokens)
    }

    /// Sequences there, waiting and running.
    pub(crate) fn sequences(self) -> u64 {
        (u64::from(self.running) + u64::from(self.waiting)).saturating_add(self.reserved_requests)
    }

    /// KV blocks that its sequences hold.
    pub(crate) fn kv_blocks(self) -> u64 {
        u64::from(self.kv_used).saturating_add(self.active_blocks)
    }

    /// Whether new work is better sent elsewhere. KV use is the larger of both views, not their sum: counted twice, half of
    /// the blocks would look like all of them.
    pub(crate) fn is_overloaded(self) -> bool {
        let used = u64::from(self.kv_used).max(self.active_blocks);
        let is_full = self.kv_total > 0 && used.saturating_mul(10) >= u64::from(self.kv_total) * OVERLOAD_KV_TENTHS;
        self.waiting >= OVERLOAD_WAITING || is_full
    }

    /// Both loads together.
    pub(super) fn plus(self, other: LoadView) -> LoadView {
        LoadView {
            running: self.running.saturating_add(other.running),
            waiting: self.waiting.saturating_add(other.waiting),
            queued_prompt_tokens: self.queued_prompt_tokens.saturating_add(other.queued_prompt_tokens),
            kv_used: self.kv_used.saturating_add(other.kv_used),
            kv_total: self.kv_total.max(other.kv_total),
            reserved_prompt_tokens: self.reserved_prompt_tokens.saturating_add(other.reserved_prompt_tokens),
            reserved_requests: self.reserved_requests.saturating_add(other.reserved_requests),
            active_blocks: self.active_blocks.saturating_add(other.active_blocks),
        }
    }
}

/// Leading blocks of the request's prompt that a worker has, by where they lie. A tier counts only what lies beyond the
/// faster ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Overlap {
    /// In the accelerator's memory, or wherever the engine computes.
    pub(crate) device_blocks: u32,
    /// In the host's memory.
    pub(crate) host_blocks: u32,
    /// On disk.
    pub(crate) disk_blocks: u32,
}

/// A worker that takes work of this phase.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'a> {
    /// Its place in the table.
    pub(crate) id: WorkerId,
    /// Its name across tables.
    pub(crate) key: WorkerKey,
    /// Whether it is this pod's own engine.
    pub(crate) own: bool,
    /// Whether it has told its load; until then `load` holds this proxy's own part alone.
    pub(crate) reported: bool,
    /// What it has to do: the rank that the request would go to, where it has several.
    pub(crate) load: LoadView,
    /// Whether it can be paired with the other leg's worker.
    pub(crate) pairs: Result<(), PathReason>,
    /// Whether its circuit breaker for this leg is open.
    pub(crate) breaker_open: bool,
    /// Data-parallel ranks; 0 and 1 are the same.
    pub(crate) dp_size: u32,
    /// What the request would wait for and cost on each rank, in any one unit; empty where there is but one.
    pub(crate) rank_costs: &'a [u64],
    /// Hashes of the names of the LoRA adapters that it has loaded.
    pub(crate) loras: &'a [u64],
    /// What it has of the request's prompt; the same rank, where it has several.
    pub(crate) overlap: Overlap,
}

#[cfg(test)]
pub(super) mod fixtures {
    //! Candidates for the tests of those who choose among them.
    use super::*;

    pub(crate) fn candidate(id: u32, load: LoadView) -> Candidate<'static> {
        Candidate {
            id: WorkerId(id),
            key: WorkerKey(1000 + u64::from(id)),
            own: false,
            reported: true,
            load,
            pairs: Ok(()),
            breaker_open: false,
            dp_size: 1,
            rank_costs: &[],
            loras: &[],
            overlap: Overlap::default(),
        }
    }

    pub(crate) fn idle(id: u32) -> Candidate<'static> {
        candidate(id, LoadView::default())
    }

    pub(crate) fn queued(id: u32, queued_prompt_tokens: u64) -> Candidate<'static> {
        candidate(id, LoadView { queued_prompt_tokens, ..LoadView::default() })
    }

    pub(crate) fn overloaded(id: u32) -> Candidate<'static> {
        candidate(id, LoadView { waiting: OVERLOAD_WAITING, ..LoadView::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_worker_is_overloaded_by_those_who_wait_or_by_its_kv() {
        let check = |load: LoadView, expect| assert_eq!(load.is_overloaded(), expect, "{load:?}");
        check(LoadView::default(), false);
        check(LoadView { waiting: 7, ..LoadView::default() }, false);
        check(LoadView { waiting: 8, ..LoadView::default() }, true);
        check(LoadView { kv_used: 79, kv_total: 100, ..LoadView::default() }, false);
        check(LoadView { kv_used: 80, kv_total: 100, ..LoadView::default() }, true);
        check(LoadView { kv_used: 50, active_blocks: 50, kv_total: 100, ..LoadView::default() }, false);
        check(LoadView { active_blocks: 80, kv_total: 100, ..LoadView::default() }, true);
        check(LoadView { running: 1000, queued_prompt_tokens: 1 << 40, ..LoadView::default() }, false);
    }

    #[test]
    fn a_worker_that_does_not_say_its_kv_is_not_full() {
        assert!(!LoadView { kv_used: 9, active_blocks: 9, kv_total: 0, ..LoadView::default() }.is_overloaded());
    }

    proptest! {
        #[test]
        fn no_load_overflows(a: u64, b: u64, running: u32, waiting: u32, kv_used: u32, kv_total: u32) {
            let load = LoadView {
                running,
                waiting,
                queued_prompt_tokens: a,
                kv_used,
                kv_total,
                reserved_prompt_tokens: b,
                reserved_requests: a,
                active_blocks: b,
            };
            prop_assert!(load.tokens_ahead() >= a.max(b));
            prop_assert!(load.sequences() >= a);
            prop_assert!(load.kv_blocks() >= b);
            prop_assert!(load.plus(load).tokens_ahead() >= load.tokens_ahead());
            prop_assert!(!load.is_overloaded() || load.plus(load).is_overloaded());
        }
    }
}
