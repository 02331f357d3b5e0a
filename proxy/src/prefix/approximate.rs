//! The approximate prefix index: where prompts with the same beginning were sent before, by their bytes alone.
//!
//! For engines that tell nothing of their caches. A prompt is cut into chunks of equal length from its start, each chunk is
//! hashed together with all before it, and who was sent a prompt is remembered as the holder of its chunks. The hash is keyed
//! with this process's own random bits, so that no client can make two prompts look alike, and begins with the tenant's salt,
//! so that no tenant meets another's prompts.
//!
//! Each holder has two generations of chunks. What is used goes into the young one; when that is full or old enough it becomes
//! the old one, and the old one is given up. So what was used in the last half of the time or room is kept, and what was not
//! goes, without a list of uses for every chunk.

use super::holdings::{Holdings, Slot};
use super::{Holder, Overlap};
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

/// Bytes of a chunk: some 128 tokens of English, four blocks of our engine or eight of vLLM's. Half as much would double what
/// each request costs here, for beginnings that an engine computes again in a few milliseconds.
pub(crate) const CHUNK_BYTES: usize = 512;

/// Most chunks of one prompt that are looked at: one mebibyte. Prompts that agree so far are sent to the same worker with good
/// reason.
pub(crate) const CHUNKS_PER_PROMPT_MAX: usize = 2048;

/// How long a chunk counts at most; at least half of that from its last use. The two minutes that are sure are what Dynamo's
/// index without events gives a block, and longer than a person takes for the next turn of a conversation.
pub(crate) const TTL: Duration = Duration::from_secs(240);

/// Most chunks of one holder: a million tokens, the KV cache of a large device. What its engine has evicted must not count as held.
pub(crate) const CHUNKS_PER_HOLDER_MAX: usize = 1 << 13;

/// Most (holder, chunk) pairs in all, some 80 MB; holders share it when they are many.
pub(crate) const CHUNKS_MAX: usize = 1 << 20;

/// Pairs of given-up generations that are swept for each chunk that is inserted: more than one, so that what is given up never
/// outgrows what comes.
const SWEPT_PER_CHUNK: usize = 4;

/// The beginnings of one prompt of one tenant.
#[derive(Clone, Debug)]
pub(crate) struct Chunks(Vec<u64>);

impl Chunks {
    /// How many there are: what [`Overlap::leading`] is a part of.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// The index.
#[derive(Debug)]
pub(crate) struct ApproximateIndex {
    hash_key: RandomState,
    holdings: Holdings,
    generations: HashMap<Holder, Generations>,
    /// What a slot is a generation of; `None` for those that are given up or free.
    owners: Vec<Option<Owner>>,
    num_refused: u64,
}

/// The two generations of a holder.
#[derive(Clone, Copy, Debug)]
struct Generations {
    young: Slot,
    young_since: Instant,
    old: Option<Slot>,
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    holder: Holder,
    /// The slot of the holder's first generation, which stands for both in a look-up.
    member: Slot,
    /// When the first chunk that went in has had its time.
    expires: Instant,
}

impl ApproximateIndex {
    /// An empty index. The key is random by its type's promise; it is taken as an argument so that a caller may share it.
    pub(crate) fn new(hash_key: RandomState) -> Self {
        ApproximateIndex {
            hash_key,
            holdings: Holdings::default(),
            generations: HashMap::new(),
            owners: Vec::new(),
            num_refused: 0,
        }
    }

    /// The chunks of a tenant's prompt. A last part of a chunk has no name: it would be another one with each turn of a
    /// conversation.
    pub(crate) fn chunks(&self, salt: u64, prompt: &[u8]) -> Chunks {
        let mut parent = self.hash_key.hash_one(salt);
        let next = |chunk: &[u8]| {
            let mut hasher = self.hash_key.build_hasher();
            hasher.write_u64(parent);
            hasher.write(chunk);
            parent = hasher.finish();
            parent
        };
        Chunks(prompt.chunks_exact(CHUNK_BYTES).take(CHUNKS_PER_PROMPT_MAX).map(next).collect())
    }

    /// How many leading chunks were sent to each holder lately; those with none are left out. In no order.
    pub(crate) fn matched(&self, chunks: &Chunks, now: Instant) -> Vec<Overlap> {
        let owner = |slot: Slot| self.owners.get(usize::from(slot)).copied().flatten();
        let member = |slot: Slot| owner(slot).filter(|owner| now < owner.expires).map(|owner| owner.member);
        let found = self.holdings.leading(chunks.0.iter().copied(), self.owners.len(), member);
        found.into_iter().filter_map(|(slot, leading)| Some(Overlap { holder: owner(slot)?.holder, leading })).collect()
    }

    /// Remembers that a prompt is sent to `holder`.
    pub(crate) fn insert(&mut self, holder: Holder, chunks: &Chunks, now: Instant) {
        let generation_max = self.generation_max();
        let mut generations = self.generations.get(&holder).copied();
        if generations.is_none_or(|g| now.saturating_duration_since(g.young_since) >= TTL / 2) {
            generations = self.rotate(holder, generations, now);
        }
        let mut taken = 0;
        for &chunk in &chunks.0 {
            let Some(current) = generations else { break };
            if self.holdings.num_keys(current.young) >= generation_max && !self.holdings.contains(current.young, chunk)
            {
                generations = self.rotate(holder, generations, now);
            }
            let Some(current) = generations.filter(|_| self.holdings.num_pairs() < CHUNKS_MAX) else { break };
            self.holdings.insert(current.young, chunk);
            taken += 1;
        }
        self.num_refused += (chunks.len() - taken) as u64;
        self.holdings.sweep(SWEPT_PER_CHUNK * chunks.len());
    }

    /// Drops all that is known of a holder, in no time: it was restarted, or is gone.
    pub(crate) fn forget(&mut self, holder: Holder) {
        if let Some(Generations { young, old, .. }) = self.generations.remove(&holder) {
            self.retire(young);
            old.into_iter().for_each(|slot| self.retire(slot));
        }
    }

    /// Drops all holders of a worker.
    pub(crate) fn forget_worker(&mut self, worker: u32) {
        let holders: Vec<Holder> = self.generations.keys().copied().filter(|holder| holder.worker == worker).collect();
        holders.into_iter().for_each(|holder| self.forget(holder));
    }

    /// Frees the memory of holders that were sent nothing for the whole of [`TTL`], and of at most `pairs_max` pairs that were
    /// given up.
    #[cfg(test)]
    pub(crate) fn sweep(&mut self, pairs_max: usize, now: Instant) {
        let is_over = |generations: &Generations| now.saturating_duration_since(generations.young_since) >= TTL;
        let over: Vec<Holder> =
            self.generations.iter().filter(|(_, g)| is_over(g)).map(|(&holder, _)| holder).collect();
        over.into_iter().for_each(|holder| self.forget(holder));
        self.holdings.sweep(pairs_max);
    }

    /// (Holder, chunk) pairs that take memory now.
    #[cfg(test)]
    pub(crate) fn num_chunks(&self) -> usize {
        self.holdings.num_pairs()
    }

    /// Chunks that were not remembered because of [`CHUNKS_MAX`], since the start.
    #[cfg(test)]
    pub(crate) fn num_refused(&self) -> u64 {
        self.num_refused
    }

    /// Chunks at which a generation is full. Three generations of each holder (one given up and not yet swept) fit into the whole.
    fn generation_max(&self) -> usize {
        let share = CHUNKS_MAX / (3 * self.generations.len().max(1));
        share.clamp(1, CHUNKS_PER_HOLDER_MAX / 2)
    }

    /// Gives up the old generation, makes the young one old and begins a new one; `None`, and no generation at all, when no
    /// slot is free.
    fn rotate(&mut self, holder: Holder, generations: Option<Generations>, now: Instant) -> Option<Generations> {
        if let Some(old) = generations.and_then(|generations| generations.old) {
            self.retire(old);
        }
        let old = generations.map(|generations| generations.young);
        let Some(young) = self.holdings.open() else {
            old.into_iter().for_each(|slot| self.retire(slot));
            self.generations.remove(&holder);
            return None;
        };
        let index = usize::from(young);
        if self.owners.len() <= index {
            self.owners.resize(index + 1, None);
        }
        self.owners[index] = Some(Owner { holder, member: young, expires: now + TTL });
        // The new slot stands for both from now on: the one that stood so far may be given up before it.
        if let Some(owner) = old.and_then(|old| self.owners[usize::from(old)].as_mut()) {
            owner.member = young;
        }
        let generations = Generations { young, young_since: now, old };
        self.generations.insert(holder, generations);
        Some(generations)
    }

    fn retire(&mut self, slot: Slot) {
        self.owners[usize::from(slot)] = None;
        self.holdings.retire(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Holder = Holder { worker: 1, dp_rank: 0 };
    const B: Holder = Holder { worker: 2, dp_rank: 0 };

    fn index() -> ApproximateIndex {
        ApproximateIndex::new(RandomState::new())
    }

    fn prompt(numbers: impl IntoIterator<Item = u32>) -> Vec<u8> {
        numbers.into_iter().flat_map(|number| number.to_le_bytes().repeat(CHUNK_BYTES / 4)).collect()
    }

    fn matched(index: &ApproximateIndex, chunks: &Chunks, now: Instant) -> Vec<(Holder, u32)> {
        let mut found: Vec<_> = index.matched(chunks, now).iter().map(|o| (o.holder, o.leading)).collect();
        found.sort_unstable();
        found
    }

    #[test]
    fn a_prompt_is_found_where_its_beginning_was_sent() {
        let (mut index, now) = (index(), Instant::now());
        let first = index.chunks(0, &prompt([1, 2, 3]));
        index.insert(A, &first, now);
        index.insert(B, &index.chunks(0, &prompt([1])), now);
        let turn_two = index.chunks(0, &prompt([1, 2, 3, 4, 5]));
        assert_eq!((turn_two.len(), matched(&index, &turn_two, now)), (5, vec![(A, 3), (B, 1)]));
        assert_eq!(
            matched(&index, &index.chunks(0, &prompt([2, 3])), now),
            [],
            "a chunk counts only with all before it"
        );
        index.forget_worker(A.worker);
        assert_eq!(matched(&index, &turn_two, now), [(B, 1)]);
    }

    #[test]
    fn the_same_prompt_of_another_tenant_is_not_found() {
        let (mut index, now) = (index(), Instant::now());
        let text = prompt(0..50);
        index.insert(A, &index.chunks(1, &text), now);
        assert_eq!(matched(&index, &index.chunks(1, &text), now), [(A, 50)]);
        assert_eq!(matched(&index, &index.chunks(2, &text), now), []);
    }

    #[test]
    fn another_process_names_the_same_chunks_otherwise() {
        let text = prompt(0..9);
        let (a, b) = (index().chunks(0, &text), index().chunks(0, &text));
        assert!(a.0.iter().zip(&b.0).all(|(a, b)| a != b));
    }

    #[test]
    fn only_whole_chunks_of_the_first_mebibyte_count() {
        let index = index();
        let check = |bytes, chunks| assert_eq!(index.chunks(0, &vec![b'x'; bytes]).len(), chunks, "{bytes} bytes");
        check(0, 0);
        check(CHUNK_BYTES - 1, 0);
        check(2 * CHUNK_BYTES + 1, 2);
        check(2 << 20, CHUNKS_PER_PROMPT_MAX);
    }

    #[test]
    fn a_chunk_lives_between_half_and_all_of_its_time_after_its_last_use() {
        let (mut index, start) = (index(), Instant::now());
        let (used, unused) = (index.chunks(0, &prompt([1])), index.chunks(0, &prompt([2])));
        index.insert(A, &used, start);
        index.insert(A, &unused, start);
        assert_eq!(matched(&index, &used, start + TTL - Duration::from_millis(1)), [(A, 1)]);
        assert_eq!(matched(&index, &used, start + TTL), []);
        let late = start + TTL / 2;
        index.insert(A, &used, late);
        assert_eq!(matched(&index, &used, late + TTL - Duration::from_millis(1)), [(A, 1)]);
        assert_eq!(matched(&index, &unused, late + TTL / 2), []);
        index.sweep(usize::MAX, late + TTL);
        assert_eq!((index.num_chunks(), matched(&index, &used, late + TTL)), (0, vec![]));
    }

    #[test]
    fn what_was_used_lately_survives_what_was_not() {
        let (mut index, now) = (index(), Instant::now());
        let system_prompt = index.chunks(0, &prompt([0]));
        for conversation in 1..2 * CHUNKS_PER_HOLDER_MAX as u32 {
            index.insert(A, &index.chunks(0, &prompt([0, conversation])), now);
        }
        assert_eq!(matched(&index, &system_prompt, now), [(A, 1)]);
        assert_eq!(
            matched(&index, &index.chunks(0, &prompt([0, 1])), now),
            [(A, 1)],
            "the first conversation was given up"
        );
        let last = 2 * CHUNKS_PER_HOLDER_MAX as u32 - 1;
        assert_eq!(matched(&index, &index.chunks(0, &prompt([0, last])), now), [(A, 2)]);
        assert!(index.num_chunks() <= 2 * CHUNKS_PER_HOLDER_MAX, "{}", index.num_chunks());
    }

    #[test]
    fn a_thousand_holders_stay_within_the_bound() {
        let (mut index, now) = (index(), Instant::now());
        for round in 0..3 {
            for worker in 0..1000 {
                let chunks = index.chunks(u64::from(worker), &prompt(round * 400..(round + 1) * 400));
                index.insert(Holder { worker, dp_rank: 0 }, &chunks, now);
            }
            assert!(index.num_chunks() <= CHUNKS_MAX);
        }
        assert_eq!(index.num_refused(), 0);
        for worker in 0..1000 {
            let chunks = index.chunks(u64::from(worker), &prompt(800..1200));
            index.insert(Holder { worker, dp_rank: 0 }, &chunks, now);
            assert_eq!(matched(&index, &chunks, now), [(Holder { worker, dp_rank: 0 }, 400)]);
        }
    }

    proptest! {
        /// The model remembers the last use of each beginning of a prompt, by its text.
        #[test]
        fn the_index_agrees_with_the_last_use_of_every_beginning(
            sends in prop::collection::vec((0u32..4, prop::collection::vec(0u32..3, 0..5), 0u64..100), 0..60),
            asked in prop::collection::vec(0u32..3, 0..5),
        ) {
            let (mut index, start) = (index(), Instant::now());
            let mut now = start;
            let mut last_use: HashMap<(u32, Vec<u32>), Instant> = HashMap::new();
            for (worker, numbers, pause) in sends {
                now += Duration::from_secs(pause);
                let holder = Holder { worker, dp_rank: 0 };
                let chunks = index.chunks(0, &prompt(numbers.iter().copied()));
                index.insert(holder, &chunks, now);
                for len in 1..=numbers.len() {
                    last_use.insert((worker, numbers[..len].to_vec()), now);
                }
                let found = matched(&index, &index.chunks(0, &prompt(asked.iter().copied())), now);
                for worker in 0..4 {
                    let age = |len: usize| {
                        last_use.get(&(worker, asked[..len].to_vec())).map(|&used| now.saturating_duration_since(used))
                    };
                    let leading = |max: Duration| (1..=asked.len()).take_while(|&len| age(len).is_some_and(|a| a < max)).count();
                    let answer = found.iter().find(|(h, _)| h.worker == worker).map_or(0, |&(_, leading)| leading as usize);
                    prop_assert!(leading(TTL / 2) <= answer && answer <= leading(TTL), "worker {}: {}", worker, answer);
                }
            }
        }
    }
}
