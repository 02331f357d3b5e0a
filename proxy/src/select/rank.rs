//! Data-parallel ranks: which of a worker's ranks a request goes to. Pure.
//!
//! The rank is decided once, here, and told to both legs. Two legs that each found their own rank disagreed (sglang#29725),
//! and a router that left it open sent nearly all prefills to rank 0 (dynamo#7984), which is why ties go to the draw.

use super::candidate::Candidate;

/// A rank that the worker does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[error("data-parallel rank {asked} was asked for, and there are {size}")]
pub(crate) struct NoSuchRank {
    /// As the request named it.
    pub(crate) asked: u32,
    /// Ranks of the largest worker that could have served.
    pub(crate) size: u32,
}

/// Whether the worker has the rank that was asked for. A rank beyond the last is refused and not taken modulo the number of
/// ranks: whoever asked knows of another pool than this one.
pub(super) fn has(candidate: &Candidate<'_>, asked: Option<u32>) -> bool {
    asked.is_none_or(|asked| asked < candidate.dp_size.max(1))
}

/// The rank on the chosen worker: what was asked for, or the rank on which the request costs least. `None` where there is but one.
pub(super) fn choose(candidate: &Candidate<'_>, asked: Option<u32>, draw: u64) -> Option<u32> {
    if asked.is_some() || candidate.dp_size <= 1 {
        return asked;
    }
    // A rank of which nothing is said counts as idle, as a worker does.
    let load = |rank: u32| candidate.rank_costs.get(rank as usize).copied().unwrap_or(0);
    let least = (0..candidate.dp_size).map(load).min()?;
    let equals = || (0..candidate.dp_size).filter(|rank| load(*rank) == least);
    let count = equals().count() as u64;
    // Not the bits that broke the tie between workers, or each worker would only ever see some of its ranks used.
    equals().nth((draw.rotate_left(32) % count) as usize)
}

#[cfg(test)]
mod tests {
    use super::super::candidate::fixtures::idle;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_rank_asked_for_must_be_there() {
        let check = |dp_size, asked, expect| {
            assert_eq!(has(&Candidate { dp_size, ..idle(0) }, asked), expect, "{dp_size} {asked:?}");
        };
        check(0, None, true);
        check(0, Some(0), true);
        check(1, Some(1), false);
        check(4, Some(3), true);
        check(4, Some(4), false);
    }

    #[test]
    fn the_cheapest_rank_is_chosen_unless_one_is_asked_for() {
        let check = |dp_size, rank_costs: &[u64], asked, expect| {
            let worker = Candidate { dp_size, rank_costs, ..idle(0) };
            assert_eq!(choose(&worker, asked, 0), expect, "{dp_size} {rank_costs:?} {asked:?}");
        };
        check(1, &[], None, None);
        check(1, &[], Some(0), Some(0));
        check(4, &[5, 3, 9, 4], None, Some(1));
        check(4, &[5, 3, 9, 4], Some(2), Some(2));
        check(4, &[5, 3], None, Some(2));
    }

    #[test]
    fn equal_ranks_are_all_used() {
        let worker = Candidate { dp_size: 8, ..idle(0) };
        let mut used = [0; 8];
        for draw in 0..800u64 {
            let rank = choose(&worker, None, draw.wrapping_mul(0x9E37_79B9_7F4A_7C15)).expect("there are ranks");
            used[rank as usize] += 1;
        }
        assert!(used.iter().all(|count| (50..200).contains(count)), "{used:?}");
    }

    proptest! {
        #[test]
        fn no_rank_with_less_to_do_is_left_out(loads in prop::collection::vec(0u64..9, 2..9), draw: u64) {
            let worker = Candidate { dp_size: loads.len() as u32, rank_costs: &loads, ..idle(0) };
            let rank = choose(&worker, None, draw).expect("there are ranks");
            prop_assert_eq!(Some(&loads[rank as usize]), loads.iter().min());
        }
    }
}
