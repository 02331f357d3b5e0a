//! Which worker, among those that may serve. Pure: loads and a random draw come in, an index goes out.
//!
//! **Prefill**: the one with the fewest prompt tokens ahead of ours, as it last reported them plus what this proxy has sent
//! there since and not seen the end of. Tokens, not requests, because that is what a prefill worker's time is spent on. What
//! this proxy sent counts twice once the worker's own report includes it; that only makes the choice turn away from the
//! workers just used, which is the safe side of a report that is up to half a second old.
//! **Decode**: this pod's own engine, which saves a hop, unless it is full and another one is not.
//! Ties go to the draw, so that proxies that see equal loads don't all choose the same worker.

use baton_wire::status::Load;
use baton_wire::{Fingerprint, PathReason};

/// Sequences that wait for room from which on a decode worker counts as full. The same number at which smg's overload veto
/// fires: a wait of eight admissions is past what the next poll (half a second) would cure.
pub(crate) const FULL_WAITING: u32 = 8;

/// A worker that may serve the prefill leg.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PrefillCandidate {
    /// Its model and KV layout.
    pub(crate) fingerprint: Option<Fingerprint>,
    /// Prompt tokens that it has to compute, by its own last report.
    pub(crate) queued_prompt_tokens: u64,
    /// Prompt tokens that this proxy has sent it and not seen the end of.
    pub(crate) reserved_prompt_tokens: u64,
}

/// Chooses the prefill worker for a decode worker of this fingerprint.
///
/// # Errors
/// The reason for which the decode worker computes the prompt itself: nobody there, or nobody with the same fingerprint.
pub(crate) fn prefill(
    candidates: &[PrefillCandidate],
    decode: Option<Fingerprint>,
    draw: u64,
) -> Result<usize, PathReason> {
    if candidates.is_empty() {
        return Err(PathReason::NoPrefillWorker);
    }
    let pairs = |candidate: &PrefillCandidate| decode.is_some() && candidate.fingerprint == decode;
    let loads =
        candidates.iter().map(|c| pairs(c).then(|| c.queued_prompt_tokens.saturating_add(c.reserved_prompt_tokens)));
    least_loaded(loads, draw).ok_or(PathReason::FingerprintMismatch)
}

/// A worker that may serve the decode leg.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecodeCandidate {
    /// Whether it is this pod's own engine.
    pub(crate) own: bool,
    /// By its own last report.
    pub(crate) load: Load,
    /// Requests that this proxy has there.
    pub(crate) reserved_requests: u64,
}

impl DecodeCandidate {
    fn is_full(&self) -> bool {
        self.load.waiting >= FULL_WAITING
    }

    fn sequences(&self) -> u64 {
        u64::from(self.load.running) + u64::from(self.load.waiting) + self.reserved_requests
    }
}

/// Chooses the decode worker; `None` where there is none at all.
pub(crate) fn decode(candidates: &[DecodeCandidate], draw: u64) -> Option<usize> {
    let any_has_room = candidates.iter().any(|candidate| !candidate.is_full());
    let considered = |candidate: &DecodeCandidate| !(any_has_room && candidate.is_full());
    let own = candidates.iter().position(|candidate| candidate.own && considered(candidate));
    own.or_else(|| least_loaded(candidates.iter().map(|c| considered(c).then(|| c.sequences())), draw))
}

/// Index of the smallest load; among equals, the `draw`th. `None` loads are not considered.
fn least_loaded(loads: impl Iterator<Item = Option<u64>> + Clone, draw: u64) -> Option<usize> {
    let least = loads.clone().flatten().min()?;
    let is_least = |(index, load): (usize, Option<u64>)| (load == Some(least)).then_some(index);
    let equals = loads.clone().enumerate().filter_map(is_least).count() as u64;
    loads.enumerate().filter_map(is_least).nth((draw % equals) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MODEL: Fingerprint = Fingerprint([1; 32]);
    const OTHER: Fingerprint = Fingerprint([2; 32]);

    fn candidate(fingerprint: Fingerprint, queued: u64, reserved: u64) -> PrefillCandidate {
        PrefillCandidate {
            fingerprint: Some(fingerprint),
            queued_prompt_tokens: queued,
            reserved_prompt_tokens: reserved,
        }
    }

    fn decoder(own: bool, running: u32, waiting: u32, reserved_requests: u64) -> DecodeCandidate {
        DecodeCandidate { own, load: Load { running, waiting, ..Load::default() }, reserved_requests }
    }

    #[test]
    fn prefill_goes_where_the_fewest_prompt_tokens_are_ahead() {
        let check = |candidates: &[PrefillCandidate], expect| {
            assert_eq!(prefill(candidates, Some(MODEL), 0), expect, "{candidates:?}");
        };
        check(&[], Err(PathReason::NoPrefillWorker));
        check(&[candidate(OTHER, 0, 0)], Err(PathReason::FingerprintMismatch));
        check(&[candidate(MODEL, 10, 0), candidate(MODEL, 9, 0)], Ok(1));
        check(&[candidate(MODEL, 0, 10), candidate(MODEL, 9, 0)], Ok(1));
        check(&[candidate(OTHER, 0, 0), candidate(MODEL, u64::MAX, 1)], Ok(1));
    }

    #[test]
    fn a_decode_worker_without_fingerprint_pairs_with_nobody() {
        let unknown = PrefillCandidate { fingerprint: None, ..candidate(MODEL, 0, 0) };
        assert_eq!(prefill(&[unknown], None, 0), Err(PathReason::FingerprintMismatch));
    }

    #[test]
    fn the_own_engine_decodes_unless_it_is_full_and_another_is_not() {
        let check =
            |candidates: &[DecodeCandidate], expect| assert_eq!(decode(candidates, 0), expect, "{candidates:?}");
        check(&[], None);
        check(&[decoder(false, 0, 0, 0), decoder(true, 60, 7, 67)], Some(1));
        check(&[decoder(false, 9, 0, 0), decoder(true, 64, FULL_WAITING, 0)], Some(0));
        check(&[decoder(false, 0, FULL_WAITING, 0), decoder(true, 64, FULL_WAITING, 0)], Some(1));
        check(&[decoder(false, 3, 0, 0), decoder(false, 1, 0, 1)], Some(1));
    }

    proptest! {
        #[test]
        fn what_is_picked_pairs_and_nothing_that_pairs_has_less_ahead(
            loads in prop::collection::vec((any::<bool>(), 0u64..4, 0u64..4), 0..8),
            draw: u64,
        ) {
            let candidates: Vec<_> = loads
                .iter()
                .map(|&(pairs, queued, reserved)| candidate(if pairs { MODEL } else { OTHER }, queued, reserved))
                .collect();
            match prefill(&candidates, Some(MODEL), draw) {
                Ok(index) => {
                    prop_assert!(loads[index].0);
                    let ahead = |load: &(bool, u64, u64)| load.1 + load.2;
                    prop_assert!(loads.iter().filter(|l| l.0).all(|l| ahead(l) >= ahead(&loads[index])));
                }
                Err(PathReason::NoPrefillWorker) => prop_assert!(loads.is_empty()),
                Err(reason) => {
                    prop_assert_eq!(reason, PathReason::FingerprintMismatch);
                    prop_assert!(!loads.is_empty() && loads.iter().all(|l| !l.0));
                }
            }
        }

        #[test]
        fn equals_are_all_reached_by_some_draw(count in 1usize..9) {
            let candidates = vec![candidate(MODEL, 5, 0); count];
            let picked: std::collections::BTreeSet<_> =
                (0..count as u64).map(|draw| prefill(&candidates, Some(MODEL), draw).expect("all pair")).collect();
            prop_assert_eq!(picked.len(), count);
        }

        #[test]
        fn a_decode_worker_is_found_whenever_there_is_one(
            loads in prop::collection::vec((0u32..70, 0u32..16, 0u64..9), 1..8),
            draw: u64,
        ) {
            let candidates: Vec<_> = loads.iter().map(|&(r, w, m)| decoder(false, r, w, m)).collect();
            let index = decode(&candidates, draw).expect("there is one");
            prop_assert!(!candidates[index].is_full() || candidates.iter().all(DecodeCandidate::is_full));
        }
    }
}
