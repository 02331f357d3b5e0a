//! Which slots hold which keys: the table under both prefix indexes.
//!
//! A slot is a set of keys that is given up as a whole. That takes no time: a retired slot is no longer looked at, and its keys
//! leave the table a few at a time with [`Holdings::sweep`], so that a worker's restart never holds up the requests that wait
//! for the lock.
//!
//! Memory of one (slot, key) pair: 9 bytes in the slot's own set and, where no other slot has the key, 25 bytes in the table, both
//! divided by a hash table's fill of 44 to 88 %. A key of up to six slots needs nothing else.

use std::collections::{HashMap, HashSet, VecDeque, hash_map, hash_set};

/// Number of a slot.
pub(super) type Slot = u16;

/// Slots that a key has without a heap allocation of its own: what fits beside the length in the 16 bytes that the other form
/// needs too.
const FEW: usize = 6;

/// The slots that hold a key, in order, so that equal sets are equal slices.
#[derive(Debug)]
enum Slots {
    Few { len: u8, slots: [Slot; FEW] },
    Many(Box<Many>),
}

/// Boxed: one pointer wide in the table.
#[derive(Debug)]
struct Many {
    slots: Vec<Slot>,
}

impl Slots {
    fn one(slot: Slot) -> Self {
        let mut slots = [0; FEW];
        slots[0] = slot;
        Slots::Few { len: 1, slots }
    }

    fn as_slice(&self) -> &[Slot] {
        match self {
            Slots::Few { len, slots } => &slots[..usize::from(*len)],
            Slots::Many(many) => &many.slots,
        }
    }

    fn insert(&mut self, slot: Slot) {
        let Err(place) = self.as_slice().binary_search(&slot) else { return };
        match self {
            Slots::Few { len, slots } if usize::from(*len) < FEW => {
                slots.copy_within(place..usize::from(*len), place + 1);
                slots[place] = slot;
                *len += 1;
            }
            Slots::Few { slots, .. } => {
                let mut many = Vec::with_capacity(2 * FEW);
                many.extend_from_slice(slots);
                many.insert(place, slot);
                *self = Slots::Many(Box::new(Many { slots: many }));
            }
            Slots::Many(many) => many.slots.insert(place, slot),
        }
    }

    fn remove(&mut self, slot: Slot) {
        let Ok(place) = self.as_slice().binary_search(&slot) else { return };
        match self {
            Slots::Few { len, slots } => {
                slots.copy_within(place + 1..usize::from(*len), place);
                *len -= 1;
            }
            Slots::Many(many) => {
                many.slots.remove(place);
            }
        }
    }
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    /// Keyed by std's SipHash with a random key: who can choose keys can't make them meet in one bucket.
    holders: HashMap<u64, Slots>,
    slots: Vec<HashSet<u64>>,
    free: Vec<Slot>,
    retired: VecDeque<(Slot, hash_set::IntoIter<u64>)>,
    pairs: usize,
}

impl Holdings {
    /// An empty slot; `None` when all numbers are taken.
    pub(super) fn open(&mut self) -> Option<Slot> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = Slot::try_from(self.slots.len()).ok()?;
        self.slots.push(HashSet::new());
        Some(slot)
    }

    /// Gives a slot up. Its keys stay in the table until they are swept, and its number is not given out before.
    pub(super) fn retire(&mut self, slot: Slot) {
        let keys = std::mem::take(&mut self.slots[usize::from(slot)]);
        self.retired.push_back((slot, keys.into_iter()));
    }

    /// Takes at most `pairs_max` pairs of retired slots out of the table.
    pub(super) fn sweep(&mut self, pairs_max: usize) {
        let mut left = pairs_max;
        while let Some((slot, keys)) = self.retired.front_mut() {
            let slot = *slot;
            let before = left;
            for key in keys.by_ref().take(left) {
                left -= 1;
                Self::remove_holder(&mut self.holders, key, slot);
            }
            self.pairs -= before - left;
            if left == 0 {
                return;
            }
            self.retired.pop_front();
            self.free.push(slot);
        }
    }

    /// Puts a key into a slot; false if it is there already.
    pub(super) fn insert(&mut self, slot: Slot, key: u64) -> bool {
        let is_new = self.slots[usize::from(slot)].insert(key);
        if is_new {
            self.pairs += 1;
            match self.holders.entry(key) {
                hash_map::Entry::Occupied(mut entry) => entry.get_mut().insert(slot),
                hash_map::Entry::Vacant(entry) => {
                    entry.insert(Slots::one(slot));
                }
            }
        }
        is_new
    }

    /// Takes a key out of a slot.
    pub(super) fn remove(&mut self, slot: Slot, key: u64) {
        if self.slots[usize::from(slot)].remove(&key) {
            self.pairs -= 1;
            Self::remove_holder(&mut self.holders, key, slot);
        }
    }

    /// Whether a slot has a key.
    pub(super) fn contains(&self, slot: Slot, key: u64) -> bool {
        self.slots[usize::from(slot)].contains(&key)
    }

    /// Keys of a slot.
    pub(super) fn num_keys(&self, slot: Slot) -> usize {
        self.slots[usize::from(slot)].len()
    }

    /// Pairs in the table, those of retired slots that are not swept yet included: what memory is spent on.
    pub(super) fn num_pairs(&self) -> usize {
        self.pairs
    }

    /// For each member that has the first key: how many of the keys it has, counted from the first without a gap.
    ///
    /// `member` says whose a slot is, as a number below `members`, and nothing for slots that do not count. A member may have
    /// several slots, which then count as one.
    ///
    /// The scan is plain, one look-up a key until nobody is left: it ends at the first key for a prompt that nobody knows, and
    /// may not jump ahead, because a cache can hold a block whose predecessor it no longer has under that name. Neighbouring
    /// blocks mostly have the very same slots, and then nothing is done for each of them but to compare.
    pub(super) fn leading(
        &self,
        keys: impl Iterator<Item = u64>,
        members: usize,
        member: impl Fn(Slot) -> Option<Slot>,
    ) -> Vec<(Slot, u32)> {
        let mut counted = Vec::new();
        let mut active: Vec<Slot> = Vec::new();
        let mut marks: Vec<u32> = Vec::new();
        let mut previous: &[Slot] = &[];
        let mut depth = 0;
        for key in keys {
            let Some(slots) = self.holders.get(&key).map(Slots::as_slice) else { break };
            if depth == 0 {
                marks.resize(members, 0);
                for member in slots.iter().filter_map(|&slot| member(slot)) {
                    let mark = &mut marks[usize::from(member)];
                    if *mark == 0 {
                        *mark = 1;
                        active.push(member);
                    }
                }
            } else if slots != previous {
                slots.iter().filter_map(|&slot| member(slot)).for_each(|m| marks[usize::from(m)] = depth + 1);
                active.retain(|&member| {
                    let stays = marks[usize::from(member)] == depth + 1;
                    if !stays {
                        counted.push((member, depth));
                    }
                    stays
                });
            }
            if active.is_empty() {
                break;
            }
            previous = slots;
            depth += 1;
        }
        counted.extend(active.into_iter().map(|member| (member, depth)));
        counted
    }

    fn remove_holder(holders: &mut HashMap<u64, Slots>, key: u64, slot: Slot) {
        if let hash_map::Entry::Occupied(mut entry) = holders.entry(key) {
            entry.get_mut().remove(slot);
            if entry.get().as_slice().is_empty() {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn the_slots_of_a_key_are_two_words_wide() {
        assert_eq!(size_of::<Slots>(), 16);
    }

    #[test]
    fn a_number_is_given_out_again_only_after_its_keys_are_swept() {
        let mut holdings = Holdings::default();
        let slot = holdings.open().expect("a slot");
        (0..3).for_each(|key| assert!(holdings.insert(slot, key)));
        holdings.retire(slot);
        assert_eq!(holdings.open(), Some(1));
        holdings.sweep(3);
        assert_eq!((holdings.num_pairs(), holdings.open()), (0, Some(2)), "the sweep ended before it saw the end");
        holdings.sweep(1);
        assert_eq!(holdings.open(), Some(slot));
        assert!(holdings.holders.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(usize, u64),
        Remove(usize, u64),
        Retire(usize),
        Sweep(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0usize..12, 0u64..8).prop_map(|(slot, key)| Step::Insert(slot, key)),
            2 => (0usize..12, 0u64..8).prop_map(|(slot, key)| Step::Remove(slot, key)),
            1 => (0usize..12).prop_map(Step::Retire),
            1 => (0usize..9).prop_map(Step::Sweep),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_a_set_for_each_slot(steps in steps()) {
            let mut holdings = Holdings::default();
            let mut open: Vec<Slot> = (0..12).map(|_| holdings.open().expect("a slot")).collect();
            let mut model: BTreeMap<Slot, BTreeSet<u64>> = open.iter().map(|&slot| (slot, BTreeSet::new())).collect();
            for step in steps {
                match step {
                    Step::Insert(at, key) => {
                        let is_new = model.get_mut(&open[at]).expect("open").insert(key);
                        prop_assert_eq!(holdings.insert(open[at], key), is_new);
                    }
                    Step::Remove(at, key) => {
                        model.get_mut(&open[at]).expect("open").remove(&key);
                        holdings.remove(open[at], key);
                    }
                    Step::Retire(at) => {
                        holdings.retire(open[at]);
                        model.remove(&open[at]);
                        open[at] = holdings.open().expect("a slot");
                        prop_assert!(model.insert(open[at], BTreeSet::new()).is_none(), "a number in use was given out");
                    }
                    Step::Sweep(pairs_max) => holdings.sweep(pairs_max),
                }
                // Keys 0, 1, 2, … stand for a chain of blocks.
                let mut found = holdings.leading(0.., holdings.slots.len(), |slot| open.contains(&slot).then_some(slot));
                found.sort_unstable();
                let expected: Vec<(Slot, u32)> = model
                    .iter()
                    .map(|(&slot, keys)| (slot, (0u64..).take_while(|key| keys.contains(key)).count() as u32))
                    .filter(|&(_, leading)| leading > 0)
                    .collect();
                prop_assert_eq!(found, expected);
            }
            holdings.sweep(usize::MAX);
            let pairs: usize = model.values().map(BTreeSet::len).sum();
            prop_assert_eq!(holdings.num_pairs(), pairs);
            let keys: BTreeSet<u64> = model.into_values().flatten().collect();
            prop_assert_eq!(holdings.holders.len(), keys.len(), "no key stays without a slot");
        }
    }
}
