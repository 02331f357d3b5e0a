//! What is known exactly of workers' prefix caches, and how far it can be believed: the index that the workers' events fill, and for each
//! worker that is followed where its events stand. Does no I/O; the lock is held for one line of events or one look-up.

use crate::prefix::exact::ExactIndex;
use crate::prefix::{Change, Holder};
use baton_wire::BlockHash;
use std::collections::{BTreeMap, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;
use tokio::time::Instant;

/// How long after its events broke off what a worker had told is still believed: several tries to connect again (`kv_events/follow.rs`
/// pauses 5 s at most), and less than a busy cache takes to hold something else.
pub(crate) const STALE_AFTER: Duration = Duration::from_secs(30);

/// Pairs of given-up caches that are freed at once by [`Followed::sweep`]: some milliseconds.
const SWEPT_MAX: usize = 1 << 14;

/// The names of the full blocks of a request's prompts, in blocks of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    /// Tokens of a block.
    pub(crate) block_tokens: u32,
    /// For each prompt, in order.
    pub(crate) prompts: Vec<Vec<BlockHash>>,
}

/// Where a worker's events stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stream {
    /// Nothing is known yet.
    Connecting,
    /// All that it tells is applied.
    InStep,
    /// It broke off, and what was known is still believed.
    Lost,
    /// It broke off too long ago.
    Stale,
}

impl Stream {
    pub(crate) const ALL: [Stream; 4] = [Stream::Connecting, Stream::InStep, Stream::Lost, Stream::Stale];

    /// As JSON and metric labels spell it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Stream::Connecting => "connecting",
            Stream::InStep => "in-step",
            Stream::Lost => "lost",
            Stream::Stale => "stale",
        }
    }

    const fn is_believed(self) -> bool {
        matches!(self, Stream::InStep | Stream::Lost)
    }
}

#[derive(Clone, Copy, Debug, Default)]
enum Position {
    #[default]
    Connecting,
    InStep,
    Lost(Instant),
}

#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    position: Position,
    block_tokens: Option<u32>,
}

impl Standing {
    fn stream(self, now: Instant) -> Stream {
        match self.position {
            Position::Connecting => Stream::Connecting,
            Position::InStep => Stream::InStep,
            Position::Lost(at) if now.saturating_duration_since(at) < STALE_AFTER => Stream::Lost,
            Position::Lost(_) => Stream::Stale,
        }
    }
}

/// One worker, or one rank of it, for the debug page and the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) holder: Holder,
    pub(crate) stream: Stream,
    pub(crate) block_tokens: Option<u32>,
    pub(crate) blocks: usize,
}

/// The index with the workers that fill it.
#[derive(Debug, Default)]
pub(crate) struct Followed(RwLock<State>);

#[derive(Debug, Default)]
struct State {
    index: ExactIndex,
    holders: BTreeMap<Holder, Standing>,
    resyncs: u64,
}

impl Followed {
    /// The events of a worker, or of one of its ranks, are going to be asked for.
    pub(crate) fn begin(&self, holder: Holder) {
        self.write().holders.entry(holder).or_default();
    }

    /// A worker's events are applied up to now; its blocks have so many tokens, where it has said so.
    pub(crate) fn in_step(&self, holder: Holder, block_tokens: Option<u32>) {
        if let Some(standing) = self.write().holders.get_mut(&holder) {
            standing.position = Position::InStep;
            standing.block_tokens = block_tokens.or(standing.block_tokens);
        }
    }

    /// A worker's events broke off.
    pub(crate) fn lost(&self, holder: Holder, now: Instant) {
        if let Some(standing) = self.write().holders.get_mut(&holder)
            && let Position::InStep = standing.position
        {
            standing.position = Position::Lost(now);
        }
    }

    /// Events were missing or did not fit together.
    pub(crate) fn resync(&self) {
        self.write().resyncs += 1;
    }

    /// Takes over what a worker tells. Does nothing where the worker is followed no more.
    pub(crate) fn apply(&self, holder: Holder, change: &Change) {
        let mut state = self.write();
        if state.holders.contains_key(&holder) {
            state.index.apply(holder, change);
        }
    }

    /// A worker is followed no more: what was known of it is dropped.
    pub(crate) fn forget(&self, worker: u32) {
        let mut state = self.write();
        state.holders.retain(|holder, _| holder.worker != worker);
        state.index.forget_worker(worker);
    }

    /// Frees some of the memory of what was dropped.
    pub(crate) fn sweep(&self) {
        self.write().index.sweep(SWEPT_MAX);
    }

    /// Sizes of blocks of the workers that are believed, each once.
    pub(crate) fn block_sizes(&self, now: Instant) -> Vec<u32> {
        let state = self.read();
        let believed = state.holders.values().filter(|standing| standing.stream(now).is_believed());
        let mut sizes: Vec<u32> = believed.filter_map(|standing| standing.block_tokens).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// Prompt tokens that each cache has, of a request with these blocks: of each that is believed, be it none of them. Empty where
    /// nothing is asked for.
    pub(crate) fn cached_tokens(&self, asked: &[Blocks], now: Instant) -> HashMap<Holder, u64> {
        if asked.iter().all(|blocks| blocks.prompts.is_empty()) {
            return HashMap::new();
        }
        let state = self.read();
        let believed = state.holders.iter().filter(|(_, standing)| standing.stream(now).is_believed());
        let mut cached: HashMap<Holder, u64> = believed.map(|(holder, _)| (*holder, 0)).collect();
        if cached.is_empty() {
            return cached;
        }
        for Blocks { block_tokens, prompts } in asked {
            for overlap in prompts.iter().flat_map(|prompt| state.index.leading(prompt)) {
                if let Some(tokens) = cached.get_mut(&overlap.holder) {
                    *tokens += u64::from(overlap.leading) * u64::from(*block_tokens);
                }
            }
        }
        cached
    }

    /// All caches that are followed.
    pub(crate) fn known(&self, now: Instant) -> Vec<Known> {
        let state = self.read();
        let known = |(&holder, standing): (&Holder, &Standing)| Known {
            holder,
            stream: standing.stream(now),
            block_tokens: standing.block_tokens,
            blocks: state.index.num_blocks_of(holder),
        };
        state.holders.iter().map(known).collect()
    }

    /// How often events did not fit together, and blocks that found no room, since the start.
    pub(crate) fn troubles(&self) -> (u64, u64) {
        let state = self.read();
        (state.resyncs, state.index.num_refused())
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        // It holds hints: what a panic left half done costs time at worst.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(numbers: &[u8]) -> Vec<BlockHash> {
        numbers.iter().map(|number| BlockHash([*number; 16])).collect()
    }

    fn asked(prompts: &[&[u8]]) -> [Blocks; 1] {
        [Blocks { block_tokens: 32, prompts: prompts.iter().map(|prompt| hashes(prompt)).collect() }]
    }

    fn cached(followed: &Followed, prompts: &[&[u8]], now: Instant) -> Vec<(u32, u64)> {
        let tokens = followed.cached_tokens(&asked(prompts), now);
        let mut cached: Vec<_> = tokens.into_iter().map(|(holder, tokens)| (holder.worker, tokens)).collect();
        cached.sort_unstable();
        cached
    }

    #[test]
    fn prompts_of_one_request_are_added_up_and_a_worker_without_any_is_known_to_have_none() {
        let (followed, now) = (Followed::default(), Instant::now());
        for worker in [1, 2, 3] {
            followed.begin(Holder::of(worker));
        }
        followed.apply(Holder::of(1), &Change::Stored(hashes(&[1, 2, 3])));
        followed.in_step(Holder::of(1), Some(32));
        followed.in_step(Holder::of(2), Some(16));
        assert_eq!(cached(&followed, &[&[1, 2, 9], &[3]], now), [(1, 96), (2, 0)]);
        assert_eq!(followed.block_sizes(now), [16, 32]);
        assert_eq!(cached(&followed, &[], now), []);
    }

    #[test]
    fn what_a_worker_told_is_believed_for_a_while_after_its_events_broke_off() {
        let (followed, now) = (Followed::default(), Instant::now());
        followed.begin(Holder::of(1));
        followed.lost(Holder::of(1), now);
        assert_eq!(cached(&followed, &[&[1]], now), [], "nothing was known that could be believed");
        followed.apply(Holder::of(1), &Change::Stored(hashes(&[1])));
        followed.in_step(Holder::of(1), Some(32));
        followed.lost(Holder::of(1), now);
        followed.lost(Holder::of(1), now + STALE_AFTER);
        assert_eq!(cached(&followed, &[&[1]], now + STALE_AFTER / 2), [(1, 32)]);
        assert_eq!(cached(&followed, &[&[1]], now + STALE_AFTER), []);
        followed.in_step(Holder::of(1), None);
        assert_eq!(cached(&followed, &[&[1]], now + STALE_AFTER), [(1, 32)]);
    }

    #[test]
    fn a_worker_that_has_left_leaves_nothing_and_tells_nothing_more() {
        let (followed, now) = (Followed::default(), Instant::now());
        followed.begin(Holder::of(1));
        followed.in_step(Holder::of(1), Some(32));
        followed.apply(Holder::of(1), &Change::Stored(hashes(&[1, 2])));
        assert_eq!(
            followed.known(now),
            [Known { holder: Holder::of(1), stream: Stream::InStep, block_tokens: Some(32), blocks: 2 }]
        );
        followed.forget(1);
        followed.apply(Holder::of(1), &Change::Stored(hashes(&[1])));
        assert_eq!((followed.known(now), cached(&followed, &[&[1]], now)), (vec![], vec![]));
        followed.begin(Holder::of(1));
        followed.in_step(Holder::of(1), Some(32));
        assert_eq!(cached(&followed, &[&[1]], now), [(1, 0)]);
    }

    #[test]
    fn each_rank_of_a_worker_has_a_cache_of_its_own() {
        let (followed, now) = (Followed::default(), Instant::now());
        let rank = |dp_rank| Holder { worker: 1, dp_rank };
        for dp_rank in [0, 1] {
            followed.begin(rank(dp_rank));
            followed.in_step(rank(dp_rank), Some(32));
        }
        followed.apply(rank(1), &Change::Stored(hashes(&[1, 2])));
        // Nobody follows this one.
        followed.apply(rank(2), &Change::Stored(hashes(&[1, 2])));
        let cached: BTreeMap<Holder, u64> = followed.cached_tokens(&asked(&[&[1, 2, 3]]), now).into_iter().collect();
        assert_eq!(cached, BTreeMap::from([(rank(0), 0), (rank(1), 64)]));
        followed.lost(rank(1), now);
        let later = now + STALE_AFTER;
        let cached: BTreeMap<Holder, u64> = followed.cached_tokens(&asked(&[&[1, 2, 3]]), later).into_iter().collect();
        assert_eq!(cached, BTreeMap::from([(rank(0), 0)]), "the other rank is believed on its own");
        followed.forget(1);
        assert_eq!(followed.known(now), []);
    }
}
