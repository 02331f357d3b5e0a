//! What a request would cost on each data-parallel rank of the workers that have several. Pure.
//!
//! Selection sees a worker with ranks as it looks from the rank that the request would go to: that rank's queue and that rank's prefix
//! cache. A worker's other ranks neither speed the request up nor hold it back.

use crate::eligible::Phase;
use crate::prefix::Holder;
use crate::workers::{OnRank, Table, Worker};

/// Costs by place in the table, and by rank there. Without an entry where no worker has ranks, which is the rule.
#[derive(Debug, Default)]
pub(super) struct Ranks(Vec<Vec<u64>>);

impl Ranks {
    /// `cached` says how many of the prompt's tokens a rank has.
    pub(super) fn of(table: &Table, phase: Phase, prompt_tokens: u64, cached: impl Fn(Holder) -> u64) -> Self {
        if table.workers.iter().all(|worker| worker.rank_loads().is_empty()) {
            return Ranks::default();
        }
        let costs = |worker: &Worker| {
            let reserved = worker.reserved.ranks();
            let cost = |(rank, sequences): (usize, &u32)| {
                let holder = Holder { worker: worker.number, dp_rank: rank as u32 };
                let reserved = reserved.get(rank).copied().unwrap_or_default();
                cost(phase, *sequences, reserved, prompt_tokens, || cached(holder))
            };
            worker.rank_loads().iter().enumerate().map(cost).collect()
        };
        Ranks(table.workers.iter().map(|worker| costs(worker)).collect())
    }

    /// For the worker at this place; empty where it has but one rank.
    pub(super) fn costs(&self, place: usize) -> &[u64] {
        self.0.get(place).map_or(&[], Vec::as_slice)
    }

    /// The rank that the request would go to there: the one that it asks for, or the first of the cheapest.
    pub(super) fn would_be(&self, place: usize, asked: Option<u32>) -> Option<u32> {
        let costs = self.costs(place);
        let cheapest = || costs.iter().enumerate().min_by_key(|(_, cost)| **cost).map(|(rank, _)| rank as u32);
        asked.filter(|asked| (*asked as usize) < costs.len()).or_else(cheapest)
    }
}

/// Prefill is counted in prompt tokens, decode in sequences. Engines say of a rank only how many sequences it has; one that prefills
/// counts as a prompt of this request's length, for nothing more is known of it.
fn cost(phase: Phase, sequences: u32, reserved: OnRank, prompt_tokens: u64, cached: impl FnOnce() -> u64) -> u64 {
    let sequences = u64::from(sequences);
    match phase {
        Phase::Prefill => {
            let ahead = sequences.saturating_mul(prompt_tokens).saturating_add(reserved.prompt_tokens);
            ahead.saturating_add(prompt_tokens.saturating_sub(cached()))
        }
        Phase::Decode => sequences.saturating_add(reserved.requests),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;
    use crate::config::Engine;
    use crate::workers::fixtures::status;
    use crate::workers::{Link, Report, Workers};
    use baton_wire::Role;
    use baton_wire::status::Status;
    use std::sync::Arc;

    fn workers(rank_loads: &[&[u32]]) -> Workers {
        let address = |number: usize| -> Address { format!("10.0.0.{number}:1").parse().expect("an address") };
        let engine = |number| Engine {
            address: address(number),
            role: Some(Role::Prefill),
            bootstrap_port: None,
            dp_size: None,
            is_tls: false,
        };
        let workers = Workers::new(None, &(0..rank_loads.len()).map(engine).collect::<Vec<_>>());
        for (number, loads) in rank_loads.iter().enumerate() {
            let said = Status { rank_loads: loads.to_vec(), ..status(Role::Prefill) };
            workers.report(Link::Direct, &address(number), Report::Said(Arc::new(said)));
        }
        workers
    }

    #[test]
    fn a_prompt_costs_what_is_ahead_of_it_on_a_rank_and_what_that_rank_has_not_cached() {
        let workers = workers(&[&[], &[0, 0, 1, 0]]);
        let table = workers.table();
        let ranked = &table.workers[1];
        let _reserved = ranked.reserved.reserve_at(Some(3), 500, 0);
        let cached = |holder: Holder| {
            assert_eq!(holder.worker, ranked.number);
            if holder.dp_rank == 1 { 90 } else { 0 }
        };
        let ranks = Ranks::of(&table, Phase::Prefill, 100, cached);
        assert_eq!((ranks.costs(0), ranks.costs(1), ranks.costs(2)), (&[][..], &[100, 10, 200, 600][..], &[][..]));
        assert_eq!((ranks.would_be(0, None), ranks.would_be(1, None)), (None, Some(1)));
        assert_eq!((ranks.would_be(1, Some(2)), ranks.would_be(0, Some(2))), (Some(2), None));
    }

    #[test]
    fn decode_goes_where_the_fewest_sequences_are() {
        let workers = workers(&[&[3, 2]]);
        let table = workers.table();
        let _reserved = table.workers[0].reserved.reserve_at(Some(1), 0, 2);
        let ranks = Ranks::of(&table, Phase::Decode, 100, |_| 100);
        assert_eq!((ranks.costs(0), ranks.would_be(0, None)), (&[3, 4][..], Some(0)));
    }

    #[test]
    fn a_status_with_one_rank_or_with_absurdly_many_has_none() {
        let many = vec![0; 1025];
        let workers = workers(&[&[5], &many]);
        assert_eq!(Ranks::of(&workers.table(), Phase::Decode, 1, |_| 0).costs(1), [0_u64; 0]);
    }
}
