//! The exact prefix index: which prefix caches hold which blocks, by what the workers report.
//!
//! Blocks are named by chained, salted hashes, so prompts of different tenants have no name in common and nothing here needs to
//! know of tenants. Of a hash the first eight bytes are kept: among a million blocks two agree in them with a chance of 3 in
//! 10^8, and then one hint is wrong.
//!
//! One table and no shards: a look-up of 64 blocks takes microseconds, a change of one line of events less than a millisecond,
//! and whatever would take longer (a restart, a snapshot) is spread over many changes by [`super::holdings`]. A `RwLock` around
//! it is enough.

use super::holdings::{Holdings, Slot};
use super::{Change, Holder, Overlap};
use baton_wire::BlockHash;
use std::collections::HashMap;

/// Most blocks of one prefix cache: 8 million tokens in blocks of 32, or 4 million in blocks of 16, which is more than the
/// memory of one device holds for the smallest models that are worth serving apart.
pub(crate) const BLOCKS_PER_HOLDER_MAX: usize = 1 << 18;

/// Most (cache, block) pairs in all, some 80 MB: a thousand caches of a thousand blocks, or thirty that are large.
pub(crate) const BLOCKS_MAX: usize = 1 << 20;

/// Pairs of given-up caches that are swept for each block that comes or goes: more than one, so that what is given up never
/// outgrows what comes.
const SWEPT_PER_BLOCK: usize = 4;

/// The index.
#[derive(Debug, Default)]
pub(crate) struct ExactIndex {
    holdings: Holdings,
    places: HashMap<Holder, Place>,
    /// Whose cache a slot is; `None` for those that are staged, given up or free.
    visible: Vec<Option<Holder>>,
    num_refused: u64,
}

/// The slots of one prefix cache.
#[derive(Clone, Copy, Debug)]
struct Place {
    live: Slot,
    /// What has arrived of a snapshot that is not complete.
    staged: Option<Slot>,
}

impl ExactIndex {
    /// How many leading blocks of a prompt with these hashes each prefix cache holds; those that hold none are left out. In no
    /// order.
    pub(crate) fn leading(&self, hashes: &[BlockHash]) -> Vec<Overlap> {
        let visible = |slot: Slot| self.visible.get(usize::from(slot)).copied().flatten();
        let keys = hashes.iter().map(key);
        let found = self.holdings.leading(keys, self.visible.len(), |slot| visible(slot).map(|_| slot));
        found.into_iter().filter_map(|(slot, leading)| Some(Overlap { holder: visible(slot)?, leading })).collect()
    }

    /// Takes over what a prefix cache reports.
    pub(crate) fn apply(&mut self, holder: Holder, change: &Change) {
        match change {
            Change::Stored(blocks) => {
                let live = self.live(holder);
                self.insert(live, blocks);
                self.sweep(SWEPT_PER_BLOCK * blocks.len());
            }
            Change::Removed(blocks) => {
                if let Some(place) = self.places.get(&holder) {
                    blocks.iter().for_each(|hash| self.holdings.remove(place.live, key(hash)));
                }
                self.sweep(SWEPT_PER_BLOCK * blocks.len());
            }
            Change::Cleared => self.forget(holder),
            Change::Snapshot { blocks, first, last } => {
                let live = self.live(holder);
                let mut staged = self.places.get(&holder).and_then(|place| place.staged);
                if *first && let Some(slot) = staged.take() {
                    self.holdings.retire(slot);
                }
                let staged = staged.or_else(|| self.holdings.open());
                self.insert(staged, blocks);
                // Without a free slot the old knowledge stays, which is no worse than none.
                if let Some(live) = live {
                    self.places.insert(holder, Place { live, staged });
                }
                if *last && let (Some(live), Some(staged)) = (live, staged) {
                    self.hide(live);
                    self.holdings.retire(live);
                    self.show(staged, holder);
                    self.places.insert(holder, Place { live: staged, staged: None });
                }
                self.sweep(SWEPT_PER_BLOCK * blocks.len());
            }
        }
    }

    /// Drops all that is known of a prefix cache, in no time.
    pub(crate) fn forget(&mut self, holder: Holder) {
        if let Some(place) = self.places.remove(&holder) {
            self.hide(place.live);
            self.holdings.retire(place.live);
            if let Some(staged) = place.staged {
                self.holdings.retire(staged);
            }
        }
    }

    /// Drops all prefix caches of a worker.
    pub(crate) fn forget_worker(&mut self, worker: u32) {
        let holders: Vec<Holder> = self.places.keys().copied().filter(|holder| holder.worker == worker).collect();
        holders.into_iter().for_each(|holder| self.forget(holder));
    }

    /// Frees the memory of at most `pairs_max` pairs that were given up. Changes do this by themselves; a timer does it when
    /// none come.
    pub(crate) fn sweep(&mut self, pairs_max: usize) {
        self.holdings.sweep(pairs_max);
    }

    /// Blocks that are known of one prefix cache.
    pub(crate) fn num_blocks_of(&self, holder: Holder) -> usize {
        self.places.get(&holder).map_or(0, |place| self.holdings.num_keys(place.live))
    }

    /// (Cache, block) pairs that take memory now.
    #[cfg(test)]
    pub(crate) fn num_blocks(&self) -> usize {
        self.holdings.num_pairs()
    }

    /// Blocks that were not taken in because of [`BLOCKS_PER_HOLDER_MAX`] or [`BLOCKS_MAX`], since the start. What comes last
    /// is refused and not what is oldest evicted, because the oldest are the beginnings of prompts, without which the rest
    /// can't be found.
    pub(crate) fn num_refused(&self) -> u64 {
        self.num_refused
    }

    /// The visible slot of a prefix cache, opened where there is none; `None` when no slot is free.
    fn live(&mut self, holder: Holder) -> Option<Slot> {
        if let Some(place) = self.places.get(&holder) {
            return Some(place.live);
        }
        let live = self.holdings.open()?;
        self.show(live, holder);
        self.places.insert(holder, Place { live, staged: None });
        Some(live)
    }

    fn insert(&mut self, slot: Option<Slot>, blocks: &[BlockHash]) {
        let Some(slot) = slot else {
            self.num_refused += blocks.len() as u64;
            return;
        };
        for key in blocks.iter().map(key) {
            let is_full =
                self.holdings.num_keys(slot) >= BLOCKS_PER_HOLDER_MAX || self.holdings.num_pairs() >= BLOCKS_MAX;
            if !is_full {
                self.holdings.insert(slot, key);
            } else if !self.holdings.contains(slot, key) {
                self.num_refused += 1;
            }
        }
    }

    fn show(&mut self, slot: Slot, holder: Holder) {
        let index = usize::from(slot);
        if self.visible.len() <= index {
            self.visible.resize(index + 1, None);
        }
        self.visible[index] = Some(holder);
    }

    fn hide(&mut self, slot: Slot) {
        self.visible[usize::from(slot)] = None;
    }
}

fn key(hash: &BlockHash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = hash.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    const A: Holder = Holder { worker: 1, dp_rank: 0 };
    const B: Holder = Holder { worker: 2, dp_rank: 0 };

    fn hash(number: u64) -> BlockHash {
        let mut hash = [0; 16];
        hash[..8].copy_from_slice(&number.to_le_bytes());
        BlockHash(hash)
    }

    fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<BlockHash> {
        numbers.into_iter().map(hash).collect()
    }

    fn found(index: &ExactIndex, prompt: std::ops::Range<u64>) -> Vec<(Holder, u32)> {
        let mut found: Vec<_> = index.leading(&hashes(prompt)).iter().map(|o| (o.holder, o.leading)).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn leading_blocks_are_counted_up_to_the_first_gap() {
        let mut index = ExactIndex::default();
        index.apply(A, &Change::Stored(hashes([0, 1, 2, 5])));
        index.apply(B, &Change::Stored(hashes([1, 2])));
        assert_eq!(found(&index, 0..8), [(A, 3)]);
        index.apply(B, &Change::Stored(hashes([0])));
        assert_eq!(found(&index, 0..2), [(A, 2), (B, 2)]);
        index.apply(A, &Change::Removed(hashes([1])));
        assert_eq!(found(&index, 0..8), [(A, 1), (B, 3)]);
        assert_eq!(found(&index, 7..9), []);
        assert_eq!(found(&index, 0..0), []);
    }

    #[test]
    fn a_snapshot_replaces_all_at_once_when_its_last_part_is_there() {
        let mut index = ExactIndex::default();
        index.apply(A, &Change::Stored(hashes([0, 1])));
        let part =
            |numbers: &[u64], first, last| Change::Snapshot { blocks: hashes(numbers.iter().copied()), first, last };
        index.apply(A, &part(&[7], true, false));
        index.apply(A, &part(&[8], true, false));
        index.apply(A, &part(&[9], false, false));
        assert_eq!(
            (found(&index, 0..9), found(&index, 8..9)),
            (vec![(A, 2)], vec![]),
            "nothing is seen before the end"
        );
        index.apply(A, &part(&[10], false, true));
        assert_eq!((found(&index, 0..9), found(&index, 8..11)), (vec![], vec![(A, 3)]));
        assert_eq!(found(&index, 7..8), [], "the first part began a snapshot that was begun again");
        index.apply(A, &part(&[], true, true));
        assert_eq!(found(&index, 8..11), []);
    }

    #[test]
    fn a_cache_that_is_forgotten_leaves_no_memory_behind() {
        let mut index = ExactIndex::default();
        let rank = Holder { dp_rank: 1, ..A };
        for holder in [A, rank, B] {
            index.apply(holder, &Change::Stored(hashes(0..9)));
        }
        index.forget_worker(A.worker);
        assert_eq!(found(&index, 0..9), [(B, 9)]);
        index.apply(B, &Change::Cleared);
        assert_eq!(found(&index, 0..9), []);
        index.sweep(usize::MAX);
        assert_eq!(index.num_blocks(), 0);
    }

    #[test]
    fn the_bound_refuses_what_comes_last_and_counts_it() {
        let mut index = ExactIndex::default();
        let max = BLOCKS_PER_HOLDER_MAX as u64;
        index.apply(A, &Change::Stored(hashes(0..max + 3)));
        assert_eq!((index.num_blocks(), index.num_refused()), (BLOCKS_PER_HOLDER_MAX, 3));
        index.apply(A, &Change::Stored(hashes([0])));
        assert_eq!(index.num_refused(), 3, "what it has already is not refused");
        index.apply(B, &Change::Stored(hashes([0])));
        assert_eq!(found(&index, 0..1), [(A, 1), (B, 1)]);
        for worker in 3..6 {
            index.apply(Holder { worker, dp_rank: 0 }, &Change::Stored(hashes(0..max)));
        }
        assert_eq!((index.num_blocks(), index.num_refused()), (BLOCKS_MAX, 3 + 1));
    }

    fn changes() -> impl Strategy<Value = Vec<(u32, Change)>> {
        let blocks = || prop::collection::vec((0u64..12).prop_map(hash), 0..6);
        let change = prop_oneof![
            6 => blocks().prop_map(Change::Stored),
            3 => blocks().prop_map(Change::Removed),
            1 => Just(Change::Cleared),
            3 => (blocks(), any::<bool>(), any::<bool>())
                .prop_map(|(blocks, first, last)| Change::Snapshot { blocks, first, last }),
        ];
        prop::collection::vec((0u32..9, change), 0..80)
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_a_set_for_each_cache(changes in changes()) {
            let mut index = ExactIndex::default();
            let mut live: BTreeMap<u32, BTreeSet<BlockHash>> = BTreeMap::new();
            let mut staged: BTreeMap<u32, BTreeSet<BlockHash>> = BTreeMap::new();
            for (worker, change) in changes {
                index.apply(Holder { worker, dp_rank: 0 }, &change);
                match change {
                    Change::Stored(blocks) => live.entry(worker).or_default().extend(blocks),
                    Change::Removed(blocks) => blocks.iter().for_each(|hash| {
                        live.entry(worker).or_default().remove(hash);
                    }),
                    Change::Cleared => {
                        live.remove(&worker);
                        staged.remove(&worker);
                    }
                    Change::Snapshot { blocks, first, last } => {
                        if first {
                            staged.remove(&worker);
                        }
                        staged.entry(worker).or_default().extend(blocks);
                        if last {
                            live.insert(worker, staged.remove(&worker).unwrap_or_default());
                        }
                    }
                }
                for start in [0, 3] {
                    let prompt = start..12;
                    let expected: Vec<(Holder, u32)> = live
                        .iter()
                        .map(|(&worker, held)| {
                            let leading = prompt.clone().take_while(|&number| held.contains(&hash(number))).count();
                            (Holder { worker, dp_rank: 0 }, leading as u32)
                        })
                        .filter(|&(_, leading)| leading > 0)
                        .collect();
                    prop_assert_eq!(found(&index, prompt), expected);
                }
            }
        }
    }
}
