//! The simple modes of choosing: in turn, by chance, by load. Pure; what was chosen last comes in as an argument.

use super::candidate::{Candidate, WorkerKey};

/// How a worker is chosen among those that may serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The smallest cost: what is cached, what is queued, what is held.
    #[default]
    KvAware,
    /// Each in turn.
    RoundRobin,
    /// Any.
    Random,
    /// The least to do.
    LeastLoaded,
    /// The one with less to do among two drawn ones.
    PowerOfTwo,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 5] = [Mode::KvAware, Mode::RoundRobin, Mode::Random, Mode::LeastLoaded, Mode::PowerOfTwo];

    /// The mode as flags spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Mode::KvAware => "kv-aware",
            Mode::RoundRobin => "round-robin",
            Mode::Random => "random",
            Mode::LeastLoaded => "least-loaded",
            Mode::PowerOfTwo => "power-of-two",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        Mode::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

/// A word that is no mode.
#[derive(Debug, thiserror::Error)]
#[error("unknown mode {0:?}: one of kv-aware, round-robin, random, least-loaded, power-of-two")]
pub struct UnknownMode(String);

/// Whichever the draw says, of the considered ones.
pub(super) fn random(considered: &[usize], draw: u64) -> Option<usize> {
    let count = considered.len() as u64;
    (count > 0).then(|| considered[(draw % count) as usize])
}

/// The one after the last by the order of keys, then from the start again. By key and not by a count of requests, so that
/// workers that come and go change nobody else's turn.
pub(super) fn in_turn(candidates: &[Candidate<'_>], considered: &[usize], last: Option<WorkerKey>) -> Option<usize> {
    let first_of = |indices: &mut dyn Iterator<Item = usize>| indices.min_by_key(|index| candidates[*index].key);
    let after = |index: &usize| last.is_none_or(|last| candidates[*index].key > last);
    first_of(&mut considered.iter().copied().filter(after)).or_else(|| first_of(&mut considered.iter().copied()))
}

/// The one of the smallest `load`; among equals, the `draw`th.
pub(super) fn least<L: PartialOrd + Copy>(considered: &[usize], load: impl Fn(usize) -> L, draw: u64) -> Option<usize> {
    let smaller = |a: L, b: L| if b < a { b } else { a };
    let least = considered.iter().map(|index| load(*index)).reduce(smaller)?;
    let equals = || considered.iter().copied().filter(|index| load(*index) <= least);
    let count = equals().count() as u64;
    // Nothing is at most itself only where a load is no number.
    if count == 0 { random(considered, draw) } else { equals().nth((draw % count) as usize) }
}

/// The one of the smaller `load` among two that are drawn; of equals, the first drawn.
pub(super) fn power_of_two(considered: &[usize], load: impl Fn(usize) -> u64, draw: u64) -> Option<usize> {
    let count = considered.len() as u64;
    if count < 2 {
        return considered.first().copied();
    }
    let first = draw % count;
    // The upper half of the draw says how far on the second one stands, so that it is never the first.
    let second = (first + 1 + (draw >> 32) % (count - 1)) % count;
    let (first, second) = (considered[first as usize], considered[second as usize]);
    Some(if load(second) < load(first) { second } else { first })
}

#[cfg(test)]
mod tests {
    use super::super::candidate::fixtures::idle;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_mode_survives_its_text_form() {
        for mode in Mode::ALL {
            assert_eq!(mode.to_string().parse::<Mode>().expect("own form parses"), mode);
            assert_eq!(serde_json::to_value(mode).expect("it serialises"), mode.as_str());
        }
        assert!("Random".parse::<Mode>().is_err());
    }

    #[test]
    fn nobody_is_chosen_among_none() {
        assert_eq!(random(&[], 7), None);
        assert_eq!(in_turn(&[], &[], None), None);
        assert_eq!(least(&[], |_| 0, 7), None);
        assert_eq!(power_of_two(&[], |_| 0, 7), None);
    }

    #[test]
    fn a_worker_that_leaves_changes_nobody_elses_turn() {
        let candidates = [idle(0), idle(1), idle(2)];
        assert_eq!(in_turn(&candidates, &[0, 1, 2], Some(candidates[0].key)), Some(1));
        assert_eq!(in_turn(&candidates, &[0, 2], Some(candidates[1].key)), Some(2));
        assert_eq!(in_turn(&candidates, &[0, 1, 2], Some(candidates[2].key)), Some(0));
    }

    #[test]
    fn a_load_that_is_no_number_does_not_stop_the_choice() {
        assert_eq!(least(&[4, 5], |_| f64::NAN, 1), Some(5));
    }

    proptest! {
        #[test]
        fn each_has_one_turn_a_round(count in 1usize..9, start in 0usize..9) {
            let candidates: Vec<_> = (0..count as u32).map(idle).collect();
            let considered: Vec<usize> = (0..count).collect();
            let mut last = Some(candidates[start % count].key);
            let mut turns = BTreeSet::new();
            for _ in 0..count {
                let index = in_turn(&candidates, &considered, last).expect("there are some");
                last = Some(candidates[index].key);
                turns.insert(index);
            }
            prop_assert_eq!(turns.len(), count);
        }

        #[test]
        fn two_different_ones_are_drawn_and_the_less_loaded_wins(loads in prop::collection::vec(0u64..5, 2..9), draw: u64) {
            let considered: Vec<usize> = (0..loads.len()).collect();
            let chosen = power_of_two(&considered, |index| loads[index], draw).expect("there are some");
            let most = loads.iter().max().expect("there are some");
            let others_with_most = loads.iter().filter(|load| *load == most).count() - 1;
            prop_assert!(loads[chosen] < *most || others_with_most > 0);
        }

        #[test]
        fn the_least_is_chosen_and_every_equal_one_by_some_draw(loads in prop::collection::vec(0u64..3, 1..9)) {
            let considered: Vec<usize> = (0..loads.len()).collect();
            let least_load = loads.iter().min().expect("there are some");
            let expect: BTreeSet<_> = considered.iter().copied().filter(|index| loads[*index] == *least_load).collect();
            let chosen: BTreeSet<_> =
                (0..64).filter_map(|draw| least(&considered, |index| loads[index], draw)).collect();
            prop_assert_eq!(chosen, expect);
        }
    }
}
